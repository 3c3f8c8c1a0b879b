//! What is told of a critical event that some subscriptions have no room for, and how it goes on.

use super::SystemError;
use crate::bus::{Patience, Publication, Shared};
use crate::error::PublishError;
use crate::event::Event;
use crate::sync::ThreadExclusion;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Some subscriptions had no room for a critical event until the publisher's patience ended. The
/// others have it. Those that miss it are told [`LaneLagged`](super::LaneLagged) where it is
/// missing, whatever becomes of it later.
///
/// A retry reaches those that miss it and nobody else, so it doubles nothing; for them the event
/// comes after the hole that told of it.
#[derive(Clone)]
pub struct CriticalOverflow {
    event: Event,
    topic: u32,
    taken: usize,
    missing: Vec<u64>,
    patience: Duration,
    shared: Arc<Shared<Event, ThreadExclusion>>,
}

impl fmt::Debug for CriticalOverflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CriticalOverflow")
            .field("event", &self.event)
            .field("taken", &self.taken)
            .field("missing", &self.missing)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for CriticalOverflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { missing, taken, .. } = self;
        write!(
            f,
            "subscriptions {missing:?} had no room for a critical event, {taken} others have it: \
             retry() reaches those that miss it, and nobody twice"
        )
    }
}

impl std::error::Error for CriticalOverflow {}

impl CriticalOverflow {
    /// Returns the event.
    pub fn event(&self) -> Event {
        self.event
    }

    /// Returns how many subscriptions have the event.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Returns the ids of the subscriptions that miss the event.
    pub fn missing(&self) -> &[u64] {
        &self.missing
    }

    /// Returns how long a retry waits without a word about it.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Publishes the event again to those that miss it and are still open, waiting as long as
    /// `publish` does, and returns how many took it.
    ///
    /// # Errors
    ///
    /// What is left of it, if some still have no room or the system is closed.
    pub fn retry(self) -> Result<usize, Self> {
        let patience = self.patience;
        self.retry_timeout(patience)
    }

    /// As [`CriticalOverflow::retry`], waiting at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`CriticalOverflow::retry`].
    pub fn retry_timeout(self, timeout: Duration) -> Result<usize, Self> {
        match self.publication().run(|| Instant::now().checked_add(timeout)) {
            Err(SystemError::Overflow(left)) => Err(left),
            Err(_) => Err(self),
            Ok(taken) => Ok(taken),
        }
    }

    /// Begins to publish the event again, to be polled.
    pub fn publication(&self) -> CriticalPublication {
        CriticalPublication {
            publication: self.shared.publication_again(self.event, self.topic, &self.missing),
            topic: self.topic,
            taken: self.taken,
            patience: self.patience,
            shared: self.shared.clone(),
        }
    }
}

/// A critical event on its way: [`CriticalPublication::poll`] it until it is done. Dropping it
/// before that means that nobody else gets the event; if some have it, the others are told that
/// they miss it.
#[derive(Debug)]
pub struct CriticalPublication {
    publication: Publication<Arc<Shared<Event, ThreadExclusion>>, Event, ThreadExclusion>,
    topic: u32,
    /// How many had the event before.
    taken: usize,
    patience: Duration,
    shared: Arc<Shared<Event, ThreadExclusion>>,
}

impl CriticalPublication {
    pub(super) fn new(
        publication: Publication<Arc<Shared<Event, ThreadExclusion>>, Event, ThreadExclusion>,
        topic: u32,
        patience: Duration,
        shared: Arc<Shared<Event, ThreadExclusion>>,
    ) -> Self {
        Self { publication, topic, taken: 0, patience, shared }
    }

    /// Returns how long `publish` waits for those without room.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Gives the event to every subscription with room that has not got it yet. Returns how many
    /// took it, or `None` if it has to wait for others, which happens only with
    /// [`Patience::Left`].
    ///
    /// # Errors
    ///
    /// `Overflow` if some miss it for good, `Closed` if nobody has it and nobody will.
    pub fn poll(&mut self, patience: Patience) -> Result<Option<usize>, SystemError> {
        self.publication.poll(patience).map_err(|error| self.told(error))
    }

    /// Publishes, waiting in this thread until the deadline at most; `None` is no deadline.
    pub(super) fn run(
        &mut self,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Result<usize, SystemError> {
        self.publication.run(deadline).map_err(|error| self.told(error))
    }

    fn told(&self, error: PublishError<Event>) -> SystemError {
        match error {
            PublishError::Overflow { event, taken, missing } => {
                SystemError::Overflow(CriticalOverflow {
                    event,
                    topic: self.topic,
                    taken: self.taken + taken,
                    missing,
                    patience: self.patience,
                    shared: self.shared.clone(),
                })
            }
            error => SystemError::Closed(error.into_event()),
        }
    }

    /// Parks the thread until room was freed or the deadline has passed; false if it passed.
    pub fn park(&self, deadline: Option<Instant>) -> bool {
        self.publication.park(deadline)
    }

    /// Waits until it is worth polling again.
    pub async fn notified(&self) {
        self.publication.notified().await;
    }

    /// Returns where the publication waits for room, once it has to.
    pub fn notify(&self) -> Option<&Arc<Notify>> {
        self.publication.notify()
    }

    /// Returns the subscriptions without room for the event.
    pub fn without_room(&self) -> smallvec::SmallVec<[u64; 4]> {
        self.publication.without_room()
    }
}
