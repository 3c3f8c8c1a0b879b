//! Awaiting: cancelled at any point nothing is lost, a stream hides no hole, and a busy task lets
//! others run.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use futures_util::{FutureExt, Stream, StreamExt};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker};
use support::{FOREVER, Read, assert_sums_close, bus, drain, events, patient_bus, subscribe};
use tickbus::{
    AsyncEventSubscription, Backend, EventBus, EventBusImpl, Lagged, Policy, PublishError,
    RecvError, Shutdown,
};
use tokio::task::yield_now;

/// A small generator (Knuth's MMIX constants), so that a failure repeats.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn awaited(
    bus: &EventBusImpl<u64>,
    capacity: usize,
    policy: Policy,
) -> AsyncEventSubscription<u64> {
    subscribe(bus, capacity, policy).into()
}

#[tokio::test]
async fn recv_stands_next_to_a_shutdown_branch() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 64);
        let subscription = bus.subscribe_async(64).unwrap();
        let shutdown = Shutdown::new();
        let reader = tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                let mut seen = Vec::new();
                loop {
                    tokio::select! {
                        event = subscription.recv() => seen.push(event.unwrap()),
                        () = shutdown.wait() => return (seen, subscription),
                    }
                }
            }
        });
        for event in 0..10 {
            bus.publish(event).unwrap();
            yield_now().await;
        }
        shutdown.set();
        let (mut seen, subscription) = reader.await.unwrap();
        while let Ok(event) = subscription.try_recv() {
            seen.push(event);
        }
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_shutdown_that_was_given_before_is_seen() {
    let shutdown = Shutdown::new();
    assert_eq!(shutdown.wait().now_or_never(), None);
    shutdown.set();
    shutdown.wait().await;
}

async fn let_others_run(times: u64) {
    for _ in 0..times {
        yield_now().await;
    }
}

/// Receives until the end; each wait may be cancelled after a few polls, also when it has just
/// been woken. Counts the waits that were cancelled, and returns the events.
async fn receive_with_cancellations(
    subscription: &AsyncEventSubscription<u64>,
    cancelled: &AtomicUsize,
    seed: u64,
) -> Vec<u64> {
    let mut random = Random(seed);
    let mut seen = Vec::new();
    loop {
        let mut coin = || random.below(2) == 0;
        let (many, before) = (coin(), coin());
        let yields = if before { 1 + random.below(2) } else { random.below(3) };
        tokio::select! {
            biased;
            () = let_others_run(yields), if before => {
                cancelled.fetch_add(1, Relaxed);
            }
            batch = subscription.recv_many(3), if many => match batch {
                Ok(batch) => seen.extend(batch),
                Err(_) => return seen,
            },
            event = subscription.recv(), if !many => match event {
                Ok(event) => seen.push(event),
                Err(_) => return seen,
            },
            () = let_others_run(yields), if !before => {
                cancelled.fetch_add(1, Relaxed);
            }
        }
    }
}

#[test]
fn twenty_thousand_cancellations_lose_nothing_and_double_nothing() {
    const CANCELLATIONS: usize = 20_000;
    for (backend, capacity) in [(Backend::LockFree, 8), (Backend::Broadcast, 64)] {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let bus = patient_bus(backend, capacity, FOREVER);
        let subscription = Arc::new(bus.subscribe_async(capacity).unwrap());
        let cancelled = Arc::new(AtomicUsize::new(0));
        let readers: Vec<_> = (0..3)
            .map(|seed| {
                let (subscription, cancelled) = (subscription.clone(), cancelled.clone());
                runtime.spawn(async move {
                    receive_with_cancellations(&subscription, &cancelled, seed).await
                })
            })
            .collect();
        let mut published = 0;
        while cancelled.load(Relaxed) < CANCELLATIONS {
            // The shared channel does not wait for its readers, so this does.
            if subscription.pending() < capacity / 2 {
                assert_eq!(bus.publish(published), Ok(1));
                published += 1;
            }
            std::thread::yield_now();
        }
        bus.close();
        let mut seen = Vec::new();
        for reader in readers {
            let events = runtime.block_on(reader).unwrap();
            assert!(events.is_sorted(), "each reader keeps the order");
            seen.extend(events);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..published).collect::<Vec<_>>(), "{}", backend.name());
        assert!(published > 0);
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_cancelled_wait_passes_its_wake_up_on() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = bus.subscribe_async(4).unwrap();
        let context = &mut Context::from_waker(Waker::noop());
        let mut second = Box::pin(subscription.recv());
        {
            let mut first = pin!(subscription.recv());
            assert!(first.as_mut().poll(context).is_pending());
            assert!(second.as_mut().poll(context).is_pending());
            bus.publish(1).unwrap(); // wakes the first, which is cancelled
        }
        assert_eq!(second.as_mut().poll(context), Poll::Ready(Ok(1)));
    }
}

