//! Opening logs, after a crash and after an orderly end, and reading them.

use crate::harness::{Comparison, Row, Target, case};
use crate::load::event_at;
use crate::writing::{fill, open};
use crate::{Folder, SEGMENT_BYTES};
use crc_fast::{CrcAlgorithm, Digest, crc32_iscsi};
use rustix::fs::{FallocateFlags, fallocate};
use std::cell::{LazyCell, RefCell};
use std::fs::File;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tickbus::{
    Durability, Event, EventStore, Found, Query, Records, Replay, ReplayOptions, StoreConfig,
};

const EVENTS: usize = 8_000_000;
/// Bytes that the bare loops read at once: they stay in a core's cache until they are looked at.
const READ: usize = 128 << 10;
const SEGMENT_HEADER: usize = 4096;
const FRAME_HEADER: usize = 40;
const SEAL: u64 = 56;
const EVENTS_KIND: u16 = 1;

/// What a process is told that is to be killed.
pub(crate) const WRITE_AND_WAIT: &str = "--write-and-wait";

/// Appends to a log without ever syncing it, says so, and waits to be killed.
pub(crate) fn write_and_wait(folder: &Path) -> ! {
    let (store, _) = open(folder, Durability::None);
    fill(&store, EVENTS, 1_000);
    store.flush().expect("it is written");
    println!("written");
    loop {
        std::thread::park();
    }
}

/// A log whose writer was killed.
struct Killed {
    folder: Folder,
    /// Its segments, and how many bytes of each were written.
    segments: Vec<(PathBuf, u64)>,
}

impl Killed {
    fn new() -> Self {
        let folder = Folder::new();
        let mut writer = Command::new(std::env::current_exe().expect("a path"))
            .arg(WRITE_AND_WAIT)
            .arg(folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let output = writer.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("it says something");
        assert_eq!(line.trim(), "written");
        writer.kill().expect("it can be killed");
        writer.wait().expect("it is dead");
        let names = segments(folder.path());
        let bytes = |path: &PathBuf| path.metadata().expect("it is there").len();
        let segments: Vec<_> = names.into_iter().map(|path| (path.clone(), bytes(&path))).collect();
        let mut killed = Self { folder, segments };
        // How much of the last segment was written shows where it is cut.
        killed.recover();
        let (last, written) = killed.segments.last_mut().expect("there are segments");
        *written = bytes(last) - SEAL;
        killed.restore();
        killed
    }

    /// Returns what it takes to open the log, in nanoseconds.
    fn recover(&self) -> f64 {
        let start = Instant::now();
        let (store, recovery) = open(self.folder.path(), Durability::None);
        let spent = start.elapsed().as_nanos() as f64;
        assert_eq!(recovery.next_sequence, EVENTS as u64, "all events are there");
        assert!(recovery.scanned_bytes > 32 * EVENTS as u64, "all of it was scanned");
        store.close().expect("it closes");
        spent
    }

    /// Makes the last segment what it was when its writer was killed.
    fn restore(&self) {
        let (last, written) = self.segments.last().expect("there are segments");
        let file = File::options().write(true).open(last).expect("it opens");
        file.set_len(*written).expect("it can be cut");
        fallocate(&file, FallocateFlags::empty(), 0, SEGMENT_BYTES).expect("there is room");
        file.sync_all().expect("it can be synced");
    }

    /// Returns what it takes to read and checksum what was written, in nanoseconds.
    fn checksum(&self) -> f64 {
        let start = Instant::now();
        let mut buffer = vec![0; READ];
        for (path, bytes) in &self.segments {
            let mut file = File::open(path).expect("it opens").take(*bytes);
            let mut crc = Digest::new(CrcAlgorithm::Crc32Iscsi);
            loop {
                match file.read(&mut buffer).expect("it can be read") {
                    0 => break,
                    count => crc.update(&buffer[..count]),
                }
            }
            black_box(crc.finalize());
        }
        start.elapsed().as_nanos() as f64
    }
}

/// Returns the segments of a log in order.
fn segments(folder: &Path) -> Vec<PathBuf> {
    files(folder, "elog")
}

/// Returns the files of a folder with an ending, in order.
fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = folder.read_dir().expect("a folder").map(|entry| entry.expect("an entry").path());
    let is_wanted = |path: &PathBuf| path.extension().is_some_and(|found| found == ending);
    let mut files: Vec<_> = entries.filter(is_wanted).collect();
    files.sort();
    files
}

