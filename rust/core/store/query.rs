//! Reading only the records of some times, types and symbols.

use super::compressed::SegmentFile;
use super::dictionary::Translation;
use super::error::StoreError;
use super::format::Kind;
use super::index::{Block, SegmentIndex, corrupt};
use super::listing::{Listing, open_segment};
use super::log::Object;
use super::reader::{Objects, native};
use super::scan::Scan;
use super::storage::Storage;
use crate::event::Event;
use crate::event_type::EventType;
use crate::names::Symbol;
use crate::sync::Flag;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Which records of a log are wanted: AND between kinds, OR inside one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// Their timestamps, in nanoseconds since the Unix epoch. They may be in any order in the log.
    pub times: Range<u64>,
    /// Types of events; none means all. Objects have no type, so that any keeps them out.
    pub types: Vec<EventType>,
    /// Symbols of events; none means all. Objects have no symbol, so that any keeps them out.
    pub symbols: Vec<Symbol>,
}

impl Default for Query {
    fn default() -> Self {
        Self { times: 0..u64::MAX, types: Vec::new(), symbols: Vec::new() }
    }
}

/// The query, as it is asked for each block and each event.
pub(super) struct Filter {
    times: Range<u64>,
    types: [u64; 4],
    /// Empty if all are wanted; sorted.
    symbols: Vec<Symbol>,
    wants_objects: bool,
}

impl Filter {
    pub(super) fn new(query: &Query) -> Self {
        let mut types = [if query.types.is_empty() { u64::MAX } else { 0 }; 4];
        for event_type in &query.types {
            types[usize::from(event_type.0 >> 6)] |= 1 << (event_type.0 & 63);
        }
        let mut symbols = query.symbols.clone();
        symbols.sort_unstable();
        let wants_objects = query.types.is_empty() && query.symbols.is_empty();
        Self { times: query.times.clone(), types, symbols, wants_objects }
    }

    /// Returns the bits of the wanted symbols in the blocks of a segment.
    fn symbols_in(&self, names: &Translation) -> u64 {
        // Numbers without a name have no symbol either.
        if self.symbols.is_empty() || self.symbols.contains(&Symbol::NONE) {
            return u64::MAX;
        }
        let numbers = self.symbols.iter().flat_map(|symbol| names.numbers_of(*symbol));
        numbers.fold(0, |bits, number| bits | 1 << (number & 63))
    }

    /// Returns whether there may be something in a block.
    fn may_want(&self, block: &Block, symbols: u64) -> bool {
        if block.latest < self.times.start || block.earliest >= self.times.end {
            return false;
        }
        let has_types =
            self.types.iter().zip(&block.types).any(|(wanted, there)| wanted & there != 0);
        block.has_objects && self.wants_objects || has_types && block.symbols & symbols != 0
    }

    /// Returns whether all events of a block are wanted.
    fn wants_all(&self, block: &Block) -> bool {
        let is_inside = self.times.start <= block.earliest && block.latest < self.times.end;
        is_inside && self.types == [u64::MAX; 4] && self.symbols.is_empty()
    }

    #[inline]
    pub(super) fn wants(&self, event: &Event) -> bool {
        let event_type = event.event_type.0;
        self.times.contains(&event.timestamp)
            && self.types[usize::from(event_type >> 6)] >> (event_type & 63) & 1 == 1
            && (self.symbols.is_empty() || self.symbols.binary_search(&event.symbol).is_ok())
    }
}

