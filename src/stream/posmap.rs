//! The position map: what a replica posts to `/stream`, its position in each database.
//!
//! `count u32`, then per database `name length u32 · name · TXID u64 · post-apply checksum u64`,
//! sorted by name, integers big-endian.
//!
//! Decoding is bounded by the body that is there (which the server bounds by [`MAX_LEN`]): a count
//! or a length that the bytes at hand cannot hold is an error before anything is allocated for it.

use std::collections::BTreeMap;

use crate::ltx::Pos;
use crate::store::check_database;

use super::MAX_NAME_LEN;

/// The positions of a node's databases by name.
pub type PosMap = BTreeMap<String, Pos>;

/// The longest encoded map in bytes that a node takes: more than 19,000 databases with the longest
/// names, 80,000 with names of 30 bytes.
pub const MAX_LEN: usize = 4 << 20;

/// An entry is at least a length, one byte of name, a TXID and a checksum.
const MIN_ENTRY_LEN: usize = 4 + 1 + 8 + 8;

/// Why bytes are no position map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PosMapError {
    /// It ends early.
    #[error("the position map is cut off at byte {0}")]
    Cut(usize),
    /// It states more entries than its bytes can hold.
    #[error("a position map of {len} bytes cannot hold {count} databases")]
    Count {
        /// The count that it states.
        count: u32,
        /// Its length in bytes.
        len: usize,
    },
    /// A name that is not UTF-8.
    #[error("a database name in the position map is not UTF-8")]
    NotUtf8,
    /// A name that is no database name, as the store says.
    #[error("position map: {0}")]
    Name(String),
    /// A name that cannot be one.
    #[error("a database name in the position map is {0} bytes long, more than {MAX_NAME_LEN}")]
    NameLen(usize),
    /// One database twice.
    #[error("database {0:?} is in the position map twice")]
    Duplicate(String),
    /// Bytes behind the last entry.
    #[error("{0} bytes follow the end of the position map")]
    Trailing(usize),
}

/// The bytes of `map`.
pub fn encode(map: &PosMap) -> Vec<u8> {
    let names: usize = map.keys().map(String::len).sum();
    let mut out = Vec::with_capacity(4 + map.len() * 20 + names);
    // Names are file names and there is a directory for each: both far below 2^32.
    out.extend_from_slice(&(map.len() as u32).to_be_bytes());
    for (name, pos) in map {
        out.extend_from_slice(&(name.len() as u32).to_be_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(&pos.txid.to_be_bytes());
        out.extend_from_slice(&pos.checksum.to_be_bytes());
    }
    out
}

/// Reads a map that is exactly `bytes`. Entries may come in any order.
pub fn decode(bytes: &[u8]) -> Result<PosMap, PosMapError> {
    let mut rest = bytes;
    let count = u32::from_be_bytes(take(&mut rest, bytes)?);
    if count as usize > rest.len() / MIN_ENTRY_LEN {
        return Err(PosMapError::Count {
            count,
            len: bytes.len(),
        });
    }
    let mut map = PosMap::new();
    for _ in 0..count {
        let len = u32::from_be_bytes(take(&mut rest, bytes)?) as usize;
        if len > MAX_NAME_LEN {
            return Err(PosMapError::NameLen(len));
        }
        let Some((name, tail)) = rest.split_at_checked(len) else {
            return Err(PosMapError::Cut(bytes.len()));
        };
        rest = tail;
        let name = std::str::from_utf8(name).map_err(|_| PosMapError::NotUtf8)?;
        check_database(name).map_err(|e| PosMapError::Name(e.to_string()))?;
        let txid = u64::from_be_bytes(take(&mut rest, bytes)?);
        let checksum = u64::from_be_bytes(take(&mut rest, bytes)?);
        if map
            .insert(name.to_owned(), Pos { txid, checksum })
            .is_some()
        {
            return Err(PosMapError::Duplicate(name.to_owned()));
        }
    }
    if rest.is_empty() {
        Ok(map)
    } else {
        Err(PosMapError::Trailing(rest.len()))
    }
}

/// Takes `N` bytes off `rest`, which is the end of `whole`.
fn take<const N: usize>(rest: &mut &[u8], whole: &[u8]) -> Result<[u8; N], PosMapError> {
    let (head, tail) = rest
        .split_first_chunk()
        .ok_or(PosMapError::Cut(whole.len()))?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn litefs_sends_four_zero_bytes_for_no_databases() {
        let golden = std::fs::read(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../shared/fixtures/stream/request-body.bin"
        ))
        .unwrap();
        assert_eq!(decode(&golden), Ok(PosMap::new()));
        assert_eq!(encode(&PosMap::new()), golden);
    }

    #[test]
    fn layout() {
        let map = PosMap::from([(
            "a.db".into(),
            Pos {
                txid: 2,
                checksum: 3 << 56,
            },
        )]);
        let bytes = b"\0\0\0\x01\0\0\0\x04a.db\0\0\0\0\0\0\0\x02\x03\0\0\0\0\0\0\0";
        assert_eq!(encode(&map), bytes);
        assert_eq!(decode(bytes), Ok(map));
    }

    #[test]
    fn what_a_peer_states_is_checked_against_what_it_sent() {
        let count = 0xffff_fff0u32;
        assert_eq!(
            decode(&count.to_be_bytes()),
            Err(PosMapError::Count { count, len: 4 })
        );
        let mut long = b"\0\0\0\x01\xff\xff\xff\xf0".to_vec();
        long.extend_from_slice(&[0; 17]);
        assert_eq!(decode(&long), Err(PosMapError::NameLen(0xffff_fff0)));
        assert_eq!(decode(b"\0\0\0"), Err(PosMapError::Cut(3)));
        assert_eq!(decode(b"\0\0\0\0x"), Err(PosMapError::Trailing(1)));
        let entry = |name: &[u8]| {
            let mut e = (name.len() as u32).to_be_bytes().to_vec();
            e.extend_from_slice(name);
            e.extend_from_slice(&[0; 16]);
            e
        };
        let map = |entries: &[&[u8]]| {
            let mut m = (entries.len() as u32).to_be_bytes().to_vec();
            entries
                .iter()
                .for_each(|name| m.extend_from_slice(&entry(name)));
            m
        };
        assert!(matches!(
            decode(&map(&[b"../x"])),
            Err(PosMapError::Name(_))
        ));
        assert!(matches!(
            decode(&map(&[b"", b"long enough"])),
            Err(PosMapError::Name(_))
        ));
        assert_eq!(decode(&map(&[b"\xff"])), Err(PosMapError::NotUtf8));
        assert_eq!(
            decode(&map(&[b"a", b"a"])),
            Err(PosMapError::Duplicate("a".into()))
        );
    }

    proptest! {
        #[test]
        fn maps_round_trip(
            names in prop::collection::btree_set("[a-zé][a-z0-9. ]{0,30}", 0..30),
            txid in any::<u64>(),
            checksum in any::<u64>(),
        ) {
            let map: PosMap = names.into_iter().map(|n| (n, Pos { txid, checksum })).collect();
            let bytes = encode(&map);
            prop_assert_eq!(decode(&bytes), Ok(map));
            for cut in 0..bytes.len() {
                prop_assert!(decode(&bytes[..cut]).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(count in 0u32..5, bytes in prop::collection::vec(0u8..9, 0..200)) {
            let _ = decode(&bytes);
            let mut counted = count.to_be_bytes().to_vec();
            counted.extend_from_slice(&bytes);
            let _ = decode(&counted);
        }
    }
}
