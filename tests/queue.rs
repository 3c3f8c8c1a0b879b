//! A queue between threads and tasks: each event to exactly one consumer, none lost by cancelling or
//! closing, none cloned.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use futures_util::FutureExt;
use std::collections::HashSet;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tickbus::{DequeueError, EnqueueError, LockFreeEventQueue};
use tokio::task::yield_now;

const FOREVER: Duration = Duration::from_secs(3_600);

#[test]
fn events_leave_in_the_order_in_which_they_came() {
    let queue = LockFreeEventQueue::new(3).unwrap();
    assert_eq!((queue.size(), queue.capacity(), queue.is_empty()), (0, 4, true));
    assert_eq!(queue.try_dequeue(), Err(DequeueError::Empty));
    for event in 0..4 {
        assert_eq!(queue.enqueue(event), Ok(()));
    }
    assert_eq!(queue.enqueue(4), Err(EnqueueError::Full(4)));
    assert_eq!(queue.enqueue_timeout(4, Duration::ZERO), Err(EnqueueError::Full(4)));
    assert_eq!((queue.size(), queue.is_empty()), (4, false));
    let taken = [queue.dequeue(), queue.try_dequeue(), queue.dequeue_timeout(FOREVER)];
    assert_eq!(taken, [Ok(0), Ok(1), Ok(2)]);
    assert_eq!(queue.dequeue(), Ok(3));
    assert_eq!(queue.dequeue_timeout(Duration::ZERO), Err(DequeueError::Empty));
    assert!(LockFreeEventQueue::<u8>::new(0).is_err());
}

#[test]
fn a_closed_queue_gives_what_it_has_and_takes_nothing() {
    let queue = LockFreeEventQueue::new(4).unwrap();
    queue.enqueue(1).unwrap();
    queue.close();
    assert!(queue.is_closed());
    assert_eq!(queue.enqueue(2), Err(EnqueueError::Closed(2)));
    assert_eq!(queue.enqueue_timeout(2, FOREVER).unwrap_err().into_event(), 2);
    assert_eq!(queue.enqueue_async(2).now_or_never(), Some(Err(EnqueueError::Closed(2))));
    assert_eq!(queue.dequeue(), Ok(1));
    assert_eq!(queue.try_dequeue(), Err(DequeueError::Closed));
    assert_eq!(queue.dequeue(), Err(DequeueError::Closed));
    assert_eq!(queue.dequeue_timeout(FOREVER), Err(DequeueError::Closed));
    assert_eq!(queue.dequeue_async().now_or_never(), Some(Err(DequeueError::Closed)));
}

#[test]
fn closing_frees_who_waits() {
    let (full, empty) = (LockFreeEventQueue::new(1).unwrap(), LockFreeEventQueue::new(1).unwrap());
    full.enqueue(0).unwrap();
    std::thread::scope(|scope| {
        let producer = scope.spawn(|| full.enqueue_timeout(1, FOREVER));
        let consumer = scope.spawn(|| empty.dequeue());
        // Whether they wait already or not: both end.
        full.close();
        empty.close();
        assert_eq!(producer.join().unwrap(), Err(EnqueueError::Closed(1)));
        assert_eq!(consumer.join().unwrap(), Err::<i32, _>(DequeueError::Closed));
    });
    assert_eq!(full.dequeue(), Ok(0));
}

/// An event that must not be cloned.
#[derive(Debug, PartialEq)]
struct Unique(u64);

impl Clone for Unique {
    fn clone(&self) -> Self {
        panic!("event {} was cloned", self.0);
    }
}