/// What is made of all events that are read, so that none is left out.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Fold {
    timestamps: u64,
    symbols: u64,
    values: u64,
    metadata: u64,
}

impl Fold {
    #[inline(always)]
    fn take(&mut self, events: &[Event]) {
        for event in events {
            self.timestamps ^= event.timestamp;
            self.symbols += u64::from(event.symbol.0);
            self.values = self.values.wrapping_add(event.value.to_bits());
            self.metadata = self.metadata.wrapping_add(event.metadata);
        }
    }

    fn of_all() -> Self {
        let mut fold = Self::default();
        (0..EVENTS as u64).for_each(|sequence| fold.take(std::slice::from_ref(event_at(sequence))));
        fold
    }
}

/// Returns what reading an event takes a reader of a store, in nanoseconds.
fn replay(store: &EventStore, expected: Fold) -> f64 {
    let start = Instant::now();
    let mut fold = Fold::default();
    let mut reader = store.read(0);
    while let Some(batch) = reader.next_batch().expect("the log is sound") {
        let Records::Events(events) = batch.records else { panic!("only events were appended") };
        fold.take(events);
    }
    let spent = start.elapsed().as_nanos() as f64;
    assert_eq!((fold, reader.sequence()), (expected, EVENTS as u64), "it read something else");
    spent / EVENTS as f64
}

/// Returns what reading an event takes a loop that only compares the checksums of payloads, in
/// nanoseconds.
fn bare(folder: &Path, expected: Fold) -> f64 {
    let start = Instant::now();
    let mut fold = Fold::default();
    let mut buffer = vec![0_u64; READ / 8];
    for path in segments(folder) {
        let file = File::open(path).expect("it opens");
        let (mut offset, mut filled) = (SEGMENT_HEADER as u64, 0);
        loop {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
            let count = file.read_at(&mut bytes[filled..], offset).expect("it can be read");
            filled += count;
            offset += count as u64;
            let taken = fold_frames(&bytes[..filled], &mut fold);
            bytes.copy_within(taken..filled, 0);
            filled -= taken;
            if count == 0 {
                assert_eq!(filled, 0, "the last frame is whole");
                break;
            }
        }
    }
    let spent = start.elapsed().as_nanos() as f64;
    assert_eq!(fold, expected, "it read something else");
    spent / EVENTS as f64
}

/// Takes all frames that are whole, and returns their bytes.
fn fold_frames(bytes: &[u8], fold: &mut Fold) -> usize {
    let mut at = 0;
    while let Some(header) = bytes[at..].first_chunk::<FRAME_HEADER>() {
        let number = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let payload_bytes = number(4) as usize;
        let Some(payload) = bytes[at + FRAME_HEADER..].get(..payload_bytes.next_multiple_of(8))
        else {
            break;
        };
        assert_eq!(crc32_iscsi(payload), number(36), "the log is sound");
        if number(32) as u16 == EVENTS_KIND {
            fold.take(bytemuck::cast_slice(payload));
        }
        at += FRAME_HEADER + payload.len();
    }
    at
}

/// Returns a log of sealed segments, each of a mebibyte.
fn sealed(segments_wanted: usize) -> Folder {
    let folder = Folder::new();
    let mut config = StoreConfig::default();
    config.segment_bytes = 1 << 20;
    let (store, _) = EventStore::open(folder.path(), config).expect("it opens");
    while store.stats().segments < segments_wanted {
        fill(&store, 10_000, 1_000);
    }
    store.close().expect("it closes");
    assert_eq!(segments(folder.path()).len(), segments_wanted);
    folder
}

