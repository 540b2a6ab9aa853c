//! A node: builds its parts out of a configuration, and starts and stops them in order. The one
//! place that knows every part; [`backend`] alone knows which lease backends there are.
//!
//! Start: listeners, data directory (recovered), mount, role, and then answers on HTTP and the proxy,
//! and what the node is to run ([`exec`]).
//! Stop: what the node runs, the proxy (no more requests of clients), role (no more writes),
//! streams and HTTP, databases (everything in place and saved), and the mount last, lazily, so
//! that open files never keep a node from ending.

mod backend;
pub mod check;
mod exec;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tenure_lease::LeaseError;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::access::{AccessError, Keeper, Keys};
use crate::backup::file::FileBackup;
use crate::backup::{self, BackupClient, BackupError};
use crate::config::{Config, LeaseKind, WalCapture, http_host};
use crate::fuse::{Mount, MountError, MountOptions, Observers, PrimaryName};
use crate::http::api::Api;
use crate::http::door;
use crate::http::server::{Server, ServerError};
use crate::peer::{HttpPeers, PeerError, Peers};
use crate::private;
use crate::proxy::{self, Proxy};
use crate::role::{self, HaltClient, Parts, Promoter, RoleConfig, Status};
use crate::store::{HALT_TTL, Options as StoreOptions, Scrub, ScrubOptions, Store, StoreError};
use crate::stream::replicas::Replicas;
use crate::stream::stats::Stats;
use crate::telemetry::operations::OperationLog;

/// How long each part may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a start waits to learn who is primary.
const ROLE_WAIT: Duration = Duration::from_secs(2);

/// What the command line adds to the configuration.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Leave a dead mount of an earlier run alone.
    pub skip_unmount: bool,
}

/// Why a node did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A certificate, a key or a token.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// The data directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The backup, which a node that starts has to look at.
    #[error("cannot read the backup: {0}")]
    Backup(#[from] BackupError),
    /// The HTTP server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The client that reaches other nodes.
    #[error("cannot set up the client for other nodes: {0}")]
    Peers(PeerError),
    /// The mount was taken away while the node ran.
    #[error("{} was unmounted by somebody else", .0.display())]
    Unmounted(PathBuf),
    /// A part ended that never should.
    #[error("{0} ended unexpectedly: see the log")]
    Ended(&'static str),
    /// The lease backend as it is configured.
    #[error(transparent)]
    Lease(LeaseError),
    /// The operation log.
    #[error("tracing.path: cannot write {}: {source}", path.display())]
    OperationLog {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The system.
    #[error("{0}: {1}")]
    System(&'static str, std::io::Error),
}

/// Runs a node until SIGINT or SIGTERM, or until what it runs (`exec`) has ended. Gives the exit code.
pub async fn run(config: Config, options: Options) -> Result<u8, NodeError> {
    let mut interrupt = signal(SignalKind::interrupt())
        .map_err(|e| NodeError::System("cannot handle SIGINT", e))?;
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|e| NodeError::System("cannot handle SIGTERM", e))?;
    let node = Node::start(&config, options).await?;
    tracing::info!(mount = %config.fuse.dir.display(), http = %node.addr, data = %config.data.dir.display(), "ready to be used");
    tell_systemd(sd_notify::NotifyState::Ready);
    let (tell, told) = mpsc::unbounded_channel();
    // It ends soon after it is told a signal.
    let application = exec::run(exec::Plan::of(&config), node.status.clone(), told);
    tokio::pin!(application);
    let mut unmounted = node.mount.ended();
    let mut role = node.role;
    let mut ended = None;
    let code = loop {
        let told = tokio::select! {
            code = &mut application => break code,
            _ = interrupt.recv() => {
                tracing::info!("SIGINT: stopping");
                libc::SIGINT
            }
            _ = terminate.recv() => {
                tracing::info!("SIGTERM: stopping");
                libc::SIGTERM
            }
            _ = unmounted.wait_for(|u| *u), if ended.is_none() => {
                ended = Some(NodeError::Unmounted(config.fuse.dir.clone()));
                libc::SIGTERM
            }
            _ = &mut role, if ended.is_none() => {
                ended = Some(NodeError::Ended("the role loop"));
                libc::SIGTERM
            }
        };
        // It cannot be told any more if it has just ended.
        let _ = tell.send(told);
    };
    tell_systemd(sd_notify::NotifyState::Stopping);
    let node = Node { role, ..node };
    node.stop().await;
    match ended {
        Some(e) => Err(e),
        None => Ok(code),
    }
}

/// Tells systemd, if that started the node and wants to know (`Type=notify`).
fn tell_systemd(state: sd_notify::NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "systemd cannot be told what the node does");
    }
}

fn role_config(config: &Config) -> RoleConfig {
    let lease = &config.lease;
    RoleConfig {
        candidate: lease.candidate,
        promote: lease.promote,
        demote_delay: lease.demote_delay,
        reconnect_delay: lease.reconnect_delay,
        databases: lease.databases.clone(),
    }
}

