//! The event system: its lanes, who gets a critical event, and what those who do not are told.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use futures_util::StreamExt;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;
use support::{FOREVER, assert_row_closes, assert_sums_close};
use tickbus::{
    CriticalOverflow, Event, EventSystem, EventSystemConfig, EventType, Lane, LaneLagged, OnLag,
    Pattern, Priority, SourceId, SubscribeError, Symbol, SystemBatchError, SystemError,
    SystemStream, SystemSubscribeOptions, SystemSubscription, TakeError, wake_last,
};

const PRICE: EventType = EventType::PriceUpdate;
const STOP: EventType = EventType::EmergencyStop;

fn system(capacity: usize, patience: Duration) -> EventSystem {
    EventSystem::new(EventSystemConfig {
        critical_capacity: capacity,
        high_capacity: capacity,
        normal_capacity: capacity,
        max_block_duration: patience,
        ..Default::default()
    })
    .unwrap()
}

fn event(event_type: EventType, priority: Priority, metadata: u64) -> Event {
    let (source_id, symbol) = (SourceId::NONE, Symbol::NONE);
    Event { timestamp: 0, event_type, priority, source_id, symbol, value: 0.0, metadata }
}

fn normal(number: u64) -> Event {
    event(PRICE, Priority::Normal, number)
}

fn high(number: u64) -> Event {
    event(PRICE, Priority::High, number)
}

fn stop(number: u64) -> Event {
    event(STOP, Priority::Normal, number)
}

fn of(event_type: EventType, symbol: &str) -> Event {
    Event { symbol: Symbol::new(symbol).unwrap(), ..event(event_type, Priority::Normal, 0) }
}

fn subscribe(system: &EventSystem) -> SystemSubscription {
    system.subscribe(SystemSubscribeOptions::default()).unwrap()
}

#[track_caller]
fn overflow(result: Result<usize, SystemError>) -> CriticalOverflow {
    match result {
        Err(SystemError::Overflow(overflow)) => overflow,
        other => panic!("no overflow: {other:?}"),
    }
}

fn lagged(lane: Lane, missed: u64) -> Result<Event, TakeError> {
    Err(TakeError::Lagged(LaneLagged { lane, missed }))
}

/// Returns the numbers of what is pending; nothing may be missing.
fn read_all(subscription: &SystemSubscription) -> Vec<u64> {
    std::iter::from_fn(|| match subscription.try_recv() {
        Ok(event) => Some(event.metadata),
        Err(TakeError::Empty | TakeError::Closed) => None,
        Err(error) => panic!("{error}"),
    })
    .collect()
}

#[track_caller]
fn assert_books_close(system: &EventSystem) {
    let metrics = system.metrics();
    Lane::ALL.iter().for_each(|&lane| assert_sums_close(metrics.lane(lane)));
    let published = Lane::ALL.map(|lane| metrics.lane(lane).total_published);
    assert_eq!(published.iter().sum::<u64>(), system.total_events());
}

#[test]
fn what_is_critical_is_read_first_then_what_is_high_and_each_lane_keeps_its_order() {
    let system = system(16, FOREVER);
    let reader = subscribe(&system);
    let critical = event(PRICE, Priority::Critical, 8);
    for event in [normal(0), high(1), stop(2), normal(3), critical, high(5), stop(6), normal(7)] {
        assert_eq!(system.publish(event).unwrap(), 1);
    }
    assert_eq!(reader.pending(), 8);
    assert_eq!(read_all(&reader), [2, 8, 6, 1, 5, 0, 3, 7]);
    assert_eq!((system.total_events(), system.pending()), (8, 0));
    assert_books_close(&system);
}

#[test]
fn a_critical_event_overtakes_in_the_middle_of_reading() {
    let system = system(16, FOREVER);
    let reader = subscribe(&system);
    system.publish_batch(&[normal(0), normal(1)]).unwrap();
    assert_eq!(reader.recv().unwrap().metadata, 0);
    system.publish(stop(2)).unwrap();
    system.publish(high(3)).unwrap();
    assert_eq!(read_all(&reader), [2, 3, 1]);
}

