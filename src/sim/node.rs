//! A node of a simulation: its directory, and its lives one after another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags};
use tokio::sync::{broadcast, watch};
use tokio::time::{sleep, timeout};

use crate::access::Keys;
use crate::http::api::Api;
use crate::peer::Peers;
use crate::role::{self, Parts, Promoter, RoleConfig, Status};
use crate::store::disk::sim::{Keep, Sim};
use crate::store::tests::vfs::Vfs;
use crate::store::{Background, Event, HALT_TTL, Options, Random, Store};
use crate::task;

use super::check::Checker;
use super::disk::NodeDisk;
use super::lease::{Service, SimLeaser};
use super::net::{Net, SimPeers};
use super::process::Process;
use super::world::World;

/// How often the store's background work is done.
const BACKGROUND: Duration = Duration::from_millis(7);

/// How many times that is between two prunings of the log.
const PRUNE_EVERY: u64 = 300;

/// What the nodes of a cluster share.
pub(crate) struct Cluster {
    pub world: Arc<World>,
    pub net: Arc<Net>,
    pub service: Arc<Service>,
    pub checker: Checker,
    pub nodes: Vec<Node>,
    pub ttl: Duration,
}

/// See the module.
pub(crate) struct Node {
    pub id: usize,
    pub candidate: bool,
    /// How long the service takes a second of it to be, in thousandths.
    pub rate: u64,
    /// Its log keeps little.
    pub prunes: bool,
    /// Another one once it has lost its data.
    disk: Mutex<Arc<Sim>>,
    /// The power went with its last life.
    power_lost: AtomicBool,
    life: Mutex<Option<Arc<Life>>>,
    /// It is about to end: what is left of its last life is not gone yet.
    leaving: AtomicBool,
}

/// A node that runs.
pub(crate) struct Life {
    pub process: Arc<Process>,
    pub store: Arc<Store>,
    pub status: watch::Receiver<Status>,
    /// Connections of applications, by application and database. Gone before the VFS is.
    pub connections: Mutex<BTreeMap<(usize, &'static str), Connection>>,
    /// Operations of applications that go on.
    pub busy: AtomicUsize,
    vfs: Vfs,
    disk: Arc<Sim>,
    shutdown: watch::Sender<bool>,
    events: Mutex<broadcast::Receiver<Event>>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.connections.get_mut().clear();
    }
}

impl Life {
    /// Opens a database as an application does.
    pub fn connect(&self, db: &str) -> rusqlite::Result<Connection> {
        let vfs = self.vfs.name.as_c_str();
        Connection::open_with_flags_and_vfs(format!("/{db}"), OpenFlags::default(), vfs)
    }
}

impl Node {
    pub fn new(id: usize, disk: Arc<Sim>, candidate: bool, rate: u64, prunes: bool) -> Node {
        Node {
            id,
            candidate,
            rate,
            prunes,
            disk: Mutex::new(disk),
            power_lost: AtomicBool::new(false),
            life: Mutex::new(None),
            leaving: AtomicBool::new(false),
        }
    }

    /// Its life, if it runs.
    pub fn life(&self) -> Option<Arc<Life>> {
        self.life.lock().clone()
    }
}

impl Cluster {
    /// Starts a node that does not run.
    pub fn start(&self, id: usize) {
        let node = &self.nodes[id];
        if node.life.lock().is_some() || node.leaving.load(Ordering::Relaxed) {
            return;
        }
        self.world.note(format!("n{id} starts"));
        let disk = node.disk.lock().clone();
        match node.power_lost.swap(false, Ordering::Relaxed) {
            true => disk.restart_power(Keep::Some),
            false => disk.restart_process(),
        }
        let process = Arc::new(Process::default());
        let life = process.enter(|| self.begin(node, &process, &disk));
        *node.life.lock() = Some(Arc::new(life));
    }

