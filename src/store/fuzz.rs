//! Bodies of the fuzz targets that need a store or its files; see [`crate::fuzz`].

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use crc_fast::CrcAlgorithm::{Crc32IsoHdlc, Crc64GoIso};
use tempfile::TempDir;

use super::disk::Real;
use super::log::Log;
use super::segment::{RECORD_HEADER_SIZE, SEGMENT_HEADER_SIZE};
use super::sums::{self, SumsHeader};
use super::*;
use crate::fuzz::Input;
use crate::fuzz::memory::bounded;
use crate::ltx::{self, CHECKSUM_FLAG, Encoder, Header, page_checksum};
use crate::sqlite::journal::MAGIC;
use crate::sqlite::wal::{
    FRAME_HEADER_SIZE, FrameHeader, WAL_HEADER_SIZE, WalHeader, frame_offset,
};

/// Bytes of a page in what is made up here.
const PAGE: usize = 512;

/// A directory in memory where there is one: a body runs thousands of times.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    made.expect("a directory")
}

fn options(dir: &Path) -> Options {
    Options {
        compress: false,
        strict_verify: true,
        ..Options::new(dir)
    }
}

fn open_log(dir: &Path) -> Result<Log, StoreError> {
    Log::open(&options(dir), dir, Duration::MAX, 0)
}

fn open(dir: &Path) -> Arc<Store> {
    Store::open(options(dir)).expect("a store opens whatever is in it")
}

/// A page whose bytes are `fill`; page 1 is that of a database in WAL mode with `pages` pages.
fn page(pgno: u32, fill: u8, pages: u32) -> Vec<u8> {
    let mut page = vec![fill; PAGE];
    if pgno == 1 {
        page[..16].copy_from_slice(b"SQLite format 3\0");
        page[16..24].copy_from_slice(&[2, 0, 2, 2, 0, 64, 32, 32]);
        page[28..32].copy_from_slice(&pages.to_be_bytes());
        page.copy_within(24..28, 92);
    }
    page
}

/// A database as a naive reader sees it.
type Image = Vec<Vec<u8>>;

fn checksum(image: &Image) -> u64 {
    let pages = image.iter().zip(1..);
    pages.fold(0, |sum, (page, pgno)| sum ^ page_checksum(pgno, page)) | CHECKSUM_FLAG
}

/// Checks that the database has these bytes, and the position that they make.
fn assert_image(db: &Arc<Database>, image: &Image) {
    assert_eq!(db.broken(), None);
    let mut bytes = Vec::new();
    let mut snapshot = db.snapshot().expect("it can be read");
    snapshot
        .write_database(&mut bytes)
        .expect("it goes into memory");
    assert!(bytes == image.concat(), "other bytes than were committed");
    assert_eq!(db.pos().checksum, checksum(image));
}

fn wait(operation: impl FnOnce(Done)) -> Result<(), StoreError> {
    let (tell, told) = mpsc::channel();
    operation(Box::new(move |result| {
        tell.send(result).expect("it is waited for")
    }));
    told.recv_timeout(Duration::from_secs(20))
        .expect("it is answered in time")
}

/// Writes to a WAL, as SQLite does and as it does not. What the store takes for committed is what a
/// naive reader of the same bytes does.
pub fn wal_capture(data: &[u8]) {
    let dir = scratch();
    let store = open(dir.path());
    store.set_role(Role::Primary);
    let db = store.database_or_new("w").expect("a name");
    let mut image: Image = (1..=4).map(|pgno| page(pgno, 7, 4)).collect();
    create(&db, &image);
    let wal = db.create(FileKind::Wal, false).expect("a WAL");
    db.create(FileKind::Shm, false).expect("an index");
    let mut naive = NaiveWal::default();
    let mut writer = WalWriter {
        header: WalHeader::new(PAGE as u32, 0, 1, 2),
        frames: Vec::new(),
    };
    let mut input = Input(data);
    let mut writes = vec![(0, writer.header.encode().to_vec())];
    for _ in 0..200 {
        for (offset, bytes) in std::mem::take(&mut writes) {
            if wait(|done| db.write(&wal, offset, &bytes, done)).is_err() {
                return assert_image(&db, &image);
            }
            naive.write(offset, &bytes, &mut image);
        }
        if input.is_empty() {
            break;
        }
        writes = writer.next(&mut input, naive.file.len());
    }
    assert_image(&db, &image);
    drop(db);
    store.close();
    drop(store);
    assert_image(
        &open(dir.path()).database("w").expect("it is there"),
        &image,
    );
}

