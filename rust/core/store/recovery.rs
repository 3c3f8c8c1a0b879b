//! What a log is after whatever happened to it: the rule of docs/format.md, "Recovery".
//!
//! [`Findings::of`] only reads. [`Findings::mend`] makes of a log that lost its tail one that can go on;
//! nothing of what it does can be half done: whenever it is stopped, it begins anew the next
//! time and comes to the same end.

use super::error::StoreError;
use super::format::{
    BadHeader, END, FrameHeader, Kind, SEAL, SEGMENT_HEADER, SegmentHeader, compressed_base,
    index_base, index_name, is_new_index, payload_crc, seal_payload, segment_base, segment_name,
    u32_at, u64_at,
};
use super::listing::{Listing, Segment, open_segment};
use super::mutants::{Mutant, is_broken};
use super::scan::{Scan, Tail};
use super::storage::{ReadAt, Storage, StorageFile, read_all, uninterrupted, write_all};
use std::io::IoSlice;
use std::time::Duration;

/// A segment and what its header says, if that is whole.
#[derive(Debug, Clone)]
struct Found {
    base: u64,
    /// Of the segment; 0 as long as nobody had to look at it.
    bytes: u64,
    header: Option<SegmentHeader>,
    is_compressed: bool,
}

/// The first place of a log where there is no valid frame, though its segment is not sealed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Break {
    /// The segment, by its place.
    place: usize,
    /// Where in it, in bytes.
    offset: u64,
    /// There are records before it in its segment.
    has_records: bool,
    tail: Tail,
}

/// What a log was found to be.
#[derive(Debug, Clone)]
pub(crate) struct Findings {
    segments: Vec<Found>,
    /// Records below were retired.
    retired: u64,
    /// What is none of the log any more.
    leftovers: Vec<String>,
    /// The first segment that had to be scanned, by its place.
    scanned_from: usize,
    /// Where it breaks off, unless the last segment is sealed.
    end: Option<Break>,
    /// The sequence after the last record.
    pub(crate) sequence: u64,
    /// Chain of the last whole segment.
    chain: u32,
    /// Records below were acknowledged, as far as it is written down.
    pub(crate) durable: u64,
    pub(crate) scanned_bytes: u64,
    identity: Option<u128>,
}

/// What follows what is there when a log is opened.
#[derive(Debug, Clone)]
pub(crate) struct Continuation {
    pub(crate) identity: u128,
    pub(crate) segments: Vec<Segment>,
    pub(crate) number: u64,
    pub(crate) chain: u32,
    pub(crate) sequence: u64,
    /// Records below were retired.
    pub(crate) retired: u64,
}

/// What was done when a log was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovery {
    /// The oldest sequence that the log has.
    pub oldest_sequence: u64,
    /// The sequence that the next record gets.
    pub next_sequence: u64,
    /// Segments that were found.
    pub segments: usize,
    /// Bytes that were read and checked.
    pub scanned_bytes: u64,
    /// Bytes that had been written, but neither synced nor acknowledged, and were cut off.
    pub cut_bytes: u64,
    /// Records in them, as far as their frames say.
    pub cut_records: u64,
}

impl Findings {
    /// Reads what has to be read to know how the log ends.
    pub(crate) fn of<S: Storage>(storage: &S) -> Result<Self, StoreError> {
        let Listing { bases, compressed, retired, leftovers, .. } = Listing::of(storage)?;
        let found = |base| {
            let is_compressed = compressed.binary_search(&base).is_ok();
            Found { base, bytes: 0, header: None, is_compressed }
        };
        let segments = bases.into_iter().map(found).collect();
        let mut findings = Self {
            segments,
            retired,
            leftovers,
            scanned_from: 0,
            end: None,
            sequence: 0,
            chain: 0,
            durable: durable_behind(retired),
            scanned_bytes: 0,
            identity: None,
        };
        if findings.segments.is_empty() && retired > 0 {
            return Err(StoreError::missing(retired));
        }
        findings.find_start(storage)?;
        findings.scan(storage)?;
        Ok(findings)
    }

