//! The last event of each topic: read without subscribing, and given to those who join late,
//! without gap and without step backwards.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::collections::HashMap;
use support::{
    Read, assert_row_closes, assert_sums_close, bus, bus_that_keeps, drain, events, read,
};
use tickbus::{
    Backend, Dropped, EventBus, EventBusImpl, EventSubscription, Pattern, Policy, SubscribeError,
    SubscribeOptions, Topic, TryRecvError,
};

fn late(bus: &EventBusImpl<u64>, pattern: Option<&str>, policy: Policy) -> EventSubscription<u64> {
    let options = SubscribeOptions {
        pattern: pattern.map(|pattern| Pattern::new(pattern).unwrap()),
        policy: Some(policy),
        snapshot: true,
        ..Default::default()
    };
    bus.subscribe_with(options).unwrap()
}

fn topics(bus: &EventBusImpl<u64>) -> [Topic; 3] {
    ["quotes.BTC", "quotes.ETH", "trades.BTC"].map(|name| bus.topic(name).unwrap())
}

#[test]
fn the_last_event_of_a_topic_is_readable_without_subscribing() {
    for &backend in Backend::ALL {
        let bus = bus_that_keeps(backend, 8, Some(">"));
        assert_eq!(bus.last("quotes.BTC"), Ok(None), "nobody has named the topic");
        let [btc, eth, _] = topics(&bus);
        assert_eq!(bus.last("quotes.BTC"), Ok(None), "nothing was published");
        assert_eq!(bus.publish_to(&btc, 1), Ok(0));
        assert_eq!(bus.publish_to(&eth, 2), Ok(0));
        assert_eq!(bus.publish(3), Ok(0));
        assert_eq!(bus.publish_to(&btc, 4), Ok(0));
        assert_eq!((bus.last("quotes.BTC"), bus.last("quotes.ETH")), (Ok(Some(4)), Ok(Some(2))));
        assert_eq!(bus.last("quotes.BTC"), Ok(Some(4)), "reading takes nothing away");
        bus.close();
        assert!(bus.publish_to(&btc, 5).is_err());
        assert_eq!(bus.last("quotes.BTC"), Ok(Some(4)), "also after the end");
    }
}

#[test]
fn a_topic_whose_last_event_is_not_kept_is_an_error_that_says_what_to_do() {
    for &backend in Backend::ALL {
        let nothing = bus(backend, 8);
        let error = nothing.last("quotes.BTC").expect_err("it keeps nothing");
        assert!(error.to_string().contains("keep_last"), "{error}");
        let quotes = bus_that_keeps::<u64>(backend, 8, Some("quotes.*"));
        let trades = quotes.topic("trades.BTC").unwrap();
        assert_eq!(quotes.publish_to(&trades, 1), Ok(0));
        for topic in ["trades.BTC", "trades.ETH"] {
            let error = quotes.last(topic).expect_err("it keeps quotes");
            assert!(error.to_string().contains("\"quotes.*\""), "{error}");
        }
        for no_topic in ["quotes.*", "quotes..BTC", ""] {
            assert!(quotes.last(no_topic).is_err(), "{no_topic:?} is no topic");
        }
        assert_eq!(quotes.last("quotes.ETH"), Ok(None));
    }
}

#[test]
fn an_event_that_nobody_has_is_not_the_last() {
    let bus = bus_that_keeps(Backend::LockFree, 8, Some(">"));
    let [btc, ..] = topics(&bus);
    let policy = Some(Policy::Reject);
    let options = SubscribeOptions { capacity: Some(1), policy, ..Default::default() };
    let rejecting = bus.subscribe_with(options).unwrap();
    assert_eq!(bus.publish_to(&btc, 1), Ok(1));
    assert!(bus.publish_to(&btc, 2).is_err());
    assert_eq!(bus.last("quotes.BTC"), Ok(Some(1)));
    assert_eq!(drain(&rejecting), events([1]));
}

#[test]
fn a_snapshot_begins_with_the_last_events_in_the_order_of_publishing() {
    for &backend in Backend::ALL {
        for policy in [Policy::DropOldest, Policy::Conflate] {
            let bus = bus_that_keeps(backend, 8, Some(">"));
            let [btc, eth, trades] = topics(&bus);
            let published = [(&eth, 1), (&btc, 2), (&trades, 3), (&eth, 4)];
            for (topic, event) in published {
                assert_eq!(bus.publish_to(topic, event), Ok(0));
            }
            let everything = late(&bus, None, policy);
            let quotes = late(&bus, Some("quotes.*"), policy);
            let options = SubscribeOptions { policy: Some(policy), ..Default::default() };
            let plain = bus.subscribe_with(options).unwrap();
            assert_eq!((everything.pending(), quotes.pending()), (3, 2));
            assert!(everything.is_ready() && quotes.is_ready() && !plain.is_ready());
            assert_eq!(bus.publish_to(&btc, 5), Ok(3));
            assert_sums_close(&bus.metrics());
            assert_eq!(drain(&everything), events([2, 3, 4, 5]));
            assert_eq!(quotes.recv_many(2), Ok(vec![2, 4]));
            assert_eq!(quotes.recv_many(9), Ok(vec![5]));
            assert_eq!(drain(&plain), events([5]));
            assert_eq!((quotes.metrics().offered, quotes.metrics().delivered), (3, 3));
            assert_sums_close(&bus.metrics());
        }
    }
}

