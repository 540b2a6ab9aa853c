//! What is noted of the requests that are answered: each of them in the operation log, if there is
//! one, and writes that a replica refused in the node's log.
//!
//! Each request that is worth noting has its reply wrapped in an [`Answer`], which notes how it was
//! answered, whenever and by whichever thread that is. Without an operation log that costs a
//! comparison, or the count of a reference where a replica may refuse.
//!
//! SQLite asks a replica for no write in WAL mode: it finds the log read-only and refuses by itself.
//! Such a write leaves no trace here.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use fuser::*;
use parking_lot::Mutex;

use crate::store::{Name, Role, Store};
use crate::telemetry::operations::{Operation, OperationLog};

use super::nodes::{Node, Nodes};

/// How often, at most, a refused write is said for each database.
const SAY: Duration = Duration::from_secs(60);
/// The most databases whose last time is remembered.
const MAX_SAID: usize = 1024;

/// Says who the primary is: its host name and its URL, if there is one.
pub type PrimaryName = Arc<dyn Fn() -> Option<(String, String)> + Send + Sync>;

/// Who is told of requests.
#[derive(Clone, Default)]
pub struct Observers {
    /// The operation log, if one is kept.
    pub log: Option<OperationLog>,
    /// Who the primary is, for messages.
    pub primary: Option<PrimaryName>,
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observers")
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

/// The observers of a mount.
pub(super) struct Watch {
    store: Arc<Store>,
    nodes: Arc<Nodes>,
    observers: Observers,
    /// When a refusal was last said, by database.
    said: Mutex<HashMap<String, Instant>>,
}

/// What a request is about.
pub(super) enum About<'a> {
    Ino(INodeNo),
    Name(&'a OsStr),
    /// Bytes of an inode: offset and size.
    Range(INodeNo, u64, u64),
}

/// A request being answered.
struct Request {
    watch: Arc<Watch>,
    name: &'static str,
    ino: u64,
    file: Option<String>,
    range: Option<(u64, u64)>,
    /// When it came, if it is logged.
    began: Option<(SystemTime, Instant)>,
}

/// A reply, and what is noted when it is given.
pub(super) struct Answer<R> {
    reply: R,
    request: Option<Request>,
}

impl Watch {
    pub fn new(store: Arc<Store>, nodes: Arc<Nodes>, observers: Observers) -> Arc<Watch> {
        Arc::new(Watch {
            store,
            nodes,
            observers,
            said: Mutex::default(),
        })
    }

    /// A request that reads: noted only in an operation log.
    pub fn reads<R>(self: &Arc<Self>, name: &'static str, about: About, reply: R) -> Answer<R> {
        let request = self
            .observers
            .log
            .is_some()
            .then(|| self.request(name, about));
        Answer { reply, request }
    }

    /// A request that writes: a refusal is noted too.
    pub fn writes<R>(self: &Arc<Self>, name: &'static str, about: About, reply: R) -> Answer<R> {
        let request = Some(self.request(name, about));
        Answer { reply, request }
    }

    fn request(self: &Arc<Self>, name: &'static str, about: About) -> Request {
        let (ino, file, range) = match about {
            About::Ino(ino) => (ino.0, None, None),
            About::Name(file) => (0, Some(file.to_string_lossy().into_owned()), None),
            About::Range(ino, offset, size) => (ino.0, None, Some((offset, size))),
        };
        let logged = self.observers.log.is_some();
        Request {
            watch: self.clone(),
            name,
            ino,
            file,
            range,
            began: logged.then(|| (SystemTime::now(), Instant::now())),
        }
    }

    /// The name that an inode has in the mount.
    fn file_name(&self, ino: u64) -> Option<String> {
        match self.nodes.get(ino)? {
            Node::Root => Some("/".to_owned()),
            Node::Primary => Some(".primary".to_owned()),
            Node::Lag => Some(".lag".to_owned()),
            Node::LockDir => Some(".lock".to_owned()),
            Node::Lock(db) => Some(format!("{}-lock", db.name())),
            Node::Pos(db) => Some(format!("{}-pos", db.name())),
            Node::File(f) => Some(format!("{}{}", f.db.name(), f.file.kind.suffix())),
            Node::Super(_) => None,
        }
    }

