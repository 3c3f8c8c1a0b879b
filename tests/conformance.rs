//! One suite over every backend: each cell of the table of policies, the place and the size of
//! each hole, and the sum of each subscription's books.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use futures_util::FutureExt;
use std::time::Duration;
use support::{
    FOREVER, Read, assert_row_closes, assert_sums_close, bus, drain, events, patient_bus, read,
    subscribe,
};
use tickbus::{
    Backend, BackpressureConfig, BroadcastEventBus, BusConfig, Dropped, EventBus, EventBusImpl,
    EventSubscription, KeyFn, Lagged, LockFreeEventBus, OnLag, Patience, Policy, PublishError,
    RecvError, RingEventBus, SubscribeError, SubscribeOptions, TryRecvError,
};

/// The columns of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Publish,
    OnALoop,
    Timeout,
    Async,
}

const WAYS: [Way; 4] = [Way::Publish, Way::OnALoop, Way::Timeout, Way::Async];

/// What a call came to; the errors name the subscriptions.
#[derive(Debug, PartialEq)]
enum Outcome {
    Taken(usize),
    Full(Vec<u64>),
    Timeout(Vec<u64>),
    Closed,
    /// It waits; then it is cancelled.
    Waits,
}

/// Publishes with no time to wait, except for a task, which would wait.
fn publish_by(way: Way, bus: &EventBusImpl<u64>, event: u64) -> Outcome {
    let result = match way {
        Way::Publish => Some(bus.publish(event)),
        Way::OnALoop => bus.bus().publication(event, None, false).poll(Patience::Spent).transpose(),
        Way::Timeout => Some(bus.publish_timeout(event, None, Duration::ZERO)),
        Way::Async => bus.publish_async(event, None).now_or_never(),
    };
    match result {
        None => Outcome::Waits,
        Some(Ok(taken)) => Outcome::Taken(taken),
        Some(Err(error)) => {
            let outcome = match &error {
                PublishError::Full { subscriptions, .. } => Outcome::Full(subscriptions.clone()),
                PublishError::Timeout { subscriptions, .. } => {
                    Outcome::Timeout(subscriptions.clone())
                }
                PublishError::Closed(_) => Outcome::Closed,
                other => panic!("no such row: {other:?}"),
            };
            assert_eq!(error.into_event(), event, "the error gives the event back");
            outcome
        }
    }
}

struct Cell {
    outcome: Outcome,
    /// What the full subscription reads, when 3 is published after its first read.
    full_reads: Vec<Read>,
    /// Whether the subscription with room has the event.
    others_have_it: bool,
    dropped: Dropped,
}

/// A row of the table; a subscription that conflates has as many keys.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    policy: Policy,
    keys: Option<u64>,
}

impl Row {
    fn subscribe(self, bus: &EventBusImpl<u64>) -> EventSubscription<u64> {
        let options = SubscribeOptions {
            capacity: Some(2),
            policy: Some(self.policy),
            key: self.keys.map(|keys| KeyFn::number(move |event| event % keys)),
            ..Default::default()
        };
        bus.subscribe_with(options).unwrap()
    }
}

/// The table: what publishing 2 does at a subscription that holds 0 and 1 of at most 2 events.
fn cell(backend: Backend, row: Row, way: Way, full: u64) -> Cell {
    use Read::{Event, Missed};
    let nobody = |outcome| Cell {
        outcome,
        full_reads: vec![Event(0), Event(1), Event(3)],
        others_have_it: false,
        dropped: Dropped::default(),
    };
    let missing = |dropped| Cell {
        outcome: Outcome::Taken(1),
        full_reads: vec![Event(0), Event(1), Missed(1), Event(3)],
        others_have_it: true,
        dropped,
    };
    let moved_on = |dropped| Cell {
        outcome: Outcome::Taken(2),
        full_reads: vec![Missed(1), Event(1), Event(2), Event(3)],
        others_have_it: true,
        dropped,
    };
    match (row.policy, way) {
        (Policy::Block | Policy::Reject, Way::Async) => nobody(Outcome::Waits),
        (Policy::Block, _) if backend == Backend::Ring => {
            moved_on(Dropped { block_expired: 1, ..Default::default() })
        }
        (Policy::Block, _) => missing(Dropped { block_expired: 1, ..Default::default() }),
        (Policy::Reject, Way::Timeout) => nobody(Outcome::Timeout(vec![full])),
        (Policy::Reject, _) => nobody(Outcome::Full(vec![full])),
        (Policy::DropNewest, _) => missing(Dropped { refused: 1, ..Default::default() }),
        (Policy::DropOldest, _) => moved_on(Dropped { overwritten: 1, ..Default::default() }),
        (Policy::Conflate, _) if row.keys == Some(2) => Cell {
            outcome: Outcome::Taken(2),
            full_reads: vec![Event(2), Event(3)],
            others_have_it: true,
            dropped: Dropped { conflated: 2, ..Default::default() },
        },
        (Policy::Conflate, _) => moved_on(Dropped { overwritten: 1, ..Default::default() }),
        other => panic!("no such row: {other:?}"),
    }
}

