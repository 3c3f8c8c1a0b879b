//! How a segment is compressed: beside the original, which goes once what was written was read back and
//! is durable.

use super::compressed::{BLOCK, CompressedFile, SegmentFile, write_blocks};
use super::error::StoreError;
use super::format::{SEGMENT_HEADER, compressed_name, segment_name};
use super::index::{Finished, Lines, corrupt};
use super::listing::COMPRESSING;
use super::mutants::{Mutant, is_broken};
use super::recovery::read_header;
use super::retire::UpkeepError;
use super::scan::Scan;
use super::storage::{ReadAt, Storage, StorageFile, read_all, uninterrupted};
use std::io;

/// What was compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compression {
    /// Segments.
    pub segments: usize,
    /// Bytes of them before.
    pub bytes_before: u64,
    /// Bytes of them now.
    pub bytes_after: u64,
}

/// Compresses a sealed segment beside it, reads that back, and returns its bytes. The file has the
/// name of one that is not finished.
pub(crate) fn compress<S: Storage>(storage: &S, base: u64) -> Result<u64, StoreError> {
    let name = segment_name(base);
    let file =
        uninterrupted(|| storage.open(&name, false)).map_err(StoreError::io("opening", &name))?;
    let (finished, lines) = check_whole(&file, &name, base)?;
    lines.keep(storage, &finished);
    let compressed = uninterrupted(|| storage.create(COMPRESSING)).and_then(|into| {
        let bytes = write_blocks(&file, &into)?;
        uninterrupted(|| into.sync_data())?;
        let back = CompressedFile::new(uninterrupted(|| storage.open(COMPRESSING, false))?)?;
        Ok((bytes, is_same(&file, &SegmentFile::Compressed(back))?))
    });
    match compressed {
        Ok((bytes, true)) => Ok(bytes),
        Ok((_, false)) => Err(StoreError::Corrupt {
            segment: COMPRESSING.to_owned(),
            offset: 0,
            sequence: base,
            expected: "the bytes that were compressed; the segment stays as it is",
        }),
        Err(error) => Err(StoreError::creating(COMPRESSING, SEGMENT_HEADER as u64)(error)),
    }
}

/// Puts what was compressed in the place of its segment.
pub(crate) fn replace<S: Storage>(storage: &S, base: u64) -> Result<(), UpkeepError> {
    let (name, original) = (compressed_name(base), segment_name(base));
    uninterrupted(|| storage.rename(COMPRESSING, &name))
        .map_err(|error| UpkeepError::Refused(StoreError::io("creating", &name)(error)))?;
    if !is_broken(Mutant::NoSyncOfCompressed) {
        uninterrupted(|| storage.sync_names()).map_err(UpkeepError::Sync)?;
    }
    uninterrupted(|| storage.remove(&original))
        .map_err(|error| UpkeepError::Left(StoreError::io("removing", &original)(error)))
}

/// Reads a segment to its seal, and makes its index on the way.
fn check_whole(file: &impl ReadAt, name: &str, base: u64) -> Result<(Finished, Lines), StoreError> {
    let (_, Some(header)) = read_header(file, name)? else {
        return Err(corrupt(name.to_owned(), 0, base, "the header of a segment"));
    };
    let mut scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, base);
    let mut lines = Lines::default();
    lines.take_all(&mut scan).map_err(StoreError::io("reading", name))?;
    let (offset, sequence) = (scan.offset(), scan.sequence());
    let finished = Finished::scanned(&header, &scan)
        .ok_or_else(|| corrupt(name.to_owned(), offset, sequence, "a frame that is whole"))?;
    Ok((finished, lines))
}

/// Returns whether two files have the same bytes.
fn is_same(one: &impl ReadAt, other: &impl ReadAt) -> io::Result<bool> {
    let (mut ours, mut theirs) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut offset = 0;
    loop {
        let filled = read_all(one, &mut ours, offset)?;
        if read_all(other, &mut theirs, offset)? != filled || ours[..filled] != theirs[..filled] {
            return Ok(false);
        }
        if filled == 0 {
            return Ok(true);
        }
        offset += filled as u64;
    }
}
