//! A random use of a log on a disk that notes each moment, and what a recovery after it is compared with.

use super::commit::Committed;
use super::compress::{compress, replace};
use super::error::StoreError;
use super::format::{Kind, OBJECT_HEAD, SEGMENT_HEADER, u32_at, u64_at};
use super::listing::{Listing, open_segment};
use super::log::{Limits, Log, Object};
use super::query::{Found, Indexes, LogQuery, Query};
use super::recovery::{Findings, Recovery, read_header};
use super::scan::Scan;
use super::sim::{Moment, Random, SimDisk};
use super::tenant::Tenant;
use crate::event::{EVENT_BYTES, Event};
use crate::event_type::EventType;
use crate::names::{SourceId, Symbol};
use parking_lot::{Mutex, MutexGuard};
use std::any::Any;
use std::sync::Arc;

pub(crate) fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// A record, as it was written and is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    Event(Event),
    Object(Vec<u8>),
    Gap(u64),
}

/// Opens the log for writing.
pub(crate) fn open_log(
    disk: &SimDisk,
    limits: Limits,
) -> Result<(Log<SimDisk>, Recovery), StoreError> {
    continue_log(disk, limits, Findings::of(disk)?)
}

fn continue_log(
    disk: &SimDisk,
    limits: Limits,
    findings: Findings,
) -> Result<(Log<SimDisk>, Recovery), StoreError> {
    let (continuation, recovery) = findings.mend(disk)?;
    Ok((Log::new(Arc::new(disk.clone()), limits, continuation), recovery))
}

/// Reads all records of a log that was recovered.
pub(super) fn read(disk: &SimDisk) -> Result<(u64, Vec<Record>), StoreError> {
    let mut records = Vec::new();
    let mut first = None;
    for base in Listing::of(disk)?.bases {
        let file = open_segment(disk, base)?;
        let name = file.name(base);
        let (_, header) = read_header(&file, &name)?;
        let Some(header) = header else { panic!("{name} has no header after a recovery") };
        first.get_or_insert(header.base);
        let mut scan = Scan::new(file, header.salt, SEGMENT_HEADER as u64, header.base);
        while let Some(frame) = scan.next().map_err(StoreError::io("reading", &name))? {
            match frame.header.kind {
                Kind::Events => records.extend(
                    frame
                        .payload
                        .as_chunks::<EVENT_BYTES>()
                        .0
                        .iter()
                        .map(|bytes| Record::Event(Event::from_bytes(*bytes))),
                ),
                Kind::Objects => {
                    let (heads, mut bodies) =
                        frame.payload.split_at(frame.header.count as usize * OBJECT_HEAD);
                    for head in heads.chunks_exact(OBJECT_HEAD) {
                        let (body, rest) = bodies.split_at(u32_at(head, 16) as usize);
                        records.push(Record::Object(body.to_vec()));
                        bodies = rest;
                    }
                }
                Kind::Gap => records.push(Record::Gap(u64_at(frame.payload, 0))),
                _ => {}
            }
        }
        assert!(scan.has_seal(), "{name} is not sealed after a recovery");
    }
    Ok((first.unwrap_or(0), records))
}

/// Returns what a query finds that wants everything below a sequence, which leaves out gaps.
pub(super) fn found_by_index(
    disk: &SimDisk,
    indexes: Indexes<SimDisk>,
    limit: u64,
) -> Result<Vec<(u64, Record)>, StoreError> {
    let (storage, indexes) = (Arc::new(disk.clone()), Arc::new(indexes));
    let mut query = LogQuery::new(storage, indexes, &Query::default(), limit)?;
    let mut records = Vec::new();
    while let Some(found) = query.next_found()? {
        match found {
            Found::Events(sequences, events) => {
                let events = events.iter().map(|event| Record::Event(*event));
                records.extend(sequences.iter().copied().zip(events));
            }
            Found::Objects(objects) => {
                let of = |(sequence, object): &(u64, Object<'_>)| {
                    (*sequence, Record::Object(object.bytes.to_vec()))
                };
                records.extend(objects.iter().map(of));
            }
        }
    }
    Ok(records)
}

/// Writes down what somebody was told to be durable.
#[derive(Clone)]
pub(super) struct Witness {
    disk: SimDisk,
    /// The disk says so too before anybody is told, of what was written since it was opened.
    pub(super) is_double: bool,
    opened: u64,
}

impl Witness {
    fn confirm(&self, upto: u64) {
        if upto > self.opened {
            self.disk.confirm(upto);
        }
    }
}

impl Tenant for Witness {
    fn durable(&self, upto: u64) {
        self.disk.acknowledge(upto);
        if self.is_double {
            self.confirm(upto);
        }
    }

    fn close(&self) {}