#[test]
fn an_event_is_wanted_if_it_meets_every_list_by_any_item() {
    let system = system(16, FOREVER);
    let options = |types: &[EventType], topics: &[&str], symbols: &[&str]| SystemSubscribeOptions {
        types: types.to_vec(),
        topics: topics.iter().map(|text| Pattern::new(text).unwrap()).collect(),
        symbols: symbols.iter().map(|name| Symbol::new(name).unwrap()).collect(),
        ..Default::default()
    };
    let (fill, spike) = (EventType::OrderFilled, EventType::VolumeSpike);
    // Half of them join before the topics are known.
    let early = [
        options(&[], &[], &[]),
        options(&[PRICE, spike], &[], &[]),
        options(&[], &[], &["BTC", "BRK.B"]),
    ];
    let late = [
        options(&[], &["price_update.*", "order_filled.>"], &[]),
        options(&[PRICE, fill], &[], &["BRK.B"]),
        options(&[PRICE], &["*.BTC"], &["BTC", "ETH"]),
    ];
    let join = |options: SystemSubscribeOptions| system.subscribe(options).unwrap();
    let mut readers: Vec<_> = early.map(join).into();
    let events = [
        of(PRICE, "BTC"),
        of(PRICE, "BRK.B"),
        of(fill, "BRK.B"),
        of(spike, "ETH"),
        normal(0),
        Event { priority: Priority::Critical, ..of(PRICE, "BTC") },
        Event { priority: Priority::High, ..of(fill, "BTC") },
    ];
    let wanted: [&[usize]; 6] = [
        &[0, 1, 2, 3, 4, 5, 6],
        &[0, 1, 3, 4, 5],
        &[0, 1, 2, 5, 6],
        &[0, 2, 5, 6],
        &[1, 2],
        &[0, 5],
    ];
    for (place, event) in events.iter().enumerate() {
        let taken = wanted[..3].iter().filter(|wanted| wanted.contains(&place)).count();
        assert_eq!(system.publish(*event).unwrap(), taken, "event {place}");
    }
    readers.iter().for_each(|reader| _ = reader.try_recv_each(16, |_| ()));
    readers.extend(late.map(join));
    for (place, event) in events.iter().enumerate() {
        let event = Event { metadata: place as u64, ..*event };
        let taken = wanted.iter().filter(|wanted| wanted.contains(&place)).count();
        assert_eq!(system.publish(event).unwrap(), taken, "event {place}");
    }
    for (reader, wanted) in readers.iter().zip(wanted) {
        let mut got = read_all(reader);
        got.sort_unstable();
        assert!(got.iter().map(|&place| place as usize).eq(wanted.iter().copied()), "{got:?}");
    }
    assert_books_close(&system);
}

#[test]
fn an_event_without_names_reaches_only_those_who_want_everything_until_it_is_named() {
    let system = system(16, FOREVER);
    let all = subscribe(&system);
    let unnamed = event(EventType(50), Priority::Normal, 0);
    let of_type = SystemSubscribeOptions { types: vec![EventType(50)], ..Default::default() };
    assert!(matches!(system.subscribe(of_type.clone()), Err(SubscribeError::Config(_))));
    let unknown = SystemSubscribeOptions { symbols: vec![Symbol(1 << 30)], ..Default::default() };
    assert!(matches!(system.subscribe(unknown), Err(SubscribeError::Config(_))));
    let any_type = ["*", ">"].map(|text| Pattern::new(text).unwrap());
    let any = SystemSubscribeOptions { topics: any_type.into(), ..Default::default() };
    let any = system.subscribe(any).unwrap();
    assert_eq!(system.publish(unnamed).unwrap(), 1);
    EventType::register("position_rolled", 50).unwrap();
    let named = system.subscribe(of_type).unwrap();
    assert_eq!(system.publish(unnamed).unwrap(), 3);
    assert_eq!([all.pending(), any.pending(), named.pending()], [2, 1, 1]);
    assert_eq!(named.pattern().unwrap().to_string(), "position_rolled|position_rolled.>");
}

