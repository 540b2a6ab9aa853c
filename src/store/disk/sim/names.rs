//! Names that are not durable yet: which changes of them a crash keeps.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::state::{Id, Node, State};

/// A name that was given to a node, or taken away.
#[derive(Clone, Debug)]
pub(super) struct NameChange {
    pub(super) at: (Id, OsString),
    pub(super) to: Option<Id>,
    /// Of a rename: the name that went.
    pub(super) from: Option<(Id, OsString)>,
}

impl NameChange {
    pub(super) fn touches(&self, other: &NameChange) -> bool {
        let mine = [Some(&self.at), self.from.as_ref()];
        let theirs = [Some(&other.at), other.from.as_ref()];
        mine.iter().flatten().any(|n| theirs.contains(&Some(n)))
    }
}

impl State {
    pub(super) fn change_name(&mut self, change: NameChange) {
        if let Some((dir, name)) = &change.from {
            self.visible(*dir).remove(name);
        }
        let (dir, name) = change.at.clone();
        match change.to {
            Some(id) => self.visible(dir).insert(name, id),
            None => self.visible(dir).remove(&name),
        };
        self.names.push(change);
    }

    /// Makes those changes of names durable that are wanted, with all that they stand on.
    pub(super) fn settle_names(&mut self, wanted: impl FnMut(&NameChange) -> bool) {
        let mut keep: Vec<bool> = self.names.iter().map(wanted).collect();
        for later in (0..keep.len())
            .rev()
            .filter(|i| keep[*i])
            .collect::<Vec<_>>()
        {
            let mut group = vec![later];
            while let Some(i) = group.pop() {
                for (earlier, change) in self.names[..i].iter().enumerate() {
                    if !keep[earlier] && change.touches(&self.names[i]) {
                        keep[earlier] = true;
                        group.push(earlier);
                    }
                }
            }
        }
        let names = std::mem::take(&mut self.names);
        for (change, keep) in names.into_iter().zip(keep) {
            if !keep {
                self.names.push(change);
                continue;
            }
            let durable = |s: &mut State, id: Id, f: &dyn Fn(&mut BTreeMap<OsString, Id>)| {
                if let Node::Dir { durable, .. } = &mut s.nodes[id] {
                    f(durable);
                }
            };
            if let Some((dir, name)) = &change.from {
                durable(self, *dir, &|d| {
                    d.remove(name);
                });
            }
            let (dir, name) = &change.at;
            durable(self, *dir, &|d| {
                match change.to {
                    Some(id) => d.insert(name.clone(), id),
                    None => d.remove(name),
                };
            });
        }
    }
}
