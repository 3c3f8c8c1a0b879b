//! The ring: holes told exactly where they are, whoever is moved and whatever it wants; joining at
//! an older event; the one producer; what happens when payloads panic or are dropped.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use proptest::prelude::*;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::{Read, assert_sums_close, drain, events, read};
use tickbus::{
    BackpressureConfig, BusConfig, ConfigError, Dropped, EventBus, EventSubscription, Lagged,
    LockFreeEventBus, OnLag, Patience, Pattern, Policy, Producers, PublishError, RecvError,
    RingEventBus, Start, SubscribeError, SubscribeOptions, Topic, TryRecvError,
};

const TOPICS: [&str; 4] = ["trades.A", "trades.B", "quotes.A", "quotes.B"];
const PATTERNS: [Option<&str>; 6] =
    [None, Some(">"), Some("trades.*"), Some("*.A"), Some("quotes.B"), Some("nothing")];

fn ring(capacity: usize) -> RingEventBus<u64> {
    patient_ring(capacity, Duration::ZERO)
}

fn patient_ring(capacity: usize, max_block_duration: Duration) -> RingEventBus<u64> {
    let backpressure = BackpressureConfig { max_block_duration, ..Default::default() };
    RingEventBus::with_config(BusConfig { capacity, backpressure, ..Default::default() }).unwrap()
}

fn options(pattern: Option<&str>, policy: Policy) -> SubscribeOptions<u64> {
    SubscribeOptions {
        pattern: pattern.map(|pattern| Pattern::new(pattern).unwrap()),
        policy: Some(policy),
        ..Default::default()
    }
}

fn starting(start: Start, pattern: Option<&str>) -> SubscribeOptions<u64> {
    SubscribeOptions { start, ..options(pattern, Policy::DropOldest) }
}

fn topics(bus: &RingEventBus<u64>) -> Vec<Topic> {
    TOPICS.iter().map(|name| bus.topic(name).unwrap()).collect()
}

fn wants(pattern: Option<&str>, topic: usize) -> bool {
    pattern.is_none_or(|pattern| Pattern::new(pattern).unwrap().matches(TOPICS[topic]))
}

/// Checks what one reader found against what it wanted, hole by hole.
#[derive(Debug)]
struct Ledger {
    wanted: Vec<u64>,
    found: usize,
    lost: u64,
}

