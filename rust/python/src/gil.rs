//! The global interpreter lock as the bus's mutual exclusion.
//!
//! Every call into an object bus is made by a thread that is attached to the interpreter, and the
//! core runs no Python code between `lock` and `unlock`, so nothing can switch threads there.

use lock_api::{GuardNoSend, RawMutex};
use std::cell::{Cell, UnsafeCell};
use std::collections::VecDeque;
use std::sync::Arc;

/// A lock that is held by being attached to the interpreter.
#[derive(Debug)]
pub(crate) struct Gil {
    #[cfg(debug_assertions)]
    held: std::sync::atomic::AtomicBool,
}

// SAFETY: only attached threads lock it, and no thread detaches or runs Python code (which could
// switch threads) while it holds it; debug builds check that.
unsafe impl RawMutex for Gil {
    const INIT: Self = Self {
        #[cfg(debug_assertions)]
        held: std::sync::atomic::AtomicBool::new(false),
    };

    type GuardMarker = GuardNoSend;

    #[inline]
    fn lock(&self) {
        #[cfg(debug_assertions)]
        assert!(
            !self.held.swap(true, std::sync::atomic::Ordering::Relaxed),
            "Python code ran under a lock of the bus"
        );
    }

    #[inline]
    fn try_lock(&self) -> bool {
        self.lock();
        true
    }

    #[inline]
    unsafe fn unlock(&self) {
        #[cfg(debug_assertions)]
        self.held.store(false, std::sync::atomic::Ordering::Relaxed);
    }
}

// SAFETY: as above; arming, checking and publishing all happen attached, so they are serialized.
unsafe impl tickbus::Exclusion for Gil {
    type Queue<E> = GilQueue<E>;

    const SERIALIZES_SLEEP: bool = true;
}

/// A value that only attached threads touch, each for no longer than it runs no Python code.
#[derive(Debug, Default)]
pub(crate) struct GilCell<T>(UnsafeCell<T>);

// SAFETY: access is serialized by the global interpreter lock, see `with`.
unsafe impl<T: Send> Sync for GilCell<T> {}

impl<T> GilCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Runs `f` on the value. `f` must run no Python code, which includes dropping Python objects:
    /// every caller in this crate keeps to moving values in and out.
    #[inline]
    pub(crate) fn with<O>(&self, f: impl FnOnce(&mut T) -> O) -> O {
        // SAFETY: the thread is attached and `f` runs no Python code, so neither another thread
        // nor this one can get here before `f` returns.
        f(unsafe { &mut *self.0.get() })
    }
}

/// A switch that only attached threads touch.
#[derive(Debug, Default)]
pub(crate) struct GilFlag(Cell<bool>);

// SAFETY: access is serialized by the global interpreter lock.
unsafe impl Sync for GilFlag {}

impl GilFlag {
    /// Switches on and returns whether it was off.
    #[inline]
    pub(crate) fn set(&self) -> bool {
        !self.0.replace(true)
    }

    #[inline]
    pub(crate) fn is_set(&self) -> bool {
        self.0.get()
    }

    /// Switches off and returns whether it was on.
    #[inline]
    pub(crate) fn clear(&self) -> bool {
        self.0.replace(false)
    }
}

/// A bounded queue between attached threads: a plain one, because they take turns.
#[derive(Debug)]
pub(crate) struct GilQueue<E>(Arc<GilCell<Bounded<E>>>);

#[derive(Debug)]
struct Bounded<E> {
    entries: VecDeque<E>,
    capacity: usize,
}

impl<E> Clone for GilQueue<E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<E> tickbus::EventQueue<E> for GilQueue<E> {
    fn bounded(capacity: usize) -> Self {
        let entries = VecDeque::with_capacity(capacity);
        Self(Arc::new(GilCell::new(Bounded { entries, capacity })))
    }

    #[inline]
    fn push(&self, entry: E) -> Result<(), E> {
        self.0.with(|queue| {
            if queue.entries.len() == queue.capacity {
                return Err(entry);
            }
            queue.entries.push_back(entry);
            Ok(())
        })
    }

    #[inline]
    fn pop(&self) -> Option<E> {
        self.0.with(|queue| queue.entries.pop_front())
    }

    #[inline]
    fn len(&self) -> usize {
        self.0.with(|queue| queue.entries.len())
    }
}
