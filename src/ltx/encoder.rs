//! Writing a transaction file.
//!
//! The encoder keeps the same rules as the decoder: it never writes a file that
//! [`Decoder`](super::Decoder) would refuse. Bytes go to the writer as they are made; the file is
//! complete only once [`Encoder::finish`] has returned.

use std::io::Write;

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

use super::checksum::Crc;
use super::order::PageOrder;
use super::{CHECKSUM_FLAG, Header, LtxError, PAGE_HEADER_SIZE, Trailer};

/// Writes one LTX file: the header, then pages in ascending order, then the trailer.
pub struct Encoder<W: Write> {
    body: Body<W>,
    page_size: u32,
    order: PageOrder,
    crc: Crc,
    failed: bool,
}

enum Body<W: Write> {
    Raw(W),
    Lz4(Box<FrameEncoder<W>>),
}

impl<W: Write> Body<W> {
    fn write_all(&mut self, data: &[u8]) -> Result<(), LtxError> {
        match self {
            Body::Raw(w) => w.write_all(data)?,
            Body::Lz4(w) => w.write_all(data)?,
        }
        Ok(())
    }
}

impl<W: Write> Encoder<W> {
    /// Writes the header. Uncompressed pages are written in small pieces: give a writer that
    /// buffers.
    ///
    /// # Errors
    /// [`LtxError::Header`] for an invalid header, [`LtxError::Io`] from the writer.
    pub fn new(mut w: W, header: Header) -> Result<Self, LtxError> {
        header.validate()?;
        let bytes = header.encode();
        w.write_all(&bytes)?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        let body = if header.compressed {
            // What LiteFS writes, and so what its readers are known to take.
            let info = FrameInfo::new()
                .block_size(BlockSize::Max64KB)
                .block_mode(BlockMode::Independent)
                .content_checksum(true);
            Body::Lz4(Box::new(FrameEncoder::with_frame_info(info, w)))
        } else {
            Body::Raw(w)
        };
        let order = PageOrder::new(&header);
        Ok(Encoder {
            body,
            page_size: header.page_size,
            order,
            crc,
            failed: false,
        })
    }

    /// Adds a page. Pages come in ascending order, none above commit, never the lock page; a
    /// snapshot takes every page.
    ///
    /// # Errors
    /// [`LtxError::BufferSize`] or [`LtxError::PageNumber`], after which the encoder can go on
    /// with a right page; [`LtxError::Io`], after which every call is [`LtxError::Failed`].
    pub fn page(&mut self, pgno: u32, data: &[u8]) -> Result<(), LtxError> {
        if self.failed {
            return Err(LtxError::Failed);
        }
        if data.len() != self.page_size as usize {
            return Err(LtxError::BufferSize {
                expected: self.page_size,
                actual: data.len(),
            });
        }
        self.order.accept(pgno)?;
        self.order.add_content(pgno, data);
        self.write(&pgno.to_be_bytes())
            .and_then(|()| self.write(data))
            .inspect_err(|_| self.failed = true)
    }

    /// Ends the file and returns the writer, not flushed.
    ///
    /// # Errors
    /// [`LtxError::IncompleteSnapshot`]; [`LtxError::PostApplyFlag`] or
    /// [`LtxError::PostApplyChecksum`] for a checksum that cannot be right; [`LtxError::Io`].
    pub fn finish(mut self, post_apply_checksum: u64) -> Result<(W, Trailer), LtxError> {
        if self.failed {
            return Err(LtxError::Failed);
        }
        self.order.check_end(post_apply_checksum)?;
        self.write(&[0; PAGE_HEADER_SIZE])?;
        self.crc.update(&post_apply_checksum.to_be_bytes());
        let trailer = Trailer {
            post_apply_checksum,
            file_checksum: self.crc.value() | CHECKSUM_FLAG,
        };
        let mut w = match self.body {
            Body::Raw(w) => w,
            Body::Lz4(w) => w.finish().map_err(std::io::Error::from)?,
        };
        w.write_all(&trailer.encode())?;
        Ok((w, trailer))
    }

    fn write(&mut self, data: &[u8]) -> Result<(), LtxError> {
        self.crc.update(data);
        self.body.write_all(data)
    }
}