#[test]
fn a_snapshot_takes_no_room_and_a_hole_comes_behind_it() {
    for &backend in Backend::ALL {
        let bus = bus_that_keeps(backend, 2, Some("quotes.*"));
        let [btc, eth, trades] = topics(&bus);
        for (topic, event) in [(&btc, 0), (&eth, 1), (&trades, 2)] {
            assert_eq!(bus.publish_to(topic, event), Ok(0));
        }
        let slow = late(&bus, None, Policy::DropOldest);
        assert_eq!(bus.publish_many(3..5), Ok(2));
        assert_eq!(slow.pending(), 4, "two of the snapshot, and two as it has room");
        assert_eq!(bus.publish(5), Ok(1));
        assert_sums_close(&bus.metrics());
        use Read::{Event, Missed};
        assert_eq!(read(&slow), Some(Event(0)));
        assert_sums_close(&bus.metrics());
        assert_eq!(drain(&slow), [Event(1), Missed(1), Event(4), Event(5)]);
        let row = slow.metrics();
        assert_eq!((row.offered, row.delivered, row.dropped.overwritten), (5, 4, 1));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn leaving_counts_the_rest_of_a_snapshot_as_closed() {
    for &backend in Backend::ALL {
        let bus = bus_that_keeps(backend, 8, Some(">"));
        for (topic, event) in topics(&bus).iter().zip(0..) {
            assert_eq!(bus.publish_to(topic, event), Ok(0));
        }
        let leaving = late(&bus, None, Policy::DropOldest);
        assert_eq!(leaving.try_recv(), Ok(0));
        leaving.close();
        let row = leaving.metrics();
        assert_eq!(row.dropped, Dropped { closed: 2, ..Default::default() });
        assert_row_closes(&row);
        let draining = late(&bus, None, Policy::DropOldest);
        bus.close();
        let all: Vec<_> = events(0..3).into_iter().chain([Read::Closed]).collect();
        assert_eq!(drain(&draining), all);
        assert_row_closes(&draining.metrics());
    }
}

#[test]
fn a_snapshot_of_a_bus_that_keeps_nothing_is_refused() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let options = SubscribeOptions { snapshot: true, ..Default::default() };
        let error = bus.subscribe_with(options).expect_err("there is nothing to begin with");
        assert!(matches!(error, SubscribeError::Config(_)));
        assert!(error.to_string().contains("keep_last"), "{error}");
        assert_eq!(bus.metrics().subscriber_count, 0);
    }
}

/// Joins again and again while topics are published from 1 on, and checks of each topic that what
/// is read begins at what `last` gave before joining or later, and goes on one by one.
fn check_joins_while_publishing(backend: Backend, policy: Policy) {
    const ROUNDS: u64 = 3_000;
    // An event is its topic and its number there.
    let bus: EventBusImpl<(usize, u64)> = bus_that_keeps(backend, 1 << 15, Some(">"));
    let names: Vec<_> = (0..4).map(|topic| format!("quotes.{topic}")).collect();
    let topics: Vec<_> = names.iter().map(|name| bus.topic(name).unwrap()).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 1..=ROUNDS {
                for (place, topic) in topics.iter().enumerate() {
                    assert!(bus.publish_to(topic, (place, number)).is_ok());
                }
            }
            done.store(true, std::sync::atomic::Ordering::Release);
        });
        let mut is_last = false;
        while !is_last {
            is_last = done.load(std::sync::atomic::Ordering::Acquire);
            let before: Vec<_> = names.iter().map(|name| bus.last(name).unwrap()).collect();
            let options =
                SubscribeOptions { policy: Some(policy), snapshot: true, ..Default::default() };
            let joined = bus.subscribe_with(options).unwrap();
            let mut seen: HashMap<usize, u64> = HashMap::new();
            for _ in 0..200 {
                let (place, number) = match joined.try_recv() {
                    Ok(event) => event,
                    Err(TryRecvError::Empty) => continue,
                    Err(error) => panic!("{error}"),
                };
                match seen.insert(place, number) {
                    Some(previous) if policy == Policy::Conflate => assert!(number > previous),
                    Some(previous) => assert_eq!(number, previous + 1, "no gap, no step back"),
                    None => {
                        let known = before[place].map_or(0, |(_, number)| number);
                        assert!(number >= known.max(1), "{number} is older than {known}");
                    }
                }
                let (_, last) = bus.last(&names[place]).unwrap().unwrap();
                assert!(last >= number, "what was read is not newer than the last");
            }
            if is_last {
                assert_eq!(seen.len(), topics.len());
                assert!(seen.values().all(|&number| number == ROUNDS));
            }
        }
    });
}

#[test]
fn who_joins_while_others_publish_sees_no_gap_and_no_step_backwards() {
    check_joins_while_publishing(Backend::LockFree, Policy::Block);
    check_joins_while_publishing(Backend::Broadcast, Policy::DropOldest);
}

#[test]
fn who_joins_conflating_sees_no_step_backwards_from_the_snapshot_on() {
    for &backend in Backend::ALL {
        check_joins_while_publishing(backend, Policy::Conflate);
    }
}

#[test]
fn events_that_are_no_longer_the_last_are_dropped() {
    // A ring keeps what it carried until it comes round.
    for &backend in Backend::ALL.iter().filter(|&&backend| backend != Backend::Ring) {
        let bus = bus_that_keeps(backend, 8, Some(">"));
        let topic = bus.topic("quotes.BTC").unwrap();
        let events: Vec<_> = (0..100).map(std::sync::Arc::new).collect();
        for event in &events {
            assert_eq!(bus.publish_to(&topic, event.clone()), Ok(0));
        }
        let alive = events.iter().filter(|event| std::sync::Arc::strong_count(event) > 1).count();
        assert_eq!(alive, 1, "one event a topic");
        drop(bus);
        assert!(events.iter().all(|event| std::sync::Arc::strong_count(event) == 1));
    }
}
