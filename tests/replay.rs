//! What a log has is replayed in its order, to everybody, however slow; and by nobody else's leave.
#![cfg(all(feature = "store", unix))]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proptest::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tempfile::TempDir;
use tickbus::{
    Backend, BusConfig, Event, EventBus, EventBusImpl, EventStore, EventSystem, EventSystemConfig,
    EventType, Lane, NewRecords, Object, OnLag, Pattern, Policy, Priority, Query, RecvError,
    Replay, ReplayBatch, ReplayError, ReplayOptions, ReplayRefused, ReplayState, Replayed,
    SourceId, StoreConfig, SubscribeOptions, Symbol, SystemSubscribeOptions, TakeError,
};

fn event(number: u64) -> Event {
    let names = ["BTCUSDT", "ETHUSDT", "SOLUSDT"];
    Event {
        timestamp: 1_000 + number,
        event_type: EventType((number % 4) as u8),
        priority: Priority::Normal,
        source_id: SourceId::new("replay.tests").unwrap(),
        symbol: Symbol::new(names[number as usize % 3]).unwrap(),
        value: number as f64,
        metadata: number,
    }
}

fn log() -> (Arc<EventStore>, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = StoreConfig::default();
    config.segment_bytes = 64 << 10;
    let (store, _) = EventStore::open(folder.path(), config).unwrap();
    (Arc::new(store), folder)
}

fn log_of(events: u64) -> (Arc<EventStore>, TempDir) {
    let (store, folder) = log();
    store.append(&(0..events).map(event).collect::<Vec<_>>()).unwrap();
    (store, folder)
}

fn replay(store: &Arc<EventStore>) -> Replay {
    store.replay(ReplayOptions::default()).unwrap()
}

fn mixed(store: &Arc<EventStore>) -> Replay {
    let mut options = ReplayOptions::default();
    options.is_mixed = true;
    Replay::of(store, options).unwrap()
}

/// Replays all that is wanted, and returns the metadata of events and the first bytes of objects.
fn numbers(replay: &mut Replay) -> Vec<u64> {
    let mut all = Vec::new();
    while let Some(batch) = replay.next_batch().unwrap() {
        match batch {
            ReplayBatch::Events(events) => all.extend(events.iter().map(|event| event.metadata)),
            ReplayBatch::Objects(objects) => {
                all.extend(objects.iter().map(|object| u64::from(object.bytes[0])));
            }
            _ => unreachable!("there are no others"),
        }
    }
    all
}

fn small_system() -> EventSystem {
    let mut config = EventSystemConfig::default();
    (config.critical_capacity, config.high_capacity, config.normal_capacity) = (8, 16, 64);
    EventSystem::new(config).unwrap()
}

#[derive(Debug, Clone)]
enum Item {
    Events(Range<u64>),
    Object(u8, u64),
    Gap(u64),
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let item = prop_oneof![
        4 => (0..5_000_u64, 1..300_u64).prop_map(|(from, count)| Item::Events(from..from + count)),
        2 => (any::<u8>(), 0..9_000_u64).prop_map(|(byte, time)| Item::Object(byte, time)),
        1 => (1..9_u64).prop_map(Item::Gap),
    ];
    prop::collection::vec(item, 0..20)
}

