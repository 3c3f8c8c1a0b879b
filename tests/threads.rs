//! Many publishers and readers in threads: nothing is lost, nobody is forgotten, and a publisher
//! that waits is served in its turn.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::collections::HashSet;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;
use support::{
    FOREVER, Read, assert_row_closes, assert_sums_close, bus, drain, patient_bus, read, subscribe,
};
use tickbus::{
    Backend, BackpressureConfig, BusConfig, EventBus, EventBusImpl, EventSubscription, Patience,
    Policy, PublishError, RecvError, SubscribeOptions, WaitStrategy, WakeMode,
};

const PUBLISHERS: u64 = 100;
const EVENTS: u64 = 1_000;

/// Publishes `EVENTS` events from each of `PUBLISHERS` threads, all at once; an event is
/// `publisher << 32 | number`. Every publisher must see it taken by all.
fn publish_from_threads(bus: &EventBusImpl<u64>, subscribers: usize) {
    let barrier = Barrier::new(PUBLISHERS as usize);
    let _readers_end_with_a_failure = Closing(bus);
    std::thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                for number in 0..EVENTS {
                    assert_eq!(bus.publish(publisher << 32 | number), Ok(subscribers));
                }
            });
        }
    });
}

/// Closes the bus, also when a publisher panics: then nobody waits for it.
struct Closing<'a>(&'a EventBusImpl<u64>);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
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

fn assert_order_per_publisher(events: &[u64]) {
    let mut next = vec![0; PUBLISHERS as usize];
    for event in events {
        let (publisher, number) = ((event >> 32) as usize, event & 0xffff_ffff);
        assert!(number >= next[publisher], "publisher {publisher}: {number} came late or twice");
        next[publisher] = number + 1;
    }
}

#[test]
fn every_way_of_waiting_gets_every_event_and_the_end() {
    let strategies = [WaitStrategy::Spin, WaitStrategy::Yield, WaitStrategy::Park];
    for wake_mode in [WakeMode::Auto, WakeMode::Fenced, WakeMode::Polling] {
        for (&backend, strategy) in
            Backend::ALL.iter().flat_map(|backend| strategies.map(|strategy| (backend, strategy)))
        {
            let backpressure =
                BackpressureConfig { max_block_duration: FOREVER, ..Default::default() };
            let config =
                BusConfig { capacity: 1_024, backpressure, wake_mode, ..Default::default() };
            let bus = EventBusImpl::<u64>::new(backend, config).unwrap();
            let subscription = bus.subscribe(1_024).unwrap();
            thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    for event in 0..1_000 {
                        assert_eq!(subscription.recv_by(strategy), Ok(event));
                    }
                    assert_eq!(subscription.recv_by(strategy), Err(RecvError::Closed));
                });
                (0..1_000).for_each(|event| assert_eq!(bus.publish(event), Ok(1)));
                bus.close();
                reader.join().unwrap();
            });
        }
    }
}

#[test]
fn a_hundred_threads_lose_nothing_and_keep_their_order() {
    for (backend, capacity) in [(Backend::LockFree, 64), (Backend::Broadcast, 1 << 17)] {
        let bus = patient_bus(backend, capacity, FOREVER);
        let subscriptions: Vec<_> = (0..3).map(|_| bus.subscribe(capacity).unwrap()).collect();
        std::thread::scope(|scope| {
            let readers: Vec<_> = subscriptions
                .iter()
                .map(|subscription| scope.spawn(|| read_to_the_end(subscription)))
                .collect();
            publish_from_threads(&bus, 3);
            for reader in readers {
                let (events, missed) = reader.join().unwrap();
                assert_eq!((events.len() as u64, missed), (PUBLISHERS * EVENTS, 0));
                assert_order_per_publisher(&events);
            }
        });
        let metrics = bus.metrics();
        assert_eq!((metrics.total_published, metrics.total_dropped), (PUBLISHERS * EVENTS, 0));
        assert_sums_close(&metrics);
    }
}

