//! Segments at rest: all bytes of a sealed segment, compressed, in the seekable format of zstd, which
//! `zstd -d` and other readers of it know.
//!
//! Reading one gives the bytes of the segment, so that whoever reads a log needs not know how its
//! segments are stored. What cannot be decompressed reads as zeros, which are no valid frame.

use super::format::{compressed_name, segment_name, u32_at};
use super::storage::{ReadAt, StorageFile, read_all, uninterrupted, write_all};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::io::{self, IoSlice};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

/// Bytes of the segment in a block, which is decompressed as a whole; the last one has the rest.
pub(super) const BLOCK: usize = if cfg!(any(test, tickbus_fuzz)) { 4 << 10 } else { 256 << 10 };
/// As good as it gets before it is much slower.
const LEVEL: i32 = 3;

/// What the table of blocks begins with, which decompressors skip, and what it ends with.
const SKIPPABLE: u32 = 0x184d_2a5e;
const SEEKABLE: u32 = 0x8f92_eab1;
/// Bytes of the table's header, of an entry, and of its footer.
const TABLE_HEADER: usize = 8;
const ENTRY: usize = 8;
const FOOTER: usize = 9;

/// The file of a segment, to be read.
#[derive(Debug)]
pub(crate) enum SegmentFile<F> {
    Plain(F),
    Compressed(CompressedFile<F>),
}

/// A compressed segment.
pub(crate) struct CompressedFile<F> {
    file: F,
    /// Where each block begins in the file, and where the last one ends. None if that is not known.
    offsets: Vec<u64>,
    /// Of the segment.
    bytes: u64,
    last: Mutex<Decompressed>,
}

thread_local! {
    /// What a thread decompresses with: its 100 KB are no part of each file.
    static DECOMPRESSOR: io::Result<RefCell<Decompressor<'static>>> =
        Decompressor::new().map(RefCell::new);
}

/// The block that was read last.
#[derive(Default)]
struct Decompressed {
    compressed: Vec<u8>,
    block: Option<usize>,
    bytes: Vec<u8>,
}

impl<F> std::fmt::Debug for CompressedFile<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompressedFile").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl<F: ReadAt> SegmentFile<F> {
    /// Returns whether it is compressed, and so was durable as a whole before it was.
    pub(crate) fn is_compressed(&self) -> bool {
        matches!(self, Self::Compressed(_))
    }

    /// Returns the name of the file of the segment that begins with a sequence.
    pub(crate) fn name(&self, base: u64) -> String {
        match self {
            Self::Plain(_) => segment_name(base),
            Self::Compressed(_) => compressed_name(base),
        }
    }
}

impl<F: ReadAt> ReadAt for SegmentFile<F> {
    fn len(&self) -> io::Result<u64> {
        match self {
            Self::Plain(file) => file.len(),
            Self::Compressed(compressed) => Ok(compressed.bytes),
        }
    }

    #[inline]
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::Plain(file) => file.read_at(buffer, offset),
            Self::Compressed(compressed) => compressed.read_at(buffer, offset),
        }
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        match self {
            Self::Plain(file) => file.data_from(offset),
            Self::Compressed(_) => Ok(Some(offset)),
        }
    }
}

impl<F: ReadAt> CompressedFile<F> {
    /// Returns what reads a file; where its table is damaged, it has no bytes.
    pub(crate) fn new(file: F) -> io::Result<Self> {
        let (offsets, bytes) = read_table(&file)?.unwrap_or_default();
        Ok(Self { file, offsets, bytes, last: Mutex::default() })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.bytes.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (block, at) = ((offset / BLOCK as u64) as usize, (offset % BLOCK as u64) as usize);
        if left == 0 {
            return Ok(0);
        }
        let mut last = self.last.lock();
        if last.block != Some(block) {
            last.block = None;
            self.decompress(block, &mut last)?;
            last.block = Some(block);
        }
        let there = &last.bytes[at..];
        let count = left.min(there.len());
        buffer[..count].copy_from_slice(&there[..count]);
        Ok(count)
    }

