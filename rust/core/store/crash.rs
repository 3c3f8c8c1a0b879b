//! Power cuts, one by one: whatever a disk has kept of what was not synced, what was acknowledged is
//! there, nothing else is, and nothing is called damaged that is not.

use super::error::StoreError;
use super::listing::{Listing, SPARE};
use super::log::{Limits, Log};
use super::query::Indexes;
use super::salvage::Survey;
use super::sim::{Moment, Random, SimDisk};
use super::verify::verify;
use super::workload::{
    Record, Workload, Written, Wrong, check, found_by_index, from_environment, limits, open_log,
};
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// What was tried.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tried {
    points: u64,
    states: u64,
    double: u64,
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
