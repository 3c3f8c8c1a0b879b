//! What a bus says about itself: peaks, ages, latencies, and who stops the publishers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::{FOREVER, assert_row_closes, assert_sums_close, bus, drain, patient_bus, subscribe};
use tickbus::{
    Backend, BackpressureConfig, BusConfig, EventBus, EventBusImpl, EventSubscription, Patience,
    Pattern, Policy, PublishError, SubscribeError, SubscribeOptions,
};

fn named<T>(name: &str) -> SubscribeOptions<T> {
    SubscribeOptions { name: Some(name.into()), ..Default::default() }
}

fn sampling_bus(backend: Backend, latency_sampling: Option<u32>) -> EventBusImpl<u64> {
    EventBusImpl::new(backend, BusConfig { latency_sampling, ..Default::default() }).unwrap()
}

/// Waits until `condition` holds, without sleeping.
fn until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

#[test]
fn the_peak_is_the_most_that_ever_waited_whatever_was_read_since() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 64);
        let subscription = bus.subscribe(64).unwrap();
        let mut wanted = 0;
        for (published, read) in [(3, 3), (2, 1), (1, 2), (5, 4), (7, 8), (20, 20), (1, 1)] {
            (0..published).for_each(|event| _ = bus.publish(event).unwrap());
            wanted = wanted.max(subscription.pending() as u64);
            assert_eq!(subscription.metrics().peak_pending, wanted, "{}", backend.name());
            (0..read).for_each(|_| _ = subscription.try_recv().unwrap());
            assert_eq!(subscription.metrics().peak_pending, wanted, "{}", backend.name());
        }
        assert_eq!((wanted, subscription.pending()), (20, 0));
        (0..200).for_each(|event| _ = bus.publish(event).unwrap());
        assert_eq!(subscription.metrics().peak_pending, 64, "{}", backend.name());
    }
}

#[test]
fn a_peak_that_nobody_looked_at_is_remembered() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 64);
        let subscription = bus.subscribe(64).unwrap();
        (0..10).for_each(|event| _ = bus.publish(event).unwrap());
        assert_eq!(drain(&subscription).len(), 10);
        (0..3).for_each(|event| _ = bus.publish(event).unwrap());
        assert_eq!(subscription.metrics().peak_pending, 10, "{}", backend.name());
        (0..9).for_each(|event| _ = bus.publish(event).unwrap());
        subscription.close();
        let _other = bus.subscribe(64).unwrap();
        (0..20).for_each(|event| _ = bus.publish(event).unwrap());
        let row = subscription.metrics();
        assert_eq!((row.peak_pending, row.pending), (12, 0), "{}", backend.name());
        assert_row_closes(&row);
    }
}

#[test]
fn events_that_were_not_taken_do_not_count_as_waiting() {
    let bus = bus(Backend::LockFree, 8);
    for policy in [Policy::Block, Policy::DropNewest, Policy::DropOldest] {
        let subscription = subscribe(&bus, 8, policy);
        for _ in 0..3 {
            (0..20).for_each(|event| _ = bus.publish(event).unwrap());
            assert_eq!(subscription.metrics().peak_pending, 8, "{}", policy.name());
            drain(&subscription);
        }
        subscription.close();
    }
    // With holes in the count of what was offered, a small backlog is still a small one.
    let subscription = subscribe(&bus, 8, Policy::DropNewest);
    let wide = subscribe(&bus, 32, Policy::Block);
    (0..20).for_each(|event| _ = bus.publish(event).unwrap());
    drain(&subscription);
    (0..4).for_each(|event| _ = bus.publish(event).unwrap());
    assert_eq!(wide.metrics().peak_pending, 24);
    assert_eq!(drain(&wide).len(), 24);
    assert_eq!(wide.metrics().peak_pending, 24);
}

#[test]
fn a_peak_under_concurrent_readers_lies_between_what_waited_and_the_capacity() {
    const EVENTS: u64 = 20_000;
    let bus = patient_bus::<u64>(Backend::LockFree, 64, FOREVER);
    let subscription = bus.subscribe(64).unwrap();
    (0..40).for_each(|event| _ = bus.publish(event).unwrap());
    thread::scope(|scope| {
        let reader =
            scope.spawn(|| (0..40 + EVENTS).try_for_each(|_| subscription.recv().map(drop)));
        (0..EVENTS).for_each(|event| _ = bus.publish(event).unwrap());
        reader.join().unwrap().unwrap();
    });
    let peak = subscription.metrics().peak_pending;
    assert!((40..=64).contains(&peak), "{peak}");
    assert_sums_close(&bus.metrics());
}