    /// A write was refused: says so, if it is because this node is a replica.
    fn refused(&self, file: &str) {
        let Role::Replica { hostname } = self.store.role() else {
            return;
        };
        let Name::File(_, db) = Name::parse(file) else {
            return;
        };
        let now = Instant::now();
        let mut said = self.said.lock();
        if said
            .get(db)
            .is_some_and(|last| now.duration_since(*last) < SAY)
        {
            return;
        }
        said.retain(|_, last| now.duration_since(*last) < SAY);
        if said.len() >= MAX_SAID {
            return;
        }
        said.insert(db.to_owned(), now);
        drop(said);
        let primary = self.observers.primary.as_ref().and_then(|ask| ask());
        let primary = match (primary, hostname) {
            (Some((host, url)), _) => format!("the primary is {host} ({url})"),
            (None, Some(host)) => format!("the primary is {host}"),
            (None, None) => "there is no primary at the moment".to_owned(),
        };
        tracing::warn!("write refused on {db}: this node is a replica; {primary}");
    }
}

impl Request {
    fn end(self, result: Result<u64, i32>) {
        let refused = result == Err(libc::EACCES);
        if !refused && self.began.is_none() {
            return;
        }
        let file = self.file.or_else(|| self.watch.file_name(self.ino));
        if refused && let Some(file) = &file {
            self.watch.refused(file);
        }
        if let (Some((at, began)), Some(log)) = (self.began, &self.watch.observers.log) {
            log.record(Operation {
                at,
                took: began.elapsed(),
                name: self.name,
                file,
                ino: self.ino,
                range: self.range,
                result,
            });
        }
    }
}

impl<R> Answer<R> {
    /// The reply, for what it can do beside answering.
    pub fn reply(&self) -> &R {
        &self.reply
    }

    /// Gives the answer, then notes it.
    pub fn give(self, result: Result<u64, i32>, answer: impl FnOnce(R)) {
        answer(self.reply);
        if let Some(request) = self.request {
            request.end(result);
        }
    }
}

/// `error`, for each of fuser's replies.
macro_rules! errors {
    ($($reply:ty),*) => {$(
        impl Answer<$reply> {
            /// Refuses the request.
            pub fn error(self, e: Errno) {
                self.give(Err(e.code()), |r| r.error(e));
            }
        }
    )*};
}

errors!(
    ReplyEmpty,
    ReplyData,
    ReplyEntry,
    ReplyAttr,
    ReplyOpen,
    ReplyWrite,
    ReplyCreate,
    ReplyDirectory,
    ReplyStatfs
);

impl Answer<ReplyEmpty> {
    pub fn ok(self) {
        self.give(Ok(0), ReplyEmpty::ok);
    }
}

impl Answer<ReplyData> {
    pub fn data(self, data: &[u8]) {
        self.give(Ok(data.len() as u64), |r| r.data(data));
    }
}

impl Answer<ReplyEntry> {
    pub fn entry(self, ttl: &Duration, attr: &FileAttr, generation: Generation) {
        self.give(Ok(0), |r| r.entry(ttl, attr, generation));
    }

    pub fn entry_with_ttls(
        self,
        attr_ttl: &Duration,
        entry_ttl: &Duration,
        attr: &FileAttr,
        generation: Generation,
    ) {
        self.give(Ok(0), |r| {
            r.entry_with_ttls(attr_ttl, entry_ttl, attr, generation);
        });
    }
}

impl Answer<ReplyAttr> {
    pub fn attr(self, ttl: &Duration, attr: &FileAttr) {
        self.give(Ok(0), |r| r.attr(ttl, attr));
    }
}

impl Answer<ReplyOpen> {
    pub fn opened(self, fh: FileHandle, flags: FopenFlags) {
        self.give(Ok(0), |r| r.opened(fh, flags));
    }

    pub fn opened_passthrough(self, fh: FileHandle, flags: FopenFlags, id: &BackingId) {
        self.give(Ok(0), |r| r.opened_passthrough(fh, flags, id));
    }
}

impl Answer<ReplyWrite> {
    pub fn written(self, size: u32) {
        self.give(Ok(u64::from(size)), |r| r.written(size));
    }
}

impl Answer<ReplyCreate> {
    pub fn created(
        self,
        ttl: &Duration,
        attr: &FileAttr,
        generation: Generation,
        fh: FileHandle,
        flags: FopenFlags,
    ) {
        self.give(Ok(0), |r| r.created(ttl, attr, generation, fh, flags));
    }

    pub fn created_passthrough(
        self,
        ttl: &Duration,
        attr: &FileAttr,
        generation: Generation,
        fh: FileHandle,
        flags: FopenFlags,
        id: &BackingId,
    ) {
        self.give(Ok(0), |r| {
            r.created_passthrough(ttl, attr, generation, fh, flags, id);
        });
    }
}

impl Answer<ReplyDirectory> {
    pub fn add(&mut self, ino: INodeNo, offset: u64, kind: FileType, name: &OsStr) -> bool {
        self.reply.add(ino, offset, kind, name)
    }

    pub fn ok(self) {
        self.give(Ok(0), ReplyDirectory::ok);
    }
}