#[test]
fn with_one_of_three_readers_stuck_the_others_have_a_critical_event_and_a_retry_doubles_nothing() {
    let system = system(2, Duration::ZERO);
    let readers = [subscribe(&system), subscribe(&system), subscribe(&system)];
    for number in 0..2 {
        assert_eq!(system.publish(stop(number)).unwrap(), 3);
    }
    for reader in &readers[..2] {
        assert_eq!(read_all(reader), [0, 1]);
    }
    let overflowed = overflow(system.publish(stop(2)));
    assert_eq!((overflowed.taken(), overflowed.missing()), (2, &[readers[2].id()][..]));
    assert_eq!(overflowed.event(), stop(2));
    for reader in &readers[..2] {
        assert_eq!(read_all(reader), [2], "who has room has it at once");
    }
    let overflowed = overflowed.retry().unwrap_err();
    assert_eq!((overflowed.taken(), overflowed.missing()), (2, &[readers[2].id()][..]));
    // Another critical event comes between: the hole stays where it is.
    let [healthy @ .., stuck] = &readers;
    assert_eq!(stuck.recv().unwrap(), stop(0));
    assert_eq!(system.publish(stop(3)).unwrap(), 3);
    assert_eq!(stuck.recv().unwrap(), stop(1));
    assert_eq!(stuck.recv(), lagged(Lane::Critical, 1));
    assert_eq!(overflowed.retry().unwrap(), 1);
    assert_eq!(read_all(stuck), [3, 2], "it comes once");
    for reader in healthy {
        assert_eq!(read_all(reader), [3], "a retry reaches nobody else");
    }
    assert_eq!(system.total_events(), 4, "a retry publishes no new event");
    let rows = readers.each_ref().map(|reader| reader.metrics(Lane::Critical));
    assert_eq!(rows.each_ref().map(|row| row.delivered), [4, 4, 4]);
    assert_eq!(rows.each_ref().map(|row| row.dropped.block_expired), [0, 0, 1]);
    assert_books_close(&system);
}

#[test]
fn a_stuck_reader_does_not_hold_up_the_others_while_the_publisher_waits_for_it() {
    let system = system(1, FOREVER);
    let [stuck, quick, other] = [subscribe(&system), subscribe(&system), subscribe(&system)];
    system.publish(stop(0)).unwrap();
    assert_eq!(quick.recv().unwrap(), stop(0));
    thread::scope(|scope| {
        let publishing = scope.spawn(|| system.publish(stop(1)).unwrap());
        // The publisher waits for two: each gets the event as soon as it has room itself.
        assert_eq!(quick.recv().unwrap(), stop(1));
        assert_eq!(other.recv().unwrap(), stop(0));
        assert_eq!(other.recv().unwrap(), stop(1));
        assert!(!publishing.is_finished());
        assert_eq!(stuck.recv().unwrap(), stop(0));
        assert_eq!(publishing.join().unwrap(), 3);
    });
    assert_eq!(read_all(&stuck), [1]);
    assert_books_close(&system);
}

#[test]
fn patience_that_was_spent_on_a_reader_is_not_spent_again_before_it_reads() {
    let system = system(1, Duration::from_millis(1));
    let dead = subscribe(&system);
    system.publish(stop(0)).unwrap();
    overflow(system.publish(stop(1)));
    // A wait would never end.
    assert_eq!(overflow(system.publish_timeout(stop(2), FOREVER)).missing(), [dead.id()]);
    assert_eq!(dead.recv().unwrap(), stop(0));
    assert_eq!(dead.recv(), lagged(Lane::Critical, 2));
    thread::scope(|scope| {
        assert_eq!(system.publish(stop(3)).unwrap(), 1);
        let publishing = scope.spawn(|| system.publish_timeout(stop(4), FOREVER).unwrap());
        assert_eq!([dead.recv().unwrap(), dead.recv().unwrap()], [stop(3), stop(4)]);
        assert_eq!(publishing.join().unwrap(), 1);
    });
    assert_books_close(&system);
}