/// Returns the bound of the oldest age, which must lie between the times since the two instants:
/// the oldest pending event was published before `published`, and `looked` is from before the last
/// look at which it was not there.
#[track_caller]
fn oldest_age(
    subscription: &EventSubscription<u64>,
    looked: Instant,
    published: Instant,
) -> Duration {
    let least = published.elapsed();
    let age = subscription.metrics().oldest_age.unwrap();
    let most = looked.elapsed();
    assert!(least <= age && age <= most, "{age:?} is not between {least:?} and {most:?}");
    age
}

#[test]
fn the_oldest_age_is_right_to_the_interval_between_two_looks() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 8);
        let subscription = bus.subscribe(8).unwrap();
        let first_look = Instant::now();
        assert_eq!(subscription.metrics().oldest_age, None);
        bus.publish(0).unwrap();
        let published = Instant::now();
        let age = oldest_age(&subscription, first_look, published);
        assert!(oldest_age(&subscription, first_look, published) > age, "it grows");

        let second_look = Instant::now();
        bus.metrics();
        bus.publish(1).unwrap();
        let published = Instant::now();
        bus.publish(2).unwrap();
        subscription.try_recv().unwrap();
        oldest_age(&subscription, second_look, published);
        subscription.try_recv().unwrap();
        oldest_age(&subscription, second_look, published);
        subscription.try_recv().unwrap();
        assert_eq!(subscription.metrics().oldest_age, None);
    }
}

#[test]
fn an_overwritten_event_is_not_the_oldest_pending() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 4);
        let subscription = subscribe(&bus, 4, Policy::DropOldest);
        (0..4).for_each(|event| _ = bus.publish(event).unwrap());
        let looked = Instant::now();
        bus.metrics();
        // Nothing of before the look is left.
        (4..8).for_each(|event| _ = bus.publish(event).unwrap());
        oldest_age(&subscription, looked, Instant::now());
    }
}

#[test]
fn refused_events_do_not_make_those_that_come_after_them_older() {
    let bus = bus(Backend::LockFree, 2);
    let subscription = subscribe(&bus, 2, Policy::DropNewest);
    (0..9).for_each(|event| _ = bus.publish(event).unwrap());
    assert_eq!(drain(&subscription).len(), 3, "two events and the hole");
    let looked = Instant::now();
    bus.metrics();
    bus.publish(9).unwrap();
    oldest_age(&subscription, looked, Instant::now());
}

#[test]
fn events_that_a_pattern_does_not_want_make_nothing_older() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 8);
        let pattern = Some(Pattern::new("trades").unwrap());
        let options = SubscribeOptions { pattern, ..Default::default() };
        let subscription = bus.subscribe_with(options).unwrap();
        let _everything = bus.subscribe(8).unwrap();
        let (trades, quotes) = (bus.topic("trades").unwrap(), bus.topic("quotes").unwrap());
        (0..5).for_each(|event| _ = bus.publish_to(&quotes, event).unwrap());
        assert_eq!(drain(&subscription), []);
        let looked = Instant::now();
        assert_eq!(subscription.metrics().oldest_age, None);
        bus.publish_to(&trades, 5).unwrap();
        oldest_age(&subscription, looked, Instant::now());
    }
}

#[test]
fn without_sampling_nothing_is_measured_and_with_gap_1_everything_is() {
    for backend in Backend::ALL {
        for (sampling, samples) in [(None, 0), (Some(1), 105)] {
            let bus = sampling_bus(*backend, sampling);
            let _subscription = bus.subscribe(256).unwrap();
            let topic = bus.topic("trades").unwrap();
            (0..50).for_each(|event| _ = bus.publish(event).unwrap());
            (0..20).for_each(|event| _ = bus.publish_to(&topic, event).unwrap());
            (0..10).for_each(|event| _ = bus.publish_timeout(event, None, FOREVER).unwrap());
            assert_eq!(bus.publish_many(0..25), Ok(25));
            let metrics = bus.metrics();
            assert_eq!(metrics.total_published, 105);
            let latency = metrics.publish_latency;
            assert_eq!(latency.count(), samples, "{}", backend.name());
            assert_eq!(latency.sum > Duration::ZERO, samples > 0);
            assert_eq!(latency.quantile(0.5).is_some(), samples > 0);
        }
    }
}

