//! What is appended, how often, and until when.

use crate::harness::median;
use std::sync::LazyLock;
use std::time::Instant;
use tickbus::{Event, EventType, Priority, SourceId, Symbol};

/// Events that are appended in turn, so that all come from a core's cache; a multiple of each batch.
static POOL: LazyLock<Vec<Event>> = LazyLock::new(|| {
    let symbol = Symbol::new("BTCUSDT").expect("a name");
    let source_id = SourceId::new("binance").expect("a name");
    let numbered = |number: u64| Event {
        timestamp: 1_767_225_600_000_000_000 + 1_000 * number,
        event_type: EventType::PriceUpdate,
        priority: Priority::Normal,
        source_id,
        symbol,
        value: 61_000.5 + (number % 97) as f64,
        metadata: number,
    };
    (0..64_000).map(numbered).collect()
});

/// Returns the event that a log of ours has at a sequence.
pub(crate) fn event_at(sequence: u64) -> &'static Event {
    &POOL[sequence as usize % POOL.len()]
}

/// Returns so many events in batches: the first one, for which files are made, and the others.
fn batches(
    events: usize,
    batch: usize,
) -> (&'static [Event], impl Iterator<Item = &'static [Event]>) {
    assert!(POOL.len().is_multiple_of(batch), "batches of {batch} follow one another in the pool");
    let mut batches = POOL.chunks_exact(batch).cycle().take(events / batch);
    (batches.next().expect("there is a batch"), batches)
}

/// Returns what appending an event costs, in nanoseconds.
fn throughput(events: usize, batch: usize, mut append: impl FnMut(&[Event])) -> f64 {
    let (first, batches) = batches(events, batch);
    append(first);
    let start = Instant::now();
    for batch in batches {
        append(batch);
    }
    start.elapsed().as_nanos() as f64 / (events - batch) as f64
}

/// Returns the median of what appending an event and syncing it takes, in nanoseconds.
fn latency(events: usize, mut append: impl FnMut(&[Event])) -> f64 {
    let (first, batches) = batches(events, 1);
    append(first);
    let timed = batches.map(|batch| {
        let start = Instant::now();
        append(batch);
        start.elapsed().as_nanos() as f64
    });
    median(timed.collect())
}

/// How appends are measured.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Load {
    /// So many events, in batches.
    Batches(usize, usize),
    /// So many commits of an event.
    Commits(usize),
}

impl Load {
    pub(crate) fn run(self, append: impl FnMut(&[Event])) -> f64 {
        match self {
            Self::Batches(events, batch) => throughput(events, batch, append),
            Self::Commits(events) => latency(events, append),
        }
    }

    pub(crate) fn events(self) -> u64 {
        match self {
            Self::Batches(events, batch) => (events - events % batch) as u64,
            Self::Commits(events) => events as u64,
        }
    }
}

/// When appends are on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Synced {
    /// Whenever the system likes.
    No,
    /// Each before the next one.
    Each,
}
