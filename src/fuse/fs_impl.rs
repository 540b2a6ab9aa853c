//! Requests of the kernel, translated to operations of the store.

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use fuser::*;

use crate::store::{Done, FileKind, Name, StoreError};

use super::attr::{self, FOR_EVER};
use super::handles::UNCACHED;
use super::nodes::{Node, ROOT};
use super::observe::About;
use super::tenure_fs::{MAX_READ, TenureFs, answer, errno, on_a_thread};

impl Filesystem for TenureFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS;
        // Whatever the kernel lacks costs speed alone.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(MAX_READ as u32);
        if std::env::var_os("TENURE_NO_PASSTHROUGH").is_none()
            && config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH)
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
        {
            // Two, so that the data directory may lie on an overlay.
            let _ = config.set_max_stack_depth(2);
            self.passthrough.store(true, Ordering::Release);
        }
        self.decide_lanes();
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("lookup", About::Name(name), reply);
        if parent.0 != ROOT {
            return reply.error(Errno::ENOENT);
        }
        match self.find(name) {
            Ok(node) => match attr::of(&self.store, &node) {
                Ok(a) => {
                    let node = self.nodes.look_up(node);
                    reply.entry_with_ttls(
                        &attr::ttl(&node),
                        &attr::entry_ttl(&node),
                        &a,
                        Generation(0),
                    );
                }
                Err(e) => reply.error(errno(&e)),
            },
            Err(false) => reply.error(Errno::ENOENT),
            Err(true) => match attr::of(&self.store, &Node::Root) {
                // An entry without an inode: the absence is cached.
                Ok(a) => reply.entry(
                    &FOR_EVER,
                    &FileAttr {
                        ino: INodeNo(0),
                        ..a
                    },
                    Generation(0),
                ),
                Err(e) => reply.error(errno(&e)),
            },
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.nodes.forget(ino.0, nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("getattr", About::Ino(ino), reply);
        // Of a name that is gone, and that the kernel does not know to be: it looks it up again.
        let Some(node) = self.nodes.get(ino.0).filter(|n| !n.is_gone()) else {
            return reply.error(Errno::ESTALE);
        };
        match attr::of(&self.store, &node) {
            Ok(a) => reply.attr(&attr::ttl(&node), &a),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = match size {
            Some(size) => self
                .watch
                .writes("truncate", About::Range(ino, size, 0), reply),
            None => self.watch.reads("setattr", About::Ino(ino), reply),
        };
        let Some(node) = self.nodes.get(ino.0) else {
            return reply.error(Errno::ESTALE);
        };
        let store = self.store.clone();
        let shown = node.clone();
        // Owners, modes and times are what they are; SQLite sets them without need.
        let done = move |r: Result<(), StoreError>| match r.and_then(|()| attr::of(&store, &shown))
        {
            Ok(a) => reply.attr(&attr::ttl(&shown), &a),
            Err(e) => reply.error(errno(&e)),
        };
        let copy = fh.and_then(|fh| self.copies.get(fh.0));
        match (node, size) {
            (Node::File(_), Some(size)) if let Some(copy) = &copy => done(copy.truncate(size)),
            // What is in the database stays there until the copy takes its place.
            (Node::File(f), Some(0)) if fh.is_none() && self.copies.empty(f.file.ino) => {
                done(Ok(()));
            }
            (Node::File(f), Some(size)) => match f.db.check_caller(&f.file, req.pid()) {
                Ok(()) => f.db.truncate(&f.file, size, Box::new(done)),
                Err(e) => done(Err(e)),
            },
            (Node::Super(j), Some(size)) if !j.truncate(size) => done(Err(StoreError::Refused {
                db: String::new(),
                what: "a super-journal of that size".to_owned(),
            })),
            (Node::Super(_), _) | (_, None) => done(Ok(())),
            (_, Some(_)) => done(Err(StoreError::NotPrimary(
                "a file made by the node".to_owned(),
            ))),
        }
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let _turn = self.crew.turn(req.pid());
        match self.nodes.get(ino.0) {
            Some(Node::Lock(db)) => reply.data(attr::lock_link(db.name()).as_bytes()),
            _ => reply.error(Errno::EINVAL),
        }
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("open", About::Ino(ino), reply);
        let Some(node) = self.nodes.get(ino.0) else {
            return reply.error(Errno::ESTALE);
        };
        if let Err(e) = self.may_open(&node, flags.0) {
            return reply.error(e);
        }
        let copy = match self.copy_handle(&node, flags.0, false) {
            Ok(copy) => FileHandle(copy),
            Err(e) => return reply.error(e),
        };
        let open_backing = |f: BorrowedFd<'_>| reply.reply().open_backing(f);
        match self.open_way(&node, flags.0, req.pid(), copy, open_backing) {
            Ok((fh, flags, Some(id))) => reply.opened_passthrough(fh, flags, &id),
            Ok((fh, flags, None)) => reply.opened(fh, flags),
            Err(e) => {
                self.copies.end(copy.0);
                reply.error(e);
            }
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.writes("create", About::Name(name), reply);
        if parent.0 != ROOT {
            return reply.error(Errno::ENOENT);
        }
        let existed = self.find(name).is_ok();
        if flags & libc::O_EXCL != 0 && existed {
            return reply.error(Errno::EEXIST);
        }
        let node = match self.make(name) {
            Ok(node) => self.nodes.look_up(node),
            Err(e) => return reply.error(e),
        };
        let opened = self
            .may_open(&node, flags)
            .and_then(|()| attr::of(&self.store, &node).map_err(|e| errno(&e)))
            .and_then(|a| Ok((a, self.copy_handle(&node, flags, !existed)?)));
        let (a, copy) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                self.nodes.forget(node.ino(), 1);
                return reply.error(e);
            }
        };
        let copy = FileHandle(copy);
        let open_backing = |f: BorrowedFd<'_>| reply.reply().open_backing(f);
        match self.open_way(&node, flags, req.pid(), copy, open_backing) {
            Ok((fh, flags, Some(id))) => {
                reply.created_passthrough(&attr::ttl(&node), &a, Generation(0), fh, flags, &id)
            }
            Ok((fh, flags, None)) => {
                reply.created(&attr::ttl(&node), &a, Generation(0), fh, flags);
            }
            Err(e) => {
                self.copies.end(copy.0);
                self.nodes.forget(node.ino(), 1);
                reply.error(e);
            }
        }
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self
            .watch
            .reads("read", About::Range(ino, offset, u64::from(size)), reply);
        let Some(node) = self.nodes.get(ino.0) else {
            return reply.error(Errno::ESTALE);
        };
        let wanted = (size as usize).min(MAX_READ);
        match node {
            Node::File(f) => {
                Self::with_buffer(wanted, |buf| match f.db.read(&f.file, offset, buf) {
                    Ok(n) => reply.data(&buf[..n]),
                    Err(e) => reply.error(errno(&e)),
                })
            }
            Node::Super(j) => Self::with_buffer(wanted, |buf| {
                let n = j.read(offset, buf);
                reply.data(&buf[..n]);
            }),
            Node::Pos(db) => {
                Self::read_made_up(&attr::pos_text(db.newest_pos()), offset, size, reply)
            }
            Node::Lag => Self::read_made_up(&attr::lag_text(&self.store), offset, size, reply),
            Node::Primary => Self::read_made_up(
                &attr::primary_text(&self.store).unwrap_or_default(),
                offset,
                size,
                reply,
            ),
            Node::Root | Node::LockDir => reply.error(Errno::EISDIR),
            Node::Lock(_) => reply.error(Errno::EINVAL),
        }
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self
            .watch
            .writes("write", About::Range(ino, offset, data.len() as u64), reply);
        let Some(node) = self.nodes.get(ino.0) else {
            return reply.error(Errno::ESTALE);
        };
        let written = data.len() as u32;
        if let Some(copy) = self.copies.get(fh.0) {
            return match copy.write(offset, data) {
                Ok(()) => reply.written(written),
                Err(e) => reply.error(errno(&e)),
            };
        }
        if let Node::File(f) = &node
            && let Err(e) = Self::may_write(f, write_flags, req.pid())
        {
            return reply.error(errno(&e));
        }
        match node {
            Node::File(f) => {
                let answer = move |r| match r {
                    Ok(()) => reply.written(written),
                    Err(e) => reply.error(errno(&e)),
                };
                let done: Done = match fh {
                    UNCACHED => Box::new(self.uncached(ino.0, offset, u64::from(written), answer)),
                    _ => Box::new(answer),
                };
                f.db.write(&f.file, offset, data, done);
            }
            Node::Super(j) if j.write(offset, data) => reply.written(written),
            Node::Super(_) => reply.error(Errno::EFBIG),
            _ => reply.error(Errno::EACCES),
        }
    }

    fn fsync(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        self.crew.note_disk();
        let reply = self.watch.reads("fsync", About::Ino(ino), reply);
        match self.nodes.get(ino.0) {
            Some(Node::File(f)) => {
                if matches!(f.file.kind, FileKind::Database | FileKind::Wal) {
                    self.crew.note_flush();
                }
                f.db.sync_by(&f.file, req.pid(), Box::new(answer(reply)));
            }
            Some(_) => reply.ok(),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn flush(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("flush", About::Ino(ino), reply);
        match self.copies.get(fh.0) {
            None => reply.error(Errno::ENOSYS),
            Some(copy) if copy.is_done() => reply.ok(),
            // It waits for applications, whose requests this thread has to serve.
            Some(copy) => on_a_thread(move || answer(reply)(copy.finish())),
        }
    }

    fn release(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("release", About::Ino(ino), reply);
        reply.ok();
        let node = self.nodes.get(ino.0);
        if let Some(Node::File(f)) = &node
            && matches!(f.file.kind, FileKind::Database | FileKind::Wal)
        {
            f.db.close_handle(&f.file);
        }
        if let Some(copy) = self.copies.end(fh.0) {
            if !copy.is_done() {
                on_a_thread(move || copy.close());
            }
            return;
        }
        if let Some(Node::File(f)) = node {
            if flags.0 & libc::O_ACCMODE == libc::O_WRONLY {
                f.file.end_copy();
            }
            f.db.released(&f.file, flags.0 & libc::O_ACCMODE != libc::O_RDONLY);
        }
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.writes("unlink", About::Name(name), reply);
        let name = name.to_str().filter(|_| parent.0 == ROOT);
        match name.map(Name::parse) {
            Some(Name::File(kind, db)) => match self.store.database(db) {
                Some(db) => match Self::may_unlink(&db, kind, req.pid()) {
                    Ok(()) if kind == FileKind::Database => {
                        let answer = self.with_its_files(&db, answer(reply));
                        db.unlink(kind, Box::new(answer));
                    }
                    Ok(()) => db.unlink(kind, Box::new(answer(reply))),
                    Err(e) => reply.error(errno(&e)),
                },
                None => reply.error(Errno::ENOENT),
            },
            Some(Name::SuperJournal(name)) => answer(reply)(self.store.unlink_super_journal(name)),
            Some(Name::Pos(_) | Name::Primary | Name::Lag | Name::Lock(_) | Name::LockDir) => {
                reply.error(Errno::EPERM)
            }
            Some(Name::Invalid) | None => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let _turn = self.crew.turn(req.pid());
        let mut reply = self.watch.reads("readdir", About::Ino(ino), reply);
        if ino.0 != ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [(".".to_owned(), ROOT), ("..".to_owned(), ROOT)];
        let primary =
            attr::primary_text(&self.store).map(|_| (".primary".to_owned(), super::nodes::PRIMARY));
        let lag = Some((".lag".to_owned(), super::nodes::LAG));
        let names = dots
            .into_iter()
            .chain(primary)
            .chain(lag)
            .chain(self.store.list());
        for (i, (name, ino)) in names.enumerate().skip(offset as usize) {
            let kind = if ino == ROOT {
                FileType::Directory
            } else {
                FileType::RegularFile
            };
            if reply.add(
                INodeNo(ino),
                i as u64 + 1,
                kind,
                OsStr::from_bytes(name.as_bytes()),
            ) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("fsyncdir", About::Ino(ino), reply);
        // Names are in the log before they are acknowledged: the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn statfs(&self, req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("statfs", About::Ino(ino), reply);
        match self.store.statvfs() {
            Ok(s) => reply.give(Ok(0), |r| {
                r.statfs(
                    s.f_blocks,
                    s.f_bfree,
                    s.f_bavail,
                    s.f_files,
                    s.f_ffree,
                    s.f_bsize as u32,
                    255,
                    s.f_frsize as u32,
                )
            }),
            Err(e) => reply.error(Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))),
        }
    }

    // What SQLite never asks for, or does without.

    fn access(&self, req: &Request, ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("access", About::Ino(ino), reply);
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        let _turn = self.crew.turn(req.pid());
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        let _turn = self.crew.turn(req.pid());
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("setxattr", About::Ino(ino), reply);
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("removexattr", About::Ino(ino), reply);
        reply.error(Errno::ENOSYS);
    }

    fn rename(
        &self,
        req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("rename", About::Name(name), reply);
        reply.error(Errno::EPERM);
    }

    fn link(
        &self,
        req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("link", About::Name(newname), reply);
        reply.error(Errno::EPERM);
    }

    fn symlink(
        &self,
        req: &Request,
        _parent: INodeNo,
        link_name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("symlink", About::Name(link_name), reply);
        reply.error(Errno::EPERM);
    }

    fn mkdir(
        &self,
        req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("mkdir", About::Name(name), reply);
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("rmdir", About::Name(name), reply);
        reply.error(Errno::EPERM);
    }

    fn mknod(
        &self,
        req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("mknod", About::Name(name), reply);
        reply.error(Errno::EPERM);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.crew.turn(req.pid());
        let reply = self.watch.reads("fallocate", About::Ino(ino), reply);
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        let _turn = self.crew.turn(req.pid());
        reply.error(Errno::ENOTTY);
    }

    fn lseek(
        &self,
        req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        let _turn = self.crew.turn(req.pid());
        // The kernel then takes a file for one without holes.
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _turn = self.crew.turn(req.pid());
        // The kernel then reads and writes.
        reply.error(Errno::ENOSYS);
    }
}
