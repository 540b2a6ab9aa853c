//! Replicas that only read the stream: they keep nothing and apply nothing.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::Result;

/// A position map of nothing.
const NO_DATABASES: [u8; 4] = [0; 4];
/// How many replicas come from one address.
const FROM_ONE: usize = 25;

/// What a client says that it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A node of our own.
    Tenure,
    /// A LiteFS node.
    LiteFs,
    /// A node of our own that takes nothing after the head of the answer.
    Stalled,
}

/// Clients, each with its own connection and without any database.
pub struct Clients {
    runtime: Runtime,
    http: String,
    received: Vec<Arc<AtomicU64>>,
}

impl Clients {
    pub fn new(http: &str) -> Result<Clients> {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build()?;
        Ok(Clients {
            runtime,
            http: http.to_owned(),
            received: Vec::new(),
        })
    }

    /// Connects one more; its number.
    pub fn connect(&mut self, kind: Kind) -> Result<usize> {
        let received = Arc::new(AtomicU64::new(0));
        // A node takes a part of its replicas from one address: these come from several.
        let from = Ipv4Addr::new(127, 0, 0, 1 + (self.received.len() / FROM_ONE) as u8);
        let response = self.runtime.block_on(async {
            let client = reqwest::Client::builder()
                .http2_prior_knowledge()
                .local_address(IpAddr::V4(from))
                .no_proxy()
                .build()?;
            let id = format!("{:016X}", 0x1000 + self.received.len());
            let mut request = client
                .post(format!("http://{}/stream", self.http))
                .header("litefs-id", id)
                .body(NO_DATABASES.to_vec());
            if kind != Kind::LiteFs {
                request = request.header("accept-encoding", "zstd");
            }
            request.send().await
        })?;
        if !response.status().is_success() {
            return Err(format!("the stream is refused: {}", response.status()).into());
        }
        let counter = Arc::clone(&received);
        self.runtime.spawn(async move {
            let mut response = response;
            if kind == Kind::Stalled {
                std::future::pending::<()>().await;
            }
            while let Ok(Some(bytes)) = response.chunk().await {
                counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
        });
        self.received.push(received);
        Ok(self.received.len() - 1)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.received.len()
    }

    /// Lets the clients read for this long.
    pub fn read_for(&self, time: Duration) {
        self.runtime
            .block_on(async { tokio::time::sleep(time).await });
    }

    /// Bytes of the answers' bodies so far, of one.
    pub fn received(&self, client: usize) -> u64 {
        self.received[client].load(Ordering::Relaxed)
    }
}
