//! The bytes of a log, as docs/format.md has them.

use super::mutants::{Mutant, is_broken};
use crate::event::EVENT_BYTES;
use crc_fast::{CrcAlgorithm, Digest, crc32_iscsi};

/// Bytes of the header of a segment.
pub(crate) const SEGMENT_HEADER: usize = 4096;
/// Bytes of the header of a frame.
pub(crate) const FRAME_HEADER: usize = 40;
/// The most bytes of a frame's payload.
pub(crate) const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of the head of an object.
pub(crate) const OBJECT_HEAD: usize = 24;

/// No sequence and no number of a segment reaches it.
pub(crate) const END: u64 = 1 << 63;

const MAGIC: [u8; 8] = *b"EVLOG\0\r\n";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
/// The incompatible features that this version knows.
const FEATURES: u64 = 0;
/// A compatible feature: behind the last frame stands what the file held before.
const REUSED: u64 = 1;

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Kind {
    Events = 1,
    Objects = 2,
    Names = 3,
    Gap = 4,
    Marker = 5,
    Seal = 6,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Events, Self::Objects, Self::Names, Self::Gap, Self::Marker, Self::Seal];

    fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == code)
    }
}

/// The header of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) log: u128,
    pub(crate) number: u64,
    pub(crate) base: u64,
    pub(crate) durable: u64,
    pub(crate) oldest: u64,
    pub(crate) created: u64,
    pub(crate) salt: u32,
    pub(crate) chain: u32,
    /// The file was another segment before.
    pub(crate) is_reused: bool,
}

/// Why bytes are not the header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadHeader {
    /// They are not what was written, or nothing was.
    Damaged,
    /// They are of another major version, or have features that this one does not know.
    Version { major: u16, features: u64 },
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Box<[u8; SEGMENT_HEADER]> {
        let mut bytes = Box::new([0; SEGMENT_HEADER]);
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&MINOR.to_le_bytes());
        bytes[12..16].copy_from_slice(&(SEGMENT_HEADER as u32).to_le_bytes());
        let features = if self.is_reused { REUSED } else { 0 };
        bytes[24..32].copy_from_slice(&features.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.log.to_le_bytes());
        let numbers = [self.number, self.base, self.durable, self.oldest, self.created];
        for (place, number) in bytes[48..88].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[88..92].copy_from_slice(&self.salt.to_le_bytes());
        bytes[92..96].copy_from_slice(&self.chain.to_le_bytes());
        let crc = crc32c(&bytes[..SEGMENT_HEADER - 4]);
        bytes[SEGMENT_HEADER - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Returns whether bytes of a header are those that were written, if they are of this format.
    pub(crate) fn is_whole(bytes: &[u8]) -> bool {
        let (fields, crc) = bytes[..SEGMENT_HEADER].split_at(SEGMENT_HEADER - 4);
        crc32c(fields) == u32_at(crc, 0)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        if bytes.len() < SEGMENT_HEADER || bytes[..8] != MAGIC {
            return Err(BadHeader::Damaged);
        }
        let (major, features) = (u16_at(bytes, 8), u64_at(bytes, 16));
        // Another format may have its checksum elsewhere.
        if major != MAJOR {
            return Err(BadHeader::Version { major, features });
        }
        if !Self::is_whole(bytes) && !is_broken(Mutant::NoSegmentHeaderCrc) {
            return Err(BadHeader::Damaged);
        }
        if features & !FEATURES != 0 {
            return Err(BadHeader::Version { major, features });
        }
        if [48, 56, 72].into_iter().any(|at| u64_at(bytes, at) >= END) {
            return Err(BadHeader::Damaged);
        }
        Ok(Self {
            log: u128::from(u64_at(bytes, 32)) | u128::from(u64_at(bytes, 40)) << 64,
            number: u64_at(bytes, 48),
            base: u64_at(bytes, 56),
            durable: u64_at(bytes, 64),
            oldest: u64_at(bytes, 72),
            created: u64_at(bytes, 80),
            salt: u32_at(bytes, 88),
            chain: u32_at(bytes, 92),
            is_reused: u64_at(bytes, 24) & REUSED != 0,
        })
    }
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    /// CRC of the other fields.
    pub(crate) crc: u32,
    /// Without padding.
    pub(crate) payload_bytes: u32,
    pub(crate) sequence: u64,
    pub(crate) durable: u64,
    pub(crate) count: u32,
    pub(crate) salt: u32,
    pub(crate) kind: Kind,
    pub(crate) payload_crc: u32,
}

