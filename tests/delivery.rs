//! Groups and risk events over a log in a real folder: what was committed or acknowledged is not
//! delivered again, all else is, and the log keeps it until then.
#![cfg(all(feature = "store", unix))]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tickbus::{
    DeliveryClock, DeliveryError, Durability, Event, EventStore, Group, GroupBatch, GroupConfig,
    GroupStart, Notice, Object, Payload, Records, RiskConfig, RiskEventSystem, StoreConfig,
    StoreError, Token,
};

fn folder() -> TempDir {
    tempfile::tempdir().expect("there is a folder for temporary files")
}

fn open(folder: &Path) -> Arc<EventStore> {
    let mut config = StoreConfig::default();
    config.segment_bytes = 64 << 10;
    Arc::new(EventStore::open(folder, config).expect("it opens").0)
}

fn events(count: u64) -> Vec<Event> {
    (0..count).map(|n| Event { timestamp: n, ..Event::from_bytes([0; 32]) }).collect()
}

fn append(store: &EventStore, count: u64) {
    store.append(&events(count)).expect("it has room");
    store.sync().expect("the disk is whole");
}

fn config(lease: Duration) -> GroupConfig {
    let mut config = GroupConfig::default();
    config.lease = lease;
    config
}

const LONG: Duration = Duration::from_secs(600);

/// A deadline that a test never reaches.
fn far() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

fn fetch(group: &Group, limit: u64) -> GroupBatch {
    group.fetch(limit, far()).expect("the group is there").expect("there are records")
}

fn timestamps(batch: &mut GroupBatch) -> Vec<u64> {
    let mut all = Vec::new();
    while let Some(records) = batch.next_batch().expect("they are what was written") {
        let Records::Events(events) = records.records else { panic!("{records:?}") };
        all.extend(events.iter().map(|event| event.timestamp));
    }
    all
}

#[test]
fn a_group_goes_on_where_it_had_committed_when_the_log_is_opened_again() {
    let folder = folder();
    let store = open(folder.path());
    append(&store, 100);
    let group = store.group("readers", config(LONG)).expect("it is registered");
    let mut first = fetch(&group, 30);
    assert_eq!(timestamps(&mut first), (0..30).collect::<Vec<_>>());
    first.commit().expect("it is durable");
    let (lost, third) = (fetch(&group, 20), fetch(&group, 20));
    assert_eq!((lost.sequences(), third.sequences()), (30..50, 50..70));
    third.commit().expect("it is durable");
    assert_eq!(group.stats().map(|s| (s.cursor, s.lag, s.in_flight)).ok(), Some((30, 50, 20)));
    store.close().expect("all is durable");

    let store = open(folder.path());
    assert_eq!(store.stats().held_from, Some(30), "before anybody asks for the group");
    let group = store.group("readers", config(LONG)).expect("it is known");
    let mut again = fetch(&group, 100);
    assert_eq!(timestamps(&mut again), (30..50).collect::<Vec<_>>());
    let mut rest = fetch(&group, 100);
    assert_eq!(timestamps(&mut rest), (70..100).collect::<Vec<_>>());
    for batch in [rest, again] {
        batch.commit().expect("it is durable");
    }
    assert_eq!(store.stats().held_from, Some(100));
    assert!(store.remove_group("readers").expect("it is durable"));
    assert_eq!(store.stats().held_from, None);
    assert!(matches!(group.try_fetch(1), Err(DeliveryError::Removed { .. })));
}