fn check_cell(backend: Backend, row: Row, way: Way) {
    let name = format!("{} {row:?} {way:?}", backend.name());
    let bus = bus(backend, 2);
    let full = row.subscribe(&bus);
    let other = row.subscribe(&bus);
    assert_eq!(bus.publish(0), Ok(2), "{name}");
    assert_eq!(bus.publish(1), Ok(2), "{name}");
    assert_eq!(drain(&other), events([0, 1]), "{name}");

    let wanted = cell(backend, row, way, full.id());
    assert_eq!(publish_by(way, &bus, 2), wanted.outcome, "{name}");
    assert_sums_close(&bus.metrics());

    let first = match wanted.full_reads[0] {
        Read::Missed(_) => 2,
        _ => 1,
    };
    let mut reads: Vec<_> = (0..first).filter_map(|_| read(&full)).collect();
    assert_eq!(bus.publish(3), Ok(2), "{name}: room was freed");
    assert_sums_close(&bus.metrics());
    reads.extend(drain(&full));
    assert_eq!(reads, wanted.full_reads, "{name}");
    assert_eq!(
        drain(&other),
        events(if wanted.others_have_it { vec![2, 3] } else { vec![3] }),
        "{name}"
    );
    assert_eq!(full.metrics().dropped, wanted.dropped, "{name}");
    assert_eq!(other.metrics().dropped, Dropped::default(), "{name}");
    assert_sums_close(&bus.metrics());
    assert_eq!(bus.metrics().total_dropped, wanted.dropped.total(), "{name}");
}

fn check_row(backend: Backend, policy: Policy) {
    check_keyed_row(backend, policy, None);
}

fn check_keyed_row(backend: Backend, policy: Policy, keys: Option<u64>) {
    WAYS.into_iter().for_each(|way| check_cell(backend, Row { policy, keys }, way));
}

#[test]
fn block_on_lock_free_lets_the_others_have_it_when_patience_ends() {
    check_row(Backend::LockFree, Policy::Block);
    check_row(Backend::Ring, Policy::Block);
}

#[test]
fn reject_on_lock_free_lets_nobody_have_it() {
    check_row(Backend::LockFree, Policy::Reject);
    check_row(Backend::Ring, Policy::Reject);
}

#[test]
fn drop_newest_on_lock_free_misses_the_new_event() {
    check_row(Backend::LockFree, Policy::DropNewest);
}

#[test]
fn drop_oldest_loses_the_oldest_event_on_both_backends() {
    check_row(Backend::LockFree, Policy::DropOldest);
    check_row(Backend::Broadcast, Policy::DropOldest);
    check_row(Backend::Ring, Policy::DropOldest);
}

#[test]
fn conflate_replaces_the_event_of_its_key_on_both_backends() {
    check_keyed_row(Backend::LockFree, Policy::Conflate, Some(2));
    check_keyed_row(Backend::Broadcast, Policy::Conflate, Some(2));
    check_keyed_row(Backend::Ring, Policy::Conflate, Some(2));
}

#[test]
fn conflate_loses_the_oldest_key_to_a_new_one_on_both_backends() {
    check_keyed_row(Backend::LockFree, Policy::Conflate, Some(100));
    check_keyed_row(Backend::Broadcast, Policy::Conflate, Some(100));
    check_keyed_row(Backend::Ring, Policy::Conflate, Some(100));
}

#[test]
fn a_policy_that_broadcast_cannot_keep_names_the_backend_that_can() {
    let bus = bus(Backend::Broadcast, 8);
    for policy in [Policy::Block, Policy::Reject, Policy::DropNewest] {
        let options = SubscribeOptions { policy: Some(policy), ..Default::default() };
        let error = bus.subscribe_with(options).expect_err("broadcast can only overwrite");
        assert!(matches!(error, SubscribeError::Config(_)));
        let text = error.to_string();
        assert!(text.contains(policy.name()) && text.contains("lock_free"), "{text}");
    }
}

