//! The connection to etcd: to one endpoint at a time, made when it is needed, given up at the
//! first sign of trouble, and then made to the next endpoint.
//!
//! - A call takes no longer than the deadline, whatever etcd does. A request that is not answered
//!   ends with its connection: nothing waits on one that has stalled.
//! - A call tries each endpoint once, in a fair share of what is left of the deadline. What has
//!   failed fast on a connection of an earlier call is tried again on a new one: the connection
//!   may have broken, or its token expired, without anybody's noticing.
//! - So a request may be carried out more than once, also later than its answer was given up: every
//!   request that is made here must be one that can be repeated.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tenure_lease::LeaseError;
use tokio::time::timeout;

use crate::failure::{Cure, Failure, cure, describe};
use crate::options::{EtcdOptions, Tls};

/// How often a connection that has requests waiting (a watch, that is) is asked whether it lives.
/// etcd hangs up on who asks more often than every 5 seconds.
const PING_EVERY: Duration = Duration::from_secs(7);
/// How long the answer to that may take.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// One connection to one endpoint.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) client: Client,
    /// The last Raft term that this endpoint's member was seen in; 0: none yet.
    term: Arc<AtomicU64>,
    generation: u64,
}

impl Link {
    pub(crate) fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    pub(crate) fn set_term(&self, term: u64) {
        self.term.store(term, Ordering::Relaxed);
    }
}

#[derive(Clone)]
struct State {
    link: Option<Link>,
    /// The endpoint that the link is to, or will be to.
    endpoint: usize,
    /// How many links were given up before this one.
    generation: u64,
}

pub(crate) struct Connection {
    endpoints: Vec<String>,
    credentials: Option<(String, String)>,
    tls: Tls,
    deadline: Duration,
    state: Mutex<State>,
}

impl Connection {
    /// Checks what can be checked without a network. Connects to nothing yet.
    pub(crate) fn new(options: &EtcdOptions) -> Result<Self, String> {
        let connection = Self {
            endpoints: options.endpoint_urls()?,
            credentials: options.credentials()?,
            tls: options.tls.clone(),
            deadline: options.deadline(),
            state: Mutex::new(State {
                link: None,
                endpoint: 0,
                generation: 0,
            }),
        };
        connection.tls()?;
        Ok(connection)
    }

    /// How long a call takes at most.
    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Makes `request` on the connection, on as many endpoints as it takes. `action` says for error
    /// messages what it does, and on what.
    pub(crate) async fn call<T, Answer>(
        &self,
        action: &str,
        request: impl Fn(Link) -> Answer,
    ) -> Result<T, LeaseError>
    where
        Answer: Future<Output = Result<T, Failure>>,
    {
        let end = Instant::now() + self.deadline;
        let mut endpoints_left = self.endpoints.len() as u32;
        let mut second_chance = true;
        // The error to end with. Of several endpoints' that is one which may pass, if there is one.
        let mut result: Option<LeaseError> = None;
        while endpoints_left > 0 {
            let start = Instant::now();
            let share = end.saturating_duration_since(start) / endpoints_left;
            let now = self.state().clone();
            let made = timeout(share, async {
                let link = match &now.link {
                    Some(link) => link.clone(),
                    None => self.connect(&now).await?,
                };
                request(link).await
            });
            let (text, cure) = match made.await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Answer(e))) => return Err(e),
                Ok(Err(Failure::Request(e))) => (describe(&e), self.cure(&e)),
                Err(_) => (format!("no answer within {share:?}"), Cure::Wait),
            };
            let again = match cure {
                Cure::Wait => now.link.is_some() && start.elapsed() < share / 2,
                Cure::Authenticate => true,
                Cure::None => false,
            };
            if again && second_chance {
                second_chance = false;
                self.give_up(now.generation, now.endpoint);
                continue;
            }
            self.give_up(now.generation, now.endpoint + 1);
            endpoints_left -= 1;
            let action = format!("{action} at {}", self.endpoints[now.endpoint]);
            let error = match cure {
                Cure::Wait => LeaseError::transient(action, text),
                Cure::Authenticate | Cure::None => LeaseError::fatal(action, text),
            };
            if error.is_transient() || result.is_none() {
                result = Some(error);
            }
        }
        Err(result.unwrap_or_else(|| LeaseError::fatal(action, "no endpoint is configured")))
    }

    fn cure(&self, error: &Error) -> Cure {
        match cure(error) {
            Cure::Authenticate if self.credentials.is_none() => Cure::None,
            cure => cure,
        }
    }

    /// Makes the connection that `at` wants. Without a password that does not involve the network
    /// yet: the first request does.
    async fn connect(&self, at: &State) -> Result<Link, Error> {
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(self.deadline)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(false);
        if let Some((user, password)) = &self.credentials {
            options = options.with_user(user, password);
        }
        let url = &self.endpoints[at.endpoint];
        if url.starts_with("https:") {
            options = options.with_tls(self.tls().map_err(Error::InvalidArgs)?);
        }
        let client = Client::connect([url], Some(options)).await?;
        let mut state = self.state();
        match &state.link {
            // Another call was faster.
            Some(link) => Ok(link.clone()),
            None => {
                let link = Link {
                    client,
                    term: Arc::default(),
                    generation: at.generation,
                };
                if state.generation == at.generation {
                    state.link = Some(link.clone());
                }
                Ok(link)
            }
        }
    }

    /// What TLS connections are made with, from the files as they are now.
    fn tls(&self) -> Result<TlsOptions, String> {
        let read = |path: &std::path::Path| {
            let pem = std::fs::read(path);
            pem.map_err(|e| format!("reading the PEM file {}: {e}", path.display()))
        };
        let mut options = TlsOptions::new();
        options = match &self.tls.ca {
            Some(ca) => options.ca_certificate(Certificate::from_pem(read(ca)?)),
            None => options.with_native_roots(),
        };
        if let (Some(cert), Some(key)) = (&self.tls.cert, &self.tls.key) {
            options = options.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(options)
    }

    /// Drops the connection that is in use, if it is still that of `generation`; the next one will
    /// be to the endpoint `next`.
    fn give_up(&self, generation: u64, next: usize) {
        let mut state = self.state();
        if state.generation == generation {
            state.generation += 1;
            state.endpoint = next % self.endpoints.len();
            state.link = None;
        }
    }

    /// Drops the connection `link`, if it is still in use; the next one will be to another endpoint
    /// where there are several.
    pub(crate) fn discard(&self, link: &Link) {
        let next = self.state().endpoint + 1;
        self.give_up(link.generation, next);
    }

    /// Drops the connection. A later call makes a new one.
    pub(crate) fn close(&self) {
        self.state().link = None;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds it can leave it half-changed.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}
