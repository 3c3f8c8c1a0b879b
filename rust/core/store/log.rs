//! The writer of a log: it decides what goes into which file when, and what is durable. One thread
//! at a time uses it, and the same calls with the same storage write the same bytes.
//!
//! ```text
//!  append ─► pending ─► frames ─► the current segment ─► begin_sync ─► SyncJob::run ─► end_sync
//!            (memory)   (memory)  (the system's cache)   (what is to be synced)       (durable)
//! ```
//!
//! `run` needs no exclusion, so that others append while the disk is waited for.

use super::dictionary::{Defined, LogNames};
use super::error::StoreError;
use super::format::{
    ENDING, FRAME_HEADER, FrameHeader, Kind, MAX_PAYLOAD, OBJECT_HEAD, SEGMENT_HEADER,
    SegmentHeader, chained, padded, padding, payload_crc, seal_payload, segment_name, u32_at,
};
use super::listing::{NEW_SEGMENT, SPARE, Segment, stored_bytes};
use super::mutants::{Mutant, is_broken};
use super::recovery::Continuation;
use super::retire::{RetireJob, UpkeepError};
use super::storage::{ReadAt, Reserved, Storage, StorageFile, uninterrupted, write_all};
use crate::event::{EVENT_BYTES, Event};
use crate::topic::MAX_TOPIC_BYTES;
use smallvec::SmallVec;
use std::io::{self, IoSlice};
use std::sync::Arc;

/// Events of a frame: what one checksum covers, and what a reader skips by its index.
pub(crate) const FRAME_EVENTS: usize = 2048;
/// Fewer events than these wait in memory for others to share a frame with.
const DIRECT_EVENTS: usize = 256;
/// Frames are written in pieces that end at multiples of so many bytes, as long as nobody waits for them:
/// the system takes such pieces in less than half of the time. For larger ones it has to look for
/// memory, which takes longer again.
const PIECE: u64 = if cfg!(test) { 1 << 10 } else { 64 << 10 };
/// Where syncs follow one another, so many bytes are written ahead of them: blocks that were written
/// before are synced in half of the time of those that are only reserved.
const AHEAD: u64 = if cfg!(test) { 1 << 10 } else { 128 << 10 };
/// Bytes of objects that share a frame.
const FRAME_BYTES: usize = FRAME_EVENTS * EVENT_BYTES;
/// Finished segments that may stay unsynced where nobody waits for them: each is an open file.
pub(crate) const UNSYNCED_SEGMENTS: usize = 4;
/// The most bytes of an object.
pub(crate) const MAX_OBJECT: usize = MAX_PAYLOAD - OBJECT_HEAD;

/// An object to be stored: bytes that a schema describes.
#[derive(Debug, Clone, Copy)]
pub struct Object<'a> {
    /// When it happened: nanoseconds since the Unix epoch, UTC. 0 is unknown.
    pub timestamp: u64,
    /// The topic it was published to.
    pub topic: Option<&'a str>,
    /// What the bytes are.
    pub schema: &'a str,
    /// Which version of that.
    pub version: u32,
    /// At most 1,048,552 of them.
    pub bytes: &'a [u8],
    /// It comes from a replay.
    pub is_replayed: bool,
}

/// How large files and the log may become.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) segment_bytes: u64,
    pub(crate) max_bytes: Option<u64>,
}

/// The segment that is written.
struct Current<F> {
    file: Arc<F>,
    base: u64,
    salt: u32,
    /// Bytes for which there is room, those whose blocks were written at some time, and bytes so far, with
    /// those of frames in memory.
    room: u64,
    filled: u64,
    position: u64,
    chain: u32,
    defined: Defined,
    /// Bytes of which a job has taken care, and those that are on the disk.
    taken: u64,
    synced: u64,
}

/// A file that becomes a segment.
struct NewFile<F> {
    file: F,
    name: &'static str,
    room: u64,
    filled: u64,
}

/// The most bytes of a schema's name.
pub(crate) const MAX_SCHEMA_BYTES: usize = 1024;

/// Records that wait in memory: of one kind.
#[derive(Default)]
struct Pending {
    events: Vec<Event>,
    heads: Vec<u8>,
    bodies: Vec<u8>,
}

impl<F> Current<F> {
    /// Returns whether there is room for so many bytes, and for what ends a segment.
    #[inline]
    fn has_room(&self, bytes: usize) -> bool {
        self.position + (bytes + ENDING) as u64 <= self.room
    }
}

