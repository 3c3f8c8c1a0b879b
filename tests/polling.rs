//! `WakeMode::Polling`: publishers wake nobody, and whoever waits looks again by itself.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use futures_util::{FutureExt, Stream, StreamExt};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};
use support::{FOREVER, assert_sums_close, bus, subscribe};
use tickbus::{
    AnySubscription, AsyncEventSubscription, Backend, BackpressureConfig, BusConfig, EventBus,
    EventBusImpl, EventReader, EventSubscription, EventSystem, Patience, Policy, Producers,
    RecvError, RecvTimeoutError, RingEventBus, Selected, Selector, Shutdown, SubscribeOptions,
    WaitStrategy, WakeMode, select,
};
use tokio::task::yield_now;

const STRATEGIES: [WaitStrategy; 3] = [WaitStrategy::Spin, WaitStrategy::Yield, WaitStrategy::Park];
/// Backends that lose nothing if they are told not to.
const LOSSLESS: [Backend; 2] = [Backend::LockFree, Backend::Ring];

/// A bus that wakes no reader, whose publishers wait for room as long as they must.
fn polled(backend: Backend, capacity: usize) -> EventBusImpl<u64> {
    let backpressure = BackpressureConfig { max_block_duration: FOREVER, ..Default::default() };
    let wake_mode = WakeMode::Polling;
    let config = BusConfig { capacity, backpressure, wake_mode, ..Default::default() };
    EventBusImpl::new(backend, config).unwrap()
}

/// How often a task was woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Woken {
    fn count(&self) -> usize {
        self.0.load(Relaxed)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn a_task_that_waits_wakes_itself_at_each_look_and_no_publisher_does() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 8);
        let reader = bus.subscribe_async(8).unwrap();
        let mut stream = bus.subscribe_async(8).unwrap();
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let context = &mut Context::from_waker(&waker);
        let mut reading = pin!(reader.recv());
        for looks in 1..=5 {
            assert!(reading.as_mut().poll(context).is_pending());
            assert!(Pin::new(&mut stream).poll_next(context).is_pending());
            assert_eq!(woken.count(), 2 * looks);
        }
        assert_eq!(bus.publish(7), Ok(2));
        assert_eq!(bus.publish_batch(None, &[8]), Ok(1));
        assert_eq!(woken.count(), 10);
        assert_eq!(reading.as_mut().poll(context), Poll::Ready(Ok(7)));
        assert_eq!(Pin::new(&mut stream).poll_next(context), Poll::Ready(Some(Ok(7))));
        assert_eq!(woken.count(), 10);
    }
}

#[test]
fn every_wait_of_a_thread_gets_what_another_publishes_and_sees_the_end() {
    type Wait = fn(&EventSubscription<u64>) -> Result<u64, RecvError>;
    let waits: [Wait; 7] = [
        EventSubscription::recv,
        |reader| match reader.recv_timeout(FOREVER) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Closed) => Err(RecvError::Closed),
            Err(other) => panic!("{other}"),
        },
        |reader| reader.recv_many(1).map(|batch| batch[0]),
        |reader| reader.recv_by(WaitStrategy::Park),
        |reader| {
            assert_eq!(select(&[reader], None, None), Selected::Ready(0));
            reader.try_recv().map_err(|_| RecvError::Closed)
        },
        |reader| {
            while !reader.is_ready() {
                let deadline = Instant::now() + Duration::from_secs(60);
                reader.sleep_unless_ready(|parking| assert!(parking.park(deadline)));
            }
            reader.try_recv().map_err(|_| RecvError::Closed)
        },
        |reader| {
            let selected = select(&[reader as &dyn AnySubscription], None, None);
            assert_eq!(selected, Selected::Ready(0));
            reader.recv()
        },
    ];
    for &backend in Backend::ALL {
        for wait in waits {
            let bus = polled(backend, 256);
            let reader = bus.subscribe(256).unwrap();
            // The next one comes when the reader has gone to wait for it, or is about to.
            let (got, next) = std::sync::mpsc::channel();
            thread::scope(|scope| {
                let bus = &bus;
                scope.spawn(move || {
                    for event in 0..200 {
                        assert_eq!(bus.publish(event), Ok(1));
                        assert_eq!(next.recv(), Ok(event));
                    }
                    bus.close();
                });
                for event in 0..200 {
                    assert_eq!(wait(&reader), Ok(event));
                    got.send(event).unwrap();
                }
                assert_eq!(wait(&reader), Err(RecvError::Closed));
            });
            assert_sums_close(&bus.metrics());
        }
    }
}

