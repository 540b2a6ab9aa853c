//! YAML text as a tree of scalars, lists and mappings that knows its line numbers.
//!
//! Scalars stay text: what a value means is decided by who asks for it, so `hostname: 0123` is the
//! host name `0123`. What is read is bounded in depth and in nodes, expanded aliases included.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle};

/// The deepest nesting that is accepted; a configuration needs 4.
const MAX_DEPTH: usize = 32;
/// The most nodes in a tree.
const MAX_NODES: usize = 2_000;
/// The longest scalar, in bytes: with the number of nodes it bounds what aliases can multiply.
const MAX_SCALAR: usize = 16 * 1024;

/// A value and the line (from 1) it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The line of the value's first character.
    pub line: usize,
    /// The value.
    pub value: Value,
}

/// What a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nothing: an empty value, `~` or `null`.
    Null,
    /// A scalar's text, without its quotes.
    Text(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping in the file's order; no key is there twice.
    Map(Vec<(Key, Node)>),
}

/// A mapping's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The key's text.
    pub name: String,
    /// The line it stands on, from 1.
    pub line: usize,
}

/// Why a text is no YAML, or none that is accepted here.
#[derive(Debug, PartialEq, Eq)]
pub struct YamlError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: String,
}

fn error<T>(line: usize, problem: impl Into<String>) -> Result<T, YamlError> {
    Err(YamlError {
        line,
        problem: problem.into(),
    })
}

/// The document in `text`; `Null` when it is empty.
pub fn parse(text: &str) -> Result<Node, YamlError> {
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = match event {
            Ok(event) => event,
            Err(e) => return error(e.marker().line(), format!("not valid YAML: {}", e.info())),
        };
        builder.event(event, span.start.line())?;
    }
    Ok(builder.root.unwrap_or(Node {
        line: 1,
        value: Value::Null,
    }))
}

/// A list or mapping whose end has not been seen.
struct Open {
    node: Node,
    anchor: usize,
    /// In a mapping: the key whose value comes next.
    key: Option<Key>,
}

#[derive(Default)]
struct Builder {
    root: Option<Node>,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl Builder {
    fn event(&mut self, event: Event, line: usize) -> Result<(), YamlError> {
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                error(line, "a second document; a configuration is one document")
            }
            Event::Scalar(text, ..) if text.len() > MAX_SCALAR => {
                error(line, format!("a value of more than {MAX_SCALAR} bytes"))
            }
            Event::Scalar(text, style, anchor, _) => {
                let null = style == ScalarStyle::Plain
                    && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
                let value = if null {
                    Value::Null
                } else {
                    Value::Text(text.into_owned())
                };
                self.complete(Node { line, value }, anchor)
            }
            Event::SequenceStart(anchor, _) => self.begin(Value::List(Vec::new()), anchor, line),
            Event::MappingStart(anchor, _) => self.begin(Value::Map(Vec::new()), anchor, line),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.complete(open.node, open.anchor),
                None => error(line, "not valid YAML: an end without a beginning"),
            },
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => {
                    let copy = Node {
                        line,
                        value: node.value.clone(),
                    };
                    self.nodes += count(&copy);
                    self.complete(copy, 0)
                }
                None => error(line, "an alias of an anchor that is not complete here"),
            },
            _ => Ok(()),
        }
    }

    fn begin(&mut self, value: Value, anchor: usize, line: usize) -> Result<(), YamlError> {
        if self.open.len() == MAX_DEPTH {
            return error(line, format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.open.push(Open {
            node: Node { line, value },
            anchor,
            key: None,
        });
        Ok(())
    }

    /// Puts a whole node where it belongs: into the innermost open list or mapping, or at the root.
    fn complete(&mut self, node: Node, anchor: usize) -> Result<(), YamlError> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return error(node.line, format!("more than {MAX_NODES} values"));
        }
        if anchor != 0 {
            self.nodes += count(&node);
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.node.value {
            Value::List(items) => items.push(node),
            Value::Map(entries) => match open.key.take() {
                Some(key) => entries.push((key, node)),
                None => {
                    let line = node.line;
                    let Value::Text(name) = node.value else {
                        return error(line, "a key must be a plain word");
                    };
                    if let Some((first, _)) = entries.iter().find(|(k, _)| k.name == name) {
                        let first = first.line;
                        return error(
                            line,
                            format!("key \"{name}\" is here a second time, first on line {first}"),
                        );
                    }
                    open.key = Some(Key { name, line });
                }
            },
            // Only lists and mappings are ever open.
            Value::Null | Value::Text(_) => {}
        }
        Ok(())
    }
}

/// How many nodes a tree has. Its depth is bounded, so the recursion is.
fn count(node: &Node) -> usize {
    1 + match &node.value {
        Value::Null | Value::Text(_) => 0,
        Value::List(items) => items.iter().map(count).sum(),
        Value::Map(entries) => entries.iter().map(|(_, n)| count(n)).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry<'a>(node: &'a Node, name: &str) -> &'a Node {
        let Value::Map(entries) = &node.value else {
            panic!("no mapping: {node:?}");
        };
        &entries.iter().find(|(k, _)| k.name == name).unwrap().1
    }

    #[test]
    fn a_tree_with_lines() {
        let tree = parse("# c\na:\n  b: 'x y'\n  c: [1, two]\nd:\ne: ~\nf: \"\"\n").unwrap();
        let a = entry(&tree, "a");
        assert_eq!(entry(a, "b").value, Value::Text("x y".into()));
        assert_eq!(entry(a, "b").line, 3);
        let Value::List(items) = &entry(a, "c").value else {
            panic!()
        };
        assert_eq!(items[1].value, Value::Text("two".into()));
        assert_eq!(entry(&tree, "d").value, Value::Null);
        assert_eq!(entry(&tree, "e").value, Value::Null);
        assert_eq!(entry(&tree, "f").value, Value::Text(String::new()));
        assert_eq!(parse("").unwrap().value, Value::Null);
        assert_eq!(parse("# only a comment\n").unwrap().value, Value::Null);
    }

    #[test]
    fn aliases_are_copies() {
        let tree = parse("a: &x {k: v}\nb: *x\n").unwrap();
        assert_eq!(entry(&tree, "a").value, entry(&tree, "b").value);
        assert_eq!(entry(&tree, "b").line, 2);
    }

    #[test]
    fn errors_name_the_line() {
        for (text, line, problem) in [
            ("a: 1\nb: [", 2, "not valid YAML"),
            ("a: 1\n\tb: 2", 2, "not valid YAML"),
            ("a: 1\nb: 2\na: 3", 3, "first on line 1"),
            ("a: 1\n---\nb: 2", 2, "second document"),
            ("a: 1\n[x]: 2", 2, "plain word"),
            ("a: &x [*x]", 1, "alias"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.problem.contains(problem), "{text}: {e:?}");
            assert!(e.line.abs_diff(line) <= 1, "{text}: {e:?}");
        }
    }

    #[test]
    fn bombs_are_refused() {
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&"- ".repeat(100_000)).is_err());
        assert!(parse(&"x".repeat(MAX_SCALAR + 1)).is_err());
        let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let refs = vec![format!("*a{}", i - 1); 8].join(", ");
            laughs += &format!("a{i}: &a{i} [{refs}]\n");
        }
        let e = parse(&laughs).unwrap_err();
        assert!(e.problem.contains("more than"), "{e:?}");
    }
}
