//! The HTTP proxy in front of the application: reads are answered here, writes on the primary.
//!
//! Every request goes one of four ways ([`route`]):
//! - *health*: GET `/litefs/health` is answered by the proxy itself;
//! - *passthrough*: to the application, whatever this node is;
//! - *read* (GET and HEAD): to the application, and if the client has a cookie `__txid` of an earlier
//!   write only once this node has that transaction, [`TXID_TIMEOUT`] at most;
//! - *write* (everything else, and the paths that say so): on the primary to the application, whose
//!   answer takes the position after it along as the cookie; on a replica on to the primary, as
//!   `proxy.forward` says.
//!
//! Invariants:
//! - No body is ever held as a whole, in either direction.
//! - A request is sent a second time only if the application cannot have seen the first one, or if it
//!   is a read without a body, whose repetition means nothing.
//! - A request is passed on to another node once at most: it then bears [`FORWARDED_BY`], and a node
//!   that is not primary refuses it.
//! - Everything that waits has a limit: of the configuration, or one of the constants here and in
//!   [`upstream`]. Where the configuration says 0 (none), the kernel's keep-alive still finds a peer
//!   that is gone.
//!
//! [`server`] owns the sockets and [`activity`] the time limits on them, [`handler`] the decisions,
//! [`upstream`] the connections to the application and to the primary's proxy, [`tunnel`] what becomes
//! of a connection that is upgraded (WebSocket).

mod activity;
mod body;
pub(crate) mod cookie;
mod handler;
pub(crate) mod headers;
mod position;
pub(crate) mod route;
mod server;
mod tunnel;
mod upstream;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Authority;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::{ProxyConfig, split_addr};
use crate::http::server::{ServerError, listen};
use crate::role::Status;
use crate::store::Store;

use self::handler::Handler;

/// How long a read waits for the transaction that its cookie names.
pub const TXID_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client keeps the cookie of its last write.
pub const COOKIE_LIFETIME: Duration = Duration::from_secs(300);

/// The header of a request that a replica passes on to the primary's proxy. Whoever forges it gets no
/// more than a refusal from a node that is not primary.
pub const FORWARDED_BY: &str = "tenure-forwarded-by";

/// How long open requests may take once the node stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What the proxy needs of its node.
pub struct Node {
    /// The databases.
    pub store: Arc<Store>,
    /// What the node is, as the role loop says.
    pub status: watch::Receiver<Status>,
}

/// A proxy that listens and does not answer yet: clients that connect wait.
pub struct Proxy {
    listener: TcpListener,
    addr: SocketAddr,
    target: Authority,
    config: ProxyConfig,
}

/// A proxy that answers.
pub struct Running {
    shutdown: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on `proxy.addr`; `None` if the configuration asks for no proxy (`proxy.target` unset).
    ///
    /// # Errors
    /// When it cannot listen there; see [`listen`].
    pub async fn bind(config: &ProxyConfig) -> Result<Option<Proxy>, ServerError> {
        const KEY: &str = "proxy.addr";
        let Some(target) = &config.target else {
            return Ok(None);
        };
        let target = authority(target)
            .ok_or_else(|| ServerError::Address("proxy.target", target.clone()))?;
        let addr = config.addr.as_deref().unwrap_or_default();
        let listener = listen(KEY, addr).await?;
        let addr = listener
            .local_addr()
            .map_err(|source| ServerError::Listen {
                key: KEY,
                addr: addr.to_owned(),
                source,
            })?;
        Ok(Some(Proxy {
            listener,
            addr,
            target,
            config: config.clone(),
        }))
    }

    /// Where it listens, with the port that the system chose.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Answers from now on, until [`Running::stop`].
    pub fn serve(self, node: Node) -> Running {
        let (shutdown, stop) = watch::channel(false);
        let (position, follow) = position::follow(
            Arc::clone(&node.store),
            self.config.db.clone().unwrap_or_default(),
            stop.clone(),
        );
        let handler = Handler::new(
            &self.config,
            self.target,
            self.addr.port(),
            node,
            position,
            stop.clone(),
        );
        let limits = activity::Limits::new(&self.config);
        let serve = server::serve(self.listener, Arc::new(handler), limits, stop);
        tracing::info!(
            addr = %self.addr,
            target = self.config.target.as_deref().unwrap_or_default(),
            "the proxy answers"
        );
        Running {
            shutdown,
            tasks: vec![tokio::spawn(follow), tokio::spawn(serve)],
        }
    }
}

/// The application's address as a URL has it; without a host it is on this machine.
fn authority(addr: &str) -> Option<Authority> {
    let (host, _) = split_addr(addr)?;
    let local = if host.is_empty() { "localhost" } else { "" };
    format!("{local}{addr}").parse().ok()
}

impl Running {
    /// Takes no more requests; returns when the open ones have ended, or their time is over. Upgraded
    /// connections are cut.
    pub async fn stop(self) {
        self.shutdown.send_replace(true);
        for task in self.tasks {
            // The server keeps the limit itself; this is for one that does not.
            if timeout(STOP_TIMEOUT * 2, task).await.is_err() {
                tracing::warn!("the proxy did not stop in time");
            }
        }
    }
}
