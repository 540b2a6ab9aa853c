//! Where two histories parted: a list of positions, as a replica posts it to `/common` of the
//! primary, and as the answer has it with one entry or none.
//!
//! Format: 16 bytes a position, `TXID u64 · post-apply checksum u64`, big-endian, newest first.
//! LiteFS has nothing of the kind: only a primary that says its number is asked.

use crate::ltx::Pos;

/// Bytes of a position.
const LEN: usize = 16;

/// The longest list that is read, in bytes: 65,536 positions.
pub const MAX_LEN: usize = 65_536 * LEN;

/// The list's bytes.
pub fn encode(positions: &[Pos]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(positions.len() * LEN);
    for pos in positions {
        bytes.extend_from_slice(&pos.txid.to_be_bytes());
        bytes.extend_from_slice(&pos.checksum.to_be_bytes());
    }
    bytes
}

/// Reads a list; `None` if it is none.
pub fn decode(bytes: &[u8]) -> Option<Vec<Pos>> {
    if bytes.len() > MAX_LEN {
        return None;
    }
    let (entries, []) = bytes.as_chunks::<LEN>() else {
        return None;
    };
    let entry = |bytes: &[u8; LEN]| {
        let (txid, checksum) = bytes.split_at(8);
        Some(Pos {
            txid: u64::from_be_bytes(txid.try_into().ok()?),
            checksum: u64::from_be_bytes(checksum.try_into().ok()?),
        })
    };
    entries.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_back_and_nothing_else_is() {
        let list = [(2, u64::MAX), (1, 0x8000_0000_0000_0001)];
        let list = list.map(|(txid, checksum)| Pos { txid, checksum });
        let bytes = encode(&list);
        assert_eq!(bytes.len(), 32);
        assert_eq!(decode(&bytes).unwrap(), list);
        assert_eq!(decode(&[]).unwrap(), []);
        assert!(decode(&bytes[..31]).is_none());
        assert!(decode(&vec![0; MAX_LEN + LEN]).is_none());
    }
}
