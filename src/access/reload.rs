//! Reads certificates and tokens again when their files change.
//!
//! The content counts, not the time of a change or the name: a secret that Kubernetes mounts changes
//! by a symbolic link somewhere above it. What two looks in a row have found bad in the same way is
//! reported; one alone may have come between two files of a pair.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::config::HttpConfig;

use super::{AccessError, Current, Keys, files};

/// How often the files are looked at.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Keeps the keys of a node current.
pub struct Keeper {
    config: HttpConfig,
    keys: watch::Sender<Arc<Keys>>,
    /// Of the files that are in use.
    digest: [u8; 32],
    /// Of files that could not be used, and whether that was said.
    refused: Option<([u8; 32], bool)>,
}

impl Keeper {
    /// Reads the keys for the first time. Blocks on the disk.
    ///
    /// # Errors
    /// As [`Keys::load`].
    pub fn new(config: &HttpConfig) -> Result<Keeper, AccessError> {
        // A change after it is seen at the next look.
        let digest = files::digest(config);
        let keys = Keys::load(config)?;
        Ok(Keeper {
            config: config.clone(),
            keys: watch::channel(Arc::new(keys)).0,
            digest,
            refused: None,
        })
    }

    /// The keys, now and later.
    pub fn current(&self) -> Current {
        self.keys.subscribe()
    }

    /// Looks at the files until `shutdown` becomes true. `renewed` is told of keys that have just come
    /// into use.
    pub async fn run(
        mut self,
        mut shutdown: watch::Receiver<bool>,
        renewed: impl Fn(&Keys) + Send + Sync + 'static,
    ) {
        if self.config.tls.is_none() && self.config.auth.is_none() {
            return;
        }
        loop {
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                _ = shutdown.wait_for(|stop| *stop) => return,
            }
            let looked = tokio::task::spawn_blocking(move || {
                let found = self.look();
                (self, found)
            });
            let found;
            // It is lost only if the look panicked, which is in the log then.
            (self, found) = match looked.await {
                Ok(looked) => looked,
                Err(_) => return,
            };
            if let Some(keys) = found {
                info!("certificates and tokens were read again, because their files have changed");
                renewed(&keys);
                self.keys.send_replace(Arc::new(keys));
            }
        }
    }

    /// New keys, if there are any that can be used.
    pub(super) fn look(&mut self) -> Option<Keys> {
        let digest = files::digest(&self.config);
        if digest == self.digest {
            self.refused = None;
            return None;
        }
        let seen = self.refused.filter(|(refused, _)| *refused == digest);
        match Keys::load(&self.config) {
            Ok(keys) => {
                self.digest = digest;
                self.refused = None;
                Some(keys)
            }
            Err(error) => {
                if let Some((_, false)) = seen {
                    warn!("{error}; what was read before stays in use");
                }
                self.refused = Some((digest, seen.is_some()));
                None
            }
        }
    }
}