#[test]
fn nobody_listening_is_zero_and_a_closed_bus_gives_the_event_back() {
    for &backend in Backend::ALL {
        for way in WAYS {
            let bus = bus(backend, 2);
            assert_eq!(publish_by(way, &bus, 7), Outcome::Taken(0));
            let subscription = bus.subscribe(2).unwrap();
            bus.close();
            assert_eq!(publish_by(way, &bus, 7), Outcome::Closed);
            assert_eq!(drain(&subscription), [Read::Closed]);
            assert!(matches!(bus.subscribe(2), Err(SubscribeError::Closed)));
            assert_eq!(bus.metrics().total_published, 1);
            assert_sums_close(&bus.metrics());
        }
    }
}

#[test]
fn a_blocked_publisher_goes_on_when_room_is_freed() {
    for policy in [Policy::Block, Policy::Reject] {
        let bus = bus(Backend::LockFree, 2);
        let subscription = subscribe(&bus, 2, policy);
        assert_eq!(bus.publish_many([0, 1]), Ok(2));
        let mut waiting = bus.bus().publication(2, None, true);
        assert_eq!(waiting.poll(Patience::Left), Ok(None));
        assert_eq!(subscription.pending(), 2, "nobody has it while it waits");
        assert_eq!(read(&subscription), Some(Read::Event(0)));
        assert!(waiting.park(None), "reading wakes it");
        assert_eq!(waiting.poll(Patience::Left), Ok(Some(1)));
        assert_eq!(drain(&subscription), events([1, 2]));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_publisher_waits_in_its_thread_until_there_is_room() {
    let bus = patient_bus(Backend::LockFree, 1, FOREVER);
    let subscription = subscribe(&bus, 1, Policy::Block);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for event in 0..200_u64 {
                assert_eq!(bus.publish(event), Ok(1));
            }
            for event in 200..400 {
                assert_eq!(bus.publish_timeout(event, None, FOREVER), Ok(1));
            }
            assert_eq!(bus.publish_many(400..600), Ok(200));
        });
        for event in 0..600 {
            assert_eq!(subscription.recv(), Ok(event));
        }
    });
    assert_sums_close(&bus.metrics());
}

#[test]
fn one_full_reject_subscription_keeps_the_event_from_everybody() {
    let bus = bus(Backend::LockFree, 4);
    let blocking = subscribe(&bus, 4, Policy::Block);
    let rejecting = subscribe(&bus, 1, Policy::Reject);
    let overwriting = subscribe(&bus, 1, Policy::DropOldest);
    let refusing = subscribe(&bus, 1, Policy::DropNewest);
    let also = subscribe(&bus, 1, Policy::Reject);
    assert_eq!(bus.publish(0), Ok(5));
    assert_eq!(publish_by(Way::Publish, &bus, 1), Outcome::Full(vec![rejecting.id(), also.id()]));
    for subscription in [&blocking, &rejecting, &overwriting, &refusing, &also] {
        assert_eq!(drain(subscription), events([0]));
        assert_eq!(subscription.metrics().offered, 1, "a refused event was never offered");
    }
    assert_eq!(bus.publish(1), Ok(5), "a retry does not double");
    assert_eq!(bus.metrics().total_published, 2);
    assert_sums_close(&bus.metrics());
}

