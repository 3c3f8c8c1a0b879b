//! Topics and patterns: who gets what, who is left alone, and what is no topic.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};
use support::{Read, assert_sums_close, bus, drain, events, read};
use tickbus::{
    Backend, BusConfig, EventBus, EventBusImpl, EventSubscription, Lagged, MAX_TOPIC_BYTES,
    Pattern, SubscribeOptions, TryRecvError,
};

fn wanting(bus: &EventBusImpl<u64>, pattern: &str) -> EventSubscription<u64> {
    let pattern = Some(Pattern::new(pattern).unwrap());
    bus.subscribe_with(SubscribeOptions { pattern, ..Default::default() }).unwrap()
}

#[test]
fn a_pattern_gets_its_topics_and_nothing_else() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        // Topics from before and after subscribing are compiled alike.
        let early = bus.topic("trades.BTC").unwrap();
        let everything = bus.subscribe(16).unwrap();
        let trades = wanting(&bus, "trades.*");
        let deep = wanting(&bus, "trades.>");
        let bitcoin = wanting(&bus, "*.BTC");
        let exact = wanting(&bus, "trades.BTC");
        let late = bus.topic("quotes.BTC").unwrap();
        let nested = bus.topic("trades.binance.BTC").unwrap();
        let alone = bus.topic("trades").unwrap();
        assert_eq!(bus.publish_to(&early, 1), Ok(5));
        assert_eq!(bus.publish_to(&late, 2), Ok(2));
        assert_eq!(bus.publish_to(&nested, 3), Ok(2));
        assert_eq!(bus.publish_to(&alone, 4), Ok(1));
        assert_eq!(bus.publish(5), Ok(1), "no topic: only those without a pattern");
        assert_eq!(drain(&everything), events(1..6));
        assert_eq!(drain(&trades), events([1]));
        assert_eq!(drain(&deep), events([1, 3]));
        assert_eq!(drain(&bitcoin), events([1, 2]));
        assert_eq!(drain(&exact), events([1]));
        let metrics = bus.metrics();
        assert_sums_close(&metrics);
        let row = &metrics.subscriptions[1];
        assert_eq!((row.pattern.as_deref(), row.offered, row.delivered), (Some("trades.*"), 1, 1));
        assert_eq!(row.exact, backend != Backend::Broadcast);
    }
}

#[test]
fn a_topic_is_known_once_and_a_left_pattern_no_longer_counts() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let trades = wanting(&bus, "trades.*");
        let topic = bus.topic("trades.BTC").unwrap();
        assert_eq!(topic, bus.topic("trades.BTC").unwrap());
        assert_eq!(topic.name(), "trades.BTC");
        assert_eq!(bus.publish_to(&topic, 1), Ok(1));
        trades.close();
        assert_eq!(bus.publish_to(&topic, 2), Ok(0));
        let quotes = wanting(&bus, "quotes.*"); // takes the place that was left
        assert_eq!(bus.publish_to(&topic, 3), Ok(0));
        assert_eq!(drain(&quotes), []);
        assert_sums_close(&bus.metrics());
    }
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_unwanted_topic_touches_no_subscription_and_wakes_none() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let trades = wanting(&bus, "trades.*");
        let wakes = Arc::new(Wakes::default());
        assert_eq!(trades.set_waker(Waker::from(wakes.clone())), Ok(true));
        let another = trades.set_waker(Waker::noop().clone());
        assert_eq!(another, Ok(false), "there is one already");
        trades.arm();
        let (wanted, unwanted) = (bus.topic("trades.A").unwrap(), bus.topic("quotes.A").unwrap());
        for event in 0..100 {
            assert_eq!(bus.publish_to(&unwanted, event), Ok(0));
            assert_eq!(bus.publish(event), Ok(0));
        }
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
        assert_eq!((trades.pending(), trades.metrics().offered), (0, 0));
        assert_eq!(bus.publish_to(&wanted, 100), Ok(1));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        trades.disarm();
        assert_eq!(bus.publish_to(&wanted, 101), Ok(1));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1, "it does not sleep any more");
        assert_eq!(drain(&trades), events([100, 101]));
        assert_eq!(bus.metrics().total_published, 202);
    }
}

