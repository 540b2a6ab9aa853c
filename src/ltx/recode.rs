//! The same transaction with its pages compressed or not.

use super::{Decoder, Encoder, Header, LtxError};

/// The file with its pages as they are; `None` if they are so already.
///
/// # Errors
/// Whatever [`Decoder`] finds.
pub fn without_lz4(file: &[u8]) -> Result<Option<Vec<u8>>, LtxError> {
    recode(file, false)
}

/// The file with its pages compressed; `None` if they are already.
///
/// # Errors
/// Whatever [`Decoder`] finds.
pub fn with_lz4(file: &[u8]) -> Result<Option<Vec<u8>>, LtxError> {
    recode(file, true)
}

fn recode(file: &[u8], compressed: bool) -> Result<Option<Vec<u8>>, LtxError> {
    let mut decoder = Decoder::new(file)?;
    let header = *decoder.header();
    if header.compressed == compressed {
        return Ok(None);
    }
    let header = Header {
        compressed,
        ..header
    };
    let mut encoder = Encoder::new(Vec::with_capacity(2 * file.len()), header)?;
    let mut page = vec![0; header.page_size as usize];
    while let Some(pgno) = decoder.page(&mut page)? {
        encoder.page(pgno, &page)?;
    }
    let (_, trailer) = decoder.finish()?;
    let (recoded, _) = encoder.finish(trailer.post_apply_checksum)?;
    Ok(Some(recoded))
}