    fn begin(&self, node: &Node, process: &Arc<Process>, disk: &Arc<Sim>) -> Life {
        let (world, id) = (&self.world, node.id);
        let mut options = Options::new(disk.root());
        if node.prunes {
            options.retention = Duration::ZERO;
        }
        let store = Store::open(Options {
            compress: false,
            background: Background::Manual,
            random: Random::seeded(world.range(0..u64::MAX)),
            disk: Arc::new(NodeDisk::new(world, process, disk)),
            ..options
        })
        .expect("the node's directory");
        let events = store.events();
        self.checker.node_started(id, &store);
        let (status, told) = watch::channel(Status::default());
        let (shutdown, stop) = watch::channel(false);
        let (commands, queue) = role::commands(told.clone());
        let peers: Arc<dyn Peers> = Arc::new(SimPeers {
            net: self.net.clone(),
            from: id,
        });
        let api = Arc::new(Api {
            store: store.clone(),
            stats: Arc::default(),
            replicas: Arc::default(),
            commands,
            promoter: Promoter::new(node.candidate, store.node_id(), peers.clone(), told.clone()),
            status: told.clone(),
            candidate: node.candidate,
            fenced: true,
            path: disk.root().to_owned(),
            snapshot_timeout: Duration::from_secs(60),
            halt_ttl: HALT_TTL,
            fuse_requests: Box::new(|| 0),
            shutdown: stop.clone(),
            keys: Keys::none(),
        });
        let leaser = SimLeaser {
            service: self.service.clone(),
            node: id,
            id: store.node_id(),
            hostname: format!("n{id}"),
            url: Net::url(id),
            ttl: self.ttl,
            rate: node.rate,
            seen: Arc::default(),
        };
        let parts = Parts {
            store: store.clone(),
            stats: api.stats.clone(),
            replicas: api.replicas.clone(),
            peers,
            leaser: Arc::new(leaser),
            status,
            commands: queue,
        };
        let config = RoleConfig {
            candidate: node.candidate,
            promote: world.one_in(8),
            demote_delay: Duration::from_secs(5),
            reconnect_delay: Duration::from_secs(1),
            databases: Vec::new(),
        };
        task::spawn(role::run(parts, config, stop));
        let (working, prunes) = (store.clone(), node.prunes);
        task::spawn(async move {
            for turn in 1u64.. {
                sleep(BACKGROUND).await;
                let working = working.clone();
                let work = move || {
                    working.run_background();
                    if prunes && turn % PRUNE_EVERY == 0 {
                        working.prune();
                    }
                };
                let _ = task::blocking(work).await;
            }
        });
        self.net.listen(id, process, api);
        Life {
            process: process.clone(),
            vfs: Vfs::register(&store),
            store,
            status: told,
            connections: Mutex::default(),
            busy: AtomicUsize::new(0),
            disk: disk.clone(),
            shutdown,
            events: Mutex::new(events),
        }
    }

    /// Kills a node, if it runs. Returns when nothing of it is left.
    pub async fn kill(&self, id: usize) {
        let Some(life) = self.nodes[id].life.lock().take() else {
            return;
        };
        self.world.note(format!("n{id} is killed"));
        self.take_leave(id, life).await;
    }

    /// The same, and what is not on its disk by then is lost, or some of it.
    pub async fn lose_power(&self, id: usize) {
        if self.nodes[id].life().is_some() {
            self.world.note(format!("n{id} loses its power"));
            self.nodes[id].power_lost.store(true, Ordering::Relaxed);
            self.kill(id).await;
        }
    }

    /// Kills a node and takes its data away, if all that it ever had came from others.
    pub async fn wipe(&self, id: usize) {
        let node = &self.nodes[id];
        if !self.checker.is_dispensable(id) || node.life().is_none() {
            return;
        }
        self.kill(id).await;
        if node.life().is_none() && self.checker.is_dispensable(id) {
            self.world.note(format!("n{id} loses its data"));
            self.checker.forget(id);
            *node.disk.lock() = Sim::new(self.world.range(0..u64::MAX));
        }
    }

    /// Stops a node in order, if it runs.
    pub async fn stop(&self, id: usize) {
        let Some(life) = self.nodes[id].life() else {
            return;
        };
        self.world.note(format!("n{id} is stopped"));
        life.shutdown.send_replace(true);
        let mut status = life.status.clone();
        // The loop has ended when its end of this is gone.
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(Duration::from_secs(20), ended).await.is_err() {
            self.world.note(format!("n{id} did not stop in time"));
        } else if life.busy.load(Ordering::Relaxed) == 0 {
            life.connections.lock().clear();
            life.store.close();
        }
        if self.nodes[id].life.lock().take().is_some() {
            self.take_leave(id, life).await;
        }
    }

    async fn take_leave(&self, id: usize, life: Arc<Life>) {
        self.nodes[id].leaving.store(true, Ordering::Relaxed);
        self.net.close(id);
        life.disk.die();
        life.process.kill();
        while life.busy.load(Ordering::Relaxed) > 0 || Arc::strong_count(&life) > 1 {
            sleep(Duration::from_millis(1)).await;
        }
        self.hear(id, &life);
        life.connections.lock().clear();
        let store = Arc::downgrade(&life.store);
        drop(life);
        let gone = async {
            while store.strong_count() > 0 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        if timeout(Duration::from_secs(30), gone).await.is_err() {
            panic!("something of n{id} outlives it");
        }
        self.nodes[id].leaving.store(false, Ordering::Relaxed);
    }

    /// Takes note of what has happened on the nodes, for ever.
    pub async fn listen(&self) {
        loop {
            self.hear_all();
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Takes note of what has happened on the nodes.
    pub fn hear_all(&self) {
        for node in &self.nodes {
            if let Some(life) = node.life() {
                self.hear(node.id, &life);
                if let Some(panic) = life.process.panic() {
                    self.world.violate(format!("n{}: {panic}", node.id));
                }
            }
        }
    }

    fn hear(&self, id: usize, life: &Life) {
        loop {
            let event = life.events.lock().try_recv();
            match event {
                Ok(event) => self.checker.event(id, &event),
                Err(broadcast::error::TryRecvError::Lagged(n)) => {
                    panic!("{n} events of n{id} were missed")
                }
                Err(_) => return,
            }
        }
    }
}
