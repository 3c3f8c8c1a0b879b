//! Who is woken by an event: one of each subscription that wants it, however many sleep, and nobody
//! else.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Wake, Waker};
use support::bus;
use tickbus::{
    AsyncEventSubscription, Backend, EventBus, EventBusImpl, Pattern, RecvError, SubscribeOptions,
    WeakBus,
};

/// How often a task was woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}

/// A task that waits for an event.
struct Waiting<'a> {
    recv: Pin<Box<dyn Future<Output = Result<u64, RecvError>> + 'a>>,
    woken: Arc<Woken>,
}

impl<'a> Waiting<'a> {
    /// Returns a task that sleeps.
    fn new(subscription: &'a AsyncEventSubscription<u64>) -> Self {
        let mut waiting = Self { recv: Box::pin(subscription.recv()), woken: Arc::default() };
        // A task that finds much to do on its thread lets others run first, and is woken for that.
        (0..2).for_each(|_| assert_eq!(waiting.poll(), Poll::Pending));
        waiting.woken.0.store(0, Relaxed);
        waiting
    }

    fn poll(&mut self) -> Poll<Result<u64, RecvError>> {
        let waker = Waker::from(self.woken.clone());
        self.recv.as_mut().poll(&mut Context::from_waker(&waker))
    }

    fn times_woken(&self) -> usize {
        self.woken.0.load(Relaxed)
    }
}

fn narrow(bus: &EventBusImpl<u64>, pattern: &str) -> AsyncEventSubscription<u64> {
    let pattern = Some(Pattern::new(pattern).unwrap());
    bus.subscribe_with(SubscribeOptions { pattern, ..Default::default() }).unwrap().into()
}

/// More subscriptions than a word has bits.
const MANY: usize = 100;

#[test]
fn each_of_many_sleepers_that_wants_an_event_is_woken_once_and_no_other() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        let patterns = ["a", "b", ">"];
        let readers: Vec<_> = (0..MANY).map(|n| narrow(&bus, patterns[n % 3])).collect();
        let topics = ["a", "b"].map(|name| bus.topic(name).unwrap());
        let mut waiting: Vec<_> = readers.iter().map(Waiting::new).collect();
        for (number, topic) in topics.iter().enumerate() {
            bus.publish_to(topic, number as u64).unwrap();
            for (n, waiting) in waiting.iter_mut().enumerate() {
                let wanted = n % 3 == number || n % 3 == 2;
                assert_eq!(waiting.times_woken(), usize::from(wanted), "{n}, {number}");
                if wanted {
                    assert_eq!(waiting.poll(), Poll::Ready(Ok(number as u64)), "{n}");
                    *waiting = Waiting::new(&readers[n]);
                }
            }
        }
        bus.close();
        for waiting in &mut waiting {
            assert_eq!(waiting.poll(), Poll::Ready(Err(RecvError::Closed)));
        }
    }
}

#[test]
fn one_of_those_that_compete_is_woken_by_each_event() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        let readers: Vec<_> = (0..MANY).map(|_| bus.subscribe_async(16).unwrap()).collect();
        let mut rows: Vec<Vec<_>> =
            readers.iter().map(|reader| (0..3).map(|_| Waiting::new(reader)).collect()).collect();
        for number in 0..3 {
            assert_eq!(bus.publish(number as u64), Ok(MANY));
            for row in &rows {
                let woken: Vec<_> = row.iter().map(Waiting::times_woken).collect();
                assert_eq!(woken, [0, 1, 2].map(|place| usize::from(place <= number)));
            }
        }
        for row in &mut rows {
            for (number, waiting) in row.iter_mut().enumerate() {
                assert_eq!(waiting.poll(), Poll::Ready(Ok(number as u64)));
            }
        }
    }
}

#[test]
fn those_that_leave_the_line_leave_the_others_in_their_order() {
    // First, in the middle, last, and several.
    for left in [&[0][..], &[1], &[3], &[1, 2], &[0, 1], &[2, 3], &[0, 3], &[0, 1, 2, 3]] {
        let bus = bus(Backend::Ring, 16);
        let reader = bus.subscribe_async(16).unwrap();
        let mut line: Vec<_> = (0..4).map(|_| Some(Waiting::new(&reader))).collect();
        left.iter().for_each(|&place| line[place] = None);
        let newcomer = Waiting::new(&reader);
        let line: Vec<_> = line.into_iter().flatten().chain([newcomer]).collect();
        for number in 0..line.len() {
            bus.publish(number as u64).unwrap();
            let woken: Vec<_> = line.iter().map(Waiting::times_woken).collect();
            let expected: Vec<_> = (0..line.len()).map(|n| usize::from(n <= number)).collect();
            assert_eq!(woken, expected, "{left:?} have left");
        }
    }
}

#[test]
fn who_waits_on_a_closed_subscription_takes_no_wake_up_of_a_newer_one() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        let old = bus.subscribe_async(16).unwrap();
        let mut ended = Waiting::new(&old);
        old.close();
        assert_eq!(ended.times_woken(), 1);
        let new = bus.subscribe_async(16).unwrap();
        let mut waiting = Waiting::new(&new);
        assert_eq!(ended.poll(), Poll::Ready(Err(RecvError::Closed)));
        assert_eq!(bus.publish(7), Ok(1));
        assert_eq!((waiting.times_woken(), waiting.poll()), (1, Poll::Ready(Ok(7))));
        drop(ended);
        drop(old);
        // What it had is used again.
        let newest = bus.subscribe_async(16).unwrap();
        let [mut waiting, mut newest] = [&new, &newest].map(Waiting::new);
        assert_eq!(bus.publish(8), Ok(2));
        assert_eq!((waiting.times_woken(), waiting.poll()), (1, Poll::Ready(Ok(8))));
        assert_eq!((newest.times_woken(), newest.poll()), (1, Poll::Ready(Ok(8))));
    }
}

/// A task whose waker uses the bus, when it is woken and when it is dropped.
struct Meddler(WeakBus<u64>);

impl Meddler {
    fn meddle(&self) {
        if let Some(bus) = self.0.upgrade()
            && let Ok(reader) = bus.subscribe_with(SubscribeOptions::default())
        {
            let reader = AsyncEventSubscription::from(reader);
            drop(Waiting::new(&reader));
        }
    }
}

impl Wake for Meddler {
    fn wake(self: Arc<Self>) {
        self.meddle();
    }
}

impl Drop for Meddler {
    fn drop(&mut self) {
        self.meddle();
    }
}

#[test]
fn a_waker_may_use_the_bus_when_it_is_called_and_when_it_is_dropped() {
    for &backend in Backend::ALL {
        let bus = bus(backend, 16);
        let readers = [bus.subscribe_async(16).unwrap(), bus.subscribe_async(16).unwrap()];
        for is_woken in [true, false] {
            let mut waits: Vec<_> = readers.iter().map(|reader| Box::pin(reader.recv())).collect();
            for wait in &mut waits {
                // The second one takes the place of the first.
                for _ in 0..2 {
                    let waker = Waker::from(Arc::new(Meddler(bus.bus().downgrade())));
                    let pending = wait.as_mut().poll(&mut Context::from_waker(&waker));
                    assert_eq!(pending, Poll::Pending);
                }
            }
            if is_woken {
                assert_eq!(bus.publish(7), Ok(2));
                readers.iter().for_each(|reader| assert_eq!(reader.try_recv(), Ok(7)));
            }
            drop(waits);
        }
    }
}