fn store_options(config: &Config) -> StoreOptions {
    StoreOptions {
        compress: config.data.compress,
        retention: config.data.retention,
        strict_verify: config.strict_verify,
        follow_wal: config.fuse.wal_capture == WalCapture::Tail,
        ..StoreOptions::new(&config.data.dir)
    }
}

/// The parts that run.
struct Node {
    store: Arc<Store>,
    mount: Mount,
    addr: std::net::SocketAddr,
    shutdown: watch::Sender<bool>,
    role: JoinHandle<()>,
    http: JoinHandle<()>,
    proxy: Option<proxy::Running>,
    retention: JoinHandle<()>,
    keeper: JoinHandle<()>,
    scrub: Option<Scrub>,
    backup: Option<JoinHandle<()>>,
    status: watch::Receiver<Status>,
    operations: Option<OperationLog>,
}

impl Node {
    async fn start(config: &Config, options: Options) -> Result<Node, NodeError> {
        let http = config.http.clone();
        let keeper = blocking(move || Keeper::new(&http)).await??;
        let leaser = backend::leaser(config)?;
        let peers: Arc<dyn Peers> =
            Arc::new(HttpPeers::new(keeper.current()).map_err(NodeError::Peers)?);
        let server = Server::bind(&config.http.addr).await?;
        let addr = server.local_addr();
        if let Some(warning) = door::exposure(addr, &keeper.current()) {
            tracing::warn!("{warning}");
        }
        if config.http.tls.is_some() && config.proxy.forwards() {
            tracing::warn!(
                "proxy.forward: clients' requests go to the primary's proxy without TLS"
            );
        }
        let host = own_host(config);
        complain_of_keys(&keeper.current().borrow(), host.as_deref());
        let proxy = Proxy::bind(&config.proxy).await?;
        // What is above the data directory is not the node's own.
        let above = config.data.dir.parent().map(Path::to_owned);
        if let Some(above) = above {
            // Opening the store says what is wrong, if anything is.
            let _ = blocking(move || std::fs::create_dir_all(above)).await?;
        }
        let store_options = store_options(config);
        let store = blocking(move || Store::open(store_options)).await??;
        if let Some(warning) = open_directory(config) {
            tracing::warn!("{warning}");
        }
        let backup = backup_client(config);
        if let Some(client) = backup.clone() {
            let store = store.clone();
            store.keep_for_backup();
            // Before anybody can write, or read what is old.
            backup::task::restore_at_start(store, client).await?;
        }
        let stats = Arc::new(Stats::default());
        let (status_tx, status) = watch::channel(Status::default());
        let operations = operation_log(config).await?;
        let mount_options = MountOptions {
            dir: config.fuse.dir.clone(),
            allow_other: config.fuse.allow_other,
            skip_unmount: options.skip_unmount,
            observers: Observers {
                log: operations.clone(),
                primary: Some(primary_name(status.clone())),
            },
        };
        let mounting = store.clone();
        let mount = blocking(move || Mount::start(&mounting, &mount_options)).await??;
        let (shutdown, stop) = watch::channel(false);
        let (commands, queue) = role::commands(status.clone());
        let halt = HaltClient::new(&store, peers.clone(), status.clone());
        store.set_primary(Some(Arc::new(halt)));
        let replicas = Arc::new(Replicas::default());
        let candidate = config.lease.candidate;
        let api = Arc::new(Api {
            store: store.clone(),
            stats: stats.clone(),
            replicas: replicas.clone(),
            commands,
            promoter: Promoter::new(candidate, store.node_id(), peers.clone(), status.clone()),
            status: status.clone(),
            candidate,
            fenced: config.lease.kind != LeaseKind::Static,
            path: config.fuse.dir.clone(),
            snapshot_timeout: config.http.snapshot_timeout,
            halt_ttl: HALT_TTL,
            fuse_requests: Box::new(mount.requests()),
            keys: keeper.current(),
            shutdown: stop.clone(),
        });
        let parts = Parts {
            store: store.clone(),
            stats,
            replicas,
            peers,
            leaser,
            status: status_tx,
            commands: queue,
        };
        let role = tokio::spawn(role::run(parts, role_config(config), stop.clone()));
        let backup = backup.map(|client| {
            let status = status.clone();
            tokio::spawn(backup::task::run(
                store.clone(),
                client,
                scrub_options(config),
                status,
                stop.clone(),
            ))
        });
        // Whoever gets an answer finds a node that knows what it is, and a primary that can write.
        let mut decided = status.clone();
        let known = decided.wait_for(|s| s.is_primary || s.primary.is_some());
        // A replica without a primary serves reads, and says so.
        let _ = timeout(ROLE_WAIT, known).await;
        let http = tokio::spawn(server.serve(api));
        let renewed = move |keys: &Keys| complain_of_keys(keys, host.as_deref());
        let keeper = tokio::spawn(keeper.run(stop.clone(), renewed));
        let proxy = proxy.map(|proxy| {
            proxy.serve(proxy::Node {
                store: store.clone(),
                status: status.clone(),
            })
        });
        let retention = tokio::spawn(retention(
            store.clone(),
            config.data.retention_monitor_interval,
            stop,
        ));
        Ok(Node {
            store: store.clone(),
            mount,
            addr,
            shutdown,
            role,
            http,
            proxy,
            retention,
            keeper,
            scrub: scrub(&store, config),
            backup,
            status,
            operations,
        })
    }

