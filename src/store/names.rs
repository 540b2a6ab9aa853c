//! What a name in the mount stands for.

use crate::sqlite::journal::super_journal_database;

use super::database::FileKind;
use super::error::StoreError;

/// Longest name of a database, in bytes: room for every suffix within a file name.
const MAX_NAME: usize = 200;
/// Longest name of any file, in bytes.
const MAX_FILE_NAME: usize = 255;

/// The directory of the halt locks' files, in the mount.
pub const LOCK_DIR: &str = ".lock";

/// A name, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name<'a> {
    /// A file of a database: its kind and the database's name.
    File(FileKind, &'a str),
    /// `X-pos`: the position of a database.
    Pos(&'a str),
    /// `X-lock`: the halt lock of a database.
    Lock(&'a str),
    /// `X-mjHHHHHHHHH`: SQLite's journal of a transaction over several databases.
    SuperJournal(&'a str),
    /// `.primary`
    Primary,
    /// `.lag`
    Lag,
    /// `.lock`: where the files of the halt locks are.
    LockDir,
    /// Nothing that can exist here.
    Invalid,
}

impl Name<'_> {
    /// Understands a name.
    pub fn parse(name: &str) -> Name<'_> {
        match name {
            ".primary" => return Name::Primary,
            ".lag" => return Name::Lag,
            LOCK_DIR => return Name::LockDir,
            _ => {}
        }
        if let Some(db) = super_journal_database(name) {
            return match is_database(db) && name.len() <= MAX_FILE_NAME {
                true => Name::SuperJournal(name),
                false => Name::Invalid,
            };
        }
        let parsed = if let Some(db) = name.strip_suffix("-journal") {
            (Name::File(FileKind::Journal, db), db)
        } else if let Some(db) = name.strip_suffix("-wal") {
            (Name::File(FileKind::Wal, db), db)
        } else if let Some(db) = name.strip_suffix("-shm") {
            (Name::File(FileKind::Shm, db), db)
        } else if let Some(db) = name.strip_suffix("-pos") {
            (Name::Pos(db), db)
        } else if let Some(db) = name.strip_suffix("-lock") {
            (Name::Lock(db), db)
        } else {
            (Name::File(FileKind::Database, name), name)
        };
        if is_database(parsed.1) {
            parsed.0
        } else {
            Name::Invalid
        }
    }
}

fn is_database(name: &str) -> bool {
    let reserved = ["-journal", "-wal", "-shm", "-pos", "-lock"]
        .iter()
        .any(|s| name.ends_with(s))
        || super_journal_database(name).is_some();
    !name.is_empty()
        && name.len() <= MAX_NAME
        && !matches!(name, "." | ".." | ".primary" | ".lag" | LOCK_DIR)
        && !name.contains(|c: char| c == '/' || c.is_control())
        && !reserved
}

/// An error for a name, from the network say, that no database can have.
pub fn check_database(name: &str) -> Result<(), StoreError> {
    if is_database(name) {
        Ok(())
    } else {
        Err(StoreError::Name(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_name() {
        assert_eq!(Name::parse("a.db"), Name::File(FileKind::Database, "a.db"));
        assert_eq!(
            Name::parse("a.db-journal"),
            Name::File(FileKind::Journal, "a.db")
        );
        assert_eq!(Name::parse("a.db-wal"), Name::File(FileKind::Wal, "a.db"));
        assert_eq!(Name::parse("a.db-shm"), Name::File(FileKind::Shm, "a.db"));
        assert_eq!(Name::parse("a.db-pos"), Name::Pos("a.db"));
        assert_eq!(Name::parse("a.db-lock"), Name::Lock("a.db"));
        assert_eq!(
            Name::parse("a.db-mj0A1B2C9D0"),
            Name::SuperJournal("a.db-mj0A1B2C9D0")
        );
        assert_eq!(Name::parse(".primary"), Name::Primary);
        assert_eq!(Name::parse("-wal"), Name::Invalid);
        assert_eq!(Name::parse("a-wal-wal"), Name::Invalid);
        assert_eq!(Name::parse("../a-mj0A1B2C9D0"), Name::Invalid);
        assert_eq!(Name::parse("a-wal-mj0A1B2C9D0"), Name::Invalid);
    }

    #[test]
    fn hostile_names_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "a\0b",
            // Whoever lists names, or reads the log, sees one name where there is one.
            "a\nb",
            "a\x1b[2J",
            "a\u{85}b",
            "x-wal",
            "x-journal",
            ".lag",
            &"x".repeat(201),
        ] {
            assert!(check_database(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "a.db", "my db", "..x", "ünï.sqlite", &"x".repeat(200)] {
            assert!(check_database(good).is_ok(), "{good:?}");
        }
    }
}
