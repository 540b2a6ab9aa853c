//! The store beside its code, in one process and without a mount: the log and the checksums by
//! themselves, then whole databases driven by SQLite through a VFS that stands on the store.

pub(crate) mod bed;
mod capture;
mod divergent;
mod early;
mod group;
mod hostile;
mod index;
mod log;
mod log_damage;
mod receive;
mod recovery;
mod restore;
mod roles;
mod scrub;
mod sim;
mod snapshots;
mod sums;
pub(crate) mod vfs;
