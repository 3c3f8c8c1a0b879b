//! Handles: what they show of themselves, what they keep alive, and what a runtime with its own
//! lock and its own way of sleeping does with them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use futures_util::{FutureExt, StreamExt};
use std::fmt;
use std::num::ParseIntError;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};
use support::serial::Serial;
use support::{FOREVER, Read, assert_sums_close, bus, drain, events, patient_bus, read, subscribe};
use tickbus::{
    AsyncEventSubscription, Backend, Bus, BusConfig, EventBus, KeyError, KeyFn, Patience, Pattern,
    Policy, PublishError, RecvError, Selector, SubscribeOptions, TryRecvError, WeakBus, select,
};

fn shown(value: &impl fmt::Debug) -> String {
    format!("{value:?}")
}

#[test]
fn a_handle_shows_which_one_it_is() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let core: &Bus<u64> = bus.bus();
        let id = core.id();
        let named = format!("Bus {{ id: {id}, backend: {backend:?}, capacity: 8, .. }}");
        assert_eq!(shown(core), named);
        assert_eq!(shown(&core.downgrade()), "WeakBus { is_alive: true }");
        let topic = bus.topic("trades").unwrap();
        let publication = core.publication(1, Some(&topic), false);
        assert_eq!(shown(&publication), "Publication { topic: 1, .. }");
        let subscription = subscribe(&bus, 8, Policy::DropOldest);
        let text = shown(&subscription);
        assert_eq!(text, "EventSubscription { id: 0, policy: DropOldest, .. }");
        assert_eq!(
            shown(&Selector::new(&[&subscription], None, 0)),
            "Selector { subscriptions: 1, .. }"
        );
        subscription.sleep_unless_ready(|parking| assert_eq!(shown(parking), "Parking { .. }"));
        let awaited = AsyncEventSubscription::from(subscription);
        assert_eq!(shown(&awaited), "AsyncEventSubscription { id: 0, .. }");
    }
    assert_eq!(shown(&KeyFn::number(|event: &u64| *event)), "KeyFn { .. }");
}

/// Says nothing about itself, as most payloads do.
struct Secret;

#[test]
fn an_error_shows_who_had_no_room_and_not_the_event() {
    let subscriptions = || vec![3, 5];
    let (full, late) = (
        PublishError::Full { event: Secret, subscriptions: subscriptions() },
        PublishError::Timeout { event: Secret, subscriptions: subscriptions() },
    );
    assert_eq!((shown(&full), shown(&late)), ("Full([3, 5])".into(), "Timeout([3, 5])".into()));
    assert_eq!(shown(&PublishError::Closed(Secret)), "Closed");
    let why: ParseIntError = "x".parse::<u64>().unwrap_err();
    let error = PublishError::Key { event: Secret, error: KeyError::new(why.clone()) };
    assert_eq!(shown(&error), format!("Key(KeyError({why:?}))"));
}

#[test]
fn a_weak_handle_does_not_keep_the_bus_open() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let weak = bus.bus().downgrade();
        let subscription = bus.subscribe(8).unwrap();
        let again = weak.upgrade().unwrap();
        assert_eq!(again.id(), bus.bus().id());
        drop(bus);
        assert!(weak.is_alive() && !subscription.is_closed(), "one handle is left");
        drop(again);
        assert!(!weak.is_alive() && subscription.is_closed());
        assert!(weak.upgrade().is_none());
    }
}

#[test]
fn a_topic_and_a_subscription_say_what_they_were_made_with() {
    for &backend in Backend::ALL {
        let (bus, other) = (bus(backend, 8), bus(backend, 8));
        let topic = bus.topic("trades.BTC").unwrap();
        assert_eq!((topic.bus(), topic.name()), (bus.bus().id(), "trades.BTC"));
        assert_ne!(topic.bus(), other.bus().id());
        let pattern = Pattern::new("trades.*").unwrap();
        let options = SubscribeOptions { pattern: Some(pattern.clone()), ..Default::default() };
        assert_eq!(bus.subscribe_with(options).unwrap().pattern(), Some(&pattern));
        assert_eq!(bus.subscribe(8).unwrap().pattern(), None);
    }
}