impl Ledger {
    fn check(&mut self, found: Read) {
        match found {
            Read::Event(event) => {
                assert_eq!(Some(&event), self.wanted.get(self.found), "after {}", self.found);
                self.found += 1;
            }
            Read::Missed(missed) => {
                assert!(missed > 0);
                self.found += missed as usize;
                self.lost += missed;
                assert!(self.found <= self.wanted.len(), "more are missing than there were");
            }
            Read::Closed => panic!("nobody closes"),
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Publish(usize, usize),
    Read(usize, usize),
    Join(usize, usize),
    Leave(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..TOPICS.len(), 1..20_usize).prop_map(|(topic, n)| Step::Publish(topic, n)),
        4 => (0..8_usize, 1..20_usize).prop_map(|(reader, n)| Step::Read(reader, n)),
        2 => (0..PATTERNS.len(), 0..3_usize).prop_map(|(pattern, policy)| Step::Join(pattern, policy)),
        1 => (0..8_usize).prop_map(Step::Leave),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_hole_is_told_where_it_is_and_counted_by_its_reason(
        capacity in prop_oneof![Just(1_usize), Just(2), Just(4), Just(16), Just(64)],
        producers in prop::sample::select(Producers::ALL),
        steps in steps(),
    ) {
        let policies = [Policy::DropOldest, Policy::Block, Policy::Reject];
        let backpressure =
            BackpressureConfig { max_block_duration: Duration::ZERO, ..Default::default() };
        let config = BusConfig { capacity, backpressure, producers, ..Default::default() };
        let bus = RingEventBus::with_config(config).unwrap();
        let topics = topics(&bus);
        let mut readers: Vec<(EventSubscription<u64>, Option<&str>, Ledger)> = Vec::new();
        let mut next = 0;
        for step in steps {
            match step {
                Step::Publish(topic, count) => for _ in 0..count {
                    let wanting = readers.iter().filter(|(_, pattern, _)| wants(*pattern, topic));
                    let wanting = wanting.count();
                    match bus.publish_to(&topics[topic], next) {
                        Ok(taken) => {
                            assert_eq!(taken, wanting);
                            for (_, pattern, ledger) in &mut readers {
                                if wants(*pattern, topic) {
                                    ledger.wanted.push(next);
                                }
                            }
                        }
                        Err(PublishError::Full { event, subscriptions }) => {
                            assert_eq!(event, next);
                            for id in subscriptions {
                                let full = readers.iter().find(|(s, ..)| s.id() == id).unwrap();
                                assert_eq!(full.0.policy(), Policy::Reject);
                                assert!(full.0.pending() > 0);
                            }
                        }
                        Err(other) => panic!("{other:?}"),
                    }
                    next += 1;
                },
                Step::Read(reader, count) => {
                    let count_of = readers.len().max(1);
                    if let Some((subscription, _, ledger)) = readers.get_mut(reader % count_of) {
                        for _ in 0..count {
                            read(subscription).into_iter().for_each(|found| ledger.check(found));
                        }
                    }
                }
                Step::Join(pattern, policy) if readers.len() < 8 => {
                    let pattern = PATTERNS[pattern];
                    let subscription = bus.subscribe_with(options(pattern, policies[policy])).unwrap();
                    readers.push((subscription, pattern, Ledger { wanted: vec![], found: 0, lost: 0 }));
                }
                Step::Join(..) => {}
                Step::Leave(reader) => if !readers.is_empty() {
                    let (subscription, _, ledger) = readers.swap_remove(reader % readers.len());
                    let before = subscription.metrics();
                    subscription.close();
                    let row = subscription.metrics();
                    assert_eq!(row.dropped.closed, before.pending);
                    assert_eq!(row.offered, ledger.wanted.len() as u64, "{row:?}");
                    assert_eq!(row.offered, row.delivered + row.dropped.total());
                },
            }
            assert_sums_close(&bus.metrics());
        }
        for (subscription, _, ledger) in &mut readers {
            let row = subscription.metrics();
            assert_eq!(row.offered, ledger.wanted.len() as u64, "{row:?}");
            drain(subscription).into_iter().for_each(|found| ledger.check(found));
            assert_eq!(ledger.found, ledger.wanted.len(), "the last events are missing");
            let row = subscription.metrics();
            let reasons = match subscription.policy() {
                Policy::Block => Dropped { block_expired: ledger.lost, ..Default::default() },
                _ => Dropped { overwritten: ledger.lost, ..Default::default() },
            };
            assert_eq!(row.dropped, reasons);
            assert!(subscription.policy() != Policy::Reject || ledger.lost == 0);
        }
    }
}

/// Events of one publisher in a row that have the same topic.
const STRETCH: u64 = 4;

fn topic_of(producer: usize, number: u64) -> usize {
    ((number / STRETCH) as usize * 7 + producer) % TOPICS.len()
}

/// Publishes a stretch in one of three ways.
fn publish_stretch(bus: &RingEventBus<u64>, topic: &Topic, stretch: &[u64], way: u64) {
    match way % 3 {
        0 => stretch.iter().for_each(|&event| assert!(bus.publish_to(topic, event).is_ok())),
        1 => assert_eq!(bus.publish_batch(Some(topic), stretch), Ok(stretch.len())),
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                for &event in stretch {
                    assert!(bus.publish_async(event, Some(topic)).await.is_ok());
                }
            });
        }
    }
}