impl Pending {
    /// Returns the bytes of its frame.
    fn bytes(&self) -> usize {
        let bytes = size_of_val(&*self.events) + self.heads.len() + self.bodies.len();
        FRAME_HEADER + padded(bytes)
    }

    fn count(&self) -> usize {
        self.events.len() + self.heads.len() / OBJECT_HEAD
    }
}

pub(crate) struct Log<S: Storage> {
    storage: Arc<S>,
    limits: Limits,
    identity: u128,
    segments: Vec<Segment>,
    /// Number and chain of the next segment.
    number: u64,
    chain: u32,
    current: Option<Current<S::File>>,
    names: LogNames,
    pending: Pending,
    /// Frames that are not in the file of the current segment yet, which they end.
    frames: Vec<u8>,
    /// Records below are in frames.
    framed: u64,
    /// Records below are in files.
    written: u64,
    /// Records below stay whatever happens.
    durable: u64,
    /// The watermark that was written last.
    marked: u64,
    /// Segments before the current one that were not synced since they were written.
    unsynced: Vec<Arc<S::File>>,
    /// A file was created since the folder was synced.
    has_new_names: bool,
    /// Records below were retired.
    retired: u64,
    /// There is a file that can be a segment again, so many bytes of which were written.
    spare: Option<u64>,
    poison: Option<String>,
    is_closed: bool,
    /// Events for which gaps stand that were appended.
    missed: u64,
}

/// What has to be synced so that all records below `upto` are durable.
pub(crate) struct SyncJob<S: Storage> {
    storage: Arc<S>,
    files: SmallVec<[Arc<S::File>; 2]>,
    has_new_names: bool,
    older: usize,
    /// Base and bytes of the current segment.
    taken: (u64, u64),
    upto: u64,
}

impl<S: Storage> SyncJob<S> {
    /// Waits for the disk.
    pub(crate) fn run(&self) -> io::Result<()> {
        let skipped = match is_broken(Mutant::SyncOnlyNewest) {
            true => self.files.len().saturating_sub(1),
            false => 0,
        };
        for file in self.files.iter().skip(skipped) {
            let tries = if is_broken(Mutant::RetriesSync) { 2 } else { 1 };
            let sync = || uninterrupted(|| file.sync_data());
            (1..tries).fold(sync(), |result, _| result.or_else(|_| sync()))?;
        }
        if self.has_new_names && !is_broken(Mutant::NoFolderSync) {
            uninterrupted(|| self.storage.sync_names())?;
        }
        Ok(())
    }
}

impl<S: Storage> Log<S> {
    pub(crate) fn new(storage: Arc<S>, limits: Limits, after: Continuation) -> Self {
        let Continuation { identity, segments, number, chain, sequence, retired } = after;
        let (framed, written, durable, marked) = (sequence, sequence, sequence, sequence);
        let (current, names, pending) = (None, LogNames::default(), Pending::default());
        let (unsynced, has_new_names, poison, is_closed) = (Vec::new(), false, None, false);
        Self {
            storage,
            limits,
            identity,
            segments,
            number,
            chain,
            current,
            names,
            pending,
            frames: Vec::new(),
            framed,
            written,
            durable,
            marked,
            unsynced,
            has_new_names,
            retired,
            spare: None,
            poison,
            is_closed,
            missed: 0,
        }
    }

    pub(crate) fn storage(&self) -> &Arc<S> {
        &self.storage
    }

    /// Returns the segments, the current one last.
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Returns the oldest sequence that it has, or that of the next record.
    pub(crate) fn oldest(&self) -> u64 {
        self.segments.first().map_or_else(|| self.next(), |first| first.base)
    }

    /// Returns the sequence of the next record.
    pub(crate) fn next(&self) -> u64 {
        self.framed + self.pending.count() as u64
    }

    /// Returns below which sequence all records are in files.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Returns below which sequence all records are durable.
    pub(crate) fn durable(&self) -> u64 {
        self.durable
    }

    /// Allows the log more bytes.
    #[cfg(test)]
    pub(crate) fn raise_max_bytes(&mut self, bytes: u64) {
        self.limits.max_bytes = Some(bytes);
    }

