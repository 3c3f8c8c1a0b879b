//! Waiting in one thread for several subscriptions and a shutdown signal.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::time::{Duration, Instant};
use support::{Read, bus, drain, read};
use tickbus::{
    AnySubscription, Backend, Event, EventBus, EventSubscription, EventSystem, EventType, OnLag,
    Pattern, Policy, Priority, Selected, Selector, Shutdown, SourceId, SubscribeOptions, Symbol,
    TakeError, TryRecvError, select,
};

/// A deadline that has passed: looks and does not wait.
fn now() -> Option<Instant> {
    Some(Instant::now())
}

#[test]
fn nothing_ready_times_out() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let (one, two) = (bus.subscribe(8).unwrap(), bus.subscribe(8).unwrap());
        assert_eq!(select(&[&one, &two], None, now()), Selected::TimedOut);
        assert_eq!(select::<EventSubscription<u64>>(&[], None, now()), Selected::TimedOut);
        let soon = Instant::now() + Duration::from_millis(1);
        assert_eq!(select(&[&one], Some(&Shutdown::new()), Some(soon)), Selected::TimedOut);
    }
}

#[test]
fn the_subscription_with_something_is_named_and_nothing_is_taken() {
    for &backend in Backend::ALL {
        let (quiet, busy) = (bus(backend, 8), bus(backend, 8));
        let (one, two) = (quiet.subscribe(8).unwrap(), busy.subscribe(8).unwrap());
        busy.publish(7).unwrap();
        for _ in 0..3 {
            assert_eq!(select(&[&one, &two], None, None), Selected::Ready(1));
        }
        assert_eq!(two.try_recv(), Ok(7));
        assert_eq!(select(&[&one, &two], None, now()), Selected::TimedOut);
        busy.close();
        assert_eq!(select(&[&one, &two], None, None), Selected::Ready(1), "closed is ready");
        one.close();
        assert_eq!(select(&[&one, &two], None, None), Selected::Ready(0), "left is ready");
    }
}

#[test]
fn the_shutdown_signal_comes_first() {
    let bus = bus(Backend::LockFree, 8);
    let subscription = bus.subscribe(8).unwrap();
    bus.publish(1).unwrap();
    let shutdown = Shutdown::new();
    assert_eq!(select(&[&subscription], Some(&shutdown), None), Selected::Ready(0));
    shutdown.set();
    shutdown.set();
    assert!(shutdown.is_set());
    assert_eq!(select(&[&subscription], Some(&shutdown), None), Selected::Shutdown);
    assert_eq!(drain(&subscription), [Read::Event(1)]);
}

#[test]
fn a_signal_reaches_every_thread_that_selects() {
    let bus = bus(Backend::LockFree, 8);
    let subscription = bus.subscribe(8).unwrap();
    let shutdown = Shutdown::new();
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| select(&[&subscription], Some(&shutdown), None)))
            .collect();
        shutdown.set();
        for thread in waiting {
            assert_eq!(thread.join().unwrap(), Selected::Shutdown);
        }
    });
}

#[test]
fn a_selecting_thread_misses_no_event_of_several_buses() {
    for &backend in Backend::ALL {
        let buses: Vec<_> = (0..3).map(|_| bus(backend, 1 << 13)).collect();
        let subscriptions: Vec<_> =
            buses.iter().map(|bus| bus.subscribe(1 << 13).unwrap()).collect();
        let shutdown = Shutdown::new();
        std::thread::scope(|scope| {
            for bus in &buses {
                scope.spawn(|| (0..5_000).for_each(|event| assert!(bus.publish(event).is_ok())));
            }
            let all: Vec<&EventSubscription<u64>> = subscriptions.iter().collect();
            let mut next = [0; 3];
            while next.iter().sum::<u64>() < 15_000 {
                let Selected::Ready(place) = select(&all, Some(&shutdown), None) else {
                    panic!("nobody gave the signal");
                };
                assert_eq!(all[place].try_recv(), Ok(next[place]));
                next[place] += 1;
            }
            shutdown.set();
            assert_eq!(select(&all, Some(&shutdown), None), Selected::Shutdown);
        });
    }
}

