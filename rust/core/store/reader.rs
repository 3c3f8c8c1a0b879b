//! Reading a log in order, from any sequence on, while it may be written.

use super::compressed::SegmentFile;
use super::dictionary::Translation;
use super::error::StoreError;
use super::format::{
    Kind, OBJECT_HEAD, SEGMENT_HEADER, SegmentHeader, segment_name, u32_at, u64_at,
};
use super::listing::{Listing, open_segment};
use super::log::Object;
use super::recovery::{FOLLOWS, read_header};
use super::scan::{Frame, Scan};
use super::storage::Storage;
use crate::event::{EVENT_BYTES, Event};
use std::io;
use std::sync::Arc;

/// Records of one kind that follow one another.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The sequence of the first one.
    pub sequence: u64,
    /// The sequence after the last one.
    pub end: u64,
    /// The records.
    pub records: Records<'a>,
}

/// What a [`Batch`] holds.
#[derive(Debug)]
#[non_exhaustive]
pub enum Records<'a> {
    /// Events, with the numbers that their names have in this process.
    Events(&'a [Event]),
    /// Objects.
    Objects(Objects<'a>),
    /// The place where events are missing, which is a record by itself, or records that the log no
    /// longer has.
    Gap(Gap),
}

/// Events that are not in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// How many.
    pub missed: u64,
    /// Whether it is known exactly.
    pub is_exact: bool,
}

impl Batch<'_> {
    /// Returns how many records there are, those included that the log no longer has.
    pub fn len(&self) -> u64 {
        self.end - self.sequence
    }

    /// Returns false: a batch has at least one record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Objects that follow one another.
#[derive(Debug, Clone, Copy)]
pub struct Objects<'a> {
    heads: &'a [u8],
    bodies: &'a [u8],
    names: &'a Translation,
}

impl<'a> Objects<'a> {
    /// Returns the objects of a frame.
    pub(crate) fn of(payload: &'a [u8], count: usize, names: &'a Translation) -> Self {
        let (heads, bodies) = payload.split_at(count * OBJECT_HEAD);
        Self { heads, bodies, names }
    }

    /// Returns `count` of them behind the first ones.
    fn part(self, skipped: usize, count: usize) -> Self {
        let (read, heads) = self.heads.split_at(skipped * OBJECT_HEAD);
        let lengths = read.chunks_exact(OBJECT_HEAD).map(|head| u32_at(head, 16) as usize);
        let bodies = &self.bodies[lengths.sum()..];
        Self { heads: &heads[..count * OBJECT_HEAD], bodies, names: self.names }
    }

    /// Returns of each whether its names are defined.
    pub(crate) fn known(&self) -> impl Iterator<Item = bool> + use<'a> {
        let names = self.names;
        self.heads.chunks_exact(OBJECT_HEAD).map(move |head| {
            let topic = u32_at(head, 8);
            (topic == 0 || names.topic(topic).is_some()) && names.schema(u32_at(head, 12)).is_some()
        })
    }

    /// Returns them in order.
    pub fn iter(&self) -> impl Iterator<Item = Object<'a>> + use<'a> {
        let (mut bodies, names) = (self.bodies, self.names);
        self.heads.chunks_exact(OBJECT_HEAD).map(move |head| {
            let (bytes, rest) = bodies.split_at(u32_at(head, 16) as usize);
            bodies = rest;
            // An object whose schema has no name has the empty one.
            let (schema, version) = names.schema(u32_at(head, 12)).unwrap_or_default();
            Object {
                timestamp: u64_at(head, 0),
                topic: names.topic(u32_at(head, 8)),
                schema,
                version,
                bytes,
                is_replayed: u32_at(head, 20) & 1 == 1,
            }
        })
    }
}

/// Reads the records of a log in order.
pub(crate) struct LogReader<S: Storage> {
    storage: Arc<S>,
    segment: Option<Reading<S::File>>,
    /// The sequence of the next record.
    next: u64,
}

/// The segment that is read.
struct Reading<F> {
    name: String,
    base: u64,
    header: SegmentHeader,
    scan: Scan<SegmentFile<F>>,
    names: Translation,
}

impl<S: Storage> LogReader<S> {
    /// Returns a reader of the records from a sequence on.
    pub(crate) fn new(storage: Arc<S>, from: u64) -> Self {
        Self { storage, segment: None, next: from }
    }

    /// Returns the sequence of the next record.
    pub(crate) fn sequence(&self) -> u64 {
        self.next
    }

    /// Returns whether a sequence is reached sooner by reading on than by another reader.
    pub(crate) fn is_near(&self, sequence: u64) -> bool {
        /// Records that are read in about the time in which a segment is.
        const NEAR: u64 = 100_000;
        (self.next..=self.next.saturating_add(NEAR)).contains(&sequence)
    }