#[test]
fn a_consumer_that_waits_is_woken_by_what_becomes_durable_and_by_the_end_of_the_log() {
    let folder = folder();
    let mut config = StoreConfig::default();
    config.durability = Durability::None;
    let (store, _) = EventStore::open(folder.path(), config).expect("it opens");
    let mut newest = GroupConfig::default();
    newest.start = GroupStart::Newest;
    let group = store.group("readers", newest).expect("it is registered");
    store.append(&events(3)).expect("it has room");
    assert!(group.try_fetch(10).expect("the group is there").is_none(), "it is not durable");
    let (tell, told) = mpsc::channel();
    let waiting = thread::spawn(move || {
        while let Some(batch) = match group.fetch(10, None) {
            Err(DeliveryError::Store(StoreError::Closed)) => None,
            fetched => fetched.expect("the group is there"),
        } {
            tell.send(batch.sequences()).expect("somebody listens");
        }
    });
    store.sync().expect("the disk is whole");
    assert_eq!(told.recv(), Ok(0..3));
    append(&store, 2);
    assert_eq!(told.recv(), Ok(3..5));
    store.close().expect("all is durable");
    waiting.join().expect("it ends");
}

#[test]
fn what_a_consumer_keeps_for_too_long_wakes_another_one_and_its_late_commit_is_refused() {
    let folder = folder();
    let store = open(folder.path());
    append(&store, 10);
    let group = store.group("readers", config(Duration::from_millis(1))).expect("it is registered");
    let slow = fetch(&group, 10);
    let again = fetch(&group, 10);
    assert_eq!((again.sequences(), again.attempt()), (0..10, 2));
    assert!(matches!(slow.commit(), Err(DeliveryError::Stale { attempt: 1, .. })));
    assert_eq!(group.stats().map(|stats| stats.redelivered).ok(), Some(10));
}

#[test]
fn a_task_that_is_cancelled_while_it_waits_takes_nothing() {
    let folder = folder();
    let store = open(folder.path());
    let group = store.group("readers", config(LONG)).expect("it is registered");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("it runs");
    runtime.block_on(async {
        let mut waiting = Box::pin(group.fetch_async(10));
        let polled =
            std::future::poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context))).await;
        assert!(polled.is_pending());
        drop(waiting);
        append(&store, 4);
        let batch = group.fetch_async(10).await.expect("the group is there");
        assert_eq!(batch.sequences(), 0..4);
        batch.committing().await.expect("it is durable");
    });
    assert_eq!(group.stats().map(|stats| stats.lag).ok(), Some(0));
}

/// A clock that stands until it is set.
fn clock() -> (Arc<AtomicU64>, DeliveryClock) {
    let now = Arc::new(AtomicU64::new(0));
    let read = now.clone();
    (now, DeliveryClock::new(move || read.load(Ordering::SeqCst)))
}

fn seconds(seconds: u64) -> u64 {
    seconds * 1_000_000_000
}

fn risk(store: &Arc<EventStore>) -> (RiskEventSystem, Arc<AtomicU64>) {
    let (now, clock) = clock();
    let mut config = RiskConfig::default();
    (config.clock, config.seed, config.max_attempts) = (Some(clock), Some(1), 3);
    (RiskEventSystem::new(store, config).expect("there is no other"), now)
}

fn event(n: u64) -> Payload {
    Payload::Event(events(n + 1)[n as usize])
}

fn take(consumer: &tickbus::RiskConsumer) -> Option<(u64, u32)> {
    let delivery = consumer.try_take().expect("the attempt is counted")?;
    Some((delivery.token.id, delivery.token.attempt))
}