#[test]
fn each_hole_is_told_at_its_place_and_with_its_size() {
    use Read::{Closed, Event, Missed};
    let bus = bus(Backend::LockFree, 4);
    let refusing = subscribe(&bus, 4, Policy::DropNewest);
    assert_eq!(bus.publish_many(0..7), Ok(7)); // misses 4, 5, 6
    assert_eq!(read(&refusing), Some(Event(0)));
    assert_eq!(bus.publish_many(7..10), Ok(3)); // takes 7, misses 8, 9
    assert_eq!([read(&refusing), read(&refusing)], [Some(Event(1)), Some(Event(2))]);
    assert_eq!(bus.publish_many(10..11), Ok(1)); // takes 10
    assert_eq!(read(&refusing), Some(Event(3)));
    assert_eq!(bus.publish_many(11..14), Ok(3)); // takes 11, 12, misses 13
    bus.close();
    assert_eq!(
        drain(&refusing),
        [Missed(3), Event(7), Missed(2), Event(10), Event(11), Event(12), Missed(1), Closed]
    );
    assert_eq!(refusing.metrics().dropped.refused, 6);
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_lagging_subscription_is_told_how_many_it_missed() {
    use Read::{Closed, Event, Missed};
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = subscribe(&bus, 4, Policy::DropOldest);
        assert_eq!(bus.publish_many(0..10), Ok(10));
        assert_eq!(subscription.pending(), 4);
        assert_eq!(subscription.metrics().dropped.overwritten, 6, "before it is read");
        assert_sums_close(&bus.metrics());
        assert_eq!(
            subscription.try_recv(),
            Err(TryRecvError::Lagged(Lagged { missed: 6, exact: true }))
        );
        assert_eq!(read(&subscription), Some(Event(6)));
        assert_eq!(bus.publish_many(10..13), Ok(3));
        bus.close();
        let rest: Vec<_> = [Missed(2)].into_iter().chain(events(9..13)).chain([Closed]).collect();
        assert_eq!(drain(&subscription), rest, "{}", backend.name());
        assert_eq!(subscription.metrics().dropped.overwritten, 8);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_batch_ends_before_a_hole_and_the_next_call_tells_it() {
    let bus = bus(Backend::LockFree, 2);
    let refusing = subscribe(&bus, 2, Policy::DropNewest);
    assert_eq!(bus.publish_many(0..4), Ok(4));
    assert_eq!(refusing.recv_many(1), Ok(vec![0]));
    assert_eq!(bus.publish(4), Ok(1));
    assert_eq!(refusing.recv_many(10), Ok(vec![1]));
    assert_eq!(refusing.pending(), 1, "what is behind the hole is still pending");
    assert_sums_close(&bus.metrics());
    let hole = Lagged { missed: 2, exact: true };
    assert_eq!(refusing.recv_many(10), Err(RecvError::Lagged(hole)));
    assert_eq!(refusing.recv_many(10), Ok(vec![4]));
    assert_eq!(refusing.recv_many(0), Ok(vec![]));
    assert_sums_close(&bus.metrics());
}

/// Publishes while a batch is being taken, so that the shared channel overwrites in the middle.
struct Overwriting<'a>(&'a EventBusImpl<u64>, Vec<u64>);

impl Extend<u64> for Overwriting<'_> {
    fn extend<I: IntoIterator<Item = u64>>(&mut self, batch: I) {
        self.1.extend(batch);
        if self.1.len() == 2 {
            assert_eq!(self.0.publish_many(100..106), Ok(6));
        }
    }
}

#[test]
fn a_hole_that_opens_during_a_batch_ends_it() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = subscribe(&bus, 4, Policy::DropOldest);
        assert_eq!(bus.publish_many(0..4), Ok(4));
        let mut batch = Overwriting(&bus, Vec::new());
        assert_eq!(subscription.try_recv_many(&mut batch, 100), Ok(2));
        assert_eq!(batch.1, [0, 1]);
        assert_sums_close(&bus.metrics());
        let all: Vec<_> = [Read::Missed(4)].into_iter().chain(events(102..106)).collect();
        assert_eq!(drain(&subscription), all, "{}", backend.name());
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn leaving_with_an_untold_hole_counts_everything() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = subscribe(&bus, 4, Policy::DropOldest);
        assert_eq!(bus.publish_many(0..4), Ok(4));
        let mut batch = Overwriting(&bus, Vec::new());
        assert_eq!(subscription.try_recv_many(&mut batch, 100), Ok(2));
        subscription.close();
        assert_eq!(bus.publish(1000), Ok(0));
        let row = subscription.metrics();
        assert_row_closes(&row);
        assert_eq!(row.dropped, Dropped { overwritten: 4, closed: 4, ..Default::default() });
        assert_eq!((row.offered, row.delivered, row.pending), (10, 2, 0));
        assert_eq!(bus.metrics().total_dropped, 8, "also of those that have left");
    }
}