    fn leave_to_parent(&self) {}

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// A random use of a log, which waits for a marker or does not, on a disk that notes each moment.
pub(super) struct Workload {
    pub(super) random: Random,
    pub(super) committed: Arc<Committed<SimDisk>>,
    disk: SimDisk,
    pub(super) witness: Witness,
    pub(super) records: Vec<Record>,
    /// Records below may be retired.
    pub(super) retired: u64,
    symbol: Symbol,
}

impl Workload {
    pub(super) fn new(disk: SimDisk, log: Log<SimDisk>, records: Vec<Record>, seed: u64) -> Self {
        let symbol = Symbol::new("BTCUSDT").unwrap_or(Symbol::NONE);
        let mut random = Random(seed);
        let is_double = random.once_in(3);
        let witness = Witness { disk: disk.clone(), is_double, opened: log.durable() };
        let committed = Arc::new(Committed::new(log, is_double));
        let told = committed.tenancy().get_or_make::<()>(|| Ok(Arc::new(witness.clone())));
        assert!(told.is_ok(), "nothing else stands on the log");
        Self { random, committed, disk, witness, records, retired: 0, symbol }
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log<SimDisk>> {
        self.committed.log()
    }

    /// Returns what a recovery is compared with once so many records were acknowledged and confirmed.
    pub(super) fn written(&self, acknowledged: u64, confirmed: u64) -> Written<'_> {
        Written { records: &self.records, acknowledged, confirmed, retired: self.retired }
    }

    /// Returns what a recovery is compared with at a moment.
    pub(super) fn written_at(&self, moment: &Moment) -> Written<'_> {
        self.written(moment.acknowledged, moment.confirmed)
    }