#[test]
fn a_reader_in_one_hand_gets_every_event_however_it_waits_and_the_publisher_waits_for_it() {
    for backend in LOSSLESS {
        for strategy in STRATEGIES {
            // A small one, so that each waits for the other.
            let bus = polled(backend, 16);
            let mut reader = EventReader::from(bus.subscribe(16).unwrap());
            thread::scope(|scope| {
                scope.spawn(|| {
                    (0..5_000).for_each(|event| assert_eq!(bus.publish(event), Ok(1)));
                    bus.close();
                });
                (0..5_000).for_each(|event| assert_eq!(reader.recv(strategy), Ok(event)));
                assert_eq!(reader.recv(strategy), Err(RecvError::Closed));
            });
        }
    }
}

#[test]
fn a_reader_that_waits_sees_its_subscription_closed() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 8);
        let reader = bus.subscribe(8).unwrap();
        thread::scope(|scope| {
            let waits = [
                scope.spawn(|| reader.recv()),
                scope.spawn(|| {
                    assert_eq!(select(&[&reader], None, None), Selected::Ready(0));
                    reader.recv()
                }),
            ];
            reader.close();
            for wait in waits {
                assert_eq!(wait.join().unwrap(), Err(RecvError::Closed));
            }
        });
    }
}

#[test]
fn a_wait_ends_at_its_deadline() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 8);
        let reader = bus.subscribe(8).unwrap();
        for timeout in [Duration::ZERO, Duration::from_millis(1)] {
            assert_eq!(reader.recv_timeout(timeout), Err(RecvTimeoutError::Timeout));
            let deadline = Some(Instant::now() + timeout);
            assert_eq!(select(&[&reader], None, deadline), Selected::TimedOut);
        }
        reader.sleep_unless_ready(|parking| {
            assert!(!parking.park(Instant::now()));
            let far = Instant::now() + Duration::from_secs(3_600);
            assert!(parking.park(far), "it does not sleep");
        });
        assert_eq!(bus.publish(1), Ok(1));
        assert_eq!(reader.recv_timeout(Duration::ZERO), Ok(1));
    }
}

#[test]
fn a_publisher_that_waits_for_room_sleeps_and_is_told_in_its_turn() {
    for backend in LOSSLESS {
        let bus = polled(backend, 2);
        let reader = subscribe(&bus, 2, Policy::Block);
        assert_eq!(bus.publish_many([0, 1]), Ok(2));
        let mut waiting = [2, 3].map(|event| bus.bus().publication(event, None, true));
        for publication in &mut waiting {
            assert_eq!(publication.poll(Patience::Left), Ok(None));
        }
        let [first, second] = &mut waiting;
        assert_eq!(reader.recv(), Ok(0));
        assert!(first.park(None), "it was told");
        assert!(!second.park(Some(Instant::now())), "it was not told yet");
        assert_eq!(second.poll(Patience::Left), Ok(None), "one place, one before it");
        assert_eq!(first.poll(Patience::Left), Ok(Some(1)));
        assert_eq!(reader.recv(), Ok(1));
        assert!(second.park(None), "it was told");
        assert_eq!(second.poll(Patience::Left), Ok(Some(1)));
        assert_eq!((reader.recv(), reader.recv()), (Ok(2), Ok(3)));
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn closing_frees_a_publisher_that_waits_beside_readers_that_look() {
    for backend in LOSSLESS {
        let bus = polled(backend, 1);
        let full = subscribe(&bus, 1, Policy::Block);
        assert_eq!(bus.publish(0), Ok(1));
        let mut waiting = bus.bus().publication(1, None, true);
        assert_eq!(waiting.poll(Patience::Left), Ok(None));
        bus.close();
        assert!(waiting.park(None));
        assert!(waiting.poll(Patience::Left).is_err());
        assert_eq!((full.recv(), full.recv()), (Ok(0), Err(RecvError::Closed)));
    }
}

#[test]
fn every_way_of_publishing_reaches_readers_that_look() {
    for producers in Producers::ALL {
        let wake_mode = WakeMode::Polling;
        let config =
            BusConfig { capacity: 1_024, producers: *producers, wake_mode, ..Default::default() };
        let bus = RingEventBus::with_config(config).unwrap();
        let readers: Vec<_> = (0..2).map(|_| bus.subscribe(1_024).unwrap()).collect();
        thread::scope(|scope| {
            let counts: Vec<_> = readers
                .iter()
                .map(|reader| {
                    scope.spawn(move || {
                        let mut sum = 0;
                        while let Ok(event) = reader.recv() {
                            sum += event;
                        }
                        sum
                    })
                })
                .collect();
            let publishers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for event in (0..1_000).step_by(4) {
                            assert_eq!(bus.publish(event), Ok(2));
                            assert_eq!(bus.publish_batch(None, &[event + 1, event + 2]), Ok(2));
                            assert_eq!(bus.publish_timeout(event + 3, None, FOREVER), Ok(2));
                        }
                    })
                })
                .collect();
            publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
            let mut expected = 2 * (0..1_000).sum::<u64>();
            if *producers == Producers::Shared {
                let mut producer = bus.bus().producer().unwrap();
                assert_eq!(producer.publish(1), Ok(2));
                assert_eq!(producer.publish_with(None, |event| *event = 2), Ok(2));
                assert_eq!(producer.publish_batch(None, &[3, 4]), Ok(2));
                expected += 10;
            }
            bus.close();
            for count in counts {
                assert_eq!(count.join().unwrap(), expected);
            }
        });
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn what_asks_to_be_told_is_refused() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 8);
        let reader = bus.subscribe(8).unwrap();
        let refused = reader.set_waker(Waker::noop().clone()).unwrap_err().to_string();
        for word in ["waker", "polling", "WakeMode::Auto"] {
            assert!(refused.contains(word), "{refused}");
        }
        assert!(reader.place_in_line().is_none());
    }
}

