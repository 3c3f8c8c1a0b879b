//! What is whole of a damaged log, written anew into another one.
//!
//! Every record keeps its sequence: each one that is lost is a gap in its place. A hole is bridged only
//! if something that was acknowledged is missing there; otherwise it is the end of the log, as in
//! [`super::recovery`]. Nothing of the damaged log is changed.
//!
//! ```text
//!  Survey::of ─► walk ─► what is kept and lost
//!                  └───► Log, in another folder
//! ```

use super::dictionary::Translation;
use super::error::StoreError;
use super::format::{BadHeader, FrameHeader, Kind, SEGMENT_HEADER, SegmentHeader, u64_at};
use super::listing::{Listing, open_segment};
use super::log::{Limits, Log, Object, UNSYNCED_SEGMENTS};
use super::reader::{Gap, Objects, native};
use super::recovery::{Continuation, Findings, durable_behind};
use super::scan::{Frame, Scan, Tail, next_header};
use super::storage::{ReadAt, Storage, read_all};
use super::verify::verify;
use crate::event::{EVENT_BYTES, Event};
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

/// What is kept of a log that is damaged, and what is lost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Salvage {
    /// The sequence of the first record that there is, or of the gap in its place.
    pub oldest_sequence: u64,
    /// The sequence after the last one.
    pub next_sequence: u64,
    /// Records that are whole.
    pub kept: u64,
    /// The sequences of records that are not, in order. Those before `oldest_sequence` are in files that
    /// are missing; each of the others becomes a gap.
    pub lost: Vec<Range<u64>>,
    /// Files that are left out: they belong to another log or to a part of this one that was given up.
    pub foreign: Vec<String>,
    /// Whether something that was acknowledged is not what was written, as
    /// [`EventStore::verify`](super::EventStore::verify) would tell. No record need be lost by it.
    pub is_damaged: bool,
}

impl Salvage {
    fn lose(&mut self, lost: Range<u64>) {
        match self.lost.last_mut() {
            Some(last) if last.end == lost.start => last.end = lost.end,
            _ => self.lost.push(lost),
        }
    }
}

/// Records of a damaged log that follow one another.
enum Piece<'a> {
    Events(&'a [Event]),
    Object(Object<'a>),
    Gap(Gap),
    /// So many are not whole.
    Lost(u64),
}

impl Piece<'_> {
    fn count(&self) -> u64 {
        match self {
            Self::Events(events) => events.len() as u64,
            Self::Object(_) | Self::Gap(_) => 1,
            Self::Lost(count) => *count,
        }
    }
}

/// A file of a damaged log.
struct Source {
    name: String,
    /// The sequence in its name.
    named: u64,
    /// The sequence of its first record, as it says itself if it can.
    base: u64,
    /// That of its frames; `None` if none is whole.
    salt: Option<u32>,
    header: Option<SegmentHeader>,
    is_compressed: bool,
    /// The sequence after the last record before which all is whole.
    end: u64,
    /// The largest watermark in it.
    durable: u64,
    /// That of all frames, if it is whole and sealed.
    chain: Option<u32>,
    /// Names may be missing: what is numbered by them means nothing.
    has_holes: bool,
}

impl Source {
    fn of<S: Storage>(storage: &S, named: u64) -> Result<Self, StoreError> {
        let file = open_segment(storage, named)?;
        let (name, is_compressed) = (file.name(named), file.is_compressed());
        let read = || {
            let mut buffer = vec![0; SEGMENT_HEADER];
            let filled = read_all(&file, &mut buffer, 0)?;
            let header = match SegmentHeader::decode(&buffer[..filled]) {
                Ok(header) => Some(header),
                Err(BadHeader::Damaged) => None,
                // A bit may have flipped there.
                Err(BadHeader::Version { .. }) if !SegmentHeader::is_whole(&buffer) => None,
                Err(BadHeader::Version { major, features }) => return Ok(Err((major, features))),
            };
            let salt = header.as_ref().map(|header| header.salt);
            // The first frame tells what the header should have told; older ones may stand behind it.
            let is_first = |_, first: &FrameHeader| header.is_some() || first.sequence >= named;
            let first = next_header(&file, salt, SEGMENT_HEADER as u64, is_first)?;
            Ok(Ok((header, first.map(|(_, first)| first))))
        };
        let (header, first) =
            read().map_err(StoreError::io("reading", &name))?.map_err(|(major, features)| {
                StoreError::Version { segment: name.clone(), major, features }
            })?;
        let salt = header.as_ref().map(|header| header.salt).or(first.map(|first| first.salt));
        let base = header.as_ref().map(|header| header.base).or(first.map(|first| first.sequence));
        let base = base.unwrap_or(named);
        let (end, durable, chain, has_holes) = (base, 0, None, header.is_none());
        let mut source =
            Self { name, named, base, salt, header, is_compressed, end, durable, chain, has_holes };
        source.check(file).map_err(StoreError::io("reading", &source.name))?;
        Ok(source)
    }