/// Appends all of it, as many at once as `together` says.
fn write(store: &EventStore, items: &[Item], together: usize) {
    for item in items {
        match item {
            Item::Events(numbers) => {
                let events: Vec<_> = numbers.clone().map(event).collect();
                for events in events.chunks(together) {
                    store.append(events).unwrap();
                }
            }
            Item::Object(byte, timestamp) => {
                let (topic, schema, bytes) = (Some("a.b"), "test", &[*byte]);
                let (timestamp, version) = (*timestamp, 1);
                let object =
                    Object { timestamp, topic, schema, version, bytes, is_replayed: false };
                store.append_many(&[NewRecords::Object(object)]).unwrap();
            }
            Item::Gap(missed) => {
                store.append_gap(*missed, true).unwrap();
            }
        }
        if together == 7 {
            store.seal().unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn two_replays_of_equal_logs_give_equal_records_and_digests(items in items()) {
        let (one, other) = (log(), log());
        write(&one.0, &items, 5_000);
        write(&other.0, &items, 7);
        let (mut first, mut again) = (replay(&one.0), replay(&other.0));
        prop_assert_eq!(numbers(&mut first), numbers(&mut again));
        prop_assert_eq!(first.transport().digest(), again.transport().digest());
        prop_assert_eq!(first.transport().progress().replayed, again.transport().progress().replayed);
        let missed: u64 = items.iter().map(|item| if let Item::Gap(n) = item { *n } else { 0 }).sum();
        prop_assert_eq!(first.transport().progress().missed, missed);
        // The finished segments are compressed.
        other.0.seal().unwrap();
        let segments = other.0.compress(Duration::ZERO).unwrap().segments;
        prop_assert_eq!(segments > 0, !items.is_empty());
        // As another process reads it, and with a query that wants everything.
        other.0.sync().unwrap();
        let mut read_only = Replay::open(other.1.path(), ReplayOptions::default()).unwrap();
        let mut options = ReplayOptions::default();
        options.query.times = 0..1 << 63;
        let mut queried = Replay::of(&one.0, options).unwrap();
        prop_assert_eq!(numbers(&mut read_only), numbers(&mut queried));
        prop_assert_eq!(read_only.transport().digest(), queried.transport().digest());
        prop_assert_eq!(queried.transport().digest(), first.transport().digest());
    }

    #[test]
    fn a_part_of_a_log_is_what_a_query_finds(
        items in items(), from in 0..6_000_u64, length in 0..6_000_u64, code in 0..4_u8,
    ) {
        let (store, _folder) = log();
        write(&store, &items, 100);
        let mut query = Query::default();
        (query.times, query.types) = (from..from + length, vec![EventType(code)]);
        let mut options = ReplayOptions::default();
        options.query = query.clone();
        let found = numbers(&mut Replay::of(&store, options).unwrap());
        let all = items.iter().flat_map(|item| match item {
            Item::Events(numbers) => numbers.clone(),
            _ => 0..0,
        });
        let wanted = |number: &u64| {
            query.times.contains(&event(*number).timestamp) && number % 4 == u64::from(code)
        };
        let all: Vec<_> = all.collect();
        let wanted: Vec<_> = all.iter().copied().filter(wanted).collect();
        prop_assert_eq!(&found, &wanted);
        let mut options = ReplayOptions::default();
        options.query = query;
        let in_memory = all.into_iter().map(event).collect();
        let mut in_memory = Replay::of_events(in_memory, options).unwrap();
        prop_assert_eq!(numbers(&mut in_memory), wanted);
    }
}

#[test]
fn a_slow_subscription_of_a_system_loses_nothing() {
    let (store, _folder) = log();
    let of_lane = |number: u64| {
        let priority = Priority((number % 7 % 3) as u8);
        Event { priority, ..event(number) }
    };
    let events: Vec<_> = (0..5_000).map(of_lane).collect();
    store.append(&events).unwrap();
    let system = small_system();
    let slow = system.subscribe(SystemSubscribeOptions::default()).unwrap();
    let narrow = system
        .subscribe(SystemSubscribeOptions {
            symbols: vec![Symbol::new("ETHUSDT").unwrap()],
            ..Default::default()
        })
        .unwrap();
    let read = |subscription: &tickbus::SystemSubscription| {
        let mut lanes = [const { Vec::new() }; 3];
        loop {
            match subscription.recv() {
                Ok(event) => lanes[event.lane() as usize].push(event),
                Err(TakeError::Closed) => return lanes,
                Err(error) => panic!("{error}"),
            }
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        let all = scope.spawn(|| read(&slow));
        let some = scope.spawn(|| read(&narrow));
        let progress = replay(&store).into_sink(&system).unwrap();
        assert_eq!((progress.replayed, progress.state), (5_000, ReplayState::Ended));
        system.close();
        let (mut all, some) = (all.join().unwrap(), some.join().unwrap());
        let end = all[Lane::Normal as usize].pop().unwrap();
        assert_eq!((end.event_type, end.metadata), (EventType::ReplayEnded, 5_000));
        for lane in Lane::ALL {
            let of_lane = events.iter().filter(|event| event.lane() == lane);
            let expected: Vec<_> = of_lane.map(|event| event.with_replayed(true)).collect();
            assert_eq!(all[lane as usize], expected);
            let symbol = Symbol::new("ETHUSDT").unwrap();
            let of_symbol: Vec<_> =
                expected.into_iter().filter(|event| event.symbol == symbol).collect();
            assert_eq!(some[lane as usize], of_symbol);
        }
    });
}

#[test]
fn a_slow_subscription_of_any_bus_loses_nothing_whatever_its_policy() {
    let (store, _folder) = log_of(1_000);
    for &backend in Backend::ALL {
        for policy in [Policy::Block, Policy::Reject, Policy::DropNewest, Policy::DropOldest] {
            for capacity in [1, 2, 16] {
                let config = BusConfig { capacity, ..Default::default() };
                let bus = EventBusImpl::new(backend, config).unwrap();
                let options = |pattern: Option<&str>| SubscribeOptions {
                    policy: Some(policy),
                    pattern: pattern.map(|pattern| Pattern::new(pattern).unwrap()),
                    ..Default::default()
                };
                // Not every backend has every policy.
                let Ok(wide) = bus.subscribe_with(options(None)) else { continue };
                let narrow = bus.subscribe_with(options(Some("*.SOLUSDT"))).unwrap();
                let read = |subscription: &tickbus::EventSubscription<Event>| {
                    let mut numbers = Vec::new();
                    loop {
                        match subscription.recv() {
                            Ok(event) => numbers.push(event.metadata),
                            Err(RecvError::Closed) => return numbers,
                            Err(error) => panic!("{error} on {}, {policy:?}", backend.name()),
                        }
                    }
                };
                thread::scope(|scope| {
                    let wide = scope.spawn(|| read(&wide));
                    let narrow = scope.spawn(|| read(&narrow));
                    replay(&store).into_sink(&bus).unwrap();
                    bus.close();
                    let all: Vec<u64> = (0..1_000).chain([1_000]).collect();
                    assert_eq!(wide.join().unwrap(), all);
                    let some: Vec<u64> = (0..1_000).filter(|number| number % 3 == 2).collect();
                    assert_eq!(narrow.join().unwrap(), some);
                });
            }
        }
    }
}

#[test]
fn whoever_conflates_or_only_counts_is_not_waited_for() {
    let (store, _folder) = log_of(1_000);
    for &backend in Backend::ALL {
        let config = BusConfig { capacity: 16, ..Default::default() };
        let bus = EventBusImpl::new(backend, config).unwrap();
        let policy = Some(Policy::DropOldest);
        let counting = SubscribeOptions { policy, on_lag: OnLag::Count, ..Default::default() };
        let counting = bus.subscribe_with(counting).unwrap();
        let policy = Some(Policy::Conflate);
        let conflating =
            bus.subscribe_with(SubscribeOptions { policy, ..Default::default() }).unwrap();
        replay(&store).into_sink(&bus).unwrap();
        assert!(counting.pending() <= 16, "{}", backend.name());
        assert_eq!(conflating.pending(), 12 + 1, "one of each topic, and the end");
    }
}

#[test]
fn a_bus_that_others_publish_into_is_refused_unless_mixed() {
    let (store, _folder) = log_of(10);
    let system = small_system();
    replay(&store).into_sink(&system).unwrap();
    replay(&store).into_sink(&system).unwrap();
    assert_eq!(system.total_events(), 22, "one replay after another is nobody else");
    system.publish(event(0)).unwrap();
    let error = replay(&store).into_sink(&system).unwrap_err();
    let others = ReplayRefused::Publisher { events: 1 };
    assert!(matches!(error, ReplayError::Refused(why) if why == others), "{error}");
    assert_eq!(system.total_events(), 23, "nothing was replayed");
    mixed(&store).into_sink(&system).unwrap();

    let bus = EventBusImpl::<Event>::new(Backend::Ring, BusConfig::default()).unwrap();
    let slow = bus.subscribe_with(Default::default()).unwrap();
    let (store, _folder) = log_of(100_000);
    thread::scope(|scope| {
        let refused = scope.spawn(|| replay(&store).into_sink(&bus).unwrap_err());
        slow.recv().unwrap();
        let again = replay(&store).into_sink(&bus).unwrap_err();
        assert!(matches!(again, ReplayError::Refused(ReplayRefused::Replay)), "{again}");
        bus.publish(event(0)).unwrap();
        while !refused.is_finished() {
            _ = slow.recv_timeout(Duration::from_millis(1));
        }
        let error = refused.join().unwrap();
        assert!(matches!(error, ReplayError::Refused(ReplayRefused::Publisher { .. })), "{error}");
    });
}

#[test]
fn what_is_replayed_is_not_stored_again_unless_that_is_asked_for() {
    let (store, _folder) = log_of(1_000);
    for (replayed, stored) in [(Replayed::Skip, 2), (Replayed::Keep, 1_003)] {
        let (other, _other_folder) = log();
        let system = EventSystem::new(Default::default()).unwrap();
        let subscription = system.subscribe(Default::default()).unwrap();
        let attachment = other.attach_with(subscription, replayed, |error| panic!("{error}"));
        let attachment = attachment.unwrap();
        let error = replay(&store).into_sink(&system).unwrap_err();
        assert!(matches!(error, ReplayError::Refused(ReplayRefused::Store)), "{error}");
        system.publish(event(1)).unwrap();
        mixed(&store).into_sink(&system).unwrap();
        system.publish(event(2)).unwrap();
        attachment.detach();
        assert_eq!(attachment.stored(), stored);
        let mut reader = other.read(0);
        let mut told = Vec::new();
        while let Some(batch) = reader.next_batch().unwrap() {
            let tickbus::Records::Events(events) = batch.records else { panic!("only events") };
            told.extend(events.iter().map(Event::is_replayed));
        }
        let expected = (0..stored).map(|place| place != 0 && place != stored - 1);
        assert!(told.into_iter().eq(expected), "the log says which were replayed");
    }
}

#[test]
fn seeking_goes_forth_and_back_and_stepping_gives_so_many() {
    let (store, _folder) = log_of(10_000);
    let mut replay = replay(&store);
    let transport = replay.transport().clone();
    let clock = replay.clock().clone();
    let mut next = || match replay.next_batch().unwrap() {
        Some(ReplayBatch::Events(events)) => {
            assert_eq!(clock.time_ns(), events[events.len() - 1].timestamp);
            (events[0].metadata, events.len())
        }
        _ => panic!("there are events"),
    };
    transport.step(3);
    assert_eq!(next(), (0, 3));
    transport.seek(9_000);
    transport.step(1);
    assert_eq!(next(), (8_000, 1));
    transport.seek(1_005);
    transport.step(2);
    assert_eq!(next(), (5, 2));
    assert_eq!(transport.progress().sequence, 7);
    transport.seek(0);
    transport.step(1);
    assert_eq!(next(), (0, 1));
    assert_eq!(transport.progress().replayed, 7);
    transport.resume();
    assert_eq!(numbers(&mut replay), (1..10_000).collect::<Vec<_>>());
    assert_eq!(transport.progress().state, ReplayState::Ended);
}

#[test]
fn the_clock_follows_the_events_and_never_goes_back_but_by_seeking() {
    let (store, _folder) = log();
    let times = [500, 700, 0, 600, 800];
    let events = times.map(|timestamp| Event { timestamp, ..event(0) });
    store.append(&events).unwrap();
    let mut replay = replay(&store);
    let transport = replay.transport().clone();
    let clock = replay.clock().clone();
    clock.set(9_999);
    for shown in [500, 700, 700, 700, 800] {
        transport.step(1);
        assert!(replay.next_batch().unwrap().is_some());
        assert_eq!(clock.time_ns(), shown);
    }
    transport.seek(600);
    transport.step(1);
    assert!(replay.next_batch().unwrap().is_some());
    assert_eq!(clock.time_ns(), 700);
}

#[test]
fn closing_or_stopping_ends_a_replay_that_waits_for_room() {
    let (store, _folder) = log_of(10_000);
    for closes in [true, false] {
        let system = small_system();
        let asleep = system.subscribe(Default::default()).unwrap();
        let mut replay = replay(&store);
        let transport = replay.transport().clone();
        thread::scope(|scope| {
            let replaying = scope.spawn(|| replay.into_sink(&system));
            asleep.recv().unwrap();
            match closes {
                true => system.close(),
                false => transport.stop(),
            }
            let ended = replaying.join().unwrap();
            match closes {
                true => assert!(matches!(ended, Err(ReplayError::Closed))),
                false => assert_eq!(ended.unwrap().state, ReplayState::Stopped),
            }
        });
        let progress = transport.progress();
        assert!(progress.replayed < 10_000, "it was stopped on its way");
        let events: Vec<_> = (0..progress.replayed).map(event).collect();
        let mut digest = tickbus::Digest::default();
        digest.add_events(&events);
        assert_eq!(transport.digest(), digest.finish(), "it is of what was published");
    }
}

#[test]
fn an_object_among_events_for_a_system_is_an_error_that_names_it() {
    let (store, _folder) = log();
    write(&store, &[Item::Events(0..5), Item::Object(1, 1), Item::Gap(1)], 100);
    let system = small_system();
    let error = replay(&store).into_sink(&system).unwrap_err();
    assert!(matches!(&error, ReplayError::Object { sequence: 5, schema } if schema == "test"));
    assert!(error.to_string().contains("name the types"), "{error}");
    assert_eq!(system.total_events(), 5);
    let mut options = ReplayOptions::default();
    options.query.types = (0..4).map(EventType).collect();
    Replay::of(&store, options).unwrap().into_sink(&system).unwrap();
}

#[test]
fn what_is_appended_meanwhile_is_not_replayed() {
    let (store, _folder) = log_of(5);
    let mut replay = replay(&store);
    store.append(&[event(5)]).unwrap();
    assert_eq!(numbers(&mut replay), [0, 1, 2, 3, 4]);
    assert_eq!(replay.sequences(), 0..5);
}
