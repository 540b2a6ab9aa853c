//! Transactions that follow each other, as one change of the database.
//!
//! Invariant: the first file follows the database's state, and each other one the file before it, in
//! position, checksum and size, just as if each were applied by itself.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::ltx::{CHECKSUM_FLAG, Pos};

use super::capture::Captured;
use super::database::State;
use super::pages::PageList;
use super::receive::{self, Incoming};
use super::sums::PageSums;

/// See the module.
pub(super) struct Group<'a> {
    files: &'a mut [Incoming],
    each: &'a [Captured],
    /// What all of them make of the database.
    whole: Cow<'a, Captured>,
    /// Of each page that `whole` names, which file has it as it is then; empty: the one that there is.
    newest: Vec<usize>,
}

impl<'a> Group<'a> {
    /// One file.
    pub fn of_one(captured: &'a Captured, file: &'a mut Incoming) -> Group<'a> {
        Group {
            files: std::slice::from_mut(file),
            each: std::slice::from_ref(captured),
            whole: Cow::Borrowed(captured),
            newest: Vec::new(),
        }
    }

    /// Files that were [`check`]ed, with what each makes of the database.
    pub fn new(each: &'a [Captured], files: &'a mut [Incoming]) -> Group<'a> {
        let (whole, newest) = merge(each);
        Group {
            files,
            each,
            whole: Cow::Owned(whole),
            newest,
        }
    }

    /// Only the first files stay.
    pub fn truncate(&mut self, len: usize) {
        let files = std::mem::take(&mut self.files);
        self.files = &mut files[..len];
        self.each = &self.each[..len];
        if len > 0 {
            let (whole, newest) = merge(self.each);
            (self.whole, self.newest) = (Cow::Owned(whole), newest);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    pub fn files(&mut self) -> &mut [Incoming] {
        self.files
    }

    pub fn each(&self) -> &'a [Captured] {
        self.each
    }

    /// What all of them together make of the database.
    pub fn whole(&self) -> &Captured {
        &self.whole
    }

    /// Bytes of the database afterwards.
    pub fn size(&self) -> u64 {
        u64::from(self.whole.commit) * u64::from(self.whole.page_size)
    }

    /// The change counter afterwards, if one of them has page 1.
    pub fn change_counter(&self) -> Option<u32> {
        self.files.iter().rev().find_map(|f| f.change_counter)
    }

    /// The files, each with the pages that it has as they are afterwards.
    pub fn files_and_newest(&mut self) -> impl Iterator<Item = (&mut Incoming, Newest<'_>)> {
        let (changed, files) = (&*self.whole.changed, &self.newest[..]);
        let each = self.files.iter_mut().enumerate();
        each.map(move |(file, incoming)| {
            let newest = Newest {
                changed,
                files,
                file,
            };
            (incoming, newest)
        })
    }
}

/// See [`Group::files_and_newest`].
pub(super) struct Newest<'a> {
    changed: &'a PageList,
    files: &'a [usize],
    file: usize,
}

impl Newest<'_> {
    /// The page's checksum, if it is one of them.
    pub fn get(&self, pgno: u32) -> Option<u64> {
        let i = self.changed.find(pgno)?;
        let is_it = self.files.get(i).is_none_or(|file| *file == self.file);
        is_it.then(|| self.changed.sum(i))
    }
}

/// All of them as one, and which has the newest version of each page.
fn merge(each: &[Captured]) -> (Captured, Vec<usize>) {
    let last = each.last().expect("a group has a file");
    let mut pages = BTreeMap::new();
    for (file, captured) in each.iter().enumerate() {
        pages.extend(captured.changed.iter().map(|(p, sum)| (p, (sum, file))));
    }
    pages.retain(|pgno, _| *pgno <= last.commit);
    let whole = Captured {
        changed: Arc::new(pages.iter().map(|(p, (sum, _))| (*p, *sum)).collect()),
        ..last.clone()
    };
    let newest = pages.into_values().map(|(_, file)| file).collect();
    (whole, newest)
}

/// What each of the files makes of the database; `None` if one of them does not follow, or is of
/// another kind: a snapshot, a deletion, pages of another size.
pub(super) fn check(st: &State, files: &[Incoming]) -> Option<Vec<Captured>> {
    let mut expected = Expected {
        sums: &st.sums,
        page_size: st.page_size,
        pages: st.page_count,
        pos: st.pos,
        changed: HashMap::new(),
        checksum: st.sums.checksum(),
    };
    let mut was_wal = st.wal_mode;
    files
        .iter()
        .map(|file| {
            let captured = expected.take(file).then(|| file.captured(was_wal))?;
            was_wal = captured.wal_mode;
            Some(captured)
        })
        .collect()
}

/// The database as the files that were looked at make it.
struct Expected<'a> {
    sums: &'a PageSums,
    page_size: u32,
    pages: u32,
    pos: Pos,
    changed: HashMap<u32, u64>,
    checksum: u64,
}

impl Expected<'_> {
    /// Whether the file follows; the database is as it makes it then.
    fn take(&mut self, file: &Incoming) -> bool {
        let h = &file.header;
        let follows = !h.is_snapshot()
            && h.commit > 0
            && h.page_size == self.page_size
            && h.pre_apply_pos() == self.pos
            && receive::holds_what_it_adds(file, self.pages);
        if !follows {
            return false;
        }
        for pgno in h.commit.saturating_add(1)..=self.pages {
            self.set(pgno, 0);
        }
        for (pgno, sum) in file.pages.iter() {
            self.set(pgno, sum);
        }
        (self.pages, self.pos) = (h.commit, file.pos());
        self.checksum | CHECKSUM_FLAG == file.post_apply_checksum
    }

    fn set(&mut self, pgno: u32, sum: u64) {
        let old = self.changed.insert(pgno, sum);
        self.checksum ^= old.unwrap_or_else(|| self.sums.get(pgno)) ^ sum;
    }
}
