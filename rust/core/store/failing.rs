//! Calls that fail, one by one: nothing acknowledged is lost, nothing is acknowledged after a failure that
//! counts, and somebody is told of it.

use super::error::StoreError;
use super::format::SEGMENT_HEADER;
use super::log::Limits;
use super::sim::{Calls, Fault, Random, SimDisk};
use super::storage::Storage;
use super::workload::{Workload, Written, Wrong, check, from_environment, limits, open_log};

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

#[test]
fn a_full_log_refuses_what_it_cannot_keep_and_goes_on_once_there_is_room() {
    if let Err(wrong) = room() {
        panic!("{wrong}");
    }
}
