//! Logs made of any bytes, looked at in every way: whatever stands in the files, nothing panics, what was
//! salvaged is sound, and what was recovered goes on.
//!
//! A random log would fail its first checksum. So bytes are read as what a log could have been made of,
//! or as parts of real files, and checksums, salts, chains and sequences are right where a bit does not
//! ask for wrong ones. Real logs are what a fuzzer begins with.

use super::compress::{compress, replace};
use super::error::StoreError;
use super::format::{
    FRAME_HEADER, FrameHeader, Kind, SEGMENT_HEADER, SegmentHeader, chained, crc32c, padding,
    payload_crc, seal_payload, segment_name, u16_at, u32_at,
};
use super::inspect::inspect;
use super::listing::Listing;
use super::log::{Limits, Log, Object};
use super::query::{LogQuery, Query};
use super::reader::{LogReader, Records};
use super::recovery::Findings;
use super::salvage::Survey;
use super::sim::SimDisk;
use super::verify::verify;
use crate::event::Event;
use crate::names::Symbol;
use std::sync::Arc;

const LIMITS: Limits = Limits { segment_bytes: 8 << 10, max_bytes: None };
/// What bytes begin with that are parts of files.
const FILES: u8 = 255;
/// Bits of what a file is: compressed, and with the checksums and the chain that stand there.
const COMPRESSED: u8 = 1;
const AS_IT_IS: u8 = 2;
/// Bytes of the header of a segment that are not zeros, without its checksum.
const FIELDS: usize = 96;
/// Records that a salvage may fill with gaps.
const FEW: u64 = 1 << 7;

/// Bytes of a payload: more than are read at once.
const LONGEST: usize = 40_000;

/// Bytes, from which less and less is taken; zeros at their end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or_default()
    }

    /// Returns a number that is mostly small.
    fn number(&mut self) -> u64 {
        match self.byte() {
            255 => self.bytes(8).iter().fold(0, |number, byte| number << 8 | u64::from(*byte)),
            small => small.into(),
        }
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Returns false unless a bit asks for something wrong.
    fn is_wrong(&mut self) -> bool {
        self.byte() >= 250
    }
}

/// A log as it is made.
#[derive(Default)]
struct Made {
    sequence: u64,
    durable: u64,
    chain: u32,
    number: u64,
}

impl Made {
    /// Returns a segment that begins where the one before ended, and how it is named.
    fn segment(&mut self, input: &mut Input<'_>) -> (String, Vec<u8>) {
        if input.is_wrong() {
            self.sequence = self.sequence.wrapping_add(input.number());
        }
        let named = if input.is_wrong() { input.number() } else { self.sequence };
        let header = SegmentHeader {
            log: u128::from(input.is_wrong()),
            number: self.number + u64::from(input.is_wrong()),
            base: self.sequence,
            durable: self.durable,
            oldest: if input.is_wrong() { input.number() } else { 0 },
            created: 0,
            salt: self.number as u32 + 1,
            chain: self.chain ^ u32::from(input.is_wrong()),
            is_reused: input.is_wrong(),
        };
        self.number += 1;
        self.chain = 0;
        let mut bytes = header.encode().to_vec();
        if input.is_wrong() {
            let at = input.number() as usize % SEGMENT_HEADER;
            bytes[at] ^= input.byte();
        }
        for _ in 0..input.byte() % 32 {
            self.frame(header.salt, input, &mut bytes);
        }
        if input.is_wrong() {
            bytes.truncate(input.number() as usize);
        }
        (segment_name(named % (1 << 62)), bytes)
    }