#[test]
fn a_narrow_reader_is_not_lapped_on_lock_free_and_counts_what_it_wanted_on_a_ring() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let _everything = wanting(&bus, ">");
        bus.metrics();
        let trades = bus
            .subscribe_with(SubscribeOptions {
                pattern: Some(Pattern::new("trades.*").unwrap()),
                ..Default::default()
            })
            .unwrap();
        let (trade, quote) = (bus.topic("trades.A").unwrap(), bus.topic("quotes.A").unwrap());
        bus.publish_to(&trade, 0).unwrap();
        for event in 1..8 {
            bus.publish_to(&quote, event).unwrap();
        }
        match backend {
            Backend::LockFree => assert_eq!(drain(&trades), events([0])),
            Backend::Ring => {
                let lagged = Lagged { missed: 1, exact: true };
                assert_eq!(trades.try_recv(), Err(TryRecvError::Lagged(lagged)));
                assert_eq!(read(&trades), None);
            }
            _ => {
                assert_eq!(
                    trades.try_recv(),
                    Err(TryRecvError::Lagged(Lagged { missed: 4, exact: false }))
                );
                assert_eq!(read(&trades), None);
            }
        }
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn what_is_no_topic_is_refused_and_says_why() {
    let bus = bus(Backend::LockFree, 4);
    for (name, says) in [
        ("", "at least one character"),
        ("trades..BTC", "at least one character"),
        (".trades", "at least one character"),
        ("trades.", "at least one character"),
        ("trades.*", "wildcards belong to patterns"),
        (">", "wildcards belong to patterns"),
        ("trades BTC", "spaces"),
        ("trades\n", "spaces"),
    ] {
        let text = bus.topic(name).expect_err(name).to_string();
        assert!(text.contains(says), "{name:?}: {text}");
    }
    assert!(bus.topic(&"x".repeat(MAX_TOPIC_BYTES)).is_ok());
    assert!(bus.topic(&"x".repeat(MAX_TOPIC_BYTES + 1)).is_err());
    for pattern in ["", "a..b", "a.>.b", "*a", "a>", "a b"] {
        assert!(Pattern::new(pattern).is_err(), "{pattern:?}");
    }
}

#[test]
fn topics_are_a_bounded_vocabulary() {
    for &backend in Backend::ALL {
        let config = BusConfig { capacity: 4, max_topics: 2, ..Default::default() };
        let bus = EventBusImpl::<u64>::new(backend, config).unwrap();
        let first = bus.topic("a").unwrap();
        bus.topic("b").unwrap();
        let text = bus.topic("c").expect_err("two are all").to_string();
        assert!(text.contains("\"c\"") && text.contains("max_topics=2"), "{text}");
        assert_eq!(bus.topic("a"), Ok(first.clone()), "known ones stay");
        let subscription = wanting(&bus, "a");
        bus.publish_to(&first, 1).unwrap();
        assert_eq!(drain(&subscription), [Read::Event(1)]);
    }
}

#[test]
#[should_panic(expected = "belongs to another bus")]
fn a_topic_of_another_bus_is_a_mistake() {
    let (one, two) = (bus(Backend::LockFree, 4), bus(Backend::LockFree, 4));
    let topic = one.topic("trades").unwrap();
    let _ = two.publish_to(&topic, 1);
}

#[test]
fn a_full_subscription_is_no_hindrance_to_topics_it_does_not_want() {
    let bus = bus(Backend::LockFree, 1);
    let trades = wanting(&bus, "trades.*");
    let quotes = wanting(&bus, "quotes.*");
    let (trade, quote) = (bus.topic("trades.A").unwrap(), bus.topic("quotes.A").unwrap());
    bus.publish_to(&trade, 1).unwrap();
    for event in 2..5 {
        assert_eq!(bus.publish_to(&quote, event), Ok(1));
        assert_eq!(read(&quotes), Some(Read::Event(event)));
    }
    assert_eq!(drain(&trades), events([1]));
    assert_sums_close(&bus.metrics());
}
