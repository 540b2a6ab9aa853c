//! A log segment of one record that is written outside of its log.
//!
//! What is too large for memory, and will be a record of a log if all of it is right, is written once:
//! into the file that the log then takes as it is.
//!
//! Invariants: the room of both headers is zeros until a log asks for them, so that no start takes
//! the file for a segment before it is one; a file that no log has kept is removed.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crc_fast::CrcAlgorithm::Crc64GoIso;

use super::disk::{Disk, File, Open, Scratch};
use super::error::StoreError;
use super::segment::{BodyReader, RECORD_HEADER_SIZE, RecordHeader, SEGMENT_HEADER_SIZE, Segment};

/// Where those lie in the data directory that belong to no log yet.
const ARRIVING: &str = "arriving";
/// Where the record's LTX file begins.
const BODY: u64 = SEGMENT_HEADER_SIZE + RECORD_HEADER_SIZE as u64;
/// After how many bytes the disk is given them: the log's flush has to wait for the last ones only.
const GIVEN: u64 = 1 << 20;

/// See the module.
pub(super) struct Loose {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: File,
    length: u64,
    crc: crc_fast::Digest,
    /// How much of the file the disk was given.
    given: u64,
    kept: bool,
}

impl Loose {
    /// An empty one of this name; one that is left from before is overwritten.
    pub fn create(disk: &Arc<dyn Disk>, path: PathBuf) -> io::Result<Loose> {
        let file = disk.open(&path, Open::Empty)?;
        Ok(Loose::of(disk, path, file))
    }

    /// One for what arrives, of a name that no other has.
    pub fn arriving(scratch: &Scratch) -> io::Result<Loose> {
        let disk = scratch.disk();
        let dir = scratch.dir().join(ARRIVING);
        disk.create_dir_all(&dir)?;
        let mut number = 0u64;
        loop {
            let path = dir.join(number.to_string());
            match disk.open(&path, Open::New) {
                Ok(file) => return Ok(Loose::of(disk, path, file)),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(e),
            }
        }
    }

    fn of(disk: &Arc<dyn Disk>, path: PathBuf, file: File) -> Loose {
        Loose {
            disk: disk.clone(),
            path,
            file,
            length: 0,
            crc: crc_fast::Digest::new(Crc64GoIso),
            given: 0,
            kept: false,
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The LTX file, as far as it is written.
    pub fn body(&self) -> BodyReader {
        BodyReader::new(self.file.clone(), BODY, self.length)
    }

    /// Makes it a segment with this salt, whose record has these TXIDs. Not synced.
    pub fn seal(
        &self,
        salt: u64,
        (min_txid, max_txid): (u64, u64),
        flushed_txid: u64,
    ) -> io::Result<Segment> {
        let header = RecordHeader {
            length: self.length,
            min_txid,
            max_txid,
            flushed_txid,
            body_crc: self.crc.finalize(),
        };
        Segment::of_one(self.path.clone(), self.file.clone(), salt, &header)
    }

    /// A log has it.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Write for Loose {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write_all_at(buf, BODY + self.length)?;
        self.crc.update(buf);
        self.length += buf.len() as u64;
        let new = self.length - self.given;
        if new >= GIVEN {
            self.file.begin_sync(BODY + self.given, new as usize);
            self.given = self.length;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Loose {
    fn drop(&mut self) {
        if !self.kept {
            // One that stays is removed at the next start.
            let _ = self.disk.remove_file(&self.path);
        }
    }
}

/// Removes what was arriving in the data directory when the node ended.
pub(super) fn clear(disk: &dyn Disk, data_dir: &Path) -> Result<(), StoreError> {
    let dir = data_dir.join(ARRIVING);
    if !disk.exists(&dir) {
        return Ok(());
    }
    disk.remove_dir_of_files(&dir)
        .map_err(StoreError::io("remove what was arriving in", &dir))
}