impl FrameHeader {
    /// Returns the bytes, with the right CRC.
    pub(crate) fn encode(&self) -> [u8; FRAME_HEADER] {
        let mut bytes = [0; FRAME_HEADER];
        bytes[4..8].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.durable.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.count.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.salt.to_le_bytes());
        bytes[32..34].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[36..40].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Returns the header with these bytes if they are one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let crc = u32_at(bytes, 0);
        if crc != crc32c(&bytes[4..FRAME_HEADER]) && !is_broken(Mutant::NoFrameHeaderCrc) {
            return None;
        }
        let (payload_bytes, flags) = (u32_at(bytes, 4), u16_at(bytes, 34));
        let sequence = u64_at(bytes, 8);
        if payload_bytes as usize > MAX_PAYLOAD || flags != 0 || sequence >= END {
            return None;
        }
        Some(Self {
            crc,
            payload_bytes,
            sequence,
            durable: u64_at(bytes, 16),
            count: u32_at(bytes, 24),
            salt: u32_at(bytes, 28),
            kind: Kind::from_code(u16_at(bytes, 32))?,
            payload_crc: u32_at(bytes, 36),
        })
    }

    /// Returns the salt of what may be a header, to tell quickly that it is none.
    pub(crate) fn salt_of(bytes: &[u8]) -> u32 {
        u32_at(bytes, 28)
    }

    /// Returns the bytes of the payload and its padding.
    pub(crate) fn padded_bytes(&self) -> usize {
        padded(self.payload_bytes as usize)
    }

    /// Returns whether a payload is what kind and count say.
    pub(crate) fn describes(&self, payload: &[u8]) -> bool {
        let count = self.count as usize;
        match self.kind {
            Kind::Events => count > 0 && payload.len() == count * EVENT_BYTES,
            Kind::Objects => {
                let heads = count.saturating_mul(OBJECT_HEAD);
                let heads = payload.get(..heads).filter(|_| count > 0);
                heads.is_some_and(|heads| {
                    let lengths = heads.chunks_exact(OBJECT_HEAD).map(|head| u32_at(head, 16));
                    heads.len() as u64 + lengths.map(u64::from).sum::<u64>() == payload.len() as u64
                })
            }
            Kind::Names => count == 0,
            Kind::Gap => count == 1 && payload.len() == 16,
            Kind::Seal => count == 0 && payload.len() == 16,
            Kind::Marker => count == 0 && payload.is_empty(),
        }
    }
}

/// Returns the CRC of bytes.
#[inline]
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc32_iscsi(bytes)
}

/// Returns the CRC of parts, behind what has this CRC.
fn crc32c_append<'a>(before: u32, parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, (!before).into());
    parts.into_iter().for_each(|part| digest.update(part));
    digest.finalize() as u32
}

/// Returns the CRC of the parts of a payload and of its padding.
pub(crate) fn payload_crc(parts: &[&[u8]]) -> u32 {
    let padding = padding(parts.iter().map(|part| part.len()).sum());
    match parts {
        [whole] if padding.is_empty() => crc32c(whole),
        _ => crc32c_append(0, parts.iter().copied().chain([padding])),
    }
}

/// Returns the chain of a segment after a frame.
pub(crate) fn chained(chain: u32, header_crc: u32) -> u32 {
    crc32c_append(chain, [&header_crc.to_le_bytes()[..]])
}

/// Bytes of a seal, which ends a segment.
pub(crate) const SEAL: usize = FRAME_HEADER + 16;
/// The most bytes that can follow the last record of a segment: the markers of a sync that was under way
/// when it was written and of the one after that, and a seal.
pub(crate) const ENDING: usize = 2 * FRAME_HEADER + SEAL;