#[test]
fn an_event_goes_to_each_consumer_until_it_acknowledges_it_also_after_a_restart() {
    let folder = folder();
    let store = open(folder.path());
    let (system, _) = risk(&store);
    let limits = system.register("limits", true).expect("it is registered");
    let audit = system.register("audit", true).expect("it is registered");
    let first = system.publish_critical(event(1), Some("7")).expect("it is durable");
    let second = system.publish_critical(event(2), Some("7")).expect("it is durable");
    let other = system.publish_critical(event(3), Some("8")).expect("it is durable");
    assert_eq!(take(&limits), Some((first, 1)));
    assert_eq!(take(&limits), Some((other, 1)), "the second waits for the first");
    assert_eq!(take(&limits), None);
    limits.ack(Token { id: first, attempt: 1 }).expect("it is durable");
    assert_eq!(take(&limits), Some((second, 1)));
    let [one, two] = [first, second].map(|_| audit.try_take().expect("it is there"));
    assert_eq!((one.map(|d| d.event), two.is_some()), (Some(Arc::new(event(1))), true));
    drop((system, limits, audit));
    store.close().expect("all is durable");

    let store = open(folder.path());
    assert_eq!(store.stats().held_from, Some(first), "audit has not acknowledged it");
    let (system, now) = risk(&store);
    let limits = system.register("limits", true).expect("it is known");
    let stale = limits.ack(Token { id: first, attempt: 1 });
    assert!(matches!(stale, Err(DeliveryError::Stale { .. })), "{stale:?}");
    now.store(seconds(60), Ordering::SeqCst);
    let mut again = [take(&limits), take(&limits), take(&limits)];
    again.sort_unstable();
    assert_eq!(again, [None, Some((second, 2)), Some((other, 2))], "attempts are remembered");
    for id in [second, other] {
        limits.ack(Token { id, attempt: 2 }).expect("it is durable");
    }
    let audit = system.register("audit", true).expect("it is known");
    while let Some(delivery) = audit.try_take().expect("the attempt is counted") {
        audit.ack(delivery.token).expect("it is durable");
    }
    for id in [first, second, other] {
        assert_eq!(system.wait_ack(id, far()).expect("it is known"), Some(true));
    }
    assert_eq!(store.stats().held_from, None);
}

#[test]
fn a_system_that_was_closed_touches_nothing_of_the_one_that_follows_it() {
    let folder = folder();
    let store = open(folder.path());
    let (old, _) = risk(&store);
    let of_old = old.register("limits", true).expect("it is registered");
    old.close();
    let (system, _) = risk(&store);
    let limits = system.register("limits", true).expect("it is known");
    let id = system.publish_critical(event(1), None).expect("it is durable");
    old.close();
    assert!(old.is_closed() && !system.is_closed());
    let is_closed = |error| matches!(error, DeliveryError::Store(StoreError::Closed));
    assert!(of_old.try_take().is_err_and(is_closed), "the event is not for it");
    assert!(old.wait_ack(id, far()).is_err_and(is_closed));
    assert!(matches!(old.next_notice(far()), Err(StoreError::Closed)));
    assert!(matches!(old.register("limits", true), Err(StoreError::Closed)));
    assert!(old.publish_critical(event(2), None).is_err());
    drop((old, of_old));
    assert_eq!(take(&limits), Some((id, 1)), "it is delivered as before");
    limits.ack(Token { id, attempt: 1 }).expect("it is durable");
    assert_eq!(system.wait_ack(id, far()).expect("it is known"), Some(true));
}

#[test]
fn an_event_that_is_refused_to_the_end_is_escalated_then_a_dead_letter_and_can_be_delivered_again()
{
    let folder = folder();
    let store = open(folder.path());
    let (system, now) = risk(&store);
    let limits = system.register("limits", true).expect("it is registered");
    let id = system.publish_critical(event(1), Some("7")).expect("it is durable");
    let next = system.publish_critical(event(2), Some("7")).expect("it is durable");
    for attempt in 1..=3 {
        let delivery = limits.try_take().expect("it is counted").expect("its time has come");
        assert_eq!(delivery.token, Token { id, attempt });
        limits.nack(delivery.token, &format!("reason {attempt}")).expect("it is durable");
        now.fetch_add(seconds(1), Ordering::SeqCst);
    }
    let notices = [system.next_notice(far()), system.next_notice(far())].map(|n| n.expect("told"));
    let consumer: Option<Arc<str>> = Some("limits".into());
    assert_eq!(
        notices,
        [
            Some(Notice::Escalated { id, consumer: consumer.clone(), attempts: 3 }),
            Some(Notice::DeadLettered { id, consumer, reason: "reason 3".into() }),
        ]
    );
    assert_eq!(system.wait_ack(id, far()).expect("it is known"), Some(false));
    let letters = system.dead_letters();
    let reasons: Vec<_> = letters[0].attempts.iter().map(|failed| &*failed.reason).collect();
    assert_eq!(reasons, ["reason 1", "reason 2", "reason 3"]);
    assert_eq!(take(&limits), Some((next, 1)), "the next one of its key need not wait any more");
    drop((system, limits));

    let (system, _) = risk(&store);
    let limits = system.register("limits", true).expect("it is known");
    assert_eq!(system.dead_letters(), letters, "they are durable");
    assert_eq!(*system.event(id).expect("the log keeps it"), event(1));
    system.redeliver(id, Some("limits")).expect("it is a dead letter");
    assert!(matches!(system.discard(id, Some("limits")), Err(DeliveryError::Unknown { .. })));
    assert!(system.unregister("limits").expect("it is durable"));
    assert!(matches!(limits.try_take(), Err(DeliveryError::Removed { .. })));
    assert_eq!(system.dead_letters().len(), 2, "what it had not acknowledged");
    for id in [id, next] {
        system.discard(id, Some("limits")).expect("it is a dead letter");
    }
    assert_eq!(store.stats().held_from, None);
}

