//! Logs made of any bytes, looked at in every way: whatever stands in the files, nothing panics, what was
//! salvaged is sound, and what was recovered goes on.
//!
//! A random log would fail its first checksum. So bytes are read as what a log could have been made of,
//! and checksums, salts, chains and sequences are right where a bit does not ask for wrong ones.

use super::format::{
    FRAME_HEADER, FrameHeader, Kind, SEGMENT_HEADER, SegmentHeader, chained, padding, payload_crc,
    seal_payload, segment_name, u32_at,
};
use super::inspect::inspect;
use super::log::{Limits, Log};
use super::query::{LogQuery, Query};
use super::reader::{LogReader, Records};
use super::recovery::Findings;
use super::salvage::Survey;
use super::sim::SimDisk;
use super::verify::verify;
use crate::event::Event;
use std::sync::Arc;

const LIMITS: Limits = Limits { segment_bytes: 8 << 10, max_bytes: None };
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
    let mut input = Input(bytes);
    let (disk, mut made) = (SimDisk::new(1), Made::default());
    for _ in 0..=input.byte() % 4 {
        let (name, contents) = made.segment(&mut input);
        disk.put(&name, contents);
    }
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
    use super::super::sim::Random;
    use super::look_at_any_log;

    /// `LOGS` of them.
    #[test]
    fn whatever_stands_in_the_files_of_a_log_nothing_panics() {
        let mut random = Random(super::super::crash::from_environment("SEED", 1));
        for _ in 0..super::super::crash::from_environment("LOGS", 2_000) {
            let mut bytes = vec![0; random.below(2_000) as usize];
            bytes.fill_with(|| random.next() as u8);
            look_at_any_log(&bytes);
        }
    }
}
