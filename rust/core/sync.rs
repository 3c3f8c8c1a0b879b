//! The one door to atomics, to mutual exclusion and to threads.
//!
//! The core never names `std::sync::atomic` elsewhere, so that a build with
//! `--cfg tickbus_loom` checks the very same protocol code under loom, one with
//! `--cfg tickbus_shuttle` the whole bus under shuttle, and so that every ordering stands behind a
//! name: [`Counter`] for numbers with one writer at a time, [`Flag`] for one-way
//! switches, and the pairing table of [`crate::wait`] for the rest.

use crate::queue::{CrossbeamQueue, EventQueue};

#[cfg(not(any(tickbus_loom, tickbus_shuttle, tickbus_tsan)))]
pub(crate) use std::sync::atomic::fence;
#[cfg(not(any(tickbus_loom, tickbus_shuttle)))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(not(tickbus_shuttle))]
pub(crate) use std::{thread, thread_local};

#[cfg(tickbus_shuttle)]
pub(crate) use shuttle::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(tickbus_shuttle)]
pub(crate) use shuttle::{thread, thread_local};

#[cfg(tickbus_loom)]
pub(crate) use loom::cell::UnsafeCell;
#[cfg(tickbus_loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

/// A cell with loom's interface, so that loom sees who touches it when.
#[cfg(not(tickbus_loom))]
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(tickbus_loom))]
impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    #[inline(always)]
    pub(crate) fn with<O>(&self, f: impl FnOnce(*const T) -> O) -> O {
        f(self.0.get())
    }

    #[inline(always)]
    pub(crate) fn with_mut<O>(&self, f: impl FnOnce(*mut T) -> O) -> O {
        f(self.0.get())
    }
}

/// Lets others run in a loop that waits for another thread's next instructions.
#[inline]
pub(crate) fn wait_a_moment(rounds: &mut u32) {
    #[cfg(tickbus_loom)]
    loom::thread::yield_now();
    #[cfg(not(tickbus_loom))]
    match *rounds < 64 && cfg!(not(tickbus_shuttle)) {
        true => std::hint::spin_loop(),
        // It may have lost its core.
        false => thread::yield_now(),
    }
    *rounds = rounds.saturating_add(1);
}

/// The mutual exclusion under which a bus publishes and a subscription reads.
///
/// The default, [`ThreadExclusion`], is a small lock. A runtime that already runs one thread at a
/// time (CPython with its global interpreter lock) supplies one that costs nothing.
///
/// # Safety
///
/// While one thread is between `lock` and `unlock`, no other thread may get past `lock` of the
/// same value, and what happened before `unlock` happens before the next `lock` returns.
/// If `SERIALIZES_SLEEP` is true, arming a sleeper and looking for events may not interleave with
/// publishing in any other thread.
pub unsafe trait Exclusion: lock_api::RawMutex + Send + Sync + 'static {
    /// The queue between publishers, who push one at a time, and readers, who take one at a time.
    /// Both may do so at the same moment, and publishers take too, to overwrite.
    type Queue<E>: EventQueue<E>;

    /// Whether arming, checking and publishing are serialized by something outside the bus, which
    /// makes the store-load fence of the wake-up protocol superfluous and locking free.
    const SERIALIZES_SLEEP: bool;
}

/// The lock used by Rust threads.
#[cfg(not(tickbus_shuttle))]
pub type ThreadExclusion = parking_lot::RawMutex;
/// The lock used by threads of shuttle.
#[cfg(tickbus_shuttle)]
pub type ThreadExclusion = shuttled::RawMutex;

// SAFETY: parking_lot's RawMutex is a mutual exclusion lock with acquire and release ordering, and
// so is the semaphore of one permit that stands for it; the fence is kept.
unsafe impl Exclusion for ThreadExclusion {
    type Queue<E> = CrossbeamQueue<E>;

    const SERIALIZES_SLEEP: bool = false;
}

pub(crate) type Mutex<R, T> = lock_api::Mutex<R, T>;

/// A lock between threads, whatever the bus's exclusion.
#[cfg(not(tickbus_loom))]
pub(crate) type ThreadMutex<T> = Mutex<ThreadExclusion, T>;

/// As above, seen by loom.
#[cfg(tickbus_loom)]
#[derive(Debug)]
pub(crate) struct ThreadMutex<T>(loom::sync::Mutex<T>);

#[cfg(tickbus_loom)]
impl<T> ThreadMutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Shuttle runs its threads on a single one of the system, which a lock of the system would stop
/// for good while another thread holds it.
#[cfg(tickbus_shuttle)]
mod shuttled {
    use shuttle::future::batch_semaphore::{BatchSemaphore, Fairness};

    #[derive(Debug)]
    #[allow(unnameable_types, reason = "it is named by its alias")]
    pub struct RawMutex(BatchSemaphore);

