//! What the tests share: buses of every backend, reading into a list, and the sum of the books.
#![allow(dead_code, reason = "every test file uses a part")]

pub mod serial;

use std::time::Duration;
use tickbus::{
    Backend, BackpressureConfig, BusConfig, EventBus, EventBusImpl, EventBusMetrics,
    EventSubscription, Lagged, Pattern, Policy, SubscribeOptions, SubscriptionMetrics,
    TryRecvError,
};

/// Long enough that it never ends in a test that passes.
pub const FOREVER: Duration = Duration::MAX;

/// What a reader found at one place of its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read<T = u64> {
    Event(T),
    Missed(u64),
    Closed,
}

pub fn bus(backend: Backend, capacity: usize) -> EventBusImpl<u64> {
    patient_bus(backend, capacity, Duration::ZERO)
}

pub fn patient_bus<T: Clone>(
    backend: Backend,
    capacity: usize,
    max_block_duration: Duration,
) -> EventBusImpl<T> {
    let backpressure = BackpressureConfig { max_block_duration, ..Default::default() };
    EventBusImpl::new(backend, BusConfig { capacity, backpressure, ..Default::default() })
        .expect("the numbers are good")
}

/// Returns a bus that keeps the last events of the topics that a pattern wants.
pub fn bus_that_keeps<T: Clone>(
    backend: Backend,
    capacity: usize,
    keep_last: Option<&str>,
) -> EventBusImpl<T> {
    let backpressure =
        BackpressureConfig { max_block_duration: Duration::ZERO, ..Default::default() };
    let keep_last = keep_last.map(|pattern| Pattern::new(pattern).expect("it is a pattern"));
    EventBusImpl::new(
        backend,
        BusConfig { capacity, backpressure, keep_last, ..Default::default() },
    )
    .expect("the numbers are good")
}

pub fn subscribe<T: Clone>(
    bus: &impl EventBus<T>,
    capacity: usize,
    policy: Policy,
) -> EventSubscription<T> {
    let options =
        SubscribeOptions { capacity: Some(capacity), policy: Some(policy), ..Default::default() };
    bus.subscribe_with(options).expect("the backend keeps the policy")
}

/// Returns what is next, or nothing.
pub fn read<T: Clone>(subscription: &EventSubscription<T>) -> Option<Read<T>> {
    match subscription.try_recv() {
        Ok(event) => Some(Read::Event(event)),
        Err(TryRecvError::Lagged(Lagged { missed, .. })) => Some(Read::Missed(missed)),
        Err(TryRecvError::Closed) => Some(Read::Closed),
        Err(_) => None,
    }
}

/// Reads until nothing is there or the end was told.
pub fn drain<T: Clone + PartialEq>(subscription: &EventSubscription<T>) -> Vec<Read<T>> {
    let mut all = Vec::new();
    while let Some(next) = read(subscription) {
        let last = next == Read::Closed;
        all.push(next);
        if last {
            break;
        }
    }
    all
}

pub fn events<T>(range: impl IntoIterator<Item = T>) -> Vec<Read<T>> {
    range.into_iter().map(Read::Event).collect()
}

#[track_caller]
pub fn assert_row_closes(row: &SubscriptionMetrics) {
    assert_eq!(row.offered, row.delivered + row.dropped.total() + row.pending, "{row:?}");
}

/// Nothing may move meanwhile.
#[track_caller]
pub fn assert_sums_close(metrics: &EventBusMetrics) {
    metrics.subscriptions.iter().for_each(assert_row_closes);
    assert_eq!(metrics.subscriber_count, metrics.subscriptions.len());
    let dropped: u64 = metrics.subscriptions.iter().map(|row| row.dropped.total()).sum();
    assert!(metrics.total_dropped >= dropped, "{metrics:?}");
}
