//! A reader that has its subscription for itself and sees events where they are.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;
use support::assert_row_closes;
use tickbus::{
    Backend, BackpressureConfig, BusConfig, EventBus, EventBusImpl, EventReader, EventSubscription,
    Lagged, OnLag, Pattern, Policy, RecvError, RingEventBus, SubscribeOptions, TryRecvError,
    WaitStrategy,
};

const STRATEGIES: [WaitStrategy; 3] = [WaitStrategy::Spin, WaitStrategy::Yield, WaitStrategy::Park];

fn bus(backend: Backend, capacity: usize) -> EventBusImpl<u64> {
    let max_block_duration = Duration::from_secs(60);
    let backpressure = BackpressureConfig { max_block_duration, ..Default::default() };
    let keep_last = Some(Pattern::new("prices.>").unwrap());
    let config = BusConfig { capacity, backpressure, keep_last, ..Default::default() };
    EventBusImpl::new(backend, config).unwrap()
}

fn options(policy: Policy) -> SubscribeOptions<u64> {
    SubscribeOptions { policy: Some(policy), ..Default::default() }
}

fn lossy(capacity: usize) -> (RingEventBus<u64>, EventReader<u64>) {
    let bus = RingEventBus::new(capacity).unwrap();
    let reader = bus.subscribe_with(options(Policy::DropOldest)).unwrap().into();
    (bus, reader)
}

/// What a reader found: events, and holes.
type Found = Vec<Result<u64, Lagged>>;

fn read_all(reader: &mut EventReader<u64>, limit: usize) -> Found {
    let mut found = Found::new();
    loop {
        let before = found.len();
        match reader.read(limit, |event| found.push(Ok(*event))) {
            Ok(count) => assert_eq!(found.len(), before + count),
            Err(TryRecvError::Lagged(lagged)) => found.push(Err(lagged)),
            Err(_) => return found,
        }
    }
}

fn recv_all(subscription: &EventSubscription<u64>) -> Found {
    let mut found = Found::new();
    loop {
        match subscription.try_recv() {
            Ok(event) => found.push(Ok(event)),
            Err(TryRecvError::Lagged(lagged)) => found.push(Err(lagged)),
            Err(_) => return found,
        }
    }
}

#[test]
fn a_reader_finds_what_a_subscription_finds() {
    for &backend in Backend::ALL {
        for pattern in [None, Some("prices.A"), Some("prices.>"), Some("nothing")] {
            for (limit, on_lag) in [(1, OnLag::Raise), (3, OnLag::Count), (200, OnLag::Raise)] {
                let bus = bus(backend, 64);
                let topics =
                    ["prices.A", "prices.B", "trades.A"].map(|name| bus.topic(name).unwrap());
                topics.iter().for_each(|topic| _ = bus.publish_to(topic, 1_000).unwrap());
                let subscribe = || {
                    let pattern = pattern.map(|pattern| Pattern::new(pattern).unwrap());
                    let options =
                        SubscribeOptions { pattern, on_lag, ..options(Policy::DropOldest) };
                    bus.subscribe_with(SubscribeOptions { snapshot: true, ..options }).unwrap()
                };
                let subscription = subscribe();
                let mut reader = EventReader::from(subscribe());
                for round in 0..20 {
                    for event in 0..(round * 13) % 150 {
                        bus.publish_to(&topics[event as usize % 3], event).unwrap();
                    }
                    let found = read_all(&mut reader, limit);
                    assert_eq!(found, recv_all(&subscription), "{backend:?} {pattern:?} {limit}");
                }
                (0..10).for_each(|event| _ = bus.publish_to(&topics[0], event).unwrap());
                let (of_reader, of_subscription) = (reader.metrics(), subscription.metrics());
                assert_eq!(reader.pending(), subscription.pending());
                assert_eq!(of_reader.delivered, of_subscription.delivered);
                assert_eq!(of_reader.dropped, of_subscription.dropped);
                assert_eq!(of_reader.offered, of_subscription.offered);
                assert_row_closes(&of_reader);
            }
        }
    }
}