#[test]
fn waiters_are_served_in_the_order_in_which_they_came() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let subscription = bus.subscribe_async(4).unwrap();
        let wakes: Vec<_> = (0..3).map(|_| Arc::new(Woken::default())).collect();
        let mut waiters: Vec<_> = (0..3).map(|_| Box::pin(subscription.recv())).collect();
        let mut poll = |place: usize| {
            let waker = Waker::from(wakes[place].clone());
            waiters[place].as_mut().poll(&mut Context::from_waker(&waker))
        };
        (0..3).for_each(|place| assert!(poll(place).is_pending()));
        for place in 0..3 {
            bus.publish(place as u64).unwrap();
            let woken: Vec<_> = wakes.iter().map(|woken| woken.0.load(Relaxed)).collect();
            assert_eq!(woken.iter().filter(|&&woken| woken).count(), place + 1);
            assert!(woken[place], "{woken:?}");
            assert_eq!(poll(place), Poll::Ready(Ok(place as u64)));
        }
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Relaxed);
    }
}

#[tokio::test]
async fn a_stream_hides_no_hole_and_ends_when_everything_was_read() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4);
        let mut stream = awaited(&bus, 4, Policy::DropOldest);
        bus.publish_many(0..6).unwrap();
        let hole = |missed| Err(Lagged { missed, exact: true });
        assert_eq!(stream.next().await, Some(hole(2)));
        assert_eq!(stream.next().await, Some(Ok(2)), "a hole does not end it");
        bus.publish_many(6..10).unwrap();
        bus.close();
        let rest: Vec<_> = stream.by_ref().collect().await;
        let expected: Vec<_> = [hole(3)].into_iter().chain((6..10).map(Ok)).collect();
        assert_eq!(rest, expected);
        assert_eq!(stream.next().await, None);
        assert_sums_close(&bus.metrics());
    }
}

#[tokio::test]
async fn a_last_hole_comes_before_the_end_of_a_stream() {
    let bus = bus(Backend::LockFree, 1);
    let stream = awaited(&bus, 1, Policy::DropNewest);
    bus.publish_many(0..3).unwrap();
    bus.close();
    let all: Vec<_> = stream.collect().await;
    assert_eq!(all, [Ok(0), Err(Lagged { missed: 2, exact: true })]);
}

#[tokio::test]
async fn a_stream_wakes_for_events_and_for_the_end() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 64);
        let stream = bus.subscribe_async(64).unwrap();
        let reader = tokio::spawn(stream.map(Result::unwrap).collect::<Vec<_>>());
        for event in 0..20 {
            yield_now().await;
            bus.publish(event).unwrap();
        }
        yield_now().await;
        bus.close();
        assert_eq!(reader.await.unwrap(), (0..20).collect::<Vec<_>>());
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_stream_that_is_dropped_asleep_passes_its_wake_up_on() {
    let bus = bus(Backend::LockFree, 4);
    let (mut asleep, other) = (bus.subscribe_async(4).unwrap(), bus.subscribe_async(4).unwrap());
    let context = &mut Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut asleep).poll_next(context).is_pending());
    assert!(Pin::new(&mut asleep).poll_next(context).is_pending());
    bus.publish(1).unwrap();
    drop(asleep);
    assert_eq!(other.recv().now_or_never(), Some(Ok(1)));
    assert_eq!(bus.metrics().total_dropped, 1);
}