    fn event(&mut self) -> Event {
        Event {
            timestamp: self.records.len() as u64,
            event_type: EventType::PriceUpdate,
            symbol: self.symbol,
            value: 1.0,
            metadata: self.random.next(),
            source_id: SourceId::NONE,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// Does one thing, and acknowledges what is durable then.
    pub(super) fn step(&mut self) -> Result<(), StoreError> {
        match self.random.below(25) {
            0..6 => {
                let count = 1 + self.random.below(5);
                self.append(count)?;
            }
            // Written without a stay in memory.
            6 => self.append(256)?,
            7..10 => self.object()?,
            10..12 => self.log().flush()?,
            12..16 => {
                let next = self.log().next();
                self.commit(next)?;
            }
            // Others need only a part of it.
            16 => {
                let next = self.log().next();
                let upto = self.random.below(next + 1);
                self.commit(upto)?;
            }
            17 => _ = self.log().mark()?,
            18 => {
                let missed = 1 + self.random.below(100);
                self.log().append_gap(missed, true)?;
                self.records.push(Record::Gap(missed));
            }
            19 => self.retire()?,
            20 => self.compress()?,
            // The committer has waited long enough for another commit.
            21 if self.committed.is_unconfirmed() => self.while_others_append(Committed::settle)?,
            22 => self.idle()?,
            23 => self.query()?,
            _ => {
                if self.random.once_in(3) {
                    self.committed.seal()?;
                }
            }
        }
        self.witness.durable(self.committed.durable());
        Ok(())
    }

    fn commit(&mut self, upto: u64) -> Result<(), StoreError> {
        self.while_others_append(|committed| committed.commit(upto))?;
        assert!(self.committed.durable() >= upto, "a commit that ended is none");
        Ok(())
    }

    /// Does all that the committer does as long as nobody comes any more.
    pub(super) fn idle(&mut self) -> Result<(), StoreError> {
        loop {
            let next = self.log().next();
            if self.committed.durable() < next {
                self.commit(next)?;
            } else if self.committed.is_unconfirmed() {
                self.while_others_append(Committed::settle)?;
            } else {
                self.witness.confirm(next);
                return Ok(());
            }
        }
    }

    /// Makes a call that waits for the disk; sometimes others append meanwhile.
    fn while_others_append(
        &mut self,
        call: impl FnOnce(&Committed<SimDisk>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let appended = Arc::new(Mutex::new(None));
        let events = [self.event(), self.event()];
        if self.random.once_in(3) {
            let (syncs, is_flushed) = (self.random.below(2), self.random.once_in(2));
            let (committed, witness) = (self.committed.clone(), self.witness.clone());
            let appended = appended.clone();
            self.disk.do_while_syncing(syncs, move || {
                witness.durable(committed.durable());
                let mut log = committed.log();
                let first = log.append_events(&events);
                let flushed = if is_flushed { log.flush() } else { Ok(()) };
                *appended.lock() = Some((first, flushed));
            });
        }
        let called = call(&self.committed);
        self.disk.do_nothing_while_syncing();
        if let Some((first, flushed)) = appended.lock().take() {
            if first.is_ok() {
                self.records.extend(events.map(Record::Event));
            }
            return called.and(first.map(|_| ())).and(flushed);
        }
        called
    }

    /// Retires some of what there is, while others append.
    fn retire(&mut self) -> Result<(), StoreError> {
        let upto = self.random.below(self.records.len() as u64 + 1);
        self.retired = self.retired.max(upto);
        let job = self.log().begin_retire(upto)?;
        if let Some(job) = job {
            let appended = self.append(2).and_then(|()| self.log().flush());
            let result = job.run();
            self.log().end_retire(&job, result)?;
            appended?;
        }
        Ok(())
    }

    /// Compresses the first segment that is not, while others append.
    fn compress(&mut self) -> Result<(), StoreError> {
        let finished = self.log().finished();
        let Some(segment) = finished.iter().find(|segment| !segment.is_compressed) else {
            return Ok(());
        };
        let bytes = compress(&self.disk, segment.base)?;
        self.append(2)?;
        self.log().flush()?;
        let result = replace(&self.disk, segment.base);
        self.log().end_replace(segment.base, bytes, result)
    }

    /// Reads what there is by its indexes, and keeps those of finished segments.
    fn query(&mut self) -> Result<(), StoreError> {
        let (first, written) = {
            let log = self.log();
            (log.oldest() as usize, log.written())
        };
        // It reads all there is, which would be most of the time of a long workload.
        if written as usize - first > 200 {
            return Ok(());
        }
        let mut found = found_by_index(&self.disk, Indexes::kept(), written)?;
        let records = self.records.iter().enumerate().skip(first);
        let wanted = records.take(written as usize - first);
        found.reverse();
        for (sequence, record) in wanted.filter(|(_, record)| !matches!(record, Record::Gap(_))) {
            let expected = Some((sequence as u64, record.clone()));
            assert_eq!(found.pop(), expected, "a query finds what was written");
        }
        assert_eq!(found, [], "a query finds nothing else");
        Ok(())
    }

    pub(super) fn object(&mut self) -> Result<(), StoreError> {
        let mut bytes = vec![0; self.random.below(120) as usize];
        bytes.fill_with(|| self.random.next() as u8);
        let object = Object {
            timestamp: 1,
            topic: Some("fills"),
            schema: "Fill",
            version: 1,
            bytes: &bytes,
            is_replayed: false,
        };
        self.log().append_object(&object)?;
        self.records.push(Record::Object(bytes));
        Ok(())
    }

    pub(super) fn append(&mut self, count: u64) -> Result<(), StoreError> {
        let events: Vec<_> = (0..count).map(|_| self.event()).collect();
        let first = self.log().append_events(&events)?;
        assert_eq!(first, self.records.len() as u64, "sequences have no gaps");
        self.records.extend(events.into_iter().map(Record::Event));
        Ok(())
    }
}

pub(super) fn limits(random: &mut Random) -> Limits {
    Limits { segment_bytes: SEGMENT_HEADER as u64 + 300 + random.below(1500), max_bytes: None }
}

/// Why a recovery is wrong.
pub(super) type Wrong = String;

/// What a recovery is compared with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written<'a> {
    pub(super) records: &'a [Record],
    pub(super) acknowledged: u64,
    /// The disk says of those below that they were.
    pub(super) confirmed: u64,
    /// Records below may be gone.
    pub(super) retired: u64,
}

/// Recovers a crashed disk and compares it with what was written. Returns the log and where it
/// ends.
pub(super) fn check(
    disk: &SimDisk,
    limits: Limits,
    written: Written<'_>,
) -> Result<(Log<SimDisk>, usize), Wrong> {
    let Written { records: written, acknowledged, confirmed, retired } = written;
    let false_alarm = |error: StoreError| format!("false alarm: {error}");
    let findings = Findings::of(disk).map_err(false_alarm)?;
    if findings.durable < confirmed {
        return Err(format!("says only of {} of {confirmed} that they were", findings.durable));
    }
    let log = continue_log(disk, limits, findings).map_err(false_alarm)?.0;
    let (first, records) = read(disk).map_err(|error| format!("unreadable: {error}"))?;
    if first > retired {
        return Err(format!("begins with {first}"));
    }
    let end = first + records.len() as u64;
    if end < acknowledged {
        return Err(format!("lost {} of {acknowledged} acknowledged", acknowledged - end));
    }
    if written.get(first as usize..end as usize) != Some(&records) {
        return Err(format!("{} records are not what was written", records.len()));
    }
    if log.next() != end {
        return Err(format!("goes on with {} after {end}", log.next()));
    }
    Ok((log, end as usize))
}
