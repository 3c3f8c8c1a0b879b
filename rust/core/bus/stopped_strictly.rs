//! A strict publisher that is descheduled in the middle of a publication, and a hundred others: what
//! the table of progress says.
//!
//! No code of a user runs there, so that only the bus itself can be stopped: the tests hold what a
//! publisher holds at that point, a turn.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::{Backend, Bus, BusConfig, Producers, SubscribeOptions};
use crate::error::{RecvError, TryRecvError};
use crate::policy::{BackpressureConfig, Policy};
use crate::ring::Ring;
use crate::ring::strict::{Passed, Turn};
use crate::subscription::EventSubscription;
use crate::sync::{AtomicUsize, Ordering, ThreadExclusion};
use crate::topic::{NO_TOPIC, Pattern};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const CAPACITY: u64 = 1_024;
/// How far a sweep lets publishers go.
const STRIDE: u64 = CAPACITY / 4;
/// Events before one publisher stops.
const BEFORE: u64 = 3;

fn bus(pattern: Option<&str>) -> (Bus<u64>, EventSubscription<u64>) {
    let config = BusConfig {
        capacity: CAPACITY as usize,
        backpressure: BackpressureConfig {
            max_block_duration: Duration::MAX,
            ..Default::default()
        },
        producers: Producers::Strict,
        ..Default::default()
    };
    let bus = Bus::new(Backend::Ring, config).unwrap();
    let pattern = pattern.map(|pattern| Pattern::new(pattern).unwrap());
    let options = SubscribeOptions { policy: Some(Policy::Block), pattern, ..Default::default() };
    let reader = bus.subscribe_with(options).unwrap();
    (bus, reader)
}

/// A publisher that has claimed a sequence and does not go on.
struct Stopped {
    ring: Arc<Ring<u64, ThreadExclusion>>,
    turn: Turn,
}

impl Stopped {
    fn new(bus: &Bus<u64>) -> Self {
        let ring = bus.shared().ring.clone().unwrap();
        let turn = ring.right.take_turn(1).unwrap();
        Self { ring, turn }
    }

    fn go_on(self, bus: &Bus<u64>, topic: u32, event: u64) {
        let mut passed = Passed::new();
        assert_eq!(self.ring.publish_turn(&self.turn, topic, event, &mut passed), None);
        bus.shared().end_turn(&self.ring, &self.turn, &passed);
    }
}

#[test]
fn a_strict_publisher_that_stopped_keeps_nobody_from_publishing_up_to_the_limit() {
    let (bus, reader) = bus(None);
    let publish = |event| assert_eq!(bus.publish_as_configured(event, None), Ok(1));
    (0..BEFORE).for_each(publish);
    let stopped = Stopped::new(&bus);
    // A hundred others fill all that is left of the stride, and none of them waits.
    let left = STRIDE - BEFORE - 1;
    thread::scope(|scope| {
        for other in 0..100 {
            let share = left / 100 + u64::from(other < left % 100);
            scope.spawn(move || (0..share).for_each(|n| publish((other + 1) << 32 | n)));
        }
    });
    // Readers have what was published before it, and not yet what came after.
    (0..BEFORE).for_each(|event| assert_eq!(reader.try_recv(), Ok(event)));
    assert_eq!(reader.try_recv(), Err(TryRecvError::Empty));
    // Who joins and leaves does not wait either.
    bus.subscribe_with(SubscribeOptions::default()).unwrap().close();
    assert_eq!(bus.published(), BEFORE);
    stopped.go_on(&bus, NO_TOPIC, BEFORE);
    assert_eq!(reader.try_recv(), Ok(BEFORE));
    let mut next = [0; 101];
    for _ in 0..left {
        let event = reader.try_recv().unwrap();
        let (other, number) = ((event >> 32) as usize, event & 0xffff_ffff);
        assert_eq!(number, next[other], "the order of one publisher");
        next[other] += 1;
    }
    assert_eq!(reader.try_recv(), Err(TryRecvError::Empty));
    assert_eq!(bus.published(), STRIDE);
}

