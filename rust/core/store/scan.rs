//! Frames of a segment, read one after another and checked.

use super::format::{
    FRAME_HEADER, FrameHeader, Kind, SEGMENT_HEADER, SegmentHeader, chained, payload_crc, u32_at,
};
use super::mutants::{Mutant, is_broken};
use super::storage::{ReadAt, read_all, uninterrupted};
use std::io;

/// Bytes that are read at once: they stay in a core's cache until they are looked at.
const READ: usize = if cfg!(any(test, tickbus_fuzz)) { 8 * 1024 } else { 128 * 1024 };

/// A valid frame.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) header: FrameHeader,
    /// Without padding, as it is in the file; aligned to 8 bytes.
    pub(crate) payload: &'a mut [u8],
}

/// Reads the frames of one segment in order.
#[derive(Debug)]
pub(crate) struct Scan<F> {
    file: F,
    salt: u32,
    /// Of the next frame.
    offset: u64,
    sequence: u64,
    /// Not known where frames before were not read.
    chain: Option<u32>,
    /// The largest watermark of the frames so far.
    durable: u64,
    has_seal: bool,
    /// The seal is whole and counts other frames than there are.
    is_contradicted: bool,
    /// The frame that was read last, whose payload is in the buffer still.
    last: Option<(u64, FrameHeader)>,
    /// In words, so that events in it are aligned.
    buffer: Vec<u64>,
    /// Which part of the file the buffer holds.
    from: u64,
    filled: usize,
}

impl<F: ReadAt> Scan<F> {
    /// Returns a scan of the frames from `offset` on, the first of which has this sequence.
    pub(crate) fn new(file: F, salt: u32, offset: u64, sequence: u64) -> Self {
        let chain = (offset == SEGMENT_HEADER as u64).then_some(0);
        let (durable, has_seal, is_contradicted) = (0, false, false);
        let last = None;
        let (buffer, from, filled) = (vec![0; READ / 8], offset, 0);
        Self {
            file,
            salt,
            offset,
            sequence,
            chain,
            durable,
            has_seal,
            is_contradicted,
            last,
            buffer,
            from,
            filled,
        }
    }

    /// Returns where the next frame would begin, in bytes.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the sequence that the next frame would have.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Goes on at another frame of the segment.
    pub(crate) fn seek(&mut self, offset: u64, sequence: u64) {
        let is_near = (self.from..self.from + self.filled as u64).contains(&offset);
        (self.offset, self.sequence, self.has_seal) = (offset, sequence, false);
        (self.chain, self.last) = (None, None);
        if !is_near {
            self.forget();
        }
    }

    /// Returns the chain of the frames so far, without the seal, if all were read.
    pub(crate) fn chain(&self) -> Option<u32> {
        self.chain
    }

    /// Returns below which sequence all was durable, as the frames so far say.
    pub(crate) fn durable(&self) -> u64 {
        self.durable
    }

    /// Returns whether the last frame was a seal.
    pub(crate) fn has_seal(&self) -> bool {
        self.has_seal
    }

    /// Returns whether it ended before a seal that is whole and counts other frames than there are,
    /// which no crash leaves behind.
    pub(crate) fn is_contradicted(&self) -> bool {
        self.is_contradicted
    }

    pub(crate) fn file(&self) -> &F {
        &self.file
    }