    /// Reads all of it to see whether it is whole, and what it says was acknowledged.
    fn check(&mut self, file: impl ReadAt) -> io::Result<()> {
        let Some(header) = &self.header else {
            self.durable = Tail::of(&file, None, 0, 0)?.durable;
            return Ok(());
        };
        let mut scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, header.base);
        scan.run_out()?;
        (self.end, self.durable) = (scan.sequence(), header.durable.max(scan.durable()));
        self.chain = scan.chain().filter(|_| scan.has_seal());
        self.has_holes = scan.is_contradicted();
        if !scan.has_seal() {
            let tail = Tail::of(scan.file(), Some(header), scan.offset(), scan.sequence())?;
            self.durable = self.durable.max(tail.durable);
        }
        Ok(())
    }

    /// Returns whether it is whole, and its end is where a segment with this header begins.
    fn is_followed_by(&self, next: &SegmentHeader) -> bool {
        let Some(header) = &self.header else { return false };
        (next.log, next.number) == (header.log, header.number + 1)
            && (next.base, Some(next.chain)) == (self.end, self.chain)
    }

    /// Returns whether it is whole and yet not what the next one has followed.
    fn is_given_up(&self, next: &Self) -> bool {
        let (Some(header), Some(next)) = (&self.header, &next.header) else { return false };
        let is_before = header.number + 1 == next.number && header.base < next.base;
        is_before && self.chain.is_some_and(|chain| chain != next.chain)
    }
}

/// Returns the first sequence that a log had when it was written last, and below which one all was
/// acknowledged, as far as its files say.
fn acknowledged(sources: &[Source], retired: u64) -> (u64, u64) {
    let headers = sources.iter().filter_map(|source| source.header.as_ref());
    let oldest = headers.map(|header| header.oldest).fold(retired, u64::max);
    let durable = sources.iter().map(|source| source.durable);
    (oldest, durable.fold(durable_behind(retired), u64::max))
}

/// Returns whether something that was acknowledged is not what was written: whether [`verify`] would
/// tell of damage in these files, which are in the order of their names.
fn is_damaged(sources: &[Source], retired: u64) -> bool {
    let Some(first) = sources.first() else { return retired > 0 };
    let (oldest, durable) = acknowledged(sources, retired);
    // Up to where everything is whole, and whether that is the end of the segment before.
    let (mut end, mut is_whole) = (first.named, true);
    let mut before: Option<&Source> = None;
    for source in sources {
        let header = source.header.as_ref();
        if header.is_some_and(|header| header.base != source.named) {
            return true;
        }
        let follows = |header| before.is_none_or(|before| before.is_followed_by(header));
        is_whole &= header.is_some_and(follows);
        if is_whole && source.has_holes {
            return true;
        }
        if is_whole {
            end = source.end;
        }
        is_whole &= source.chain.is_some();
        // It was durable as a whole before it was compressed.
        if source.is_compressed && !is_whole {
            return true;
        }
        before = Some(source);
    }
    let is_beginning_missing = first.named > oldest && durable > oldest;
    is_beginning_missing || !is_whole && durable > end
}

/// What there is of a log.
pub(crate) struct Survey {
    identity: u128,
    /// In order.
    sources: Vec<Source>,
    foreign: Vec<String>,
    /// What was acknowledged, as far as the log says.
    durable: u64,
    /// The first sequence that the log had when it was written last.
    oldest: u64,
    /// The sequence of the first record that there is, or should be.
    first: u64,
    /// Nothing from this sequence on is a part of the log.
    limit: u64,
    is_damaged: bool,
}