#[test]
fn a_hundred_threads_that_overwrite_are_told_every_hole() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 64);
        let subscriptions: Vec<_> =
            (0..2).map(|_| subscribe(&bus, 64, Policy::DropOldest)).collect();
        std::thread::scope(|scope| {
            let readers: Vec<_> = subscriptions
                .iter()
                .map(|subscription| scope.spawn(|| read_to_the_end(subscription)))
                .collect();
            publish_from_threads(&bus, 2);
            for reader in readers {
                let (events, missed) = reader.join().unwrap();
                assert_eq!(events.len() as u64 + missed, PUBLISHERS * EVENTS);
                assert_order_per_publisher(&events);
            }
        });
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn each_hole_is_as_wide_as_the_gap_in_the_numbers() {
    for (backend, policy) in [
        (Backend::LockFree, Policy::DropOldest),
        (Backend::LockFree, Policy::DropNewest),
        (Backend::LockFree, Policy::Block),
        (Backend::Broadcast, Policy::DropOldest),
    ] {
        let bus = bus(backend, 8);
        let subscription = subscribe(&bus, 8, policy);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..50_000_u64 {
                    bus.publish(number).unwrap();
                }
                bus.close();
            });
            let mut next = 0;
            loop {
                match subscription.recv() {
                    Ok(number) => {
                        assert_eq!(number, next, "{} {policy:?}", backend.name());
                        next += 1;
                    }
                    Err(RecvError::Lagged(lagged)) => next += lagged.missed,
                    Err(_) => break,
                }
            }
            assert_eq!(next, 50_000);
        });
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn readers_of_one_subscription_compete_and_each_event_goes_to_one() {
    for (backend, capacity) in [(Backend::LockFree, 16), (Backend::Broadcast, 1 << 15)] {
        let bus = patient_bus(backend, capacity, FOREVER);
        let subscription = bus.subscribe(capacity).unwrap();
        std::thread::scope(|scope| {
            let readers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| read_to_the_end(&subscription).0)).collect();
            for event in 0..20_000 {
                assert_eq!(bus.publish(event), Ok(1));
            }
            bus.close();
            let shares: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
            for share in &shares {
                assert!(share.is_sorted(), "one reader's events keep their order");
            }
            let seen: HashSet<_> = shares.iter().flatten().collect();
            assert_eq!(seen.len(), 20_000);
            assert_eq!(shares.iter().map(Vec::len).sum::<usize>(), 20_000);
        });
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn closing_the_bus_frees_a_publisher_that_waits() {
    let bus = bus(Backend::LockFree, 1);
    let subscription = subscribe(&bus, 1, Policy::Block);
    bus.publish(0).unwrap();
    let mut waiting = bus.bus().publication(1, None, true);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            assert!(waiting.park(None));
            waiting.poll(Patience::Left)
        });
        bus.close();
        assert_eq!(publisher.join().unwrap(), Err(PublishError::Closed(1)));
    });
    assert_eq!(drain(&subscription), [Read::Event(0), Read::Closed]);
}

#[test]
fn closing_a_subscription_frees_its_publishers_and_its_readers() {
    for policy in [Policy::Block, Policy::Reject] {
        let bus = bus(Backend::LockFree, 1);
        let full = subscribe(&bus, 1, policy);
        let other = subscribe(&bus, 4, Policy::Block);
        bus.publish(0).unwrap();
        let mut waiting: Vec<_> =
            (1..4).map(|event| bus.bus().publication(event, None, true)).collect();
        for publication in &mut waiting {
            assert_eq!(publication.poll(Patience::Left), Ok(None));
        }
        std::thread::scope(|scope| {
            for mut publication in waiting {
                scope.spawn(move || {
                    assert!(publication.park(None));
                    assert_eq!(publication.poll(Patience::Left), Ok(Some(1)));
                });
            }
            full.close();
        });
        assert_eq!(drain(&other).len(), 4);
        assert_eq!(full.metrics().dropped.closed, 1);
        assert_row_closes(&full.metrics());

        let idle = bus.subscribe(4).unwrap();
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3).map(|_| scope.spawn(|| idle.recv())).collect();
            idle.close();
            for reader in readers {
                assert_eq!(reader.join().unwrap(), Err(RecvError::Closed));
            }
        });
    }
}

#[test]
fn losing_the_last_handle_frees_a_publisher_that_waits() {
    let bus = bus(Backend::LockFree, 1);
    let subscription = subscribe(&bus, 1, Policy::Block);
    bus.publish(0).unwrap();
    let mut waiting = bus.bus().owned_publication(1, None, true);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    drop(bus);
    assert!(waiting.park(None));
    assert_eq!(waiting.poll(Patience::Left), Err(PublishError::Closed(1)));
    assert_eq!(drain(&subscription), [Read::Event(0), Read::Closed]);
}

#[test]
fn losing_a_subscription_frees_a_publisher_that_waits() {
    let bus = bus(Backend::LockFree, 1);
    let subscription = subscribe(&bus, 1, Policy::Block);
    bus.publish(0).unwrap();
    let mut waiting = bus.bus().publication(1, None, false);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    drop(subscription);
    assert!(waiting.park(None));
    assert_eq!(waiting.poll(Patience::Left), Ok(Some(0)));
    assert_eq!(bus.metrics().total_dropped, 1);
}

