//! The newest event of each key: what is kept, in which order, what is told, and whose code runs
//! when.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use futures_util::FutureExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use support::{
    Read, assert_row_closes, assert_sums_close, bus, bus_that_keeps, drain, events, patient_bus,
    read, subscribe,
};
use tickbus::{
    AsyncEventSubscription, Backend, BackpressureConfig, BusConfig, Dropped, EventBus,
    EventBusImpl, EventSubscription, Key, KeyFn, Lagged, OnLag, Patience, Pattern, Policy,
    PublishError, RecvError, Selected, SubscribeError, SubscribeOptions, Warning, select,
};

fn conflating<T: Clone>(
    bus: &EventBusImpl<T>,
    capacity: usize,
    key: Option<KeyFn<T>>,
) -> EventSubscription<T> {
    let options = SubscribeOptions {
        capacity: Some(capacity),
        policy: Some(Policy::Conflate),
        key,
        ..Default::default()
    };
    bus.subscribe_with(options).unwrap()
}

/// Ten events a key: 10 to 19 have the key 1.
fn tens() -> Option<KeyFn<u64>> {
    Some(KeyFn::number(|event| event / 10))
}

fn publish_all(bus: &EventBusImpl<u64>, events: impl IntoIterator<Item = u64>) {
    events.into_iter().for_each(|event| assert!(bus.publish(event).is_ok()));
}

#[test]
fn the_newest_event_of_each_key_is_read_in_the_order_in_which_the_keys_became_pending() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let subscription = conflating(&bus, 8, tens());
        publish_all(&bus, [30, 10, 31, 20, 11, 32]);
        assert_eq!(subscription.pending(), 3);
        assert_eq!(read(&subscription), Some(Read::Event(32)));
        publish_all(&bus, [33, 12]);
        assert_eq!(drain(&subscription), events([12, 20, 33]), "30 came back behind the others");
        let row = subscription.metrics();
        assert_eq!((row.offered, row.delivered, row.pending), (8, 4, 0));
        assert_eq!(row.dropped, Dropped { conflated: 4, ..Default::default() });
        assert!(row.exact);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn without_a_function_the_key_is_the_topic_and_no_topic_is_a_key_of_its_own() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let everything = conflating(&bus, 8, None);
        let pattern = Some(Pattern::new("quotes.*").unwrap());
        let policy = Some(Policy::Conflate);
        let quotes =
            bus.subscribe_with(SubscribeOptions { pattern, policy, ..Default::default() }).unwrap();
        let topics =
            ["quotes.BTC", "quotes.ETH", "trades.BTC"].map(|name| bus.topic(name).unwrap());
        for event in 0..12 {
            let taken = match topics.get(event as usize % 4) {
                Some(topic) => bus.publish_to(topic, event),
                None => bus.publish(event),
            };
            assert_eq!(taken, Ok(if event % 4 < 2 { 2 } else { 1 }));
        }
        assert_eq!(drain(&everything), events(8..12));
        assert_eq!(drain(&quotes), events([8, 9]));
        assert_eq!(quotes.metrics().dropped.conflated, 4);
        assert!(quotes.metrics().exact, "a pattern is exact beside either backend");
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_key_is_anything_that_can_be_compared() {
    for &backend in Backend::ALL {
        let bus = patient_bus::<(String, u32)>(backend, 8, Duration::ZERO);
        let subscription =
            conflating(&bus, 8, Some(KeyFn::new(|(name, _): &(String, _)| name.clone())));
        for (name, price) in [("BTC", 1), ("ETH", 2), ("BTC", 3)] {
            assert_eq!(bus.publish((name.to_owned(), price)), Ok(1));
        }
        assert_eq!(drain(&subscription), events([("BTC".to_owned(), 3), ("ETH".to_owned(), 2)]));
    }
}