    /// As `of`, for a log that may be written meanwhile: what is not there yet may follow what is
    /// looked at later, so that damage is only what stays where it is.
    pub(crate) fn of_live<S: Storage>(storage: &S) -> Result<Self, StoreError> {
        settled(|| Self::of(storage))
    }

    /// Finds the first segment that has to be scanned: those before it are on the disk as a whole.
    fn find_start<S: Storage>(&mut self, storage: &S) -> Result<(), StoreError> {
        let first = self.segments.first().map_or(0, |first| first.base);
        for place in (0..self.segments.len()).rev() {
            let found = &mut self.segments[place];
            let file = open_segment(storage, found.base)?;
            let name = file.name(found.base);
            let (bytes, header) = read_header(&file, &name)?;
            found.bytes = bytes;
            found.header = header;
            let Some(header) = &found.header else { continue };
            self.durable = self.durable.max(header.durable);
            self.identity = self.identity.or(Some(header.log));
            let oldest = header.oldest.max(self.retired);
            let has_oldest = oldest >= first;
            let seal = read_seal(&file, &name, bytes, header)?;
            if let Some(seal) = seal.filter(|seal| seal.is_whole || file.is_compressed()) {
                (self.sequence, self.chain) = (seal.sequence, seal.chain);
                self.durable = self.durable.max(seal.durable);
                self.scanned_from = place + 1;
                return self.check_oldest(oldest, has_oldest);
            }
            // When its first record was synced, all files before were.
            if self.durable > header.base {
                (self.sequence, self.chain) = (header.base, header.chain);
                self.scanned_from = place;
                return self.check_oldest(oldest, has_oldest);
            }
        }
        let first = self.segments.first().and_then(|first| first.header.as_ref());
        self.sequence = match first {
            // None before it can have been retired if it began before they were durable.
            Some(first) if first.durable < first.base => first.oldest.max(self.retired),
            Some(first) => first.base,
            None => self.retired,
        };
        Ok(())
    }

    /// Refuses a log whose first segments are missing though records in them were durable.
    fn check_oldest(&self, oldest: u64, is_there: bool) -> Result<(), StoreError> {
        match is_there || self.durable <= oldest {
            true => Ok(()),
            false => Err(StoreError::missing(oldest)),
        }
    }

    /// Scans segments until the first place where the log breaks off.
    fn scan<S: Storage>(&mut self, storage: &S) -> Result<(), StoreError> {
        for place in self.scanned_from..self.segments.len() {
            let Found { base, bytes, header, .. } = self.segments[place].clone();
            let file = open_segment(storage, base)?;
            let name = file.name(base);
            let before =
                place.checked_sub(1).and_then(|before| self.segments[before].header.as_ref());
            let follows = |header: &&SegmentHeader| {
                (header.base == self.sequence || is_broken(Mutant::NoBaseCheck))
                    && (place == 0 || header.chain == self.chain || is_broken(Mutant::NoChainCheck))
                    && Some(header.log) == self.identity
                    && before.is_none_or(|before| header.number == before.number + 1)
            };
            let Some(followed) = header.as_ref().filter(follows) else {
                let is_there = self.segments.iter().any(|found| found.base == self.sequence);
                let error = not_following(name, header.as_ref(), self.sequence, is_there);
                return self.break_off(storage, place, 0, false, error);
            };
            let mut scan = Scan::new(file, followed.salt, SEGMENT_HEADER as u64, base);
            scan.run_out().map_err(StoreError::io("reading", &name))?;
            let has_records = scan.sequence() > base;
            self.sequence = scan.sequence();
            // One without records is removed, and the next one follows the one before it.
            let is_kept = has_records || scan.has_seal();
            if is_kept || is_broken(Mutant::ChainOfRemovedSegment) {
                self.chain = scan.chain().unwrap_or_default();
            }
            self.durable = self.durable.max(scan.durable());
            self.scanned_bytes += scan.offset();
            if scan.is_contradicted() {
                return Err(StoreError::Corrupt {
                    segment: name,
                    offset: scan.offset(),
                    sequence: base,
                    expected: "the frames that the seal counts",
                });
            }
            if !scan.has_seal() {
                let offset = scan.offset();
                let error = StoreError::Corrupt {
                    segment: name,
                    offset,
                    sequence: self.sequence,
                    expected: "a frame that is whole, or the end of the log",
                };
                return self.break_off(storage, place, offset, has_records, error);
            }
            debug_assert!(scan.offset() <= bytes, "a seal is in its file");
        }
        Ok(())
    }