#[test]
fn who_selects_with_one_polled_subscription_sees_all_and_leaves_the_others_their_wake_ups() {
    for &backend in Backend::ALL {
        let (looking, waking) = (polled(backend, 8), bus(backend, 8));
        let system = EventSystem::new(Default::default()).unwrap();
        let (one, two) = (looking.subscribe(8).unwrap(), waking.subscribe(8).unwrap());
        let three = system.subscribe(Default::default()).unwrap();
        let shutdown = Shutdown::new();
        let all: [&dyn AnySubscription; 3] = [&one, &two, &three];
        let mut selector = Selector::new(&all, Some(&shutdown), 0);
        assert_eq!(selector.ready(), None);
        assert!(selector.park(None), "it does not sleep");
        assert_eq!(selector.ready(), None);
        thread::scope(|scope| {
            let mut wait = || {
                loop {
                    match selector.ready() {
                        Some(found) => break found,
                        None => assert!(selector.park(None)),
                    }
                }
            };
            scope.spawn(|| assert_eq!(waking.publish(1), Ok(1)));
            assert_eq!((wait(), two.try_recv()), (Selected::Ready(1), Ok(1)));
            scope.spawn(|| assert_eq!(looking.publish(2), Ok(1)));
            assert_eq!((wait(), one.try_recv()), (Selected::Ready(0), Ok(2)));
            scope.spawn(|| system.close());
            assert_eq!(wait(), Selected::Ready(2));
            scope.spawn(|| shutdown.set());
            while wait() != Selected::Shutdown {}
        });
        drop(selector);
        let two = AsyncEventSubscription::from(two);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(woken.clone());
        let mut reading = pin!(two.recv());
        assert!(reading.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!((waking.publish(3), woken.count()), (Ok(1), 1));
    }
}

#[tokio::test]
async fn tasks_of_one_thread_take_turns_though_they_only_look() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 64);
        let (reader, stream) = (bus.subscribe_async(64).unwrap(), bus.subscribe_async(64).unwrap());
        let shutdown = Shutdown::new();
        let reading = tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                let mut seen = Vec::new();
                loop {
                    tokio::select! {
                        event = reader.recv() => match event {
                            Ok(event) => seen.push(event),
                            Err(_) => break seen,
                        },
                        () = shutdown.wait() => break seen,
                    }
                }
            }
        });
        let streaming = tokio::spawn(stream.map(Result::unwrap).collect::<Vec<_>>());
        for event in 0..20 {
            yield_now().await;
            assert_eq!(bus.publish(event), Ok(2));
        }
        yield_now().await;
        bus.close();
        let all: Vec<_> = (0..20).collect();
        assert_eq!((reading.await.unwrap(), streaming.await.unwrap()), (all.clone(), all));
        shutdown.set();
        assert_sums_close(&bus.metrics());
    }
}

#[test]
fn a_look_that_is_cancelled_loses_nothing() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 8);
        let reader = bus.subscribe_async(8).unwrap();
        for event in 0..8 {
            assert_eq!(reader.recv().now_or_never(), None);
            assert_eq!(bus.publish(event), Ok(1));
            assert_eq!(reader.recv_many(4).now_or_never(), Some(Ok(vec![event])));
        }
    }
}

#[test]
fn readers_of_one_subscription_that_only_look_compete_and_each_event_goes_to_one() {
    for &backend in Backend::ALL {
        let bus = polled(backend, 1 << 13);
        let options = SubscribeOptions::default();
        let shared = bus.subscribe_with(options).unwrap();
        thread::scope(|scope| {
            let read = || std::iter::from_fn(|| shared.recv().ok()).collect::<Vec<_>>();
            let readers: Vec<_> = (0..3).map(|_| scope.spawn(read)).collect();
            (0..5_000).for_each(|event| assert_eq!(bus.publish(event), Ok(1)));
            bus.close();
            let mut seen: Vec<_> =
                readers.into_iter().flat_map(|reader| reader.join().unwrap()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..5_000).collect::<Vec<_>>());
        });
        assert_sums_close(&bus.metrics());
    }
}