#[test]
fn an_event_that_nobody_acknowledges_is_escalated_by_its_age_and_one_without_consumers_at_once() {
    let folder = folder();
    let store = open(folder.path());
    let (system, now) = risk(&store);
    let nobody = system.publish_critical(event(1), None).expect("it is durable");
    let escalated = system.next_notice(far()).expect("it is told");
    assert_eq!(escalated, Some(Notice::Escalated { id: nobody, consumer: None, attempts: 0 }));
    assert!(matches!(system.next_notice(far()), Ok(Some(Notice::DeadLettered { .. }))));
    let limits = system.register("limits", true).expect("it is registered");
    let id = system.publish_critical(event(2), None).expect("it is durable");
    now.store(seconds(5) - 1, Ordering::SeqCst);
    system.check_deadlines();
    assert_eq!(system.stats().escalated, 1);
    now.store(seconds(5), Ordering::SeqCst);
    system.check_deadlines();
    let consumer = Some("limits".into());
    let expected = Some(Notice::Escalated { id, consumer, attempts: 0 });
    assert_eq!(system.next_notice(far()).expect("it is told"), expected);
    assert_eq!(take(&limits), Some((id, 1)), "it is delivered all the same");
    system.redeliver(nobody, None).expect("there is a consumer now");
    assert_eq!(take(&limits), Some((nobody, 1)));
    system.close();
    assert!(matches!(system.next_notice(None), Err(StoreError::Closed)));
    assert!(matches!(limits.take(None), Err(DeliveryError::Store(StoreError::Closed))));
}

#[test]
fn a_handler_that_panics_has_failed_and_gets_the_event_again() {
    let folder = folder();
    let store = open(folder.path());
    let mut config = RiskConfig::default();
    config.retry_base = Duration::from_micros(1);
    config.retry_cap = Duration::from_micros(1);
    let system = RiskEventSystem::new(&store, config).expect("there is no other");
    let handler = |delivery: &tickbus::CriticalDelivery| match delivery.token.attempt {
        1 => panic!("not now"),
        2 => Err("not yet".to_owned()),
        _ => Ok(()),
    };
    system.register_handler("limits", true, handler).expect("it is registered");
    let id = system.publish_critical(event(1), None).expect("it is durable");
    assert_eq!(system.wait_ack(id, far()).expect("it is known"), Some(true));
    let stats = system.stats();
    assert_eq!((stats.failed, stats.acked, stats.consumers[0].pending), (2, 1, 0));
}

