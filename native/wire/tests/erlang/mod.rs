//! Printed Erlang terms, as far as the vectors have them.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::str::Chars;

/// An Erlang term. Equality is that of `=:=`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Term {
    Atom(String),
    Int(i128),
    /// The bits of a float.
    Float(u64),
    Binary(Vec<u8>),
    List(Vec<Term>),
    Tuple(Vec<Term>),
    Map(BTreeMap<Term, Term>),
    /// What no frame can carry: integers beyond 128 bits, bitstrings, improper lists, pids, ports,
    /// references, funs.
    Unsendable(&'static str),
}

impl Term {
    pub(crate) fn atom(name: &str) -> Self {
        Self::Atom(name.to_owned())
    }

    pub(crate) fn error(reason: Self) -> Self {
        Self::Tuple(vec![Self::atom("error"), reason])
    }
}

pub(crate) fn parse(text: &str) -> Term {
    let mut parser = Parser { chars: text.chars().peekable() };
    let term = parser.term();
    assert_eq!(parser.chars.next(), None, "after the term: {text}");
    term
}

struct Parser<'a> {
    chars: Peekable<Chars<'a>>,
}

impl Parser<'_> {
    fn term(&mut self) -> Term {
        match *self.chars.peek().unwrap() {
            '{' => self.tuple(),
            '[' => self.list(),
            '<' => self.binary_or_pid(),
            '#' => self.map_or_handle(),
            '"' => Term::List(self.quoted('"').chars().map(|c| Term::Int(c as i128)).collect()),
            '\'' => Term::Atom(self.quoted('\'')),
            '-' | '0'..='9' => self.number(),
            _ => self.bare_atom_or_fun(),
        }
    }

    fn tuple(&mut self) -> Term {
        self.expect("{");
        Term::Tuple(self.terms_until('}'))
    }

    fn list(&mut self) -> Term {
        self.expect("[");
        let mut items = Vec::new();
        if self.skip(']') {
            return Term::List(items);
        }
        loop {
            items.push(self.term());
            match self.chars.next().unwrap() {
                ',' => (),
                ']' => return Term::List(items),
                '|' => {
                    self.term();
                    self.expect("]");
                    return Term::Unsendable("improper list");
                }
                other => panic!("{other:?} in a list"),
            }
        }
    }

    fn binary_or_pid(&mut self) -> Term {
        self.expect("<");
        if !self.skip('<') {
            self.handle_body();
            return Term::Unsendable("pid");
        }
        if self.chars.peek() == Some(&'"') {
            let bytes = self.quoted('"').chars().map(|c| u8::try_from(c).unwrap()).collect();
            self.expect(">>");
            return Term::Binary(bytes);
        }
        let mut bytes = Vec::new();
        let mut bits = false;
        while !self.skip('>') {
            self.skip(',');
            bytes.push(self.digits().parse().unwrap());
            if self.skip(':') {
                self.digits();
                bits = true;
            }
        }
        self.expect(">");
        if bits { Term::Unsendable("bitstring") } else { Term::Binary(bytes) }
    }

    fn map_or_handle(&mut self) -> Term {
        self.expect("#");
        if !self.skip('{') {
            let kind = self.word();
            self.expect("<");
            self.handle_body();
            return Term::Unsendable(match kind.as_str() {
                "Port" => "port",
                "Ref" => "reference",
                "Fun" => "fun",
                other => panic!("#{other}<…>"),
            });
        }
        let mut pairs = BTreeMap::new();
        if self.skip('}') {
            return Term::Map(pairs);
        }
        loop {
            let key = self.term();
            self.expect(" => ");
            let value = self.term();
            assert_eq!(pairs.insert(key, value), None, "equal keys");
            if self.skip('}') {
                return Term::Map(pairs);
            }
            self.expect(",");
        }
    }

    fn bare_atom_or_fun(&mut self) -> Term {
        let name = self.word();
        assert!(!name.is_empty(), "at {:?}", self.chars.peek());
        if name != "fun" {
            return Term::Atom(name);
        }
        while self.chars.peek().is_some_and(|c| !",}]".contains(*c)) {
            self.chars.next();
        }
        Term::Unsendable("fun")
    }

    fn number(&mut self) -> Term {
        let mut text = String::new();
        while let Some(c) = self.chars.next_if(|c| c.is_ascii_digit() || "-+.e".contains(*c)) {
            text.push(c);
        }
        if text.contains('.') {
            return Term::Float(text.parse::<f64>().unwrap().to_bits());
        }
        text.parse().map_or(Term::Unsendable("big integer"), Term::Int)
    }

    fn quoted(&mut self, quote: char) -> String {
        assert_eq!(self.chars.next(), Some(quote));
        let mut text = String::new();
        loop {
            match self.chars.next().unwrap() {
                '\\' => text.push(self.escape()),
                c if c == quote => return text,
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> char {
        match self.chars.next().unwrap() {
            'x' => {
                self.expect("{");
                let mut hex = String::new();
                while let Some(c) = self.chars.next_if(char::is_ascii_hexdigit) {
                    hex.push(c);
                }
                self.expect("}");
                char::from_u32(u32::from_str_radix(&hex, 16).unwrap()).unwrap()
            }
            c @ '0'..='7' => {
                let mut octal = String::from(c);
                while octal.len() < 3 {
                    let Some(c) = self.chars.next_if(|c| ('0'..='7').contains(c)) else {
                        break;
                    };
                    octal.push(c);
                }
                char::from_u32(u32::from_str_radix(&octal, 8).unwrap()).unwrap()
            }
            'b' => '\u{8}',
            'd' => '\u{7f}',
            'e' => '\u{1b}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            's' => ' ',
            't' => '\t',
            'v' => '\u{b}',
            c => c,
        }
    }

    fn terms_until(&mut self, close: char) -> Vec<Term> {
        let mut terms = Vec::new();
        while !self.skip(close) {
            if !terms.is_empty() {
                self.expect(",");
            }
            terms.push(self.term());
        }
        terms
    }

    fn handle_body(&mut self) {
        while self.chars.next().unwrap() != '>' {}
    }

    fn digits(&mut self) -> String {
        let mut text = String::new();
        while let Some(c) = self.chars.next_if(char::is_ascii_digit) {
            text.push(c);
        }
        text
    }

    fn word(&mut self) -> String {
        let mut text = String::new();
        while let Some(c) = self.chars.next_if(|c| c.is_alphanumeric() || "_@".contains(*c)) {
            text.push(c);
        }
        text
    }

    fn skip(&mut self, c: char) -> bool {
        self.chars.next_if_eq(&c).is_some()
    }

    fn expect(&mut self, text: &str) {
        for c in text.chars() {
            assert_eq!(self.chars.next(), Some(c), "in {text:?}");
        }
    }
}
