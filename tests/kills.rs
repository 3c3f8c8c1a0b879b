//! A process that writes a log is killed, again and again: what it has acknowledged is there.
#![cfg(all(feature = "store", unix))]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use tickbus::{Event, EventStore, Records, StoreConfig};

/// Names the folder in which a child of this program writes.
const FOLDER: &str = "TICKBUS_WRITES_INTO";

fn event(number: u64) -> Event {
    Event { timestamp: number, ..Event::from_bytes([0; 32]) }
}

fn config() -> StoreConfig {
    let mut config = StoreConfig::default();
    config.segment_bytes = 64 << 10;
    config
}

/// Appends to a log and says what is durable, until it is killed.
fn write(folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (store, recovery) = EventStore::open(folder, config())?;
    let mut next = recovery.next_sequence;
    let mut pipe = std::io::stderr();
    loop {
        let events: Vec<_> = (next..next + 1 + next % 300).map(event).collect();
        next = store.append_durable(&events)?.wait()? + 1;
        writeln!(pipe, "{next}")?;
    }
}

#[test]
fn a_child_writes() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        write(Path::new(&folder)).expect("it writes until it is killed");
    }
}

/// Reads all of a log, and returns how many records it has, which are numbered.
fn read(folder: &Path) -> u64 {
    let mut reader = EventStore::read_only(folder, 0).expect("it is sound");
    let mut next = 0;
    while let Some(batch) = reader.next_batch().expect("it is what was written") {
        let Records::Events(events) = batch.records else { panic!("{batch:?} was not written") };
        for found in events {
            assert_eq!(*found, event(next));
            next += 1;
        }
    }
    next
}

/// `KILLS` times.
#[test]
fn whenever_the_writer_is_killed_what_it_has_acknowledged_is_there() {
    let kills = std::env::var("KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(30);
    let program = std::env::current_exe().expect("it runs");
    let mut folder = tempfile::tempdir().expect("there is a folder for temporary files");
    let mut random = 1_u64;
    for kill in 0..kills {
        if kill % 20 == 0 {
            folder = tempfile::tempdir().expect("there is a folder for temporary files");
        }
        let mut writer = Command::new(&program)
            .args(["--exact", "a_child_writes", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut lines = BufReader::new(writer.stderr.take().expect("it is a pipe")).lines();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let awaited = 1 + (random >> 33) as usize % 40;
        let mut acknowledged = 0;
        let mut number = |line: std::io::Result<String>| {
            // The last line may be torn too.
            let told = line.ok().and_then(|line| line.parse().ok());
            acknowledged = told.unwrap_or(acknowledged).max(acknowledged);
        };
        lines.by_ref().take(awaited).for_each(&mut number);
        writer.kill().expect("it writes");
        // What was still in the pipe was acknowledged too.
        lines.for_each(&mut number);
        writer.wait().expect("it was killed");
        EventStore::verify(folder.path()).expect("it is sound");
        let (store, recovery) = EventStore::open(folder.path(), config()).expect("it is sound");
        assert!(acknowledged > 0, "the writer has acknowledged nothing");
        assert!(recovery.next_sequence >= acknowledged, "kill {kill}: {acknowledged} are lost");
        store.close().expect("it is durable");
        assert_eq!(read(folder.path()), recovery.next_sequence);
    }
    println!("{kills} kills, 0 losses");
}