/// Publishes from several threads in every way to readers of every kind, some of which come and
/// go, and checks each reader's holes by the numbers of the events.
fn stress(capacity: usize, readers: usize, producers: usize, events: u64) {
    let bus = patient_ring(capacity, Duration::from_secs(3_600));
    let topics = topics(&bus);
    let policies = [Policy::DropOldest, Policy::Block, Policy::Reject];
    let published: [AtomicU64; TOPICS.len()] = Default::default();
    let running = AtomicBool::new(true);
    let subscriptions: Vec<_> = (0..readers)
        .map(|number| {
            let pattern = PATTERNS[number % PATTERNS.len()];
            // Nobody who reads rejects: that would only slow publishers down.
            let policy = policies[number / PATTERNS.len() % 2];
            (bus.subscribe_with(options(pattern, policy)).unwrap(), pattern)
        })
        .collect();
    thread::scope(|scope| {
        let (bus, topics, running, published) = (&bus, &topics, &running, &published);
        let publishing: Vec<_> = (0..producers)
            .map(|producer| {
                scope.spawn(move || {
                    for from in (0..events).step_by(STRETCH as usize) {
                        let numbers = from..events.min(from + STRETCH);
                        let stretch: Vec<_> =
                            numbers.map(|number| (producer as u64) << 32 | number).collect();
                        let topic = topic_of(producer, from);
                        publish_stretch(
                            bus,
                            &topics[topic],
                            &stretch,
                            from / STRETCH + producer as u64,
                        );
                        published[topic].fetch_add(stretch.len() as u64, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let reading: Vec<_> = subscriptions
            .iter()
            .map(|(subscription, pattern)| {
                scope.spawn(move || {
                    let mut last = vec![None; producers];
                    let (mut seen, mut missed) = (0_u64, 0_u64);
                    loop {
                        match subscription.recv_many(50) {
                            Ok(batch) => {
                                for event in batch {
                                    let producer = (event >> 32) as usize;
                                    let number = event & 0xFFFF_FFFF;
                                    assert!(last[producer] < Some(number), "out of order");
                                    last[producer] = Some(number);
                                    let topic = topic_of(producer, number);
                                    assert!(wants(*pattern, topic), "not wanted");
                                    seen += 1;
                                }
                            }
                            Err(RecvError::Lagged(Lagged { missed: hole, exact })) => {
                                assert!(exact);
                                missed += hole;
                            }
                            Err(_) => break,
                        }
                    }
                    (seen, missed)
                })
            })
            .collect();
        let guests = scope.spawn(move || {
            let mut number = 0;
            loop {
                let pattern = PATTERNS[number % PATTERNS.len()];
                let guest = bus.subscribe_with(options(pattern, policies[number % 2])).unwrap();
                for _ in 0..number % 9 {
                    _ = guest.recv_timeout(Duration::from_micros(50));
                }
                guest.close();
                let row = guest.metrics();
                assert_eq!(row.offered, row.delivered + row.dropped.total(), "{row:?}");
                number += 1;
                if !running.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        publishing.into_iter().for_each(|thread| thread.join().unwrap());
        running.store(false, Ordering::Relaxed);
        guests.join().unwrap();
        bus.close();
        for (reader, (subscription, pattern)) in reading.into_iter().zip(&subscriptions) {
            let (seen, missed) = reader.join().unwrap();
            let wanted: u64 = (0..TOPICS.len())
                .filter(|&topic| wants(*pattern, topic))
                .map(|topic| published[topic].load(Ordering::Relaxed))
                .sum();
            let row = subscription.metrics();
            assert_eq!(seen + missed, wanted, "{row:?}");
            assert_eq!((row.delivered, row.dropped.total()), (seen, missed), "{row:?}");
            assert_eq!(row.offered, wanted, "{row:?}");
            assert!(subscription.policy() == Policy::DropOldest || missed == 0, "{row:?}");
        }
    });
}

#[test]
fn sums_and_holes_are_exact_whatever_the_size_and_who_comes_and_goes() {
    for capacity in [16, 64, 1_024] {
        for (readers, producers) in [(1, 1), (7, 1), (12, 3), (64, 2)] {
            stress(capacity, readers, producers, 20_000 / readers as u64);
        }
    }
}

/// `SOAK_MINUTES` of it in `make soak`.
#[test]
fn sums_and_holes_stay_exact_for_minutes() {
    let minutes = std::env::var("SOAK_MINUTES").map_or(0.0, |n| n.parse().unwrap());
    let begun = Instant::now();
    let mut rounds = 0;
    while rounds < 3 || begun.elapsed() < Duration::from_secs_f64(60.0 * minutes) {
        // 7 has no factor in common with 64: every number of readers has its turn.
        let readers = 1 + 7 * rounds % 64;
        stress([16, 64, 1_024][rounds % 3], readers, 1 + rounds % 4, 60_000 / readers as u64);
        rounds += 1;
    }
    println!("soak: ring: {rounds} rounds with 1 to 64 subscriptions; every sum is closed");
}

#[test]
fn a_hundred_publishers_on_two_cores_lose_nothing() {
    stress(64, 4, 100, 200);
}

#[test]
fn a_narrow_reader_that_sleeps_neither_stops_publishers_nor_loses_anything() {
    for policy in [Policy::Block, Policy::Reject, Policy::DropOldest] {
        let bus = ring(16);
        let topics = topics(&bus);
        let idle = bus.subscribe_with(options(Some("quotes.B"), policy)).unwrap();
        for number in 0..10_000 {
            assert_eq!(bus.publish_to(&topics[0], number), Ok(0));
        }
        assert_eq!((idle.pending(), idle.metrics().offered), (0, 0));
        assert_eq!(bus.publish_to(&topics[3], 10_000), Ok(1));
        for number in 0..12 {
            assert_eq!(bus.publish_to(&topics[0], number), Ok(0));
        }
        assert_eq!(drain(&idle), events([10_000]), "{policy:?}");
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn who_drops_the_oldest_loses_a_quarter_of_the_ring_at_most_and_keeps_the_rest() {
    let bus = ring(64);
    let slow = bus.subscribe_with(options(None, Policy::DropOldest)).unwrap();
    for number in 0..65 {
        assert_eq!(bus.publish(number), Ok(1));
    }
    assert_eq!(read(&slow), Some(Read::Missed(16)));
    assert_eq!(drain(&slow), events(16..65));
}

#[test]
fn who_joins_late_starts_where_it_asks_or_is_told_what_is_no_longer_there() {
    let bus = ring(16);
    for number in 0..40 {
        assert_eq!(bus.publish(number), Ok(0));
    }
    let join = |start| bus.subscribe_with(starting(start, None)).unwrap();
    assert_eq!(drain(&join(Start::Now)), []);
    let kept = drain(&join(Start::OldestKept));
    assert!(kept.len() >= 12, "three quarters: {kept:?}");
    assert_eq!(kept, events(40 - kept.len() as u64..40));
    assert_eq!(drain(&join(Start::Sequence(38))), events([38, 39]));
    assert_eq!(drain(&join(Start::Sequence(40))), []);
    let late = join(Start::Sequence(3));
    let oldest = 40 - kept.len() as u64;
    assert_eq!(read(&late), Some(Read::Missed(oldest - 3)));
    assert_eq!(drain(&late), events(oldest..40));
    let row = late.metrics();
    assert_eq!(
        (row.offered, row.delivered, row.dropped.overwritten),
        (37, 40 - oldest, oldest - 3)
    );
    // Whoever starts below what is kept cannot know which of the missing it would have wanted.
    let narrow = bus.subscribe_with(starting(Start::Sequence(0), Some("trades.*"))).unwrap();
    let told = TryRecvError::Lagged(Lagged { missed: oldest, exact: false });
    assert_eq!(narrow.try_recv(), Err(told));
    assert!(!narrow.metrics().exact && row.exact);
    let in_time = bus.subscribe_with(starting(Start::Sequence(oldest), Some("trades.*"))).unwrap();
    assert!(in_time.metrics().exact);
    let error = bus.subscribe_with(starting(Start::Sequence(41), None)).unwrap_err();
    assert!(error.to_string().contains("sequence 41; the next event has 40"), "{error}");
    let other = LockFreeEventBus::<u64>::new(4).unwrap();
    let error = other.subscribe_with(starting(Start::OldestKept, None)).unwrap_err();
    assert!(matches!(&error, SubscribeError::Config(_)) && error.to_string().contains("ring"));
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_publisher_without_patience_takes_free_room_and_costs_nobody_an_event() {
    let bus = ring(4);
    let reader = bus.subscribe_with(options(None, Policy::Block)).unwrap();
    bus.publish_many(0..4).unwrap();
    let mut patient = bus.bus().publication(4, None, false);
    assert_eq!(patient.poll(Patience::Left), Ok(None));
    assert_eq!(read(&reader), Some(Read::Event(0)));
    let mut hasty = bus.bus().publication(5, None, false);
    assert_eq!(hasty.poll(Patience::Spent), Ok(Some(1)));
    assert_eq!(patient.poll(Patience::Left), Ok(None), "it still stands first in line");
    let mut second = bus.bus().publication(6, None, false);
    assert_eq!(second.poll(Patience::Left), Ok(None));
    assert_eq!(read(&reader), Some(Read::Event(1)));
    assert_eq!(second.poll(Patience::Left), Ok(None));
    assert_eq!(patient.poll(Patience::Left), Ok(Some(1)));
    assert_eq!(read(&reader), Some(Read::Event(2)));
    assert_eq!(second.poll(Patience::Left), Ok(Some(1)));
    assert_eq!(drain(&reader), events([3, 5, 4, 6]));
    assert_eq!(reader.metrics().dropped.total(), 0);
}

#[test]
fn a_producer_publishes_alone_and_gives_the_bus_back() {
    let bus = ring(8);
    let reader = bus.subscribe(8).unwrap();
    assert_eq!(bus.publish(0), Ok(1));
    let mut producer = bus.bus().producer().unwrap();
    assert!(matches!(bus.publish(7), Err(PublishError::Reserved(7))));
    assert!(bus.publish_batch(None, &[7]).is_err());
    let second: ConfigError = bus.bus().producer().unwrap_err();
    assert!(second.to_string().contains("one at a time"), "{second}");
    let late = bus.subscribe(8).unwrap();
    assert_eq!(producer.publish(1), Ok(2));
    let topic = bus.topic("trades.A").unwrap();
    assert_eq!(producer.publish_to(&topic, 2), Ok(2));
    assert_eq!(producer.publish_batch(None, &[3, 4]), Ok(2));
    assert_eq!(producer.publish_with(None, |event| *event = 5), Ok(2));
    late.close();
    assert_eq!(producer.publish(6), Ok(1));
    drop(producer);
    assert_eq!(bus.publish(7), Ok(1));
    assert_eq!(drain(&reader), events(0..8));
    let mut producer = bus.bus().producer().unwrap();
    bus.close();
    assert!(matches!(producer.publish(8), Err(PublishError::Closed(8))));
    assert!(matches!(
        producer.publish_with(None, |event| *event = 9),
        Err(PublishError::Closed(9))
    ));
    assert!(LockFreeEventBus::<u64>::new(4).unwrap().bus().producer().is_err());
}

#[test]
fn a_producer_waits_for_room_is_refused_or_moves_readers_on_as_a_bus_does() {
    let bus = ring(4);
    let mut producer = bus.bus().producer().unwrap();
    let blocking = bus.subscribe_with(options(None, Policy::Block)).unwrap();
    assert_eq!(producer.publish_batch(None, &[0, 1, 2, 3, 4]), Ok(5));
    assert_eq!(drain(&blocking), [vec![Read::Missed(1)], events(1..5)].concat());
    let refusing = bus.subscribe_with(options(None, Policy::Reject)).unwrap();
    let stopped = producer.publish_batch(None, &[5, 6, 7, 8, 9]).unwrap_err();
    assert_eq!(stopped.accepted, 4);
    assert_eq!(stopped.error.into_event(), 9);
    assert_eq!(drain(&refusing), events(5..9));
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_batch_is_published_as_its_events_would_be() {
    for capacity in [2, 8, 64] {
        let bus = ring(capacity);
        let topics = topics(&bus);
        let wide = bus.subscribe_with(options(None, Policy::DropOldest)).unwrap();
        let narrow = bus.subscribe_with(options(Some("trades.A"), Policy::DropOldest)).unwrap();
        let batch: Vec<u64> = (0..100).collect();
        assert_eq!(bus.publish_batch(Some(&topics[0]), &batch), Ok(100));
        assert_eq!(bus.publish_batch(Some(&topics[2]), &[]), Ok(0));
        for reader in [wide, narrow] {
            let mut ledger = Ledger { wanted: batch.clone(), found: 0, lost: 0 };
            drain(&reader).into_iter().for_each(|found| ledger.check(found));
            assert_eq!(ledger.found, 100);
        }
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn batches_of_several_publishers_stay_whole_and_in_order() {
    const BATCHES: u64 = 300;
    const BATCH: u64 = 8;
    let bus = patient_ring(64, Duration::from_secs(3_600));
    let reader = bus.subscribe_with(options(None, Policy::Block)).unwrap();
    thread::scope(|scope| {
        for producer in 0..4_u64 {
            let bus = &bus;
            scope.spawn(move || {
                for batch in 0..BATCHES {
                    let events = (0..BATCH).map(|n| producer << 32 | (batch * BATCH + n));
                    let events: Vec<_> = events.collect();
                    assert_eq!(bus.publish_batch(None, &events), Ok(BATCH as usize));
                }
            });
        }
        let mut next = [0; 4];
        for _ in 0..4 * BATCHES * BATCH {
            let event = reader.recv().unwrap();
            let producer = (event >> 32) as usize;
            assert_eq!(event & 0xFFFF_FFFF, next[producer]);
            next[producer] += 1;
        }
    });
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_publisher_that_waits_for_a_narrow_reader_goes_on_when_that_has_read() {
    let bus = patient_ring(4, Duration::from_secs(3_600));
    let topics = topics(&bus);
    let reader = bus.subscribe_with(options(Some("trades.A"), Policy::Block)).unwrap();
    assert_eq!(bus.publish_to(&topics[0], 0), Ok(1));
    thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            for number in 1..200 {
                assert_eq!(bus.publish_to(&topics[2], number), Ok(0));
            }
            bus.publish_to(&topics[0], 200)
        });
        while bus.metrics().subscriptions[0].waiting_publishers == 0 {
            thread::yield_now();
        }
        assert_eq!(reader.recv(), Ok(0));
        assert_eq!(publisher.join().unwrap(), Ok(1));
    });
    assert_eq!(reader.recv(), Ok(200));
    assert_sums_close(&bus.metrics());
}

/// An event that can be told to panic when it is cloned, and counts its end.
#[derive(Debug)]
struct Fragile {
    number: u64,
    breaks: Arc<AtomicBool>,
    ended: Arc<AtomicUsize>,
}

impl Clone for Fragile {
    fn clone(&self) -> Self {
        assert!(!self.breaks.load(Ordering::Relaxed), "this one breaks");
        let (breaks, ended) = (self.breaks.clone(), self.ended.clone());
        Self { number: self.number, breaks, ended }
    }
}

impl Drop for Fragile {
    fn drop(&mut self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_producer_goes_on_after_the_first_part_of_a_batch_whose_clone_panics() {
    const EVENTS: u64 = 100;
    let (breaks, last) = (Arc::new(AtomicBool::new(true)), Arc::default());
    let (ended, never) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let new = |number| {
        let breaks = if number == EVENTS - 1 { &breaks } else { &never };
        Fragile { number, breaks: breaks.clone(), ended: ended.clone() }
    };
    let bus = RingEventBus::new(256).unwrap();
    let reader = bus.subscribe_with(SubscribeOptions::default()).unwrap();
    let mut producer = bus.bus().producer().unwrap();
    let batch: Vec<_> = (0..EVENTS).map(new).collect();
    let stopped = catch_unwind(AssertUnwindSafe(|| producer.publish_batch(None, &batch)));
    assert!(stopped.is_err());
    let published = bus.metrics().total_published;
    assert!(0 < published && published < EVENTS);
    assert!(
        producer.publish(Fragile { number: 1_000, breaks: last, ended: ended.clone() }).is_ok()
    );
    let numbers: Vec<_> = std::iter::from_fn(|| reader.try_recv().ok()).map(|e| e.number).collect();
    assert_eq!(numbers, (0..published).chain([1_000]).collect::<Vec<_>>());
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_panicking_clone_loses_no_event_and_stops_nobody() {
    let breaks = Arc::new(AtomicBool::new(false));
    let ended = Arc::new(AtomicUsize::new(0));
    let new = |number| Fragile { number, breaks: breaks.clone(), ended: ended.clone() };
    let bus = RingEventBus::new(4).unwrap();
    let reader = bus.subscribe_with(SubscribeOptions::default()).unwrap();
    let published = [new(0), new(1)];
    assert_eq!(bus.publish_batch(None, &published).unwrap(), 2);
    breaks.store(true, Ordering::Relaxed);
    assert!(catch_unwind(AssertUnwindSafe(|| reader.try_recv())).is_err());
    assert!(catch_unwind(AssertUnwindSafe(|| bus.publish_batch(None, &published))).is_err());
    breaks.store(false, Ordering::Relaxed);
    assert!(bus.publish(new(2)).is_ok_and(|taken| taken == 1));
    let numbers: Vec<_> = (0..3).map(|_| reader.try_recv().unwrap().number).collect();
    assert_eq!(numbers, [0, 1, 2]);
    assert_eq!(reader.metrics().delivered, 3);
    drop(published);
    assert_sums_close(&bus.metrics());
}

thread_local! {
    static ECHO: Cell<Option<RingEventBus<Echoing>>> = const { Cell::new(None) };
}

/// An event whose first clone publishes another one.
#[derive(Debug, PartialEq)]
struct Echoing(u64);

impl Clone for Echoing {
    fn clone(&self) -> Self {
        if let Some(bus) = ECHO.take() {
            assert_eq!(bus.publish(Self(self.0 + 100)).ok(), Some(1));
        }
        Self(self.0)
    }
}

#[test]
fn the_clone_of_an_event_of_a_batch_may_publish() {
    let bus = RingEventBus::new(16).unwrap();
    let reader = bus.subscribe_with(SubscribeOptions::default()).unwrap();
    // From a seat, and asking.
    for first in [0, 10] {
        assert_eq!(bus.publish(Echoing(first)).ok(), Some(1));
        ECHO.set(Some(bus.clone()));
        let batch = [Echoing(first + 1), Echoing(first + 2)];
        assert_eq!(bus.publish_batch(None, &batch).ok(), Some(2));
        let read: Vec<_> = (0..4).map(|_| reader.try_recv().unwrap().0).collect();
        assert_eq!(read, [first, first + 101, first + 1, first + 2]);
    }
    assert_eq!(reader.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn what_remains_in_a_ring_is_dropped_with_it_and_once() {
    for published in [0_u64, 3, 8, 21] {
        let breaks = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(AtomicUsize::new(0));
        let bus = RingEventBus::new(8).unwrap();
        for number in 0..published {
            let (breaks, ended) = (breaks.clone(), ended.clone());
            assert!(bus.publish(Fragile { number, breaks, ended }).is_ok());
        }
        assert_eq!(ended.load(Ordering::Relaxed) as u64, published.saturating_sub(8));
        drop(bus);
        assert_eq!(ended.load(Ordering::Relaxed) as u64, published);
    }
}

thread_local! {
    static BUS: Cell<Option<RingEventBus<Talking>>> = const { Cell::new(None) };
}

/// An event whose end publishes.
#[derive(Debug, Clone)]
struct Talking(u64);

impl Drop for Talking {
    fn drop(&mut self) {
        if let Some(bus) = BUS.take() {
            assert!(bus.publish(Talking(self.0 + 100)).is_ok());
        }
    }
}

#[test]
fn the_end_of_a_displaced_event_may_publish() {
    let bus = RingEventBus::new(2).unwrap();
    assert!(bus.publish(Talking(0)).is_ok() && bus.publish(Talking(1)).is_ok());
    BUS.set(Some(bus.clone()));
    assert!(bus.publish(Talking(2)).is_ok());
    let options = SubscribeOptions { start: Start::OldestKept, ..Default::default() };
    let reader = bus.subscribe_with(options).unwrap();
    let kept = std::iter::from_fn(|| reader.try_recv().ok());
    assert_eq!(kept.last().map(|event| event.0), Some(100));
}

#[test]
fn what_a_ring_cannot_keep_is_refused() {
    let bus = ring(4);
    let refused = bus.subscribe_with(options(None, Policy::DropNewest)).unwrap_err();
    assert!(refused.to_string().contains("lock_free"), "{refused}");
    let larger = SubscribeOptions { capacity: Some(5), ..options(None, Policy::Block) };
    let refused = bus.subscribe_with(larger).unwrap_err();
    assert!(refused.to_string().contains("backend ring holds 4"), "{refused}");
    let smaller = SubscribeOptions { capacity: Some(2), ..options(None, Policy::Block) };
    assert_eq!(bus.subscribe_with(smaller).unwrap().capacity(), 4);
}

#[test]
fn more_than_64_subscriptions_are_woken_moved_and_counted_like_the_others() {
    let bus = ring(16);
    let topics = topics(&bus);
    let readers: Vec<_> = (0..150)
        .map(|number| {
            let pattern = PATTERNS[number % PATTERNS.len()];
            (bus.subscribe_with(options(pattern, Policy::DropOldest)).unwrap(), pattern)
        })
        .collect();
    let mut ledgers: Vec<_> =
        readers.iter().map(|_| Ledger { wanted: vec![], found: 0, lost: 0 }).collect();
    for number in 0..100_u64 {
        let topic = number as usize % TOPICS.len();
        let wanting = readers.iter().filter(|(_, pattern)| wants(*pattern, topic)).count();
        assert_eq!(bus.publish_to(&topics[topic], number), Ok(wanting));
        for ((_, pattern), ledger) in readers.iter().zip(&mut ledgers) {
            if wants(*pattern, topic) {
                ledger.wanted.push(number);
            }
        }
    }
    for ((reader, _), ledger) in readers.iter().zip(&mut ledgers) {
        drain(reader).into_iter().for_each(|found| ledger.check(found));
        assert_eq!(ledger.found, ledger.wanted.len());
    }
    assert_sums_close(&bus.metrics());
    thread::scope(|scope| {
        let (last, _) = &readers[144];
        let sleeper = scope.spawn(|| last.recv());
        // It sleeps by now, or has not begun: it must have the event either way.
        thread::yield_now();
        assert!(bus.publish_to(&topics[0], 1_000).is_ok());
        assert_eq!(sleeper.join().unwrap(), Ok(1_000));
    });
}

#[test]
fn counting_readers_step_over_holes_and_still_count_them() {
    let bus = ring(8);
    let quiet = SubscribeOptions { on_lag: OnLag::Count, ..options(None, Policy::DropOldest) };
    let reader = bus.subscribe_with(quiet).unwrap();
    (0..20).for_each(|number| _ = bus.publish(number).unwrap());
    let read = drain(&reader);
    assert!(matches!(read.last(), Some(Read::Event(19))));
    assert_eq!(reader.metrics().dropped.overwritten, 20 - read.len() as u64);
}