#[test]
fn distinct_keys_are_not_bounded_by_the_capacity() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 2);
        let by_number = conflating(&bus, 2, Some(KeyFn::number(|&event| event)));
        let by_text = conflating(&bus, 2, Some(KeyFn::new(|event| format!("key {event}"))));
        for event in 0..1_000 {
            assert_eq!(bus.publish(event), Ok(2));
            assert_eq!(drain(&by_number), events([event]));
            assert_eq!(drain(&by_text), events([event]));
        }
        assert_eq!(by_number.metrics().dropped, Dropped::default());
        assert_eq!(by_text.metrics().dropped, Dropped::default());
    }
}

#[test]
fn the_oldest_key_that_made_way_is_told_at_its_place_and_with_its_size() {
    use Read::{Closed, Event, Missed};
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let subscription = conflating(&bus, 2, tens());
        publish_all(&bus, [10, 20, 11, 30, 40, 41]); // 11 and 20 make way, 10 and 40 are conflated
        assert_eq!(subscription.pending(), 2);
        assert_eq!(read(&subscription), Some(Missed(2)));
        assert_eq!(read(&subscription), Some(Event(30)));
        publish_all(&bus, [50, 60, 61]); // 41 makes way, 60 is conflated
        bus.close();
        assert_eq!(drain(&subscription), [Missed(1), Event(50), Event(61), Closed]);
        let row = subscription.metrics();
        let dropped = Dropped { conflated: 3, overwritten: 3, ..Default::default() };
        assert_eq!((row.dropped, row.offered, row.delivered), (dropped, 9, 3));
        assert_row_closes(&row);
    }
}

#[test]
fn a_batch_ends_before_a_hole_and_counting_only_never_tells_it() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let loud = conflating(&bus, 2, tens());
        let quiet = bus
            .subscribe_with(SubscribeOptions {
                capacity: Some(2),
                policy: Some(Policy::Conflate),
                on_lag: OnLag::Count,
                key: tens(),
                ..Default::default()
            })
            .unwrap();
        publish_all(&bus, [10, 20, 30]);
        assert!(loud.is_ready() && quiet.is_ready());
        let hole = Lagged { missed: 1, exact: true };
        assert_eq!(loud.recv_many(9), Err(RecvError::Lagged(hole)));
        assert_eq!(loud.recv_many(9), Ok(vec![20, 30]));
        assert_eq!(quiet.recv_many(9), Ok(vec![20, 30]));
        assert_eq!((drain(&quiet), drain(&loud)), (vec![], vec![]));
        assert_eq!(quiet.metrics().dropped.overwritten, 1);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn publishing_never_waits_for_a_subscription_that_conflates() {
    for &backend in Backend::ALL {
        // Waiting would hang the test.
        let bus = patient_bus(backend, 4, support::FOREVER);
        let subscription = conflating(&bus, 1, Some(KeyFn::number(|&event| event)));
        for event in 0..100_u64 {
            let taken = match event % 3 {
                0 => bus.publish(event).unwrap(),
                1 => bus.publish_timeout(event, None, support::FOREVER).unwrap(),
                _ => bus.publish_async(event, None).now_or_never().unwrap().unwrap(),
            };
            assert_eq!(taken, 1);
        }
        assert_eq!(drain(&subscription), [Read::Missed(99), Read::Event(99)]);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_subscription_that_conflates_has_its_own_capacity_beside_either_backend() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let capacities = [1, 3, 64].map(|asked| conflating(&bus, asked, tens()).capacity());
        assert_eq!(capacities, [1, 4, 64], "{}", backend.name());
    }
}