#[test]
fn a_retry_with_a_timeout_waits_again_and_counts_no_event_twice() {
    let system = system(1, Duration::ZERO);
    let reader = subscribe(&system);
    system.publish(stop(0)).unwrap();
    let overflowed = overflow(system.publish(stop(1)));
    let overflowed = overflowed.retry_timeout(Duration::from_millis(1)).unwrap_err();
    let row = reader.metrics(Lane::Critical);
    assert_eq!((row.offered, row.dropped.block_expired), (2, 1));
    thread::scope(|scope| {
        let retrying = scope.spawn(|| overflowed.retry_timeout(FOREVER).unwrap());
        assert_eq!(reader.recv().unwrap(), stop(0));
        assert_eq!(retrying.join().unwrap(), 1);
    });
    assert_eq!(reader.recv(), lagged(Lane::Critical, 1));
    assert_eq!(read_all(&reader), [1]);
    assert_books_close(&system);
}

#[test]
fn a_subscription_that_leaves_misses_nothing_any_more() {
    let system = system(1, Duration::ZERO);
    let [leaving, other] = [subscribe(&system), subscribe(&system)];
    system.publish(stop(0)).unwrap();
    other.recv().unwrap();
    let overflowed = overflow(system.publish(stop(1)));
    assert_eq!(overflowed.missing(), [leaving.id()]);
    leaving.close();
    // Who joins in its place is not taken for it.
    let newcomer = subscribe(&system);
    assert_eq!(overflowed.clone().retry().unwrap(), 0);
    assert_eq!((newcomer.pending(), other.pending()), (0, 1));
    system.close();
    assert_eq!(overflowed.retry().unwrap_err().missing(), [leaving.id()]);
    assert_books_close(&system);
}

#[test]
fn a_cancelled_publication_is_nobodys_or_is_told_to_those_who_miss_it() {
    let system = system(1, FOREVER);
    let full = subscribe(&system);
    system.publish(stop(0)).unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let mut cancel = |number| {
        let mut publishing = pin!(system.publish_async(stop(number)));
        assert!(publishing.as_mut().poll(&mut context).is_pending());
    };
    cancel(1);
    assert_eq!(full.recv().unwrap(), stop(0));
    assert_eq!(full.try_recv(), Err(TakeError::Empty), "nobody has it: there is no hole");
    assert_eq!(system.total_events(), 1);

    system.publish(stop(2)).unwrap();
    let free = subscribe(&system);
    cancel(3);
    assert_eq!(read_all(&free), [3]);
    assert_eq!(full.recv().unwrap(), stop(2));
    assert_eq!(full.recv(), lagged(Lane::Critical, 1));
    assert_eq!(system.total_events(), 3);
    assert_books_close(&system);
}

#[test]
fn closing_ends_the_wait_and_names_those_who_miss_what_others_have() {
    for has_taker in [false, true] {
        let system = system(1, FOREVER);
        let full = subscribe(&system);
        system.publish(stop(0)).unwrap();
        let taker = has_taker.then(|| subscribe(&system));
        thread::scope(|scope| {
            let publishing = scope.spawn(|| system.publish(stop(1)));
            while full.metrics(Lane::Critical).waiting_publishers == 0 {
                thread::yield_now();
            }
            system.close();
            match publishing.join().unwrap() {
                Err(SystemError::Closed(event)) if !has_taker => assert_eq!(event, stop(1)),
                result => assert_eq!(overflow(result).missing(), [full.id()]),
            }
        });
        assert_eq!(full.recv().unwrap(), stop(0));
        if let Some(taker) = taker {
            assert_eq!(read_all(&taker), [1]);
            assert_eq!(full.recv(), lagged(Lane::Critical, 1));
        }
        assert_eq!(full.recv(), Err(TakeError::Closed));
        assert!(matches!(system.publish(stop(2)), Err(SystemError::Closed(_))));
        assert!(matches!(system.publish(normal(2)), Err(SystemError::Closed(_))));
        assert_books_close(&system);
    }
}