    /// Notes where the log breaks off; `error` if what is missing there was acknowledged.
    fn break_off<S: Storage>(
        &mut self,
        storage: &S,
        place: usize,
        offset: u64,
        has_records: bool,
        error: StoreError,
    ) -> Result<(), StoreError> {
        let sequence = self.sequence;
        let mut all = Tail::default();
        for (behind, found) in self.segments.iter().enumerate().skip(place) {
            let from = if behind == place { offset } else { 0 };
            let file = open_segment(storage, found.base)?;
            let name = file.name(found.base);
            let tail = Tail::of(&file, found.header.as_ref(), from, sequence)
                .map_err(StoreError::io("reading", &name))?;
            all.durable = all.durable.max(tail.durable);
            all.end = all.end.max(tail.end);
            all.bytes += tail.bytes;
            if is_broken(Mutant::LooksForWatermarkInOneSegment) {
                break;
            }
            self.durable = found.header.as_ref().map_or(0, |h| h.durable).max(self.durable);
            // It was durable as a whole before it was compressed.
            if found.is_compressed && !is_broken(Mutant::CutsCompressed) {
                self.durable = END;
            }
        }
        self.durable = self.durable.max(all.durable);
        if self.durable > sequence && !is_broken(Mutant::CutsDamage) {
            return Err(error);
        }
        self.end = Some(Break { place, offset, has_records, tail: all });
        Ok(())
    }

    /// Makes a log of it that can be written, with nothing behind its last record.
    pub(crate) fn mend<S: Storage>(
        mut self,
        storage: &S,
    ) -> Result<(Continuation, Recovery), StoreError> {
        let mut recovery = Recovery {
            segments: self.segments.len(),
            scanned_bytes: self.scanned_bytes,
            ..Recovery::default()
        };
        for name in &self.leftovers {
            let removed = uninterrupted(|| storage.remove(name));
            // An index is no part of the log, and nothing of it keeps that from being opened.
            if index_base(name).is_none() && !is_new_index(name) {
                removed.map_err(StoreError::io("removing", name))?;
            }
        }
        if let Some(end) = self.end {
            recovery.cut_bytes = end.tail.bytes;
            recovery.cut_records = end.tail.end.saturating_sub(self.sequence);
            self.cut(storage, end)?;
        }
        // What a process has written may be in the system's cache only.
        let unsure = self.segments.iter().skip(self.scanned_from.saturating_sub(1));
        for found in unsure.filter(|found| !found.is_compressed) {
            let name = segment_name(found.base);
            let file = open_to_write(storage, &name)?;
            if !is_broken(Mutant::NoSyncAfterCut) {
                uninterrupted(|| file.sync_data()).map_err(StoreError::io("syncing", &name))?;
            }
        }
        sync_names(storage)?;
        if let Some(end) = self.end
            && let Some(last) = self.segments.get_mut(end.place)
        {
            last.bytes = seal(storage, last, end.offset, self.chain, self.sequence)?;
        }
        let last = self.segments.last().and_then(|last| last.header.as_ref());
        let is_reused = is_broken(Mutant::ReusesSequence) && self.end.is_some();
        let sequence = self.sequence.saturating_sub(is_reused.into());
        recovery.oldest_sequence = self.segments.first().map_or(sequence, |first| first.base);
        recovery.next_sequence = sequence;
        let continuation = Continuation {
            identity: self.identity.unwrap_or_else(|| {
                u128::from(storage.random()) << 64 | u128::from(storage.random())
            }),
            number: last.map_or(0, |last| last.number + 1),
            chain: self.chain,
            sequence,
            retired: self.retired,
            segments: self
                .segments
                .iter()
                .map(|found| {
                    let Found { base, is_compressed, .. } = *found;
                    // What is read of a compressed one is not what its file has.
                    let bytes = if is_compressed { 0 } else { found.bytes };
                    Segment { base, bytes, is_compressed }
                })
                .collect(),
        };
        Ok((continuation, recovery))
    }