#[test]
fn counting_only_never_tells_a_hole() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let options = SubscribeOptions {
            policy: Some(Policy::DropOldest),
            on_lag: OnLag::Count,
            ..Default::default()
        };
        let subscription = bus.subscribe_with(options).unwrap();
        assert_eq!(bus.publish_many(0..10), Ok(10));
        assert_eq!(subscription.recv_many(10), Ok(vec![6, 7, 8, 9]));
        assert_eq!(drain(&subscription), []);
        assert_eq!(subscription.metrics().dropped.overwritten, 6);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_subscription_sees_every_event_from_its_joining_to_its_leaving() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        assert_eq!(bus.publish(0), Ok(0));
        let early = bus.subscribe(16).unwrap();
        assert_eq!(bus.publish_many(1..4), Ok(3));
        let late = bus.subscribe(16).unwrap();
        assert_eq!(bus.publish_many(4..6), Ok(2));
        assert_eq!(read(&early), Some(Read::Event(1)));
        early.close();
        early.close();
        assert_eq!(bus.publish(6), Ok(1));
        assert_eq!(drain(&early), [Read::Closed], "what was pending is counted, not read");
        assert_eq!(drain(&late), events(4..7));
        let row = early.metrics();
        assert_eq!((row.offered, row.delivered, row.dropped.closed), (5, 1, 4));
        assert_row_closes(&row);
        assert_eq!(bus.metrics().subscriber_count, 1);
        assert_eq!(bus.metrics().total_dropped, 4);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_place_that_was_left_is_taken_anew_without_old_events() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        for round in 0..10 {
            let subscription = bus.subscribe(4).unwrap();
            assert_eq!(subscription.id(), round);
            assert_eq!(drain(&subscription), []);
            assert_eq!(bus.publish(round), Ok(1));
            assert_eq!(subscription.pending(), 1);
        }
        assert_eq!(bus.metrics().total_dropped, 10);
        assert_eq!(bus.metrics().subscriber_count, 0);
    }
}

#[test]
fn closing_the_bus_lets_readers_drain_first() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let subscription = bus.subscribe(8).unwrap();
        assert_eq!(bus.publish_many(0..5), Ok(5));
        bus.close();
        bus.close();
        assert!(subscription.is_closed());
        assert_eq!(subscription.recv(), Ok(0));
        assert_eq!(subscription.recv_many(3), Ok(vec![1, 2, 3]));
        assert_eq!(subscription.recv_timeout(Duration::ZERO), Ok(4));
        assert_eq!(subscription.recv(), Err(RecvError::Closed));
        assert_eq!(subscription.recv_many(3), Err(RecvError::Closed));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn dropping_the_last_handle_closes_the_bus() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let subscription = bus.subscribe(8).unwrap();
        let another = bus.clone();
        drop(bus);
        assert!(!subscription.is_closed());
        assert_eq!(another.publish(1), Ok(1));
        drop(another);
        assert_eq!(drain(&subscription), [Read::Event(1), Read::Closed]);
        assert_row_closes(&subscription.metrics());
    }
}

#[test]
fn publish_many_accepts_a_prefix_and_says_how_long_it_is() {
    let bus = bus(Backend::LockFree, 4);
    let rejecting = subscribe(&bus, 4, Policy::Reject);
    let error = bus.publish_many(0..10).expect_err("only four have room");
    assert_eq!(error.accepted, 4);
    assert_eq!(error.error.into_event(), 4, "retry from here");
    assert_eq!(drain(&rejecting), events(0..4));
    assert_eq!(bus.publish_many(4..8), Ok(4));
    bus.close();
    assert_eq!(bus.publish_many(8..10).expect_err("it is closed").accepted, 0);
    assert_eq!(bus.metrics().total_published, 8);
    assert_sums_close(&bus.metrics());
}

#[test]
fn defaults_come_from_the_bus_and_are_shown() {
    let config = |drop_oldest| BusConfig {
        capacity: 100,
        backpressure: BackpressureConfig { drop_oldest, ..Default::default() },
        ..Default::default()
    };
    for (backend, drop_oldest, policy) in [
        (Backend::LockFree, false, Policy::Block),
        (Backend::LockFree, true, Policy::DropOldest),
        (Backend::Broadcast, false, Policy::DropOldest),
        (Backend::Broadcast, true, Policy::DropOldest),
    ] {
        let bus = EventBusImpl::<u64>::new(backend, config(drop_oldest)).unwrap();
        let subscription = bus.subscribe_with(SubscribeOptions::default()).unwrap();
        assert_eq!((subscription.policy(), subscription.capacity()), (policy, 128));
        assert_eq!(bus.bus().capacity(), 128);
        assert_eq!(bus.bus().backend(), backend);
    }
    assert_eq!(BackpressureConfig::default().max_block_duration, Duration::from_secs(1));
}