/// Makes a database by a transaction in a rollback mode.
fn create(db: &Arc<Database>, image: &Image) {
    let file = db.create(FileKind::Database, false).expect("a database");
    let journal = db.create(FileKind::Journal, false).expect("a journal");
    let mut head = MAGIC.to_vec();
    head.extend(
        [0u32, 1, 0, PAGE as u32, PAGE as u32]
            .map(u32::to_be_bytes)
            .concat(),
    );
    head.resize(PAGE, 0);
    wait(|done| db.write(&journal, 0, &head, done)).expect("a journal's header");
    wait(|done| db.write(&file, 0, &image.concat(), done)).expect("pages");
    wait(|done| db.unlink(FileKind::Journal, done)).expect("a commit");
    assert_image(db, image);
}

/// Makes writes to a WAL out of numbers.
struct WalWriter {
    header: WalHeader,
    frames: Vec<FrameHeader>,
}

impl WalWriter {
    fn next(&mut self, input: &mut Input, file: usize) -> Vec<(u64, Vec<u8>)> {
        match input.byte() % 8 {
            0..=4 => {
                let frame = self.frame(self.frames.len(), input);
                let (cut, reversed) = (
                    usize::from(input.short()) % (frame.1.len() + 1),
                    input.byte() & 1 == 1,
                );
                let (head, tail) = frame.1.split_at(cut);
                let mut writes = vec![
                    (frame.0, head.to_vec()),
                    (frame.0 + cut as u64, tail.to_vec()),
                ];
                writes.retain(|(_, bytes)| !bytes.is_empty());
                if reversed {
                    writes.reverse();
                }
                writes
            }
            5 => {
                let back = usize::from(input.byte()) % 4;
                let frame = self.frame(self.frames.len().saturating_sub(back), input);
                vec![frame]
            }
            6 => {
                let offset = usize::from(input.short()) % (file + 64);
                let n = 1 + usize::from(input.byte()) % 16;
                vec![(offset as u64, input.bytes(n).to_vec())]
            }
            _ => {
                let (seq, salt) = (self.header.checkpoint_seq + 1, input.word());
                self.header =
                    WalHeader::new(PAGE as u32, seq, self.header.salt1.wrapping_add(1), salt);
                self.frames.clear();
                vec![(0, self.header.encode().to_vec())]
            }
        }
    }

    /// A right frame in the place of the one of this index; those after it are forgotten.
    fn frame(&mut self, index: usize, input: &mut Input) -> (u64, Vec<u8>) {
        let (pgno, commit) = (1 + u32::from(input.byte()) % 9, input.byte());
        let commit = if commit < 128 {
            0
        } else {
            u32::from(commit - 127) % 12
        };
        let page = page(pgno, input.byte(), commit);
        self.frames.truncate(index);
        let before = self
            .frames
            .last()
            .map_or(self.header.checksum, |f| f.checksum);
        let frame = FrameHeader::for_page(&self.header, before, pgno, commit, &page);
        self.frames.push(frame);
        let mut bytes = frame.encode().to_vec();
        bytes.extend_from_slice(&page);
        (frame_offset(index as u32 + 1, PAGE as u32), bytes)
    }
}

/// A WAL read from its beginning after each write.
#[derive(Default)]
struct NaiveWal {
    file: Vec<u8>,
    /// End of what was written since the header was.
    written_to: usize,
    /// Frames that are committed.
    committed: usize,
}