#[tokio::test]
async fn an_awaited_subscription_shows_the_numbers_of_the_one_it_was_made_from() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 8);
        let _first = bus.subscribe(8).unwrap();
        let mut awaited: AsyncEventSubscription<u64> =
            subscribe(&bus, 8, Policy::DropOldest).into();
        assert_eq!((awaited.id(), awaited.capacity()), (1, 8));
        assert_eq!((awaited.policy(), awaited.pending()), (Policy::DropOldest, 0));
        bus.publish_many(0..3).unwrap();
        assert_eq!(awaited.recv_many(0).await, Ok(vec![]), "nothing was asked for");
        assert_eq!((awaited.recv_many(2).await, awaited.pending()), (Ok(vec![0, 1]), 1));
        let row = awaited.metrics();
        assert_eq!((row.id, row.offered, row.delivered, row.pending), (1, 3, 2, 1));
        assert!(!awaited.is_closed());
        awaited.close();
        assert!(awaited.is_closed());
        assert_eq!(awaited.metrics().dropped.closed, 1);
        assert_eq!(awaited.recv().await, Err(RecvError::Closed));
        assert_eq!(awaited.next().await, None);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn what_is_ready_is_taken_and_a_hole_is_left_for_who_can_tell_it() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = subscribe(&bus, 4, Policy::DropOldest);
        assert_eq!(subscription.take_ready(), None);
        bus.publish_many(0..6).unwrap();
        assert_eq!(subscription.take_ready(), None, "a hole stands before the next event");
        assert_eq!(drain(&subscription)[0], Read::Missed(2));
        bus.publish_many(6..9).unwrap();
        assert_eq!(subscription.try_recv(), Ok(6));
        // What decides nothing has lost nothing.
        let taken: Vec<_> = (7..9).filter_map(|_| subscription.take_ready()).collect();
        let rest = drain(&subscription);
        assert_eq!(events(taken).into_iter().chain(rest).collect::<Vec<_>>(), events(7..9));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_batch_taken_in_one_go_ends_before_a_hole_as_others_do() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = subscribe(&bus, 4, Policy::DropOldest);
        let mut batch = vec![100];
        assert_eq!(subscription.try_recv_batch(&mut batch, 0), Ok(0));
        assert_eq!(subscription.try_recv_batch(&mut batch, 9), Err(TryRecvError::Empty));
        bus.publish_many(0..6).unwrap();
        assert!(matches!(
            subscription.try_recv_batch(&mut batch, 9),
            Err(TryRecvError::Lagged(lagged)) if lagged.missed == 2
        ));
        assert_eq!(subscription.try_recv_batch(&mut batch, 3), Ok(3));
        assert_eq!(subscription.try_recv_batch(&mut batch, 9), Ok(1));
        assert_eq!(batch, [100, 2, 3, 4, 5]);
        subscription.close();
        assert_eq!(subscription.try_recv_batch(&mut batch, 9), Err(TryRecvError::Closed));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_publication_that_waits_can_be_waited_for() {
    let bus = patient_bus(Backend::LockFree, 1, FOREVER);
    let slow = subscribe(&bus, 1, Policy::Block);
    bus.publish(1).unwrap();
    let mut publication = bus.bus().publication(2, None, false);
    assert!(publication.notify().is_none(), "it has not been tried");
    assert_eq!(publication.poll(Patience::Left), Ok(None));
    assert_eq!(publication.without_room()[..], [slow.id()]);
    let notify = publication.notify().unwrap().clone();
    assert_eq!(publication.notified().now_or_never(), None);
    assert_eq!(slow.recv(), Ok(1));
    assert_eq!(notify.notified().now_or_never(), Some(()));
    assert_eq!(publication.poll(Patience::Left), Ok(Some(1)));
    assert_eq!(slow.recv(), Ok(2));
}

#[derive(Default)]
struct Alarm(AtomicUsize);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_runtime_that_runs_one_thread_at_a_time_misses_no_wake_up_without_the_fence() {
    for &backend in Backend::ALL {
        let bus: Bus<u64, Serial> = Bus::new(backend, BusConfig::default()).unwrap();
        let weak: WeakBus<u64, Serial> = bus.downgrade();
        let publish = |event| {
            assert_eq!(bus.publication(event, None, false).poll(Patience::Left), Ok(Some(1)));
        };
        let subscription = bus.subscribe_with(SubscribeOptions::default()).unwrap();
        let alarm = Arc::new(Alarm::default());
        assert_eq!(subscription.set_waker(Waker::from(alarm.clone())), Ok(true));
        publish(0);
        assert_eq!(alarm.0.load(Relaxed), 0, "nobody sleeps");
        subscription.arm();
        publish(1);
        assert_eq!(alarm.0.load(Relaxed), 1);
        subscription.disarm();
        publish(2);
        assert_eq!(alarm.0.load(Relaxed), 1, "it was taken back");
        assert_eq!(subscription.recv_many(9), Ok(vec![0, 1, 2]));
        drop(bus);
        assert!(!weak.is_alive());
        let soon = Instant::now() + Duration::from_millis(1);
        let closed = select(&[&subscription], None, Some(soon));
        assert_eq!(closed, tickbus::Selected::Ready(0), "closed is ready");
    }
}

#[test]
fn who_is_armed_once_is_woken_after_each_look_that_found_nothing() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        let subscription = subscribe(&bus, 16, Policy::DropOldest);
        let alarm = Arc::new(Alarm::default());
        assert_eq!(subscription.set_waker(Waker::from(alarm.clone())), Ok(true));
        subscription.arm();
        for event in 0..8 {
            // Each kind of look does.
            match event % 2 == 0 {
                true => assert!(read(&subscription).is_none()),
                false => assert!(!subscription.is_ready()),
            }
            bus.publish(event).unwrap();
            assert_eq!(alarm.0.load(Relaxed) as u64, event + 1, "{}", backend.name());
            assert_eq!(read(&subscription), Some(Read::Event(event)));
        }
        subscription.disarm();
        assert!(read(&subscription).is_none());
        bus.publish(8).unwrap();
        assert_eq!(alarm.0.load(Relaxed), 8);
    }
}
