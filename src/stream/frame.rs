//! Frames: the units of a stream's body, `type u32` and a payload, integers big-endian.
//!
//! An LTX frame is followed by the LTX file in chunks (`length u16 · bytes`, ended by a zero length):
//! [`encode_ltx`] and [`ChunkWriter`] write them, [`ChunkReader`] reads them. Every other frame is
//! complete in itself.
//!
//! Reading is bounded: no length is believed before it was compared with its bound, so that a frame
//! costs at most [`MAX_LEASE_ID_LEN`] bytes, and a chunk is never held as a whole.

use std::io::{self, Read, Write};

use bytes::Bytes;

use super::MAX_NAME_LEN;

/// The longest lease ID in bytes that a handoff frame may carry.
pub const MAX_LEASE_ID_LEN: usize = 1024;

/// The most bytes of an LTX file in one chunk.
pub const MAX_CHUNK_LEN: usize = u16::MAX as usize;

const TYPE_LTX: u32 = 1;
const TYPE_READY: u32 = 2;
const TYPE_END: u32 = 3;
const TYPE_DROP_DB: u32 = 4;
const TYPE_HANDOFF: u32 = 5;
const TYPE_HIGH_WATER_MARK: u32 = 6;
const TYPE_HEARTBEAT: u32 = 7;

/// One frame of a stream, without the chunks that follow an LTX frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// An LTX file of the named database follows as chunks.
    Ltx {
        /// Bytes of the file, 0 when unknown (always 0 from LiteFS and from us).
        size: u64,
        /// The database.
        name: String,
    },
    /// Everything that the replica lacked when it connected was sent. Comes once.
    Ready,
    /// The primary ends the stream on purpose.
    End,
    /// The replica has a database that the primary has not. Deprecated; sent, ignored when received.
    DropDb {
        /// The database.
        name: String,
    },
    /// The receiver is to take over this lease; the stream ends.
    Handoff {
        /// The lease's ID in the terms of the lease backend.
        lease_id: String,
    },
    /// Up to where the backup has a database; 0 without a backup.
    HighWaterMark {
        /// The last TXID that the backup has.
        txid: u64,
        /// The database.
        name: String,
    },
    /// The stream is alive, and everything up to this moment was sent.
    Heartbeat {
        /// The primary's clock, milliseconds since the Unix epoch.
        timestamp: i64,
    },
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Reading failed, or the stream ended inside a frame.
    #[error("read of the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The stream ended between two frames, without an `end` frame.
    #[error("the stream broke off without an end frame")]
    Eof,
    /// A frame type that this version does not know, so that its length is not known either.
    #[error("unknown frame type {0}: the peer speaks another version of the protocol")]
    UnknownType(u32),
    /// A length above its bound.
    #[error("{what} of {len} bytes in a frame, at most {max} are allowed")]
    TooLong {
        /// What the length is of.
        what: &'static str,
        /// The length that the peer stated.
        len: u32,
        /// The bound.
        max: usize,
    },
    /// Text that is not UTF-8.
    #[error("{0} in a frame is not UTF-8")]
    NotUtf8(&'static str),
    /// An LTX frame holds more than one LTX file.
    #[error("an LTX frame goes on after the end of its LTX file")]
    TrailingBytes,
}