impl NaiveWal {
    fn write(&mut self, offset: u64, bytes: &[u8], image: &mut Image) {
        let end = offset as usize + bytes.len();
        self.file.resize(self.file.len().max(end), 0);
        self.file[offset as usize..end].copy_from_slice(bytes);
        if (offset as usize) < WAL_HEADER_SIZE {
            (self.written_to, self.committed) = (0, 0);
        }
        self.written_to = self.written_to.max(end);
        let Some(header) = self
            .file
            .first_chunk()
            .and_then(|head| WalHeader::decode(head).ok())
        else {
            return;
        };
        if header.page_size != PAGE as u32 {
            return;
        }
        let (mut chain, mut pending) = (header.checksum, Vec::new());
        for index in 0.. {
            let at = WAL_HEADER_SIZE + index * (FRAME_HEADER_SIZE + PAGE);
            let page = at + FRAME_HEADER_SIZE;
            if page + PAGE > self.written_to {
                return;
            }
            let frame = FrameHeader::decode(self.file[at..].first_chunk().expect("it is there"));
            let page = &self.file[page..page + PAGE];
            let salts = (frame.salt1, frame.salt2) == (header.salt1, header.salt2);
            if frame.pgno == 0
                || !salts
                || frame.expected_checksum(header.big_endian, chain, page) != frame.checksum
            {
                return;
            }
            chain = frame.checksum;
            pending.push((frame.pgno, page.to_vec()));
            if frame.commit == 0 {
                continue;
            }
            if index >= self.committed {
                image.resize(frame.commit as usize, vec![0; PAGE]);
                for (pgno, page) in pending.drain(..) {
                    if pgno <= frame.commit {
                        image[pgno as usize - 1] = page;
                    }
                }
                self.committed = index + 1;
            }
            pending.clear();
        }
    }
}

/// What a primary may send of two databases, good and bad. What is applied is what the file says, and
/// verifies; what is refused changes nothing.
pub fn replica(data: &[u8]) {
    let dir = scratch();
    let store = open(dir.path());
    let mut models: BTreeMap<&str, (Pos, Image)> = BTreeMap::new();
    let mut input = Input(data);
    for _ in 0..40 {
        if input.is_empty() {
            break;
        }
        let name = ["a", "b"][usize::from(input.byte()) % 2];
        let (pos, image) = models.entry(name).or_default();
        let (header, pages, post, after, good) = transaction(&mut input, *pos, image);
        let mut encoder = match Encoder::new(Vec::new(), header) {
            Ok(encoder) => encoder,
            Err(_) => continue,
        };
        let written = pages
            .iter()
            .try_for_each(|(pgno, page)| encoder.page(*pgno, page));
        let Ok((bytes, _)) = written.and_then(|()| encoder.finish(post)) else {
            continue;
        };
        let mut common = |_: &str, _: &[Pos]| Common::Unknown;
        let received = bounded("a transaction", 32 << 20, || {
            store.receive(name, &mut &bytes[..], &mut common)
        });
        match received {
            Ok(Received::Applied(at)) => {
                assert_eq!(
                    at,
                    Pos {
                        txid: header.max_txid,
                        checksum: post
                    }
                );
                assert_eq!(post, checksum(&after), "a wrong checksum is accepted");
                (*pos, *image) = (at, after);
            }
            Ok(Received::Known) => assert_eq!(
                Pos {
                    txid: header.max_txid,
                    checksum: post
                },
                *pos
            ),
            Err(e) => assert!(!good, "refused: {e}"),
        }
        for (name, (pos, image)) in &models {
            match store.database(name) {
                Some(db) => {
                    db.settle();
                    assert_eq!(db.pos(), *pos);
                    if !pos.is_zero() {
                        assert_image(&db, image);
                    }
                }
                None => assert!(pos.is_zero()),
            }
        }
    }
    store.close();
}

/// Pages with their numbers.
type Pages = Vec<(u32, Vec<u8>)>;

/// A transaction on a database at this position: its header, pages and checksum, what it makes of the
/// database, and whether nothing is wrong with it.
fn transaction(input: &mut Input, pos: Pos, image: &Image) -> (Header, Pages, u64, Image, bool) {
    let (flags, wrong) = (input.byte(), input.byte());
    let snapshot = flags & 1 == 1 || pos.is_zero();
    let size = image.len() as u32;
    let mut commit = u32::from(input.byte()) % 12;
    if commit > 9 {
        // Far more pages than are sent.
        commit = input.word();
    }
    let some = commit.min(12);
    let fill = input.byte();
    let mask = if snapshot || commit == 0 {
        u16::MAX
    } else {
        input.short() | 1
    };
    let sent = (1..=some).filter(|p| *p > size || mask & (1 << (p - 1)) != 0);
    let pages: Vec<_> = sent
        .map(|p| (p, page(p, fill.wrapping_add(p as u8), commit)))
        .collect();
    let mut after = image.clone();
    if snapshot {
        after.clear();
    }
    after.resize(some as usize, vec![0; PAGE]);
    for (pgno, page) in &pages {
        after[*pgno as usize - 1].clone_from(page);
    }
    let mut header = Header {
        compressed: flags & 2 != 0,
        page_size: PAGE as u32,
        commit,
        min_txid: if snapshot { 1 } else { pos.txid + 1 },
        max_txid: pos.txid + 1,
        timestamp: 1,
        pre_apply_checksum: if snapshot { 0 } else { pos.checksum },
        wal_offset: 0,
        wal_size: 0,
        wal_salt1: 0,
        wal_salt2: 0,
        node_id: 5,
    };
    let mut post = if commit == 0 {
        CHECKSUM_FLAG
    } else {
        checksum(&after)
    };
    match wrong {
        0..=200 => {}
        201..=210 => header.pre_apply_checksum ^= 1,
        211..=220 => post ^= 1 << (wrong - 211),
        221..=230 => header.min_txid += 1,
        231..=240 => header.max_txid = header.max_txid.saturating_add(input.long() % 3),
        _ => header.page_size = 1024,
    }
    let good = wrong <= 200 && commit < 12;
    (header, pages, post, after, good)
}

