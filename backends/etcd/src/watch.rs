//! Waiting for the primary to change: an etcd watch of `KEY`.
//!
//! - It begins after the revision that was read last, so that nothing between the read and the watch
//!   is missed.
//! - It wants a member that has a leader: one that is cut off from the others ends it. A connection
//!   that is dead is noticed by pings. Either is a transient error, and the next watch goes to
//!   another member.

use std::sync::atomic::{AtomicI64, Ordering};

use etcd_client::{WatchOptions, WatchResponse, WatchStream};
use tenure_lease::LeaseError;

use crate::connection::Link;
use crate::failure::{Cure, Failure, cure, describe};
use crate::keys;
use crate::lease::Shared;

/// The revision up to which the node has seen `KEY`; 0: it has not looked yet.
#[derive(Default)]
pub(crate) struct Seen(AtomicI64);

impl Seen {
    pub(crate) fn set(&self, revision: i64) {
        self.0.store(revision, Ordering::Relaxed);
    }

    fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Returns when `KEY` may have changed since `seen`, and moves that on.
pub(crate) async fn watch(shared: &Shared, seen: &Seen) -> Result<(), LeaseError> {
    let (action, key) = (
        &*shared.action("watching the primary"),
        &*shared.keys.primary,
    );
    let from = seen.get();
    if from == 0 {
        // Whoever has not read it yet may have missed anything.
        let read = |mut link: Link| async move { Ok(keys::read(&mut link, key).await?) };
        seen.set(shared.connection.call(action, read).await?.0);
        return Ok(());
    }
    let open = |mut link: Link| async move {
        let options = WatchOptions::new().with_start_revision(from + 1);
        let mut stream = link.client.watch(key, Some(options)).await?;
        let created = stream.message().await?.ok_or_else(ended)?;
        refused(&created)?;
        Ok::<_, Failure>((link, stream, created))
    };
    let (link, mut stream, created) = shared.connection.call(action, open).await?;
    // The store is older than what was read: it was set up anew.
    let replaced = created.header().is_some_and(|h| h.revision() < from);
    if replaced {
        seen.set(0);
        return Ok(());
    }
    let changed = wait(created, &mut stream).await.inspect_err(|_| {
        shared.connection.discard(&link);
    });
    match changed {
        Ok(revision) => {
            seen.set(revision.max(from));
            Ok(())
        }
        Err(Failure::Answer(e)) => Err(e),
        Err(Failure::Request(e)) => match cure(&e) {
            Cure::None => Err(LeaseError::fatal(action, describe(&e))),
            // The next watch authenticates anew.
            Cure::Wait | Cure::Authenticate => Err(LeaseError::transient(action, describe(&e))),
        },
    }
}

/// Waits for an event, `response` being the first response. Gives the revision that is seen by it.
async fn wait(mut response: WatchResponse, stream: &mut WatchStream) -> Result<i64, Failure> {
    loop {
        if response.compact_revision() > 0 {
            // What happened before this revision is forgotten; it may be a change.
            return Ok(response.compact_revision() - 1);
        }
        refused(&response)?;
        let revisions = response.events().iter();
        let revisions = revisions.filter_map(|event| event.kv().map(|kv| kv.mod_revision()));
        if let Some(revision) = revisions.max() {
            return Ok(revision);
        }
        response = stream.message().await?.ok_or_else(ended)?;
    }
}

/// An error if `response` says that the watch has been cancelled, other than for a compaction.
fn refused(response: &WatchResponse) -> Result<(), Failure> {
    if !response.canceled() || response.compact_revision() > 0 {
        return Ok(());
    }
    let reason = response.cancel_reason();
    let status = if reason.contains("permission denied") {
        tonic::Status::permission_denied(reason)
    } else {
        tonic::Status::unavailable(format!("etcd has cancelled the watch: {reason}"))
    };
    Err(etcd_client::Error::GRpcStatus(status).into())
}

fn ended() -> Failure {
    let status = tonic::Status::unavailable("etcd has ended the watch");
    etcd_client::Error::GRpcStatus(status).into()
}
