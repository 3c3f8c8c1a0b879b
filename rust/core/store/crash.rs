//! Power cuts, one by one: whatever a disk has kept of what was not synced, what was acknowledged is
//! there, nothing else is, and nothing is called damaged that is not.

use super::commit::Committed;
use super::compressed::{compress, replace};
use super::error::StoreError;
use super::format::{Kind, OBJECT_HEAD, SEGMENT_HEADER, u32_at, u64_at};
use super::listing::{Listing, SPARE, open_segment};
use super::log::{Limits, Log, Object};
use super::query::{Found, Indexes, LogQuery, Query};
use super::recovery::{Findings, Recovery, read_header};
use super::salvage::Survey;
use super::scan::Scan;
use super::sim::{Calls, Fault, Moment, Random, SimDisk};
use super::storage::Storage;
use super::tenant::Tenant;
use super::verify::verify;
use crate::event::{EVENT_BYTES, Event};
use crate::event_type::EventType;
use crate::names::{SourceId, Symbol};
use parking_lot::{Mutex, MutexGuard};
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
fn found_by_index(
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
struct Witness {
    disk: SimDisk,
    /// The disk says so too before anybody is told, of what was written since it was opened.
    is_double: bool,
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
    committed: Arc<Committed<SimDisk>>,
    disk: SimDisk,
    witness: Witness,
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
    fn written(&self, acknowledged: u64, confirmed: u64) -> Written<'_> {
        Written { records: &self.records, acknowledged, confirmed, retired: self.retired }
    }

    /// Returns what a recovery is compared with at a moment.
    fn written_at(&self, moment: &Moment) -> Written<'_> {
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
    fn idle(&mut self) -> Result<(), StoreError> {
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

fn limits(random: &mut Random) -> Limits {
    Limits { segment_bytes: SEGMENT_HEADER as u64 + 300 + random.below(1500), max_bytes: None }
}

/// What was tried.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tried {
    points: u64,
    states: u64,
    double: u64,
}

/// Why a recovery is wrong.
pub(super) type Wrong = String;

/// What a recovery is compared with.
#[derive(Debug, Clone, Copy)]
struct Written<'a> {
    records: &'a [Record],
    acknowledged: u64,
    /// The disk says of those below that they were.
    confirmed: u64,
    /// Records below may be gone.
    retired: u64,
}