/// A segment of a log, made up or damaged.
pub fn log_segment(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    if kind & 1 == 1 {
        return damaged_segment(&mut input);
    }
    let dir = scratch();
    let mut bytes = input.0.to_vec();
    if kind & 2 == 2 {
        seal_segment(&mut bytes);
    }
    let first = bytes
        .get(16..24)
        .map_or(1, |b| u64::from_be_bytes(b.try_into().expect("8 bytes")));
    fs::write(dir.path().join(segment::file_name(first)), &bytes).expect("it is written");
    let limit = 4 * bytes.len() + (2 << 20);
    let Ok(log) = bounded("a log", limit, || open_log(dir.path())) else {
        return;
    };
    let records = records(&log);
    for (header, body) in &records {
        assert_eq!(header.length, body.len() as u64);
        assert_eq!(header.body_crc, crc_fast::checksum(Crc64GoIso, body));
    }
    assert!(
        records
            .windows(2)
            .all(|w| w[1].0.min_txid == w[0].0.max_txid + 1 && w[1].0.max_txid == w[1].0.min_txid)
    );
    drop(log);
    let again = open_log(dir.path()).expect("it opened before");
    assert!(self::records(&again) == records);
}

/// Its records, by what a reader asks for.
fn records(log: &Log) -> Vec<(segment::RecordHeader, Vec<u8>)> {
    let (mut records, mut next) = (Vec::new(), log.first_txid());
    if log.last_txid() == 0 {
        return records;
    }
    while let Some(mut record) = log.read(next).expect("it was checked") {
        let mut body = Vec::new();
        record.body.read_to_end(&mut body).expect("it was checked");
        next = record.header.max_txid.wrapping_add(1);
        records.push((record.header, body));
    }
    assert_eq!(next, log.last_txid().wrapping_add(1), "records are missing");
    records
}

/// Sets the checksums of a segment and its records right.
fn seal_segment(bytes: &mut [u8]) {
    let start = SEGMENT_HEADER_SIZE as usize;
    if bytes.len() < start {
        return;
    }
    bytes[..8].copy_from_slice(b"TNRLOG01");
    let crc = crc_fast::checksum(Crc64GoIso, &bytes[..56]);
    bytes[56..64].copy_from_slice(&crc.to_be_bytes());
    let salt: [u8; 8] = bytes[8..16].try_into().expect("8 bytes");
    let mut at = start;
    while bytes.len().saturating_sub(at) >= RECORD_HEADER_SIZE {
        let length = u64::from_be_bytes(bytes[at + 8..at + 16].try_into().expect("8 bytes"));
        let body = at + RECORD_HEADER_SIZE;
        let end = usize::try_from(length)
            .ok()
            .and_then(|n| body.checked_add(n))
            .unwrap_or(usize::MAX);
        if let Some(whole) = bytes.get(body..end) {
            let crc = crc_fast::checksum(Crc64GoIso, whole);
            bytes[at + 40..at + 48].copy_from_slice(&crc.to_be_bytes());
        }
        bytes[at..at + 4].copy_from_slice(b"TREC");
        let mut crc = crc_fast::Digest::new(Crc32IsoHdlc);
        crc.update(&salt);
        crc.update(&bytes[at + 8..body]);
        let crc = crc.finalize() as u32;
        bytes[at + 4..at + 8].copy_from_slice(&crc.to_be_bytes());
        at = end.saturating_add(7) / 8 * 8;
    }
}