impl Survey {
    /// Looks at every file of a log that nobody writes meanwhile.
    pub(crate) fn of<S: Storage>(storage: &S) -> Result<Self, StoreError> {
        let Listing { bases, retired, .. } = Listing::of(storage)?;
        let sources = bases.into_iter().map(|named| Source::of(storage, named));
        let mut sources = sources.collect::<Result<Vec<_>, _>>()?;
        let is_damaged = is_damaged(&sources, retired);
        sources.sort_by_key(|source| (source.base, source.named));
        let log_of = |source: &Source| source.header.as_ref().map(|header| header.log);
        let logs: Vec<u128> = sources.iter().filter_map(log_of).collect();
        let count = |log: &u128| logs.iter().filter(|other| *other == log).count();
        let identity = logs.iter().max_by_key(|log| count(log)).copied().unwrap_or_default();
        let mut foreign = Vec::new();
        sources.retain(|source| {
            let is_own = log_of(source).is_none_or(|log| log == identity);
            if !is_own {
                foreign.push(source.name.clone());
            }
            is_own
        });
        // The newest is right, and so is each that it confirms.
        for place in (1..sources.len()).rev() {
            let [before, next] = &sources[place - 1..=place] else { continue };
            if before.is_given_up(next) {
                foreign.push(sources.remove(place - 1).name);
            }
        }
        let (oldest, durable) = acknowledged(&sources, retired);
        // Where the end is sound, it is what recovering would make it.
        let limit = match Findings::of(storage) {
            Ok(findings) => findings.sequence,
            Err(StoreError::Corrupt { .. } | StoreError::Version { .. }) => u64::MAX,
            Err(error) => return Err(error),
        };
        let first = sources.first().map_or(retired, |first| first.base).min(limit);
        Ok(Self { identity, sources, foreign, durable, oldest, first, limit, is_damaged })
    }

    /// Returns what can be kept and what is lost.
    pub(crate) fn salvage<S: Storage>(&self, storage: &S) -> Result<Salvage, StoreError> {
        let (foreign, is_damaged) = (self.foreign.clone(), self.is_damaged);
        let mut salvage = Salvage { foreign, is_damaged, ..Salvage::default() };
        salvage.oldest_sequence = self.first;
        if self.oldest < salvage.oldest_sequence.min(self.durable) {
            salvage.lose(self.oldest..salvage.oldest_sequence);
        }
        let mut tally = |sequence, piece: Piece<'_>| {
            match piece {
                Piece::Lost(count) => salvage.lose(sequence..sequence + count),
                kept => salvage.kept += kept.count(),
            }
            Ok(())
        };
        let next_sequence = self.walk(storage, &mut tally)?;
        salvage.next_sequence = next_sequence;
        Ok(salvage)
    }

    /// Writes what can be kept into a folder without a log, and reads it back.
    pub(crate) fn write<S: Storage, T: Storage>(
        &self,
        storage: &S,
        to: Arc<T>,
        limits: Limits,
    ) -> Result<(), StoreError> {
        let first = self.first;
        let after = Continuation {
            identity: self.identity,
            retired: 0,
            segments: Vec::new(),
            number: 0,
            chain: 0,
            sequence: first,
        };
        let mut log = Log::new(to.clone(), limits, after);
        let end = self.walk(storage, &mut |sequence, piece| {
            debug_assert_eq!(log.next(), sequence, "every record keeps its sequence");
            match piece {
                Piece::Events(events) => _ = log.append_events(events)?,
                Piece::Object(object) => _ = log.append_object(&object)?,
                Piece::Gap(gap) => _ = log.append_gap(gap.missed, gap.is_exact)?,
                Piece::Lost(count) => {
                    for _ in 0..count {
                        log.append_gap(1, true)?;
                    }
                }
            }
            // Each is an open file.
            if log.unsynced_segments() >= UNSYNCED_SEGMENTS {
                log.sync()?;
            }
            Ok(())
        })?;
        log.close()?;
        let written = verify(&*to)?;
        match (written.oldest_sequence, written.next_sequence) == (first, end) || first == end {
            true => Ok(()),
            false => Err(StoreError::Corrupt {
                segment: "the new log".to_owned(),
                offset: 0,
                sequence: written.next_sequence,
                expected: "what was written into it",
            }),
        }
    }

    /// Gives every record and everything that is lost to `sink`, in order, and returns the sequence
    /// after the last one.
    fn walk<S: Storage>(&self, storage: &S, sink: Sink<'_>) -> Result<u64, StoreError> {
        let mut walk = Walk { durable: self.durable, limit: self.limit, next: self.first, sink };
        for source in &self.sources {
            if walk.bridge(source.base)?.is_break() || walk.read(storage, source)?.is_break() {
                return Ok(walk.next);
            }
        }
        _ = walk.bridge(self.durable)?;
        Ok(walk.next)
    }
}