    /// Removes what is behind the end.
    fn cut<S: Storage>(&mut self, storage: &S, end: Break) -> Result<(), StoreError> {
        let mut behind = self.segments.split_off(end.place + usize::from(end.has_records));
        if is_broken(Mutant::KeepsSegmentsBehind) {
            behind.truncate(usize::from(!end.has_records));
        }
        for found in &behind {
            // One that is left fits no segment, and is removed the next time.
            _ = storage.remove(&index_name(found.base));
            let name = segment_name(found.base);
            uninterrupted(|| storage.remove(&name)).map_err(StoreError::io("removing", &name))?;
        }
        if end.has_records {
            let name = segment_name(self.segments[end.place].base);
            let file = open_to_write(storage, &name)?;
            uninterrupted(|| file.set_len(end.offset)).map_err(StoreError::io("cutting", &name))?;
        }
        Ok(())
    }
}

/// Returns below which sequence all was durable if what is before `retired` was: a segment is retired
/// once there is a durable record behind it.
pub(crate) fn durable_behind(retired: u64) -> u64 {
    if retired > 0 { retired + 1 } else { 0 }
}

/// Returns why the segment `name` is not the one that begins with `sequence`; `is_there` says whether
/// the log has a file of that name.
pub(crate) fn not_following(
    name: String,
    header: Option<&SegmentHeader>,
    sequence: u64,
    is_there: bool,
) -> StoreError {
    let expected = match header {
        _ if !is_there => return StoreError::missing(sequence),
        None => "the header of a segment",
        Some(_) => FOLLOWS,
    };
    StoreError::Corrupt { segment: name, offset: 0, sequence, expected }
}

/// What a segment has to be that is opened behind another one.
pub(crate) const FOLLOWS: &str = "the segment that follows the one before";

/// Looks at a log that may be written meanwhile until two looks agree on what is damaged.
pub(crate) fn settled<O>(look: impl Fn() -> Result<O, StoreError>) -> Result<O, StoreError> {
    let mut seen = None;
    loop {
        match look() {
            Err(StoreError::Corrupt { segment, offset, sequence, expected }) => {
                let place = (segment.clone(), offset, sequence);
                if seen.replace(place.clone()) == Some(place) {
                    return Err(StoreError::Corrupt { segment, offset, sequence, expected });
                }
            }
            // A file that was listed may have been retired.
            Err(StoreError::Io { ref source, .. })
                if source.kind() == std::io::ErrorKind::NotFound && seen.is_none() =>
            {
                seen = Some((String::new(), 0, 0));
            }
            result => return result,
        }
    }
}

/// Seals what was cut, once that is synced, and returns the bytes of the segment.
fn seal<S: Storage>(
    storage: &S,
    found: &Found,
    offset: u64,
    chain: u32,
    sequence: u64,
) -> Result<u64, StoreError> {
    let name = segment_name(found.base);
    let Some(header) = &found.header else { unreachable!("it was scanned") };
    let payload = seal_payload(chain, true, storage.now());
    let frame = FrameHeader {
        crc: 0,
        payload_bytes: payload.len() as u32,
        sequence,
        durable: sequence,
        count: 0,
        salt: header.salt,
        kind: Kind::Seal,
        payload_crc: payload_crc(&[&payload]),
    };
    let file = open_to_write(storage, &name)?;
    let header = frame.encode();
    write_all(&file, &mut [IoSlice::new(&header), IoSlice::new(&payload)], offset)
        .map_err(StoreError::io("sealing", &name))?;
    if !is_broken(Mutant::NoSyncAfterCut) {
        uninterrupted(|| file.sync_data()).map_err(StoreError::io("syncing", &name))?;
    }
    Ok(offset + SEAL as u64)
}