#[test]
fn at_the_limit_others_wait_for_a_strict_publisher_that_stopped_and_lose_nothing() {
    let (bus, reader) = bus(None);
    (0..BEFORE).for_each(|event| assert_eq!(bus.publish_as_configured(event, None), Ok(1)));
    let stopped = Stopped::new(&bus);
    let arrived = AtomicUsize::new(0);
    let events = 2 * CAPACITY / 100;
    thread::scope(|scope| {
        for other in 1..=100 {
            let (bus, arrived) = (&bus, &arrived);
            scope.spawn(move || {
                arrived.fetch_add(1, Ordering::Relaxed);
                for number in 0..events {
                    assert_eq!(bus.publish_as_configured(other << 32 | number, None), Ok(1));
                }
            });
        }
        while arrived.load(Ordering::Relaxed) < 100 {
            thread::yield_now();
        }
        stopped.go_on(&bus, NO_TOPIC, BEFORE);
        let mut next = [0; 101];
        next[0] = 0;
        for _ in 0..BEFORE + 1 + 100 * events {
            let event = reader.recv().unwrap();
            let (other, number) = ((event >> 32) as usize, event & 0xffff_ffff);
            assert_eq!(number, next[other], "the order of one publisher");
            next[other] += 1;
        }
    });
    assert_eq!(reader.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn who_goes_on_wakes_those_that_sleep_for_events_published_after_it() {
    let (bus, reader) = bus(Some("later"));
    let [first, later] = ["first", "later"].map(|name| bus.topic(name).unwrap());
    assert_eq!(bus.publish_as_configured(0, Some(&first)), Ok(0));
    let stopped = Stopped::new(&bus);
    thread::scope(|scope| {
        let reading = scope.spawn(|| reader.recv());
        let wait_until_it_sleeps = || {
            while !bus.shared().dormitory.asleep().any_of(u64::MAX) {
                thread::yield_now();
            }
        };
        wait_until_it_sleeps();
        assert_eq!(bus.publish_as_configured(2, Some(&later)), Ok(1));
        // It was woken, and found nothing that it could read.
        wait_until_it_sleeps();
        stopped.go_on(&bus, bus.shared().address(Some(&first)).0, 1);
        assert_eq!(reading.join().unwrap(), Ok(2));
    });
}

#[test]
fn closing_waits_for_a_strict_publisher_that_stopped_and_its_event_is_read() {
    let (bus, reader) = bus(None);
    assert_eq!(bus.publish_as_configured(0, None), Ok(1));
    let stopped = Stopped::new(&bus);
    thread::scope(|scope| {
        let closing = scope.spawn(|| bus.close());
        // Paused, nobody can claim any more.
        while let Ok(turn) = stopped.ring.right.take_turn(1) {
            stopped.ring.publish_turn(&turn, NO_TOPIC, 2, &mut Passed::new());
            thread::yield_now();
        }
        assert!(!bus.is_closed());
        stopped.go_on(&bus, NO_TOPIC, 1);
        closing.join().unwrap();
    });
    assert_eq!(bus.publish_as_configured(3, None).unwrap_err().into_event(), 3);
    let mut events = Vec::new();
    let end = loop {
        match reader.recv() {
            Ok(event) => events.push(event),
            Err(error) => break error,
        }
    };
    assert_eq!(end, RecvError::Closed);
    assert_eq!(events[..2], [0, 1]);
    assert_eq!(events.len() as u64, bus.published());
}

#[test]
fn a_turn_that_halves_the_way_to_the_limit_sweeps_ahead() {
    let (bus, reader) = bus(None);
    let publish = |event| assert_eq!(bus.publish_as_configured(event, None), Ok(1));
    (0..STRIDE / 2).for_each(publish);
    let ends = [(); 2].map(|()| {
        let stopped = Stopped::new(&bus);
        let limit = stopped.turn.limit();
        stopped.go_on(&bus, NO_TOPIC, 0);
        limit
    });
    assert_eq!(ends, [STRIDE, STRIDE / 2 + 1 + STRIDE], "the first one swept, without a question");
    (0..STRIDE / 2 + 2).for_each(|_| assert!(reader.try_recv().is_ok()));
}