/// Returns what it takes to open and recover a log, in nanoseconds.
fn opening(folder: &Path) -> f64 {
    let start = Instant::now();
    let (store, _) = open(folder, Durability::Group);
    let spent = start.elapsed().as_nanos() as f64;
    store.close().expect("it closes");
    spent
}

/// Something that is made when it is first measured, and that several cases share.
type Shared<T> = Rc<LazyCell<T, Box<dyn FnOnce() -> T>>>;

fn shared<T>(make: impl FnOnce() -> T + 'static) -> Shared<T> {
    Rc::new(LazyCell::new(Box::new(make)))
}

pub(crate) fn comparisons() -> Vec<Comparison> {
    vec![
        recovery(),
        opening_sealed(),
        reading("reading, frames of 1,000", 1_000),
        reading("reading, frames of 256", 256),
        replaying(),
        reading_in_python(),
        reading_compressed(),
        query(),
        first_query(),
    ]
}

/// A Python process that reads a log by batches whenever it is told to, and sums up what one of their
/// columns has.
struct Reader {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Reader {
    fn new(log: &Path) -> Self {
        let top = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.."));
        let mut process = Command::new(top.join(".venv/bin/python"))
            .arg(top.join("benches/peers/store/reading.py"))
            .arg(log)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("make bench-store makes .venv with tickbus in it");
        let answers = BufReader::new(process.stdout.take().expect("it is piped"));
        Self { process, answers }
    }

    /// Returns what reading an event takes it, in nanoseconds.
    fn read(&mut self, expected: Fold) -> f64 {
        let questions = self.process.stdin.as_mut().expect("it is piped");
        questions.write_all(b"again\n").expect("it listens");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("it answers");
        let numbers: Vec<u64> = answer.split_whitespace().flat_map(str::parse).collect();
        let [spent, events, metadata] = numbers[..] else { panic!("it said {answer:?}") };
        assert_eq!(
            (events, metadata),
            (EVENTS as u64, expected.metadata),
            "it read something else"
        );
        spent as f64 / EVENTS as f64
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Nothing more to read ends it.
        drop(self.process.stdin.take());
        _ = self.process.wait();
    }
}

/// Returns what reading an event and summing up the same column takes here, in nanoseconds.
fn sum(log: &Path, expected: Fold) -> f64 {
    let start = Instant::now();
    let (mut events_read, mut metadata) = (0, 0_u64);
    let mut reader = EventStore::read_only(log, 0).expect("it opens");
    while let Some(batch) = reader.next_batch().expect("the log is sound") {
        let Records::Events(events) = batch.records else { panic!("only events were appended") };
        events_read += events.len();
        metadata = events.iter().fold(metadata, |sum, event| sum.wrapping_add(event.metadata));
    }
    let spent = start.elapsed().as_nanos() as f64;
    assert_eq!((events_read, metadata), (EVENTS, expected.metadata), "it read something else");
    spent / EVENTS as f64
}

fn reading_in_python() -> Comparison {
    const LIMIT: &str = "Rust";
    const PYTHON: &str = "Python";
    let ours = shared(|| {
        let folder = Folder::new();
        let (store, _) = open(folder.path(), Durability::None);
        fill(&store, EVENTS, 1_000);
        store.close().expect("it closes");
        let reader = RefCell::new(Reader::new(folder.path()));
        (reader, folder, Fold::of_all())
    });
    let limit = ours.clone();
    let run = move || ours.0.borrow_mut().read(ours.2);
    let target = Target::TimesLess(0.5);
    let row = Row { name: "reading by batches, in Python", ours: PYTHON, against: LIMIT, target };
    let rust = move || sum(limit.1.path(), limit.2);
    Comparison { limit: case(LIMIT, rust), cases: vec![case(PYTHON, run)], rows: vec![row] }
}

/// Returns what replaying an event to nobody takes, with its digest, in nanoseconds.
fn replay_with_digest(store: &Arc<EventStore>) -> f64 {
    let start = Instant::now();
    let mut options = ReplayOptions::default();
    options.speed = 0.0;
    let mut replay = Replay::of(store, options).expect("the log is sound");
    while let Some(batch) = replay.next_batch().expect("the log is sound") {
        black_box(&batch);
    }
    let spent = start.elapsed().as_nanos() as f64;
    assert_eq!(replay.transport().progress().replayed, EVENTS as u64);
    spent / EVENTS as f64
}

fn replaying() -> Comparison {
    const LIMIT: &str = "read, checksum and decode";
    let ours = shared(move || {
        let folder = Folder::new();
        let (store, _) = open(folder.path(), Durability::None);
        fill(&store, EVENTS, 1_000);
        store.seal().expect("it is sealed");
        (Arc::new(store), folder, Fold::of_all())
    });
    let limit = ours.clone();
    let run = move || replay_with_digest(&ours.0);
    let bare = move || {
        let (_, folder, expected) = &**limit;
        bare(folder.path(), *expected)
    };
    let name = "replaying, with the digest";
    let row = Row { name, ours: OURS, against: LIMIT, target: Target::TimesLess(0.5) };
    Comparison { limit: case(LIMIT, bare), cases: vec![case(OURS, run)], rows: vec![row] }
}

/// Returns what it takes to decompress the segments of a log, an event, in nanoseconds.
fn decompress(folder: &Path) -> f64 {
    let start = Instant::now();
    let mut buffer = vec![0; READ];
    for entry in folder.read_dir().expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|ending| ending != "zst") {
            continue;
        }
        let mut frames =
            zstd::Decoder::new(File::open(path).expect("it opens")).expect("it is zstd");
        while frames.read(&mut buffer).expect("it is zstd") > 0 {
            black_box(&buffer);
        }
    }
    start.elapsed().as_nanos() as f64 / EVENTS as f64
}