/// The seal of a segment.
pub(crate) struct Seal {
    pub(crate) sequence: u64,
    durable: u64,
    pub(crate) chain: u32,
    /// All before it was synced when it was written.
    is_whole: bool,
    /// When it was written: nanoseconds since the Unix epoch.
    at: u64,
}

/// Returns the seal at the end of a file, if there is one.
pub(crate) fn read_seal(
    file: &impl ReadAt,
    name: &str,
    bytes: u64,
    segment: &SegmentHeader,
) -> Result<Option<Seal>, StoreError> {
    let Some(offset) = bytes.checked_sub(SEAL as u64) else { return Ok(None) };
    let mut buffer = [0; SEAL];
    let filled = read_all(file, &mut buffer, offset).map_err(StoreError::io("reading", name))?;
    let (header, payload) = buffer.split_at(SEAL - 16);
    let seal = (filled == SEAL)
        .then(|| FrameHeader::decode(header))
        .flatten()
        .filter(|found| found.kind == Kind::Seal && found.salt == segment.salt)
        .filter(|found| found.sequence > segment.base)
        .filter(|found| found.payload_crc == payload_crc(&[payload]) && found.describes(payload));
    Ok(seal.map(|found| {
        let (sequence, durable) = (found.sequence, found.durable);
        let (chain, is_whole) = (u32_at(payload, 0), u32_at(payload, 4) == 1);
        Seal { sequence, durable, chain, is_whole, at: u64_at(payload, 8) }
    }))
}

/// Returns how long ago a segment was sealed; `None` if it is not.
pub(crate) fn age<S: Storage>(storage: &S, base: u64) -> Result<Option<Duration>, StoreError> {
    let file = open_segment(storage, base)?;
    let name = file.name(base);
    let (bytes, Some(header)) = read_header(&file, &name)? else { return Ok(None) };
    let seal = read_seal(&file, &name, bytes, &header)?;
    // A clock that went back makes nothing older.
    Ok(seal.map(|seal| Duration::from_nanos(storage.now().saturating_sub(seal.at))))
}

/// Returns the bytes of a segment and its header, if that is whole.
pub(crate) fn read_header(
    file: &impl ReadAt,
    name: &str,
) -> Result<(u64, Option<SegmentHeader>), StoreError> {
    let reading = StoreError::io("reading", name);
    let mut buffer = vec![0; SEGMENT_HEADER];
    let read =
        uninterrupted(|| file.len()).and_then(|bytes| Ok((bytes, read_all(file, &mut buffer, 0)?)));
    let (bytes, filled) = read.map_err(reading)?;
    let base = segment_base(name).or_else(|| compressed_base(name));
    match SegmentHeader::decode(&buffer[..filled]) {
        // A file has a name only after its header was written, so that a crash leaves none of
        // another segment.
        Ok(header) if base == Some(header.base) || is_broken(Mutant::NoBaseCheck) => {
            Ok((bytes, Some(header)))
        }
        Ok(header) => Err(StoreError::Corrupt {
            segment: name.to_owned(),
            offset: 0,
            sequence: base.unwrap_or(header.base),
            expected: "the header of the segment with this name",
        }),
        Err(BadHeader::Damaged) => Ok((bytes, None)),
        Err(BadHeader::Version { major, features }) => {
            Err(StoreError::Version { segment: name.to_owned(), major, features })
        }
    }
}

fn open_to_write<S: Storage>(storage: &S, name: &str) -> Result<S::File, StoreError> {
    uninterrupted(|| storage.open(name, true)).map_err(StoreError::io("opening", name))
}

fn sync_names<S: Storage>(storage: &S) -> Result<(), StoreError> {
    uninterrupted(|| storage.sync_names()).map_err(StoreError::io("syncing", "."))
}
