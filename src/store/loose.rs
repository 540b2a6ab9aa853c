//! Files in the data directory that belong to nothing yet.
//!
//! What is too large for memory, and will be a record of a log if all of it is right, is written once:
//! into a [`Loose`] segment, which the log then takes as it is. So is the database that it makes, if
//! there is none so far.
//!
//! Invariants: the room of a segment's headers is zeros until a log asks for them, so that no start
//! takes the file for a segment before it is one; a file that nobody has kept is removed.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crc_fast::CrcAlgorithm::Crc64GoIso;

use super::disk::{Disk, File, Open, Scratch};
use super::error::StoreError;
use super::segment::{BodyReader, RECORD_HEADER_SIZE, RecordHeader, SEGMENT_HEADER_SIZE, Segment};

/// Where they are, in the data directory.
const LOOSE: &str = "loose";
/// Where the record's LTX file begins.
const BODY: u64 = SEGMENT_HEADER_SIZE + RECORD_HEADER_SIZE as u64;
/// After how many bytes the disk is given them: the log's flush has to wait for the last ones only.
const GIVEN: u64 = 1 << 20;

/// A file that is removed if nobody keeps it.
pub(super) struct LooseFile {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: File,
    kept: bool,
}

impl LooseFile {
    /// An empty one, of a name that no other has.
    pub fn new(scratch: &Scratch) -> io::Result<LooseFile> {
        let disk = scratch.disk();
        let dir = scratch.dir().join(LOOSE);
        disk.create_dir_all(&dir)?;
        let mut number = 0u64;
        loop {
            let path = dir.join(number.to_string());
            match disk.open(&path, Open::New) {
                Ok(file) => {
                    return Ok(LooseFile {
                        disk: disk.clone(),
                        path,
                        file,
                        kept: false,
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(e),
            }
        }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it the place where it is to stay. Its name is not synced.
    pub fn keep_as(&mut self, path: &Path) -> io::Result<()> {
        self.disk.rename(&self.path, path)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for LooseFile {
    fn drop(&mut self) {
        if !self.kept {
            // One that stays is removed at the next start.
            let _ = self.disk.remove_file(&self.path);
        }
    }
}

/// A log segment of one record that is written outside of its log.
pub(super) struct Loose {
    file: LooseFile,
    length: u64,
    crc: crc_fast::Digest,
    /// How much of the file the disk was given.
    given: u64,
}

impl Loose {
    /// An empty one.
    pub fn new(scratch: &Scratch) -> io::Result<Loose> {
        Ok(Loose {
            file: LooseFile::new(scratch)?,
            length: 0,
            crc: crc_fast::Digest::new(Crc64GoIso),
            given: 0,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The LTX file, as far as it is written.
    pub fn body(&self) -> BodyReader {
        BodyReader::new(self.file.file.clone(), BODY, self.length)
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
        Segment::of_one(
            self.file.path.clone(),
            self.file.file.clone(),
            salt,
            &header,
        )
    }

    /// Makes what is written durable, which a flush then need not wait for.
    pub fn sync(&self) -> io::Result<()> {
        self.file.file.sync_all()
    }

    /// Gives it the name that it has in a log.
    pub fn keep_as(&mut self, path: &Path) -> io::Result<()> {
        self.file.keep_as(path)
    }
}

impl Write for Loose {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let file = &self.file.file;
        file.write_all_at(buf, BODY + self.length)?;
        self.crc.update(buf);
        self.length += buf.len() as u64;
        let new = self.length - self.given;
        if new >= GIVEN {
            file.begin_sync(BODY + self.given, new as usize);
            self.given = self.length;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Removes those of a node that has ended.
pub(super) fn clear(disk: &dyn Disk, data_dir: &Path) -> Result<(), StoreError> {
    let dir = data_dir.join(LOOSE);
    if !disk.exists(&dir) {
        return Ok(());
    }
    disk.remove_dir_of_files(&dir)
        .map_err(StoreError::io("remove files from", &dir))
}
