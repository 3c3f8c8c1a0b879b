//! Reading a whole log to see whether it is what was written.

use super::error::StoreError;
use super::format::{END, SEGMENT_HEADER};
use super::index::{Finished, Lines};
use super::listing::{Listing, open_segment};
use super::mutants::{Mutant, is_broken};
use super::recovery::{durable_behind, not_following, read_header};
use super::scan::{Scan, Tail};
use super::storage::Storage;

/// What a log was found to hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verification {
    /// The oldest sequence that the log has.
    pub oldest_sequence: u64,
    /// The sequence after the last record.
    pub next_sequence: u64,
    /// Segments that were read.
    pub segments: usize,
    /// Bytes that were read and compared with their checksums.
    pub bytes: u64,
    /// Bytes behind the last record that were never acknowledged; opening the log for writing cuts
    /// them off.
    pub torn_bytes: u64,
    /// Segments with an index that is what it should be.
    pub indexes: usize,
    /// Segments with one that is not. No index is used that does not fit, and each is made again when
    /// it is needed.
    pub wrong_indexes: usize,
}

/// Reads and checks everything.
pub(crate) fn verify<S: Storage>(storage: &S) -> Result<Verification, StoreError> {
    let Listing { bases, indexed, retired, .. } = Listing::of(storage)?;
    if bases.is_empty() && retired > 0 {
        return Err(StoreError::missing(retired));
    }
    let mut found = Verification {
        oldest_sequence: bases.first().copied().unwrap_or_default(),
        next_sequence: bases.first().copied().unwrap_or_default(),
        ..Verification::default()
    };
    // Of the segment before: log, number and chain.
    let mut before: Option<(u128, u64, u32)> = None;
    // What is acknowledged as far as the log says, and where it first is not what it should be.
    let (mut durable, mut broken): (u64, Option<StoreError>) = (durable_behind(retired), None);
    let mut oldest = retired;
    for &base in &bases {
        let file = open_segment(storage, base)?;
        let (name, is_compressed) = (file.name(base), file.is_compressed());
        let (_, header) = read_header(&file, &name)?;
        durable = durable.max(header.as_ref().map_or(0, |header| header.durable));
        oldest = oldest.max(header.as_ref().map_or(0, |header| header.oldest));
        let follows = header.as_ref().filter(|header| {
            (base == found.next_sequence || is_broken(Mutant::NoBaseCheck))
                && before.is_none_or(|(log, number, chain)| {
                    (header.log, header.number) == (log, number + 1)
                        && (header.chain == chain || is_broken(Mutant::NoChainCheck))
                })
        });
        let reading = StoreError::io("reading", &name);
        let corrupt = |offset, sequence, expected| StoreError::Corrupt {
            segment: name.clone(),
            offset,
            sequence,
            expected,
        };
        let Some(header) = follows.filter(|_| broken.is_none()) else {
            // Only whether it says that something was acknowledged is of interest.
            let tail = Tail::of(&file, header.as_ref(), 0, found.next_sequence).map_err(reading)?;
            // It was durable as a whole before it was compressed.
            durable = if is_compressed { END } else { durable.max(tail.durable) };
            found.torn_bytes += tail.bytes;
            let sequence = found.next_sequence;
            let is_there = bases.binary_search(&sequence).is_ok();
            broken = broken.or(Some(not_following(name, header.as_ref(), sequence, is_there)));
            continue;
        };
        let mut scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, base);
        let mut lines = indexed.binary_search(&base).is_ok().then(Lines::default);
        let all = match &mut lines {
            Some(lines) => lines.take_all(&mut scan),
            None => scan.run_out(),
        };
        let tail = all.and_then(|()| match scan.has_seal() {
            true => Ok(None),
            false => Tail::of(scan.file(), Some(header), scan.offset(), scan.sequence()).map(Some),
        });
        let tail = tail.map_err(reading)?;
        if scan.is_contradicted() {
            return Err(corrupt(scan.offset(), base, "the frames that the seal counts"));
        }
        if let Some(lines) = lines {
            let of = Finished::scanned(header, &scan);
            match of.is_some_and(|of| lines.are_kept(storage, &of)) {
                true => found.indexes += 1,
                false => found.wrong_indexes += 1,
            }
        }
        durable = durable.max(scan.durable());
        found.segments += 1;
        found.bytes += scan.offset();
        found.next_sequence = scan.sequence();
        before = Some((header.log, header.number, scan.chain().unwrap_or_default()));
        if let Some(tail) = tail {
            durable = if is_compressed { END } else { durable.max(tail.durable) };
            found.torn_bytes += tail.bytes;
            let expected = "a frame that is whole, or the end of the log";
            broken = Some(corrupt(scan.offset(), scan.sequence(), expected));
        }
    }
    if found.oldest_sequence > oldest && durable > oldest {
        return Err(StoreError::missing(oldest));
    }
    match broken {
        Some(error) if durable > found.next_sequence => Err(error),
        _ => Ok(found),
    }
}