#[test]
fn a_lane_that_overwrites_says_how_many_and_the_other_lanes_lose_nothing() {
    let system = system(8, Duration::ZERO);
    let reader = subscribe(&system);
    let events: Vec<_> = (0..20).map(high).collect();
    assert_eq!(system.publish_batch(&events).unwrap(), 20);
    system.publish_batch(&[normal(20), stop(21)]).unwrap();
    assert_eq!(reader.recv().unwrap(), stop(21));
    let Err(TakeError::Lagged(LaneLagged { lane: Lane::High, missed })) = reader.recv() else {
        panic!("nothing was missed")
    };
    let expected: Vec<_> = (missed..21).collect();
    assert!((12..=14).contains(&missed), "at most a quarter more than need be: {missed}");
    assert_eq!(read_all(&reader), expected);
    assert_eq!(reader.metrics(Lane::High).dropped.overwritten, missed);
    assert_books_close(&system);
}

#[test]
fn a_reader_that_only_counts_is_told_of_no_hole() {
    let system = system(4, Duration::ZERO);
    let options = SystemSubscribeOptions { on_lag: OnLag::Count, ..Default::default() };
    let reader = system.subscribe(options).unwrap();
    (0..9).for_each(|number| _ = system.publish(high(number)).unwrap());
    (0..5).for_each(|number| _ = system.publish(stop(number)));
    let got = read_all(&reader);
    assert_eq!(got[..4], [0, 1, 2, 3]);
    assert_eq!(got.last(), Some(&8));
    for lane in Lane::ALL {
        assert_row_closes(&reader.metrics(lane));
    }
}

#[test]
fn a_batch_is_in_the_order_of_reading_and_ends_before_a_hole() {
    let system = system(4, Duration::ZERO);
    let reader = subscribe(&system);
    let numbers = |limit| {
        let mut batch = Vec::new();
        reader.try_recv_each(limit, |event| batch.push(event.metadata)).map(|_| batch)
    };
    assert_eq!(numbers(9), Err(TakeError::Empty));
    system.publish_batch(&[normal(0), high(1), normal(2), stop(3), high(4)]).unwrap();
    assert_eq!(numbers(0), Ok(vec![]));
    assert_eq!(numbers(3), Ok(vec![3, 1, 4]));
    assert_eq!(numbers(9), Ok(vec![0, 2]));
    (5..9).for_each(|number| _ = system.publish(stop(number)).unwrap());
    overflow(system.publish(stop(9)));
    assert_eq!(numbers(3), Ok(vec![5, 6, 7]));
    system.publish_batch(&[stop(10), normal(11)]).unwrap();
    assert_eq!(numbers(9), Ok(vec![8]), "what is behind the hole goes before other lanes");
    assert_eq!(numbers(9), lagged(Lane::Critical, 1).map(|_| vec![]));
    assert_eq!(numbers(9), Ok(vec![10, 11]));
    (5..9).for_each(|number| _ = system.publish(stop(number)).unwrap());
    overflow(system.publish(stop(9)));
    system.publish(normal(11)).unwrap();
    assert_eq!(numbers(9), Ok(vec![5, 6, 7, 8]), "so does a hole with nothing behind it");
    assert_eq!(numbers(9), lagged(Lane::Critical, 1).map(|_| vec![]));
    assert_eq!(numbers(9), Ok(vec![11]));
    system.publish_batch(&[stop(12), normal(13)]).unwrap();
    system.close();
    assert_eq!(numbers(9), Ok(vec![12, 13]));
    assert_eq!(numbers(9), Err(TakeError::Closed));
    assert_books_close(&system);
}

#[test]
fn one_wait_serves_every_lane() {
    let system = system(16, FOREVER);
    let reader = subscribe(&system);
    let rounds = 300;
    let (there, back) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok(event) = reader.recv() {
                there.send(event.metadata).unwrap();
            }
        });
        for number in 0..rounds {
            let make = [normal, high, stop][number as usize % 3];
            system.publish(make(number)).unwrap();
            assert_eq!(back.recv().unwrap(), number);
        }
        system.close();
    });
    assert_eq!(reader.recv_timeout(FOREVER), Err(TakeError::Closed));
}