#[test]
fn a_busy_task_lets_others_run_once_in_every_256_events() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 4096);
        let mut subscription = bus.subscribe_async(4096).unwrap();
        bus.publish_many(0..2048).unwrap();
        let context = &mut Context::from_waker(Waker::noop());
        let mut longest = 0;
        for stream in [false, true] {
            let (mut got, mut run) = (0, 0);
            while got < 1024 {
                let ready = match stream {
                    false => pin!(subscription.recv()).poll(context).is_ready(),
                    true => Pin::new(&mut subscription).poll_next(context).is_ready(),
                };
                run = if ready { run + 1 } else { 0 };
                got += usize::from(ready);
                longest = longest.max(run);
            }
        }
        assert_eq!(longest, 256, "and nothing was lost by it");
        let mut publish = || pin!(bus.publish_async(0, None)).poll(context).is_ready();
        assert_eq!((0..514).filter(|_| !publish()).count(), 2);
    }
}

#[tokio::test]
async fn a_cancelled_publish_async_means_that_nobody_has_it() {
    let bus = bus(Backend::LockFree, 2);
    let full = awaited(&bus, 2, Policy::Block);
    let other = subscribe(&bus, 64, Policy::Block);
    bus.publish_many([0, 1]).unwrap();
    assert_eq!(bus.publish_async(7, None).now_or_never(), None);
    tokio::select! {
        biased;
        taken = bus.publish_async(8, None) => panic!("there was no room: {taken:?}"),
        () = yield_now() => {}
    }
    assert_eq!(drain(&other), events([0, 1]));
    let (published, read) = tokio::join!(bus.publish_async(9, None), full.recv());
    assert_eq!((published, read), (Ok(2), Ok(0)));
    assert_eq!(drain(&other), events([9]));
    assert_eq!(full.recv_many(4).await, Ok(vec![1, 9]));
    assert_eq!(bus.metrics().total_dropped, 0);
    assert_sums_close(&bus.metrics());
}

#[test]
fn cancelled_and_completed_publications_account_for_every_event() {
    let bus = bus(Backend::LockFree, 4);
    let subscription = subscribe(&bus, 4, Policy::Block);
    let context = &mut Context::from_waker(Waker::noop());
    let mut random = Random(7);
    let (mut waiting, mut taken, mut seen) = (Vec::new(), Vec::new(), Vec::new());
    for event in 0..5_000_u64 {
        waiting.push((event, Box::pin(bus.publish_async(event, None))));
        if random.below(3) == 0 {
            let victim = random.below(waiting.len() as u64) as usize;
            drop(waiting.remove(victim));
        }
        for _ in 0..random.below(4) {
            if let Some(Read::Event(event)) = support::read(&subscription) {
                seen.push(event);
            }
        }
        waiting.retain_mut(|(event, publication)| {
            match publication.as_mut().poll(context) {
                Poll::Pending => return true,
                Poll::Ready(result) => assert_eq!(result, Ok(1)),
            }
            taken.push(*event);
            false
        });
    }
    drop(waiting);
    for read in drain(&subscription) {
        let Read::Event(event) = read else { panic!("{read:?}") };
        seen.push(event);
    }
    assert_eq!(seen, taken, "who was told that it was taken, and nobody else");
    assert!(seen.is_sorted(), "first come, first served");
    assert_sums_close(&bus.metrics());
}

#[tokio::test]
async fn closing_ends_every_wait() {
    let bus = bus(Backend::LockFree, 1);
    let full = awaited(&bus, 1, Policy::Block);
    let idle = bus.subscribe_async(4).unwrap();
    bus.publish(0).unwrap();
    assert_eq!(idle.recv().await, Ok(0));
    let (published, read, many, ()) =
        tokio::join!(bus.publish_async(1, None), idle.recv(), idle.recv_many(4), async {
            bus.close()
        });
    assert_eq!(published, Err(PublishError::Closed(1)));
    assert_eq!((read, many), (Err(RecvError::Closed), Err(RecvError::Closed)));
    assert_eq!(full.recv().await, Ok(0));
    assert_eq!(full.recv().await, Err(RecvError::Closed));
}
