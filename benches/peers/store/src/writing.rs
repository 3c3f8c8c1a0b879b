//! Appending: batches nobody waits for, events one by one, synced groups and single commits.

use crate::harness::{Case, Comparison, Row, Target, case};
use crate::load::{Load, Synced, event_at};
use crate::raw::{Made, Raw};
use crate::{Folder, SEGMENT_BYTES, peers, rocksdb};
use std::path::Path;
use std::time::Duration;
use tickbus::{Durability, Event, EventStore, Records, Recovery, Retention, StoreConfig};

/// Opens a log, and says what was recovered.
pub(crate) fn open(path: &Path, durability: Durability) -> (EventStore, Recovery) {
    let mut config = StoreConfig::default();
    config.durability = durability;
    config.segment_bytes = SEGMENT_BYTES;
    EventStore::open(path, config).expect("the log opens")
}

/// Ends the process unless a log has these events and no others.
fn assert_all_there(store: &EventStore, events: u64) {
    let mut reader = store.read(0);
    while let Some(batch) = reader.next_batch().expect("the log is sound") {
        let Records::Events(events) = batch.records else { panic!("only events were appended") };
        for (sequence, event) in (batch.sequence..).zip(events) {
            assert_eq!(event, event_at(sequence), "event {sequence} is another one");
        }
    }
    assert_eq!(reader.sequence(), events, "events are missing, or there are too many");
}

/// Returns what a log of ours takes for a load.
fn tickbus(load: Load, durability: Durability, append: impl Fn(&EventStore, &[Event])) -> f64 {
    let folder = Folder::new();
    let (store, _) = open(folder.path(), durability);
    let cost = load.run(|events| append(&store, events));
    assert_all_there(&store, load.events());
    store.close().expect("the log closes");
    cost
}

/// As `tickbus`, of a log that syncs in intervals.
pub(crate) fn tickbus_unsynced(load: Load) -> f64 {
    tickbus(load, Durability::Interval(Duration::from_millis(100)), append)
}

fn append(store: &EventStore, events: &[Event]) {
    store.append(events).expect("it is appended");
}

fn append_and_wait(store: &EventStore, events: &[Event]) {
    let ticket = store.append_durable(events).expect("it is appended");
    ticket.wait().expect("it is durable");
}

/// Returns what the system calls alone take for a load.
fn raw(load: Load, made: Made, synced: Synced) -> f64 {
    let mut raw = Raw::new(made, (load.events() + 64_000) * 32);
    let cost = load.run(|events| {
        raw.write(events);
        if synced == Synced::Each {
            raw.sync();
        }
    });
    // Nothing of it is left to be written while others are timed.
    raw.sync();
    cost
}

/// Returns the databases that are there.
fn databases(load: Load, synced: Synced) -> Vec<Case> {
    let mut cases = vec![
        case("SQLite", move || peers::sqlite(load, synced)),
        case("redb", move || peers::redb(load, synced)),
        case("fjall", move || peers::fjall(load, synced)),
    ];
    cases.extend(
        rocksdb::library()
            .ok()
            .map(|library| case("RocksDB", move || rocksdb::run(library, load, synced))),
    );
    cases
}

