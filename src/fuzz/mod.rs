//! What is done with bytes from elsewhere, as functions of bytes: the bodies of the fuzz targets.
//!
//! Each takes any bytes and panics if a promise is broken: that nothing panics, that memory is
//! bounded by what there is to read, that what is accepted can be written again and is the same, that
//! it is what a second, naive reader makes of it. `tests/fuzz/run` has libFuzzer look for bytes that
//! break one; the tests here run the seeds, every input that ever did, and some thousands of
//! mutations of them.
//!
//! Checksums keep a fuzzer out of everything behind them. So most bodies look at their input twice: as
//! it is, and with its checksums set right.

pub mod memory;
pub mod seeds;

mod formats;
mod ltx;
mod text;

#[cfg(test)]
mod tests;

/// A body.
pub type Body = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Body)] = &[
    ("ltx", ltx::ltx),
    ("merge", ltx::merge),
    ("frames", formats::frames),
    ("posmap", formats::posmap),
    ("journal", formats::journal),
    ("wal", formats::wal),
    ("wal_index", formats::wal_index),
    ("wal_capture", crate::store::fuzz::wal_capture),
    ("replica", crate::store::fuzz::replica),
    ("log_segment", crate::store::fuzz::log_segment),
    ("sums", crate::store::fuzz::sums),
    ("intent", crate::store::fuzz::intent),
    ("config", text::config),
    ("values", text::values),
];

/// The body of a target.
///
/// # Panics
/// If there is none of this name.
pub fn body(target: &str) -> Body {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    found.unwrap_or_else(|| panic!("no target {target}")).1
}

/// An LTX file with its checksums set right; `None` if it has no header.
pub fn seal_ltx(data: &[u8]) -> Option<Vec<u8>> {
    ltx::seal(data).map(|(sealed, _)| sealed)
}

/// Numbers out of bytes, one after another; zeros once they are used up.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether all bytes are used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// The next two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    /// The next four bytes.
    pub fn word(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn long(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }

    /// The next `n` bytes, or as many as there are.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }
}
