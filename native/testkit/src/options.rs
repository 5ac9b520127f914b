//! Command lines of the form `--name value`.

use std::str::FromStr;

/// The options given, in order.
#[derive(Debug)]
pub struct Options(Vec<(String, String)>);

impl Options {
    /// Reads `arguments`, of which every name must be one of `known`.
    pub fn read(arguments: impl IntoIterator<Item = String>, known: &[&str]) -> Result<Self, String> {
        let mut arguments = arguments.into_iter();
        let mut options = Vec::new();
        while let Some(name) = arguments.next() {
            if !known.contains(&name.as_str()) {
                return Err(format!("unknown option {name}, expected one of {}", known.join(" ")));
            }
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
            options.push((name, value));
        }
        Ok(Self(options))
    }

    /// The value of `name`, or `default`.
    pub fn get<T: FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        self.find(name).unwrap_or(Ok(default))
    }

    /// The value of `name`, which must be there.
    pub fn require<T: FromStr>(&self, name: &str) -> Result<T, String> {
        self.find(name).unwrap_or_else(|| Err(format!("{name} is required")))
    }

    /// All values of `name`, or `default` when there is none.
    pub fn all(&self, name: &str, default: &[&str]) -> Vec<String> {
        let given: Vec<_> = self.0.iter().filter(|(n, _)| n == name).map(|(_, value)| value.clone()).collect();
        if given.is_empty() { default.iter().map(|&value| value.into()).collect() } else { given }
    }

    fn find<T: FromStr>(&self, name: &str) -> Option<Result<T, String>> {
        let (_, value) = self.0.iter().rev().find(|(n, _)| n == name)?;
        Some(value.parse().map_err(|_| format!("bad value for {name}: {value}")))
    }
}
