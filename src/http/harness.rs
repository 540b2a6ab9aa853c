//! Nodes for tests: a store in a temporary directory, served on a loopback port. No mount: a
//! database's transactions come from the golden files.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tenure_lease::{Leaser, PrimaryInfo};
use tenure_lease_static::StaticLeaser;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::access::{Current, Keys};
use crate::ltx::Pos;
use crate::peer::{HttpPeers, Peers};
use crate::role::{self, CommandQueue, Commands, Promoter, RoleConfig, Status};
use crate::store::{Options, Role, Store};
use crate::stream::replicas::Replicas;
use crate::stream::stats::Stats;

use super::api::Api;
use super::server::Server;

/// The LTX files of one golden database, in order.
pub(crate) fn golden(case: &str) -> Vec<Vec<u8>> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/fixtures/ltx");
    let mut paths: Vec<PathBuf> = fs::read_dir(format!("{dir}/{case}"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "ltx"))
        .collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// The way to other nodes, over real sockets.
pub(crate) fn peers() -> Arc<dyn Peers> {
    Arc::new(HttpPeers::new(Keys::none()).unwrap())
}

/// Waits up to ten seconds for `what`.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// One node without a mount.
pub(crate) struct TestNode {
    pub(crate) store: Arc<Store>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) replicas: Arc<Replicas>,
    commands: Commands,
    queue: Option<CommandQueue>,
    pub(crate) status: watch::Sender<Status>,
    pub(crate) shutdown: watch::Sender<bool>,
    /// `http://127.0.0.1:PORT` once it serves.
    pub(crate) url: String,
    /// How long its halt locks are given for.
    pub(crate) halt_ttl: Duration,
    /// What it asks of those who connect.
    pub(crate) keys: Current,
    tasks: Vec<JoinHandle<()>>,
    _dir: TempDir,
}

impl TestNode {
    /// A store that nobody serves yet.
    pub(crate) fn new() -> TestNode {
        TestNode::with(|_| {})
    }

    /// The same, with other settings of the store.
    pub(crate) fn with(set: impl FnOnce(&mut Options)) -> TestNode {
        let dir = tempfile::tempdir().unwrap();
        let mut options = Options::new(dir.path());
        set(&mut options);
        let store = Store::open(options).unwrap();
        let status = watch::Sender::new(Status::default());
        let (commands, queue) = role::commands(status.subscribe());
        TestNode {
            store,
            stats: Arc::default(),
            replicas: Arc::default(),
            commands,
            queue: Some(queue),
            status,
            shutdown: watch::Sender::new(false),
            url: String::new(),
            halt_ttl: Duration::from_secs(30),
            keys: Keys::none(),
            tasks: Vec::new(),
            _dir: dir,
        }
    }

    /// A node that serves as primary of cluster `LFSC0123456789ABCDEF`, without a role loop.
    pub(crate) async fn primary() -> TestNode {
        TestNode::new().into_primary().await
    }

    /// The same of this node.
    pub(crate) async fn into_primary(self) -> TestNode {
        let mut node = self;
        node.store.set_cluster_id("LFSC0123456789ABCDEF").unwrap();
        let store = Arc::clone(&node.store);
        tokio::task::spawn_blocking(move || store.set_role(Role::Primary))
            .await
            .unwrap();
        node.status.send_replace(Status {
            is_primary: true,
            primary: Some(PrimaryInfo {
                hostname: "pri".into(),
                advertise_url: "http://pri".into(),
            }),
            ready: true,
        });
        node.serve("127.0.0.1:0").await;
        node
    }

    /// Answers on `addr`.
    pub(crate) async fn serve(&mut self, addr: &str) {
        let server = Server::bind(addr).await.unwrap();
        self.url = format!("http://{}", server.local_addr());
        let api = Arc::new(Api {
            store: Arc::clone(&self.store),
            stats: Arc::clone(&self.stats),
            replicas: Arc::clone(&self.replicas),
            commands: self.commands.clone(),
            promoter: Promoter::new(true, self.store.node_id(), peers(), self.status.subscribe()),
            status: self.status.subscribe(),
            candidate: true,
            fenced: self.store.epoch() > 0,
            path: "/data".into(),
            snapshot_timeout: Duration::from_secs(60),
            halt_ttl: self.halt_ttl,
            fuse_requests: Box::new(|| 0),
            keys: self.keys.clone(),
            shutdown: self.shutdown.subscribe(),
        });
        self.tasks.push(tokio::spawn(server.serve(api)));
    }

    /// Runs the role loop under a static lease whose primary is at `url`.
    pub(crate) fn run_role(&mut self, candidate: bool, url: &str, databases: &[&str]) {
        let leaser: Arc<dyn Leaser> =
            Arc::new(StaticLeaser::new(candidate, "pri".into(), url.to_owned()));
        let config = RoleConfig {
            candidate,
            promote: false,
            demote_delay: Duration::from_millis(50),
            reconnect_delay: Duration::from_millis(50),
            databases: databases.iter().map(|name| name.to_string()).collect(),
        };
        // A second loop has a queue of its own, to which nobody sends.
        let queue = self.queue.take();
        let queue = queue.unwrap_or_else(|| role::commands(self.status.subscribe()).1);
        let parts = role::Parts {
            store: Arc::clone(&self.store),
            stats: Arc::clone(&self.stats),
            replicas: Arc::clone(&self.replicas),
            peers: peers(),
            leaser,
            status: self.status.clone(),
            commands: queue,
        };
        let run = role::run(parts, config, self.shutdown.subscribe());
        self.tasks.push(tokio::spawn(run));
    }

    /// Stores `files` one after another as transactions of a database.
    pub(crate) async fn seed(&self, name: &str, files: &[Vec<u8>]) {
        let (store, name, files) = (Arc::clone(&self.store), name.to_owned(), files.to_vec());
        tokio::task::spawn_blocking(move || {
            for file in files {
                store
                    .receive(&name, &mut &file[..], &mut |_, _| {
                        crate::store::Common::Unknown
                    })
                    .unwrap();
            }
            // Flushes them, so that they count.
            store.positions();
        })
        .await
        .unwrap();
    }

    pub(crate) fn pos(&self, name: &str) -> Pos {
        self.store
            .database(name)
            .map(|db| db.pos())
            .unwrap_or_default()
    }

    /// The bytes of a database, as a snapshot has them.
    pub(crate) async fn snapshot(&self, name: &str) -> Vec<u8> {
        let db = self.store.database(name).unwrap();
        tokio::task::spawn_blocking(move || {
            let mut ltx = Vec::new();
            db.snapshot().unwrap().write_to(&mut ltx).unwrap();
            let mut pages = Vec::new();
            let mut decoder = crate::ltx::Decoder::new(&ltx[..]).unwrap();
            let mut page = vec![0; decoder.header().page_size as usize];
            while let Some(pgno) = decoder.page(&mut page).unwrap() {
                pages.extend_from_slice(&pgno.to_be_bytes());
                pages.extend_from_slice(&page);
            }
            pages
        })
        .await
        .unwrap()
    }

    /// Stops everything in order; gives the store back.
    pub(crate) async fn stop(&mut self) {
        self.shutdown.send_replace(true);
        for task in self.tasks.drain(..) {
            task.await.unwrap();
        }
    }
}