fn reading_compressed() -> Comparison {
    const LIMIT: &str = "decompress";
    let ours = shared(move || {
        let folder = Folder::new();
        let (store, _) = open(folder.path(), Durability::None);
        fill(&store, EVENTS, 1_000);
        store.seal().expect("it is sealed");
        store.compress(Duration::ZERO).expect("it is compressed");
        (store, folder, Fold::of_all())
    });
    let limit = ours.clone();
    let run = move || {
        let (store, _, expected) = &**ours;
        replay(store, *expected)
    };
    let name = "reading a compressed log";
    let row = Row { name, ours: OURS, against: LIMIT, target: Target::TimesLess(0.8) };
    let limit = case(LIMIT, move || decompress(limit.1.path()));
    Comparison { limit, cases: vec![case(OURS, run)], rows: vec![row] }
}

/// Events of the log that is queried, a nanosecond apart.
const QUERIED: usize = 16_000_000;

/// Returns what it takes to find a hundredth of a log by time, in nanoseconds.
fn find(store: &EventStore) -> f64 {
    let middle = event_at(0).timestamp + QUERIED as u64 / 2;
    let times = middle..middle + QUERIED as u64 / 100;
    let start = Instant::now();
    let mut query = Query::default();
    query.times = times;
    let mut found = store.query(&query).expect("it can be queried");
    let mut events = 0;
    while let Some(Found::Events(sequences, _)) = found.next_found().expect("it is sound") {
        events += sequences.len();
    }
    assert_eq!(events, QUERIED / 100);
    start.elapsed().as_nanos() as f64
}

/// Returns a log that can be queried, with its index.
fn queried() -> (EventStore, Folder) {
    let folder = Folder::new();
    let (store, _) = open(folder.path(), Durability::None);
    let mut events: Vec<Event> = (0..2_000).map(|number| *event_at(number)).collect();
    for number in 0..QUERIED {
        let place = number % events.len();
        events[place].timestamp = event_at(0).timestamp + number as u64;
        if place + 1 == events.len() {
            store.append(&events).expect("there is room");
        }
    }
    store.seal().expect("it is sealed");
    find(&store);
    (store, folder)
}