#[test]
fn every_way_of_waiting_reads_every_event_and_the_end_and_lets_publishers_go_on() {
    const EVENTS: u64 = 20_000;
    for (strategy, limit) in STRATEGIES.into_iter().flat_map(|s| [(s, 1), (s, 7), (s, 1_000)]) {
        // A small one, so that each waits for the other.
        let bus = bus(Backend::Ring, 16);
        let bus = &bus;
        let mut reader = EventReader::from(bus.subscribe_with(options(Policy::Block)).unwrap());
        thread::scope(|scope| {
            scope.spawn(|| {
                (0..EVENTS).for_each(|event| assert_eq!(bus.publish(event), Ok(1)));
                bus.close();
            });
            let mut next = 0;
            while next < EVENTS {
                let check = |event: &u64| {
                    assert_eq!(*event, next);
                    next += 1;
                };
                let before = reader.metrics().delivered;
                let count = reader.read_by(strategy, limit, check).unwrap();
                assert!((1..=limit).contains(&count));
                assert_eq!(reader.metrics().delivered, before + count as u64);
            }
            assert_eq!(reader.read_by(strategy, limit, |_| ()), Err(RecvError::Closed));
            assert_eq!(reader.recv(strategy), Err(RecvError::Closed));
        });
        assert!(reader.metrics().peak_pending <= 16);
        assert_row_closes(&reader.metrics());
    }
}

#[test]
fn events_are_seen_where_they_are_and_not_cloned() {
    #[derive(Debug)]
    struct Uncloned(u64);
    impl Clone for Uncloned {
        fn clone(&self) -> Self {
            panic!("{} was cloned", self.0);
        }
    }
    let bus = RingEventBus::new(64).unwrap();
    let mut reader = EventReader::from(bus.subscribe(64).unwrap());
    (0..100).for_each(|number| {
        bus.publish(Uncloned(number)).unwrap();
        let mut seen = None;
        assert_eq!(reader.read(5, |event| seen = Some(event.0)).unwrap(), 1);
        assert_eq!(seen, Some(number));
    });
}

#[test]
fn an_event_whose_reading_panics_is_read_again() {
    for policy in [Policy::Block, Policy::DropOldest] {
        let bus = bus(Backend::Ring, 64);
        let mut reader = EventReader::from(bus.subscribe_with(options(policy)).unwrap());
        (0..5).for_each(|event| _ = bus.publish(event).unwrap());
        let read = catch_unwind(AssertUnwindSafe(|| {
            reader.read(5, |event| assert_ne!(*event, 2, "the reader panics"))
        }));
        assert!(read.is_err());
        assert_eq!(reader.metrics().delivered, 2);
        assert_eq!(read_all(&mut reader, 64), [Ok(2), Ok(3), Ok(4)]);
        assert_row_closes(&reader.metrics());
    }
}

#[test]
fn a_batch_ends_before_a_hole_which_is_told_once() {
    let (bus, mut reader) = lossy(16);
    (0..3).for_each(|event| _ = bus.publish(event).unwrap());
    assert_eq!(read_all(&mut reader, 2), [Ok(0), Ok(1), Ok(2)]);
    (3..103).for_each(|event| _ = bus.publish(event).unwrap());
    let found = read_all(&mut reader, 64);
    let Some(Err(Lagged { missed, exact: true })) = found.first() else { panic!("{found:?}") };
    let events: Vec<u64> = found[1..].iter().map(|found| found.unwrap()).collect();
    assert_eq!(events, (3 + missed..103).collect::<Vec<_>>());
    assert_eq!(reader.metrics().dropped.overwritten, *missed);
    assert_row_closes(&reader.metrics());
}

#[test]
fn a_lossy_reader_beside_a_publisher_finds_events_and_holes_that_are_all_there_was() {
    const EVENTS: u64 = 300_000;
    let (bus, mut reader) = lossy(64);
    thread::scope(|scope| {
        scope.spawn(|| {
            (0..EVENTS).for_each(|event| _ = bus.publish(event).unwrap());
            bus.close();
        });
        let mut next = 0;
        loop {
            let check = |event: &u64| {
                assert_eq!(*event, next);
                next += 1;
            };
            match reader.read_by(WaitStrategy::Yield, 64, check) {
                Ok(_) => {}
                Err(RecvError::Lagged(lagged)) => next += lagged.missed,
                Err(_) => break,
            }
        }
        assert_eq!(next, EVENTS);
    });
    assert_row_closes(&reader.metrics());
}

#[test]
fn closing_counts_what_is_pending_and_leaves_the_publisher_alone() {
    let bus = bus(Backend::Ring, 16);
    let mut reader = EventReader::from(bus.subscribe_with(options(Policy::Block)).unwrap());
    (0..10).for_each(|event| _ = bus.publish(event).unwrap());
    assert_eq!(reader.read(4, |_| ()), Ok(4));
    reader.close();
    assert_eq!(reader.try_recv(), Err(TryRecvError::Closed));
    assert_eq!(reader.read(0, |_| ()), Ok(0));
    let metrics = reader.metrics();
    assert_eq!((metrics.delivered, metrics.dropped.closed, metrics.pending), (4, 6, 0));
    assert_row_closes(&metrics);
    (0..100).for_each(|event| assert_eq!(bus.publish(event), Ok(0)));
    drop(reader);
    assert_eq!(bus.metrics().subscriptions.len(), 0);
}