#[test]
fn a_selector_sleeps_again_when_what_woke_it_was_taken() {
    for &backend in Backend::ALL {
        let (one_bus, two_bus) = (bus(backend, 8), bus(backend, 8));
        let (one, two) = (one_bus.subscribe(8).unwrap(), two_bus.subscribe(8).unwrap());
        let all = [&one, &two];
        let mut selector = Selector::new(&all, None, 0);
        for round in 0..100 {
            assert_eq!(selector.ready(), None);
            assert!(!selector.park(now()), "nothing came, so nothing wakes it");
            let place = round % 2;
            [&one_bus, &two_bus][place].publish(round as u64).unwrap();
            assert!(selector.park(None));
            assert_eq!(selector.ready(), Some(Selected::Ready(place)));
            assert_eq!(all[place].try_recv(), Ok(round as u64));
        }
    }
}

#[test]
fn a_busy_subscription_cannot_hide_the_others() {
    let bus = bus(Backend::LockFree, 8);
    let (one, two) = (bus.subscribe(8).unwrap(), bus.subscribe(8).unwrap());
    bus.publish_many([1, 2]).unwrap();
    let all = [&one, &two];
    let ready: Vec<_> = (0..4).map(|first| Selector::new(&all, None, first).ready()).collect();
    let place = |place| Some(Selected::Ready(place));
    assert_eq!(ready, [place(0), place(1), place(0), place(1)]);
}

#[test]
fn ready_means_that_receiving_gives_something() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let options = |on_lag| SubscribeOptions {
            pattern: Some(Pattern::new("trades.*").unwrap()),
            policy: Some(Policy::DropOldest),
            on_lag,
            ..Default::default()
        };
        let trades = bus.subscribe_with(options(OnLag::Raise)).unwrap();
        let counting = bus.subscribe_with(options(OnLag::Count)).unwrap();
        let everything = bus.subscribe(4).unwrap();
        let (quote, trade) = (bus.topic("quotes.BTC").unwrap(), bus.topic("trades.BTC").unwrap());
        bus.publish_to(&quote, 1).unwrap();
        assert_eq!(select(&[&trades, &counting], None, now()), Selected::TimedOut);
        assert!(!trades.is_ready());
        bus.publish_to(&trade, 2).unwrap();
        bus.publish_to(&quote, 3).unwrap();
        for subscription in [&trades, &counting] {
            assert!(subscription.is_ready());
            assert_eq!(drain(subscription), [Read::Event(2)]);
            assert!(!subscription.is_ready());
        }
        assert_eq!(everything.pending(), 3);
        support::assert_sums_close(&bus.metrics());
        bus.bus().close();
        assert!(trades.is_ready());
        assert_eq!(read(&trades), Some(Read::Closed));
    }
}

#[test]
fn a_hole_that_is_only_counted_makes_nobody_ready() {
    let bus = bus(Backend::LockFree, 1);
    let subscription_with = |on_lag| {
        let policy = Some(Policy::DropNewest);
        bus.subscribe_with(SubscribeOptions { policy, on_lag, ..Default::default() }).unwrap()
    };
    let (told, counted) = (subscription_with(OnLag::Raise), subscription_with(OnLag::Count));
    bus.publish_many([1, 2]).unwrap();
    for subscription in [&told, &counted] {
        assert_eq!(subscription.try_recv(), Ok(1));
    }
    assert!(told.is_ready());
    assert!(!counted.is_ready());
    assert!(matches!(told.try_recv(), Err(TryRecvError::Lagged(_))));
    assert_eq!(counted.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn a_selector_that_leaves_an_event_wakes_the_next_reader() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = bus.subscribe(4).unwrap();
        let all = [&subscription];
        let mut selector = Selector::new(&all, None, 0);
        assert_eq!(selector.ready(), None);
        subscription.sleep_unless_ready(|parking| {
            bus.publish(1).unwrap(); // wakes the selector, which came first
            assert!(selector.park(None));
            drop(selector); // it takes nothing
            assert!(parking.park(Instant::now() + Duration::from_secs(60)));
        });
        assert_eq!(subscription.recv(), Ok(1));
    }
}