/// Returns the payload of a seal; `is_whole` if all before it was synced when it was written.
pub(crate) fn seal_payload(chain: u32, is_whole: bool, now: u64) -> [u8; 16] {
    let mut payload = [0; 16];
    payload[..4].copy_from_slice(&chain.to_le_bytes());
    payload[4..8].copy_from_slice(&u32::from(is_whole).to_le_bytes());
    payload[8..].copy_from_slice(&now.to_le_bytes());
    payload
}

/// Returns the zeros that follow so many bytes.
pub(crate) fn padding(bytes: usize) -> &'static [u8] {
    &[0; 8][..padded(bytes) - bytes]
}

/// Returns so many bytes and those of their padding.
pub(crate) const fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(8)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    match bytes[at..at + N].try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("a slice of N bytes is an array of N bytes"),
    }
}

/// Returns the name of the segment that begins with a sequence.
pub(crate) fn segment_name(base: u64) -> String {
    format!("{base:020}.elog")
}

/// Returns the sequence with which the segment of a name begins, if it is the name of one.
pub(crate) fn segment_base(name: &str) -> Option<u64> {
    sequence_in(name, ".elog")
}

/// Returns the name of that segment once it is compressed.
pub(crate) fn compressed_name(base: u64) -> String {
    format!("{base:020}.elog.zst")
}

/// Returns the sequence in such a name.
pub(crate) fn compressed_base(name: &str) -> Option<u64> {
    sequence_in(name, ".elog.zst")
}

/// Returns the name of the index of the segment that begins with a sequence.
pub(crate) fn index_name(base: u64) -> String {
    format!("{base:020}.idx")
}

/// Returns the sequence in such a name.
pub(crate) fn index_base(name: &str) -> Option<u64> {
    sequence_in(name, ".idx")
}

/// Returns the name of that index as long as it is not finished: those of two segments are never mixed.
pub(crate) fn new_index_name(base: u64) -> String {
    format!("{base:020}.idx.tmp")
}

/// Returns whether a name is such a one.
pub(crate) fn is_new_index(name: &str) -> bool {
    sequence_in(name, ".idx.tmp").is_some()
}

/// Returns the name of the empty file that says that all before a sequence was retired.
pub(crate) fn oldest_name(sequence: u64) -> String {
    format!("{sequence:020}.oldest")
}

/// Returns the sequence in such a name.
pub(crate) fn oldest_in(name: &str) -> Option<u64> {
    sequence_in(name, ".oldest")
}

fn sequence_in(name: &str, suffix: &str) -> Option<u64> {
    let digits = name.strip_suffix(suffix)?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| digits.parse().ok())?
        .filter(|base| *base < END)
}

#[cfg(test)]
mod tests {
    use super::{chained, crc32c, payload_crc};
    use proptest::collection::vec;
    use proptest::prelude::any;
    use proptest::{prop_assert_eq, proptest};

    /// Returns the CRC as its polynomial defines it, bit by bit.
    fn by_definition(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            let shift = |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
            (0..8).fold(crc ^ u32::from(*byte), shift)
        })
    }

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        let counted: Vec<u8> = (0..32).collect();
        let reversed: Vec<u8> = (0..32).rev().collect();
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&counted), 0x46dd_794e);
        assert_eq!(crc32c(&reversed), 0x113f_db5c);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        // The code that checksums differs by length, and where the bytes begin.
        #[test]
        fn checksums_of_any_bytes_are_those_of_the_definition(
            bytes in vec(any::<u8>(), 0..5_000),
            skipped in 0..64_usize,
            cut in any::<proptest::sample::Index>(),
        ) {
            let bytes = &bytes[skipped.min(bytes.len())..];
            prop_assert_eq!(crc32c(bytes), by_definition(bytes));
            let padded = [bytes, super::padding(bytes.len())].concat();
            let (one, other) = bytes.split_at(cut.index(bytes.len() + 1));
            prop_assert_eq!(payload_crc(&[one, other]), by_definition(&padded));
            prop_assert_eq!(payload_crc(&[bytes]), by_definition(&padded));
            if let Some((before, number)) = bytes.split_last_chunk() {
                let chain = chained(crc32c(before), u32::from_le_bytes(*number));
                prop_assert_eq!(chain, by_definition(bytes));
            }
        }
    }
}