#[tokio::test]
async fn tasks_wait_for_every_lane_and_a_cancelled_recv_loses_nothing() {
    let system = system(16, FOREVER);
    let reader = subscribe(&system);
    let mut context = Context::from_waker(Waker::noop());
    for (number, make) in [normal, high, stop].into_iter().enumerate() {
        let number = number as u64;
        {
            let mut receiving = pin!(reader.recv_async());
            assert!(receiving.as_mut().poll(&mut context).is_pending());
            system.publish_async(make(number)).await.unwrap();
        }
        assert_eq!(reader.recv_async().await.unwrap(), make(number));
    }
    let (received, published) = tokio::join!(reader.recv_many_async(9), async {
        system.publish_batch(&[normal(0), stop(1)])
    });
    assert_eq!(published.unwrap(), 2);
    assert_eq!(received.unwrap(), [stop(1), normal(0)]);
}

#[tokio::test]
async fn a_stream_wakes_for_every_lane_tells_each_hole_and_ends_with_the_system() {
    let system = system(4, Duration::ZERO);
    let reader = Arc::new(subscribe(&system));
    let stream = tokio::spawn(SystemStream::new(reader.clone()).collect::<Vec<_>>());
    for (number, make) in [normal, high, stop].into_iter().cycle().take(12).enumerate() {
        tokio::task::yield_now().await;
        system.publish(make(number as u64)).unwrap();
    }
    tokio::task::yield_now().await;
    assert_eq!(reader.pending(), 0, "it was woken for each");
    assert_eq!(system.publish_batch(&[0, 1, 2, 3].map(stop)).unwrap(), 4);
    overflow(system.publish(stop(4)));
    system.publish(high(5)).unwrap();
    system.close();
    let all = stream.await.unwrap();
    let numbers: Vec<_> = all.into_iter().map(|each| each.map(|event| event.metadata)).collect();
    let hole = LaneLagged { lane: Lane::Critical, missed: 1 };
    let tail = [Ok(0), Ok(1), Ok(2), Ok(3), Err(hole), Ok(5)];
    assert_eq!(numbers, (0..12).map(Ok).chain(tail).collect::<Vec<_>>());
}

#[test]
fn a_stream_that_is_dropped_asleep_passes_its_wake_up_on_and_sleeps_no_more() {
    let system = system(4, FOREVER);
    let reader = subscribe(&system);
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let context = &mut Context::from_waker(Waker::noop());
    for (round, make) in [normal, high, stop].into_iter().enumerate() {
        let [mut asleep, mut next] = [SystemStream::new(&reader), SystemStream::new(&reader)];
        assert!(asleep.poll_next_unpin(context).is_pending());
        assert!(next.poll_next_unpin(&mut Context::from_waker(&waker)).is_pending());
        system.publish(make(1)).unwrap();
        assert_eq!(woken.count(), round, "one event wakes one");
        drop(asleep);
        assert_eq!(woken.count(), round + 1);
        assert_eq!(next.poll_next_unpin(context), Poll::Ready(Some(Ok(make(1)))));
        assert!(next.poll_next_unpin(context).is_pending());
    }
    // It is woken only while somebody is said to sleep.
    assert_eq!(reader.set_waker(waker), Ok(true));
    for make in [normal, high, stop] {
        system.publish(make(2)).unwrap();
    }
    assert_eq!(woken.count(), 3);
}

/// Counts how often it was woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Woken {
    fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_timeout_that_passes_takes_nothing() {
    let system = system(4, FOREVER);
    let reader = subscribe(&system);
    assert_eq!(reader.recv_timeout(Duration::from_millis(1)), Err(TakeError::Empty));
    system.publish(high(1)).unwrap();
    assert_eq!(reader.recv_timeout(Duration::ZERO).unwrap(), high(1));
    assert_eq!(reader.recv_many(0).unwrap(), []);
}