    fn frame(&mut self, salt: u32, input: &mut Input<'_>, bytes: &mut Vec<u8>) {
        const KINDS: [Kind; 6] =
            [Kind::Events, Kind::Objects, Kind::Names, Kind::Gap, Kind::Marker, Kind::Seal];
        let kind = KINDS[usize::from(input.byte()) % KINDS.len()];
        let (count, payload) = self.payload(kind, input);
        if input.is_wrong() {
            self.durable = self.durable.wrapping_add(input.number());
        }
        let header = FrameHeader {
            crc: 0,
            payload_bytes: payload.len() as u32,
            sequence: self.sequence.wrapping_add(if input.is_wrong() { input.number() } else { 0 }),
            durable: self.durable,
            count,
            salt: salt + u32::from(input.is_wrong()),
            kind,
            payload_crc: payload_crc(&[&payload]) ^ u32::from(input.is_wrong()),
        };
        let mut header = header.encode();
        if kind != Kind::Seal {
            self.chain = chained(self.chain, u32_at(&header, 0));
        }
        if input.is_wrong() {
            let at = input.number() as usize % FRAME_HEADER;
            header[at] ^= input.byte();
        }
        self.sequence = self.sequence.wrapping_add(count.into());
        if input.byte().is_multiple_of(4) {
            self.durable = self.sequence;
        }
        bytes.extend(header);
        bytes.extend(&payload);
        bytes.extend(padding(payload.len()));
    }

    /// Returns how many records a frame says it has, and its payload.
    fn payload(&self, kind: Kind, input: &mut Input<'_>) -> (u32, Vec<u8>) {
        let count = u32::from(input.byte() % 8);
        let mut payload = Vec::new();
        match kind {
            Kind::Events => payload.extend(input.bytes(count as usize * size_of::<Event>())),
            Kind::Objects => {
                let mut bodies: Vec<u8> = Vec::new();
                for _ in 0..count {
                    let body = input.bytes(usize::from(input.0.first().copied().unwrap_or(0) % 32));
                    let numbers = [input.number(), input.number()].map(|number| number as u32);
                    let length = body.len() as u32 + u32::from(input.is_wrong());
                    payload.extend(input.number().to_le_bytes());
                    for number in [numbers[0], numbers[1], length, u32::from(input.byte())] {
                        payload.extend(number.to_le_bytes());
                    }
                    bodies.extend(body);
                }
                payload.extend(bodies);
            }
            Kind::Names => {
                for number in 1..=count {
                    let name = input.bytes(usize::from(input.0.first().copied().unwrap_or(0) % 8));
                    // A process keeps every name that it has met: there are to be few.
                    let name: Vec<u8> = match input.is_wrong() {
                        true => name.iter().take(1).copied().collect(),
                        false => name.iter().take(2).map(|byte| b'A' + byte % 4).collect(),
                    };
                    let number = if input.is_wrong() { input.number() as u32 } else { number };
                    payload.extend([1 + input.byte() % 6, 0]);
                    let length = name.len() as u16 + u16::from(input.is_wrong());
                    payload.extend(length.to_le_bytes());
                    payload.extend(number.to_le_bytes());
                    payload.extend(&name);
                }
                return (u32::from(input.is_wrong()), payload);
            }
            Kind::Gap => payload.extend([1; 16]),
            Kind::Marker => {}
            Kind::Seal => payload.extend(seal_payload(self.chain, !input.is_wrong(), 0)),
        }
        if input.is_wrong() {
            payload.resize(input.number() as usize % LONGEST, 0);
        }
        let count = match kind {
            Kind::Marker | Kind::Seal => 0,
            Kind::Gap => 1,
            _ => count,
        };
        (count + u32::from(input.is_wrong()), payload)
    }
}

/// Puts files into a folder whose parts are given.
fn put_files(disk: &SimDisk, input: &mut Input<'_>) {
    let mut chain = 0;
    while !input.0.is_empty() {
        let what = input.byte();
        let numbers = input.bytes(12);
        let Some((base, length)) = numbers.split_at_checked(8) else { return };
        let (Ok(base), Ok(length)) = (base.try_into(), length.try_into()) else { return };
        let (base, length) = (u64::from_le_bytes(base), u32::from_le_bytes(length) as usize);
        let mut bytes = input.bytes(FIELDS).to_vec();
        bytes.resize(SEGMENT_HEADER, 0);
        bytes.extend(input.bytes(length));
        if what & AS_IT_IS == 0 {
            chain = mend(&mut bytes, chain);
        }
        let base = base % (1 << 62);
        disk.put(&segment_name(base), bytes);
        if what & COMPRESSED != 0 && compress(disk, base).is_ok() {
            replace(disk, base).expect("the disk is whole");
        }
    }
}

