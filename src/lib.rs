//! Tenure: a replicated file system for SQLite. See the README for what it does, and
//! [`store`] for how.

pub mod access;
pub mod backup;
pub mod cli;
pub mod clock;
pub mod config;
pub mod fuse;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod http;
pub mod ltx;
pub mod node;
pub mod peer;
pub mod private;
pub mod proxy;
pub mod role;
#[cfg(test)]
mod sim;
pub mod sqlite;
pub mod store;
pub mod stream;
pub mod task;
pub mod telemetry;
pub mod thread;
