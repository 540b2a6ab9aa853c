//! Replication positions, and the file names that transactions are stored under.

use std::fmt;
use std::str::FromStr;

/// A point in a database's history: the last transaction, and the database's checksum after it.
///
/// Two nodes at the same position hold the same bytes. The zero position is that of a database
/// which has no transaction yet. The text form is `TXID/checksum`, 16 hex digits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct Pos {
    /// The last transaction applied; 0 if none was.
    pub txid: u64,
    /// The database's checksum after it (bit 63 set); 0 if there is none.
    pub checksum: u64,
}

impl Pos {
    /// Whether this is the position before the first transaction.
    pub fn is_zero(&self) -> bool {
        *self == Pos::default()
    }
}

impl fmt::Display for Pos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}/{:016x}", self.txid, self.checksum)
    }
}

/// A text that is no position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a position: expected 16 hex digits, a slash and 16 hex digits")]
pub struct ParsePosError;

impl FromStr for Pos {
    type Err = ParsePosError;

    /// Reads exactly the 33 characters that [`Pos`] displays as; hex digits of either case.
    fn from_str(s: &str) -> Result<Self, ParsePosError> {
        let (txid, checksum) = s.split_once('/').ok_or(ParsePosError)?;
        match (parse_txid(txid), parse_txid(checksum)) {
            (Some(txid), Some(checksum)) => Ok(Pos { txid, checksum }),
            _ => Err(ParsePosError),
        }
    }
}

/// The name of the file that holds transactions `min` to `max`: `<min>-<max>.ltx`, TXIDs as 16
/// lower-case hex digits.
pub fn file_name(min: u64, max: u64) -> String {
    format!("{min:016x}-{max:016x}.ltx")
}

/// The TXIDs (first, last) in the name of an LTX file, or `None` if the name is not exactly in
/// the form of [`file_name`]: such a file is to be ignored.
pub fn parse_file_name(name: &str) -> Option<(u64, u64)> {
    let (min, max) = name.strip_suffix(".ltx")?.split_once('-')?;
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    Some((parse_txid(min)?, parse_txid(max)?))
}

/// Reads a TXID: exactly 16 hex digits of either case (`from_str_radix` alone would take a sign).
pub fn parse_txid(s: &str) -> Option<u64> {
    if s.len() != 16 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(s, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_text() {
        let pos = Pos {
            txid: 0x2a,
            checksum: 0xf6e9_e3d7_c3db_b858,
        };
        assert_eq!(pos.to_string(), "000000000000002a/f6e9e3d7c3dbb858");
        assert_eq!(pos.to_string().parse(), Ok(pos));
        assert_eq!("000000000000002A/F6E9E3D7C3DBB858".parse(), Ok(pos));
        assert_eq!(
            "0000000000000000/0000000000000000".parse(),
            Ok(Pos::default())
        );
        assert!(Pos::default().is_zero());
        assert!(!pos.is_zero());
        for bad in [
            "",
            "/",
            "2a/f6e9e3d7c3dbb858",
            "000000000000002a-f6e9e3d7c3dbb858",
            "+00000000000002a/f6e9e3d7c3dbb858",
            "000000000000002a/f6e9e3d7c3dbb858 ",
            "000000000000002a/f6e9e3d7c3dbb858/",
            "00000000000002aé/f6e9e3d7c3dbb85",
        ] {
            assert_eq!(bad.parse::<Pos>(), Err(ParsePosError), "{bad}");
        }
    }

    #[test]
    fn file_names() {
        assert_eq!(file_name(1, 0x2a), "0000000000000001-000000000000002a.ltx");
        assert_eq!(
            parse_file_name(&file_name(7, u64::MAX)),
            Some((7, u64::MAX))
        );
        for bad in [
            "",
            ".ltx",
            "0000000000000001-000000000000002A.ltx",
            "0000000000000001-000000000000002a.ltx.tmp",
            "0000000000000001-000000000000002a",
            "1-2.ltx",
            "0000000000000001_000000000000002a.ltx",
            "+000000000000001-000000000000002a.ltx",
            "0000000000000001-000000000000002a-000000000000002a.ltx",
        ] {
            assert_eq!(parse_file_name(bad), None, "{bad}");
        }
    }
}
