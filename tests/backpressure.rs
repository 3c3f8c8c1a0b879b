//! Warnings about subscriptions that fill up: once per crossing, with hysteresis.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::sync::{Arc, Mutex};
use support::read;
use tickbus::{
    Backend, BackpressureConfig, BusConfig, EventBus, EventBusImpl, Policy, SubscribeOptions,
    Warning,
};

/// Returns a bus and the pending events that it has warned of.
fn warning_bus(
    backend: Backend,
    capacity: usize,
    threshold: usize,
) -> (EventBusImpl<u64>, Arc<Mutex<Vec<Warning>>>) {
    let backpressure = BackpressureConfig {
        drop_oldest: true,
        warn_threshold: Some(threshold),
        ..Default::default()
    };
    let config = BusConfig { capacity, backpressure, ..Default::default() };
    let bus = EventBusImpl::new(backend, config).unwrap();
    let warnings = Arc::new(Mutex::new(Vec::new()));
    let sink = warnings.clone();
    assert!(bus.bus().on_warning(move |warning| sink.lock().unwrap().push(warning)));
    assert!(!bus.bus().on_warning(|_| ()), "there is a sink already");
    (bus, warnings)
}

#[test]
fn a_crossing_is_reported_once_and_armed_again_at_half() {
    for &backend in Backend::ALL {
        let (bus, warnings) = warning_bus(backend, 16, 4);
        let subscription = bus.subscribe(16).unwrap();
        let publish = |count| {
            let before = warnings.lock().unwrap().len();
            bus.publish_many(0..count).unwrap();
            warnings.lock().unwrap().len() - before
        };
        let read = |count| (0..count).for_each(|_| assert!(read(&subscription).is_some()));
        assert_eq!(publish(3), 0);
        assert_eq!(publish(1), 1, "4 are pending");
        assert_eq!(publish(4), 0, "still above");
        read(5); // 3 are left, more than half
        assert_eq!(publish(5), 0, "not armed again");
        read(6); // 2 are left: half
        assert_eq!(publish(2), 1, "a new crossing");
        read(4); // none is left
        assert_eq!(publish(3), 0);
        assert_eq!(publish(1), 1);
        let expected = Warning {
            bus: bus.bus().id(),
            subscription: subscription.id(),
            pending: 4,
            threshold: 4,
        };
        assert_eq!(*warnings.lock().unwrap(), [expected; 3], "{}", backend.name());
    }
}

#[test]
fn each_subscription_has_its_own_crossing() {
    for &backend in Backend::ALL {
        let (bus, warnings) = warning_bus(backend, 8, 2);
        let (quick, slow) = (bus.subscribe(8).unwrap(), bus.subscribe(8).unwrap());
        for event in 0..6 {
            bus.publish(event).unwrap();
            assert!(read(&quick).is_some());
        }
        let warned: Vec<_> = warnings.lock().unwrap().iter().map(|w| w.subscription).collect();
        assert_eq!(warned, [slow.id()]);
    }
}

#[test]
fn a_threshold_of_one_warns_whenever_an_empty_subscription_gets_an_event() {
    for &backend in Backend::ALL {
        let (bus, warnings) = warning_bus(backend, 8, 1);
        let subscription = bus.subscribe(8).unwrap();
        for event in 0..3 {
            bus.publish(event).unwrap();
            bus.publish(event).unwrap();
            assert!(read(&subscription).is_some() && read(&subscription).is_some());
        }
        assert_eq!(warnings.lock().unwrap().len(), 3, "{}", backend.name());
    }
}

#[test]
fn a_subscription_that_stays_full_is_reported_once() {
    for (backend, policy) in [
        (Backend::LockFree, Policy::DropOldest),
        (Backend::LockFree, Policy::DropNewest),
        (Backend::Broadcast, Policy::DropOldest),
    ] {
        for capacity in [1, 2, 4] {
            let (bus, warnings) = warning_bus(backend, capacity, capacity);
            let options = SubscribeOptions { policy: Some(policy), ..Default::default() };
            let _stuck = bus.subscribe_with(options).unwrap();
            bus.publish_many(0..50).unwrap();
            let pending: Vec<_> = warnings.lock().unwrap().iter().map(|w| w.pending).collect();
            assert_eq!(pending, [capacity], "{} {policy:?} {capacity}", backend.name());
        }
    }
}

#[test]
fn a_threshold_that_cannot_be_reached_never_warns_and_zero_is_refused() {
    for &backend in Backend::ALL {
        let (bus, warnings) = warning_bus(backend, 4, 5);
        let _stuck = bus.subscribe(4).unwrap();
        bus.publish_many(0..50).unwrap();
        assert_eq!(warnings.lock().unwrap().len(), 0);
        let backpressure = BackpressureConfig { warn_threshold: Some(0), ..Default::default() };
        let config = BusConfig { backpressure, ..Default::default() };
        let error = EventBusImpl::<u64>::new(backend, config).expect_err("zero is no threshold");
        assert!(error.to_string().contains("warn_threshold was 0"), "{error}");
    }
}

#[test]
fn a_warning_may_publish() {
    let (bus, warnings) = warning_bus(Backend::LockFree, 8, 2);
    let subscription = bus.subscribe(8).unwrap();
    let alarms = EventBusImpl::<Warning>::new(Backend::LockFree, BusConfig::default()).unwrap();
    let ring = alarms.subscribe(8).unwrap();
    let backpressure = BackpressureConfig { warn_threshold: Some(1), ..Default::default() };
    let config = BusConfig { backpressure, ..Default::default() };
    let source = EventBusImpl::<u64>::new(Backend::LockFree, config).unwrap();
    let _pending = source.subscribe(8).unwrap();
    source.bus().on_warning(move |warning| assert_eq!(alarms.publish(warning), Ok(1)));
    source.publish(1).unwrap();
    assert_eq!(ring.recv().unwrap().pending, 1);
    bus.publish_many([1, 2]).unwrap();
    assert_eq!((subscription.pending(), warnings.lock().unwrap().len()), (2, 1));
}