    async fn stop(mut self) {
        if let Some(proxy) = self.proxy.take() {
            proxy.stop().await;
        }
        let halts = self.store.clone();
        let given_up = blocking(move || halts.set_primary(None));
        if !matches!(timeout(STOP_TIMEOUT, given_up).await, Ok(Ok(()))) {
            tracing::warn!("halt locks were not given up in time: the primary takes them back");
        }
        drop(self.scrub.take());
        self.shutdown.send_replace(true);
        for (name, handle) in [
            ("the HTTP server", self.http),
            ("the retention monitor", self.retention),
            ("the reader of certificates and tokens", self.keeper),
        ] {
            if timeout(STOP_TIMEOUT, handle).await.is_err() {
                tracing::warn!("{name} did not stop in time");
            }
        }
        if !self.role.is_finished() && timeout(STOP_TIMEOUT, self.role).await.is_err() {
            tracing::warn!("the role loop did not stop in time");
        }
        // After the last write.
        if let Some(backup) = self.backup
            && timeout(STOP_TIMEOUT, backup).await.is_err()
        {
            tracing::warn!("the backup did not stop in time");
        }
        let store = self.store;
        let closed = blocking(move || {
            store.close();
            self.mount.detach();
        });
        if closed.await.is_err() {
            tracing::error!("the databases could not be closed: the next start recovers them");
        }
        if let Some(log) = self.operations
            && !matches!(blocking(move || log.flush(STOP_TIMEOUT)).await, Ok(true))
        {
            tracing::warn!("the operation log (tracing) lacks the last operations");
        }
    }
}

/// The host by which other nodes know this one, if the configuration says it.
fn own_host(config: &Config) -> Option<String> {
    let own = config.advertises_itself();
    let host = http_host(&config.lease.advertise_url).filter(|_| own)?;
    Some(host.to_owned())
}

/// A warning if everybody on this machine can look into the data directory, as into those that LiteFS
/// made.
fn open_directory(config: &Config) -> Option<String> {
    let dir = &config.data.dir;
    private::is_open(dir).then(|| {
        format!(
            "data.dir: everybody on this machine can look into {}: chmod 700",
            dir.display()
        )
    })
}

/// Says what others will not accept, or is not as it should be.
fn complain_of_keys(keys: &Keys, host: Option<&str>) {
    for warning in keys.flaws(host).iter().chain(&keys.warnings()) {
        tracing::warn!("{warning}");
    }
}

/// Starts the operation log, if one is to be kept.
async fn operation_log(config: &Config) -> Result<Option<OperationLog>, NodeError> {
    let Some(path) = config.tracing_file().map(PathBuf::from) else {
        return Ok(None);
    };
    let (file, settings) = (path.clone(), config.tracing.clone());
    match blocking(move || OperationLog::start(&file, &settings)).await? {
        Ok(log) => Ok(Some(log)),
        Err(source) => Err(NodeError::OperationLog { path, source }),
    }
}

/// Says who is primary, for messages.
fn primary_name(status: watch::Receiver<Status>) -> PrimaryName {
    Arc::new(move || {
        let primary = status.borrow().primary.clone()?;
        Some((primary.hostname, primary.advertise_url))
    })
}

/// Removes old transactions now and then.
async fn retention(store: Arc<Store>, every: Duration, mut shutdown: watch::Receiver<bool>) {
    if every.is_zero() {
        return;
    }
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        let store = store.clone();
        if blocking(move || store.prune()).await.is_err() {
            tracing::error!("removing old transactions failed");
        }
    }
}

/// How what is stored is looked at; `None`: it is not.
fn scrub_options(config: &Config) -> Option<ScrubOptions> {
    let options = ScrubOptions {
        interval: config.data.scrub_interval,
        rate: config.data.scrub_rate * 1_000_000,
    };
    (!options.interval.is_zero()).then_some(options)
}

/// Begins to look at what is stored, unless that is not wanted.
fn scrub(store: &Arc<Store>, config: &Config) -> Option<Scrub> {
    match store.scrub(scrub_options(config)?) {
        Ok(scrub) => Some(scrub),
        Err(error) => {
            tracing::error!(%error, "stored data is not looked at for faults: there can be no thread");
            None
        }
    }
}

/// Where the configuration wants backups, if anywhere.
fn backup_client(config: &Config) -> Option<Arc<dyn BackupClient>> {
    let backup = config.backup.as_ref()?;
    Some(Arc::new(FileBackup::new(&backup.path)))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| NodeError::Ended("a thread of the node"))
}
