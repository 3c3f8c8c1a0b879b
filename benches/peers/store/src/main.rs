//! Measures the event log against the raw system calls under it and against databases, and prints
//! for each row the target, the ratio and pass or fail; the exit status is 1 when one was missed.

mod attached;
mod harness;
mod load;
mod peers;
mod raw;
mod reading;
mod rocksdb;
mod writing;

use harness::Arguments;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tempfile::TempDir;

/// Bytes of a segment, and of the files of the raw loops: the default of the store.
const SEGMENT_BYTES: u64 = 64 << 20;

fn main() -> ExitCode {
    if let [_, word, folder] = &std::env::args().collect::<Vec<_>>()[..]
        && word == reading::WRITE_AND_WAIT
    {
        reading::write_and_wait(Path::new(folder));
    }
    let arguments = Arguments::parse();
    println!(
        "tickbus {}; {}; SQLite {}, redb {}, fjall {}, {}; medians of {} alternating rounds",
        version_of("tickbus"),
        harness::file_system(&data()),
        rusqlite::version(),
        version_of("redb"),
        version_of("fjall"),
        rocksdb::about(),
        arguments.rounds,
    );
    let mut comparisons = writing::comparisons();
    comparisons.extend(attached::comparisons());
    comparisons.extend(reading::comparisons());
    let missed = harness::measure(comparisons, &arguments);
    println!(
        "\n{}",
        if missed == 0 { "all targets met".into() } else { format!("{missed} missed") }
    );
    ExitCode::from(u8::from(missed > 0))
}

/// Returns the folder of all that is measured: on the disk of the project, because /tmp may be
/// memory.
fn data() -> std::path::PathBuf {
    let target = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../target"));
    std::fs::create_dir_all(target).expect("target/ can be created");
    target.canonicalize().expect("target/ is there")
}

/// An empty folder that is removed with all in it when it is dropped.
struct Folder {
    inner: Option<TempDir>,
}

impl Folder {
    fn new() -> Self {
        let inner = tempfile::Builder::new().prefix("bench-store-").tempdir_in(data());
        Self { inner: Some(inner.expect("a folder")) }
    }

    fn path(&self) -> &Path {
        self.inner.as_ref().expect("it was not dropped").path()
    }
}

impl Drop for Folder {
    /// Waits until the disk has nothing left to do for what was removed, which would otherwise slow
    /// down what is timed next.
    fn drop(&mut self) {
        drop(self.inner.take());
        let disk = File::open(data()).expect("target/ is there");
        rustix::fs::syncfs(&disk).expect("it can be synced");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Returns which version of a package the lock file names.
fn version_of(package: &str) -> &'static str {
    let lock = include_str!("../Cargo.lock");
    let entry = lock.split_once(&format!("name = \"{package}\"\nversion = \""));
    entry.and_then(|(_, rest)| rest.split_once('"')).map_or("?", |(version, _)| version)
}