#[test]
fn a_handler_gets_the_overflow_instead_of_the_publisher() {
    let system = system(1, Duration::ZERO);
    let [full, free] = [subscribe(&system), subscribe(&system)];
    system.publish(stop(0)).unwrap();
    free.recv().unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    system.handle_critical_overflow(move |overflow| {
        counter.fetch_add(overflow.missing().len(), Ordering::Relaxed);
        Ok(0)
    });
    assert_eq!(system.publish(stop(1)).unwrap(), 1);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    free.recv().unwrap();
    system.handle_critical_overflow(CriticalOverflow::retry);
    let error = system.publish_batch(&[normal(2), stop(3), normal(4)]).unwrap_err();
    let SystemBatchError { accepted: 1, error: SystemError::Overflow(left) } = error else {
        panic!("{error:?}")
    };
    assert_eq!((left.missing(), left.taken()), (&[full.id()][..], 1));
    assert_books_close(&system);
}

#[test]
fn draining_ends_publishing_and_waits_for_the_readers() {
    let system = system(16, FOREVER);
    let readers = [subscribe(&system), subscribe(&system)];
    system.publish_batch(&[normal(0), high(1), stop(2)]).unwrap();
    assert_eq!(system.drain(Some(Duration::from_millis(1))), 6);
    assert!(matches!(system.publish(normal(3)), Err(SystemError::Closed(_))));
    thread::scope(|scope| {
        let draining = scope.spawn(|| system.drain(None));
        assert_eq!(readers[0].recv_many(9).unwrap().len(), 3);
        assert_eq!(readers[1].recv().unwrap(), stop(2));
        assert!(!draining.is_finished());
        // Who leaves reads no more.
        readers[1].close();
        assert_eq!(draining.join().unwrap(), 0);
    });
    assert_eq!(readers[1].metrics(Lane::Normal).dropped.closed, 1);
}

#[test]
fn subscriptions_have_one_id_and_one_name_in_all_lanes() {
    let system = system(4, FOREVER);
    let named = || SystemSubscribeOptions { name: Some("risk".into()), ..Default::default() };
    let risk = system.subscribe(named()).unwrap();
    assert!(matches!(system.subscribe(named()), Err(SubscribeError::Config(_))));
    let other = subscribe(&system);
    let metrics = system.metrics();
    for lane in Lane::ALL {
        let ids: Vec<_> = metrics.lane(lane).subscriptions.iter().map(|row| row.id).collect();
        assert_eq!(ids, [risk.id(), other.id()]);
        assert_eq!(metrics.lane(lane).subscriptions[0].name.as_deref(), Some("risk"));
    }
    system.close();
    assert!(matches!(
        system.subscribe(SystemSubscribeOptions::default()),
        Err(SubscribeError::Closed)
    ));
}

#[test]
fn the_last_handle_closes_the_system() {
    let system = system(4, FOREVER);
    let reader = subscribe(&system);
    let (clone, weak) = (system.clone(), system.downgrade());
    drop(system);
    clone.publish(normal(1)).unwrap();
    assert!(weak.upgrade().is_some_and(|system| !system.is_closed()));
    drop(clone);
    assert!(!weak.is_alive() && reader.is_closed());
    assert_eq!(read_all(&reader), [1]);
    assert_eq!(reader.recv(), Err(TakeError::Closed));
}

