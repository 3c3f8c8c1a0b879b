//! What can be asked of the log in a folder without being its writer.

use super::directory::Directory;
use super::error::StoreError;
use super::event_store::{EventStore, StoreConfig, StoreStats};
use super::inspect::{SegmentReport, inspect};
use super::listing::{Listing, stored_bytes};
use super::log::Limits;
use super::query::{LogQuery, Query};
use super::reader::LogReader;
use super::recovery::{Findings, Recovery, settled};
use super::salvage::{Salvage, Survey};
use super::store_reader::{End, StoreQuery, StoreReader};
use super::verify::{Verification, verify};
use crate::error::ConfigError;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

impl EventStore {
    /// Reads all of a log and compares it with its checksums. It may be written meanwhile.
    ///
    /// # Errors
    ///
    /// `Corrupt` with the first place that is damaged, `Version`, `Io`.
    pub fn verify(path: impl AsRef<Path>) -> Result<Verification, StoreError> {
        let folder = Directory::open(path.as_ref())?;
        settled(|| verify(&folder))
    }

    /// Reads all of a log and tells what is in each of its files, whole or not. It may be written
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// `Version`, `Io`; `Corrupt` only if a file has the name of another one.
    pub fn inspect(path: impl AsRef<Path>) -> Result<Vec<SegmentReport>, StoreError> {
        let folder = Directory::open(path.as_ref())?;
        settled(|| inspect(&folder))
    }

    /// Returns what [`EventStore::salvage`] would keep of a damaged log, and what is lost; nothing is
    /// changed.
    ///
    /// # Errors
    ///
    /// `AlreadyOpen` if it is being written, `Version`, `Io`; `Name` and `EventType` if a name of the log
    /// finds no place in this process.
    pub fn survey(path: impl AsRef<Path>) -> Result<Salvage, StoreError> {
        let (folder, _lock) = Directory::still(path.as_ref())?;
        Survey::of(&folder)?.salvage(&folder)
    }

    /// Writes what is whole of a damaged log into a new folder, and reads it back. Every record keeps its
    /// sequence, and so does the log its identity; each record that is lost is a gap in its place. The
    /// damaged log stays as it is.
    ///
    /// The new folder gets its name when it is whole; until then it is called `<to>.unfinished`.
    ///
    /// # Errors
    ///
    /// As [`EventStore::survey`]; `Config` if one of the new folders is there already; `Full`, `Io`.
    pub fn salvage(path: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<Salvage, StoreError> {
        let (folder, _lock) = Directory::still(path.as_ref())?;
        let to = to.as_ref();
        let Some(name) = to.file_name() else {
            let message = format!("the new folder was {}; it must have a name", to.display());
            return Err(ConfigError::new(message).into());
        };
        let mut unfinished = name.to_owned();
        unfinished.push(".unfinished");
        let unfinished = &to.with_file_name(unfinished);
        for new in [to, unfinished] {
            if new.symlink_metadata().is_ok() {
                let new = new.display();
                let message = format!("{new} is there already; remove it, or name a new folder");
                return Err(ConfigError::new(message).into());
            }
        }
        let survey = Survey::of(&folder)?;
        let salvage = survey.salvage(&folder)?;
        let segment_bytes = StoreConfig::default().segment_bytes;
        let (storage, lock) = Directory::lock(unfinished)?;
        let limits = Limits { segment_bytes, max_bytes: None };
        let written = survey.write(&folder, Arc::new(storage), limits);
        let written = written.and_then(|()| Directory::rename(unfinished, to));
        lock.release();
        match written {
            Ok(()) => Ok(salvage),
            Err(error) => {
                // What is left of it is of no use.
                _ = std::fs::remove_dir_all(unfinished);
                Err(error)
            }
        }
    }

    /// Returns a reader of the log in a folder, which another process may be writing, from a sequence
    /// on: up to what was durable when it last looked, as far as the log says so.
    ///
    /// # Errors
    ///
    /// `Corrupt`, `Version`, `Io`.
    pub fn read_only(path: impl AsRef<Path>, from: u64) -> Result<StoreReader, StoreError> {
        let storage = Arc::new(Directory::open(path.as_ref())?);
        let durable = Findings::of_live(&*storage)?.durable;
        let end = End::Durable { storage: storage.clone(), durable };
        Ok(StoreReader { end, reader: LogReader::new(storage, from) })
    }

    /// As [`EventStore::query`], of the log in a folder, which another process may be writing: what was
    /// durable, as far as the log says so.
    ///
    /// # Errors
    ///
    /// `Corrupt`, `Version`, `Io`.
    pub fn query_only(path: impl AsRef<Path>, query: &Query) -> Result<StoreQuery, StoreError> {
        let storage = Arc::new(Directory::open(path.as_ref())?);
        let limit = Findings::of_live(&*storage)?.durable;
        Ok(StoreQuery(LogQuery::new(storage, Arc::default(), query, limit)?))
    }

    /// Returns what the log in a folder, which another process may be writing, says of itself, and
    /// which part of it had to be read for that.
    ///
    /// # Errors
    ///
    /// `Corrupt`, `Version`, `Io`.
    pub fn look(path: impl AsRef<Path>) -> Result<(Recovery, StoreStats), StoreError> {
        let storage = Directory::open(path.as_ref())?;
        let findings = Findings::of_live(&storage)?;
        let mut bases = Listing::of(&storage)?.bases;
        let mut bytes = 0;
        // Some may have been retired meanwhile.
        bases.retain(|base| {
            let found = stored_bytes(&storage, *base);
            bytes += *found.as_ref().unwrap_or(&0);
            found.is_ok()
        });
        let next_sequence = findings.sequence;
        let oldest_sequence = bases.first().map_or(next_sequence, |first| *first);
        let segments = bases.len();
        let scanned_bytes = findings.scanned_bytes;
        let recovery = Recovery {
            oldest_sequence,
            next_sequence,
            segments,
            scanned_bytes,
            ..Recovery::default()
        };
        let durable_end = findings.durable;
        let stats = StoreStats {
            oldest_sequence,
            next_sequence,
            durable_end,
            segments,
            bytes,
            held_from: None,
            detached: 0,
            missed: 0,
            refused: 0,
            syncs: 0,
            sync_time: Duration::ZERO,
            is_poisoned: false,
        };
        Ok((recovery, stats))
    }
}