    /// Measures the files that were there when it was opened, which nobody had to ask for then.
    pub(crate) fn measure(&mut self) -> Result<(), StoreError> {
        for segment in self.segments.iter_mut().filter(|segment| segment.bytes == 0) {
            segment.bytes = stored_bytes(&*self.storage, segment.base)?;
        }
        Ok(())
    }

    /// Returns the bytes of all segments that were measured.
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Appends events and returns the sequence of the first. What is taken has room.
    pub(crate) fn append_events(&mut self, events: &[Event]) -> Result<u64, StoreError> {
        self.check()?;
        let first = self.next();
        if events.is_empty() {
            return Ok(first);
        }
        let is_direct = events.len() >= DIRECT_EVENTS;
        let waiting = self.pending.events.len() + events.len();
        if is_direct || !self.pending.heads.is_empty() || waiting > FRAME_EVENTS {
            self.frame()?;
        }
        let frames = events.len().div_ceil(FRAME_EVENTS);
        match self.make_room_for(frames * FRAME_HEADER + size_of_val(events)) {
            Err(StoreError::Full { .. }) if is_broken(Mutant::FullTakes) => {
                self.framed += events.len() as u64;
                return Ok(first);
            }
            result => result?,
        }
        match is_direct {
            true => self.add_events(events)?,
            false => self.pending.events.extend_from_slice(events),
        }
        Ok(first)
    }

    /// Appends an object and returns its sequence.
    pub(crate) fn append_object(&mut self, object: &Object<'_>) -> Result<u64, StoreError> {
        self.check()?;
        let bytes = object.bytes.len();
        if bytes > MAX_OBJECT {
            return Err(StoreError::TooLarge { bytes, limit: MAX_OBJECT });
        }
        for (name, limit) in
            [(object.topic.unwrap_or_default(), MAX_TOPIC_BYTES), (object.schema, MAX_SCHEMA_BYTES)]
        {
            if name.len() > limit {
                return Err(StoreError::TooLarge { bytes: name.len(), limit });
            }
        }
        let so_far = self.pending.heads.len() + self.pending.bodies.len();
        if !self.pending.events.is_empty() || so_far + OBJECT_HEAD + bytes > FRAME_BYTES {
            self.frame()?;
        }
        // What is taken has room, and so have names that it may bring.
        let names = 2 * FRAME_HEADER + MAX_TOPIC_BYTES + MAX_SCHEMA_BYTES;
        self.make_room_for(FRAME_HEADER + padded(OBJECT_HEAD + bytes) + names)?;
        let sequence = self.next();
        let topic = object.topic.map_or(0, |topic| self.names.topics.number(topic.as_bytes()));
        let schema = self.names.schema(object.schema, object.version);
        let Pending { heads, bodies, .. } = &mut self.pending;
        heads.extend(object.timestamp.to_le_bytes());
        for number in [topic, schema, bytes as u32, u32::from(object.is_replayed)] {
            heads.extend(number.to_le_bytes());
        }
        bodies.extend(object.bytes);
        Ok(sequence)
    }

    /// Notes that events were lost before this place, which is a record by itself, and returns its
    /// sequence.
    pub(crate) fn append_gap(&mut self, missed: u64, is_exact: bool) -> Result<u64, StoreError> {
        self.frame()?;
        self.make_room(FRAME_HEADER + 16)?;
        let sequence = self.framed;
        let payload = [missed.to_le_bytes(), u64::from(is_exact).to_le_bytes()].concat();
        self.add_frame(Kind::Gap, 1, &[&payload])?;
        self.missed = self.missed.saturating_add(missed);
        Ok(sequence)
    }

    /// Returns for how many events gaps stand that were appended.
    pub(crate) fn missed(&self) -> u64 {
        self.missed
    }

    /// Writes into a file what waits in memory.
    pub(crate) fn flush(&mut self) -> Result<(), StoreError> {
        let framed = self.frame();
        self.check()?;
        self.write_up_to(u64::MAX)?;
        framed
    }

    /// Makes frames of the records that wait.
    fn frame(&mut self) -> Result<(), StoreError> {
        self.check()?;
        let count = self.pending.count();
        if count == 0 {
            return Ok(());
        }
        match self.make_room(self.pending.bytes()) {
            // It has room: only names that have come meanwhile have none.
            Err(StoreError::Full { .. }) if self.current.is_some() => self.define()?,
            result => result?,
        }
        let Pending { mut events, mut heads, mut bodies } = std::mem::take(&mut self.pending);
        match events.is_empty() {
            false => self.add_events(&events)?,
            true => self.add_frame(Kind::Objects, count as u32, &[&heads, &bodies])?,
        }
        events.clear();
        heads.clear();
        bodies.clear();
        self.pending = Pending { events, heads, bodies };
        Ok(())
    }