#[test]
fn beside_the_shared_channel_only_those_who_read_it_send_through_it() {
    let bus = bus(Backend::Broadcast, 2);
    let walking = bus.subscribe(2).unwrap();
    let pattern = Some(Pattern::new("quotes.*").unwrap());
    let policy = Some(Policy::Conflate);
    let quotes =
        bus.subscribe_with(SubscribeOptions { pattern, policy, ..Default::default() }).unwrap();
    let topic = bus.topic("quotes.BTC").unwrap();
    assert_eq!(bus.publish_to(&topic, 0), Ok(2));
    assert_eq!(bus.publish(1), Ok(1));
    assert_eq!(drain(&walking), events([0, 1]));
    walking.close();
    assert_eq!(bus.publish_to(&topic, 2), Ok(1));
    assert_eq!(drain(&quotes), events([2]));
    assert_eq!(quotes.metrics().dropped.conflated, 1);
    quotes.close();
    let walking = bus.subscribe(2).unwrap();
    assert_eq!(bus.publish_to(&topic, 3), Ok(1));
    assert_eq!(drain(&walking), events([3]));
    assert_sums_close(&bus.metrics());
}

#[test]
fn leaving_counts_what_is_pending_as_closed() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let subscription = conflating(&bus, 2, tens());
        publish_all(&bus, [10, 20, 11, 30]);
        subscription.close();
        assert_eq!(bus.publish(40), Ok(0));
        assert_eq!(drain(&subscription), [Read::Closed]);
        let row = subscription.metrics();
        let dropped = Dropped { conflated: 1, overwritten: 1, closed: 2, ..Default::default() };
        assert_eq!((row.dropped, row.offered), (dropped, 4));
        assert_row_closes(&row);
        assert_eq!(bus.metrics().total_dropped, 4);
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no key for {0}")]
struct NoKey(u64);

fn failing_on(bad: u64) -> Option<KeyFn<u64>> {
    Some(KeyFn::try_new(move |&event| match event == bad {
        true => Err(NoKey(event)),
        false => Ok(Key::from(event)),
    }))
}

#[test]
fn when_a_key_function_fails_nobody_has_the_event() {
    for &backend in Backend::ALL {
        let bus = bus_that_keeps(backend, 8, Some(">"));
        let topic = bus.topic("quotes.BTC").unwrap();
        let before = conflating(&bus, 8, tens());
        let failing = conflating(&bus, 8, failing_on(1));
        let plain = bus.subscribe(8).unwrap();
        assert_eq!(bus.publish_to(&topic, 0), Ok(3));
        let error = bus.publish_to(&topic, 1).expect_err("1 has no key");
        let PublishError::Key { event: 1, error: why } = &error else { panic!("{error:?}") };
        assert_eq!(why.downcast_ref::<NoKey>().map(|NoKey(event)| *event), Some(1));
        assert!(error.to_string().contains("no key for 1"), "{error}");
        assert_eq!(error, error.clone());
        assert_eq!(error.into_event(), 1);
        assert_eq!(bus.last("quotes.BTC"), Ok(Some(0)));
        assert_eq!(bus.metrics().total_published, 1);
        for subscription in [&before, &failing, &plain] {
            assert_eq!(subscription.metrics().offered, 1);
            assert_eq!(drain(subscription), events([0]));
        }
        let many = bus.publish_many([0, 2, 1, 3]).expect_err("1 has no key");
        assert_eq!((many.accepted, many.error.into_event()), (2, 1));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn when_a_key_function_panics_nobody_has_the_event_and_the_bus_goes_on() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let key = KeyFn::number(|&event| if event == 1 { panic!("on purpose") } else { event });
        let subscription = conflating(&bus, 8, Some(key));
        let plain = bus.subscribe(8).unwrap();
        assert!(catch_unwind(AssertUnwindSafe(|| bus.publish(1))).is_err());
        assert_eq!(bus.publish(2), Ok(2));
        assert_eq!((drain(&subscription), drain(&plain)), (events([2]), events([2])));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_key_function_runs_once_an_event_and_not_for_unwanted_ones() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let calls = Arc::new(AtomicU64::new(0));
        let counted = calls.clone();
        let options = SubscribeOptions {
            pattern: Some(Pattern::new("quotes.*").unwrap()),
            policy: Some(Policy::Conflate),
            key: Some(KeyFn::number(move |&event| {
                counted.fetch_add(1, Ordering::Relaxed);
                event
            })),
            ..Default::default()
        };
        let _subscription = bus.subscribe_with(options).unwrap();
        let wanted = bus.topic("quotes.BTC").unwrap();
        for event in 0..10 {
            assert_eq!(bus.publish_to(&wanted, event), Ok(1));
            assert_eq!(bus.publish(event), Ok(0));
        }
        assert_eq!(calls.load(Ordering::Relaxed), 10);
        bus.close();
        assert!(bus.publish_to(&wanted, 0).is_err());
        assert_eq!(calls.load(Ordering::Relaxed), 10, "a closed bus asks for nothing");
    }
}