/// Recovers a crashed disk and compares it with what was written. Returns the log and where it
/// ends.
fn check(
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

/// Compares what the indexes lead to that a crash has left with what there is.
fn check_indexes(disk: &SimDisk, records: &[Record]) -> Result<(), Wrong> {
    let Listing { bases, indexed, .. } = Listing::of(disk).map_err(|error| error.to_string())?;
    let Some(first) = bases.first().filter(|_| !indexed.is_empty()) else { return Ok(()) };
    let found = found_by_index(disk, Indexes::default(), records.len() as u64)
        .map_err(|error| format!("not found: {error}"))?;
    let there = (0..).zip(records).skip(*first as usize);
    let there = there.filter(|(_, record)| !matches!(record, Record::Gap(_)));
    match there.eq(found.iter().map(|(sequence, record)| (*sequence, record))) {
        true => Ok(()),
        false => Err(format!("{} records are found by index", found.len())),
    }
}

/// Cuts the power at a moment in many ways.
fn cut(
    moment: &Moment,
    random: &mut Random,
    limits: Limits,
    workload: &Workload,
    tried: &mut Tried,
) -> Result<(), Wrong> {
    let written = workload.written_at(moment);
    const ALL_UP_TO: usize = 9;
    const SAMPLES: u64 = 40;
    let changes = moment.changes();
    tried.points += 1;
    let states = if changes <= ALL_UP_TO { 1 << changes } else { SAMPLES };
    for state in 0..states {
        tried.states += 1;
        let mut bits = if changes <= ALL_UP_TO { state } else { random.next() };
        // All lost, all kept, or each by chance.
        if changes > ALL_UP_TO {
            bits = [0, u64::MAX, bits][state.min(2) as usize];
        }
        let mut tear = random.clone();
        let is_tearing = random.once_in(4);
        let is_double = random.once_in(24);
        let crashed = moment.crashed(
            random.next(),
            is_double,
            || {
                let survives = bits & 1 == 1;
                bits = bits.rotate_right(1);
                survives
            },
            || is_tearing && tear.once_in(3),
        );
        let salvage =
            tried.states.is_multiple_of(100).then(|| Survey::of(&crashed)?.salvage(&crashed));
        let (log, kept) = check(&crashed, limits, written)?;
        if tried.states.is_multiple_of(10) {
            check_indexes(&crashed, &workload.records[..kept])?;
        }
        // Where nothing is damaged, salvaging ends where recovering does.
        match salvage.transpose().map_err(|error| format!("salvaging: {error}"))? {
            Some(salvage)
                if salvage.next_sequence != kept as u64
                    || !salvage.lost.is_empty()
                    || salvage.is_damaged =>
            {
                return Err(format!("{kept} records were recovered, not {salvage:?}"));
            }
            _ => {}
        }
        if is_double {
            cut_again(&crashed, log, random, limits, (written, kept), tried)?;
        }
    }
    Ok(())
}

/// Cuts the power during a recovery, and after it while the log goes on.
fn cut_again(
    disk: &SimDisk,
    log: Log<SimDisk>,
    random: &mut Random,
    limits: Limits,
    (written, kept): (Written<'_>, usize),
    tried: &mut Tried,
) -> Result<(), Wrong> {
    let crash = |moment: &Moment, random: &mut Random| {
        let mut chance = Random(random.next());
        let rest = chance.below(4);
        moment.crashed(random.next(), false, || rest == 3 || chance.once_in(rest + 1), || false)
    };
    for moment in disk.take_moments() {
        tried.double += 1;
        check(&crash(&moment, random), limits, written)
            .map_err(|w| format!("while recovering: {w}"))?;
    }
    disk.acknowledge(log.durable());
    let records = written.records[..kept].to_vec();
    let mut workload = Workload::new(disk.clone(), log, records, random.next());
    workload.retired = written.retired;
    for _ in 0..3 {
        workload.step().map_err(|error| format!("after a recovery: {error}"))?;
    }
    for moment in disk.take_moments() {
        tried.double += 1;
        check(&crash(&moment, random), limits, workload.written_at(&moment))
            .map_err(|w| format!("going on: {w}"))?;
    }
    verify(disk).map_err(|error| format!("going on: {error}"))?;
    Ok(())
}

/// Runs workloads and cuts the power at each moment of theirs until enough was tried.
pub(super) fn power_cuts(seed: u64, states: u64) -> Result<Tried, Wrong> {
    let mut random = Random(seed);
    let mut tried = Tried::default();
    while tried.states < states {
        let workload_seed = random.next();
        let limits = limits(&mut random);
        let disk = SimDisk::recording(workload_seed);
        let (log, _) = open_log(&disk, limits).map_err(|error| error.to_string())?;
        let mut workload = Workload::new(disk.clone(), log, Vec::new(), workload_seed);
        for _ in 0..12 {
            workload.step().map_err(|error| format!("{workload_seed}: {error}"))?;
            for moment in disk.take_moments() {
                cut(&moment, &mut random, limits, &workload, &mut tried)
                    .map_err(|wrong| format!("{workload_seed}, after {tried:?}: {wrong}"))?;
            }
        }
    }
    Ok(tried)
}

/// Retires segments and writes into a file of theirs, and cuts the power at each moment of that.
pub(super) fn reuse(seed: u64) -> Result<(), Wrong> {
    let failed = |error: StoreError| error.to_string();
    let mut random = Random(seed);
    // Room for all names that the process may have: a segment that is longer is not used again.
    let limits = Limits { segment_bytes: 32 << 10, max_bytes: None };
    let disk = SimDisk::recording(seed);
    let (log, _) = open_log(&disk, limits).map_err(failed)?;
    let mut workload = Workload::new(disk.clone(), log, Vec::new(), seed);
    for _ in 0..3 {
        workload.append(3).and_then(|()| workload.log().seal()).map_err(failed)?;
    }
    workload.retired = 6;
    disk.take_moments();
    let job = workload.log().begin_retire(6).map_err(failed)?.ok_or("nothing is retired")?;
    let result = job.run();
    workload.log().end_retire(&job, result).map_err(failed)?;
    if disk.contents(SPARE).is_none() {
        return Err("no file is kept".to_owned());
    }
    workload.append(3).and_then(|()| workload.log().sync()).map_err(failed)?;
    if disk.contents(SPARE).is_some() {
        return Err("the file is not used again".to_owned());
    }
    for moment in disk.take_moments() {
        cut(&moment, &mut random, limits, &workload, &mut Tried::default())?;
    }
    Ok(())
}

/// Syncs a marker along with records that nobody has committed: the disk says of them too that they were.
pub(super) fn settling() -> Result<(), Wrong> {
    let failed = |error: StoreError| error.to_string();
    let (disk, limits) = (SimDisk::new(1), limits(&mut Random(1)));
    let (log, _) = open_log(&disk, limits).map_err(failed)?;
    let mut workload = Workload::new(disk.clone(), log, Vec::new(), 1);
    assert!(!workload.witness.is_double, "nothing is left to settle");
    workload.append(1).and_then(|()| workload.committed.commit(1)).map_err(failed)?;
    workload.append(1).and_then(|()| workload.committed.settle()).map_err(failed)?;
    workload.idle().map_err(failed)?;
    let moment = disk.moment();
    check(&disk.rebooted(1), limits, workload.written_at(&moment)).map(|_| ())
}

pub(crate) fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Returns whether the call that failed was one to an index, which is no part of the log.
fn is_of_an_index(disk: &SimDisk) -> bool {
    disk.failed().is_some_and(|name| name.contains(".idx"))
}

/// Operations after a call that was interrupted or done in part.
const AFTERWARDS: usize = 20;

/// What a log has that has nothing.
const NOTHING: Written<'_> = Written { records: &[], acknowledged: 0, confirmed: 0, retired: 0 };

/// Fails one call of a workload, and looks at what is left. Returns false if there is no such call.
fn fail(
    seed: u64,
    operations: usize,
    (calls, call): (Calls, u64),
    fault: Fault,
) -> Result<bool, Wrong> {
    let limits = limits(&mut Random(seed));
    let disk = SimDisk::new(seed);
    disk.fail(calls, call, fault);
    let mut workload = match open_log(&disk, limits) {
        Ok((log, _)) => Workload::new(disk.clone(), log, Vec::new(), seed),
        // Nothing was written yet.
        Err(_) => return check(&disk.rebooted(seed), limits, NOTHING).map(|_| true),
    };
    let mut left = operations;
    let mut failed = None;
    while left > 0 && failed.is_none() {
        failed = workload.step().err();
        left = if disk.has_failed() { left.min(AFTERWARDS) } else { left } - 1;
    }
    let acknowledged = workload.committed.durable();
    if let Some(error) = &failed {
        if matches!(fault, Fault::Interrupted | Fault::Short) {
            return Err(format!("was not completed: {error}"));
        }
        let is_poisoned = workload.log().check().is_err();
        // Before a file has its name, or once it has lost it, a failure is none of the log's; and what
        // cannot be read is as it was.
        let is_harmless = matches!(error, StoreError::Full { .. })
            || matches!(error, StoreError::Io { what: "creating" | "keeping" | "removing", .. })
            || calls == Calls::Reading;
        if is_poisoned == is_harmless {
            return Err(format!("is poisoned: {is_poisoned}, after {error}"));
        }
        let next = workload.log().next();
        let is_committed = workload.committed.commit(next).is_ok() && acknowledged < next;
        if is_poisoned && (is_committed || workload.committed.durable() > acknowledged) {
            return Err(format!("acknowledged after {error}"));
        }
    } else if disk.has_failed()
        && !is_of_an_index(&disk)
        && matches!(fault, Fault::Io | Fault::NoSpace)
    {
        return Err(format!("nobody was told of {:?}", disk.failed()));
    }
    // Nobody knows whether what has failed is there; whoever was not told does not count on it.
    let durable = workload.committed.durable();
    check(&disk.rebooted(seed), limits, workload.written(durable, 0))
        .map_err(|wrong| format!("{wrong}, after {failed:?}"))?;
    Ok(disk.has_failed())
}

/// Fails every n-th call of a workload, one after another, and returns how many there were.
pub(super) fn failures(
    calls: Calls,
    fault: Fault,
    operations: usize,
    step: u64,
) -> Result<u64, Wrong> {
    let mut call = 1;
    while fail(7, operations, (calls, call), fault)
        .map_err(|wrong| format!("{fault:?} of {calls:?} {call}: {wrong}"))?
    {
        call += step;
    }
    Ok(call - 1)
}

/// Fails each call of an opening after a power cut, one after another, in so many logs: it says so, and
/// the next opening finds what was acknowledged, whether the power is cut once more or not. Returns how
/// many calls failed.
pub(super) fn failed_openings(
    seed: u64,
    calls: Calls,
    fault: Fault,
    logs: u64,
) -> Result<u64, Wrong> {
    let mut random = Random(seed);
    let mut failed = 0;
    for log in 0..logs {
        let limits = limits(&mut random);
        let disk = SimDisk::new(random.next());
        let (log_before, _) = open_log(&disk, limits).map_err(|error| error.to_string())?;
        let mut workload = Workload::new(disk.clone(), log_before, Vec::new(), random.next());
        for _ in 0..10 + random.below(30) {
            workload.step().map_err(|error| error.to_string())?;
        }
        let moment = disk.moment();
        let (survivors, identity) = (random.next(), random.next());
        for call in 1.. {
            let mut chance = Random(survivors);
            let crashed = moment.crashed(identity, false, || chance.once_in(2), || false);
            crashed.fail(calls, call, fault);
            let opened = open_log(&crashed, limits);
            if !crashed.has_failed() {
                break;
            }
            failed += 1;
            let is_completed = matches!(fault, Fault::Interrupted | Fault::Short);
            let outcome = match opened {
                Err(StoreError::Io { .. } | StoreError::Full { .. }) if !is_completed => Ok(()),
                Ok(_) if is_completed || is_of_an_index(&crashed) => Ok(()),
                Ok(_) => Err("nobody was told".to_owned()),
                Err(error) => Err(format!("it gave {error}")),
            };
            let written = workload.written_at(&moment);
            outcome
                .and_then(|()| check(&crashed.rebooted(call), limits, written))
                .and_then(|_| check(&crashed, limits, written))
                .map_err(|wrong| {
                    format!("{fault:?} of {calls:?} {call} of opening {log}: {wrong}")
                })?;
        }
    }
    Ok(failed)
}

/// Fills a log to its limit: what it took is there, what it did not take it has not, and it goes on
/// once there is room.
pub(super) fn room() -> Result<(), Wrong> {
    let segment_bytes = SEGMENT_HEADER as u64 + 900;
    let full = Limits { segment_bytes, max_bytes: Some(3 * segment_bytes) };
    let disk = SimDisk::new(1);
    let (log, _) = open_log(&disk, full).map_err(|error| error.to_string())?;
    let mut workload = Workload::new(disk.clone(), log, Vec::new(), 1);
    let mut refused = 0;
    let error = loop {
        if refused > 1000 {
            return Err("never full".to_owned());
        }
        match workload.append(3).and_then(|()| workload.log().sync()) {
            Ok(()) => refused = workload.records.len() as u64,
            Err(error) => break error,
        }
    };
    let StoreError::Full { .. } = error else { return Err(format!("refused by {error}")) };
    let durable = workload.log().durable();
    if durable > refused {
        return Err("what was refused was acknowledged".to_owned());
    }
    let bytes: usize = disk
        .names()
        .unwrap_or_default()
        .iter()
        .filter_map(|name| Some(disk.contents(name)?.len()))
        .sum();
    if bytes as u64 > 3 * segment_bytes {
        return Err(format!("the log has {bytes} bytes"));
    }
    check(&disk.rebooted(1), full, workload.written(refused, 0))?;
    // What waits in memory is stored as soon as there is room.
    workload.log().raise_max_bytes(10 * segment_bytes);
    workload.log().sync().map_err(|error| format!("with room: {error}"))?;
    let next = workload.log().next();
    check(&disk.rebooted(1), full, workload.written(next, 0)).map(|_| ())
}

#[test]
fn whichever_call_fails_nothing_acknowledged_is_lost_and_nothing_is_acknowledged_after_it() {
    // 1 is every call.
    let step = from_environment("FAULT_STEP", 197);
    let fail_all = |(calls, fault, operations, at_least)| {
        let count =
            failures(calls, fault, operations, step).unwrap_or_else(|wrong| panic!("{wrong}"));
        assert!(count > at_least, "{fault:?} of {calls:?}: only {count} calls were made");
    };
    std::thread::scope(|scope| {
        for fault in [Fault::Io, Fault::NoSpace, Fault::Interrupted, Fault::Short] {
            scope.spawn(move || fail_all((Calls::Changing, fault, 1000, 1000)));
        }
        for fault in [Fault::Io, Fault::Interrupted, Fault::Short] {
            scope.spawn(move || fail_all((Calls::Reading, fault, 600, 200)));
        }
    });
}

#[test]
fn whichever_call_of_an_opening_fails_the_next_one_finds_what_was_acknowledged() {
    let (seed, logs) = (from_environment("SEED", 1), from_environment("OPENINGS", 40));
    for calls in [Calls::Changing, Calls::Reading] {
        for fault in [Fault::Io, Fault::NoSpace, Fault::Interrupted, Fault::Short] {
            if (calls, fault) == (Calls::Reading, Fault::NoSpace) {
                continue;
            }
            match failed_openings(seed, calls, fault, logs) {
                Ok(failed) => assert!(failed > 3 * logs, "only {failed} calls failed"),
                Err(wrong) => panic!("SEED={seed}: {wrong}"),
            }
        }
    }
}

/// Crash states that are tried with one seed.
const SHARE: u64 = 50_000;

/// `CRASH_STATES` at least, and on for `SOAK_MINUTES`, on all cores.
#[test]
fn whatever_a_power_cut_leaves_what_was_acknowledged_is_there_and_nothing_else() {
    let (seed, wanted) = (from_environment("SEED", 1), from_environment("CRASH_STATES", 3_000));
    let long = Duration::from_secs(60 * from_environment("SOAK_MINUTES", 0));
    let begun = Instant::now();
    let all = Mutex::new((seed.., Tried::default()));
    let has_enough = |tried: &Tried| tried.states >= wanted && begun.elapsed() >= long;
    let work = || {
        loop {
            let seed = {
                let (seeds, tried) = &mut *all.lock();
                match seeds.next() {
                    Some(seed) if !has_enough(tried) => seed,
                    _ => return Ok(()),
                }
            };
            let Tried { points, states, double } = power_cuts(seed, wanted.min(SHARE))
                .map_err(|wrong| format!("SEED={seed}: {wrong}"))?;
            let (_, tried) = &mut *all.lock();
            tried.points += points;
            tried.states += states;
            tried.double += double;
        }
    };
    let outcomes: Vec<Result<(), Wrong>> = std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("it panics with a reason")).collect()
    });
    if let Some(wrong) = outcomes.into_iter().find_map(Result::err) {
        panic!("{wrong}");
    }
    let Tried { points, states, double } = all.into_inner().1;
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{states} crash states at {points} moments, {double} double crashes, 0 losses, in {seconds:.0} s"
    );
}

#[test]
fn whatever_a_power_cut_leaves_of_a_file_that_is_used_again_is_no_segment_of_before() {
    if let Err(wrong) = reuse(1) {
        panic!("{wrong}");
    }
}

#[test]
fn what_becomes_durable_along_with_a_marker_gets_one_of_its_own() {
    if let Err(wrong) = settling() {
        panic!("{wrong}");
    }
}

#[test]
fn a_full_log_refuses_what_it_cannot_keep_and_goes_on_once_there_is_room() {
    if let Err(wrong) = room() {
        panic!("{wrong}");
    }
}