/// Gives a segment the checksums and the chain that its bytes ask for, behind one with a chain, and
/// returns its own.
fn mend(bytes: &mut [u8], before: u32) -> u32 {
    let (header, frames) = bytes.split_at_mut(SEGMENT_HEADER);
    header[92..96].copy_from_slice(&before.to_le_bytes());
    let crc = crc32c(&header[..SEGMENT_HEADER - 4]);
    header[SEGMENT_HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
    let (mut chain, mut rest) = (0_u32, frames);
    while let Some((header, behind)) = rest.split_at_mut_checked(FRAME_HEADER) {
        let length = u32_at(header, 4) as usize;
        let padded = length.saturating_add(padding(length % 8).len());
        let Some((payload, behind)) = behind.split_at_mut_checked(padded) else { break };
        let is_seal = u16_at(header, 32) == Kind::Seal as u16;
        if is_seal && padded >= 4 {
            payload[..4].copy_from_slice(&chain.to_le_bytes());
        }
        header[36..40].copy_from_slice(&payload_crc(&[&*payload]).to_le_bytes());
        let crc = crc32c(&header[4..]);
        header[..4].copy_from_slice(&crc.to_le_bytes());
        if !is_seal {
            chain = chained(chain, crc);
        }
        rest = behind;
    }
    chain
}

/// Returns the bytes that make the segments of a log.
fn parts(disk: &SimDisk, what: u8) -> Vec<u8> {
    let mut parts = vec![FILES];
    for base in Listing::of(disk).expect("the disk is whole").bases {
        let mut contents = disk.contents(&segment_name(base)).expect("it was listed");
        let end = contents.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        // A seal ends with its time, which is 0 here.
        contents.truncate(end.next_multiple_of(8) + 8);
        parts.push(what);
        parts.extend(base.to_le_bytes());
        parts.extend((contents.len() as u32 - SEGMENT_HEADER as u32).to_le_bytes());
        parts.extend(&contents[..FIELDS]);
        parts.extend(&contents[SEGMENT_HEADER..]);
    }
    parts
}

/// Returns what a fuzzer begins with: logs as they are written, of events, objects, their names and
/// gaps, that go on, that were closed and that were compressed.
pub fn real_logs() -> Vec<Vec<u8>> {
    let write = |steps: &[u8], is_closed: bool| -> Result<SimDisk, StoreError> {
        let disk = SimDisk::new(1);
        let (continuation, _) = Findings::of(&disk)?.mend(&disk)?;
        let limits = Limits { segment_bytes: SEGMENT_HEADER as u64 + 700, max_bytes: None };
        let mut log = Log::new(Arc::new(disk.clone()), limits, continuation);
        let event = Event {
            symbol: Symbol::new("A").unwrap_or(Symbol::NONE),
            ..Event::from_bytes([1; 32])
        };
        for step in steps {
            match step {
                0 => _ = log.append_events(&[event; 3])?,
                1 => {
                    let (topic, schema) = (Some("fills"), "Fill");
                    let (timestamp, version, bytes, is_replayed) = (2, 1, &[7; 20][..], false);
                    let object = Object { timestamp, topic, schema, version, bytes, is_replayed };
                    log.append_object(&object)?;
                }
                2 => _ = log.append_gap(5, true)?,
                3 => log.sync().and_then(|()| log.mark().map(|_| ()))?,
                _ => log.seal()?,
            }
        }
        if is_closed { log.close() } else { log.flush() }.map(|()| disk)
    };
    const HISTORIES: [&[u8]; 5] =
        [&[0], &[1, 1], &[0, 1, 2, 3, 0], &[0, 4, 1, 4, 2], &[0, 3, 0, 3, 1, 3, 0, 1, 0, 1, 0, 1]];
    let mut logs = Vec::new();
    for steps in HISTORIES {
        for (is_closed, what) in [(false, 0), (true, 0), (true, COMPRESSED)] {
            let disk = write(steps, is_closed).expect("the disk is whole");
            logs.push(parts(&disk, what));
        }
    }
    logs
}

/// Makes a log of any bytes.
fn make(bytes: &[u8]) -> SimDisk {
    let mut input = Input(bytes);
    let (disk, mut made) = (SimDisk::new(1), Made::default());
    match input.byte() {
        FILES => put_files(&disk, &mut input),
        segments => {
            for _ in 0..=segments % 4 {
                let (name, contents) = made.segment(&mut input);
                disk.put(&name, contents);
            }
        }
    }
    disk
}

/// Reads all that there is up to a sequence, as it is told.
fn read_below(disk: &SimDisk, limit: u64) {
    let mut reader = LogReader::new(Arc::new(disk.clone()), 0);
    while let Ok(Some(batch)) = reader.next_below(limit) {
        if let Records::Objects(objects) = batch.records {
            assert_eq!(objects.iter().count(), objects.known().count());
        }
    }
    let query = LogQuery::new(Arc::new(disk.clone()), Arc::default(), &Query::default(), limit);
    if let Ok(mut query) = query {
        while let Ok(Some(_)) = query.next_found() {}
    }
}

/// Makes a log of any bytes and looks at it: verifies, inspects, reads, queries, recovers and salvages it.
///
/// # Panics
///
/// What was salvaged is not sound, or what was recovered cannot go on.
pub fn look_at_any_log(bytes: &[u8]) {
    let disk = make(bytes);
    _ = verify(&disk);
    _ = inspect(&disk);
    read_below(&disk, u64::MAX);
    let salvage = Survey::of(&disk).and_then(|survey| Ok((survey.salvage(&disk)?, survey)));
    if let Ok((salvage, survey)) = salvage
        && salvage.lost.iter().all(|lost| lost.end - lost.start < FEW)
    {
        let to = SimDisk::new(2);
        survey.write(&disk, Arc::new(to.clone()), LIMITS).expect("what it keeps can be written");
        let salvaged = verify(&to).expect("it was written just now");
        assert_eq!(salvaged.next_sequence.max(salvage.oldest_sequence), salvage.next_sequence);
    }
    let Ok(findings) = Findings::of(&disk) else { return };
    read_below(&disk, findings.durable);
    let Ok((continuation, _)) = findings.mend(&disk) else { return };
    let mut log = Log::new(Arc::new(disk.clone()), LIMITS, continuation);
    let appended = log.append_events(&[Event::from_bytes([0; 32])]).and_then(|_| log.close());
    appended.expect("there is room");
    read_below(&disk, log.next());
}

#[cfg(test)]
mod tests {
    use super::super::inspect::inspect;
    use super::super::sim::Random;
    use super::super::verify::verify;
    use super::super::workload::from_environment;
    use super::{COMPRESSED, look_at_any_log, make, real_logs};

    /// `LOGS` of them.
    #[test]
    fn whatever_stands_in_the_files_of_a_log_nothing_panics() {
        let mut random = Random(from_environment("SEED", 1));
        for _ in 0..from_environment("LOGS", 2_000) {
            let mut bytes = vec![0; random.below(2_000) as usize];
            bytes.fill_with(|| random.next() as u8);
            look_at_any_log(&bytes);
        }
    }

    /// As many of each log.
    #[test]
    fn whatever_a_few_bytes_of_a_real_log_are_nothing_panics() {
        let mut random = Random(from_environment("SEED", 1));
        for log in real_logs() {
            for _ in 0..from_environment("LOGS", 2_000) / 10 {
                let mut bytes = log.clone();
                for _ in 0..1 + random.below(3) {
                    let at = random.below(bytes.len() as u64) as usize;
                    bytes[at] = random.next() as u8;
                }
                look_at_any_log(&bytes);
            }
        }
    }

    #[test]
    fn the_logs_that_a_fuzzer_begins_with_are_sound() {
        for bytes in real_logs() {
            let disk = make(&bytes);
            let records = verify(&disk).expect("it is as it was written").next_sequence;
            assert!(records > 0, "it has no records");
            let segments = inspect(&disk).expect("it is sound");
            let are_compressed = segments.iter().all(|segment| segment.name.ends_with(".zst"));
            assert_eq!(are_compressed, bytes[1] & COMPRESSED != 0);
        }
    }
}
