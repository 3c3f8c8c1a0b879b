//! What a store knows of those from which it takes events, and they of it.

use super::error::StoreError;
use crate::select::Shutdown;
use crate::sync::Counter;
use parking_lot::Mutex;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, ThreadId, current};

/// What a store has detached itself from.
#[derive(Default)]
pub(super) struct Detached {
    pub(super) sources: Counter,
    /// Events of them that are not in the log, without a gap for them.
    pub(super) missed: Counter,
}

impl Detached {
    pub(super) fn count(&self, missed: u64) {
        self.missed.add(missed);
        self.sources.add(1);
    }
}

/// What both sides of an attachment know.
#[derive(Default)]
pub(super) struct Attached {
    pub(super) shutdown: Shutdown,
    pub(super) stored: Counter,
    pub(super) missed: Counter,
    pub(super) failure: OnceLock<StoreError>,
    /// Until it has ended.
    pub(super) thread: Mutex<Option<JoinHandle<()>>>,
    pub(super) thread_id: OnceLock<ThreadId>,
}

impl Attached {
    /// Stores what is pending and ends.
    pub(super) fn detach(&self) {
        self.shutdown.set();
        self.wait();
    }

    /// Waits until it has ended.
    fn wait(&self) {
        // Who is told of a failure is told on the thread itself.
        if self.thread_id.get() == Some(&current().id()) {
            return;
        }
        // Whoever comes meanwhile waits for the one who joins it.
        let mut thread = self.thread.lock();
        if let Some(thread) = thread.take() {
            // It panics only where the log or `on_failure` does.
            _ = thread.join();
        }
    }
}

/// A store that takes what a bus publishes. Dropping it leaves it attached.
#[derive(Clone)]
pub struct Attachment(pub(super) Arc<Attached>);

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("stored", &self.stored()).finish_non_exhaustive()
    }
}

impl Attachment {
    /// Returns how many events were appended.
    pub fn stored(&self) -> u64 {
        self.0.stored.value()
    }

    /// Returns how many events the store missed: where, the gaps in the log say, up to where it has
    /// detached itself. What it had taken then and what was pending counts; what was published while it
    /// detached itself, or later, does not.
    pub fn missed(&self) -> u64 {
        self.0.missed.value()
    }

    /// Returns why the store has detached itself, if it has.
    pub fn failure(&self) -> Option<&StoreError> {
        self.0.failure.get()
    }

    /// Stores what is pending, and ends. Whoever publishes meanwhile may be stored or not.
    pub fn detach(&self) {
        self.0.detach();
    }

    /// Waits until the subscription is closed and all of it is stored, or the store has detached itself
    /// or was told to.
    pub fn wait(&self) {
        self.0.wait();
    }
}