#[test]
fn a_key_function_may_publish_and_subscribe_and_close() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let own: Arc<OnceLock<EventBusImpl<u64>>> = Arc::default();
        let late: Arc<Mutex<Vec<EventSubscription<u64>>>> = Arc::default();
        let (its_bus, joined) = (own.clone(), late.clone());
        let key = KeyFn::number(move |&event| {
            let bus = its_bus.get().unwrap();
            match event {
                0 => assert_eq!(bus.publish(100), Ok(2)),
                1 => joined.lock().unwrap().push(conflating(bus, 8, tens())),
                2 => joined.lock().unwrap().clear(),
                3 => bus.close(),
                _ => {}
            }
            event
        });
        let subscription = conflating(&bus, 8, Some(key));
        let plain = bus.subscribe(8).unwrap();
        assert!(own.set(bus.clone()).is_ok());
        assert_eq!(bus.publish(0), Ok(2));
        assert_eq!(bus.publish(1), Ok(3), "who joined meanwhile has it too");
        assert_eq!(drain(&late.lock().unwrap()[0]), events([1]));
        assert_eq!(bus.publish(2), Ok(2), "and who left has not");
        assert_eq!(bus.publish(3), Err(PublishError::Closed(3)));
        let all: Vec<_> = events([100, 0, 1, 2]).into_iter().chain([Read::Closed]).collect();
        assert_eq!(drain(&plain), all);
        assert_eq!(drain(&subscription), all);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_publisher_that_waits_finds_the_keys_of_those_who_join_meanwhile() {
    let bus = bus(Backend::LockFree, 1);
    let full = subscribe(&bus, 1, Policy::Block);
    assert_eq!(bus.publish(0), Ok(1));
    let mut waiting = bus.bus().publication(11, None, true);
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    let joined = conflating(&bus, 4, tens());
    assert_eq!(waiting.poll(Patience::Left), Ok(None));
    assert_eq!(joined.pending(), 0, "nobody has it while it waits");
    assert_eq!(read(&full), Some(Read::Event(0)));
    assert!(waiting.park(None), "reading wakes it");
    assert_eq!(waiting.poll(Patience::Left), Ok(Some(2)));
    assert_eq!(drain(&full), events([11]));
    publish_all(&bus, [12]);
    assert_eq!(drain(&joined), events([12]), "11 had the key of 12");
    assert_sums_close(&bus.metrics());
}

#[test]
fn a_key_with_another_policy_is_refused() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        for policy in [None, Some(Policy::DropOldest)] {
            let options = SubscribeOptions { policy, key: tens(), ..Default::default() };
            let error = bus.subscribe_with(options).expect_err("only conflate has keys");
            assert!(matches!(error, SubscribeError::Config(_)));
            assert!(error.to_string().contains("policy conflate"), "{error}");
        }
        assert_eq!(bus.metrics().subscriber_count, 0);
    }
}

/// Publishes another event when it is dropped, which would deadlock under any lock.
#[derive(Clone)]
struct Talking(Arc<Last>);

struct Last {
    number: u64,
    bus: Arc<OnceLock<EventBusImpl<Talking>>>,
    dropped: Arc<Mutex<Vec<u64>>>,
}