/// A segment's file name and bytes, and its records.
type GoodSegment = (String, Vec<u8>, Vec<(segment::RecordHeader, Vec<u8>)>);

/// A log with one fault: what is left of it is an error, or a prefix of its records.
fn damaged_segment(input: &mut Input) {
    static GOOD: OnceLock<GoodSegment> = OnceLock::new();
    let (name, good, whole) = GOOD.get_or_init(|| {
        let dir = scratch();
        let log = open_log(dir.path()).expect("a log");
        for txid in 1..=6u64 {
            let mut record = log.begin(txid, txid).expect("a record");
            let body: Vec<u8> = (0..150 * txid).map(|i| (i * txid) as u8).collect();
            std::io::Write::write_all(&mut record, &body).expect("it is written");
            record.commit().expect("it is written");
            log.flush_wait().expect("it is flushed");
        }
        let records = records(&log);
        log.close().expect("it is closed");
        let path = dir.path().join(segment::file_name(1));
        (
            segment::file_name(1),
            fs::read(path).expect("it is there"),
            records,
        )
    });
    let mut bytes = good.clone();
    let (what, a, b) = (
        input.byte() % 6,
        input.word() as usize % good.len(),
        input.word() as usize % good.len(),
    );
    let mut certain = false;
    match what {
        0 => bytes.truncate(a),
        // A burst of up to 32 bits, which both CRCs find whatever it is.
        1 | 2 => {
            let burst = input.word().to_be_bytes();
            bytes[a..]
                .iter_mut()
                .zip(burst)
                .for_each(|(byte, b)| *byte ^= b);
            // The last record but one says that all before it were flushed.
            let last_two: usize = whole[4..].iter().map(|(h, _)| h.disk_size() as usize).sum();
            certain = bytes != *good
                && (SEGMENT_HEADER_SIZE as usize..good.len() - last_two - 4).contains(&a);
        }
        3 => bytes[a.min(b)..a.max(b)].fill(0),
        // A block that was written in another's place.
        4 => bytes.copy_within(a.min(b)..a.max(b), a.min(b) / 2),
        _ => bytes.extend_from_slice(&good[a..]),
    }
    let dir = scratch();
    fs::write(dir.path().join(name), &bytes).expect("it is written");
    let Ok(log) = open_log(dir.path()) else {
        return;
    };
    let left = records(&log);
    assert!(whole.starts_with(&left), "records that nobody wrote");
    let padding = certain && left == *whole;
    assert!(
        !certain || padding,
        "a flushed record is damaged, and nobody says so"
    );
}

/// The file of page checksums, as it is and with the checksums of its headers set right.
pub fn sums(data: &[u8]) {
    let dir = scratch();
    let path = dir.path().join("checksums");
    let mut sealed = data.to_vec();
    for slot in [0, 512] {
        if let Some(header) = sealed.get_mut(slot..slot + 48) {
            header[..8].copy_from_slice(b"TNRSUMS1");
            let crc = crc_fast::checksum(Crc64GoIso, &header[..40]);
            header[40..].copy_from_slice(&crc.to_be_bytes());
        }
    }
    for bytes in [data, &sealed] {
        fs::write(&path, bytes).expect("it is written");
        let loaded = bounded("page checksums", 8 * bytes.len() + (64 << 10), || {
            sums::load(&Real, &path)
        });
        let Ok(Some((header, mut sums))) = loaded else {
            continue;
        };
        assert_eq!(sums.len(), header.pages);
        assert_eq!(sums.checksum(), sums.recomputed());
        let Some(sequence) = header.sequence.checked_add(1) else {
            continue;
        };
        let next = SumsHeader { sequence, ..header };
        sums.mark_all_dirty();
        let copy = dir.path().join("copy");
        sums::save(&Real, &copy, &sums.take_changes(), &next).expect("it is written");
        let (found, again) = sums::load(&Real, &copy)
            .expect("it is whole")
            .expect("it is there");
        assert_eq!(
            (found, again.checksum(), again.len()),
            (next, sums.checksum(), sums.len())
        );
        fs::remove_file(copy).expect("it is there");
    }
}

