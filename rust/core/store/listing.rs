//! Which files of a folder are what for a log.

use super::compressed::{CompressedFile, SegmentFile};
use super::error::StoreError;
use super::format::{
    compressed_base, compressed_name, index_base, index_name, is_new_index, oldest_in,
    segment_base, segment_name,
};
use super::mutants::{Mutant, is_broken};
use super::storage::{Storage, uninterrupted};
use std::io;

/// The name of a segment that is not finished.
pub(crate) const NEW_SEGMENT: &str = "segment.tmp";
/// The name of a file whose segment was retired, to be one again.
pub(crate) const SPARE: &str = "segment.spare";

/// The name of a compressed segment that is not finished.
pub(crate) const COMPRESSING: &str = "compressing.tmp";

/// A segment of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) base: u64,
    /// Of its file; 0 until it was measured.
    pub(crate) bytes: u64,
    pub(crate) is_compressed: bool,
}

/// The files of a log.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listing {
    /// The first sequences of the segments, in order.
    pub(crate) bases: Vec<u64>,
    /// Those of them that are compressed, in order.
    pub(crate) compressed: Vec<u64>,
    /// Those of them that have an index, which may be none of theirs.
    pub(crate) indexed: Vec<u64>,
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
        let is_kept = |base: &u64| *base >= retired || is_broken(Mutant::KeepsRetired);
        for name in names {
            let oldest = oldest_in(&name);
            match (segment_base(&name), compressed_base(&name)) {
                (Some(base), _) if is_kept(&base) => listing.bases.push(base),
                (_, Some(base)) if is_kept(&base) => listing.compressed.push(base),
                (None, None) if oldest.is_none_or(|oldest| oldest == retired) => {
                    // A crash may have left the header of a segment in any of them.
                    let is_unfinished = [NEW_SEGMENT, SPARE, COMPRESSING].contains(&&*name);
                    if is_unfinished || is_new_index(&name) {
                        listing.leftovers.push(name);
                    } else if let Some(base) = index_base(&name) {
                        listing.indexed.push(base);
                    }
                }
                _ => listing.leftovers.push(name),
            }
        }
        listing.bases.sort_unstable();
        listing.compressed.sort_unstable();
        // As long as the original is there, it counts.
        let Self { bases, compressed, indexed, leftovers, .. } = &mut listing;
        compressed.retain(|base| {
            let is_original_there = bases.binary_search(base).is_ok();
            leftovers.extend(is_original_there.then(|| compressed_name(*base)));
            !is_original_there
        });
        bases.extend(&*compressed);
        bases.sort_unstable();
        indexed.sort_unstable();
        indexed.retain(|base| {
            let is_segment_there = bases.binary_search(base).is_ok();
            leftovers.extend((!is_segment_there).then(|| index_name(*base)));
            is_segment_there
        });
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

/// Calls with the name of a segment's file and whether that is compressed: the compressed one where the
/// other, which counts as long as it is there, is missing.
pub(crate) fn of_either_form<O>(
    what: &'static str,
    base: u64,
    call: impl Fn(&str, bool) -> io::Result<O>,
) -> Result<O, StoreError> {
    let (name, compressed) = (segment_name(base), compressed_name(base));
    let is_missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    match uninterrupted(|| call(&name, false)) {
        Err(missing) if is_missing(&missing) || is_broken(Mutant::TakesAnyFailureForMissing) => {
            match uninterrupted(|| call(&compressed, true)) {
                Err(error) if is_missing(&error) => Err(StoreError::io(what, &name)(missing)),
                result => result.map_err(StoreError::io(what, &compressed)),
            }
        }
        result => result.map_err(StoreError::io(what, &name)),
    }
}

/// Returns the bytes of the file of a segment.
pub(crate) fn stored_bytes<S: Storage>(storage: &S, base: u64) -> Result<u64, StoreError> {
    of_either_form("measuring", base, |name, _| storage.len(name))
}

/// Opens the segment that begins with a sequence, to read it.
pub(crate) fn open_segment<S: Storage>(
    storage: &S,
    base: u64,
) -> Result<SegmentFile<S::File>, StoreError> {
    of_either_form("opening", base, |name, is_compressed| {
        let file = storage.open(name, false)?;
        match is_compressed {
            true => CompressedFile::new(file).map(SegmentFile::Compressed),
            false => Ok(SegmentFile::Plain(file)),
        }
    })
}
