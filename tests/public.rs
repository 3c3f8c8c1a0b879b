//! What is public says what it is: to people who debug, and as keys of maps.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

use std::collections::HashSet;
use std::fmt;
use tickbus::{
    AsyncEventSubscription, Backend, BusConfig, EnqueueError, Event, EventBus, EventBusImpl,
    EventType, KeyError, Lane, LockFreeEventQueue, OverwriteRing, Pattern, Priority, PublishError,
    RingEventBus, SourceId, Symbol,
};

/// An event that does not show itself: nothing that carries events may need that.
#[derive(Clone)]
struct Silent;

#[track_caller]
fn assert_shows(value: &impl fmt::Debug, parts: &[&str]) {
    let text = format!("{value:?}");
    for part in parts {
        assert!(text.contains(part), "{text} lacks {part:?}");
    }
}

#[test]
fn buses_and_subscriptions_show_themselves_whatever_the_events() {
    for &backend in Backend::ALL {
        let bus = EventBusImpl::<Silent>::new(backend, BusConfig::default()).unwrap();
        assert_shows(bus.bus(), &["Bus", "id", "capacity: 16384"]);
        let subscription = bus.subscribe(4).unwrap_or_else(|error| panic!("{error}"));
        assert_shows(&subscription, &["EventSubscription", "policy"]);
        let weak = bus.bus().downgrade();
        assert_shows(&weak, &["is_alive: true"]);
        let publication = bus.bus().publication(Silent, None, false);
        assert_shows(&publication, &["Publication", "topic: 0"]);
        let subscription = AsyncEventSubscription::from(subscription);
        assert_shows(&subscription, &["AsyncEventSubscription", "id: 0"]);
    }
    let ring = RingEventBus::<Silent>::new(4).unwrap();
    let producer = ring.bus().producer().unwrap();
    assert_eq!(producer.bus_id(), ring.bus().id());
    assert_shows(&producer, &["Producer", "bus"]);
    let queue = LockFreeEventQueue::<Silent>::new(4).unwrap();
    assert_shows(&queue, &["size: 0", "capacity: 4", "is_closed: false"]);
    let (mut publisher, ring) = OverwriteRing::<u64>::new(4).unwrap();
    publisher.publish(&7);
    assert_shows(&publisher, &["OverwritePublisher", "next: 1"]);
    assert_shows(&ring, &["OverwriteRing", "capacity: 4", "tail: 1"]);
    assert_shows(&ring.clone().reader(), &["OverwriteReader", "next: 1"]);
    assert_eq!(ring.capacity(), 4);
}

#[test]
fn errors_name_themselves_without_the_event() {
    let key = KeyError::new(fmt::Error);
    let errors = [
        (PublishError::Full { event: Silent, subscriptions: vec![3] }, "Full([3])"),
        (PublishError::Timeout { event: Silent, subscriptions: vec![4] }, "Timeout([4])"),
        (PublishError::Closed(Silent), "Closed"),
        (PublishError::Reserved(Silent), "Reserved"),
        (PublishError::Key { event: Silent, error: key.clone() }, "Key(KeyError"),
    ];
    for (error, shown) in errors {
        assert_shows(&error, &[shown]);
        assert!(!error.to_string().is_empty());
        let Silent = error.into_event();
    }
    assert!(key == key.clone() && key != KeyError::new(fmt::Error));
    assert_shows(&EnqueueError::Full(Silent), &["Full"]);
    assert_shows(&EnqueueError::Closed(Silent), &["Closed"]);
}

#[test]
fn numbers_of_the_compact_world_show_their_names() {
    assert_shows(&Priority::Normal, &["Normal"]);
    assert_shows(&Priority::High, &["High"]);
    assert_shows(&Priority::Critical, &["Critical"]);
    let mut event = Event::from_bytes([0xFF; 32]);
    assert_shows(&event.priority, &["Priority(127)", "replayed"]);
    assert_eq!(Lane::ALL.map(Lane::name), ["critical", "high", "normal"]);
    event.event_type = EventType::StopLossTriggered;
    assert_shows(&event.event_type, &["EventType(65: ", "stop_loss_triggered"]);
    assert_shows(&Symbol::table(), &["Names", "symbol"]);
    assert_shows(&SourceId::table(), &["Names", "source"]);
    assert_shows(&event.source_id, &["SourceId(65535)"]);
    assert_shows(&tickbus::arrow::ArrowSchema::of_events(), &["ArrowSchema", "n_children"]);
    let none = tickbus::arrow::ArrowArray::of_events(&[]).unwrap();
    assert_shows(&none, &["ArrowArray", "length: 0"]);
}

#[expect(clippy::mutable_key_type, reason = "what changes in a topic is not what it is equal by")]
#[test]
fn topics_are_equal_and_hashed_by_bus_and_name() {
    let (bus, other) = (RingEventBus::<u8>::new(4).unwrap(), RingEventBus::<u8>::new(4).unwrap());
    let topics = [bus.topic("a"), bus.topic("a"), bus.topic("b"), other.topic("a")];
    let topics: HashSet<_> = topics.into_iter().map(Result::unwrap).collect();
    assert_eq!(topics.len(), 3);
    assert_shows(&Pattern::new("a.*").unwrap(), &["a.*"]);
}