/// Returns rows against those databases that are there.
fn against_databases(
    name: &'static str,
    ours: &'static str,
    cases: &[Case],
    targets: &[(&'static str, Target)],
) -> Vec<Row> {
    let is_there = |name: &str| cases.iter().any(|case| case.name == name);
    let there = targets.iter().filter(|(against, _)| is_there(against));
    there.map(|&(against, target)| Row { name, ours, against, target }).collect()
}

const PWRITE: &str = "raw pwrite";
const SYNCED: &str = "raw pwrite, fdatasync";
const WRITTEN: &str = "raw, written file";

pub(crate) fn comparisons() -> Vec<Comparison> {
    vec![
        unsynced_thousands(),
        unsynced_256(),
        one_by_one(),
        synced_thousands(),
        synced_again(),
        commits(),
    ]
}

const EVENTS: usize = 4_000_000;
const DATABASE_EVENTS: usize = 200_000;

fn unsynced_thousands() -> Comparison {
    const NAME: &str = "append, batches of 1,000";
    const OURS: &str = "tickbus";
    let load = Load::Batches(EVENTS, 1_000);
    let mut cases = vec![
        case(OURS, move || tickbus(load, Durability::None, append)),
        case(WRITTEN, move || raw(load, Made::Written, Synced::No)),
    ];
    cases.extend(databases(Load::Batches(DATABASE_EVENTS, 1_000), Synced::No));
    let target = Target::TimesLess(0.8);
    let mut rows = vec![Row { name: NAME, ours: OURS, against: PWRITE, target }];
    rows.extend(against_databases(NAME, OURS, &cases, &[("SQLite", Target::TimesLess(50.0))]));
    Comparison { limit: case(PWRITE, move || raw(load, Made::Reserved, Synced::No)), cases, rows }
}

fn unsynced_256() -> Comparison {
    const OURS: &str = "tickbus";
    let load = Load::Batches(EVENTS, 256);
    let cases = vec![case(OURS, move || tickbus(load, Durability::None, append))];
    let target = Target::TimesLess(0.8);
    let row = Row { name: "append, batches of 256", ours: OURS, against: PWRITE, target };
    let limit = case(PWRITE, move || raw(load, Made::Reserved, Synced::No));
    Comparison { limit, cases, rows: vec![row] }
}

fn one_by_one() -> Comparison {
    const OURS: &str = "tickbus";
    const LIMIT: &str = "raw pwrite, batches of 2,000";
    let load = Load::Batches(EVENTS, 1);
    let cases = vec![case(OURS, move || tickbus(load, Durability::None, append))];
    let row =
        Row { name: "append, event by event", ours: OURS, against: LIMIT, target: Target::None };
    let limit = case(LIMIT, || raw(Load::Batches(EVENTS, 2_000), Made::Reserved, Synced::No));
    Comparison { limit, cases, rows: vec![row] }
}

fn synced_thousands() -> Comparison {
    const NAME: &str = "synced groups of 1,000";
    const OURS: &str = "tickbus";
    let load = Load::Batches(200_000, 1_000);
    let mut cases = vec![
        case(OURS, move || tickbus(load, Durability::Group, append_and_wait)),
        case(WRITTEN, move || raw(load, Made::Written, Synced::Each)),
    ];
    cases.extend(databases(load, Synced::Each));
    let target = Target::TimesLess(0.85);
    let mut rows = vec![Row { name: NAME, ours: OURS, against: SYNCED, target }];
    let targets = [
        ("SQLite", Target::TimesLess(4.0)),
        ("RocksDB", Target::TimesLess(6.0)),
        ("redb", Target::TimesLess(6.0)),
        ("fjall", Target::TimesLess(6.0)),
    ];
    rows.extend(against_databases(NAME, OURS, &cases, &targets));
    let limit = case(SYNCED, move || raw(load, Made::Reserved, Synced::Each));
    Comparison { limit, cases, rows }
}

/// Returns what synced groups take a log that writes into a file of a segment that was retired.
fn into_a_used_file(load: Load) -> f64 {
    let folder = Folder::new();
    let (store, _) = open(folder.path(), Durability::Group);
    while store.stats().bytes < SEGMENT_BYTES - SEGMENT_BYTES / 64 {
        fill(&store, 64_000, 1_000);
    }
    store.seal().expect("it is sealed");
    fill(&store, 2_000, 1_000);
    store.seal().expect("it is sealed");
    let nothing = Retention { records: Some(0), ..Retention::default() };
    assert!(store.retain(&nothing).expect("it is retired").segments > 0);
    let cost = load.run(|events| append_and_wait(&store, events));
    store.close().expect("the log closes");
    cost
}

fn synced_again() -> Comparison {
    const OURS: &str = "tickbus";
    let load = Load::Batches(200_000, 1_000);
    let mut cases = vec![case(OURS, move || into_a_used_file(load))];
    cases.extend(databases(load, Synced::Each));
    let name = "synced groups of 1,000, a file used again";
    let target = Target::TimesLess(0.85);
    let mut rows = vec![Row { name, ours: OURS, against: WRITTEN, target }];
    rows.extend(against_databases(name, OURS, &cases, &[("SQLite", Target::TimesLess(4.0))]));
    let limit = case(WRITTEN, move || raw(load, Made::Written, Synced::Each));
    Comparison { limit, cases, rows }
}

fn commits() -> Comparison {
    const NAME: &str = "commit of one event, p50";
    const GROUP: &str = "tickbus, group";
    const ALWAYS: &str = "tickbus, always";
    let load = Load::Commits(300);
    let mut cases = vec![
        case(GROUP, move || tickbus(load, Durability::Group, append_and_wait)),
        case(ALWAYS, move || tickbus(load, Durability::Always, append)),
        case(WRITTEN, move || raw(load, Made::Written, Synced::Each)),
    ];
    cases.extend(databases(load, Synced::Each));
    let target = Target::TimesAsMuch(1.1);
    let rows = vec![
        Row { name: NAME, ours: GROUP, against: SYNCED, target },
        Row { name: NAME, ours: ALWAYS, against: SYNCED, target },
    ];
    let limit = case(SYNCED, move || raw(load, Made::Reserved, Synced::Each));
    Comparison { limit, cases, rows }
}

/// Appends so many events in batches, without waiting for a disk.
pub(crate) fn fill(store: &EventStore, events: usize, batch: usize) {
    Load::Batches(events, batch).run(|events| append(store, events));
}
