//! Publishers on a ring that hold no lock while they write: nothing is lost, doubled or told in
//! another order, whatever they meet.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;
use support::{FOREVER, Read, assert_row_closes, assert_sums_close, drain, events, subscribe};
use tickbus::{
    Backend, BackpressureConfig, BusConfig, ConfigError, EventBus, EventBusImpl, EventSubscription,
    Pattern, Policy, Producers, PublishError, RecvError, RingEventBus, Start, SubscribeOptions,
};

const PUBLISHERS: u64 = 100;
const EVENTS: u64 = 300;

fn strict_bus<T: Clone>(capacity: usize, max_block_duration: Duration) -> RingEventBus<T> {
    let backpressure = BackpressureConfig { max_block_duration, ..Default::default() };
    let producers = Producers::Strict;
    let config = BusConfig { capacity, backpressure, producers, ..Default::default() };
    RingEventBus::with_config(config).unwrap()
}

fn narrow(bus: &RingEventBus<u64>, pattern: &str, policy: Policy) -> EventSubscription<u64> {
    let pattern = Some(Pattern::new(pattern).unwrap());
    let options = SubscribeOptions { pattern, policy: Some(policy), ..Default::default() };
    bus.subscribe_with(options).unwrap()
}

/// Closes the bus, also when a publisher panics: then nobody waits for it.
struct Closing<'a>(&'a RingEventBus<u64>);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs `publish` with the numbers 0 to 99 in a thread each, all at once, and closes the bus.
fn a_hundred_threads(bus: &RingEventBus<u64>, publish: impl Fn(u64) + Sync) {
    let barrier = Barrier::new(PUBLISHERS as usize);
    let _readers_end_with_a_failure = Closing(bus);
    thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let (barrier, publish) = (&barrier, &publish);
            scope.spawn(move || {
                barrier.wait();
                publish(publisher);
            });
        }
    });
}

/// Reads to the end and returns the events and the sum of all holes.
fn read_to_the_end(subscription: &EventSubscription<u64>) -> (Vec<u64>, u64) {
    let (mut events, mut missed) = (Vec::new(), 0);
    loop {
        match subscription.recv() {
            Ok(event) => events.push(event),
            Err(RecvError::Lagged(lagged)) => missed += lagged.missed,
            Err(RecvError::Closed) => return (events, missed),
            Err(other) => panic!("{other}"),
        }
    }
}

fn event(publisher: u64, number: u64) -> u64 {
    publisher << 32 | number
}

/// Returns how many events each publisher has among them.
fn assert_order_per_publisher(events: &[u64]) -> HashMap<u64, u64> {
    let (mut next, mut counts) = (HashMap::new(), HashMap::new());
    for event in events {
        let (publisher, number) = (event >> 32, event & 0xffff_ffff);
        let next = next.entry(publisher).or_insert(0);
        assert!(number >= *next, "publisher {publisher}: {number} came late or twice");
        *next = number + 1;
        *counts.entry(publisher).or_insert(0) += 1;
    }
    counts
}

