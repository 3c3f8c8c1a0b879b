//! The lock of a runtime that runs one thread at a time, such as an interpreter's.

use tickbus::{CrossbeamQueue, Exclusion, ThreadExclusion};

/// A lock that says that it serializes who goes to sleep.
pub struct Serial(ThreadExclusion);

// SAFETY: the lock inside excludes.
unsafe impl lock_api::RawMutex for Serial {
    const INIT: Self = Self(<ThreadExclusion as lock_api::RawMutex>::INIT);

    type GuardMarker = <ThreadExclusion as lock_api::RawMutex>::GuardMarker;

    fn lock(&self) {
        self.0.lock();
    }

    fn try_lock(&self) -> bool {
        self.0.try_lock()
    }

    unsafe fn unlock(&self) {
        // SAFETY: whoever calls this holds the lock inside.
        unsafe { self.0.unlock() }
    }
}

// SAFETY: whoever uses it runs one thread, or is about what happens where that is not so.
unsafe impl Exclusion for Serial {
    type Queue<E> = CrossbeamQueue<E>;

    const SERIALIZES_SLEEP: bool = true;
}
