//! Where in a segment which times, types and symbols are: a line for some thousands of records.
//!
//! An index is made from its segment and can be made again at any time. That of a finished segment is
//! kept in a file beside it (docs/format.md, "Index"). Nothing is believed because it says so: a file
//! that does not fit its segment counts as none, and what an index leads to is checked like everything
//! that is read.

use super::compressed::SegmentFile;
use super::dictionary::Translation;
use super::error::StoreError;
use super::format::{
    ENDING, Kind, OBJECT_HEAD, SEGMENT_HEADER, SegmentHeader, crc32c, index_name, new_index_name,
    u32_at, u64_at,
};
use super::listing::open_segment;
use super::recovery::{read_header, read_seal};
use super::scan::{Frame, Scan};
use super::storage::{ReadAt, Storage, read_all, uninterrupted, write_all};
use crate::event::{EVENT_BYTES, Event};
use std::io::{self, IoSlice};
use std::sync::Arc;

/// Records that a line stands for, at least, where there are so many. A frame is in one line.
const BLOCK_RECORDS: u64 = 2048;

const MAGIC: [u8; 8] = *b"EVIDX\0\r\n";
const MAJOR: u16 = 1;
/// Bytes of a file before its lines, of the place of a frame with names, of a block, and of the CRC
/// behind them.
const HEAD: usize = 72;
const NAMES: usize = 16;
const BLOCK: usize = 80;
const CRC: usize = 4;

/// Some frames that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

    /// Returns its bytes in a file; `None` if it has more records than have room there.
    fn encode(&self) -> Option<[u8; BLOCK]> {
        let records = u32::try_from(self.end - self.sequence).ok()?;
        let counts = u64::from(records) | u64::from(self.has_objects) << 32;
        let [a, b, c, d] = self.types;
        let numbers = [
            self.offset,
            self.sequence,
            counts,
            self.earliest,
            self.latest,
            a,
            b,
            c,
            d,
            self.symbols,
        ];
        let mut bytes = [0; BLOCK];
        put(&mut bytes, &numbers);
        Some(bytes)
    }

    fn decode(bytes: &[u8]) -> Self {
        let number = |place: usize| u64_at(bytes, 8 * place);
        Self {
            offset: number(0),
            sequence: number(1),
            end: number(1).saturating_add(u32_at(bytes, 16).into()),
            earliest: number(3),
            latest: number(4),
            types: [number(5), number(6), number(7), number(8)],
            symbols: number(9),
            has_objects: u32_at(bytes, 20) & 1 == 1,
        }
    }
}

/// What a finished segment is known by, so that no other one has its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Finished {
    log: u128,
    base: u64,
    salt: u32,
    /// After its last record.
    end: u64,
    /// When it is not compressed.
    bytes: u64,
    chain: u32,
}

impl Finished {
    fn new(header: &SegmentHeader, end: u64, bytes: u64, chain: u32) -> Self {
        let SegmentHeader { log, base, salt, .. } = *header;
        Self { log, base, salt, end, bytes, chain }
    }

    /// Returns what a segment was found to be that was scanned from its first frame to its seal.
    pub(crate) fn scanned<F: ReadAt>(header: &SegmentHeader, scan: &Scan<F>) -> Option<Self> {
        let chain = scan.chain().filter(|_| scan.has_seal())?;
        Some(Self::new(header, scan.sequence(), scan.offset(), chain))
    }

    /// Returns what its index begins with that has so many lines.
    fn head(&self, names: usize, blocks: usize) -> Option<[u8; HEAD]> {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&MAGIC);
        head[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        head[12..16].copy_from_slice(&self.salt.to_le_bytes());
        head[16..32].copy_from_slice(&self.log.to_le_bytes());
        put(&mut head[32..56], &[self.base, self.end, self.bytes]);
        head[56..60].copy_from_slice(&self.chain.to_le_bytes());
        head[60..64].copy_from_slice(&u32::try_from(names).ok()?.to_le_bytes());
        head[64..68].copy_from_slice(&u32::try_from(blocks).ok()?.to_le_bytes());
        Some(head)
    }
}

/// What an index says of the frames of a segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    /// Where frames with names begin, in bytes, and the sequences that they have.
    names: Vec<(u64, u64)>,
    pub(crate) blocks: Vec<Block>,
}

