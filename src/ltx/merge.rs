//! Merging consecutive files into one of the same effect.
//!
//! A page is taken from the newest file that has it, unless a later file cut it off: it must not be
//! above the commit of any newer file. A file with pages of another size than its predecessor's
//! holds all pages, so that nothing older counts. All files are read at once, a page at a time;
//! memory is bounded by their number.

use std::io::{Read, Write};

use super::{Decoder, Encoder, Header, LtxError, Pos};

struct Input<R: Read> {
    decoder: Decoder<R>,
    page: Vec<u8>,
    /// The page that `page` holds.
    at: Option<u32>,
    /// Pages above count no more.
    limit: u32,
}

impl<R: Read> Input<R> {
    fn next(&mut self) -> Result<(), LtxError> {
        self.at = self.decoder.page(&mut self.page)?;
        Ok(())
    }
}

/// Writes one file for `files`, which follow each other, oldest first; at least one. Returns the
/// position that it ends at. Give readers and a writer that buffer.
///
/// # Errors
/// [`LtxError::NotConsecutive`], or whatever the decoder or the encoder finds; what was written is
/// of no use then.
pub fn merge<R: Read, W: Write>(files: Vec<R>, out: W) -> Result<Pos, LtxError> {
    let mut inputs = Vec::with_capacity(files.len());
    for file in files {
        let decoder = Decoder::new(file)?;
        let header = *decoder.header();
        inputs.push(Input {
            page: vec![0; header.page_size as usize],
            decoder,
            at: None,
            limit: header.commit,
        });
    }
    let headers: Vec<Header> = inputs.iter().map(|i| *i.decoder.header()).collect();
    let (Some(first), Some(last)) = (headers.first(), headers.last()) else {
        return Err(LtxError::NotConsecutive { min: 0, after: 0 });
    };
    limit(&mut inputs, &headers);
    let header = Header {
        min_txid: first.min_txid,
        pre_apply_checksum: first.pre_apply_checksum,
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 0,
        ..*last
    };
    let mut encoder = Encoder::new(out, header)?;
    for input in &mut inputs {
        input.next()?;
    }
    while let Some(pgno) = inputs.iter().filter_map(|i| i.at).min() {
        let holds = |i: &&Input<R>| i.at == Some(pgno) && pgno <= i.limit;
        if let Some(newest) = inputs.iter().rev().find(holds) {
            encoder.page(pgno, &newest.page)?;
        }
        for input in inputs.iter_mut().filter(|i| i.at == Some(pgno)) {
            input.next()?;
        }
    }
    let mut end: Option<Pos> = None;
    for (input, header) in inputs.into_iter().zip(&headers) {
        let (_, trailer) = input.decoder.finish()?;
        if let Some(before) = end
            && header.pre_apply_pos() != before
        {
            return Err(LtxError::NotConsecutive {
                min: header.min_txid,
                after: before.txid,
            });
        }
        end = Some(Pos {
            txid: header.max_txid,
            checksum: trailer.post_apply_checksum,
        });
    }
    let end = end.unwrap_or_default();
    encoder.finish(end.checksum)?;
    Ok(end)
}

fn limit<R: Read>(inputs: &mut [Input<R>], headers: &[Header]) {
    let mut limit = u32::MAX;
    let mut page_size = headers.last().map_or(0, |h| h.page_size);
    for (input, header) in inputs.iter_mut().zip(headers).rev() {
        if header.page_size != page_size {
            limit = 0;
            page_size = header.page_size;
        }
        limit = limit.min(header.commit);
        input.limit = limit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ltx::{CHECKSUM_FLAG, page_checksum};

    /// A file of one transaction: pages with their fill byte, and the checksum after it.
    fn file(
        txid: u64,
        pre: u64,
        post: u64,
        commit: u32,
        size: u32,
        pages: &[(u32, u8)],
    ) -> Vec<u8> {
        let header = Header {
            compressed: txid.is_multiple_of(2),
            page_size: size,
            commit,
            min_txid: txid,
            max_txid: txid,
            timestamp: txid as i64,
            pre_apply_checksum: pre,
            wal_offset: 0,
            wal_size: 0,
            wal_salt1: 0,
            wal_salt2: 0,
            node_id: 7,
        };
        let mut out = Vec::new();
        let mut encoder = Encoder::new(&mut out, header).unwrap();
        for (pgno, fill) in pages {
            encoder.page(*pgno, &vec![*fill; size as usize]).unwrap();
        }
        encoder.finish(post).unwrap();
        out
    }

    fn sum(size: u32, pages: &[(u32, u8)]) -> u64 {
        let sums = pages
            .iter()
            .map(|(p, f)| page_checksum(*p, &vec![*f; size as usize]));
        sums.fold(0, |t, s| t ^ s) | CHECKSUM_FLAG
    }

    fn pages(ltx: &[u8]) -> (Header, Vec<(u32, u8)>) {
        let mut decoder = Decoder::new(ltx).unwrap();
        let header = *decoder.header();
        let mut page = vec![0; header.page_size as usize];
        let mut pages = Vec::new();
        while let Some(pgno) = decoder.page(&mut page).unwrap() {
            pages.push((pgno, page[0]));
        }
        decoder.finish().unwrap();
        (header, pages)
    }

    #[test]
    fn the_newest_page_counts_and_what_was_cut_off_does_not() {
        let states = [
            vec![(1, 1), (2, 1), (3, 1), (4, 1)],
            vec![(1, 2), (2, 1)],
            vec![(1, 3), (2, 1), (3, 3)],
        ];
        let sums: Vec<u64> = states.iter().map(|s| sum(512, s)).collect();
        let files = [
            file(1, 0, sums[0], 4, 512, &states[0]),
            file(2, sums[0], sums[1], 2, 512, &[(1, 2)]),
            file(3, sums[1], sums[2], 3, 512, &[(1, 3), (3, 3)]),
        ];
        let mut out = Vec::new();
        let end = merge(files.iter().map(|f| &f[..]).collect(), &mut out).unwrap();
        assert_eq!((end.txid, end.checksum), (3, sums[2]));
        let (header, merged) = pages(&out);
        assert_eq!((header.min_txid, header.max_txid, header.commit), (1, 3, 3));
        assert_eq!(merged, states[2]);
        let mut out = Vec::new();
        merge(files[1..].iter().map(|f| &f[..]).collect(), &mut out).unwrap();
        let (header, merged) = pages(&out);
        assert_eq!((header.min_txid, header.pre_apply_checksum), (2, sums[0]));
        assert_eq!(merged, [(1, 3), (3, 3)]);
        let gap = merge(vec![&files[0][..], &files[2][..]], Vec::new());
        assert!(matches!(
            gap,
            Err(LtxError::NotConsecutive { min: 3, after: 1 })
        ));
    }

    #[test]
    fn pages_of_another_size_and_a_drop_leave_nothing_older() {
        let (small, large) = (vec![(1, 1), (2, 1)], vec![(1, 2)]);
        let files = [
            file(1, 0, sum(512, &small), 2, 512, &small),
            file(2, sum(512, &small), sum(1024, &large), 1, 1024, &large),
            file(3, sum(1024, &large), CHECKSUM_FLAG, 0, 1024, &[]),
            file(4, CHECKSUM_FLAG, sum(512, &small), 2, 512, &small),
        ];
        for (n, want) in [(2, &large), (3, &vec![]), (4, &small)] {
            let mut out = Vec::new();
            merge(files[..n].iter().map(|f| &f[..]).collect(), &mut out).unwrap();
            assert_eq!(&pages(&out).1, want, "{n} files");
        }
    }
}
