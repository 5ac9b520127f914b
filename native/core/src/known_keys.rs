//! What the lines of the file of known keys say (docs/security.md).
//!
//! The first line says what the file is. Each other one binds a node id to a key, or to none, and counts more than those
//! before it. Lines are only ever appended, so a write that was cut off spoils the end alone.

use std::fmt::Write;
use std::str;

use hashbrown::HashMap;

use crate::types::{Fingerprint, NodeId};

pub const HEADER: &str = "macula-peer known keys 1\n";

/// In the place of a key: the name is bound no more.
const NONE: &str = "-";

/// What a file says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The bindings, oldest first.
    pub keys: Vec<(NodeId, Fingerprint)>,
    /// The length of what can be read. What follows was being written when the node or its host failed.
    pub len: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// This is another kind of file.
    Header,
    /// This line cannot be read, and others follow that can: it was not cut off, but damaged.
    Line(usize),
}

pub fn read(file: &[u8]) -> Result<Contents, Unreadable> {
    let Some(lines) = file.strip_prefix(HEADER.as_bytes()) else {
        // Cut off in the first line.
        return if HEADER.as_bytes().starts_with(file) { Ok(Contents::default()) } else { Err(Unreadable::Header) };
    };
    let mut bound: HashMap<NodeId, (usize, Option<Fingerprint>)> = HashMap::new();
    let (mut len, mut damaged) = (HEADER.len(), None);
    for (number, line) in (2..).zip(lines.split_inclusive(|&byte| byte == b'\n')) {
        match (entry(line), damaged) {
            (Some(_), Some(damaged)) => return Err(Unreadable::Line(damaged)),
            (Some((node, key)), None) => {
                bound.insert(node, (number, key));
                len += line.len();
            }
            (None, damaged_before) => damaged = damaged_before.or(Some(number)),
        }
    }
    let mut keys: Vec<_> = bound.into_iter().filter_map(|(node, (number, key))| Some((number, node, key?))).collect();
    keys.sort_unstable_by_key(|(number, ..)| *number);
    Ok(Contents { keys: keys.into_iter().map(|(_, node, key)| (node, key)).collect(), len })
}

/// Appends a line.
pub fn put(file: &mut String, node: &NodeId, key: Option<&Fingerprint>) {
    // Writing to a string does not fail.
    for byte in node.as_bytes() {
        let _ = write!(file, "{byte:02x}");
    }
    let _ = match key {
        Some(key) => writeln!(file, " {key}"),
        None => writeln!(file, " {NONE}"),
    };
}

/// The whole of a file with these bindings.
pub fn whole(keys: &[(NodeId, Fingerprint)]) -> String {
    let mut file = HEADER.to_owned();
    keys.iter().for_each(|(node, key)| put(&mut file, node, Some(key)));
    file
}

fn entry(line: &[u8]) -> Option<(NodeId, Option<Fingerprint>)> {
    let line = str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (node, key) = line.split_once(' ')?;
    let key = if key == NONE { None } else { Some(key.parse().ok()?) };
    Some((NodeId::new(&unhex(node)?)?, key))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn node(name: &[u8]) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn key(n: u8) -> Fingerprint {
        [n; 32].into()
    }

    fn appended(changes: &[(&[u8], Option<u8>)]) -> String {
        let mut file = HEADER.to_owned();
        changes.iter().for_each(|(name, n)| put(&mut file, &node(name), n.map(key).as_ref()));
        file
    }

    #[test]
    fn the_last_line_for_a_name_counts() {
        let file = appended(&[(b"a", Some(1)), (b"b", Some(2)), (b"c", Some(3)), (b"a", Some(4)), (b"b", None)]);
        let read = read(file.as_bytes()).unwrap();
        assert_eq!(read.keys, [(node(b"c"), key(3)), (node(b"a"), key(4))]);
        assert_eq!(read.len, file.len());
        assert_eq!(whole(&read.keys), appended(&[(b"c", Some(3)), (b"a", Some(4))]));
        assert!(file.contains(&format!("61 {}\n", key(4))), "{file}");
    }

    #[test]
    fn a_damaged_line_is_passed_over_at_the_end_alone() {
        let good = appended(&[(b"a", Some(1)), (b"b", Some(2))]);
        for torn in ["6", "63 ", "63 0303", "63 -", "\0\0\0\0", "63 0303\n", "\0\n\0\0", "zz -\n", "6 -\n", " -\n"] {
            let file = good.clone() + torn;
            assert_eq!(read(file.as_bytes()).map(|read| (read.keys.len(), read.len)), Ok((2, good.len())), "{torn:?}");
            let file = good.clone() + torn.trim_end_matches('\n') + "\n" + "64 -\n";
            if torn != "63 -" {
                assert_eq!(read(file.as_bytes()), Err(Unreadable::Line(4)), "{torn:?}");
            }
        }
    }

    #[test]
    fn another_kind_of_file_is_told() {
        for other in ["-----BEGIN PRIVATE KEY-----\n", "macula-peer known keys 2\n", "\n", "61 -\n"] {
            assert_eq!(read(other.as_bytes()), Err(Unreadable::Header), "{other}");
        }
        for cut in 0..HEADER.len() {
            assert_eq!(read(&HEADER.as_bytes()[..cut]), Ok(Contents::default()));
        }
    }

    proptest! {
        #[test]
        fn a_file_cut_off_anywhere_can_be_read(
            changes in vec((vec(any::<u8>(), 1..255), prop::option::of(any::<u8>())), 0..20), cut in any::<prop::sample::Index>(),
        ) {
            let changes: Vec<_> = changes.iter().map(|(name, n)| (&name[..], *n)).collect();
            let file = appended(&changes);
            let cut = cut.index(file.len() + 1);
            let whole_lines = file[..cut].matches('\n').count().saturating_sub(1);
            let expected = read(appended(&changes[..whole_lines]).as_bytes()).unwrap();
            let found = read(&file.as_bytes()[..cut]).unwrap();
            prop_assert_eq!(&found.keys, &expected.keys);
            prop_assert!(cut < HEADER.len() || found.len == expected.len);
        }

        #[test]
        fn noise_is_read_without_a_panic(noise in vec(any::<u8>(), 0..300)) {
            let _ = read(&noise);
            let _ = read(&[HEADER.as_bytes(), &noise].concat());
        }
    }
}