#[test]
fn what_nobody_wants_is_measured_and_what_failed_is_not() {
    let bus = sampling_bus(Backend::LockFree, Some(1));
    bus.publish(0).unwrap();
    assert_eq!(bus.metrics().publish_latency.count(), 1);
    let full = subscribe(&bus, 1, Policy::Reject);
    bus.publish(1).unwrap();
    assert!(matches!(bus.publish(2), Err(PublishError::Full { .. })));
    drop(bus.bus().publication(3, None, true));
    assert_eq!(bus.metrics().publish_latency.count(), 2);
    drop(full);
    bus.close();
    assert!(matches!(bus.publish(4), Err(PublishError::Closed(_))));
    assert_eq!(bus.metrics().publish_latency.count(), 2);
}

#[test]
fn the_time_that_a_publish_waited_for_room_is_in_its_latency() {
    const PATIENCE: Duration = Duration::from_millis(20);
    let bus = EventBusImpl::new(
        Backend::LockFree,
        BusConfig {
            backpressure: BackpressureConfig { max_block_duration: PATIENCE, ..Default::default() },
            latency_sampling: Some(1),
            ..Default::default()
        },
    )
    .unwrap();
    let _full = subscribe(&bus, 1, Policy::Block);
    assert_eq!(bus.publish(0), Ok(1));
    assert_eq!(bus.publish(1), Ok(0), "patience ended");
    let latency = bus.metrics().publish_latency;
    assert_eq!(latency.count(), 2);
    assert!(latency.sum >= PATIENCE);
    let longest = latency.buckets.last().unwrap();
    assert!(longest.upper >= PATIENCE && longest.count >= 1, "{longest:?}");
    assert!(latency.quantile(1.0) >= Some(PATIENCE));
}

#[test]
fn what_was_done_before_a_publication_was_begun_can_be_counted_in() {
    const BEFORE: Duration = Duration::from_millis(5);
    let bus = sampling_bus(Backend::LockFree, Some(1));
    let bus = bus.bus();
    let entry = bus.enter();
    let entered = Instant::now();
    until(|| entered.elapsed() >= BEFORE);
    bus.publication_since(entry, 0, None, false).poll(Patience::Left).unwrap();
    assert!(bus.metrics().publish_latency.sum >= BEFORE);
    let before = bus.metrics().publish_latency.sum;
    let _subscription = bus.subscribe_with(named("everything")).unwrap();
    assert_eq!(bus.publish_ready(1, None, entry), Ok(1));
    assert!(bus.metrics().publish_latency.sum >= before + BEFORE);
}

#[test]
fn buckets_rise_and_their_counts_add_up() {
    const PUBLISHERS: u64 = 4;
    const EVENTS: u64 = 2_000;
    let bus = sampling_bus(Backend::LockFree, Some(1));
    let subscription = subscribe(&bus, 1 << 14, Policy::Block);
    thread::scope(|scope| {
        for _ in 0..PUBLISHERS {
            scope.spawn(|| (0..EVENTS).for_each(|event| _ = bus.publish(event).unwrap()));
        }
    });
    let latency = bus.metrics().publish_latency;
    assert_eq!(latency.count(), PUBLISHERS * EVENTS);
    assert!(latency.buckets.is_sorted_by(|one, next| one.upper < next.upper));
    assert!(latency.buckets.iter().all(|bucket| bucket.count > 0));
    let most: Duration = latency.buckets.iter().map(|b| b.upper * b.count as u32).sum();
    assert!(latency.sum <= most && latency.sum >= most * 7 / 8, "{:?} of {most:?}", latency.sum);
    assert_eq!(subscription.pending() as u64, PUBLISHERS * EVENTS);
}

#[test]
fn samples_are_drawn_at_random_and_not_at_every_nth_publish() {
    const SAMPLES: usize = 64;
    let bus = sampling_bus(Backend::LockFree, Some(16));
    let mut gaps = Vec::new();
    let (mut gap, mut count) = (0, 0);
    while gaps.len() < SAMPLES {
        bus.publish(0).unwrap();
        gap += 1;
        let now = bus.metrics().publish_latency.count();
        if now > count {
            assert_eq!(now, count + 1, "one publish is one sample");
            gaps.push(gap);
            (gap, count) = (0, now);
        }
    }
    // Of 64 geometric gaps with mean 16, about 25 differ.
    assert!(gaps.iter().collect::<HashSet<_>>().len() > 8, "{gaps:?}");
}

#[test]
fn a_gap_of_0_is_refused() {
    let config = BusConfig { latency_sampling: Some(0), ..Default::default() };
    let error = EventBusImpl::<u64>::new(Backend::LockFree, config).unwrap_err();
    assert!(error.to_string().starts_with("latency_sampling was 0; it must be at least 1"));
}

