//! Buses under an exclusion that is there anyway, as under the interpreter lock of a runtime that
//! runs one thread at a time: what they leave out there must not be missing.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use support::serial::Serial;
use tickbus::{
    Backend, Bus, BusConfig, EventSubscription, Lagged, Patience, Pattern, Policy, Start,
    SubscribeOptions, TryRecvError, WakeMode,
};

type SerialBus = Bus<u64, Serial>;

fn bus(backend: Backend, capacity: usize) -> SerialBus {
    bus_in(WakeMode::Auto, backend, capacity)
}

fn bus_in(wake_mode: WakeMode, backend: Backend, capacity: usize) -> SerialBus {
    let latency_sampling = Some(1);
    let config = BusConfig { capacity, latency_sampling, wake_mode, ..Default::default() };
    Bus::new(backend, config).unwrap()
}

fn subscribe(bus: &SerialBus, pattern: Option<&str>) -> EventSubscription<u64, Serial> {
    let pattern = pattern.map(|pattern| Pattern::new(pattern).unwrap());
    let policy = Some(Policy::DropOldest);
    bus.subscribe_with(SubscribeOptions { pattern, policy, ..Default::default() }).unwrap()
}

fn publish(bus: &SerialBus, event: u64) -> usize {
    let entry = bus.enter();
    bus.publish_ready(event, None, entry).unwrap_or_else(|event| {
        let mut publication = bus.publication_since(entry, event, None, false);
        publication.poll(Patience::Spent).unwrap().unwrap()
    })
}

#[test]
fn every_event_comes_in_order_or_is_told_as_missing() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let (wide, narrow) = (subscribe(&bus, None), subscribe(&bus, Some("trades.*")));
        let mut next = 0;
        for round in 0..50 {
            for event in 0..round {
                assert_eq!(publish(&bus, event), 1);
            }
            let mut batch = Vec::new();
            next = 0;
            loop {
                match wide.try_recv_batch(&mut batch, 3) {
                    Ok(_) => {
                        for event in batch.drain(..) {
                            assert_eq!(event, next);
                            next += 1;
                        }
                    }
                    Err(TryRecvError::Lagged(Lagged { missed, exact })) => {
                        assert!(exact);
                        next += missed;
                    }
                    Err(error) => {
                        assert_eq!(error, TryRecvError::Empty);
                        break;
                    }
                }
            }
            assert_eq!(next, round, "{}", backend.name());
            assert_eq!(wide.take_ready(), None);
        }
        assert_eq!(next, 49);
        let nothing = narrow.try_recv().unwrap_err();
        assert!(nothing == TryRecvError::Empty || backend == Backend::Broadcast, "{nothing}");
        let row = wide.metrics();
        assert_eq!(row.offered, row.delivered + row.dropped.total());
        assert_eq!((bus.published(), row.offered), (49 * 50 / 2, 49 * 50 / 2));
        let measured: u64 = bus.metrics().publish_latency.buckets.iter().map(|b| b.count).sum();
        assert_eq!(measured, bus.published());
    }
}

#[test]
fn who_arms_is_woken_by_every_event_that_it_wants_in_every_wake_mode() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.wake_by_ref();
        }

        fn wake_by_ref(self: &Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    let wake_modes = [WakeMode::Auto, WakeMode::Fenced, WakeMode::Polling];
    for (&backend, wake_mode) in
        Backend::ALL.iter().flat_map(|backend| wake_modes.map(|wake_mode| (backend, wake_mode)))
    {
        let bus = bus_in(wake_mode, backend, 8);
        let (subscription, wakes) = (subscribe(&bus, None), Arc::<Counted>::default());
        assert_eq!(subscription.set_waker(Waker::from(wakes.clone())), Ok(true));
        assert_eq!(publish(&bus, 0), 1);
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0, "nobody sleeps");
        subscription.arm();
        subscription.arm();
        assert_eq!((publish(&bus, 1), publish(&bus, 2)), (1, 1));
        assert_eq!(wakes.0.load(Ordering::Relaxed), 2, "{}", backend.name());
        subscription.disarm();
        assert_eq!(publish(&bus, 3), 1);
        assert_eq!(wakes.0.load(Ordering::Relaxed), 3, "one still sleeps");
        subscription.disarm();
        assert_eq!(publish(&bus, 4), 1);
        assert_eq!(wakes.0.load(Ordering::Relaxed), 3, "nobody sleeps any more");
    }
}

#[test]
fn batches_producers_and_what_is_kept_are_the_same_as_between_threads() {
    let bus = bus(Backend::Ring, 16);
    let wide = subscribe(&bus, None);
    assert_eq!(bus.publish_batch(None, &[0, 1, 2]), Ok(3));
    let mut producer = bus.producer().unwrap();
    assert_eq!(producer.publish_batch(None, &(3..30).collect::<Vec<_>>()), Ok(27));
    assert_eq!(producer.publish(30), Ok(1));
    assert_eq!(producer.publish_with(None, |event| *event = 31), Ok(1));
    assert!(bus.publish_batch(None, &[99]).is_err());
    drop(producer);
    let mut kept = Vec::new();
    bus.each_kept(|topic, sequence, event| {
        assert_eq!((topic, sequence), (0, *event));
        kept.push(*event);
    });
    assert!(kept.len() >= 12 && kept.ends_with(&[30, 31]), "{kept:?}");
    let options = SubscribeOptions { start: Start::OldestKept, ..Default::default() };
    assert_eq!(bus.subscribe_with(options).unwrap().recv_many(100), Ok(kept));
    assert!(matches!(wide.try_recv(), Err(TryRecvError::Lagged(_))));
    assert_eq!(wide.metrics().offered, 32);
}

#[test]
fn the_last_events_of_topics_are_shown_with_their_numbers() {
    for &backend in Backend::ALL {
        let keep_last = Some(Pattern::new(">").unwrap());
        let bus: SerialBus =
            Bus::new(backend, BusConfig { keep_last, ..Default::default() }).unwrap();
        let topics = [bus.topic("a").unwrap(), bus.topic("b").unwrap()];
        for number in 0..5 {
            let topic = Some(&topics[number as usize % 2]);
            assert_eq!(bus.publication(number, topic, false).poll(Patience::Spent), Ok(Some(0)));
        }
        let mut last = Vec::new();
        bus.each_last(|_, sequence, event| last.push((sequence, *event)));
        last.sort_unstable();
        assert_eq!(last, [(3, 3), (4, 4)], "{}", backend.name());
    }
}
