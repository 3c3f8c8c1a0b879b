//! The event log: what was published, kept on a disk, whatever happens to process and machine.
//!
//! ```text
//!  EventStore ─► Log ─► Storage                  writing: one at a time
//!                 ▲        │
//!             recovery ◄───┤                     opening: what is there, what is cut, what is damaged
//!                          └─► Scan              reading: frame by frame, each one checked
//! ```
//!
//! docs/format.md has the bytes. All of it runs over [`storage::Storage`], so that `crash.rs` and
//! `failing.rs` drive the very same code over a disk that loses power between any two calls or fails any of
//! them, and `mutants.rs` breaks it on purpose, to see that this is found.

mod attach;
mod attachment;
mod commit;
mod compress;
mod compressed;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod damage;
mod dictionary;
mod digest;
mod directory;
mod durability;
mod error;
mod event_store;
#[cfg(test)]
mod failing;
mod folder;
mod format;
#[cfg(any(test, tickbus_fuzz))]
mod fuzz;
mod holds;
mod index;
mod inspect;
mod listing;
pub(crate) mod log;
pub(crate) mod mutants;
mod query;
mod reader;
mod recovery;
mod replay;
mod retire;
mod salvage;
mod scan;
#[cfg(any(test, tickbus_fuzz))]
#[cfg_attr(not(test), expect(dead_code, reason = "a fuzzer has a disk that never fails"))]
pub(crate) mod sim;
mod storage;
mod store_reader;
mod tenant;
mod transport;
mod verify;
#[cfg(test)]
pub(crate) mod workload;

pub(crate) use commit::Committed;
pub(crate) use directory::Directory;
pub(crate) use holds::Holds;
pub(crate) use reader::{LogReader, oldest};
pub(crate) use storage::Storage;
pub(crate) use tenant::Tenant;

pub use attach::{Replayed, Source};
pub use attachment::Attachment;
pub use compress::Compression;
pub use digest::Digest;
pub use durability::{Durability, Ticket};
pub use error::StoreError;
pub use event_store::{AppendError, EventStore, NewRecords, StoreConfig, StoreStats};
#[cfg(tickbus_fuzz)]
pub use fuzz::{look_at_any_log, real_logs};
pub use holds::Hold;
pub use inspect::SegmentReport;
pub use log::Object;
pub use query::{Found, Query};
pub use reader::{Batch, Gap, Objects, Records};
pub use recovery::Recovery;
pub use replay::{Replay, ReplayBatch, ReplayError, ReplayOptions, ReplayedObject, Sink};
pub use retire::{Retention, Retired};
pub use salvage::Salvage;
pub use store_reader::{StoreQuery, StoreReader};
pub use transport::{ReplayProgress, ReplayState, Transport, VirtualClock};
pub use verify::Verification;
