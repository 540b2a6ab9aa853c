//! The node's HTTP API: the server that other nodes and operators talk to.
//!
//! [`server`] owns the sockets: it listens, tells the HTTP versions apart, bounds how long a peer may
//! take, and stops in order; `guests` how much one may hold. [`door`] asks for certificates and tokens.
//! [`api`] owns the paths and what they answer, [`events`] the stream of
//! events, [`metrics`] the numbers, [`role`] what changes the primary, [`halt`] the halt lock,
//! [`transfer`] databases as files. The client side of `/stream` is [`crate::stream::receiver`].

pub mod api;
pub mod door;
pub mod events;
pub mod metrics;
pub mod server;

mod body;
pub(crate) mod guests;
mod halt;
mod role;
pub(crate) mod timestamp;
mod transfer;

#[cfg(test)]
mod door_tests;
#[cfg(test)]
mod halt_tests;
#[cfg(test)]
pub(crate) mod harness;
#[cfg(test)]
mod tests;