#[test]
fn a_publication_names_the_subscriptions_that_it_may_have_to_wait_for() {
    let bus = bus(Backend::LockFree, 1);
    let block = subscribe(&bus, 1, Policy::Block);
    let reject = subscribe(&bus, 1, Policy::Reject);
    let _roomy = subscribe(&bus, 2, Policy::Block);
    let _lossy = [Policy::DropNewest, Policy::DropOldest].map(|policy| subscribe(&bus, 1, policy));
    assert!(bus.bus().publication(0, None, false).without_room().is_empty());
    bus.publish(0).unwrap();
    let mut waiting = bus.bus().publication(1, None, true);
    assert_eq!(*waiting.without_room(), [block.id(), reject.id()]);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    assert_eq!(*waiting.without_room(), [block.id(), reject.id()], "in line it still says so");
    assert_eq!(read(&block), Some(Read::Event(0)));
    assert_eq!(*waiting.without_room(), [reject.id()]);
    reject.close();
    assert!(waiting.without_room().is_empty());
    assert_eq!(waiting.poll(Patience::Left), Ok(Some(3)));
}

#[test]
fn freed_room_goes_to_the_publisher_that_waits_longest() {
    for policy in [Policy::Block, Policy::Reject] {
        let bus = bus(Backend::LockFree, 2);
        let subscription = subscribe(&bus, 2, policy);
        bus.publish_many([0, 1]).unwrap();
        let mut first = bus.bus().publication(10, None, true);
        let mut second = bus.bus().publication(20, None, true);
        let mut third = bus.bus().publication(30, None, true);
        for publication in [&mut first, &mut second, &mut third] {
            assert_eq!(publication.poll(Patience::Left), Ok(None));
        }
        assert_eq!(read(&subscription), Some(Read::Event(0)));
        assert_eq!(third.poll(Patience::Left), Ok(None), "one place, two before it");
        assert_eq!(second.poll(Patience::Left), Ok(None), "one place, one before it");
        let mut newcomer = bus.bus().publication(99, None, false);
        match newcomer.poll(Patience::Spent) {
            Ok(taken) => assert_eq!((policy, taken), (Policy::Block, Some(0))),
            Err(error) => {
                assert!(matches!(error, PublishError::Full { .. }));
                assert_eq!(policy, Policy::Reject);
            }
        }
        assert_eq!(first.poll(Patience::Left), Ok(Some(1)));
        assert_eq!(third.poll(Patience::Left), Ok(None));
        drop(second); // cancelled: its place in line is free
        let rest: Vec<_> = [read(&subscription)].into_iter().flatten().collect();
        assert_eq!(rest, [Read::Event(1)]);
        assert!(third.park(None));
        assert_eq!(third.poll(Patience::Left), Ok(Some(1)));
        let mut reads = drain(&subscription);
        reads.retain(|read| matches!(read, Read::Event(_)));
        assert_eq!(reads, [Read::Event(10), Read::Event(30)]);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_wake_up_of_a_cancelled_publisher_goes_to_the_next_in_line() {
    let bus = bus(Backend::LockFree, 1);
    let subscription = subscribe(&bus, 1, Policy::Block);
    bus.publish(0).unwrap();
    let mut first = bus.bus().publication(1, None, false);
    let mut second = bus.bus().publication(2, None, false);
    assert_eq!(first.poll(Patience::Left), Ok(None));
    assert_eq!(second.poll(Patience::Left), Ok(None));
    assert_eq!(read(&subscription), Some(Read::Event(0)));
    drop(first);
    assert!(second.park(None));
    assert_eq!(second.poll(Patience::Left), Ok(Some(1)));
    assert_eq!(drain(&subscription), [Read::Event(2)]);
}

#[test]
fn patience_is_spent_once_on_a_dead_reader() {
    let bus = bus(Backend::LockFree, 1);
    let dead = subscribe(&bus, 1, Policy::Block);
    let alive = subscribe(&bus, 64, Policy::Block);
    bus.publish(0).unwrap();
    let publish = |event| {
        let mut publication = bus.bus().publication(event, None, false);
        match publication.poll(Patience::Left) {
            Ok(None) => ("waited", publication.poll(Patience::Spent)),
            result => ("at once", result),
        }
    };
    assert_eq!(publish(1), ("waited", Ok(Some(1))));
    assert_eq!(publish(2), ("at once", Ok(Some(1))));
    assert_eq!(publish(3), ("at once", Ok(Some(1))));
    assert_eq!(read(&dead), Some(Read::Event(0)), "it reads: it is worth waiting for again");
    assert_eq!(publish(4), ("at once", Ok(Some(2))));
    assert_eq!(publish(5), ("waited", Ok(Some(1))));
    assert_eq!(publish(6), ("at once", Ok(Some(1))));
    assert_eq!(drain(&dead), [Read::Missed(3), Read::Event(4), Read::Missed(2)]);
    assert_eq!(dead.metrics().dropped.block_expired, 5);
    assert_eq!(drain(&alive).len(), 7);
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_publisher_that_did_not_wait_spends_nobodys_patience() {
    let bus = bus(Backend::LockFree, 1);
    let _full = subscribe(&bus, 1, Policy::Block);
    bus.publish(0).unwrap();
    assert_eq!(bus.bus().publication(1, None, false).poll(Patience::Spent), Ok(Some(0)));
    assert_eq!(bus.bus().publication(2, None, false).poll(Patience::Left), Ok(None));
}

#[test]
fn one_patience_covers_a_whole_batch() {
    let bus = patient_bus(Backend::LockFree, 1, Duration::from_millis(1));
    let dead = subscribe(&bus, 1, Policy::Block);
    let slow = subscribe(&bus, 2, Policy::Block);
    assert_eq!(bus.publish_many(0..1_000), Ok(1_000));
    assert_eq!(dead.metrics().dropped.block_expired, 999);
    assert_eq!(slow.metrics().dropped.block_expired, 998);
    assert_eq!(drain(&dead), [Read::Event(0), Read::Missed(999)]);
    assert_sums_close(&bus.metrics());
}

#[test]
fn an_event_behind_a_hole_takes_room_until_it_is_read() {
    let bus = bus(Backend::LockFree, 1);
    let subscription = subscribe(&bus, 1, Policy::Block);
    bus.publish_many([0, 1]).unwrap(); // misses 1
    assert_eq!(read(&subscription), Some(Read::Event(0)));
    bus.publish(2).unwrap();
    let mut waiting = bus.bus().publication(3, None, false);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    assert_eq!(read(&subscription), Some(Read::Missed(1)));
    assert_eq!(waiting.poll(Patience::Left), Ok(None), "telling the hole took nothing out");
    assert_eq!(subscription.pending(), 1);
    assert_eq!(read(&subscription), Some(Read::Event(2)));
    assert!(waiting.park(None));
    assert_eq!(waiting.poll(Patience::Left), Ok(Some(1)));
    assert_eq!(drain(&subscription), [Read::Event(3)]);
    assert_sums_close(&bus.metrics());
}

#[test]
fn subscriptions_join_and_leave_while_others_publish() {
    for &backend in Backend::ALL {
        let bus = patient_bus(backend, 1 << 16, FOREVER);
        let steady = bus.subscribe(1 << 16).unwrap();
        let publisher_events = 10_000_u64;
        std::thread::scope(|scope| {
            for publisher in 0..2_u64 {
                let bus = &bus;
                scope.spawn(move || {
                    for number in 0..publisher_events {
                        assert!(bus.publish(publisher << 32 | number).unwrap() >= 1);
                    }
                });
            }
            scope.spawn(|| {
                for round in 0..300_usize {
                    let options = SubscribeOptions::default();
                    let guest = bus.subscribe_with(options).unwrap();
                    let mut last = [None; 2];
                    for _ in 0..round % 50 {
                        let Some(Read::Event(event)) = read(&guest) else { continue };
                        let (publisher, number) = ((event >> 32) as usize, event & 0xffff_ffff);
                        if let Some(last) = last[publisher] {
                            assert_eq!(number, last + 1, "nothing is missing after joining");
                        }
                        last[publisher] = Some(number);
                    }
                    guest.close();
                    assert_eq!(read(&guest), Some(Read::Closed));
                    let row = guest.metrics();
                    assert_row_closes(&row);
                    assert_eq!(row.offered, row.delivered + row.dropped.closed);
                }
            });
        });
        assert_eq!(drain(&steady).len() as u64, 2 * publisher_events);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_subscription_that_leaves_under_its_reader_counts_each_event_once() {
    for &backend in Backend::ALL {
        for _ in 0..200 {
            let bus = bus(backend, 64);
            let subscription = subscribe(&bus, 64, Policy::DropOldest);
            let barrier = Barrier::new(3);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    barrier.wait();
                    (0..100).for_each(|event| assert!(bus.publish(event).is_ok()));
                });
                let reader = scope.spawn(|| {
                    barrier.wait();
                    read_to_the_end(&subscription).0.len() as u64
                });
                barrier.wait();
                subscription.close();
                let delivered = reader.join().unwrap();
                assert_eq!(subscription.metrics().delivered, delivered);
            });
            assert_row_closes(&subscription.metrics());
        }
    }
}
