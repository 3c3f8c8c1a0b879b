//! One error per operation; the event comes back inside, so that nothing is lost by an error.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// A configuration that a bus cannot keep.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub(crate) String);

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Why a symbol or a source was not named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The name could not be a part of a topic.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
    /// The table is full.
    #[error(
        "{what} {name:?} would be number {}; a process knows at most {limit}: names are a bounded \
         vocabulary, put what varies into the event",
        *limit as u64 + 1
    )]
    Full {
        /// What is named: a symbol or a source.
        what: &'static str,
        /// The name that found no room.
        name: Box<str>,
        /// The most names that the table can have.
        limit: u32,
    },
}

/// Why a code was not registered as an event type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventTypeError {
    /// The name could not be a level of a topic.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
    /// The name has another code.
    #[error(
        "event type {name:?} was to be code {code}, but it is {known} already; use that one, or \
         another name"
    )]
    NameTaken {
        /// The name.
        name: Box<str>,
        /// The code that was wanted for it.
        code: u8,
        /// The code that it has.
        known: u8,
    },
    /// The code has another name.
    #[error(
        "event type {code} was to be named {name:?}, but it is {known:?} already; take a code \
         that is free"
    )]
    CodeTaken {
        /// The code.
        code: u8,
        /// The name that was wanted for it.
        name: Box<str>,
        /// The name that it has.
        known: &'static str,
    },
}

/// A timestamp after 2262-04-11, which does not fit into a signed number of nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "event {place} has the timestamp {timestamp}; columns hold nanoseconds up to 2^63 - 1: give \
     it a right one, or 0 for unknown"
)]
pub struct TimestampError {
    /// Which event, from 0.
    pub place: usize,
    /// Its timestamp.
    pub timestamp: u64,
}

/// Why an event was not published; nobody has it, so a retry never doubles.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError<T> {
    /// A `reject` subscription had no room.
    #[error(
        "subscriptions {subscriptions:?} had no room and their policy is reject; nobody has the \
         event: publish it again once they have read"
    )]
    Full {
        /// The event, given back.
        event: T,
        /// The subscriptions without room.
        subscriptions: Vec<u64>,
    },
    /// A `reject` subscription had no room until the patience ended.
    #[error(
        "subscriptions {subscriptions:?} had no room until the timeout; nobody has the event: \
         publish it again once they have read"
    )]
    Timeout {
        /// The event, given back.
        event: T,
        /// The subscriptions without room.
        subscriptions: Vec<u64>,
    },
    /// Some subscriptions had no room for a critical event until the patience ended; the others
    /// have it. Only an [`EventSystem`](crate::EventSystem) publishes so.
    #[error(
        "subscriptions {missing:?} had no room for a critical event, {taken} others have it: retry \
         for those that miss it"
    )]
    Overflow {
        /// The event, given back.
        event: T,
        /// How many subscriptions have it.
        taken: usize,
        /// The subscriptions that do not.
        missing: Vec<u64>,
    },
    /// The bus is closed.
    #[error("the bus is closed; events can be published only before close()")]
    Closed(T),
    /// The bus has a [`Producer`](crate::Producer), which alone publishes.
    #[error(
        "the bus has a Producer, and nobody else publishes as long as it lives: publish through \
         it, or drop it"
    )]
    Reserved(T),
    /// The key function of a `conflate` subscription failed.
    #[error("{error}")]
    Key {
        /// The event, given back.
        event: T,
        /// How it failed.
        error: KeyError,
    },
}

impl<T> PublishError<T> {
    /// Returns the event that was not published, or not to all.
    pub fn into_event(self) -> T {
        match self {
            Self::Full { event, .. }
            | Self::Timeout { event, .. }
            | Self::Overflow { event, .. }
            | Self::Closed(event)
            | Self::Reserved(event)
            | Self::Key { event, .. } => event,
        }
    }
}

