//! Typed access to one mapping of a configuration file.
//!
//! A section is read by naming each of its keys once, with the field that takes the value; a key
//! that is absent (or null) leaves the field's default. [`Section::finish`] then refuses every key
//! that was not named, so that the keys that are known are exactly those that are read.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::model::{ClientAuth, LeaseKind, LogFormat, ProxyForward, Right, Secret, WalCapture};
use super::yaml::{Key, Node, Value};
use super::{ConfigError, duration};

/// The file being read: its name, and where each key was seen.
pub struct Source<'a> {
    file: &'a str,
    lines: RefCell<BTreeMap<String, usize>>,
}

impl<'a> Source<'a> {
    /// A file of this name, of which nothing has been read yet.
    pub fn new(file: &'a str) -> Self {
        Self {
            file,
            lines: RefCell::default(),
        }
    }

    /// An error about the key with this full name (`data.dir`), with its line, or that of the section
    /// in which it is missing, if that is in the file.
    pub fn invalid(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        let lines = self.lines.borrow();
        fn above<'a>(at: &&'a str) -> Option<&'a str> {
            at.rsplit_once('.').map(|(above, _)| above)
        }
        let mut places = std::iter::successors(Some(key), above);
        ConfigError::Invalid {
            file: self.file.to_owned(),
            line: places.find_map(|at| lines.get(at).copied()),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }
}

/// One mapping.
pub struct Section<'a> {
    source: &'a Source<'a>,
    /// `lease.consul`; empty at the root.
    path: String,
    entries: &'a [(Key, Node)],
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// The mapping in `node`, which is the value of the key with the full name `path`. Null is an
    /// empty mapping.
    pub fn new(source: &'a Source<'a>, path: String, node: &'a Node) -> Result<Self, ConfigError> {
        let entries: &[_] = match &node.value {
            Value::Null => &[],
            Value::Map(entries) => entries,
            Value::Text(_) | Value::List(_) => {
                source.lines.borrow_mut().insert(path.clone(), node.line);
                return Err(source.invalid(&path, "must be a mapping of keys to values"));
            }
        };
        let section = Self {
            source,
            path,
            entries,
            known: Vec::new(),
        };
        if !section.path.is_empty() {
            let mut lines = source.lines.borrow_mut();
            lines.entry(section.path.clone()).or_insert(node.line);
        }
        for (key, _) in entries {
            let name = section.full(&key.name);
            source.lines.borrow_mut().insert(name, key.line);
        }
        Ok(section)
    }

    /// The full name of a key of this section.
    pub fn full(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// The value of `key`, unless it is absent or null.
    pub fn node(&mut self, key: &'static str) -> Option<&'a Node> {
        self.known.push(key);
        let (_, node) = self.entries.iter().find(|(k, _)| k.name == key)?;
        (node.value != Value::Null).then_some(node)
    }

    /// Sets `field` to the value of `key` if there is one.
    pub fn set<T: FromNode>(
        &mut self,
        key: &'static str,
        field: &mut T,
    ) -> Result<(), ConfigError> {
        if let Some(node) = self.node(key) {
            *field = T::from_node(node)
                .map_err(|problem| self.source.invalid(&self.full(key), problem))?;
        }
        Ok(())
    }

    /// The mapping under `key`, unless it is absent or null.
    pub fn section(&mut self, key: &'static str) -> Result<Option<Section<'a>>, ConfigError> {
        match self.node(key) {
            Some(node) => Section::new(self.source, self.full(key), node).map(Some),
            None => Ok(None),
        }
    }

    /// The mapping that is item `index` of the list under `key`.
    pub fn item(
        &self,
        key: &str,
        index: usize,
        node: &'a Node,
    ) -> Result<Section<'a>, ConfigError> {
        Section::new(self.source, self.full(&format!("{key}[{index}]")), node)
    }

    /// An error about a key of this section.
    pub fn invalid(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        self.source.invalid(&self.full(key), problem)
    }

    /// Refuses the first key that has not been asked for.
    pub fn finish(self) -> Result<(), ConfigError> {
        let unknown = |k: &&Key| !self.known.contains(&k.name.as_str());
        let Some(key) = self.entries.iter().map(|(k, _)| k).find(unknown) else {
            return Ok(());
        };
        let problem = match nearest(&key.name, &self.known) {
            Some(other) => format!("unknown key; did you mean \"{other}\"?"),
            None => format!("unknown key; known here: {}", self.known.join(", ")),
        };
        Err(self.invalid(&key.name, problem))
    }
}

/// A type that a value can be read as.
pub trait FromNode: Sized {
    /// The value, or what it should have been.
    fn from_node(node: &Node) -> Result<Self, String>;
}

fn text(node: &Node) -> Result<&str, String> {
    match &node.value {
        Value::Text(text) => Ok(text),
        _ => Err("must be a single value".into()),
    }
}

impl FromNode for String {
    fn from_node(node: &Node) -> Result<Self, String> {
        Ok(text(node)?.to_owned())
    }
}

impl FromNode for PathBuf {
    fn from_node(node: &Node) -> Result<Self, String> {
        match text(node)? {
            "" => Err("must not be empty".into()),
            path => Ok(path.into()),
        }
    }
}

impl FromNode for bool {
    /// The words of YAML 1.1 as well: LiteFS takes them.
    fn from_node(node: &Node) -> Result<Self, String> {
        let text = text(node)?;
        match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" => Ok(true),
            "false" | "no" | "off" | "n" => Ok(false),
            _ => Err(format!("must be true or false, not \"{text}\"")),
        }
    }
}