#[test]
fn a_hundred_strict_publishers_lose_nothing_and_keep_their_order() {
    for capacity in [1, 2, 16, 64] {
        let bus = strict_bus(capacity, FOREVER);
        let readers: Vec<_> = (0..3).map(|_| subscribe(&bus, capacity, Policy::Block)).collect();
        thread::scope(|scope| {
            let readers: Vec<_> =
                readers.iter().map(|reader| scope.spawn(|| read_to_the_end(reader))).collect();
            a_hundred_threads(&bus, |publisher| {
                (0..EVENTS).for_each(|n| assert_eq!(bus.publish(event(publisher, n)), Ok(3)));
            });
            for reader in readers {
                let (events, missed) = reader.join().unwrap();
                assert_eq!((events.len() as u64, missed), (PUBLISHERS * EVENTS, 0));
                assert_order_per_publisher(&events);
            }
        });
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_hundred_strict_publishers_that_overwrite_are_told_every_hole() {
    for capacity in [1, 16, 64] {
        let bus = strict_bus(capacity, Duration::ZERO);
        let wide = subscribe(&bus, capacity, Policy::DropOldest);
        let even = narrow(&bus, "even", Policy::DropOldest);
        let topics = ["even", "odd"].map(|name| bus.topic(name).unwrap());
        let published = PUBLISHERS * EVENTS;
        thread::scope(|scope| {
            let readers = [&wide, &even].map(|reader| scope.spawn(|| read_to_the_end(reader)));
            a_hundred_threads(&bus, |publisher| {
                for n in 0..EVENTS {
                    let topic = &topics[n as usize % 2];
                    let taken = if n % 2 == 0 { 2 } else { 1 };
                    assert_eq!(bus.publish_to(topic, event(publisher, n)), Ok(taken));
                }
            });
            for (reader, wanted) in readers.into_iter().zip([published, published / 2]) {
                let (events, missed) = reader.join().unwrap();
                assert_eq!(events.len() as u64 + missed, wanted);
                assert_order_per_publisher(&events);
            }
        });
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn closing_while_a_hundred_publish_loses_nothing_that_was_accepted() {
    let bus = strict_bus(64, FOREVER);
    let reader = subscribe(&bus, 64, Policy::Block);
    let accepted = AtomicU64::new(0);
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut events = Vec::new();
            while let Ok(event) = reader.recv() {
                events.push(event);
                if events.len() == 5_000 {
                    bus.close();
                }
            }
            events
        });
        a_hundred_threads(&bus, |publisher| {
            for n in 0.. {
                match bus.publish(event(publisher, n)) {
                    Ok(taken) => assert_eq!(taken, 1),
                    Err(PublishError::Closed(back)) => {
                        assert_eq!(back, event(publisher, n));
                        accepted.fetch_add(n, Ordering::Relaxed);
                        break;
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        });
        let events = reading.join().unwrap();
        assert_order_per_publisher(&events);
        assert_eq!(events.len() as u64, accepted.load(Ordering::Relaxed));
    });
    assert_sums_close(&bus.metrics());
}

#[test]
fn readers_that_sleep_for_one_topic_are_woken_by_whoever_makes_their_event_readable() {
    let bus = strict_bus(32, FOREVER);
    let names: Vec<_> = (0..8).map(|n| format!("topic.{n}")).collect();
    let readers: Vec<_> = names.iter().map(|name| narrow(&bus, name, Policy::Block)).collect();
    let topics: Vec<_> = names.iter().map(|name| bus.topic(name).unwrap()).collect();
    thread::scope(|scope| {
        // Each publishes when its last event was read: between two events its reader sleeps.
        for (reader, topic) in readers.iter().zip(&topics) {
            let (told, heard) = std::sync::mpsc::channel();
            let bus = &bus;
            scope.spawn(move || {
                for n in 0..3_000 {
                    assert_eq!(bus.publish_to(topic, n), Ok(1));
                    assert_eq!(heard.recv(), Ok(n));
                }
            });
            scope.spawn(move || {
                (0..3_000).for_each(|_| told.send(reader.recv().unwrap()).unwrap());
            });
        }
    });
    assert_sums_close(&bus.metrics());
}

#[test]
fn batches_of_strict_publishers_keep_their_order_and_close_their_sums() {
    let bus = strict_bus(64, FOREVER);
    let reader = subscribe(&bus, 64, Policy::Block);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read_to_the_end(&reader));
        a_hundred_threads(&bus, |publisher| {
            for (length, from) in [(1, 0), (7, 1), (40, 8), (200, 48)] {
                let batch: Vec<_> = (from..from + length).map(|n| event(publisher, n)).collect();
                assert_eq!(bus.publish_batch(None, &batch), Ok(batch.len()));
            }
        });
        let (events, missed) = reading.join().unwrap();
        assert_eq!((events.len() as u64, missed), (PUBLISHERS * 248, 0));
        assert!(assert_order_per_publisher(&events).values().all(|&count| count == 248));
    });
    assert_sums_close(&bus.metrics());
}

#[test]
fn who_joins_and_leaves_while_strict_publishers_go_on_has_everything_from_its_start() {
    let bus = strict_bus(64, FOREVER);
    let stays = subscribe(&bus, 64, Policy::Block);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read_to_the_end(&stays));
        a_hundred_threads(&bus, |publisher| {
            for n in 0..EVENTS {
                assert!(bus.publish(event(publisher, n)).is_ok());
                if publisher < 4 {
                    join_and_leave(&bus, (publisher + n) as usize);
                }
            }
        });
        let (events, missed) = reading.join().unwrap();
        assert_eq!((events.len() as u64, missed), (PUBLISHERS * EVENTS, 0));
        assert_order_per_publisher(&events);
    });
    assert_sums_close(&bus.metrics());
}