impl<T> fmt::Debug for PublishError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { subscriptions, .. } => write!(f, "Full({subscriptions:?})"),
            Self::Timeout { subscriptions, .. } => write!(f, "Timeout({subscriptions:?})"),
            Self::Overflow { missing, .. } => write!(f, "Overflow({missing:?})"),
            Self::Closed(_) => f.write_str("Closed"),
            Self::Reserved(_) => f.write_str("Reserved"),
            Self::Key { error, .. } => write!(f, "Key({error:?})"),
        }
    }
}

/// The error of a key function, shared; equal to itself and its clones.
#[derive(Debug, Clone, thiserror::Error)]
#[error("a key function failed, nobody has the event: {0}")]
pub struct KeyError(#[source] Arc<dyn Error + Send + Sync>);

impl KeyError {
    /// Returns the error, shared.
    pub fn new(error: impl Error + Send + Sync + 'static) -> Self {
        Self(Arc::new(error))
    }

    /// Returns the error that the key function gave, if it was an `E`.
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

impl PartialEq for KeyError {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for KeyError {}

/// Where `publish_many` stopped: the first `accepted` events were published, the rest were not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{accepted} events were published, then: {error}")]
pub struct PublishManyError<T> {
    /// How many events were published.
    pub accepted: usize,
    /// Why the next one was not; it carries that event.
    pub error: PublishError<T>,
}

/// Events were overwritten or refused before they were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{missed} events were missed here; read on to go on, or give the subscription more capacity"
)]
pub struct Lagged {
    /// How many events are missing exactly here.
    pub missed: u64,
    /// False where `missed` also counts events that the subscription had not wanted (a pattern on
    /// the broadcast backend).
    pub exact: bool,
}

/// Why `recv` returned no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// Events are missing before the next one. The subscription stays open.
    #[error(transparent)]
    Lagged(#[from] Lagged),
    /// The bus or the subscription is closed and everything was read.
    #[error("the subscription is closed and everything was read")]
    Closed,
}

/// Why `try_recv` returned no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TryRecvError {
    /// Nothing is pending.
    #[error("no event is pending")]
    Empty,
    /// Events are missing before the next one. The subscription stays open.
    #[error(transparent)]
    Lagged(#[from] Lagged),
    /// The bus or the subscription is closed and everything was read.
    #[error("the subscription is closed and everything was read")]
    Closed,
}

/// Why nothing is replayed into a bus or a system: it is not the replay's alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayRefused {
    /// A store takes what is published.
    #[error(
        "a store is attached to what was to be replayed into; detach it, replay into another one, or \
         ask for mixed, with which stores leave out what is replayed"
    )]
    Store,
    /// Others publish too.
    #[error(
        "others have published {events} events into what was to be replayed into; replay into one \
         that is the replay's alone, or ask for mixed"
    )]
    Publisher {
        /// How many events.
        events: u64,
    },
    /// Another replay goes on.
    #[error(
        "another replay goes on into what was to be replayed into; wait for its end, or ask for mixed"
    )]
    Replay,
}

/// Why `recv_timeout` returned no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecvTimeoutError {
    /// No event came in time.
    #[error("no event came within the timeout")]
    Timeout,
    /// Events are missing before the next one. The subscription stays open.
    #[error(transparent)]
    Lagged(#[from] Lagged),
    /// The bus or the subscription is closed and everything was read.
    #[error("the subscription is closed and everything was read")]
    Closed,
}

/// Why an event was not enqueued; nobody has it.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnqueueError<T> {
    /// There was no room, or none in time.
    #[error(
        "the queue had no room; nobody has the event: enqueue it again once some were dequeued"
    )]
    Full(T),
    /// The queue is closed.
    #[error("the queue is closed; events can be enqueued only before close()")]
    Closed(T),
}

impl<T> EnqueueError<T> {
    /// Returns the event that was not enqueued.
    pub fn into_event(self) -> T {
        match self {
            Self::Full(event) | Self::Closed(event) => event,
        }
    }
}

impl<T> fmt::Debug for EnqueueError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "Full",
            Self::Closed(_) => "Closed",
        })
    }
}

/// Why no event was dequeued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DequeueError {
    /// There was none, or none came in time.
    #[error("no event is there to be dequeued")]
    Empty,
    /// The queue is closed and everything was dequeued.
    #[error("the queue is closed and everything was dequeued")]
    Closed,
}