    /// Returns the next records, as many as stand together in the log. There are records up to
    /// `limit`, below which it stays; `None` says that it is reached.
    pub(crate) fn next_below(&mut self, limit: u64) -> Result<Option<Batch<'_>>, StoreError> {
        while self.next < limit {
            if self.segment.is_none() {
                let missed = self.begin()?;
                if missed > 0 {
                    let sequence = self.next;
                    self.next += missed;
                    let gap = Gap { missed, is_exact: true };
                    let records = Records::Gap(gap);
                    return Ok(Some(Batch { sequence, end: self.next, records }));
                }
            }
            if self.holds_next()? {
                return Ok(Some(self.take(limit)));
            }
        }
        Ok(None)
    }

    /// Opens the segment with the next record, or the first one behind it, and returns how many
    /// records are missing before that.
    fn begin(&mut self) -> Result<u64, StoreError> {
        loop {
            let Some(base) = Listing::of(&*self.storage)?.base_for(self.next) else {
                let name = segment_name(self.next);
                return Err(self.corrupt(name, 0, "a segment with the next record"));
            };
            match self.open(base) {
                Ok(()) => return Ok(base.saturating_sub(self.next)),
                Err(error) if self.has(base)? => return Err(error),
                // It was retired meanwhile.
                Err(_) => {}
            }
        }
    }

    /// Returns whether the log has the segment that begins with a sequence.
    fn has(&self, base: u64) -> Result<bool, StoreError> {
        Ok(Listing::of(&*self.storage)?.has(base))
    }

    fn open(&mut self, base: u64) -> Result<(), StoreError> {
        let file = open_segment(&*self.storage, base)?;
        let name = file.name(base);
        let (_, Some(header)) = read_header(&file, &name)? else {
            return Err(self.corrupt(name, 0, "the header of a segment"));
        };
        let scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, base);
        self.segment = Some(Reading { name, base, header, scan, names: Translation::new() });
        Ok(())
    }

    /// Reads on to a frame with the next record; false if another segment has to be opened first.
    fn holds_next(&mut self) -> Result<bool, StoreError> {
        let Some(Reading { name, base, header, scan, names }) = &mut self.segment else {
            return Ok(false);
        };
        let holds =
            |frame: &Frame<'_>| frame.header.sequence + u64::from(frame.header.count) > self.next;
        if scan.last().is_some_and(|frame| holds(&frame)) {
            return Ok(true);
        }
        let mut is_fresh = false;
        loop {
            let Some(frame) = scan.next().map_err(StoreError::io("reading", name))? else {
                // What is there may have been read ahead before it was written.
                if scan.has_seal() || is_fresh {
                    break;
                }
                is_fresh = true;
                scan.forget();
                continue;
            };
            if holds(&frame) {
                return Ok(true);
            }
            if frame.header.kind == Kind::Names
                && let Err(error) = names.define(frame.payload)
            {
                let (name, offset) = (name.clone(), scan.offset());
                // Without its names nothing behind it can be read.
                self.segment = None;
                return Err(
                    error.unwrap_or_else(|| self.corrupt(name, offset, "names with their numbers"))
                );
            }
        }
        let (name, base, offset, end) = (name.clone(), *base, scan.offset(), scan.sequence());
        if !scan.has_seal() || end == base {
            if !self.has(base)? {
                // It was retired, and its file may be another segment's by now.
                self.segment = None;
                return Ok(false);
            }
            return Err(self.corrupt(name, offset, "a frame that is whole"));
        }
        let before = scan.chain().map(|chain| (header.log, header.number, chain));
        match self.open(end) {
            Err(error) => {
                self.segment = None;
                match (Listing::of(&*self.storage)?.bases.first(), error) {
                    // It was retired meanwhile, with all before it.
                    (Some(first), _) if *first > end => Ok(false),
                    (_, StoreError::Io { source, .. })
                        if source.kind() == io::ErrorKind::NotFound =>
                    {
                        Err(StoreError::missing(end))
                    }
                    (_, error) => Err(error),
                }
            }
            Ok(()) => {
                let opened = self.segment.as_ref().map(|opened| &opened.header);
                let follows = opened.zip(before).is_none_or(|(opened, (log, number, chain))| {
                    (opened.log, opened.number, opened.chain) == (log, number + 1, chain)
                });
                if follows {
                    return Ok(false);
                }
                self.segment = None;
                Err(self.corrupt(segment_name(end), 0, FOLLOWS))
            }
        }
    }

    /// Returns the records of the frame that was read last, from the next one on.
    fn take(&mut self, limit: u64) -> Batch<'_> {
        let sequence = self.next;
        let Some(Reading { scan, names, .. }) = &mut self.segment else {
            unreachable!("it holds the next record")
        };
        let Some(Frame { header, payload }) = scan.last() else {
            unreachable!("it holds the next record")
        };
        let skipped = (sequence - header.sequence) as usize;
        let count = (u64::from(header.count) - skipped as u64).min(limit - sequence) as usize;
        self.next += count as u64;
        let end = self.next;
        let records = match header.kind {
            Kind::Events => {
                let bytes = &mut payload[skipped * EVENT_BYTES..][..count * EVENT_BYTES];
                Records::Events(native(bytes, names))
            }
            Kind::Objects => {
                let objects = Objects::of(payload, header.count as usize, names);
                Records::Objects(objects.part(skipped, count))
            }
            _ => {
                Records::Gap(Gap { missed: u64_at(payload, 0), is_exact: u64_at(payload, 8) == 1 })
            }
        };
        Batch { sequence, end, records }
    }

    fn corrupt(&self, segment: String, offset: u64, expected: &'static str) -> StoreError {
        StoreError::Corrupt { segment, offset, sequence: self.next, expected }
    }
}

/// Returns the oldest sequence that a log has; 0 if it has none.
pub(crate) fn oldest<S: Storage>(storage: &S) -> Result<u64, StoreError> {
    Ok(Listing::of(storage)?.bases.first().copied().unwrap_or(0))
}

/// Returns events with the numbers and the byte order of this process.
pub(crate) fn native<'a>(bytes: &'a mut [u8], names: &Translation) -> &'a [Event] {
    let events: &mut [Event] = bytemuck::cast_slice_mut(bytes);
    if cfg!(target_endian = "big") {
        for event in &mut *events {
            *event = Event::from_bytes(bytemuck::cast(*event));
        }
    }
    names.translate(events);
    events
}