/// Returns what the first query of a log takes that was just opened, in nanoseconds.
fn find_first(folder: &Path) -> f64 {
    let (store, _) = open(folder, Durability::None);
    let spent = find(&store);
    store.close().expect("it closes");
    spent
}

fn first_query() -> Comparison {
    const LIMIT: &str = "without index files";
    let ours = shared(move || {
        let (store, folder) = queried();
        store.close().expect("it closes");
        folder
    });
    let limit = ours.clone();
    let without = move || {
        for path in files(limit.path(), "idx") {
            std::fs::remove_file(path).expect("it is there");
        }
        find_first(limit.path())
    };
    let name = "the first query after opening, 1 % of 16 M events";
    let row = Row { name, ours: OURS, against: LIMIT, target: Target::TimesLess(10.0) };
    let cases = vec![case(OURS, move || find_first(ours.path()))];
    Comparison { limit: case(LIMIT, without), cases, rows: vec![row] }
}

fn query() -> Comparison {
    const LIMIT: &str = "reading all of it";
    let ours = shared(queried);
    let limit = ours.clone();
    let all = move || {
        let start = Instant::now();
        let mut reader = limit.0.read(0);
        while let Some(batch) = reader.next_batch().expect("the log is sound") {
            black_box(batch.end);
        }
        start.elapsed().as_nanos() as f64
    };
    let name = "finding 1 % of 16 M events by time";
    let target = Target::TimesLess(100.0);
    let row = Row { name, ours: OURS, against: LIMIT, target };
    let again = ours.clone();
    let again = move || {
        find(&again.0);
        find(&again.0)
    };
    let cases = vec![case(OURS, move || find(&ours.0)), case("once more at once", again)];
    Comparison { limit: case(LIMIT, all), cases, rows: vec![row] }
}

const OURS: &str = "tickbus";

fn recovery() -> Comparison {
    const LIMIT: &str = "read and checksum";
    let ours = shared(Killed::new);
    let limit = ours.clone();
    let run = move || {
        let spent = ours.recover();
        ours.restore();
        spent
    };
    let name = "opening a log of 256 MB whose writer was killed";
    let target = Target::TimesLess(0.6);
    Comparison {
        limit: case(LIMIT, move || limit.checksum()),
        cases: vec![case(OURS, run)],
        rows: vec![Row { name, ours: OURS, against: LIMIT, target }],
    }
}

fn opening_sealed() -> Comparison {
    const LIMIT: &str = "of 8";
    let (few, many) = (shared(|| sealed(8)), shared(|| sealed(64)));
    let name = "opening a log of 64 sealed segments";
    let target = Target::TimesAsMuch(1.25);
    Comparison {
        limit: case(LIMIT, move || opening(few.path())),
        cases: vec![case(OURS, move || opening(many.path()))],
        rows: vec![Row { name, ours: OURS, against: LIMIT, target }],
    }
}

fn reading(name: &'static str, batch: usize) -> Comparison {
    const LIMIT: &str = "read, checksum and decode";
    let ours = shared(move || {
        let folder = Folder::new();
        let (store, _) = open(folder.path(), Durability::None);
        fill(&store, EVENTS, batch);
        // All of it is in sealed segments, and so the last frame ends where the file does.
        store.seal().expect("it is sealed");
        (store, folder, Fold::of_all())
    });
    let limit = ours.clone();
    let run = move || {
        let (store, _, expected) = &**ours;
        replay(store, *expected)
    };
    let bare = move || {
        let (_, folder, expected) = &**limit;
        bare(folder.path(), *expected)
    };
    let row = Row { name, ours: OURS, against: LIMIT, target: Target::TimesLess(0.5) };
    Comparison { limit: case(LIMIT, bare), cases: vec![case(OURS, run)], rows: vec![row] }
}
