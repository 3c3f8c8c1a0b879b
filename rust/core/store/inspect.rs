//! What is in the files of a log, as docs/format.md describes them, for people who look into one.

use super::error::StoreError;
use super::format::{Kind, SEGMENT_HEADER, index_name};
use super::index::{Finished, Lines};
use super::listing::{Listing, open_segment, stored_bytes};
use super::recovery::read_header;
use super::scan::Scan;
use super::storage::{Storage, uninterrupted};

/// A segment as it is found, which may be torn or damaged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SegmentReport {
    /// The file.
    pub name: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes up to the end of the last frame that is whole, as they are when it is not compressed.
    pub whole_bytes: u64,
    /// The sequence of the first record.
    pub base: u64,
    /// The sequence after the last record that is whole.
    pub next_sequence: u64,
    /// Whether it ends with its seal.
    pub is_sealed: bool,
    /// The identity of its log; 0 where its header is damaged.
    pub log: u128,
    /// Its number in the log, from 0.
    pub number: u64,
    /// When it began: nanoseconds since the Unix epoch, UTC; 0 where its header is damaged.
    pub created: u64,
    /// Records below were durable, as it says.
    pub durable: u64,
    /// Events.
    pub events: u64,
    /// Objects.
    pub objects: u64,
    /// Notes of events that were lost.
    pub gaps: u64,
    /// Frames of any kind.
    pub frames: u64,
    /// Bytes of its index; 0 if it has none that fits.
    pub index_bytes: u64,
}

/// Looks at every segment, in order.
pub(crate) fn inspect<S: Storage>(storage: &S) -> Result<Vec<SegmentReport>, StoreError> {
    Listing::of(storage)?.bases.into_iter().map(|base| inspect_one(storage, base)).collect()
}

fn inspect_one<S: Storage>(storage: &S, base: u64) -> Result<SegmentReport, StoreError> {
    let file = open_segment(storage, base)?;
    let name = file.name(base);
    let (_, header) = read_header(&file, &name)?;
    let bytes = stored_bytes(storage, base)?;
    let mut report =
        SegmentReport { name, bytes, base, next_sequence: base, ..SegmentReport::default() };
    let Some(header) = header else { return Ok(report) };
    (report.log, report.number, report.created) = (header.log, header.number, header.created);
    let mut scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, base);
    let mut lines = Lines::default();
    loop {
        let offset = scan.offset();
        let frame = scan.next().map_err(StoreError::io("reading", &report.name))?;
        let Some(frame) = frame else { break };
        lines.take(offset, &frame);
        let records = u64::from(frame.header.count);
        report.frames += 1;
        match frame.header.kind {
            Kind::Events => report.events += records,
            Kind::Objects => report.objects += records,
            Kind::Gap => report.gaps += records,
            _ => {}
        }
    }
    report.durable = header.durable.max(scan.durable());
    report.next_sequence = scan.sequence();
    report.whole_bytes = scan.offset();
    report.is_sealed = scan.has_seal();
    let of = Finished::scanned(&header, &scan);
    if of.is_some_and(|of| lines.are_kept(storage, &of)) {
        let name = index_name(base);
        let bytes = uninterrupted(|| storage.len(&name));
        report.index_bytes = bytes.map_err(StoreError::io("measuring", &name))?;
    }
    Ok(report)
}