#[test]
fn an_idle_bus_has_nobody_who_stops_publishers() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 4);
        let id = bus.bus().id();
        assert_eq!(bus.explain().to_string(), format!("bus {id}: nothing stops publishers"));
        let subscription = bus.subscribe_with(named("risk")).unwrap();
        let explanation = bus.explain();
        assert_eq!(explanation.gating, []);
        assert_eq!(explanation.subscriptions[0].room(), 4);
        let policy = subscription.policy().name();
        assert_eq!(
            explanation.to_string(),
            format!("bus {id}: nothing stops publishers\n  risk: {policy}, 0 of 4 pending")
        );
        bus.close();
        assert!(bus.explain().closed);
        assert!(bus.explain().to_string().starts_with(&format!("bus {id}: closed\n  risk: ")));
    }
}

#[test]
fn a_full_subscription_stops_publishers_by_block_and_reject_alone() {
    for policy in [Policy::Block, Policy::Reject, Policy::DropNewest, Policy::DropOldest] {
        let bus = bus(Backend::LockFree, 2);
        let subscription = subscribe(&bus, 2, policy);
        let wide = subscribe(&bus, 4, policy);
        (0..2).for_each(|event| _ = bus.publish(event).unwrap());
        let stops = matches!(policy, Policy::Block | Policy::Reject);
        let gating: &[u64] = if stops { &[subscription.id()] } else { &[] };
        let explanation = bus.explain();
        assert_eq!(explanation.gating, gating, "{}", policy.name());
        assert_eq!(explanation.subscriptions[0].full_for, None, "nobody has asked for room");
        let rooms: Vec<_> = explanation.subscriptions.iter().map(|row| row.room()).collect();
        assert_eq!(rooms, [0, 2]);
        subscription.try_recv().unwrap();
        assert_eq!(bus.explain().gating, []);
        assert_eq!(wide.pending(), 2);
    }
    let bus = bus(Backend::Broadcast, 2);
    let _slow = bus.subscribe(2).unwrap();
    (0..9).for_each(|event| _ = bus.publish(event).unwrap());
    assert_eq!(bus.explain().gating, []);
}

#[test]
fn a_waiting_publisher_is_explained_with_whom_it_waits_for_and_since_when() {
    let bus = patient_bus::<u64>(Backend::LockFree, 2, FOREVER);
    let slow = bus
        .subscribe_with(SubscribeOptions {
            capacity: Some(1),
            pattern: Some(Pattern::new("orders.*").unwrap()),
            ..named("risk")
        })
        .unwrap();
    let topic = bus.topic("orders.new").unwrap();
    let other = bus.subscribe_with(SubscribeOptions { capacity: Some(8), ..named("log") }).unwrap();
    bus.publish_to(&topic, 0).unwrap();
    let before = Instant::now();
    thread::scope(|scope| {
        for event in 1..3 {
            let (bus, topic) = (&bus, &topic);
            scope.spawn(move || assert_eq!(bus.publish_to(topic, event), Ok(2)));
        }
        until(|| slow.metrics().waiting_publishers == 2);
        let waited_since = Instant::now();
        let explanation = bus.explain();
        assert_eq!(explanation.gating, [slow.id()]);
        let row = &explanation.subscriptions[0];
        assert!(row.is_gating() && !row.is_passed_over);
        let full_for = row.full_for.unwrap();
        assert!(full_for <= before.elapsed());
        assert!(bus.explain().subscriptions[0].full_for.unwrap() >= waited_since.elapsed() / 2);
        assert_eq!(explanation.subscriptions[1].full_for, None);
        let text = explanation.to_string();
        let mut lines = text.lines();
        let id = explanation.bus;
        assert_eq!(lines.next(), Some(&*format!("bus {id}: risk stops publishers")));
        let line = lines.next().unwrap();
        assert!(
            line.starts_with("  risk (orders.*): block, 1 of 1 pending, the oldest for"),
            "{line}"
        );
        assert!(line.contains(", full for 0."), "{line}");
        assert!(line.ends_with(" s, 2 publishers wait"), "{line}");
        assert!(lines.next().unwrap().starts_with("  log: block, 1 of 8 pending, "));
        (0..3).for_each(|_| _ = slow.recv().unwrap());
    });
    let row = slow.metrics();
    assert_eq!((row.waiting_publishers, row.full_for, row.is_gating()), (0, None, false));
    assert_eq!(bus.explain().gating, []);
    assert_eq!(other.pending(), 3);
}