#[test]
fn capacity_is_rounded_up_and_a_shared_channel_has_one() {
    let own = bus(Backend::LockFree, 8);
    let capacities = |bus: &EventBusImpl<u64>, asked: &[usize]| -> Vec<usize> {
        asked.iter().map(|&asked| bus.subscribe(asked).unwrap().capacity()).collect()
    };
    assert_eq!(capacities(&own, &[1, 2, 3, 5, 8, 1000]), [1, 2, 4, 8, 8, 1024]);
    let shared = bus(Backend::Broadcast, 8);
    assert_eq!(capacities(&shared, &[1, 5, 8]), [8, 8, 8]);
    let error = shared.subscribe(9).expect_err("more than the channel holds");
    assert!(error.to_string().contains("holds 8"), "{error}");
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        assert!(bus.subscribe(0).unwrap_err().to_string().contains("capacity was 0"));
        assert!(matches!(bus.subscribe(usize::MAX), Err(SubscribeError::Config(_))));
        assert_eq!(bus.metrics().subscriber_count, 0);
        for (capacity, max_topics) in [(0, 1), (usize::MAX, 1), (1, 0), (1, usize::MAX)] {
            let config = BusConfig { capacity, max_topics, ..Default::default() };
            assert!(EventBusImpl::<u64>::new(backend, config).is_err());
        }
    }
}

#[test]
fn a_subscription_with_the_least_capacity_loses_only_what_it_must() {
    use Read::{Event, Missed};
    let bus = bus(Backend::LockFree, 1);
    let overwriting = subscribe(&bus, 1, Policy::DropOldest);
    let refusing = subscribe(&bus, 1, Policy::DropNewest);
    assert_eq!(bus.publish_many(0..3), Ok(3));
    assert_eq!(drain(&overwriting), [Missed(2), Event(2)]);
    assert_eq!(drain(&refusing), [Event(0), Missed(2)]);
    assert_sums_close(&bus.metrics());
}

#[test]
fn metrics_add_up_over_the_bus() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let (_fast, slow) = (bus.subscribe(8).unwrap(), bus.subscribe(8).unwrap());
        assert_eq!(bus.publish_many(0..6), Ok(6));
        assert_eq!(slow.recv_many(4).unwrap().len(), 4);
        let metrics = bus.metrics();
        assert_eq!((metrics.total_published, metrics.total_dropped), (6, 0));
        assert_eq!(metrics.avg_queue_depth, 4.0);
        let rows: Vec<_> =
            metrics.subscriptions.iter().map(|row| (row.id, row.pending, row.delivered)).collect();
        assert_eq!(rows, [(0, 6, 0), (1, 2, 4)]);
        assert!(metrics.subscriptions.iter().all(|row| row.exact));
        assert_sums_close(&metrics);
    }
}

#[test]
fn receiving_times_out_only_when_nothing_comes() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let subscription = bus.subscribe(8).unwrap();
        let timeout = tickbus::RecvTimeoutError::Timeout;
        assert_eq!(subscription.recv_timeout(Duration::from_millis(1)), Err(timeout));
        assert_eq!(bus.publish(1), Ok(1));
        assert_eq!(subscription.recv_timeout(FOREVER), Ok(1));
    }
}

#[test]
fn the_faces_of_the_backends_are_one_trait() {
    fn round<B: EventBus<&'static str>>(bus: &B) -> EventSubscription<&'static str> {
        let subscription = bus.subscribe(2).unwrap();
        assert_eq!(bus.publish("tick"), Ok(1));
        subscription
    }
    assert_eq!(round(&LockFreeEventBus::new(2).unwrap()).recv(), Ok("tick"));
    assert_eq!(round(&BroadcastEventBus::new(2).unwrap()).recv(), Ok("tick"));
    for &backend in Backend::ALL {
        assert_eq!(backend.name().parse(), Ok(backend));
        let bus = EventBusImpl::new(backend, BusConfig::default()).unwrap();
        assert_eq!(round(&bus).recv(), Ok("tick"));
    }
    assert_eq!(round(&RingEventBus::new(2).unwrap()).recv(), Ok("tick"));
    let error = "rnig".parse::<Backend>().unwrap_err().to_string();
    assert!(error.contains("lock_free, broadcast, ring"), "{error}");
    assert!("bloc".parse::<Policy>().unwrap_err().to_string().contains("drop_newest"));
}
