//! Models of sleeping and waking, run by `make loom` on the code itself. Each has a twin that lacks
//! one fence, lock or step, and must fail.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::dormitory::{Bell, Calls, Dormitory, Sleeper};
use crate::barrier::Fences;
use crate::sync::ThreadExclusion;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Wake, Waker};

fn model(play: impl Fn() + Sync + Send + 'static) {
    // All interleavings of three threads are too many: those with up to two preemptions.
    let mut bounded = loom::model::Builder::new();
    bounded.preemption_bound = Some(2);
    bounded.check(play);
}

/// Asserts that loom finds a lost wake-up or a failed assertion.
#[track_caller]
fn assert_fails(twin: impl Fn() + Sync + Send + 'static) {
    let found = catch_unwind(AssertUnwindSafe(|| model(twin)));
    assert!(found.is_err(), "the twin passed: the model does not see what it is about");
}

/// What is not dropped while a model that has failed is unwound: loom's locks are gone by then.
struct Kept<T>(ManuallyDrop<T>);

impl<T> Kept<T> {
    fn new(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Kept<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the value is dropped here and nowhere else, and not used after it.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// Wakes a thread of loom.
struct Thread(Notify);

impl Wake for Thread {
    fn wake(self: Arc<Self>) {
        self.0.notify();
    }
}

/// One subscription and the events that it has still to read.
struct Bus {
    dormitory: Arc<Dormitory>,
    bell: Kept<Arc<Bell>>,
    events: AtomicUsize,
}

/// What a publisher does wrong.
#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    Nothing,
    ForgetsWithoutTheLock,
}

impl Bus {
    fn new(calls: Calls) -> Arc<Self> {
        let dormitory = Arc::new(Dormitory::new(calls));
        let bell = Kept::new(Arc::new(dormitory.bell()));
        Arc::new(Self { dormitory, bell, events: AtomicUsize::new(0) })
    }

    /// As a publisher that holds no lock does.
    fn publish(&self, fences: Fences, mistake: Mistake) {
        self.events.fetch_add(1, Ordering::Release);
        fences.often();
        if self.dormitory.asleep().any_of(u64::MAX) {
            self.dormitory.wake(u64::MAX);
            if mistake == Mistake::ForgetsWithoutTheLock {
                self.dormitory.asleep().set(0);
            }
        }
    }

