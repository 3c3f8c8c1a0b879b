//! What can go wrong with a log.

use super::format::segment_name;
use crate::error::{ConfigError, EventTypeError, NameError};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Why a log did not do what it was asked for. Nothing that it refuses was stored, and nothing that
/// it acknowledged is lost by it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Something that was acknowledged is not what was written.
    #[error(
        "segment {segment} {}; reading stops at sequence {sequence}, behind which records may be \
         whole: restore the file from a copy, or repair the log into another folder",
        damage(*offset, expected)
    )]
    Corrupt {
        /// The file.
        segment: String,
        /// Where in it, in bytes.
        offset: u64,
        /// The first sequence that cannot be read.
        sequence: u64,
        /// What should be there: the file itself where that is missing.
        expected: &'static str,
    },
    /// A call of the system failed.
    #[error("{what} {name} failed: {source}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// The file or the folder.
        name: String,
        /// The system's error.
        source: Arc<io::Error>,
    },
    /// An earlier write or sync failed, so that nobody knows what is on the disk.
    #[error(
        "the log is poisoned: {cause}; nothing was stored since: mend the cause and open the log \
         again, which recovers all that was acknowledged"
    )]
    Poisoned {
        /// What failed first.
        cause: String,
    },
    /// There is no room for another segment; the log goes on once there is.
    #[error(
        "the log has no room for a segment of {wanted} bytes: {why}; nothing was stored: free space, \
         retain less, or raise max_bytes"
    )]
    Full {
        /// Bytes that were wanted.
        wanted: u64,
        /// What has no room.
        why: String,
    },
    /// The log was opened to read only, or may not be written.
    #[error("{path} can only be read: {why}")]
    ReadOnly {
        /// The folder.
        path: PathBuf,
        /// Who says so.
        why: String,
    },
    /// Another process writes the log, or another `EventStore` of this one.
    #[error(
        "{path} is being written by process {owner}; a log has one writer: open it with \
         read_only=True, or close it there"
    )]
    AlreadyOpen {
        /// The folder.
        path: PathBuf,
        /// The process, as far as it says so.
        owner: String,
    },
    /// The log was written in a format that this version does not know.
    #[error(
        "segment {segment} has format {major} and features {features:#x}; this version reads format \
         1 and features 0: read it with the version that wrote it"
    )]
    Version {
        /// The file.
        segment: String,
        /// Its major version.
        major: u16,
        /// Its incompatible features.
        features: u64,
    },
    /// A record does not fit into a frame.
    #[error(
        "the record has {bytes} bytes; it can have at most {limit}: put what is large elsewhere"
    )]
    TooLarge {
        /// Its bytes.
        bytes: usize,
        /// The most that it could have.
        limit: usize,
    },
    /// The log was closed.
    #[error("the log, or what stands on it, is closed; open it again")]
    Closed,
    /// A setting that a log cannot keep.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A name in the log finds no place in this process.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A registered type in the log contradicts one of this process.
    #[error(transparent)]
    EventType(#[from] EventTypeError),
}

/// What is expected where a file is missing.
const FILE: &str = "the file";

/// Returns what is wrong with a segment.
fn damage(offset: u64, expected: &str) -> String {
    if expected == FILE {
        return "is missing".to_owned();
    }
    format!("is damaged at byte {offset}: expected {expected}")
}

impl StoreError {
    /// Returns the error of a log without the segment that begins with a sequence.
    pub(crate) fn missing(sequence: u64) -> Self {
        Self::Corrupt { segment: segment_name(sequence), offset: 0, sequence, expected: FILE }
    }

    /// Returns what makes an error of the system one of the log.
    pub(crate) fn io(what: &'static str, name: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, name: name.to_owned(), source: Arc::new(source) }
    }

    /// As `io`, of a file that is to have so many bytes, for which there may be no room.
    pub(crate) fn creating(name: &str, bytes: u64) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { wanted: bytes, why: error.to_string() }
            }
            _ => Self::io("creating", name)(error),
        }
    }
}