#[test]
fn a_sleeper_that_leaves_an_event_passes_its_wake_up_on() {
    let bus = bus(Backend::LockFree, 4);
    let subscription = bus.subscribe(4).unwrap();
    subscription.sleep_unless_ready(|parking| {
        bus.publish(1).unwrap();
        assert!(parking.park(Instant::now() + Duration::from_secs(60)));
    });
    subscription.sleep_unless_ready(|_| panic!("there is something to receive"));
    subscription.pass_on();
    assert_eq!(subscription.recv(), Ok(1));
}

fn compact(event_type: EventType, priority: Priority, metadata: u64) -> Event {
    let (source_id, symbol) = (SourceId::NONE, Symbol::NONE);
    Event { timestamp: 0, event_type, priority, source_id, symbol, value: 0.0, metadata }
}

#[test]
fn buses_of_several_types_and_every_lane_of_a_system_are_waited_for_together() {
    let system = EventSystem::new(Default::default()).unwrap();
    let compact_events = system.subscribe(Default::default()).unwrap();
    let numbers = bus(Backend::Ring, 8);
    let (one, names) = (numbers.subscribe(8).unwrap(), tickbus::LockFreeEventBus::new(8).unwrap());
    let two = names.subscribe(8).unwrap();
    let all: [&dyn AnySubscription; 3] = [&one, &two, &compact_events];
    assert_eq!(select(&all, None, now()), Selected::TimedOut);
    let (there, back) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (numbers, names, system) = (&numbers, &names, &system);
        scope.spawn(move || {
            for round in 0..300 {
                let event_type = [EventType::PriceUpdate, EventType::EmergencyStop][round % 2];
                let priority = [Priority::Normal, Priority::High][round / 2 % 2];
                match round % 3 {
                    0 => numbers.publish(round as u64).map(drop).unwrap(),
                    1 => names.publish("name").map(drop).unwrap(),
                    _ => _ = system.publish(compact(event_type, priority, round as u64)).unwrap(),
                }
                assert_eq!(back.recv(), Ok(round));
            }
        });
        for round in 0..300 {
            assert_eq!(select(&all, None, None), Selected::Ready(round % 3));
            match round % 3 {
                0 => assert_eq!(one.try_recv(), Ok(round as u64)),
                1 => assert_eq!(two.try_recv(), Ok("name")),
                _ => assert_eq!(compact_events.try_recv().unwrap().metadata, round as u64),
            }
            there.send(round).unwrap();
        }
    });
    system.close();
    assert_eq!(select(&all, None, None), Selected::Ready(2), "closed is ready");
    assert_eq!(compact_events.try_recv(), Err(TakeError::Closed));
}

#[test]
fn a_selector_that_leaves_a_compact_event_wakes_the_next_reader() {
    let system = EventSystem::new(Default::default()).unwrap();
    let reader = system.subscribe(Default::default()).unwrap();
    let all = [&reader];
    for event_type in [EventType::PriceUpdate, EventType::EmergencyStop] {
        let mut selector = Selector::new(&all, None, 0);
        assert_eq!(selector.ready(), None);
        reader.sleep_unless_ready(|parking| {
            let event = compact(event_type, Priority::Normal, 1);
            system.publish(event).unwrap(); // wakes the selector, which came first
            assert!(selector.park(None));
            drop(selector); // it takes nothing
            assert!(parking.park(Instant::now() + Duration::from_secs(60)));
        });
        assert_eq!(reader.recv().unwrap().event_type, event_type);
    }
}