impl Drop for Last {
    fn drop(&mut self) {
        self.dropped.lock().unwrap().push(self.number);
        if let Some(bus) = self.bus.get()
            && self.number < 100
        {
            let talking = Talking(Arc::new(Last {
                number: self.number + 100,
                bus: self.bus.clone(),
                dropped: self.dropped.clone(),
            }));
            // A bus that was closed meanwhile gives it back, and it ends too.
            drop(bus.publish(talking));
        }
    }
}

#[test]
fn replaced_events_are_dropped_when_no_lock_is_held() {
    // A ring keeps what it carried until it comes round.
    for &backend in Backend::ALL.iter().filter(|&&backend| backend != Backend::Ring) {
        let bus = patient_bus::<Talking>(backend, 8, Duration::ZERO);
        let (own, dropped) = (Arc::new(OnceLock::new()), Arc::<Mutex<Vec<u64>>>::default());
        // All have one key.
        let subscription = conflating(&bus, 2, None);
        assert!(own.set(bus.clone()).is_ok());
        for number in 0..3 {
            let (bus_of_it, dropped) = (own.clone(), dropped.clone());
            let talking = Talking(Arc::new(Last { number, bus: bus_of_it, dropped }));
            assert!(bus.publish(talking).is_ok_and(|taken| taken == 1));
        }
        // 1 replaced 0, whose end published 100 over 1, whose end published 101 over 100, ...
        assert_eq!(*dropped.lock().unwrap(), [0, 1, 100, 101]);
        let row = subscription.metrics();
        assert_eq!((row.offered, row.pending, row.dropped.conflated), (5, 1, 4));
        assert_eq!(subscription.try_recv().map(|talking| talking.0.number), Ok(2));
        assert_eq!(subscription.try_recv().map(|talking| talking.0.number), Ok(102));
        assert_row_closes(&subscription.metrics());
    }
}

#[test]
fn a_threshold_counts_pending_keys() {
    for &backend in Backend::ALL {
        let backpressure = BackpressureConfig { warn_threshold: Some(2), ..Default::default() };
        let config = BusConfig { capacity: 8, backpressure, ..Default::default() };
        let bus = EventBusImpl::new(backend, config).unwrap();
        let warnings: Arc<Mutex<Vec<Warning>>> = Arc::default();
        let sink = warnings.clone();
        assert!(bus.bus().on_warning(move |warning| sink.lock().unwrap().push(warning)));
        let subscription = conflating(&bus, 4, tens());
        publish_all(&bus, [10, 11, 12]);
        assert_eq!(warnings.lock().unwrap().len(), 0, "one key is pending");
        publish_all(&bus, [20, 30, 31, 40]);
        assert_eq!(warnings.lock().unwrap().len(), 1, "once a crossing");
        assert_eq!(subscription.recv_many(9).unwrap().len(), 4);
        publish_all(&bus, [10, 20]);
        let told: Vec<_> = warnings.lock().unwrap().iter().map(|warning| warning.pending).collect();
        assert_eq!(told, [2, 2]);
    }
}

#[test]
fn every_way_of_waiting_wakes_for_a_key() {
    for &backend in Backend::ALL {
        let (there, back) = (bus(backend, 4), bus(backend, 4));
        let (ping, pong) = (conflating(&there, 4, tens()), conflating(&back, 4, tens()));
        let quiet = conflating(&back, 4, tens());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for event in 0..300 {
                    assert_eq!(ping.recv(), Ok(event));
                    assert_eq!(back.publish(event), Ok(2));
                    assert_eq!(quiet.try_recv(), Ok(event));
                }
            });
            for event in 0..300_u64 {
                assert_eq!(there.publish(event), Ok(1));
                match event % 2 {
                    0 => {
                        assert_eq!(select(&[&pong], None, None), Selected::Ready(0));
                        assert_eq!(pong.try_recv(), Ok(event));
                    }
                    _ => assert_eq!(pong.recv_timeout(support::FOREVER), Ok(event)),
                }
            }
        });
        assert_sums_close(&there.metrics());
        assert_sums_close(&back.metrics());
    }
}