/// Records that a query has found, each with its sequence.
#[derive(Debug)]
#[non_exhaustive]
pub enum Found<'a> {
    /// Events, with the numbers that their names have in this process; as many sequences.
    Events(&'a [u64], &'a [Event]),
    /// Objects.
    Objects(Vec<(u64, Object<'a>)>),
}

/// The indexes of the segments of a log.
pub(crate) struct Indexes<S: Storage> {
    made: Mutex<HashMap<u64, SegmentIndex<S>>>,
    /// What was made of a finished segment is kept in a file beside it.
    are_kept: Flag,
}

impl<S: Storage> Default for Indexes<S> {
    fn default() -> Self {
        Self { made: Mutex::default(), are_kept: Flag::default() }
    }
}

impl<S: Storage> Indexes<S> {
    /// Returns those of the one who writes the log.
    pub(crate) fn kept() -> Self {
        let indexes = Self::default();
        indexes.are_kept.set();
        indexes
    }

    /// Keeps no more of them: somebody else may write the log.
    pub(crate) fn leave(&self) {
        self.are_kept.clear();
    }
}

/// What of a segment a query has to look at.
struct Part<F> {
    base: u64,
    name: String,
    scan: Scan<SegmentFile<F>>,
    names: Arc<Translation>,
    /// The last ones first.
    runs: Vec<Run>,
    /// The one that is read.
    run: Run,
}

/// Frames that follow one another.
#[derive(Debug, Clone, Copy)]
struct Run {
    offset: u64,
    sequence: u64,
    end: u64,
    /// None of its events needs to be looked at.
    is_wanted: bool,
}

/// The records of a log that a query wants.
pub(crate) struct LogQuery<S: Storage> {
    storage: Arc<S>,
    indexes: Arc<Indexes<S>>,
    filter: Filter,
    /// Bases of segments that were not looked at, the last one first.
    segments: Vec<u64>,
    /// Records below are looked at.
    limit: u64,
    part: Option<Part<S::File>>,
    sequences: Vec<u64>,
    events: Vec<Event>,
}

impl<S: Storage> LogQuery<S> {
    pub(crate) fn new(
        storage: Arc<S>,
        indexes: Arc<Indexes<S>>,
        query: &Query,
        limit: u64,
    ) -> Result<Self, StoreError> {
        let mut segments = Listing::of(&*storage)?.bases;
        segments.retain(|base| *base < limit);
        indexes.made.lock().retain(|base, _| segments.binary_search(base).is_ok());
        segments.reverse();
        let (part, sequences, events) = (None, Vec::new(), Vec::new());
        let filter = Filter::new(query);
        Ok(Self { storage, indexes, filter, segments, limit, part, sequences, events })
    }

    /// Returns the next records that are wanted, in the order of the log.
    pub(crate) fn next_found(&mut self) -> Result<Option<Found<'_>>, StoreError> {
        loop {
            match self.advance() {
                Ok(Some((sequence, Kind::Events))) if self.select_events(sequence) => {
                    return Ok(Some(self.found(sequence)));
                }
                Ok(Some((sequence, Kind::Objects))) if self.has_objects(sequence) => {
                    return Ok(Some(self.found(sequence)));
                }
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err((base, error)) => match Listing::of(&*self.storage)?.has(base) {
                    true => return Err(error),
                    // It was retired meanwhile.
                    false => self.part = None,
                },
            }
        }
    }

    /// Reads the next frame that may be wanted, and returns its sequence and its kind. An error is
    /// that of the segment that begins with a sequence.
    fn advance(&mut self) -> Result<Option<(u64, Kind)>, (u64, StoreError)> {
        loop {
            let Some(part) = &mut self.part else {
                let Some(base) = self.segments.pop() else { return Ok(None) };
                self.part = self.part(base).map_err(|error| (base, error))?;
                continue;
            };
            let sequence = part.scan.sequence();
            if sequence >= part.run.end {
                match part.runs.pop() {
                    Some(run) => {
                        part.scan.seek(run.offset, run.sequence);
                        part.run = run;
                    }
                    None => self.part = None,
                }
                continue;
            }
            let offset = part.scan.offset();
            return match part.scan.next() {
                Ok(Some(frame)) => Ok(Some((sequence, frame.header.kind))),
                Ok(None) => {
                    let name = part.name.clone();
                    let error = corrupt(name, offset, sequence, "a frame that is whole");
                    Err((part.base, error))
                }
                Err(error) => Err((part.base, StoreError::io("reading", &part.name)(error))),
            };
        }
    }

    /// Finds the runs of frames in a segment that may be wanted, and opens it if there are any.
    fn part(&self, base: u64) -> Result<Option<Part<S::File>>, StoreError> {
        let mut indexes = self.indexes.made.lock();
        let index = match indexes.entry(base) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(SegmentIndex::new(&*self.storage, base)?)
            }
        };
        let extended = index.extend(self.limit).and_then(|(end, finished)| {
            if let Some(finished) = finished.filter(|_| self.indexes.are_kept.is_set()) {
                index.lines.keep(&*self.storage, &finished);
            }
            // Each segment is followed by the next one.
            let next = self.segments.last().copied().unwrap_or(self.limit);
            match end == next || end >= self.limit {
                true => Ok(()),
                false => Err(StoreError::missing(end)),
            }
        });
        if let Err(error) = extended {
            indexes.remove(&base);
            return Err(error);
        }
        let Some(index) = indexes.get(&base) else { unreachable!("it was extended") };
        let symbols = self.filter.symbols_in(&index.names);
        let mut runs: Vec<Run> = Vec::new();
        for block in index.lines.blocks.iter().filter(|block| block.sequence < self.limit) {
            if !self.filter.may_want(block, symbols) {
                continue;
            }
            let is_wanted = self.filter.wants_all(block);
            match runs.last_mut() {
                Some(run) if (run.end, run.is_wanted) == (block.sequence, is_wanted) => {
                    run.end = block.end;
                }
                _ => {
                    let Block { offset, sequence, end, .. } = *block;
                    runs.push(Run { offset, sequence, end, is_wanted });
                }
            }
        }
        if runs.is_empty() {
            return Ok(None);
        }
        runs.reverse();
        let (name, names, salt) = (index.name().to_owned(), index.names.clone(), index.salt());
        drop(indexes);
        let scan = Scan::new(open_segment(&*self.storage, base)?, salt, u64::MAX, 0);
        let run = Run { offset: 0, sequence: 0, end: 0, is_wanted: false };
        Ok(Some(Part { base, name, scan, names, runs, run }))
    }

    /// Selects what is wanted of the events that were read last; false if nothing is.
    fn select_events(&mut self, sequence: u64) -> bool {
        let Some(part) = &mut self.part else { return false };
        let Some(frame) = part.scan.last() else { return false };
        let events = native(frame.payload, &part.names);
        let below = self.limit.saturating_sub(sequence) as usize;
        let events = &events[..below.min(events.len())];
        self.sequences.clear();
        self.events.clear();
        if part.run.is_wanted {
            // They are given out where they are.
            self.sequences.extend(sequence..sequence + events.len() as u64);
            return !events.is_empty();
        }
        for (sequence, event) in (sequence..).zip(events) {
            if self.filter.wants(event) {
                self.sequences.push(sequence);
                self.events.push(*event);
            }
        }
        !self.events.is_empty()
    }

    /// Returns whether something is wanted of the objects that were read last.
    fn has_objects(&mut self, sequence: u64) -> bool {
        self.filter.wants_objects
            && match self.found(sequence) {
                Found::Objects(objects) => !objects.is_empty(),
                Found::Events(..) => false,
            }
    }

    /// Returns what is wanted of the frame that was read last.
    fn found(&mut self, sequence: u64) -> Found<'_> {
        let Some(part) = &mut self.part else { unreachable!("something was read") };
        let Some(frame) = part.scan.last() else { unreachable!("something was read") };
        if frame.header.kind == Kind::Events {
            let events = match part.run.is_wanted {
                true => &bytemuck::cast_slice(frame.payload)[..self.sequences.len()],
                false => &*self.events,
            };
            return Found::Events(&self.sequences, events);
        }
        let objects = Objects::of(frame.payload, frame.header.count as usize, &part.names);
        let numbered = (sequence..self.limit).zip(objects.iter());
        let is_wanted = |object: &Object<'_>| self.filter.times.contains(&object.timestamp);
        Found::Objects(numbered.filter(|(_, object)| is_wanted(object)).collect())
    }
}
