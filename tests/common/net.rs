//! Network namespaces for tests that cut nodes off from each other and from the lease service.
//!
//! Every member has a namespace and two links: `service`, on which the lease service is reached, and
//! `peers`, on which the nodes reach each other. A link that is cut drops packets without a word,
//! as a broken switch does. A namespace lives as long as the thread that made it, so nothing is left
//! behind however a test ends; processes that are to live in it are started on that thread.

use std::process::Command;
use std::sync::{Arc, mpsc};

/// The address of the lease service in its namespace.
pub const SERVICE: &str = "10.77.1.100";

/// Which of a member's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// To the lease service.
    Service,
    /// To the other nodes.
    Peers,
}

impl Link {
    fn name(self) -> &'static str {
        match self {
            Link::Service => "service",
            Link::Peers => "peers",
        }
    }
}

/// Work for the thread of a namespace.
type Job = Box<dyn FnOnce() + Send>;

/// A network namespace, and the thread that lives in it.
#[derive(Debug)]
pub struct Namespace {
    jobs: mpsc::Sender<Job>,
    tid: i32,
}

impl Namespace {
    fn new() -> Namespace {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (said, answer) = mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: system calls that take numbers only; they concern this thread alone.
            let (made, tid) = unsafe { (libc::unshare(libc::CLONE_NEWNET), libc::gettid()) };
            let made = match made {
                0 => Ok(tid),
                _ => Err(std::io::Error::last_os_error()),
            };
            said.send(made).expect("the test waits");
            for job in queue {
                job();
            }
        });
        let tid = answer
            .recv()
            .expect("the thread answers")
            .unwrap_or_else(|e| panic!("make a network namespace (needs root): {e}"));
        Namespace { jobs, tid }
    }

    /// Does `work` in the namespace: its sockets, and its processes', are there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let (done, result) = mpsc::channel();
        let work = move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // The receiver waits below.
            let _ = done.send(outcome);
        };
        let work: Box<dyn FnOnce() + Send + '_> = Box::new(work);
        // SAFETY: only the lifetime changes; this function does not return before the job is done.
        let job = unsafe { std::mem::transmute::<Box<dyn FnOnce() + Send + '_>, Job>(work) };
        self.jobs.send(job).expect("the thread lives");
        match result.recv().expect("the job ends") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn ip(&self, arguments: &str) {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.run(|| Command::new("ip").args(&words).output());
        let output = output.expect("run ip (package iproute2)");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "ip {arguments}: {said}");
    }
}

/// A switch with the lease service and some nodes at it.
pub struct Net {
    /// Where the lease service is to run, at [`SERVICE`].
    pub service: Namespace,
    members: Vec<Arc<Namespace>>,
    switch: Namespace,
}

impl Net {
    /// A network of this many nodes.
    pub fn new(members: usize) -> Net {
        let switch = Namespace::new();
        for link in [Link::Service, Link::Peers] {
            let name = link.name();
            switch.ip(&format!("link add {name} type bridge forward_delay 0"));
            switch.ip(&format!("link set {name} up"));
        }
        let net = Net {
            service: Namespace::new(),
            members: (0..members).map(|_| Arc::new(Namespace::new())).collect(),
            switch,
        };
        net.service.ip("link set lo up");
        net.connect(&net.service, Link::Service, "s", SERVICE);
        for (i, member) in net.members.iter().enumerate() {
            member.ip("link set lo up");
            let address = format!("10.77.1.{}", i + 1);
            net.connect(member, Link::Service, &port(i, Link::Service), &address);
            net.connect(member, Link::Peers, &port(i, Link::Peers), &net.address(i));
        }
        net
    }

    fn connect(&self, namespace: &Namespace, link: Link, port: &str, address: &str) {
        let name = link.name();
        let tid = namespace.tid;
        self.switch.ip(&format!(
            "link add {port} type veth peer name {name} netns {tid}"
        ));
        self.switch.ip(&format!("link set {port} master {name} up"));
        namespace.ip(&format!("addr add {address}/24 dev {name}"));
        namespace.ip(&format!("link set {name} up"));
    }

    /// The namespace of a node, by its number from 0.
    pub fn member(&self, i: usize) -> Arc<Namespace> {
        self.members[i].clone()
    }

    /// The address by which the other nodes reach this one.
    pub fn address(&self, i: usize) -> String {
        format!("10.77.2.{}", i + 1)
    }

    /// Drops all packets of a node's link.
    pub fn cut(&self, i: usize, link: Link) {
        self.switch.ip(&format!("link set {} down", port(i, link)));
    }

    /// Lets them pass again.
    pub fn heal(&self, i: usize, link: Link) {
        self.switch.ip(&format!("link set {} up", port(i, link)));
    }
}

/// The switch's end of a link.
fn port(i: usize, link: Link) -> String {
    match link {
        Link::Service => format!("s{i}"),
        Link::Peers => format!("p{i}"),
    }
}
