//! Reading a transaction file.
//!
//! Nothing in the input is trusted: every page number is checked as it comes, so what a hostile
//! compressed block can expand to is bounded by the database's own size, and memory is bounded by
//! one page and one LZ4 block. The pages are known to be good only once [`Decoder::finish`] has
//! returned. Exactly the bytes of the file are taken from the reader: what follows it on a stream
//! stays there.

use std::io::{BufRead, Read};

use lz4_flex::frame::FrameDecoder;

use super::checksum::Crc;
use super::order::PageOrder;
use super::{
    CHECKSUM_FLAG, HEADER_SIZE, Header, LtxError, PAGE_HEADER_SIZE, TRAILER_SIZE, Trailer,
};

/// Reads one LTX file: the header, page after page, then the trailer.
pub struct Decoder<R: Read> {
    header: Header,
    body: Body<R>,
    order: PageOrder,
    crc: Crc,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Pages,
    Trailer,
    Failed,
}

enum Body<R: Read> {
    Raw(R),
    Lz4(Box<FrameDecoder<R>>),
}

impl<R: Read> Body<R> {
    fn read_exact(&mut self, data: &mut [u8]) -> Result<(), LtxError> {
        match self {
            Body::Raw(r) => r.read_exact(data)?,
            Body::Lz4(r) => r.read_exact(data)?,
        }
        Ok(())
    }

    /// Takes the end mark and content checksum of the LZ4 frame, which the last byte of the
    /// content does not yet do.
    fn end_block(&mut self) -> Result<(), LtxError> {
        match self {
            Body::Raw(_) => Ok(()),
            Body::Lz4(r) => match r.fill_buf()? {
                [] => Ok(()),
                _ => Err(LtxError::TrailingData),
            },
        }
    }
}

impl<R: Read> Decoder<R> {
    /// Reads the header. Reads are small: give a reader that buffers.
    ///
    /// # Errors
    /// [`LtxError::Truncated`], [`LtxError::Io`], or what [`Header::decode`] finds.
    pub fn new(mut r: R) -> Result<Self, LtxError> {
        let mut bytes = [0; HEADER_SIZE];
        r.read_exact(&mut bytes)?;
        let header = Header::decode(&bytes)?;
        let mut crc = Crc::new();
        crc.update(&bytes);
        let body = if header.compressed {
            Body::Lz4(Box::new(FrameDecoder::new(r)))
        } else {
            Body::Raw(r)
        };
        Ok(Decoder {
            header,
            body,
            order: PageOrder::new(&header),
            crc,
            state: State::Pages,
        })
    }

    /// The file's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Reads the next page into `data`, whose length must be the page size, and returns its
    /// number; `None`, with `data` untouched, after the last page.
    ///
    /// # Errors
    /// [`LtxError::BufferSize`], after which the call can be repeated; any other error is final.
    pub fn page(&mut self, data: &mut [u8]) -> Result<Option<u32>, LtxError> {
        match self.state {
            State::Failed => return Err(LtxError::Failed),
            State::Trailer => return Ok(None),
            State::Pages => {}
        }
        if data.len() != self.header.page_size as usize {
            return Err(LtxError::BufferSize {
                expected: self.header.page_size,
                actual: data.len(),
            });
        }
        let page = self.next_page(data);
        self.state = match page {
            Ok(Some(_)) => State::Pages,
            Ok(None) => State::Trailer,
            Err(_) => State::Failed,
        };
        page
    }

    /// Reads what is left of the file, checks the whole of it, and returns the reader, which then
    /// stands right behind the file.
    ///
    /// # Errors
    /// Whatever [`Decoder::page`] finds; [`LtxError::FileChecksum`];
    /// [`LtxError::IncompleteSnapshot`]; a post-apply checksum that cannot be right.
    pub fn finish(mut self) -> Result<(R, Trailer), LtxError> {
        if self.state == State::Pages {
            let mut data = vec![0; self.header.page_size as usize];
            while self.page(&mut data)?.is_some() {}
        }
        if self.state == State::Failed {
            return Err(LtxError::Failed);
        }
        let mut r = match self.body {
            Body::Raw(r) => r,
            Body::Lz4(r) => r.into_inner(),
        };
        let mut bytes = [0; TRAILER_SIZE];
        r.read_exact(&mut bytes)?;
        let trailer = Trailer::decode(&bytes);
        self.crc.update(&bytes[..8]);
        let computed = self.crc.value() | CHECKSUM_FLAG;
        if computed != trailer.file_checksum {
            return Err(LtxError::FileChecksum {
                computed,
                stored: trailer.file_checksum,
            });
        }
        self.order.check_end(trailer.post_apply_checksum)?;
        Ok((r, trailer))
    }

    fn next_page(&mut self, data: &mut [u8]) -> Result<Option<u32>, LtxError> {
        let mut number = [0; PAGE_HEADER_SIZE];
        self.body.read_exact(&mut number)?;
        self.crc.update(&number);
        let pgno = u32::from_be_bytes(number);
        if pgno == 0 {
            self.body.end_block()?;
            return Ok(None);
        }
        self.order.accept(pgno)?;
        self.body.read_exact(data)?;
        self.crc.update(data);
        self.order.add_content(pgno, data);
        Ok(Some(pgno))
    }
}

/// What a whole file amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The file's header.
    pub header: Header,
    /// The file's trailer.
    pub trailer: Trailer,
    /// How many pages the file holds.
    pub pages: u32,
}

/// Reads a whole file and checks everything that can be checked without the database. Add
/// [`check_transition`](super::check_transition) where the writer is not trusted.
///
/// # Errors
/// Whatever [`Decoder`] finds.
pub fn verify(r: impl Read) -> Result<Summary, LtxError> {
    let mut decoder = Decoder::new(r)?;
    let header = *decoder.header();
    let mut data = vec![0; header.page_size as usize];
    let mut pages = 0;
    // No overflow: pages ascend, so there are at most `commit`, a u32.
    while decoder.page(&mut data)?.is_some() {
        pages += 1;
    }
    let (_, trailer) = decoder.finish()?;
    Ok(Summary {
        header,
        trailer,
        pages,
    })
}