#[test]
fn pairs_of_type_and_symbol_are_bounded_and_a_capacity_is_at_least_one() {
    let config = EventSystemConfig { max_topics: 1, ..Default::default() };
    let system = EventSystem::new(config.clone()).unwrap();
    system.publish(of(PRICE, "BTC")).unwrap();
    let refused = of(PRICE, "ETH");
    match system.publish(refused) {
        Err(SystemError::TooManyTopics { event, error }) => {
            assert_eq!(event, refused);
            assert!(error.to_string().contains("max_topics=1"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    system.publish(of(PRICE, "BTC")).unwrap();
    let error = EventSystem::new(EventSystemConfig { high_capacity: 0, ..config }).unwrap_err();
    assert_eq!(error.to_string(), "high_capacity was 0; it must be at least 1");
}

/// Publishers of all lanes and readers that compete, come and go: the books close, nothing critical
/// is lost, and each publisher's events come in its order in each lane.
#[test]
fn nothing_critical_is_lost_between_threads_and_every_lane_keeps_order() {
    const PUBLISHERS: u64 = 3;
    const EVENTS: u64 = 4_000;
    let system = system(16, FOREVER);
    let barrier = Barrier::new(PUBLISHERS as usize);
    let make = |publisher: u64, number: u64| {
        let make = [stop, high, normal][(number % 3) as usize];
        make(publisher << 32 | number)
    };
    let check = |reader: &SystemSubscription, alone: bool| {
        let mut last = [[None; PUBLISHERS as usize]; 3];
        let mut critical = 0;
        loop {
            match reader.recv() {
                Ok(event) => {
                    let (publisher, number) = (event.metadata >> 32, event.metadata as u32);
                    assert_eq!(event, make(publisher, number.into()));
                    let last = &mut last[event.lane() as usize][publisher as usize];
                    assert!(last.replace(number) < Some(number), "out of order");
                    critical += u64::from(event.lane() == Lane::Critical);
                }
                Err(TakeError::Lagged(LaneLagged { lane, .. })) => {
                    assert_ne!(lane, Lane::Critical);
                }
                Err(_) => break,
            }
        }
        if alone {
            assert_eq!(critical, PUBLISHERS * EVENTS.div_ceil(3));
        }
        critical
    };
    let lonely = subscribe(&system);
    let shared = subscribe(&system);
    thread::scope(|scope| {
        scope.spawn(|| check(&lonely, true));
        let competing =
            [scope.spawn(|| check(&shared, false)), scope.spawn(|| check(&shared, false))];
        let publishing: Vec<_> = (0..PUBLISHERS)
            .map(|publisher| {
                let (system, barrier) = (&system, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    for number in 0..EVENTS {
                        system.publish(make(publisher, number)).unwrap();
                        if number % 500 == 0 {
                            drop(subscribe(system));
                        }
                    }
                })
            })
            .collect();
        publishing.into_iter().for_each(|thread| thread.join().unwrap());
        system.close();
        let critical: u64 = competing.map(|thread| thread.join().unwrap()).iter().sum();
        assert_eq!(critical, PUBLISHERS * EVENTS.div_ceil(3), "each goes to one of them");
    });
    assert_eq!(system.total_events(), PUBLISHERS * EVENTS);
    assert_books_close(&system);
}

/// What 16 readers sleep on, and counts in how many of them it was woken when it was.
#[derive(Default)]
struct EventLoop {
    readers_woken: AtomicUsize,
    wakes: Mutex<Vec<usize>>,
}

impl Wake for EventLoop {
    fn wake(self: Arc<Self>) {
        self.wakes.lock().unwrap().push(self.readers_woken.load(Ordering::Relaxed));
    }
}

struct OfReader(Arc<EventLoop>);

impl Wake for OfReader {
    fn wake(self: Arc<Self>) {
        self.0.readers_woken.fetch_add(1, Ordering::Relaxed);
        wake_last(Waker::from(self.0.clone()));
    }
}

#[test]
fn who_stands_for_several_sleepers_is_woken_once_after_all_of_them() {
    let system = system(16, FOREVER);
    let readers: Vec<_> = (0..16).map(|_| subscribe(&system)).collect();
    let event_loop = Arc::new(EventLoop::default());
    for reader in &readers {
        let waker = Waker::from(Arc::new(OfReader(event_loop.clone())));
        assert_eq!(reader.set_waker(waker), Ok(true));
    }
    for make in [normal, high, stop] {
        readers.iter().for_each(SystemSubscription::arm);
        system.publish(make(0)).unwrap();
        readers.iter().for_each(SystemSubscription::disarm);
    }
    assert_eq!(*event_loop.wakes.lock().unwrap(), [16, 32, 48]);
    // Alone it wakes at once.
    wake_last(Waker::from(event_loop.clone()));
    assert_eq!(event_loop.wakes.lock().unwrap().len(), 4);
}