#[test]
fn a_cancelled_recv_loses_no_key() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = AsyncEventSubscription::from(conflating(&bus, 4, tens()));
        for event in 0..50 {
            assert_eq!(subscription.recv().now_or_never(), None);
            assert_eq!(bus.publish(event), Ok(1));
            assert_eq!(subscription.recv().now_or_never(), Some(Ok(event)));
        }
        bus.close();
        assert_eq!(subscription.recv().now_or_never(), Some(Err(RecvError::Closed)));
    }
}

/// Publishers in threads, each the only one of its keys; readers compete.
fn check_threads(backend: Backend, capacity: usize, readers: usize) {
    const PUBLISHERS: u64 = 3;
    const KEYS: u64 = 8;
    const ROUNDS: u64 = 4_000;
    let bus = bus(backend, 64);
    // An event is the number of its round, and its key: newer ones of a key are greater.
    let key = KeyFn::number(|event: &u64| event % (PUBLISHERS * KEYS));
    let subscription = conflating(&bus, capacity, Some(key));
    let plain = conflating(&bus, 1, None);
    let (found, missed) = std::thread::scope(|scope| {
        let publishing: Vec<_> = (0..PUBLISHERS)
            .map(|publisher| {
                let bus = &bus;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        for key in 0..KEYS {
                            let event = round * PUBLISHERS * KEYS + publisher * KEYS + key;
                            assert_eq!(bus.publish(event), Ok(2));
                        }
                    }
                })
            })
            .collect();
        let reading: Vec<_> = (0..readers)
            .map(|_| {
                scope.spawn(|| {
                    let (mut found, mut missed) = (Vec::new(), 0);
                    loop {
                        match subscription.recv() {
                            Ok(event) => found.push(event),
                            Err(RecvError::Lagged(lagged)) => missed += lagged.missed,
                            Err(_) => return (found, missed),
                        }
                    }
                })
            })
            .collect();
        publishing.into_iter().for_each(|thread| thread.join().unwrap());
        bus.close();
        let read: Vec<_> = reading.into_iter().map(|thread| thread.join().unwrap()).collect();
        let missed: u64 = read.iter().map(|(_, missed)| missed).sum();
        (read.into_iter().map(|(found, _)| found).collect::<Vec<_>>(), missed)
    });
    let mut newest = vec![0; (PUBLISHERS * KEYS) as usize];
    for events in &found {
        let mut of_reader = vec![None; newest.len()];
        for &event in events {
            let key = (event % (PUBLISHERS * KEYS)) as usize;
            assert!(of_reader[key] < Some(event), "a key went backwards");
            of_reader[key] = Some(event);
            newest[key] = newest[key].max(event);
        }
    }
    let row = subscription.metrics();
    assert_row_closes(&row);
    assert_eq!(row.offered, PUBLISHERS * KEYS * ROUNDS);
    assert_eq!(row.delivered as usize, found.iter().map(Vec::len).sum());
    assert_eq!((row.pending, row.dropped.overwritten), (0, missed));
    assert_eq!(row.delivered + row.dropped.conflated + missed, row.offered);
    if capacity as u64 >= PUBLISHERS * KEYS {
        let first = (ROUNDS - 1) * PUBLISHERS * KEYS;
        assert!(newest.into_iter().eq(first..first + PUBLISHERS * KEYS), "the last ones arrive");
        assert_eq!(missed, 0);
    }
    assert_row_closes(&plain.metrics());
}

#[test]
fn under_threads_no_key_goes_backwards_and_the_last_event_of_each_arrives() {
    for &backend in Backend::ALL {
        check_threads(backend, 32, 1);
        check_threads(backend, 32, 3);
    }
}

#[test]
fn under_threads_with_too_many_keys_every_event_is_accounted_for() {
    for &backend in Backend::ALL {
        check_threads(backend, 4, 1);
        check_threads(backend, 1, 2);
    }
}