    /// Makes frames of events for which there is room.
    fn add_events(&mut self, events: &[Event]) -> Result<(), StoreError> {
        for events in events.chunks(FRAME_EVENTS) {
            self.add_frame(Kind::Events, events.len() as u32, &[&little_endian(events)])?;
        }
        Ok(())
    }

    /// Makes a frame of records that are not counted yet, or of none, for which there is room.
    fn add_frame(&mut self, kind: Kind, count: u32, parts: &[&[u8]]) -> Result<(), StoreError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let header = self.header(kind, self.framed, count, parts);
        self.frames.extend_from_slice(&header);
        parts.iter().for_each(|part| self.frames.extend_from_slice(part));
        self.frames.extend_from_slice(padding(bytes));
        self.framed += u64::from(count);
        let Some(current) = &mut self.current else { unreachable!("room was made") };
        let before = current.position / PIECE;
        current.position += (FRAME_HEADER + padded(bytes)) as u64;
        let end = current.position;
        if let Some(segment) = self.segments.last_mut() {
            segment.bytes = end;
        }
        match end / PIECE > before {
            true => self.write_up_to(end / PIECE * PIECE),
            false => Ok(()),
        }
    }

    /// Returns the header of a frame, and adds it to the chain of the current segment.
    fn header(
        &mut self,
        kind: Kind,
        sequence: u64,
        count: u32,
        parts: &[&[u8]],
    ) -> [u8; FRAME_HEADER] {
        let durable = match () {
            () if is_broken(Mutant::WatermarkTooHigh) => self.durable + 1,
            () if is_broken(Mutant::WatermarkIsWritten) => self.written,
            () => self.durable,
        };
        let Some(current) = &mut self.current else { unreachable!("room was made") };
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let header = FrameHeader {
            crc: 0,
            payload_bytes: bytes as u32,
            sequence,
            durable,
            count,
            salt: current.salt,
            kind,
            payload_crc: payload_crc(parts),
        };
        let header = header.encode();
        if kind != Kind::Seal {
            current.chain = chained(current.chain, u32_at(&header, 0));
        }
        self.marked = durable;
        header
    }

    /// Writes frames into the current segment, up to a place in it or all of them. A failure poisons the
    /// log.
    fn write_up_to(&mut self, end: u64) -> Result<(), StoreError> {
        let Some(current) = &self.current else { return Ok(()) };
        let from = current.position - self.frames.len() as u64;
        let bytes = (end.min(current.position) - from) as usize;
        let frames = &self.frames[..bytes];
        let result = write_all(&*current.file, &mut [IoSlice::new(frames)], from);
        if !is_broken(Mutant::ForgetsFailedWrite) {
            self.poisoning("writing to", result)?;
        }
        self.frames.drain(..bytes);
        if self.frames.is_empty() {
            self.written = self.framed;
        }
        Ok(())
    }

    /// Sees to room for a record beside those that wait in memory.
    #[inline]
    fn make_room_for(&mut self, bytes: usize) -> Result<(), StoreError> {
        if self.pending.count() == 0 {
            return self.make_room(bytes);
        }
        let waiting = self.pending.bytes();
        if !self.current.as_ref().is_some_and(|current| current.has_room(waiting + bytes)) {
            // It goes where it has room before another segment begins.
            self.frame()?;
        }
        self.make_room(self.pending.bytes() + bytes)
    }

    /// Sees to a current segment with room for so many bytes, in which all names are defined.
    #[inline]
    fn make_room(&mut self, bytes: usize) -> Result<(), StoreError> {
        let now = Defined::now(&self.names);
        match &self.current {
            Some(current) if current.defined == now && current.has_room(bytes) => Ok(()),
            _ => self.make_room_and_define(bytes, &now),
        }
    }

    #[cold]
    fn make_room_and_define(&mut self, bytes: usize, now: &Defined) -> Result<(), StoreError> {
        let has_room = self.current.as_ref().is_some_and(|current| {
            // One without records is the newest that there can be: it grows.
            current.base == self.framed
                || current.has_room(bytes + current.defined.bytes_until(now, &self.names))
        });
        if !has_room {
            self.rotate(bytes + Defined::default().bytes_until(now, &self.names))?;
        }
        self.define()
    }

    /// Defines all names in the current segment that are not.
    fn define(&mut self) -> Result<(), StoreError> {
        let now = Defined::now(&self.names);
        let Some(current) = &mut self.current else { unreachable!("room was made") };
        let defined = std::mem::replace(&mut current.defined, now);
        for payload in defined.payloads_until(&now, &self.names) {
            self.add_frame(Kind::Names, 0, &[&payload])?;
        }
        Ok(())
    }

    /// Begins a segment with room for so many bytes, after it has sealed the one before.
    #[cold]
    fn rotate(&mut self, bytes: usize) -> Result<(), StoreError> {
        // What is too large for any segment makes one longer.
        let wanted = self.limits.segment_bytes.max((SEGMENT_HEADER + bytes + ENDING) as u64);
        if let Some(max) = self.limits.max_bytes {
            self.measure()?;
            if self.bytes() + wanted > max {
                let why = format!("it has {} of at most {max} bytes", self.bytes());
                return Err(StoreError::Full { wanted, why });
            }
        }
        let salt = self.storage.random() as u32 | 1;
        // Nothing has happened to the log until the file gets its name.
        let NewFile { file, name: file_name, room, filled } = self.new_file(wanted)?;
        self.seal_current()?;
        let header = SegmentHeader {
            log: self.identity,
            number: self.number,
            base: self.framed,
            durable: self.durable,
            oldest: self.segments.first().map_or(self.framed, |segment| segment.base),
            created: self.storage.now(),
            salt,
            chain: self.chain,
            is_reused: file_name == SPARE,
        };
        let result = write_all(&file, &mut [IoSlice::new(&*header.encode())], 0);
        self.poisoning("writing to", result)?;
        let name = segment_name(self.framed);
        let result = uninterrupted(|| self.storage.rename(file_name, &name));
        self.poisoning("renaming to", result)?;
        self.has_new_names = true;
        self.marked = self.durable;
        self.number += 1;
        let position = SEGMENT_HEADER as u64;
        self.segments.push(Segment { base: self.framed, bytes: position, is_compressed: false });
        self.current = Some(Current {
            file: Arc::new(file),
            base: self.framed,
            room,
            filled,
            salt,
            position,
            chain: 0,
            defined: Defined::default(),
            taken: 0,
            synced: 0,
        });
        Ok(())
    }

    /// Returns a file with room for so many bytes.
    fn new_file(&mut self, bytes: u64) -> Result<NewFile<S::File>, StoreError> {
        let (name, filled, opened) = match self.spare.take() {
            Some(written) => (SPARE, written, uninterrupted(|| self.storage.open(SPARE, true))),
            None => (NEW_SEGMENT, 0, uninterrupted(|| self.storage.create(NEW_SEGMENT))),
        };
        let made = opened.and_then(|file| {
            let reserved = uninterrupted(|| file.allocate(bytes))?;
            // Zeros would be written for nothing, and may take the room of what follows.
            let filled = if reserved == Reserved::InPlace { filled } else { u64::MAX };
            let room = uninterrupted(|| file.len())?;
            Ok(NewFile { file, name, room, filled })
        });
        made.map_err(|error| {
            // It is removed at the latest when the log is opened the next time.
            _ = self.storage.remove(name);
            StoreError::creating(name, bytes)(error)
        })
    }

    /// Ends the current segment; nothing more is written to it.
    fn seal_current(&mut self) -> Result<(), StoreError> {
        // One without records is no part of the log yet.
        let Some(current) = self.current.as_ref().filter(|current| current.base < self.framed)
        else {
            return Ok(());
        };
        let chain = current.chain;
        let is_whole = current.synced == current.position || is_broken(Mutant::SealTrustsUnsynced);
        let payload = seal_payload(chain, is_whole, self.storage.now());
        self.add_frame(Kind::Seal, 0, &[&payload])?;
        self.write_up_to(u64::MAX)?;
        let Some(current) = self.current.take() else { unreachable!("it was there") };
        let result = uninterrupted(|| current.file.set_len(current.position));
        self.chain = chain;
        self.unsynced.push(current.file);
        self.poisoning("cutting", result)
    }

    /// Writes what waits in memory and returns what has to be synced; `None` if nothing has. Only
    /// one job may be on its way at a time.
    pub(crate) fn begin_sync(&mut self) -> Result<Option<SyncJob<S>>, StoreError> {
        // What is in files is made durable even where the rest has no room.
        let flushed = self.flush();
        self.check()?;
        let mut files: SmallVec<[_; 2]> = self.unsynced.iter().cloned().collect();
        let mut taken = (0, 0);
        self.fill_ahead()?;
        if let Some(current) = &mut self.current
            && current.taken < current.position
        {
            current.taken = current.position;
            taken = (current.base, current.position);
            files.push(current.file.clone());
        }
        let has_new_names = std::mem::take(&mut self.has_new_names);
        if files.is_empty() && !has_new_names {
            return flushed.map(|()| None);
        }
        let (storage, older, upto) = (self.storage.clone(), self.unsynced.len(), self.written);
        if is_broken(Mutant::AckBeforeSync) {
            self.durable = upto;
        }
        Ok(Some(SyncJob { storage, files, has_new_names, older, taken, upto }))
    }

    /// Writes zeros behind what is to be synced if that has reached the end of what was ever written.
    fn fill_ahead(&mut self) -> Result<(), StoreError> {
        // Whoever syncs a segment twice will do so again.
        let synced_before = |current: &&mut Current<_>| current.taken > 0;
        let Some(current) = self.current.as_mut().filter(synced_before) else { return Ok(()) };
        let (from, end) = (current.position, current.room.min(current.position + AHEAD));
        if from <= current.filled || from >= end {
            return Ok(());
        }
        static ZEROS: [u8; AHEAD as usize] = [0; AHEAD as usize];
        let zeros = &ZEROS[..(end - from) as usize];
        current.filled = end;
        let result = write_all(&*current.file, &mut [IoSlice::new(zeros)], from);
        self.poisoning("writing to", result)
    }

    /// Notes how a job ended.
    pub(crate) fn end_sync(
        &mut self,
        job: SyncJob<S>,
        result: io::Result<()>,
    ) -> Result<(), StoreError> {
        self.poisoning("syncing", result)?;
        self.unsynced.drain(..job.older);
        self.durable = self.durable.max(job.upto);
        if let Some(current) = self.current.as_mut().filter(|c| c.base == job.taken.0) {
            current.synced = current.synced.max(job.taken.1);
        }
        Ok(())
    }

    /// Makes all records so far durable.
    pub(crate) fn sync(&mut self) -> Result<(), StoreError> {
        while let Some(job) = self.begin_sync()? {
            let result = job.run();
            self.end_sync(job, result)?;
        }
        Ok(())
    }

    /// Writes down what is durable, if it is not written yet, so that damage to it is known for what
    /// it is once that is synced too. Returns whether there was something to write.
    pub(crate) fn mark(&mut self) -> Result<bool, StoreError> {
        self.check()?;
        let is_needed =
            self.marked < self.durable && self.pending.count() == 0 && !is_broken(Mutant::NoMarker);
        match &self.current {
            Some(_) if is_needed => {
                self.add_frame(Kind::Marker, 0, &[])?;
                // Readers in other processes look for it.
                self.write_up_to(u64::MAX).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    /// Makes all records durable and finishes the current segment.
    pub(crate) fn seal(&mut self) -> Result<(), StoreError> {
        self.sync()?;
        self.seal_current()?;
        self.sync()
    }

    /// As `seal`, for good: nothing is written afterwards, even if this fails.
    pub(crate) fn close(&mut self) -> Result<(), StoreError> {
        let sealed = self.seal();
        self.is_closed = true;
        sealed
    }

    /// Returns what has to be done so that no records below a sequence are kept, as far as whole
    /// segments go; `None` if nothing has. A segment stays until a record behind it is durable. Only
    /// one job may be on its way at a time.
    pub(crate) fn begin_retire(&mut self, upto: u64) -> Result<Option<RetireJob<S>>, StoreError> {
        self.check()?;
        let is_retired = |pair: &&[Segment]| pair[1].base <= upto && pair[1].base < self.durable;
        let count = self.segments.windows(2).take_while(is_retired).count();
        if count == 0 {
            return Ok(None);
        }
        self.measure()?;
        let (retired, storage) = (self.segments[..count].to_vec(), self.storage.clone());
        let limit = self.limits.max_bytes.unwrap_or(u64::MAX);
        let kept: u64 = self.segments[count..].iter().map(|segment| segment.bytes).sum();
        let bytes = self.limits.segment_bytes;
        let wants_spare = self.spare.is_none() && kept + bytes <= limit;
        // The one of which the most was written, of those that are not too long.
        let is_good = |segment: &&Segment| !segment.is_compressed && segment.bytes <= bytes;
        let plain = retired.iter().filter(|segment| wants_spare && is_good(segment));
        let spare = plain.max_by_key(|segment| segment.bytes).map(|segment| (*segment, bytes));
        let oldest = self.segments[count].base;
        Ok(Some(RetireJob { storage, retired, spare, before: self.retired, oldest }))
    }

    /// Notes how a job ended.
    pub(crate) fn end_retire(
        &mut self,
        job: &RetireJob<S>,
        result: Result<Option<u64>, UpkeepError>,
    ) -> Result<(), StoreError> {
        let spare = match result {
            Ok(spare) => spare,
            Err(UpkeepError::Refused(error)) => return Err(error),
            Err(UpkeepError::Sync(error)) => return self.poisoning("syncing", Err(error)),
            Err(UpkeepError::Left(error)) => {
                self.forget(job);
                return Err(error);
            }
        };
        self.forget(job);
        self.spare = self.spare.or(spare);
        Ok(())
    }

    /// Returns the segments to which nothing is added any more, and which are durable.
    pub(crate) fn finished(&self) -> Vec<Segment> {
        let written = self.current.as_ref().map(|current| current.base);
        let ends = self.segments.iter().skip(1).map(|next| next.base).chain([self.written]);
        let is_finished = |(segment, end): &(&Segment, u64)| {
            *end <= self.durable && Some(segment.base) != written
        };
        self.segments.iter().zip(ends).filter(is_finished).map(|(segment, _)| *segment).collect()
    }

    /// Notes how it ended to put a compressed segment, of so many bytes, in the place of what it was
    /// made from.
    pub(crate) fn end_replace(
        &mut self,
        base: u64,
        bytes: u64,
        result: Result<(), UpkeepError>,
    ) -> Result<(), StoreError> {
        let replaced = Segment { base, bytes, is_compressed: true };
        let found = self.segments.iter_mut().find(|segment| segment.base == base);
        match (result, found) {
            (Ok(()), Some(segment)) => *segment = replaced,
            // The original counts as long as it is there.
            (Err(UpkeepError::Left(error)), Some(segment)) => {
                segment.bytes += bytes;
                return Err(error);
            }
            (Err(UpkeepError::Refused(error) | UpkeepError::Left(error)), _) => return Err(error),
            (Err(UpkeepError::Sync(error)), _) => return self.poisoning("syncing", Err(error)),
            (Ok(()), None) => unreachable!("it was not retired meanwhile"),
        }
        Ok(())
    }

    /// Has no segments any more that a job has retired.
    fn forget(&mut self, job: &RetireJob<S>) {
        self.segments.retain(|segment| segment.base >= job.oldest);
        self.retired = job.oldest;
    }

    /// Returns an error if an earlier call failed, or if the log is closed.
    #[inline]
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        match &self.poison {
            None if self.is_closed => Err(StoreError::Closed),
            None => Ok(()),
            Some(cause) => Err(StoreError::Poisoned { cause: cause.clone() }),
        }
    }

    /// Writes and acknowledges nothing any more.
    pub(crate) fn poison(&mut self, cause: &str) {
        self.poison.get_or_insert_with(|| cause.to_owned());
    }

    /// Returns whether an earlier call failed.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poison.is_some()
    }

    /// Returns how many finished segments were not synced yet.
    pub(crate) fn unsynced_segments(&self) -> usize {
        self.unsynced.len()
    }

    /// Poisons the log if a call failed.
    fn poisoning(&mut self, what: &'static str, result: io::Result<()>) -> Result<(), StoreError> {
        result.map_err(|error| {
            let name = self.segments.last().map_or_else(String::new, |s| segment_name(s.base));
            let error = StoreError::io(what, &name)(error);
            self.poison = Some(error.to_string());
            error
        })
    }
}

/// Returns the bytes of events as they are in a file.
fn little_endian(events: &[Event]) -> std::borrow::Cow<'_, [u8]> {
    match cfg!(target_endian = "little") {
        true => bytemuck::cast_slice(events).into(),
        false => events.iter().flat_map(Event::to_bytes).collect::<Vec<_>>().into(),
    }
}