impl Lines {
    /// Takes the next frame of the segment, which begins at an offset.
    pub(crate) fn take(&mut self, offset: u64, frame: &Frame<'_>) {
        let sequence = frame.header.sequence;
        match frame.header.kind {
            Kind::Names => self.names.push((offset, sequence)),
            Kind::Events | Kind::Objects => {
                let has_room = |block: &Block| block.end - block.sequence < BLOCK_RECORDS;
                if !self.blocks.last().is_some_and(has_room) {
                    self.blocks.push(Block::at(offset, sequence));
                }
                if let Some(block) = self.blocks.last_mut() {
                    block.take(frame);
                }
            }
            _ => {}
        }
    }

    /// Takes all frames that follow and are whole.
    pub(crate) fn take_all<F: ReadAt>(&mut self, scan: &mut Scan<F>) -> io::Result<()> {
        loop {
            let offset = scan.offset();
            let Some(frame) = scan.next()? else { return Ok(()) };
            self.take(offset, &frame);
        }
    }

    /// Returns the bytes of their file; `None` if they have no room in one.
    fn encode(&self, of: &Finished) -> Option<Vec<u8>> {
        let mut bytes = Vec::from(of.head(self.names.len(), self.blocks.len())?);
        for (offset, sequence) in &self.names {
            bytes.extend(offset.to_le_bytes());
            bytes.extend(sequence.to_le_bytes());
        }
        for block in &self.blocks {
            bytes.extend(block.encode()?);
        }
        bytes.extend(crc32c(&bytes).to_le_bytes());
        Some(bytes)
    }

    /// Returns the lines that a file has for a segment, if it is whole and of that one.
    pub(crate) fn read<S: Storage>(storage: &S, of: &Finished) -> io::Result<Option<Self>> {
        let file = uninterrupted(|| storage.open(&index_name(of.base), false))?;
        let mut head = [0; HEAD];
        let filled = read_all(&file, &mut head, 0)?;
        let (names, blocks) = (u32_at(&head, 60) as usize, u32_at(&head, 64) as usize);
        let bytes = HEAD as u64 + NAMES as u64 * names as u64 + BLOCK as u64 * blocks as u64;
        // The minor version is none of a reader's business.
        head[10..12].fill(0);
        let is_mine = filled == HEAD && of.head(names, blocks).is_some_and(|wanted| wanted == head);
        if !is_mine || uninterrupted(|| file.len())? != bytes + CRC as u64 {
            return Ok(None);
        }
        let mut contents = vec![0; bytes as usize + CRC];
        let filled = read_all(&file, &mut contents, 0)?;
        let (lines, crc) = contents.split_at(bytes as usize);
        if filled < contents.len() || crc32c(lines) != u32_at(crc, 0) {
            return Ok(None);
        }
        let (names, blocks) = lines[HEAD..].split_at(NAMES * names);
        Ok(Some(Self {
            names: names.chunks_exact(NAMES).map(|at| (u64_at(at, 0), u64_at(at, 8))).collect(),
            blocks: blocks.chunks_exact(BLOCK).map(Block::decode).collect(),
        }))
    }

    /// Returns whether they are what the file of their segment has.
    pub(crate) fn are_kept<S: Storage>(&self, storage: &S, of: &Finished) -> bool {
        matches!(Self::read(storage, of), Ok(Some(kept)) if kept == *self)
    }

    /// Keeps them in the file of their segment, unless they are there. A file that cannot be written is
    /// missed by nobody: nothing is synced either, for one that is not whole counts as none.
    pub(crate) fn keep<S: Storage>(&self, storage: &S, of: &Finished) {
        if self.are_kept(storage, of) {
            return;
        }
        let Some(bytes) = self.encode(of) else { return };
        let new = new_index_name(of.base);
        let written = uninterrupted(|| storage.create(&new))
            .and_then(|file| write_all(&file, &mut [IoSlice::new(&bytes)], 0))
            .and_then(|()| uninterrupted(|| storage.rename(&new, &index_name(of.base))));
        if written.is_err() {
            _ = storage.remove(&new);
        }
    }
}