type Sink<'a> = &'a mut dyn FnMut(u64, Piece<'_>) -> Result<(), StoreError>;

/// The way through a damaged log.
struct Walk<'a> {
    durable: u64,
    limit: u64,
    /// The sequence of the next record.
    next: u64,
    sink: Sink<'a>,
}

impl Walk<'_> {
    fn give(&mut self, piece: Piece<'_>) -> Result<(), StoreError> {
        let (sequence, count) = (self.next, piece.count());
        (self.sink)(sequence, piece)?;
        self.next += count;
        Ok(())
    }

    /// Goes on at a sequence over what is lost; breaks if nothing of that was acknowledged.
    fn bridge(&mut self, sequence: u64) -> Result<ControlFlow<()>, StoreError> {
        if self.next >= self.limit {
            return Ok(ControlFlow::Break(()));
        }
        if sequence <= self.next {
            return Ok(ControlFlow::Continue(()));
        }
        if self.durable <= self.next {
            return Ok(ControlFlow::Break(()));
        }
        self.give(Piece::Lost(sequence - self.next))?;
        Ok(ControlFlow::Continue(()))
    }

    /// Reads the frames of a file that are whole.
    fn read<S: Storage>(
        &mut self,
        storage: &S,
        source: &Source,
    ) -> Result<ControlFlow<()>, StoreError> {
        let Some(salt) = source.salt else { return Ok(ControlFlow::Continue(())) };
        let reading = |error: io::Error| StoreError::io("reading", &source.name)(error);
        let file = open_segment(storage, source.named)?;
        let mut scan = Scan::new(file, salt, SEGMENT_HEADER as u64, source.base);
        let mut names = Translation::with_holes();
        let mut has_holes = source.has_holes;
        loop {
            let (offset, sequence) = (scan.offset(), scan.sequence());
            if let Some(frame) = scan.next().map_err(reading)? {
                if self.bridge(frame.header.sequence)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                self.take(frame, &mut names, has_holes)?;
                continue;
            }
            if scan.has_seal() {
                return Ok(ControlFlow::Continue(()));
            }
            // The one at this place is not whole, or not the next one.
            let goes_on = |at, header: &FrameHeader| {
                header.sequence > sequence || header.sequence == sequence && at > offset
            };
            let found = next_header(scan.file(), Some(salt), offset, goes_on).map_err(reading)?;
            let Some((at, header)) = found else { return Ok(ControlFlow::Continue(())) };
            has_holes = true;
            scan.seek(at, header.sequence);
        }
    }

    /// Gives the records of a frame that were not given yet.
    fn take(
        &mut self,
        frame: Frame<'_>,
        names: &mut Translation,
        has_holes: bool,
    ) -> Result<(), StoreError> {
        let Frame { header, payload } = frame;
        let count = u64::from(header.count);
        // A frame may be there twice.
        let skipped = (self.next - header.sequence).min(count) as usize;
        match header.kind {
            Kind::Names => match names.define(payload) {
                // What they would have defined is not known.
                Ok(()) | Err(None) => {}
                Err(Some(error)) => return Err(error),
            },
            Kind::Events => {
                let bytes = payload.as_chunks::<EVENT_BYTES>().0;
                let is_known = |bytes| !has_holes || names.defines(&Event::from_bytes(bytes));
                let known: Vec<bool> = bytes.iter().map(|bytes| is_known(*bytes)).collect();
                let mut events = &native(payload, names)[skipped..];
                for run in known[skipped..].chunk_by(|one, other| one == other) {
                    let (first, rest) = events.split_at(run.len());
                    events = rest;
                    self.give(match run[0] {
                        true => Piece::Events(first),
                        false => Piece::Lost(run.len() as u64),
                    })?;
                }
            }
            Kind::Objects => {
                let objects = Objects::of(payload, header.count as usize, names);
                for (object, is_known) in objects.iter().zip(objects.known()).skip(skipped) {
                    self.give(match is_known || !has_holes {
                        true => Piece::Object(object),
                        false => Piece::Lost(1),
                    })?;
                }
            }
            Kind::Gap if skipped == 0 => {
                let gap = Gap { missed: u64_at(payload, 0), is_exact: u64_at(payload, 8) == 1 };
                self.give(Piece::Gap(gap))?;
            }
            _ => {}
        }
        Ok(())
    }
}
