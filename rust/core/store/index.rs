//! Where in a segment which times, types and symbols are: a line for some thousands of records.
//!
//! An index is made from its segment and can be made again at any time. Nothing is believed because
//! it says so: what it leads to is checked like everything that is read.

use super::compressed::SegmentFile;
use super::dictionary::Translation;
use super::error::StoreError;
use super::format::{Kind, OBJECT_HEAD, SEGMENT_HEADER, u64_at};
use super::listing::open_segment;
use super::recovery::read_header;
use super::scan::{Frame, Scan};
use super::storage::Storage;
use crate::event::{EVENT_BYTES, Event};
use std::sync::Arc;

/// Records that a line stands for, at least, where there are so many. A frame is in one line.
const BLOCK_RECORDS: u64 = 2048;

/// Some frames that follow one another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    /// Where the first frame begins, in bytes.
    pub(crate) offset: u64,
    /// Of the first record, and behind the last.
    pub(crate) sequence: u64,
    pub(crate) end: u64,
    /// Of the events and objects in it, in nanoseconds.
    pub(crate) earliest: u64,
    pub(crate) latest: u64,
    /// Of the events in it, a bit each.
    pub(crate) types: [u64; 4],
    /// Of the events in it: a bit for all numbers that are equal modulo 64.
    pub(crate) symbols: u64,
    pub(crate) has_objects: bool,
}

impl Block {
    fn at(offset: u64, sequence: u64) -> Self {
        let (earliest, latest) = (u64::MAX, 0);
        let (types, symbols, has_objects) = ([0; 4], 0, false);
        let end = sequence;
        Self { offset, sequence, end, earliest, latest, types, symbols, has_objects }
    }

    fn take(&mut self, frame: &Frame<'_>) {
        self.end = frame.header.sequence + u64::from(frame.header.count);
        match frame.header.kind {
            Kind::Events => {
                for bytes in frame.payload.as_chunks::<EVENT_BYTES>().0 {
                    let event = Event::from_bytes(*bytes);
                    self.earliest = self.earliest.min(event.timestamp);
                    self.latest = self.latest.max(event.timestamp);
                    self.types[usize::from(event.event_type.0 >> 6)] |=
                        1 << (event.event_type.0 & 63);
                    self.symbols |= 1 << (event.symbol.0 & 63);
                }
            }
            Kind::Objects => {
                self.has_objects = true;
                let heads = frame.header.count as usize * OBJECT_HEAD;
                for head in frame.payload[..heads].chunks_exact(OBJECT_HEAD) {
                    self.earliest = self.earliest.min(u64_at(head, 0));
                    self.latest = self.latest.max(u64_at(head, 0));
                }
            }
            _ => {}
        }
    }
}

/// The index of a segment, as far as that was written when it was made.
pub(crate) struct SegmentIndex<S: Storage> {
    /// None once all of a sealed segment is in it.
    scan: Option<Scan<SegmentFile<S::File>>>,
    name: String,
    salt: u32,
    end: u64,
    pub(crate) blocks: Vec<Block>,
    /// What the numbers in the segment mean.
    pub(crate) names: Arc<Translation>,
}

impl<S: Storage> SegmentIndex<S> {
    /// Returns the index of nothing of a segment yet.
    pub(crate) fn new(storage: &S, base: u64) -> Result<Self, StoreError> {
        let file = open_segment(storage, base)?;
        let name = file.name(base);
        let (_, Some(header)) = read_header(&file, &name)? else {
            return Err(corrupt(name, 0, base, "the header of a segment"));
        };
        let scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, base);
        Ok(Self {
            scan: Some(scan),
            name,
            salt: header.salt,
            end: base,
            blocks: Vec::new(),
            names: Arc::new(Translation::new()),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn salt(&self) -> u32 {
        self.salt
    }

    /// Goes on to the end of the segment, or to the records from `limit` on, which may not be there
    /// yet. Returns the sequence after the last record.
    pub(crate) fn extend(&mut self, limit: u64) -> Result<u64, StoreError> {
        let Self { scan: Some(scan), name, end, blocks, names, .. } = self else {
            return Ok(self.end);
        };
        // What was read ahead at its end may not have been written then.
        scan.forget();
        loop {
            let (offset, sequence) = (scan.offset(), scan.sequence());
            *end = sequence;
            if scan.has_seal() {
                // It needs neither file nor buffer any more.
                self.scan = None;
                return Ok(sequence);
            }
            if sequence >= limit {
                return Ok(sequence);
            }
            let Some(frame) = scan.next().map_err(StoreError::io("reading", name))? else {
                return Err(corrupt(name.clone(), offset, sequence, "a frame that is whole"));
            };
            match frame.header.kind {
                Kind::Names => match Arc::make_mut(names).define(frame.payload) {
                    Ok(()) => {}
                    Err(Some(error)) => return Err(error),
                    Err(None) => {
                        let expected = "names with their numbers";
                        return Err(corrupt(name.clone(), offset, sequence, expected));
                    }
                },
                Kind::Events | Kind::Objects => {
                    let has_room = |block: &Block| block.end - block.sequence < BLOCK_RECORDS;
                    if !blocks.last().is_some_and(has_room) {
                        blocks.push(Block::at(offset, sequence));
                    }
                    if let Some(block) = blocks.last_mut() {
                        block.take(&frame);
                    }
                }
                _ => {}
            }
        }
    }
}

pub(crate) fn corrupt(
    segment: String,
    offset: u64,
    sequence: u64,
    expected: &'static str,
) -> StoreError {
    StoreError::Corrupt { segment, offset, sequence, expected }
}
