//! A connection after its upgrade (WebSocket): bytes in both directions until either side ends.
//!
//! Nothing is known of what the two sides say to each other, so that silence is no reason to end it: a
//! peer that is gone is found by the kernel's keep-alive.

use std::time::Duration;

use http::StatusCode;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use super::server::Permit;

/// How long both sides may take to change the protocol once the answer says so.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// The status of an answer that changes the protocol.
pub const SWITCHING: StatusCode = StatusCode::SWITCHING_PROTOCOLS;

/// Pipes until either side ends or `shutdown` becomes true. The connection counts as one until then.
pub async fn pipe(
    client: OnUpgrade,
    target: OnUpgrade,
    permit: Permit,
    mut shutdown: watch::Receiver<bool>,
) {
    let changed = timeout(CHANGE_TIMEOUT, async { tokio::try_join!(client, target) }).await;
    let (client, target) = match changed {
        Ok(Ok(both)) => both,
        Ok(Err(error)) => return debug!(%error, "a connection was not upgraded"),
        Err(_) => return debug!("a connection was not upgraded in time"),
    };
    let (mut client, mut target) = (TokioIo::new(client), TokioIo::new(target));
    tokio::select! {
        ended = copy_bidirectional(&mut client, &mut target) => if let Err(error) = ended {
            debug!(%error, "an upgraded connection broke");
        },
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
    drop(permit);
}