#[test]
fn a_publisher_that_gives_up_is_no_longer_in_line_and_a_dead_reader_is_passed_over() {
    let bus = bus(Backend::LockFree, 1);
    let dead = bus.subscribe_with(named("dead")).unwrap();
    bus.publish(0).unwrap();
    drop(bus.bus().publication(1, None, false));
    let mut waiting = bus.bus().publication(1, None, false);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    assert_eq!(dead.metrics().waiting_publishers, 1);
    dead.try_recv().unwrap();
    assert_eq!(bus.explain().subscriptions[0].room(), 1);
    assert_eq!(bus.explain().gating, [dead.id()], "the room is for the publisher in line");
    drop(waiting);
    assert_eq!(bus.explain().gating, []);
    bus.publish(0).unwrap();
    assert_eq!(dead.metrics().waiting_publishers, 0);
    assert!(bus.explain().gating.contains(&dead.id()));

    assert_eq!(bus.publish_timeout(1, None, Duration::ZERO), Ok(0), "patience ends");
    let row = dead.metrics();
    assert!(row.is_passed_over && !row.is_gating() && row.full_for.is_some());
    let text = bus.explain().to_string();
    assert!(text.contains(": nothing stops publishers\n  dead: block, 1 of 1 pending"), "{text}");
    assert!(text.ends_with(", passed over until it reads, 1 lost"), "{text}");
    dead.try_recv().unwrap();
    bus.publish(2).unwrap_or_default();
    let row = dead.metrics();
    assert!(!row.is_passed_over && row.is_gating());
}

#[test]
fn full_for_ends_when_there_was_room_even_if_no_publisher_was_waiting() {
    let bus = bus(Backend::LockFree, 2);
    let subscription = subscribe(&bus, 2, Policy::Reject);
    (0..2).for_each(|event| _ = bus.publish(event).unwrap());
    assert!(bus.publish(2).is_err());
    assert!(subscription.metrics().full_for.is_some());
    drain(&subscription);
    assert_eq!(subscription.metrics().full_for, None);
    (0..2).for_each(|event| _ = bus.publish(event).unwrap());
    assert_eq!(subscription.metrics().full_for, None, "no publisher has missed room since");
    assert!(bus.publish(2).is_err());
    assert!(subscription.metrics().full_for.is_some());
    subscription.close();
    let row = subscription.metrics();
    assert_eq!((row.full_for, row.waiting_publishers, row.oldest_age), (None, 0, None));
}

#[test]
fn several_that_stop_publishers_are_all_named() {
    let bus = bus(Backend::LockFree, 1);
    let subscriptions: Vec<_> =
        ["a", "b", "c"].map(|name| bus.subscribe_with(named(name)).unwrap()).into();
    let unnamed = bus.subscribe(1).unwrap();
    bus.publish(0).unwrap();
    let explanation = bus.explain();
    let mut ids: Vec<_> = subscriptions.iter().map(|subscription| subscription.id()).collect();
    ids.push(unnamed.id());
    assert_eq!(explanation.gating, ids);
    let wanted = format!(": a, b, c and subscription {} stop publishers\n", unnamed.id());
    assert!(explanation.to_string().contains(&wanted), "{explanation}");
}

#[test]
fn a_name_is_unique_among_those_who_are_here_and_no_number() {
    for backend in Backend::ALL {
        let bus = bus(*backend, 4);
        let first = bus.subscribe_with(named("risk")).unwrap();
        assert_eq!(first.name(), Some("risk"));
        assert_eq!(first.metrics().name.as_deref(), Some("risk"));
        for bad in ["risk", "", "17"] {
            let error = bus.subscribe_with(named(bad)).unwrap_err();
            assert!(matches!(error, SubscribeError::Config(_)));
            assert!(error.to_string().starts_with(&format!("name was {bad:?}")), "{error}");
        }
        assert_eq!(bus.metrics().subscriber_count, 1);
        first.close();
        assert_eq!(bus.subscribe_with(named("risk")).unwrap().name(), Some("risk"));
        assert_eq!(bus.subscribe(4).unwrap().name(), None);
    }
}

#[test]
fn the_total_of_dropped_events_never_falls_while_subscriptions_leave() {
    const ROUNDS: u64 = 2_000;
    for backend in Backend::ALL {
        let bus = bus(*backend, 4);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let observer = scope.spawn(|| {
                let mut before = 0;
                while !done.load(Ordering::Relaxed) {
                    let total = bus.metrics().total_dropped;
                    assert!(total >= before, "{total} after {before}");
                    before = total;
                }
            });
            for _ in 0..ROUNDS {
                let subscription = subscribe(&bus, 4, Policy::DropOldest);
                (0..7).for_each(|event| _ = bus.publish(event).unwrap());
                drop(subscription);
            }
            done.store(true, Ordering::Relaxed);
            observer.join().unwrap();
        });
        assert_eq!(bus.metrics().total_dropped, ROUNDS * 7, "{}", backend.name());
    }
}
