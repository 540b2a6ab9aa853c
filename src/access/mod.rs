//! Who may talk to a node, and how it proves itself to others: certificates ([`tls`]) and tokens
//! ([`tokens`]), out of files that are read again when they change.
//!
//! [`Keys`] is all of it at one moment. Whoever opens or takes a connection, or answers a request,
//! takes the keys that are current then; what is open already goes on with those that it began with.
//! Files that cannot be used are reported, and the keys before them stay in use: a node that runs is
//! never without a door, and never without a key.
//!
//! No secret leaves this module but in a handshake and in the header of a request: errors name keys
//! of the configuration and files, and nothing here that holds a secret is printable.

mod files;
mod reload;
pub mod tls;
pub mod tokens;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use tokio::sync::watch;

use crate::config::HttpConfig;

pub use reload::{Keeper, LOOK_EVERY};
pub use tls::Tls;
pub use tokens::Tokens;

/// The keys that are in use, now and later.
pub type Current = watch::Receiver<Arc<Keys>>;

/// What is wrong with a certificate, a key or a token.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct AccessError {
    /// The key of the configuration: `http.tls.cert`.
    pub key: String,
    /// What is wrong, and with which file.
    pub problem: String,
}

impl AccessError {
    fn new(key: &str, problem: impl Into<String>) -> AccessError {
        AccessError {
            key: key.to_owned(),
            problem: problem.into(),
        }
    }
}

/// Certificates and tokens as of one moment.
#[derive(Default)]
pub struct Keys {
    /// TLS, if the node speaks it.
    pub tls: Option<Tls>,
    /// Tokens, if the node asks for them.
    pub tokens: Option<Tokens>,
}

impl Keys {
    /// Reads the files that `http.tls` and `http.auth` name. Blocks on the disk.
    ///
    /// # Errors
    /// The first file that is not there, or is not what it should be.
    pub fn load(config: &HttpConfig) -> Result<Keys, AccessError> {
        Ok(Keys {
            tls: config.tls.as_ref().map(Tls::load).transpose()?,
            tokens: config.auth.as_ref().map(Tokens::load).transpose()?,
        })
    }

    /// What is wrong with the certificate, so that others will not accept it: see [`Tls::flaws`].
    pub fn flaws(&self, host: Option<&str>) -> Vec<String> {
        self.tls.iter().flat_map(|tls| tls.flaws(host)).collect()
    }

    /// What is to be said about the files, though they can be used.
    pub fn warnings(&self) -> Vec<String> {
        let tls = self.tls.iter().flat_map(Tls::warnings);
        let tokens = self.tokens.iter().flat_map(Tokens::warnings).cloned();
        tls.chain(tokens).collect()
    }

    /// No TLS and no tokens, for ever.
    pub fn none() -> Current {
        watch::channel(Arc::default()).1
    }
}
