//! A publisher that is descheduled in the middle of a publication, and a hundred others: what the
//! table of progress says, for each way to be in the middle.
//!
//! No code of a user runs there, so that only the bus itself can be stopped: the tests hold what a
//! publisher holds at that point.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::{Backend, Bus, BusConfig, SubscribeOptions};
use crate::error::RecvError;
use crate::policy::{BackpressureConfig, Policy};
use crate::subscription::EventSubscription;
use crate::sync::{AtomicUsize, Ordering};
use crate::topic::NO_TOPIC;
use std::thread;
use std::time::Duration;

const OTHERS: u64 = 100;
/// Events of each of the others: more than there is room for.
const EVENTS: u64 = 20;
const CAPACITY: usize = 64;

fn bus(backend: Backend) -> (Bus<u64>, EventSubscription<u64>) {
    let backpressure =
        BackpressureConfig { max_block_duration: Duration::MAX, ..Default::default() };
    let config = BusConfig { capacity: CAPACITY, backpressure, ..Default::default() };
    let bus = Bus::new(backend, config).unwrap();
    let policy = if backend == Backend::Broadcast { Policy::DropOldest } else { Policy::Block };
    let options = SubscribeOptions { policy: Some(policy), ..Default::default() };
    let reader = bus.subscribe_with(options).unwrap();
    (bus, reader)
}

/// Events that were published before one publisher stopped.
const BEFORE: u64 = 3;

fn publish_before(bus: &Bus<u64>) {
    (0..BEFORE).for_each(|event| assert_eq!(bus.publish_as_configured(event, None), Ok(1)));
}

/// Starts the others, looks when all of them are at it, has the one that stopped `go_on`, by which
/// it publishes one more, and checks that every event comes.
fn others_wait_and_lose_nothing(
    bus: &Bus<u64>,
    reader: &EventSubscription<u64>,
    go_on: impl FnOnce(),
) {
    let arrived = AtomicUsize::new(0);
    thread::scope(|scope| {
        for other in 1..=OTHERS {
            let arrived = &arrived;
            scope.spawn(move || {
                arrived.fetch_add(1, Ordering::Relaxed);
                for number in 0..EVENTS {
                    assert_eq!(bus.publish_as_configured(other << 32 | number, None), Ok(1));
                }
            });
        }
        while arrived.load(Ordering::Relaxed) < OTHERS as usize {
            thread::yield_now();
        }
        // Readers take what was published before, and look at the numbers.
        (0..BEFORE).for_each(|event| assert_eq!(reader.try_recv(), Ok(event)));
        assert!(reader.try_recv().is_err(), "another publisher did not wait");
        assert_eq!(bus.metrics().subscriptions[0].delivered, BEFORE);
        go_on();
        let mut next = [0; OTHERS as usize + 1];
        next[0] = BEFORE;
        let (mut received, mut missed) = (0, 0);
        while received + missed < OTHERS * EVENTS + 1 {
            match reader.recv() {
                Ok(event) => {
                    let (publisher, number) = ((event >> 32) as usize, event & 0xFFFF_FFFF);
                    assert!(number >= next[publisher], "{event:#x} came after {next:?}");
                    next[publisher] = number + 1;
                    received += 1;
                }
                Err(RecvError::Lagged(lagged)) => missed += lagged.missed,
                Err(error) => panic!("{error}"),
            }
        }
        if reader.policy() == Policy::Block {
            assert_eq!(missed, 0);
        }
    });
    let row = reader.metrics();
    assert_eq!(row.offered, BEFORE + OTHERS * EVENTS + 1, "{row:?}");
    assert_eq!(row.offered, row.delivered + row.dropped.total() + row.pending, "{row:?}");
    assert_eq!(row.pending, 0);
}

#[test]
fn others_wait_for_a_publisher_that_stopped_with_the_token() {
    for &backend in Backend::ALL.iter().filter(|&&backend| backend != Backend::Ring) {
        let (bus, reader) = bus(backend);
        publish_before(&bus);
        let shared = bus.share();
        let mut stopped = shared.token.lock();
        others_wait_and_lose_nothing(&bus, &reader, || {
            assert_eq!(stopped.publish_ready(NO_TOPIC, BEFORE, &shared), Ok(1));
            drop(stopped);
        });
    }
}

#[test]
fn nobody_on_a_ring_waits_for_one_that_stopped_with_the_token_between_two_questions() {
    let (bus, reader) = bus(Backend::Ring);
    publish_before(&bus);
    let shared = bus.share();
    let _stopped = shared.token.lock();
    for event in BEFORE..CAPACITY as u64 / 4 {
        assert_eq!(bus.publish_as_configured(event, None), Ok(1));
    }
    for event in 0..CAPACITY as u64 / 4 {
        assert_eq!(reader.try_recv(), Ok(event));
    }
    assert_eq!(bus.metrics().total_published, CAPACITY as u64 / 4);
}

#[test]
fn others_wait_for_one_that_stopped_with_a_claim_of_its_own_seat() {
    let (bus, reader) = bus(Backend::Ring);
    publish_before(&bus);
    let shared = bus.share();
    let Some(ring) = &shared.ring else { unreachable!("the bus has a ring") };
    // Where there are no seats, every publisher is one among others: the next test.
    let Some(claim) = ring.claim() else { return };
    // While nobody else publishes, who joins and leaves does not wait.
    bus.subscribe_with(SubscribeOptions::default()).unwrap().close();
    others_wait_and_lose_nothing(&bus, &reader, || {
        assert_eq!(ring.publish(claim, NO_TOPIC, BEFORE), None);
    });
}

#[test]
fn others_wait_for_one_among_them_that_stopped_with_the_right() {
    let (bus, reader) = bus(Backend::Ring);
    // Each of these threads takes the seat of the one before away.
    for event in 0..BEFORE {
        thread::scope(|scope| {
            scope.spawn(|| assert_eq!(bus.publish_as_configured(event, None), Ok(1)));
        });
    }
    let shared = bus.share();
    let Some(ring) = &shared.ring else { unreachable!("the bus has a ring") };
    let (held, limit) = ring.right.take().unwrap();
    assert!(held.next() < limit);
    bus.subscribe_with(SubscribeOptions::default()).unwrap().close();
    others_wait_and_lose_nothing(&bus, &reader, || {
        // SAFETY: the right is held, and the next sequence is below the limit.
        assert_eq!(unsafe { ring.write(&held, NO_TOPIC, BEFORE) }, None);
        drop(held);
    });
}
