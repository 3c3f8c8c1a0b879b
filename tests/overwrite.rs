//! The ring whose publisher never waits: whole events in order, holes that add up, and an end.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use tickbus::{Event, EventType, Lagged, OverwriteReader, OverwriteRing, TryRecvError};

/// An event all of whose words follow from its number.
fn numbered(number: u64) -> [u64; 4] {
    [number, !number, number.rotate_left(17), number.wrapping_mul(0x9E37_79B9_7F4A_7C15)]
}

/// Reads what is there, and returns the number of the next event.
fn read(reader: &mut OverwriteReader<[u64; 4]>, batch: usize, mut next: u64) -> (u64, bool) {
    let mut events = Vec::new();
    let outcome = match batch {
        1 => reader.try_recv().map(|event| events.push(event)).map(|()| 1),
        _ => reader.try_recv_many(&mut events, batch),
    };
    assert_eq!(outcome.is_ok(), !events.is_empty());
    for event in events {
        assert_eq!(event, numbered(next), "torn, or another one");
        next += 1;
    }
    match outcome {
        Err(TryRecvError::Lagged(Lagged { missed, exact })) => {
            assert!(exact && missed > 0);
            (next + missed, false)
        }
        Err(TryRecvError::Closed) => (next, true),
        _ => (next, false),
    }
}

#[test]
fn a_reader_that_keeps_up_gets_everything_in_order() {
    for capacity in [1, 2, 8, 64] {
        let (mut publisher, ring) = OverwriteRing::new(capacity).unwrap();
        let mut reader = ring.reader();
        assert_eq!(reader.try_recv(), Err(TryRecvError::Empty));
        for number in 0..1_000 {
            publisher.publish(&numbered(number));
            assert_eq!(reader.pending(), 1);
            assert_eq!(reader.try_recv(), Ok(numbered(number)));
        }
        assert_eq!((reader.delivered(), reader.overwritten()), (1_000, 0));
        drop(publisher);
        assert_eq!(reader.try_recv(), Err(TryRecvError::Closed));
    }
}

#[test]
fn a_lapped_reader_is_told_how_many_it_missed_and_goes_on_in_the_middle() {
    let (mut publisher, ring) = OverwriteRing::new(64).unwrap();
    let mut reader = ring.reader();
    (0..1_000).for_each(|number| publisher.publish(&numbered(number)));
    let lagged = Lagged { missed: 1_000 - 32, exact: true };
    assert_eq!(reader.try_recv(), Err(TryRecvError::Lagged(lagged)));
    let mut batch = Vec::new();
    assert_eq!(reader.try_recv_many(&mut batch, 100), Ok(32));
    assert_eq!(batch, (1_000 - 32..1_000).map(numbered).collect::<Vec<_>>());
    assert_eq!(reader.delivered() + reader.overwritten(), publisher.sequence());
}

#[test]
fn a_batch_larger_than_the_ring_leaves_its_last_events() {
    for (capacity, events) in [(8, 5), (8, 8), (8, 100), (1, 3)] {
        let (mut publisher, ring) = OverwriteRing::new(capacity).unwrap();
        let mut reader = ring.reader();
        publisher.publish_batch(&(0..events).map(numbered).collect::<Vec<_>>());
        publisher.publish_batch(&[]);
        let mut next = 0;
        while reader.pending() > 0 {
            next = read(&mut reader, 16, next).0;
        }
        assert_eq!(next, events);
    }
}

#[test]
fn who_begins_at_the_oldest_gets_what_is_still_there() {
    let (mut publisher, ring) = OverwriteRing::new(64).unwrap();
    (0..1_000).for_each(|number| publisher.publish(&numbered(number)));
    let mut reader = ring.reader_from_oldest();
    let first = reader.try_recv().unwrap()[0];
    assert!((1_000 - 64..1_000 - 48).contains(&first), "{first}");
    assert_eq!(ring.reader().pending(), 0);
}

#[test]
fn readers_of_any_speed_get_whole_events_and_holes_that_add_up() {
    const EVENTS: u64 = 300_000;
    for (capacity, readers) in [(1, 1), (16, 3), (1_024, 2)] {
        let (mut publisher, ring) = OverwriteRing::new(capacity).unwrap();
        let started = AtomicBool::new(false);
        thread::scope(|scope| {
            for number in 0..readers {
                let (mut reader, started) = (ring.reader(), &started);
                scope.spawn(move || {
                    let (mut next, mut ended) = (0, false);
                    while !ended {
                        (next, ended) = read(&mut reader, [1, 7, 64][number], next);
                        started.store(true, Ordering::Relaxed);
                    }
                    assert_eq!(next, EVENTS);
                    assert_eq!(reader.delivered() + reader.overwritten(), EVENTS);
                });
            }
            while !started.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            for number in 0..EVENTS {
                publisher.publish(&numbered(number));
            }
            drop(publisher);
        });
    }
}

#[test]
fn a_compact_event_goes_through_unchanged() {
    let (mut publisher, ring) = OverwriteRing::<Event>::new(4).unwrap();
    let mut reader = ring.reader();
    let mut event = Event::from_bytes([0; 32]);
    event.event_type = EventType::EmergencyStop;
    event.value = -0.0;
    publisher.publish(&event);
    assert_eq!(reader.try_recv(), Ok(event));
}

#[test]
fn words_that_do_not_fill_the_last_one_are_kept() {
    let (mut publisher, ring) = OverwriteRing::<[u8; 11]>::new(2).unwrap();
    let mut reader = ring.reader();
    publisher.publish(b"hello world");
    assert_eq!(reader.try_recv(), Ok(*b"hello world"));
    assert!(OverwriteRing::<u64>::new(0).is_err());
}
