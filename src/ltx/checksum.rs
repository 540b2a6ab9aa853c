//! CRC-64/GO-ISO, and the checksums of pages that are made of it.
//!
//! Every checksum of the format carries [`CHECKSUM_FLAG`], so that 0 always means "none". The
//! checksum of a database is the XOR of its pages' checksums, with the flag set.

use crc_fast::{CrcAlgorithm, Digest};

/// Bit 63, which every checksum carries. On its own it is the checksum of an empty database.
pub const CHECKSUM_FLAG: u64 = 1 << 63;

/// A running CRC-64/GO-ISO, without the flag.
pub(crate) struct Crc(Digest);

impl Crc {
    pub(crate) fn new() -> Self {
        Crc(Digest::new(CrcAlgorithm::Crc64GoIso))
    }

    pub(crate) fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.finalize()
    }
}

/// The checksum of one page: CRC-64/GO-ISO of the page number (4 bytes, big-endian) followed by
/// the page's data, with [`CHECKSUM_FLAG`] set.
pub fn page_checksum(pgno: u32, data: &[u8]) -> u64 {
    let mut crc = Crc::new();
    crc.update(&pgno.to_be_bytes());
    crc.update(data);
    crc.value() | CHECKSUM_FLAG
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_check_value() {
        let mut crc = Crc::new();
        crc.update(b"123456789");
        assert_eq!(crc.value(), 0xb909_56c7_75a4_1001);
    }

    /// The polynomial by the definition, bit by bit.
    fn slow_crc(data: &[u8]) -> u64 {
        let mut crc = u64::MAX;
        for &byte in data {
            crc ^= u64::from(byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 {
                    (crc >> 1) ^ 0xd800_0000_0000_0000
                } else {
                    crc >> 1
                };
            }
        }
        !crc
    }

    #[test]
    fn page_checksum_is_the_definition_at_every_length() {
        let data: Vec<u8> = (0..65536u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        for len in (0..600).chain([1024, 2048, 4095, 4096, 8192, 16384, 32768, 65536]) {
            let pgno = len as u32 + 7;
            let mut joined = pgno.to_be_bytes().to_vec();
            joined.extend_from_slice(&data[..len]);
            assert_eq!(
                page_checksum(pgno, &data[..len]),
                slow_crc(&joined) | CHECKSUM_FLAG,
                "{len}"
            );
        }
    }
}