fn put(bytes: &mut [u8], numbers: &[u64]) {
    for (place, number) in bytes.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

/// The index of a segment, as far as that was written when it was made.
pub(crate) struct SegmentIndex<S: Storage> {
    /// None once all of a finished segment is in it.
    scan: Option<Scan<SegmentFile<S::File>>>,
    name: String,
    header: SegmentHeader,
    end: u64,
    pub(crate) lines: Lines,
    /// What the numbers in the segment mean.
    pub(crate) names: Arc<Translation>,
}

impl<S: Storage> SegmentIndex<S> {
    /// Returns the index that is kept of a segment, or that of nothing of it yet.
    pub(crate) fn new(storage: &S, base: u64) -> Result<Self, StoreError> {
        let file = open_segment(storage, base)?;
        let name = file.name(base);
        let (bytes, Some(header)) = read_header(&file, &name)? else {
            return Err(corrupt(name, 0, base, "the header of a segment"));
        };
        if let Some(seal) = read_seal(&file, &name, bytes, &header)?
            // What cannot be read is made again.
            && let of = Finished::new(&header, seal.sequence, bytes, seal.chain)
            && let Ok(Some(lines)) = Lines::read(storage, &of)
            && let Some(names) = read_names(Scan::new(&file, header.salt, bytes, base), &lines)
                .map_err(StoreError::io("reading", &name))?
        {
            let (end, names) = (seal.sequence, Arc::new(names));
            return Ok(Self { scan: None, name, header, end, lines, names });
        }
        let scan = Some(Scan::new(file, header.salt, SEGMENT_HEADER as u64, base));
        let (lines, names) = (Lines::default(), Arc::new(Translation::new()));
        Ok(Self { scan, name, header, end: base, lines, names })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn salt(&self) -> u32 {
        self.header.salt
    }

    /// Goes on to the end of the segment, or to the records from `limit` on, which may not be there
    /// yet. Returns the sequence after the last record, and what the segment is known by if it was
    /// finished meanwhile.
    pub(crate) fn extend(&mut self, limit: u64) -> Result<(u64, Option<Finished>), StoreError> {
        let Self { scan: Some(scan), name, end, lines, names, .. } = self else {
            return Ok((self.end, None));
        };
        let reading = |error| StoreError::io("reading", name)(error);
        // What was read ahead at its end may not have been written then.
        scan.forget();
        loop {
            let (offset, sequence) = (scan.offset(), scan.sequence());
            *end = sequence;
            if scan.has_seal() {
                let finished = Finished::scanned(&self.header, scan);
                // It needs neither file nor buffer any more.
                self.scan = None;
                return Ok((sequence, finished));
            }
            let is_at_limit = sequence >= limit;
            // What ends a finished segment needs not be waited for.
            let bytes = || uninterrupted(|| scan.file().len());
            if is_at_limit && bytes().map_err(&reading)? > offset + ENDING as u64 {
                return Ok((sequence, None));
            }
            let Some(frame) = scan.next().map_err(&reading)? else {
                return match is_at_limit {
                    true => Ok((sequence, None)),
                    false => Err(corrupt(name.clone(), offset, sequence, "a frame that is whole")),
                };
            };
            lines.take(offset, &frame);
            if frame.header.kind == Kind::Names {
                Arc::make_mut(names).define(frame.payload).map_err(|error| {
                    let expected = "names with their numbers";
                    error.unwrap_or_else(|| corrupt(name.clone(), offset, sequence, expected))
                })?;
            }
        }
    }
}

/// Returns what the numbers in a segment mean, if there are names wherever its index says so.
fn read_names<F: ReadAt>(mut scan: Scan<F>, lines: &Lines) -> io::Result<Option<Translation>> {
    let mut names = Translation::new();
    for (offset, sequence) in &lines.names {
        scan.seek(*offset, *sequence);
        match scan.next()? {
            Some(frame) if frame.header.kind == Kind::Names => match names.define(frame.payload) {
                Ok(()) => {}
                Err(_) => return Ok(None),
            },
            _ => return Ok(None),
        }
    }
    Ok(Some(names))
}

pub(crate) fn corrupt(
    segment: String,
    offset: u64,
    sequence: u64,
    expected: &'static str,
) -> StoreError {
    StoreError::Corrupt { segment, offset, sequence, expected }
}

#[cfg(test)]
mod tests {
    use super::super::compress::{compress, replace};
    use super::super::error::StoreError;
    use super::super::format::{index_name, new_index_name, segment_name};
    use super::super::listing::Listing;
    use super::super::log::{Limits, Log, Object};
    use super::super::query::{Found, Indexes, LogQuery, Query};
    use super::super::sim::{Calls, Fault, SimDisk};
    use super::super::storage::Storage;
    use super::super::verify::verify;
    use super::super::workload::open_log;
    use super::*;
    use crate::names::Symbol;
    use std::ops::Range;

    const LIMITS: Limits = Limits { segment_bytes: 1 << 20, max_bytes: None };
    /// Where the segments of `logged` begin.
    const BASES: [u64; 3] = [0, 3_001, 6_002];
    const END: u64 = 9_003;

    /// Returns the disk of a log of three finished segments: events a nanosecond apart, and an object at
    /// the end of each.
    fn logged(seed: u64) -> SimDisk {
        let disk = SimDisk::new(seed);
        let (mut log, _) = open_log(&disk, LIMITS).expect("it is new");
        for base in BASES {
            append(&mut log, base..base + 3_000);
            let object = Object {
                timestamp: END + base,
                topic: Some("fills"),
                schema: "Fill",
                version: 1,
                bytes: b"object",
                is_replayed: false,
            };
            log.append_object(&object).and_then(|_| log.seal()).expect("there is room");
        }
        disk.settled()
    }

    /// Appends events whose times are their sequences.
    fn append(log: &mut Log<SimDisk>, sequences: Range<u64>) {
        let symbol = Symbol::new("BTCUSDT").expect("it is a name");
        let at = |timestamp| Event { timestamp, symbol, ..Event::from_bytes([0; EVENT_BYTES]) };
        log.append_events(&sequences.map(at).collect::<Vec<_>>()).expect("there is room");
    }

    /// Returns what is found of some of the events of all segments, by somebody who keeps indexes or not.
    fn found(disk: &SimDisk, indexes: Indexes<SimDisk>) -> Result<Vec<u64>, StoreError> {
        let query = Query { times: 2_900..6_100, ..Query::default() };
        let mut query = LogQuery::new(Arc::new(disk.clone()), Arc::new(indexes), &query, END)?;
        let mut all = Vec::new();
        while let Some(found) = query.next_found()? {
            match found {
                Found::Events(sequences, _) => all.extend(sequences),
                Found::Objects(objects) => panic!("{objects:?} are of another time"),
            }
        }
        Ok(all)
    }

    fn expected() -> Vec<u64> {
        (2_900..6_100).filter(|sequence| ![3_000, 6_001].contains(sequence)).collect()
    }

    /// Returns the disk of a log whose segments have indexes.
    fn indexed(seed: u64) -> SimDisk {
        let disk = logged(seed);
        assert_eq!(found(&disk, Indexes::kept()).expect("it is sound"), expected());
        disk.settled()
    }

    fn index_of(disk: &SimDisk, base: u64) -> Vec<u8> {
        disk.contents(&index_name(base)).expect("it is kept")
    }

    /// Looks at a log with an index in it that is none of its segment's.
    fn is_ignored(disk: &SimDisk, what: &str) {
        let verified = verify(disk).expect("an index damages no log");
        assert_eq!((verified.indexes, verified.wrong_indexes), (2, 1), "{what}");
        for indexes in [Indexes::default(), Indexes::kept()] {
            assert_eq!(found(disk, indexes).expect(what), expected(), "{what}");
        }
        let mended = verify(disk).expect("an index damages no log");
        assert_eq!((mended.indexes, mended.wrong_indexes), (3, 0), "{what}: it is made again");
    }

    #[test]
    fn an_index_that_is_kept_leads_to_what_is_wanted_and_nothing_else_is_read() {
        let disk = indexed(1);
        let verified = verify(&disk).expect("it is sound");
        assert_eq!((verified.indexes, verified.wrong_indexes), (3, 0));
        // Where it is damaged now nobody has to look.
        for (base, at) in [(0, SEGMENT_HEADER + 60_000), (6_002, SEGMENT_HEADER + 90_000)] {
            let mut contents = disk.contents(&segment_name(base)).expect("it is there");
            contents[at] ^= 1;
            disk.put(&segment_name(base), contents);
        }
        assert_eq!(found(&disk, Indexes::default()).expect("it is not read"), expected());
        disk.remove(&index_name(0)).expect("it is there");
        let error = found(&disk, Indexes::default()).expect_err("all of it is read");
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    }

    #[test]
    fn whichever_byte_of_an_index_is_wrong_it_counts_as_none() {
        let disk = indexed(1);
        let whole = index_of(&disk, BASES[1]);
        let change = |what: &str, change: &dyn Fn(&mut Vec<u8>)| {
            let changed = disk.settled();
            let mut bytes = whole.clone();
            change(&mut bytes);
            changed.put(&index_name(BASES[1]), bytes);
            is_ignored(&changed, what);
        };
        for at in 0..whole.len() {
            change(&format!("byte {at}"), &|bytes| bytes[at] ^= 1 << (at % 8));
        }
        for length in (0..whole.len()).step_by(16).chain([whole.len() - 1]) {
            change(&format!("{length} bytes"), &|bytes| bytes.truncate(length));
        }
        change("a byte more", &|bytes| bytes.push(0));
        change("zeros", &|bytes| bytes.fill(0));
        // Counts of which nobody could keep the lines.
        change("all ones", &|bytes| bytes.fill(0xff));
    }

    #[test]
    fn the_index_of_another_segment_counts_as_none() {
        let (disk, other) = (indexed(1), indexed(2));
        for foreign in [index_of(&disk, BASES[0]), index_of(&other, BASES[1])] {
            let changed = disk.settled();
            changed.put(&index_name(BASES[1]), foreign);
            is_ignored(&changed, "another segment");
        }
        // A segment of the same log that began there once, and was given up.
        let (log, history) = (SimDisk::new(3), SimDisk::new(3));
        for (disk, end) in [(&log, 3_001), (&history, 3_002)] {
            let (mut log, _) = open_log(disk, LIMITS).expect("it is new");
            for sequences in [0..end, end..END] {
                append(&mut log, sequences);
                log.seal().expect("there is room");
            }
            assert_eq!(found(disk, Indexes::kept()).expect("it is sound").len(), 3_200);
        }
        log.put(&index_name(0), index_of(&history, 0));
        let verified = verify(&log).expect("it is sound");
        assert_eq!((verified.indexes, verified.wrong_indexes), (1, 1));
        assert_eq!(found(&log, Indexes::default()).expect("it is sound").len(), 3_200);
    }

    #[test]
    fn a_segment_that_is_compressed_has_the_index_that_it_had() {
        let (disk, plain) = (logged(1), indexed(1));
        for base in BASES {
            compress(&disk, base).expect("there is room");
            replace(&disk, base).expect("there is room");
            assert_eq!(index_of(&disk, base), index_of(&plain, base), "made on the way");
        }
        let verified = verify(&disk).expect("it is sound");
        assert_eq!((verified.indexes, verified.wrong_indexes), (3, 0));
        assert_eq!(found(&disk, Indexes::default()).expect("it is sound"), expected());
    }

    #[test]
    fn an_index_goes_with_its_segment_and_what_is_left_of_one_is_removed() {
        let disk = indexed(1);
        let (mut log, _) = open_log(&disk, LIMITS).expect("it is sound");
        let job = log.begin_retire(BASES[1]).expect("it is sound").expect("something is retired");
        let result = job.run();
        log.end_retire(&job, result).expect("nothing fails");
        assert_eq!(disk.contents(&index_name(BASES[0])), None);
        assert_eq!(Listing::of(&disk).expect("it is there").indexed, BASES[1..]);

        let left = [index_name(BASES[0]), index_name(7), new_index_name(BASES[1])];
        left.iter().for_each(|name| disk.put(name, vec![1]));
        open_log(&disk, LIMITS).expect("it is sound");
        assert!(left.iter().all(|name| disk.contents(name).is_none()));
        assert_eq!(Listing::of(&disk).expect("it is there").indexed, BASES[1..]);
    }

    #[test]
    fn an_index_that_cannot_be_written_is_missed_by_nobody() {
        for fault in [Fault::Io, Fault::NoSpace, Fault::Short, Fault::Interrupted] {
            let mut call = 1;
            loop {
                let disk = logged(1);
                disk.fail(Calls::Changing, call, fault);
                assert_eq!(found(&disk, Indexes::kept()).expect("it is sound"), expected());
                let verified = verify(&disk).expect("it is sound");
                let is_whole = matches!(fault, Fault::Short | Fault::Interrupted);
                let missing = usize::from(disk.has_failed() && !is_whole);
                assert_eq!((verified.indexes, verified.wrong_indexes), (3 - missing, 0));
                assert!(disk.names().expect("it has names").iter().all(|n| !n.ends_with(".tmp")));
                if !disk.has_failed() {
                    break;
                }
                call += 1;
            }
            assert!(call > 9, "only {call} calls were made");
        }
    }
}