    // SAFETY: there is one permit; `lock` returns with it and `unlock` gives it back.
    unsafe impl lock_api::RawMutex for RawMutex {
        const INIT: Self = Self(BatchSemaphore::const_new(1, Fairness::Unfair));
        type GuardMarker = lock_api::GuardSend;

        fn lock(&self) {
            // It fails only when it is closed, which nobody does.
            _ = self.0.acquire_blocking(1);
        }

        fn try_lock(&self) -> bool {
            self.0.try_acquire(1).is_ok()
        }

        unsafe fn unlock(&self) {
            self.0.release(1);
        }
    }
}

/// The full fence between a store and a later load of another variable (the two halves of a
/// Dekker handshake), unless the exclusion already orders them.
#[inline]
pub(crate) fn store_load_fence<R: Exclusion>() {
    if !R::SERIALIZES_SLEEP {
        // ORDERING: pairs with the same fence on the other side of the handshake; wait.rs has
        // the table.
        full_fence();
    }
}

/// ORDERING: of two threads that pass here, one comes first and the other sees its stores.
#[inline]
pub(crate) fn full_fence() {
    #[cfg(not(tickbus_tsan))]
    fence(Ordering::SeqCst);
    // ThreadSanitizer does not see fences. Changing one variable orders at least as much: of
    // two threads that do it, the second sees what the first did before.
    #[cfg(tickbus_tsan)]
    {
        static ORDERED: AtomicUsize = AtomicUsize::new(0);
        ORDERED.fetch_add(1, Ordering::SeqCst);
    }
}

/// The fence of a seqlock between its counter and its words, which are atomics.
#[inline]
pub(crate) fn words_fence(ordering: Ordering) {
    #[cfg(not(tickbus_tsan))]
    fence(ordering);
    // ThreadSanitizer does not see fences, and words that are atomics are no race without one.
    #[cfg(tickbus_tsan)]
    std::sync::atomic::compiler_fence(ordering);
}

/// A number with one writer at a time and any number of readers, who may see it a little late.
#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Default for Counter {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Counter {
    /// Returns the number, which may be a little old.
    #[inline]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds without a locked instruction; the caller holds the exclusion that makes it the only
    /// writer.
    #[inline]
    pub fn add_exclusive(&self, n: u64) {
        self.0.store(self.value() + n, Ordering::Relaxed);
    }

    /// Adds from any thread.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Raises the number to at least `value`, from any thread, and returns what it is then.
    #[inline]
    pub(crate) fn raise(&self, value: u64) -> u64 {
        match self.observe() {
            higher if higher >= value => higher,
            // ORDERING: pairs with `observe`.
            _ => self.0.fetch_max(value, Ordering::AcqRel).max(value),
        }
    }

    /// Changes the number; the caller is the only writer and what it wrote before does not matter.
    #[inline]
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Publishes a value together with everything written before it.
    #[inline]
    pub fn publish(&self, value: u64) {
        // ORDERING: pairs with `observe`.
        self.0.store(value, Ordering::Release);
    }

    /// Changes the number, unlike `set` at once with any [`Counter::exchange`] of another thread.
    #[inline]
    pub(crate) fn replace(&self, value: u64) {
        self.0.swap(value, Ordering::Relaxed);
    }

    /// Changes the number if it is `from` still, and returns whether it was.
    #[inline]
    pub(crate) fn exchange(&self, from: u64, to: u64) -> bool {
        self.0.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Publishes a value and what others published by this number, unless it is `from` no more: then
    /// `Err` is what it is.
    #[inline]
    pub(crate) fn advance(&self, from: u64, to: u64) -> Result<(), u64> {
        // ORDERING: pairs with `observe`, and with full fences between a store and `latest`.
        self.0.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).map(|_| ())
    }

    /// As [`Counter::observe`], in one order with each [`Counter::advance`] and with full fences.
    #[inline]
    pub(crate) fn latest(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Reads a published value; what was written before it is visible afterwards.
    #[inline]
    pub fn observe(&self) -> u64 {
        // ORDERING: pairs with `publish`.
        self.0.load(Ordering::Acquire)
    }
}

/// A switch.
#[derive(Debug)]
pub struct Flag(AtomicBool);

impl Default for Flag {
    fn default() -> Self {
        Self(AtomicBool::new(false))
    }
}

impl Flag {
    /// Returns whether it was set.
    #[inline]
    pub fn is_set(&self) -> bool {
        // ORDERING: pairs with `set`: what was done before setting is visible to who sees it set.
        self.0.load(Ordering::Acquire)
    }

    /// Sets the switch and returns whether this call did it.
    pub fn set(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Takes [`Flag::set`] back.
    pub(crate) fn clear(&self) {
        // ORDERING: pairs with `set`.
        self.0.store(false, Ordering::Release);
    }
}