    /// Decompresses a block, or makes zeros of it.
    fn decompress(&self, block: usize, into: &mut Decompressed) -> io::Result<()> {
        let Decompressed { compressed, bytes, .. } = into;
        let (from, end) = (self.offsets[block], self.offsets[block + 1]);
        let wanted = (self.bytes - (block * BLOCK) as u64).min(BLOCK as u64) as usize;
        compressed.resize((end - from) as usize, 0);
        let filled = read_all(&self.file, compressed, from)?;
        bytes.clear();
        bytes.reserve(wanted);
        let count = DECOMPRESSOR.with(|decompressor| match decompressor {
            Ok(decompressor) => {
                let mut decompressor = decompressor.borrow_mut();
                Ok(decompressor.decompress_to_buffer(&compressed[..filled], bytes).ok())
            }
            Err(error) => Err(io::Error::from(error.kind())),
        })?;
        if count != Some(wanted) {
            bytes.clear();
            bytes.resize(wanted, 0);
        }
        Ok(())
    }
}

/// Returns where the blocks of a file are and the bytes that they have together, if the table at its
/// end is whole.
fn read_table(file: &impl ReadAt) -> io::Result<Option<(Vec<u64>, u64)>> {
    let bytes = uninterrupted(|| file.len())?;
    let mut footer = [0; FOOTER];
    let Some(at) = bytes.checked_sub(FOOTER as u64) else { return Ok(None) };
    let filled = read_all(file, &mut footer, at)?;
    let (blocks, flags) = (u32_at(&footer, 0) as usize, footer[4]);
    if filled < FOOTER || u32_at(&footer, 5) != SEEKABLE || flags != 0 || blocks == 0 {
        return Ok(None);
    }
    let table_bytes = blocks.saturating_mul(ENTRY).saturating_add(TABLE_HEADER + FOOTER);
    let Some(at) = bytes.checked_sub(table_bytes as u64) else { return Ok(None) };
    let mut table = vec![0; table_bytes];
    let filled = read_all(file, &mut table, at)?;
    let is_table = u32_at(&table, 0) == SKIPPABLE
        && u32_at(&table, 4) as usize == table_bytes - TABLE_HEADER
        && filled == table_bytes;
    if !is_table {
        return Ok(None);
    }
    let entries = table[TABLE_HEADER..table_bytes - FOOTER].chunks_exact(ENTRY);
    let mut offsets = vec![0];
    let (mut offset, mut decompressed) = (0, 0);
    for (number, entry) in entries.enumerate() {
        let (stored, held) = (u64::from(u32_at(entry, 0)), u32_at(entry, 4) as usize);
        let is_right =
            if number + 1 < blocks { held == BLOCK } else { (1..=BLOCK).contains(&held) };
        offset += stored;
        if !is_right || stored > zstd_safe::compress_bound(BLOCK) as u64 {
            return Ok(None);
        }
        offsets.push(offset);
        decompressed += held as u64;
    }
    Ok((offset == at).then_some((offsets, decompressed)))
}

/// Writes blocks and their table, and returns the bytes of both.
pub(super) fn write_blocks(file: &impl ReadAt, into: &impl StorageFile) -> io::Result<u64> {
    let mut compressor = Compressor::new(LEVEL)?;
    let mut block = vec![0; BLOCK];
    let mut compressed = Vec::with_capacity(zstd_safe::compress_bound(BLOCK));
    let mut table = Vec::from(SKIPPABLE.to_le_bytes());
    table.extend([0; 4]);
    let (mut read, mut written) = (0, 0);
    loop {
        let filled = read_all(file, &mut block, read)?;
        if filled == 0 {
            break;
        }
        compressor.compress_to_buffer(&block[..filled], &mut compressed)?;
        write_all(into, &mut [IoSlice::new(&compressed)], written)?;
        read += filled as u64;
        written += compressed.len() as u64;
        table.extend((compressed.len() as u32).to_le_bytes());
        table.extend((filled as u32).to_le_bytes());
    }
    let blocks = (table.len() - TABLE_HEADER) / ENTRY;
    table.extend((blocks as u32).to_le_bytes());
    table.push(0);
    table.extend(SEEKABLE.to_le_bytes());
    let bytes = (table.len() - TABLE_HEADER) as u32;
    table[4..TABLE_HEADER].copy_from_slice(&bytes.to_le_bytes());
    write_all(into, &mut [IoSlice::new(&table)], written)?;
    Ok(written + table.len() as u64)
}