#[test]
fn each_event_of_many_producers_reaches_one_of_many_consumers() {
    const PRODUCERS: u64 = 4;
    const EVENTS: u64 = 5_000;
    let queue = LockFreeEventQueue::new(16).unwrap();
    let received: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let consumers: Vec<_> = (0..3)
            .map(|consumer| {
                let queue = queue.clone();
                scope.spawn(move || {
                    let mut received = Vec::new();
                    loop {
                        let event = match consumer {
                            // One of them is a task.
                            0 => block_on(queue.dequeue_async()),
                            _ => queue.dequeue(),
                        };
                        match event {
                            Ok(Unique(event)) => received.push(event),
                            Err(end) => {
                                assert_eq!(end, DequeueError::Closed);
                                return received;
                            }
                        }
                    }
                })
            })
            .collect();
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|producer| {
                let queue = queue.clone();
                scope.spawn(move || {
                    for number in 0..EVENTS {
                        let mut event = Unique(producer << 32 | number);
                        // Each way of enqueueing in turn; the first gives the event back when full.
                        if number % 3 == 0 {
                            match queue.enqueue(event) {
                                Ok(()) => continue,
                                Err(full) => event = full.into_event(),
                            }
                        }
                        match number % 2 {
                            0 => queue.enqueue_timeout(event, FOREVER).unwrap(),
                            _ => block_on(queue.enqueue_async(event)).unwrap(),
                        }
                    }
                })
            })
            .collect();
        producers.into_iter().for_each(|producer| producer.join().unwrap());
        queue.close();
        consumers.into_iter().map(|consumer| consumer.join().unwrap()).collect()
    });
    for consumer in &received {
        let mut last = [None; PRODUCERS as usize];
        for event in consumer {
            let (producer, number) = (event >> 32, event & 0xffff_ffff);
            assert!(last[producer as usize] < Some(number), "a producer's order was not kept");
            last[producer as usize] = Some(number);
        }
    }
    let all: Vec<u64> = received.concat();
    assert_eq!(all.len() as u64, PRODUCERS * EVENTS);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
}

/// Runs a future in this thread.
fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(future)
}

#[test]
fn waiting_consumers_are_served_in_the_order_in_which_they_came() {
    let queue = LockFreeEventQueue::new(8).unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let (mut first, mut second) = (pin!(queue.dequeue_async()), pin!(queue.dequeue_async()));
    assert!(first.as_mut().poll(&mut context).is_pending());
    assert!(second.as_mut().poll(&mut context).is_pending());
    queue.enqueue("a").unwrap();
    assert_eq!(first.as_mut().poll(&mut context), Poll::Ready(Ok("a")));
    assert!(second.as_mut().poll(&mut context).is_pending());
    queue.enqueue("b").unwrap();
    assert_eq!(second.as_mut().poll(&mut context), Poll::Ready(Ok("b")));
}

#[test]
fn a_newcomer_does_not_overtake_producers_that_wait() {
    let queue = LockFreeEventQueue::new(1).unwrap();
    queue.enqueue(0).unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let mut waiting = pin!(queue.enqueue_async(1));
    assert!(waiting.as_mut().poll(&mut context).is_pending());
    assert_eq!(queue.dequeue(), Ok(0));
    assert_eq!(queue.enqueue(2), Err(EnqueueError::Full(2)));
    assert_eq!(waiting.as_mut().poll(&mut context), Poll::Ready(Ok(())));
    assert_eq!(queue.dequeue(), Ok(1));
    assert_eq!(queue.enqueue(2), Ok(()));
}

#[tokio::test]
async fn cancelling_loses_nothing_and_doubles_nothing() {
    const EVENTS: u32 = 2_000;
    let queue = LockFreeEventQueue::new(2).unwrap();
    let producer = tokio::spawn({
        let queue = queue.clone();
        async move {
            for event in 0..EVENTS {
                // Cancelled again and again: nobody has the event then.
                let mut patience = event % 4;
                loop {
                    tokio::select! {
                        biased;
                        enqueued = queue.enqueue_async(event) => break enqueued.unwrap(),
                        () = turns(patience) => patience += 1,
                    }
                }
            }
            queue.close();
        }
    });
    let consumers: Vec<_> = (0..5)
        .map(|consumer| {
            let queue = queue.clone();
            tokio::spawn(async move {
                let mut received = Vec::new();
                let mut patience = consumer;
                loop {
                    patience = (patience * 7 + 3) % 5;
                    tokio::select! {
                        biased;
                        event = queue.dequeue_async() => match event {
                            Ok(event) => received.push(event),
                            Err(_) => return received,
                        },
                        () = turns(patience) => {}
                    }
                }
            })
        })
        .collect();
    producer.await.unwrap();
    let mut received = Vec::new();
    for consumer in consumers {
        received.extend(consumer.await.unwrap());
    }
    received.sort_unstable();
    assert_eq!(received, (0..EVENTS).collect::<Vec<_>>());
}

async fn turns(turns: u32) {
    for _ in 0..turns {
        yield_now().await;
    }
}
