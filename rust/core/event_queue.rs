//! `LockFreeEventQueue`: many producers, many consumers, each event to exactly one of them.
//!
//! It is a bus with one subscription, whose policy is `reject` and which everybody reads: the
//! waiting lines, the wake-ups and what cancelling and closing mean are those of the bus. An event
//! is moved and never cloned, since there is one who wants it.

use crate::bus::{Backend, Bus, BusConfig, Patience, SubscribeOptions};
use crate::error::{
    ConfigError, DequeueError, EnqueueError, PublishError, RecvError, RecvTimeoutError,
    TryRecvError,
};
use crate::policy::Policy;
use crate::subscription::AsyncEventSubscription;
use crate::wait::breathe;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A bounded queue between any threads and tasks. Clones are handles of the same queue; dropping
/// the last one drops what it holds.
///
/// Events of one producer are dequeued in its order. Waiting producers and waiting consumers are
/// served in the order in which they came, but a consumer that comes to a queue with events takes
/// one at once. An error means that nobody has the event.
///
/// ```
/// use tickbus::{EnqueueError, LockFreeEventQueue};
///
/// let queue = LockFreeEventQueue::new(2)?;
/// queue.enqueue("a")?;
/// queue.enqueue("b")?;
/// assert_eq!(queue.enqueue("c"), Err(EnqueueError::Full("c")));
/// assert_eq!((queue.size(), queue.capacity(), queue.is_empty()), (2, 2, false));
/// assert_eq!(queue.dequeue()?, "a");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LockFreeEventQueue<T: Clone> {
    bus: Bus<T>,
    reading: Arc<AsyncEventSubscription<T>>,
}

impl<T: Clone> Clone for LockFreeEventQueue<T> {
    fn clone(&self) -> Self {
        Self { bus: self.bus.clone(), reading: self.reading.clone() }
    }
}

impl<T: Clone> fmt::Debug for LockFreeEventQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockFreeEventQueue")
            .field("size", &self.size())
            .field("capacity", &self.capacity())
            .field("is_closed", &self.is_closed())
            .finish()
    }
}

impl<T: Clone> LockFreeEventQueue<T> {
    /// Returns an empty queue of the given capacity in events, rounded up to a power of two.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the capacity is zero or too large.
    pub fn new(capacity: usize) -> Result<Self, ConfigError> {
        let config = BusConfig { capacity, latency_sampling: None, ..Default::default() };
        let bus = Bus::new(Backend::LockFree, config)?;
        let options = SubscribeOptions { policy: Some(Policy::Reject), ..Default::default() };
        let Ok(subscription) = bus.subscribe_with(options) else {
            unreachable!("a new bus is open, and keeps the policy")
        };
        Ok(Self { bus, reading: Arc::new(subscription.into()) })
    }

    /// Returns the number of events that wait to be dequeued.
    pub fn size(&self) -> usize {
        self.reading.pending()
    }

    /// Returns whether none waits.
    pub fn is_empty(&self) -> bool {
        self.size() == 0
    }

    /// Returns the most events that it holds, a power of two.
    pub fn capacity(&self) -> usize {
        self.reading.capacity()
    }

    /// Returns whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.bus.is_closed()
    }

    /// Ends enqueueing at once; consumers first dequeue what is there.
    pub fn close(&self) {
        self.bus.close();
    }

    /// Appends an event. Never waits for room.
    ///
    /// # Errors
    ///
    /// `Full` if there is no room, or producers that came before wait for it; `Closed` after
    /// `close()`.
    #[inline]
    pub fn enqueue(&self, event: T) -> Result<(), EnqueueError<T>> {
        let entry = self.bus.enter();
        let Err(event) = self.bus.publish_ready(event, None, entry) else { return Ok(()) };
        self.bus.publication_since(entry, event, None, false).poll(Patience::Spent)?;
        Ok(())
    }

    /// Appends an event, waiting for room at most `timeout`.
    ///
    /// # Errors
    ///
    /// `Full` if there was no room in time, `Closed` after `close()`.
    pub fn enqueue_timeout(&self, event: T, timeout: Duration) -> Result<(), EnqueueError<T>> {
        let mut publication = self.bus.publication(event, None, true);
        publication.run(|| Instant::now().checked_add(timeout))?;
        Ok(())
    }

    /// Appends an event, waiting its turn without blocking the thread. Cancelled, nobody has the
    /// event.
    ///
    /// # Errors
    ///
    /// `Closed` after `close()`.
    pub fn enqueue_async(&self, event: T) -> impl Future<Output = Result<(), EnqueueError<T>>> {
        let mut publication = self.bus.owned_publication(event, None, true);
        async move {
            breathe().await;
            while publication.poll(Patience::Left)?.is_none() {
                publication.notified().await;
            }
            Ok(())
        }
    }

    /// Takes the oldest event, waiting for one.
    ///
    /// # Errors
    ///
    /// `Closed` when the queue is closed and everything was dequeued.
    pub fn dequeue(&self) -> Result<T, DequeueError> {
        self.reading.subscription().recv().map_err(DequeueError::from)
    }

    /// Takes the oldest event, if there is one. Never waits.
    ///
    /// # Errors
    ///
    /// `Empty` if there is none, `Closed` when the queue is closed and everything was dequeued.
    #[inline]
    pub fn try_dequeue(&self) -> Result<T, DequeueError> {
        self.reading.try_recv().map_err(DequeueError::from)
    }

    /// Takes the oldest event, waiting for one at most `timeout`.
    ///
    /// # Errors
    ///
    /// `Empty` if none came in time, `Closed` when the queue is closed and everything was
    /// dequeued.
    pub fn dequeue_timeout(&self, timeout: Duration) -> Result<T, DequeueError> {
        self.reading.subscription().recv_timeout(timeout).map_err(DequeueError::from)
    }

    /// Takes the oldest event, waiting for one without blocking the thread. Cancelled at any point,
    /// nothing is lost.
    ///
    /// # Errors
    ///
    /// `Closed` when the queue is closed and everything was dequeued.
    pub async fn dequeue_async(&self) -> Result<T, DequeueError> {
        self.reading.recv().await.map_err(DequeueError::from)
    }
}

impl<T> From<PublishError<T>> for EnqueueError<T> {
    fn from(error: PublishError<T>) -> Self {
        match error {
            PublishError::Full { event, .. } | PublishError::Timeout { event, .. } => {
                Self::Full(event)
            }
            PublishError::Closed(event) => Self::Closed(event),
            PublishError::Key { .. }
            | PublishError::Reserved(_)
            | PublishError::Overflow { .. } => {
                unreachable!("a queue has neither keys nor a Producer, and nothing is critical")
            }
        }
    }
}

impl From<TryRecvError> for DequeueError {
    fn from(error: TryRecvError) -> Self {
        match error {
            TryRecvError::Empty => Self::Empty,
            TryRecvError::Closed => Self::Closed,
            TryRecvError::Lagged(_) => unreachable!("a queue overwrites and refuses nothing"),
        }
    }
}

impl From<RecvTimeoutError> for DequeueError {
    fn from(error: RecvTimeoutError) -> Self {
        match error {
            RecvTimeoutError::Timeout => Self::Empty,
            RecvTimeoutError::Closed => Self::Closed,
            RecvTimeoutError::Lagged(_) => unreachable!("a queue overwrites and refuses nothing"),
        }
    }
}

impl From<RecvError> for DequeueError {
    fn from(error: RecvError) -> Self {
        match error {
            RecvError::Closed => Self::Closed,
            RecvError::Lagged(_) => unreachable!("a queue overwrites and refuses nothing"),
        }
    }
}