impl FromNode for u64 {
    fn from_node(node: &Node) -> Result<Self, String> {
        let text = text(node)?;
        text.parse()
            .map_err(|_| format!("must be a whole number, not \"{text}\""))
    }
}

impl FromNode for Duration {
    fn from_node(node: &Node) -> Result<Self, String> {
        duration::parse(text(node)?)
    }
}

impl FromNode for WalCapture {
    fn from_node(node: &Node) -> Result<Self, String> {
        match text(node)? {
            "gate" => Ok(Self::Gate),
            "tail" => Ok(Self::Tail),
            other => Err(format!("must be gate or tail, not \"{other}\"")),
        }
    }
}

impl FromNode for LogFormat {
    fn from_node(node: &Node) -> Result<Self, String> {
        match text(node)? {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("must be text or json, not \"{other}\"")),
        }
    }
}

impl FromNode for ProxyForward {
    fn from_node(node: &Node) -> Result<Self, String> {
        match text(node)? {
            "fly-replay" => Ok(Self::FlyReplay),
            "proxy" => Ok(Self::Proxy),
            "redirect" => Ok(Self::Redirect),
            other => Err(format!(
                "must be fly-replay, proxy or redirect, not \"{other}\""
            )),
        }
    }
}

impl FromNode for LeaseKind {
    fn from_node(node: &Node) -> Result<Self, String> {
        [Self::Static, Self::Consul, Self::Etcd]
            .into_iter()
            .find(|kind| node.value == Value::Text(kind.name().into()))
            .ok_or_else(|| "must be static, consul or etcd".into())
    }
}

impl FromNode for Secret {
    fn from_node(node: &Node) -> Result<Self, String> {
        String::from_node(node).map(Secret)
    }
}

impl FromNode for ClientAuth {
    fn from_node(node: &Node) -> Result<Self, String> {
        match text(node)? {
            "none" => Ok(Self::None),
            "required" => Ok(Self::Required),
            other => Err(format!("must be none or required, not \"{other}\"")),
        }
    }
}

impl FromNode for Right {
    fn from_node(node: &Node) -> Result<Self, String> {
        let text = text(node)?;
        [Self::Read, Self::Replicate, Self::Admin]
            .into_iter()
            .find(|right| right.name() == text)
            .ok_or_else(|| format!("must be read, replicate or admin, not \"{text}\""))
    }
}

impl<T: FromNode> FromNode for Vec<T> {
    fn from_node(node: &Node) -> Result<Self, String> {
        match &node.value {
            Value::List(items) => items.iter().map(T::from_node).collect(),
            _ => Err("must be a list".into()),
        }
    }
}

impl<T: FromNode> FromNode for Option<T> {
    fn from_node(node: &Node) -> Result<Self, String> {
        T::from_node(node).map(Some)
    }
}

/// The known key that `key` is most likely a slip of, if one is near.
fn nearest(key: &str, known: &[&'static str]) -> Option<&'static str> {
    // `allow_other` and `allowOther` are the commonest slips and no typing errors.
    let key: String = key
        .chars()
        .take(64)
        .filter(|c| *c != '_' && *c != '-')
        .collect();
    let key = key.to_ascii_lowercase();
    known
        .iter()
        .map(|k| (strsim::levenshtein(&key, &k.replace('-', "")), *k))
        .filter(|(distance, k)| *distance <= (k.len() / 4).max(2) && *distance < k.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, k)| k)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_find_their_key() {
        let known = ["dir", "allow-other", "advertise-url", "candidate"];
        for (slip, key) in [
            ("candiate", Some("candidate")),
            ("allow_other", Some("allow-other")),
            ("advertiseURL", Some("advertise-url")),
            ("Dir", Some("dir")),
            ("consul", None),
            ("", None),
        ] {
            assert_eq!(nearest(slip, &known), key, "{slip}");
        }
    }
}