/// A file of a transaction over several databases that a start finds. Its LTX files and the checksum
/// of its table are set right. What comes of it are whole databases.
pub fn intent(data: &[u8]) {
    let mut input = Input(data);
    let (mut file, mut table) = (Vec::new(), Vec::new());
    let kind = input.byte();
    for _ in 0..usize::from(kind) % 4 {
        let len = usize::from(input.short());
        let name_len = usize::from(input.byte());
        let name = input.bytes(name_len);
        let ltx = input.bytes(len);
        let ltx = crate::fuzz::seal_ltx(ltx).unwrap_or(ltx.to_vec());
        let skew = if input.byte() < 240 { 0 } else { input.long() };
        table.extend((name.len() as u32).to_be_bytes());
        table.extend_from_slice(name);
        table.extend((file.len() as u64 ^ skew).to_be_bytes());
        table.extend((ltx.len() as u64).to_be_bytes());
        file.extend_from_slice(&ltx);
    }
    table.extend_from_slice(input.bytes(usize::from(kind / 4)));
    file.extend_from_slice(&table);
    file.extend((table.len() as u64 ^ input.long()).to_be_bytes());
    file.extend(crc_fast::checksum(Crc64GoIso, &table).to_be_bytes());
    file.extend(b"TNRSUPER");
    let dir = scratch();
    fs::create_dir(dir.path().join("super")).expect("a directory");
    fs::write(dir.path().join("super/a-mj0000009AB"), &file).expect("it is written");
    let store = open(dir.path());
    for db in store.databases() {
        let mut bytes = Vec::new();
        if db.broken().is_none() && db.page_size() > 0 {
            db.snapshot()
                .and_then(|mut s| s.write_database(&mut bytes))
                .expect("it can be read");
            let size = db.page_size() as usize;
            let image: u64 = bytes
                .chunks(size)
                .zip(1..)
                .filter(|(_, p)| *p != ltx::lock_pgno(size as u32))
                .fold(0, |sum, (page, pgno)| sum ^ page_checksum(pgno, page));
            assert_eq!(db.pos().checksum, image | CHECKSUM_FLAG);
        }
    }
    store.close();
    let left: Vec<_> = fs::read_dir(dir.path())
        .expect("a list")
        .map(|e| e.expect("an entry").file_name())
        .collect();
    let known = ["dbs", "super", "lock", "clusterid", "epoch"];
    assert!(
        left.iter().all(|n| known.iter().any(|k| n == k)),
        "{left:?}"
    );
}

/// What the node writes itself, for the bodies here.
pub(crate) fn seeds(target: &str) -> Vec<Vec<u8>> {
    let ltx: Vec<Vec<u8>> = crate::fuzz::seeds::seeds("ltx")
        .into_iter()
        .take(4)
        .collect();
    match target {
        "log_segment" => {
            let dir = scratch();
            let log = open_log(dir.path()).expect("a log");
            for (txid, body) in (1..).zip(&ltx) {
                let mut record = log.begin(txid, txid).expect("a record");
                std::io::Write::write_all(&mut record, body).expect("it is written");
                record.commit().expect("it is written");
            }
            log.close().expect("it is closed");
            let bytes = fs::read(dir.path().join(segment::file_name(1))).expect("it is there");
            let damages = (0..6u8).map(|what| vec![1, what, 0, 0, 2, what, 0, 0, 3, 9, 0, 0, 0, 1]);
            let kinds = [0u8, 2].map(|kind| [&[kind], &bytes[..]].concat());
            kinds.into_iter().chain(damages).collect()
        }
        "sums" => {
            let dir = scratch();
            let mut sums = sums::PageSums::default();
            (1..=20).for_each(|pgno| sums.set(pgno, page_checksum(pgno, b"x")));
            let pos = Pos {
                txid: 9,
                checksum: sums.checksum(),
            };
            for sequence in [1, 2] {
                let header = SumsHeader {
                    sequence,
                    pos,
                    page_size: 4096,
                    pages: 20,
                };
                sums::save(&Real, &dir.path().join("s"), &sums.take_changes(), &header)
                    .expect("it is written");
            }
            vec![fs::read(dir.path().join("s")).expect("it is there")]
        }
        _ => {
            let part = |name: &str, ltx: &[u8]| {
                let head = [&(ltx.len() as u16).to_be_bytes()[..], &[name.len() as u8]].concat();
                [&head[..], name.as_bytes(), ltx, &[0]].concat()
            };
            let two = [&[2][..], &part("a", &ltx[0]), &part("b", &ltx[0])].concat();
            let follows = [&[2][..], &part("a", &ltx[0]), &part("a", &ltx[1])].concat();
            vec![two, follows, [&[1][..], &part("../x", &ltx[0])].concat()]
        }
    }
}
