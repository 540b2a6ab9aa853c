//! The pages of a transaction with their checksums.
//!
//! Invariants:
//! - They ascend, each number once.
//! - Pages that follow each other take 8 bytes each: a large transaction is mostly such, and a whole
//!   database is nothing else.

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PageList {
    /// Where a row of pages begins: its first page, and the place of that one's checksum.
    rows: Vec<(u32, usize)>,
    sums: Vec<u64>,
}

impl PageList {
    /// Adds a page behind the others.
    pub fn push(&mut self, pgno: u32, sum: u64) {
        let next = self
            .rows
            .last()
            .map(|row| self.pgno_in(*row, self.sums.len()));
        assert!(next.is_none_or(|next| pgno >= next), "pages ascend");
        if next != Some(pgno) {
            self.rows.push((pgno, self.sums.len()));
        }
        self.sums.push(sum);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// The pages and their checksums.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        let ends = self.rows.iter().skip(1).map(|(_, at)| *at);
        let rows = self.rows.iter().zip(ends.chain([self.sums.len()]));
        rows.flat_map(move |(row, end)| (row.0..).zip(self.sums[row.1..end].iter().copied()))
    }

    /// The pages.
    pub fn pgnos(&self) -> impl Iterator<Item = u32> + '_ {
        self.iter().map(|(pgno, _)| pgno)
    }

    /// Which of them the page is, if it is one.
    pub fn find(&self, pgno: u32) -> Option<usize> {
        let row = self.rows.partition_point(|(first, _)| *first <= pgno);
        let (first, at) = *self.rows.get(row.checked_sub(1)?)?;
        let end = self.rows.get(row).map_or(self.sums.len(), |(_, at)| *at);
        let i = at + (pgno - first) as usize;
        (i < end).then_some(i)
    }

    /// The checksum of the one that [`PageList::find`] found.
    pub fn sum(&self, i: usize) -> u64 {
        self.sums[i]
    }

    /// Gives the first of them another checksum.
    pub fn set_first(&mut self, sum: u64) {
        if let Some(first) = self.sums.first_mut() {
            *first = sum;
        }
    }

    /// The last page.
    pub fn last(&self) -> Option<u32> {
        let row = self.rows.last()?;
        Some(self.pgno_in(*row, self.sums.len() - 1))
    }

    /// All checksums in one, without the flag bit.
    pub fn total(&self) -> u64 {
        self.sums.iter().fold(0, |total, sum| total ^ sum)
    }

    fn pgno_in(&self, (first, at): (u32, usize), i: usize) -> u32 {
        first + (i - at) as u32
    }
}

impl FromIterator<(u32, u64)> for PageList {
    fn from_iter<I: IntoIterator<Item = (u32, u64)>>(pages: I) -> PageList {
        let mut list = PageList::default();
        pages
            .into_iter()
            .for_each(|(pgno, sum)| list.push(pgno, sum));
        list
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::PageList;

    proptest! {
        #[test]
        fn it_is_what_was_put_into_it(
            pages in proptest::collection::btree_map(1u32..60, any::<u64>(), 0..50),
        ) {
            let list: PageList = pages.iter().map(|(pgno, sum)| (*pgno, *sum)).collect();
            let expected: Vec<(u32, u64)> = pages.clone().into_iter().collect();
            prop_assert_eq!(list.iter().collect::<Vec<_>>(), expected);
            prop_assert_eq!((list.len(), list.is_empty()), (pages.len(), pages.is_empty()));
            prop_assert_eq!(list.last(), pages.keys().last().copied());
            prop_assert_eq!(list.total(), pages.values().fold(0, |t, s| t ^ s));
            for pgno in 0..=60 {
                let found = list.find(pgno);
                prop_assert_eq!(found.map(|i| list.sum(i)), pages.get(&pgno).copied());
                prop_assert_eq!(found, pages.keys().position(|p| *p == pgno));
            }
        }
    }

    #[test]
    fn pages_that_follow_each_other_are_one_row() {
        let list: PageList = (1..=1000).map(|pgno| (pgno, u64::from(pgno))).collect();
        assert_eq!(list.rows, [(1, 0)]);
    }
}