fn join_and_leave(bus: &RingEventBus<u64>, case: usize) {
    let (policy, start) = [
        (Policy::Block, Start::Now),
        (Policy::DropOldest, Start::OldestKept),
        (Policy::DropOldest, Start::Sequence(0)),
        (Policy::Conflate, Start::Now),
    ][case % 4];
    let options = SubscribeOptions { policy: Some(policy), start, ..Default::default() };
    let reader = bus.subscribe_with(options).unwrap();
    let (mut read, mut missed) = (Vec::new(), 0);
    for _ in 0..20 {
        match support::read(&reader) {
            Some(Read::Event(event)) => read.push(event),
            Some(Read::Missed(hole)) => missed += hole,
            _ => thread::yield_now(),
        }
    }
    reader.close();
    assert_order_per_publisher(&read);
    let row = reader.metrics();
    assert_row_closes(&row);
    assert_eq!(row.delivered, read.len() as u64);
    assert!(row.dropped.total() >= missed, "{row:?}");
}

#[test]
fn each_policy_decides_for_strict_publishers_as_for_others() {
    let bus = strict_bus(4, Duration::ZERO);
    let block = subscribe(&bus, 4, Policy::Block);
    let drop_oldest = subscribe(&bus, 4, Policy::DropOldest);
    bus.publish_many(0..6).unwrap();
    let lost = |reader: &EventSubscription<u64>| reader.metrics().dropped;
    assert!(lost(&block).block_expired >= 2, "{:?}", lost(&block));
    assert!(lost(&drop_oldest).overwritten >= 2, "{:?}", lost(&drop_oldest));
    let reject = subscribe(&bus, 4, Policy::Reject);
    bus.publish_many(6..10).unwrap();
    assert_eq!(
        bus.publish(10),
        Err(PublishError::Full { event: 10, subscriptions: vec![reject.id()] })
    );
    assert_eq!(drain(&reject), events(6..10));
    let conflate = subscribe(&bus, 4, Policy::Conflate);
    bus.publish_many(10..14).unwrap();
    assert_eq!(drain(&conflate), events(13..14));
    assert_eq!(drain(&reject), events(10..14));
    conflate.close();
    assert_eq!(bus.publish(14), Ok(3), "and nobody conflates any more");
    assert_eq!(drain(&reject), events(14..15));
    assert_sums_close(&bus.metrics());
}

#[test]
fn what_strict_publishers_displace_and_leave_is_dropped_once() {
    let token = Arc::new(());
    {
        let bus = strict_bus(16, Duration::ZERO);
        let reader = subscribe(&bus, 16, Policy::DropOldest);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..1_000).for_each(|_| assert_eq!(bus.publish(token.clone()), Ok(1)))
                });
            }
        });
        assert_eq!(Arc::strong_count(&token), 17, "as many as there are slots");
        drop(reader);
    }
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn a_strict_bus_has_no_producer_and_says_why() {
    let bus: RingEventBus<u64> = strict_bus(8, Duration::ZERO);
    let error = bus.bus().producer().unwrap_err().to_string();
    assert!(
        error.starts_with("a Producer was asked of a bus whose producers are strict"),
        "{error}"
    );
    assert_eq!(bus.publish(1), Ok(0));
}

#[test]
fn only_a_ring_has_strict_producers() {
    for &backend in Backend::ALL {
        let config = BusConfig { producers: Producers::Strict, ..Default::default() };
        let bus = EventBusImpl::<u64>::new(backend, config);
        assert_eq!(bus.is_ok(), backend == Backend::Ring);
        if let Err(error) = bus {
            let expected = format!("producers was strict on backend {}", backend.name());
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
    }
}

#[test]
fn ways_to_publish_are_found_by_their_names() {
    for &producers in Producers::ALL {
        assert_eq!(producers.name().parse(), Ok(producers));
    }
    let error: ConfigError = "many".parse::<Producers>().unwrap_err();
    assert_eq!(error.to_string(), "producers was \"many\"; it must be shared or strict");
}