    /// Returns the next frame; `None` if there is no valid one, in which case it can be asked again
    /// later.
    pub(crate) fn next(&mut self) -> io::Result<Option<Frame<'_>>> {
        let Some(header) = self.header_or_later()? else { return Ok(None) };
        self.last = Some((self.offset, header));
        self.offset += (FRAME_HEADER + header.padded_bytes()) as u64;
        self.sequence += u64::from(header.count);
        self.durable = self.durable.max(header.durable);
        match header.kind {
            Kind::Seal => self.has_seal = true,
            _ => self.chain = self.chain.map(|chain| chained(chain, header.crc)),
        }
        Ok(self.last())
    }

    /// Returns the frame that `next` returned last.
    pub(crate) fn last(&mut self) -> Option<Frame<'_>> {
        let (offset, header) = self.last?;
        let at = (offset - self.from) as usize + FRAME_HEADER;
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        Some(Frame { header, payload: &mut buffer[at..at + header.payload_bytes as usize] })
    }

    /// Reads on until there is no valid frame.
    pub(crate) fn run_out(&mut self) -> io::Result<()> {
        while self.next()?.is_some() {}
        Ok(())
    }

    #[inline(always)]
    fn header_or_later(&mut self) -> io::Result<Option<FrameHeader>> {
        let header = self.header()?;
        if header.is_none() && is_broken(Mutant::SkipsHoles) {
            return self.header_behind_hole();
        }
        Ok(header)
    }

    #[cold]
    fn header_behind_hole(&mut self) -> io::Result<Option<FrameHeader>> {
        let (offset, sequence) = (self.offset, self.sequence);
        while !self.has_seal && self.fill(FRAME_HEADER)? {
            self.offset += 8;
            self.sequence = match FrameHeader::decode(self.bytes()) {
                Some(header) if header.salt == self.salt => header.sequence,
                _ => continue,
            };
            if let Some(header) = self.header()? {
                return Ok(Some(header));
            }
        }
        (self.offset, self.sequence) = (offset, sequence);
        self.forget();
        Ok(None)
    }

    /// Returns the header of the frame at the offset, which is in the buffer then, if it is valid.
    fn header(&mut self) -> io::Result<Option<FrameHeader>> {
        if self.has_seal || !self.fill(FRAME_HEADER)? {
            return Ok(None);
        }
        let Some(header) = FrameHeader::decode(self.bytes()) else { return Ok(None) };
        let is_mine = header.salt == self.salt || is_broken(Mutant::NoSaltCheck);
        let is_next = header.sequence == self.sequence || is_broken(Mutant::NoSequenceCheck);
        if !is_mine || !is_next || !self.fill(FRAME_HEADER + header.padded_bytes())? {
            return Ok(None);
        }
        let payload = &self.bytes()[FRAME_HEADER..];
        let padded = &payload[..header.padded_bytes()];
        let is_whole = payload_crc(&[padded]) == header.payload_crc;
        let payload = &padded[..header.payload_bytes as usize];
        let is_valid = (is_whole || is_broken(Mutant::NoPayloadCrc)) && header.describes(payload);
        let is_other = |chain| header.kind == Kind::Seal && u32_at(payload, 0) != chain;
        if is_valid && self.chain.is_some_and(is_other) {
            self.is_contradicted = true;
            return Ok(None);
        }
        Ok(is_valid.then_some(header))
    }

    /// Returns what is in the buffer from the offset on.
    fn bytes(&self) -> &[u8] {
        let at = (self.offset - self.from) as usize;
        &bytemuck::cast_slice(&self.buffer)[at..self.filled]
    }

    /// Sees to so many bytes from the offset on in the buffer; false if the file ends before.
    #[inline]
    fn fill(&mut self, bytes: usize) -> io::Result<bool> {
        match (self.offset - self.from) as usize + bytes <= self.filled {
            true => Ok(true),
            false => self.read_on(bytes),
        }
    }

    #[cold]
    fn read_on(&mut self, bytes: usize) -> io::Result<bool> {
        let at = (self.offset - self.from) as usize;
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        // What is read at an unfinished end may be different the next time.
        let kept = self.filled.saturating_sub(at);
        buffer.copy_within(at.min(self.filled)..self.filled, 0);
        (self.from, self.filled, self.last) = (self.offset, kept, None);
        if self.buffer.len() * 8 < bytes {
            self.buffer.resize(bytes.next_multiple_of(READ) / 8, 0);
        }
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut self.buffer);
        self.filled += read_all(&self.file, &mut buffer[kept..], self.from + kept as u64)?;
        Ok(bytes <= self.filled)
    }

    /// Forgets what was read ahead, for a file that is being written.
    pub(crate) fn forget(&mut self) {
        (self.from, self.filled, self.last) = (self.offset, 0, None);
    }
}

/// Returns where, from `offset` on, the first header of a frame is that is whole and `is_wanted`, where
/// frames have this salt if it is known.
pub(crate) fn next_header(
    file: &impl ReadAt,
    salt: Option<u32>,
    mut offset: u64,
    is_wanted: impl Fn(u64, &FrameHeader) -> bool,
) -> io::Result<Option<(u64, FrameHeader)>> {
    let mut buffer = vec![0; READ];
    loop {
        let filled = read_all(file, &mut buffer, offset)?;
        for at in (0..(filled + 1).saturating_sub(FRAME_HEADER)).step_by(8) {
            if let Some(header) = frame_of(salt, &buffer[at..at + FRAME_HEADER])
                && is_wanted(offset + at as u64, &header)
            {
                return Ok(Some((offset + at as u64, header)));
            }
        }
        if filled < READ {
            return Ok(None);
        }
        offset += ACROSS;
    }
}

/// A header may stand across the end of what is read at once: what is read next begins before it.
const ACROSS: u64 = ((READ - FRAME_HEADER) / 8 * 8) as u64;

/// What stands behind a place without a valid frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tail {
    /// The largest watermark in a frame's header that is whole.
    pub(crate) durable: u64,
    /// Where the last of those frames ends, as a sequence.
    pub(crate) end: u64,
    /// Bytes of what was written there, as far as that can be told from what the file held before.
    pub(crate) bytes: u64,
}