    fn take(&self) -> bool {
        let events = self.events.load(Ordering::Acquire);
        events > 0
            && (self.events)
                .compare_exchange(events, events - 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// As a thread that receives does.
    fn recv(&self, fence: fn()) {
        while !self.take() {
            let mut sleeper = Kept::new(self.bell.sleeper());
            sleeper.enter();
            fence();
            if self.take() {
                return;
            }
            sleep(&mut sleeper);
        }
    }
}

/// The fence of step S1.
fn fence() {
    Fences::Symmetric.rarely();
}

fn no_fence() {}

/// Sleeps until the sleeper is woken.
fn sleep<B: Deref<Target = Bell>>(sleeper: &mut Sleeper<B>) {
    let own = Arc::new(Thread(Notify::new()));
    let waker = Waker::from(own.clone());
    while Future::poll(Pin::new(&mut *sleeper), &mut Context::from_waker(&waker)).is_pending() {
        own.0.wait();
    }
}

/// A thread that receives what others publish, one event each.
fn receiving(publishers: usize, fences: Fences, fence: fn(), mistake: Mistake) {
    let bus = Bus::new(Calls::Once);
    let publishing: Vec<_> = (0..publishers)
        .map(|_| {
            let bus = bus.clone();
            thread::spawn(move || bus.publish(fences, mistake))
        })
        .collect();
    (0..publishers).for_each(|_| bus.recv(fence));
    publishing.into_iter().for_each(|publisher| publisher.join().unwrap());
    assert_eq!(bus.events.load(Ordering::Relaxed), 0);
}

#[test]
fn no_wake_up_of_a_reader_is_lost() {
    model(|| receiving(1, Fences::Symmetric, fence, Mistake::Nothing));
}

#[test]
fn two_publishers_lose_no_wake_up_of_a_reader() {
    model(|| receiving(2, Fences::Symmetric, fence, Mistake::Nothing));
}

#[test]
fn without_the_readers_fence_a_wake_up_is_lost() {
    assert_fails(|| receiving(1, Fences::Symmetric, no_fence, Mistake::Nothing));
}

#[test]
fn without_the_publishers_fence_a_wake_up_is_lost() {
    assert_fails(|| receiving(1, Fences::Asymmetric, fence, Mistake::Nothing));
}

#[test]
fn a_sleeper_that_is_forgotten_without_the_lock_sleeps_on() {
    assert_fails(|| receiving(2, Fences::Symmetric, fence, Mistake::ForgetsWithoutTheLock));
}

/// Two that stand in line for one event; the first one goes away.
fn going_away(leave: fn(Kept<Sleeper>)) {
    let bus = Bus::new(Calls::Once);
    let mut first = Kept::new(bus.bell.owned_sleeper());
    first.enter();
    let leaving = thread::spawn(move || leave(first));
    let publishing = {
        let bus = bus.clone();
        thread::spawn(move || bus.publish(Fences::Symmetric, Mistake::Nothing))
    };
    bus.recv(fence);
    leaving.join().unwrap();
    publishing.join().unwrap();
}

#[test]
fn who_goes_away_passes_its_wake_up_on() {
    model(|| going_away(drop));
}

#[test]
fn who_goes_away_and_keeps_its_wake_up_leaves_the_next_one_asleep() {
    assert_fails(|| going_away(std::mem::forget));
}

/// A foreign loop that arms once, is called for the first event, and sleeps on. `look_again` says
/// whether to, after a look that found nothing.
fn sleeping_on(look_again: fn(&Bell) -> bool) {
    const EVENTS: usize = 2;
    let bus = Bus::new(Calls::Once);
    let own = Arc::new(Thread(Notify::new()));
    assert!(bus.bell.set_waker(Waker::from(own.clone())));
    let publishing = {
        let bus = bus.clone();
        thread::spawn(move || {
            (0..EVENTS).for_each(|_| bus.publish(Fences::Symmetric, Mistake::Nothing));
        })
    };
    bus.bell.arm::<ThreadExclusion>();
    fence();
    let mut taken = 0;
    loop {
        while bus.take() {
            taken += 1;
        }
        if taken == EVENTS {
            break;
        }
        if !look_again(&bus.bell) {
            own.0.wait();
        }
    }
    publishing.join().unwrap();
}

/// As `Inbox::note_again`.
fn note_again(bell: &Bell, fence: fn()) -> bool {
    let is_forgotten = bell.is_forgotten();
    if is_forgotten {
        bell.note();
        fence();
    }
    is_forgotten
}

#[test]
fn a_foreign_loop_that_notes_again_that_it_sleeps_is_called_again() {
    model(|| sleeping_on(|bell| note_again(bell, fence)));
}

#[test]
fn a_foreign_loop_that_sleeps_on_without_a_word_is_forgotten() {
    assert_fails(|| sleeping_on(|_| false));
}

#[test]
fn a_foreign_loop_that_notes_again_without_a_fence_is_forgotten() {
    assert_fails(|| sleeping_on(|bell| note_again(bell, no_fence)));
}

/// The end, told before or after those that sleep are woken.
fn ending(end: fn(&Bus)) {
    let bus = Bus::new(Calls::Once);
    let closing = {
        let bus = bus.clone();
        thread::spawn(move || end(&bus))
    };
    // One event stands for the end.
    bus.recv(no_fence);
    closing.join().unwrap();
}

#[test]
fn the_end_wakes_who_sleeps() {
    model(|| {
        ending(|bus| {
            bus.events.store(1, Ordering::Release);
            bus.bell.wake_all();
        });
    });
}

#[test]
fn an_end_that_is_told_after_the_wake_up_leaves_somebody_asleep() {
    assert_fails(|| {
        ending(|bus| {
            bus.bell.wake_all();
            bus.events.store(1, Ordering::Release);
        });
    });
}
