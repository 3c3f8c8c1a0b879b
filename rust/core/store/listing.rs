//! Which files of a folder are what for a log.

use super::error::StoreError;
use super::format::{oldest_in, segment_base, segment_name};
use super::mutants::{Mutant, is_broken};
use super::storage::{Storage, uninterrupted};

/// The name of a segment that is not finished.
pub(crate) const NEW_SEGMENT: &str = "segment.tmp";
/// The name of a file whose segment was retired, to be one again.
pub(crate) const SPARE: &str = "segment.spare";

/// The files of a log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listing {
    /// The first sequences of the segments, in order.
    pub(crate) bases: Vec<u64>,
    /// Records below were retired.
    pub(crate) retired: u64,
    /// What is none of the log any more, and is removed by whoever opens it for writing.
    pub(crate) leftovers: Vec<String>,
}

impl Listing {
    pub(crate) fn of<S: Storage>(storage: &S) -> Result<Self, StoreError> {
        let names = uninterrupted(|| storage.names()).map_err(StoreError::io("listing", "."))?;
        let retired = names.iter().filter_map(|name| oldest_in(name)).max().unwrap_or_default();
        let mut listing = Self { retired, ..Self::default() };
        for name in names {
            match segment_base(&name) {
                Some(base) if base >= retired || is_broken(Mutant::KeepsRetired) => {
                    listing.bases.push(base);
                }
                Some(_) => listing.leftovers.push(name),
                // A crash may have left the header of a segment in either.
                None if name == NEW_SEGMENT || name == SPARE => listing.leftovers.push(name),
                None if oldest_in(&name).is_some_and(|oldest| oldest < retired) => {
                    listing.leftovers.push(name);
                }
                None => {}
            }
        }
        listing.bases.sort_unstable();
        Ok(listing)
    }

    /// Returns whether the log has the segment that begins with a sequence.
    pub(crate) fn has(&self, base: u64) -> bool {
        self.bases.binary_search(&base).is_ok()
    }

    /// Returns the first sequence of the segment with a record, or of the first one behind it.
    pub(crate) fn base_for(&self, sequence: u64) -> Option<u64> {
        let at = self.bases.partition_point(|base| *base <= sequence);
        self.bases.get(at.saturating_sub(1)).copied()
    }
}

/// Opens the segment that begins with a sequence, to read it.
pub(crate) fn open_segment<S: Storage>(storage: &S, base: u64) -> Result<S::File, StoreError> {
    let name = segment_name(base);
    uninterrupted(|| storage.open(&name, false)).map_err(StoreError::io("opening", &name))
}