impl Tail {
    /// Returns what is in a file from an offset on, behind the record before `sequence`; its header is
    /// not known where it is damaged.
    pub(crate) fn of(
        file: &impl ReadAt,
        header: Option<&SegmentHeader>,
        from: u64,
        sequence: u64,
    ) -> io::Result<Self> {
        let salt = header.map(|header| header.salt);
        let mut tail = Self::default();
        // Where all that is not zero ends, and the frames that can have been written there.
        let (mut filled_end, mut frames_end) = (from, from);
        let mut is_reused = header.is_some_and(|header| header.is_reused);
        let mut buffer = vec![0; READ];
        let mut offset = from;
        // What was reserved and never written needs not be read to be known for zeros. A header may
        // begin there.
        while let Some(data) = uninterrupted(|| file.data_from(offset))? {
            offset = offset.max(data.saturating_sub(FRAME_HEADER as u64) / 8 * 8);
            let filled = read_all(file, &mut buffer, offset)?;
            if !is_zero(&buffer[..filled])
                && let Some(last) = buffer[..filled].iter().rposition(|byte| *byte != 0)
            {
                filled_end = offset + last as u64 + 1;
                for at in (0..(filled + 1).saturating_sub(FRAME_HEADER)).step_by(8) {
                    let Some(found) = frame_of(salt, &buffer[at..at + FRAME_HEADER]) else {
                        continue;
                    };
                    tail.durable = tail.durable.max(found.durable);
                    tail.end = tail.end.max(found.sequence.saturating_add(found.count.into()));
                    if found.sequence >= sequence {
                        let end = offset + (at + FRAME_HEADER + found.padded_bytes()) as u64;
                        frames_end = frames_end.max(end);
                    } else {
                        // Of a segment that the file was before, where its own header does not say so.
                        is_reused |= header.is_none();
                    }
                }
            }
            if filled < READ {
                break;
            }
            offset += ACROSS;
        }
        tail.bytes = if is_reused { frames_end } else { filled_end } - from;
        Ok(tail)
    }
}

/// Returns the header with these bytes, if they are that of a frame with this salt.
#[inline]
fn frame_of(salt: Option<u32>, bytes: &[u8]) -> Option<FrameHeader> {
    let found = FrameHeader::salt_of(bytes);
    let is_mine = found != 0 && salt.is_none_or(|salt| salt == found);
    is_mine.then(|| FrameHeader::decode(bytes)).flatten()
}

/// Returns whether there are only zeros, many of them looked at at once.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::super::format::{FRAME_HEADER, FrameHeader, Kind, SegmentHeader};
    use super::super::storage::{ReadAt, StorageFile};
    use super::{ACROSS, Tail};
    use std::fs::File;
    use std::io::{self, IoSlice};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A file, and how many bytes of it were read.
    struct Counted<'a> {
        file: &'a File,
        knows_holes: bool,
        read: AtomicU64,
    }

    impl<'a> Counted<'a> {
        fn new(file: &'a File, knows_holes: bool) -> Self {
            Self { file, knows_holes, read: AtomicU64::new(0) }
        }
    }

    impl ReadAt for Counted<'_> {
        fn len(&self) -> io::Result<u64> {
            ReadAt::len(self.file)
        }

        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let count = ReadAt::read_at(self.file, buffer, offset)?;
            self.read.fetch_add(count as u64, Ordering::Relaxed);
            Ok(count)
        }

        fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
            if self.knows_holes { self.file.data_from(offset) } else { Ok(Some(offset)) }
        }
    }

    #[test]
    fn what_was_never_written_is_not_read_and_nothing_behind_it_is_missed() {
        const RESERVED: u64 = 4 << 20;
        const SALT: u32 = 7;
        let header = SegmentHeader {
            log: 1,
            number: 0,
            base: 0,
            durable: 0,
            oldest: 0,
            created: 0,
            salt: SALT,
            chain: 0,
            is_reused: false,
        };
        let mut skipped = 0;
        // At the edges of pages, and of what is read at once.
        for at in
            [4096, 8192 - 16, 12_288 - FRAME_HEADER as u64, 1 << 20, 4096 + ACROSS, RESERVED - 40]
        {
            let file = tempfile::tempfile().expect("there is a folder for temporary files");
            file.allocate(RESERVED).expect("there is room");
            file.set_len(RESERVED).expect("there is room");
            let frame = FrameHeader {
                crc: 0,
                payload_bytes: 0,
                sequence: 3,
                durable: at,
                count: 0,
                salt: SALT,
                kind: Kind::Marker,
                payload_crc: 0,
            };
            file.write_at(&[IoSlice::new(&frame.encode())], at).expect("there is room");
            let (all, data) = (Counted::new(&file, false), Counted::new(&file, true));
            let tail = Tail::of(&data, Some(&header), 4096, 0).expect("it can be read");
            assert_eq!((tail.durable, tail.end), (at, 3));
            assert_eq!(tail, Tail::of(&all, Some(&header), 4096, 0).expect("it can be read"));
            skipped += all.read.into_inner() - data.read.into_inner();
        }
        let new = tempfile::tempfile().expect("there is a folder for temporary files");
        new.set_len(RESERVED).expect("there is room");
        if new.data_from(0).expect("it can be asked").is_none() {
            assert!(skipped > RESERVED, "only {skipped} bytes were not read");
        }
    }
}