impl Frame {
    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Ltx { size, name } => {
                put_u32(out, TYPE_LTX);
                out.extend_from_slice(&size.to_be_bytes());
                put_text(out, name);
            }
            Frame::Ready => put_u32(out, TYPE_READY),
            Frame::End => put_u32(out, TYPE_END),
            Frame::DropDb { name } => {
                put_u32(out, TYPE_DROP_DB);
                put_text(out, name);
            }
            Frame::Handoff { lease_id } => {
                put_u32(out, TYPE_HANDOFF);
                put_text(out, lease_id);
            }
            Frame::HighWaterMark { txid, name } => {
                put_u32(out, TYPE_HIGH_WATER_MARK);
                out.extend_from_slice(&txid.to_be_bytes());
                put_text(out, name);
            }
            Frame::Heartbeat { timestamp } => {
                put_u32(out, TYPE_HEARTBEAT);
                out.extend_from_slice(&timestamp.to_be_bytes());
            }
        }
    }

    /// Reads one frame. After [`Frame::Ltx`] the caller goes on with a [`ChunkReader`].
    ///
    /// The end of `r` before the first byte is [`FrameError::Eof`], inside a frame an
    /// [`FrameError::Io`] of kind `UnexpectedEof`.
    pub fn read(r: &mut impl Read) -> Result<Frame, FrameError> {
        const NAME: &str = "a database name";
        let frame_type = match read_type(r)? {
            Some(frame_type) => frame_type,
            None => return Err(FrameError::Eof),
        };
        Ok(match frame_type {
            TYPE_LTX => {
                let size = read_u64(r)?;
                Frame::Ltx {
                    size,
                    name: read_text(r, NAME, MAX_NAME_LEN)?,
                }
            }
            TYPE_READY => Frame::Ready,
            TYPE_END => Frame::End,
            TYPE_DROP_DB => Frame::DropDb {
                name: read_text(r, NAME, MAX_NAME_LEN)?,
            },
            TYPE_HANDOFF => Frame::Handoff {
                lease_id: read_text(r, "a lease ID", MAX_LEASE_ID_LEN)?,
            },
            TYPE_HIGH_WATER_MARK => {
                let txid = read_u64(r)?;
                Frame::HighWaterMark {
                    txid,
                    name: read_text(r, NAME, MAX_NAME_LEN)?,
                }
            }
            TYPE_HEARTBEAT => Frame::Heartbeat {
                timestamp: read_u64(r)? as i64,
            },
            other => return Err(FrameError::UnknownType(other)),
        })
    }
}

/// Appends an LTX frame with the whole of `ltx`, one LTX file, in as few chunks as it takes.
pub fn encode_ltx(name: &str, ltx: &[u8], out: &mut Vec<u8>) {
    let chunks = ltx.len().div_ceil(MAX_CHUNK_LEN);
    out.reserve(4 + 8 + 4 + name.len() + ltx.len() + 2 * chunks + 2);
    Frame::Ltx {
        size: 0,
        name: name.to_owned(),
    }
    .encode(out);
    for chunk in ltx.chunks(MAX_CHUNK_LEN) {
        out.extend_from_slice(&(chunk.len() as u16).to_be_bytes());
        out.extend_from_slice(chunk);
    }
    out.extend_from_slice(&0u16.to_be_bytes());
}

/// Turns an LTX file that is written to it into an LTX frame, emitted in pieces of a full chunk, so
/// that a snapshot of any size needs the memory of one chunk.
///
/// `emit` gets each piece of the frame in order and decides by its error whether writing goes on.
pub struct ChunkWriter<E: FnMut(Bytes) -> io::Result<()>> {
    /// What was not emitted yet: perhaps the frame's head, then the chunk's length and its bytes.
    buf: Vec<u8>,
    /// Where in `buf` the chunk's two length bytes are.
    chunk: usize,
    emit: E,
}

impl<E: FnMut(Bytes) -> io::Result<()>> ChunkWriter<E> {
    /// Begins an LTX frame of the named database.
    pub fn new(name: &str, emit: E) -> Self {
        let mut buf = Vec::with_capacity(MAX_CHUNK_LEN + 512);
        Frame::Ltx {
            size: 0,
            name: name.to_owned(),
        }
        .encode(&mut buf);
        let chunk = buf.len();
        buf.extend_from_slice(&[0, 0]);
        ChunkWriter { buf, chunk, emit }
    }

    /// Ends the frame: the last chunk and the zero length.
    pub fn finish(mut self) -> io::Result<()> {
        // A chunk without bytes is the end mark itself.
        if self.chunk_len() > 0 {
            self.emit_chunk()?;
        }
        (self.emit)(Bytes::from(self.buf))
    }