#[test]
fn what_a_full_log_refuses_is_delivered_live_and_the_error_says_so() {
    let folder = folder();
    let mut config = StoreConfig::default();
    (config.segment_bytes, config.max_bytes) = (64 << 10, Some(128 << 10));
    let store = Arc::new(EventStore::open(folder.path(), config).expect("it opens").0);
    let (system, _) = risk(&store);
    let limits = system.register("limits", true).expect("it is registered");
    let bytes = vec![0; 8 << 10];
    let object = Object {
        timestamp: 0,
        topic: None,
        schema: "Ballast",
        version: 1,
        bytes: &bytes,
        is_replayed: false,
    };
    while store.append_object(&object).is_ok() {}
    let error = loop {
        match system.publish_critical(event(5), Some("7")) {
            Ok(id) => {
                assert_eq!(take(&limits), Some((id, 1)));
                limits.ack(Token { id, attempt: 1 }).expect("the ledger has room");
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(error.error, StoreError::Full { .. }), "{error}");
    assert_eq!(error.delivered_live, 1);
    let live = limits.try_take().expect("it needs no record").expect("it was delivered");
    assert!(live.is_live() && *live.event == event(5) && live.key.as_deref() == Some("7"));
    limits.ack(live.token).expect("it needs none");
    assert_eq!(take(&limits), None);
}

#[test]
fn a_consumer_with_too_many_events_in_its_hands_is_told_of_once_and_gets_more_later() {
    let folder = folder();
    let store = open(folder.path());
    let mut config = RiskConfig::default();
    config.max_in_flight = 2;
    let system = RiskEventSystem::new(&store, config).expect("there is no other");
    let limits = system.register("limits", true).expect("it is registered");
    let ids: Vec<u64> =
        (0..4).map(|n| system.publish_critical(event(n), None).expect("it is durable")).collect();
    assert_eq!((take(&limits), take(&limits)), (Some((ids[0], 1)), Some((ids[1], 1))));
    assert_eq!((take(&limits), take(&limits)), (None, None));
    let consumer = "limits".into();
    let expected = Some(Notice::TooManyInFlight { consumer, in_flight: 2 });
    assert_eq!(system.next_notice(far()).expect("it is told"), expected);
    assert_eq!(system.stats().limited, 1);
    limits.ack(Token { id: ids[0], attempt: 1 }).expect("it is durable");
    assert_eq!(take(&limits), Some((ids[2], 1)));
    assert_eq!(system.stats().limited, 2, "it had half as many meanwhile");
}

#[test]
fn settings_that_cannot_be_kept_are_refused() {
    let folder = folder();
    let store = open(folder.path());
    let refused = |error: String, part: &str| assert!(error.contains(part), "{error}");
    let group = |change: &dyn Fn(&mut GroupConfig), part: &str| {
        let mut config = GroupConfig::default();
        change(&mut config);
        refused(store.group("readers", config).expect_err("it cannot be").to_string(), part);
    };
    group(&|config| config.lease = Duration::ZERO, "the lease was 0");
    group(&|config| config.max_idle = Some(Duration::ZERO), "max_idle was 0");
    group(&|config| config.max_in_flight = 0, "max_in_flight was 0");
    group(&|config| config.start = GroupStart::At(1), "start was 1; the log ends before 0");
    let name = "n".repeat(256);
    for name in ["", &*name] {
        let error = store.group(name, GroupConfig::default()).expect_err("it is no name");
        refused(error.to_string(), "it must have from 1 to 255");
    }
    let system = |change: &dyn Fn(&mut RiskConfig), part: &str| {
        let mut config = RiskConfig::default();
        change(&mut config);
        refused(RiskEventSystem::new(&store, config).expect_err("it cannot be").to_string(), part);
    };
    system(&|config| config.lease = Duration::ZERO, "the lease was 0");
    system(&|config| config.max_attempts = 0, "max_attempts was 0");
    system(&|config| config.max_attempts = 513, "max_attempts was 513");
    system(&|config| config.retry_cap = Duration::ZERO, "retry_cap was 0");
    system(&|config| config.max_in_flight = 0, "max_in_flight was 0");
    let (one, _) = risk(&store);
    system(&|_| {}, "has a risk system already");
    let key = "k".repeat(1025);
    let error = one.publish_critical(event(0), Some(&key)).expect_err("the key is too long");
    refused(error.to_string(), "the key had 1025 bytes");
    assert_eq!(error.delivered_live, 0);
    assert!(matches!(one.wait_ack(0, None), Err(DeliveryError::Unknown { .. })));
}
