//! The replication stream: how a primary's transactions reach its replicas.
//!
//! A replica posts its positions ([`posmap`]) to `/stream` of the primary; the answer's body is an
//! endless sequence of frames ([`frame`]) that the primary's [`sender`] writes and the replica's
//! [`receiver`] applies. Formats and rules are in the specification "stream and HTTP" and are those
//! of LiteFS 0.5: a node of either kind may be at either end.
//!
//! Invariants of the module:
//! - Nothing that a peer says makes a node allocate more than a small constant before it is checked.
//! - A name that comes from a peer passes the store's `check_database` before anything else sees it.
//! - Every wait for a peer has a deadline.

mod batches;
pub mod coding;
pub mod common;
pub mod frame;
pub mod posmap;
pub mod receiver;
pub mod replicas;
pub mod sender;
pub mod stats;

/// The header that names the node that speaks: its ID as 16 upper-case hex digits.
pub const NODE_ID_HEADER: &str = "litefs-id";

/// The header that names the cluster that the speaking node belongs to.
pub const CLUSTER_ID_HEADER: &str = "litefs-cluster-id";

/// The header by which nodes of this kind know each other. A primary says its number in it, in
/// decimal (see the module `role`; 0 with a static lease); LiteFS has no such header.
pub const EPOCH_HEADER: &str = "tenure-epoch";

/// The longest database name in bytes that a frame or a map is read with: a file name's on Linux. What
/// the store takes is shorter.
pub const MAX_NAME_LEN: usize = 255;

/// A node ID in the form that headers carry: 16 upper-case hex digits.
pub fn format_node_id(id: u64) -> String {
    format!("{id:016X}")
}

/// Reads a node ID of exactly 16 hex digits of either case.
pub fn parse_node_id(text: &str) -> Option<u64> {
    if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
#[path = "tests.rs"]
mod stream_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ids_are_16_hex_digits() {
        assert_eq!(format_node_id(0xabc), "0000000000000ABC");
        assert_eq!(parse_node_id("0000000000000ABC"), Some(0xabc));
        assert_eq!(parse_node_id("ffffffffffffffff"), Some(u64::MAX));
        for bad in [
            "",
            "abc",
            "+000000000000abc",
            "0000000000000abcd",
            "000000000000000g",
        ] {
            assert_eq!(parse_node_id(bad), None, "{bad:?}");
        }
    }
}