    fn chunk_len(&self) -> usize {
        self.buf.len() - self.chunk - 2
    }

    /// Emits what is buffered and begins an empty chunk.
    fn emit_chunk(&mut self) -> io::Result<()> {
        let len = self.chunk_len() as u16;
        self.buf[self.chunk..self.chunk + 2].copy_from_slice(&len.to_be_bytes());
        let mut next = Vec::with_capacity(MAX_CHUNK_LEN + 2);
        next.extend_from_slice(&[0, 0]);
        self.chunk = 0;
        (self.emit)(Bytes::from(std::mem::replace(&mut self.buf, next)))
    }
}

impl<E: FnMut(Bytes) -> io::Result<()>> Write for ChunkWriter<E> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.chunk_len() == MAX_CHUNK_LEN {
            self.emit_chunk()?;
        }
        let n = data.len().min(MAX_CHUNK_LEN - self.chunk_len());
        self.buf.extend_from_slice(&data[..n]);
        Ok(n)
    }

    /// Does nothing: pieces are emitted when they are full, and at the end.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the LTX file that follows an LTX frame; ends at the zero length.
pub struct ChunkReader<'r, R: Read> {
    inner: &'r mut R,
    /// Bytes of the current chunk that were not read yet.
    left: usize,
    ended: bool,
}

impl<'r, R: Read> ChunkReader<'r, R> {
    /// Reads chunks from `inner`, which stands right behind an LTX frame.
    pub fn new(inner: &'r mut R) -> Self {
        ChunkReader {
            inner,
            left: 0,
            ended: false,
        }
    }

    /// Takes the zero length that must come now.
    pub fn finish(mut self) -> Result<(), FrameError> {
        if !self.ended && (self.left > 0 || self.next_chunk()? > 0) {
            return Err(FrameError::TrailingBytes);
        }
        Ok(())
    }

    /// Reads on to the end of the frame and throws it away.
    pub fn skip(mut self) -> Result<(), FrameError> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(())
    }

    /// Reads the next chunk's length, 0 at the end.
    fn next_chunk(&mut self) -> io::Result<usize> {
        let mut len = [0; 2];
        self.inner.read_exact(&mut len)?;
        self.left = usize::from(u16::from_be_bytes(len));
        self.ended = self.left == 0;
        Ok(self.left)
    }
}

impl<R: Read> Read for ChunkReader<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.ended || buf.is_empty() || (self.left == 0 && self.next_chunk()? == 0) {
            return Ok(0);
        }
        let want = buf.len().min(self.left);
        let n = self.inner.read(&mut buf[..want])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n;
        Ok(n)
    }
}

fn put_u32(out: &mut Vec<u8>, n: u32) {
    out.extend_from_slice(&n.to_be_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names are file names and lease IDs are short: far below 4 GiB.
    put_u32(out, text.len() as u32);
    out.extend_from_slice(text.as_bytes());
}

/// The frame's type, or `None` at the end of the stream.
fn read_type(r: &mut impl Read) -> Result<Option<u32>, FrameError> {
    let mut buf = [0; 4];
    let first = loop {
        match r.read(&mut buf) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    r.read_exact(&mut buf[first..])?;
    Ok(Some(u32::from_be_bytes(buf)))
}

fn read_u64(r: &mut impl Read) -> Result<u64, FrameError> {
    let mut buf = [0; 8];
    r.read_exact(&mut buf)?;
    Ok(u64::from_be_bytes(buf))
}

fn read_text(r: &mut impl Read, what: &'static str, max: usize) -> Result<String, FrameError> {
    let mut len = [0; 4];
    r.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len);
    if len as usize > max {
        return Err(FrameError::TooLong { what, len, max });
    }
    let mut text = vec![0; len as usize];
    r.read_exact(&mut text)?;
    String::from_utf8(text).map_err(|_| FrameError::NotUtf8(what))
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
