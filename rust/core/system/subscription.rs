//! One reader's claim on the events of all lanes.

use super::Ending;
use crate::error::{ConfigError, Lagged, TryRecvError};
use crate::event::{Event, Lane};
use crate::metrics::SubscriptionMetrics;
use crate::subscription::{EventSubscription, Parking};
use crate::sync::ThreadExclusion;
use crate::topic::Pattern;
use crate::wait::{Bell, Parked, PlaceInLine, breathe, entered, park_on};
use futures_core::Stream;
use std::fmt;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Events of one lane were overwritten, or found no room, before they were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missed} {} events were missed here; read on to go on, and read faster", lane.name())]
pub struct LaneLagged {
    /// The lane.
    pub lane: Lane,
    /// How many events of that lane are missing exactly here.
    pub missed: u64,
}

/// Why a subscription of an event system gave no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TakeError {
    /// None is pending, or none came in time.
    #[error("no event is pending")]
    Empty,
    /// Events of a lane are missing before its next one. The subscription stays open.
    #[error(transparent)]
    Lagged(#[from] LaneLagged),
    /// The system or the subscription is closed and everything was read.
    #[error("the subscription is closed and everything was read")]
    Closed,
}

/// A subscription of an [`EventSystem`](super::EventSystem): what is critical comes first, then what
/// is high, then the rest.
///
/// Dropping it closes it. Share it between threads and tasks by reference: they compete, and each
/// event goes to exactly one of them. Cancelling a future of it loses nothing.
pub struct SystemSubscription {
    /// In the order of [`Lane::ALL`].
    lanes: [EventSubscription<Event>; 3],
    bell: Arc<Bell>,
    ending: Arc<Ending>,
}

impl fmt::Debug for SystemSubscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemSubscription").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl Drop for SystemSubscription {
    fn drop(&mut self) {
        self.close();
    }
}

impl SystemSubscription {
    pub(super) fn new(
        lanes: [EventSubscription<Event>; 3],
        bell: Arc<Bell>,
        ending: Arc<Ending>,
    ) -> Self {
        Self { lanes, bell, ending }
    }

    /// Returns the subscription's id, unique in its system and the same in all lanes.
    pub fn id(&self) -> u64 {
        self.lanes[0].id()
    }

    /// Returns the name that it was given, if any.
    pub fn name(&self) -> Option<&str> {
        self.lanes[0].name()
    }

    /// Returns its pattern over the topics of events, if it does not want everything.
    pub fn pattern(&self) -> Option<&Pattern> {
        self.lanes[0].pattern()
    }

    /// Returns the most events of a lane that it can hold, a power of two.
    pub fn capacity(&self, lane: Lane) -> usize {
        self.lanes[lane as usize].capacity()
    }

    /// Returns how many events wait to be read.
    pub fn pending(&self) -> usize {
        self.lanes.iter().map(EventSubscription::pending).sum()
    }

    /// Returns whether it was closed, by itself or with its system.
    pub fn is_closed(&self) -> bool {
        self.lanes.iter().all(EventSubscription::is_closed)
    }

    /// Returns the subscription's numbers in a lane.
    pub fn metrics(&self, lane: Lane) -> SubscriptionMetrics {
        self.lanes[lane as usize].metrics()
    }

    /// As [`EventSubscription::feed_store`].
    pub fn feed_store(&self) {
        self.lanes.iter().for_each(EventSubscription::feed_store);
    }

    /// Leaves the system: what is pending is counted as `closed`, waiting publishers go on without
    /// this subscription, and waiting readers get `Closed`. Closing again does nothing.
    pub fn close(&self) {
        self.lanes.iter().for_each(EventSubscription::close);
        self.ending.tell();
    }

    /// Returns the next event if one is pending.
    ///
    /// # Errors
    ///
    /// `Empty`, `Lagged` where events of a lane are missing, `Closed` when everything was read.
    #[inline]
    pub fn try_recv(&self) -> Result<Event, TakeError> {
        let mut closed = 0;
        for (lane, subscription) in Lane::ALL.into_iter().zip(&self.lanes) {
            if subscription.is_quiet() {
                continue;
            }
            match subscription.try_recv() {
                Ok(event) => {
                    self.ending.tell();
                    return Ok(event);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Lagged(Lagged { missed, .. })) => {
                    return Err(LaneLagged { lane, missed }.into());
                }
                Err(TryRecvError::Closed) => closed += 1,
            }
        }
        Err(if closed == self.lanes.len() { TakeError::Closed } else { TakeError::Empty })
    }

    /// Gives up to `limit` pending events to `sink`, in the order in which `try_recv` would, and
    /// returns how many. A batch ends before a hole. `sink` runs under the reader's lock.
    ///
    /// # Errors
    ///
    /// As [`SystemSubscription::try_recv`], if there was no event before it.
    pub fn try_recv_each(
        &self,
        limit: usize,
        mut sink: impl FnMut(Event),
    ) -> Result<usize, TakeError> {
        if limit == 0 {
            return Ok(0);
        }
        sink(self.try_recv()?);
        let mut taken = 1;
        for subscription in self.lanes.iter().filter(|subscription| !subscription.is_quiet()) {
            taken += subscription.step_many(&mut sink, limit - taken);
            // What is left is a hole, or has just come: it goes before later lanes.
            if taken == limit || subscription.has_something() {
                break;
            }
        }
        self.ending.tell();
        Ok(taken)
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// `Lagged` where events of a lane are missing, `Closed` when everything was read.
    pub fn recv(&self) -> Result<Event, TakeError> {
        self.wait(None, || self.try_recv())
    }

    /// Waits for the next event, at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`SystemSubscription::recv`], and `Empty` if none came in time.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Event, TakeError> {
        match self.try_recv() {
            Err(TakeError::Empty) => {
                self.wait(Some(Instant::now().checked_add(timeout)), || self.try_recv())
            }
            result => result,
        }
    }

    /// Waits for an event, then takes what is there, up to `limit` events. A batch ends before a
    /// hole.
    ///
    /// # Errors
    ///
    /// As [`SystemSubscription::recv`].
    pub fn recv_many(&self, limit: usize) -> Result<Vec<Event>, TakeError> {
        let mut batch = Vec::new();
        self.wait(None, || self.try_recv_each(limit, |event| batch.push(event)))?;
        Ok(batch)
    }

    /// Waits until `take` gives something else than `Empty`; within the inner `Option`, `None` is
    /// a deadline too far to be told.
    fn wait<O>(
        &self,
        deadline: Option<Option<Instant>>,
        mut take: impl FnMut() -> Result<O, TakeError>,
    ) -> Result<O, TakeError> {
        loop {
            match take() {
                Err(TakeError::Empty) => {}
                result => return result,
            }
            let mut sleeper = self.bell.sleeper();
            sleeper.enter();
            self.fence();
            match take() {
                Err(TakeError::Empty) => {}
                result => return result,
            }
            if park_on(Pin::new(&mut sleeper), deadline.flatten()).is_none() {
                return take();
            }
        }
    }

    /// Waits for the next event without blocking the thread. It suspends once in every 256
    /// completions that were ready, so a busy reader cannot starve other tasks.
    ///
    /// # Errors
    ///
    /// As [`SystemSubscription::recv`].
    pub async fn recv_async(&self) -> Result<Event, TakeError> {
        self.wait_async(|| self.try_recv()).await
    }

    /// As [`SystemSubscription::recv_many`], without blocking the thread.
    ///
    /// # Errors
    ///
    /// As [`SystemSubscription::recv`].
    pub async fn recv_many_async(&self, limit: usize) -> Result<Vec<Event>, TakeError> {
        let mut batch = Vec::new();
        self.wait_async(|| self.try_recv_each(limit, |event| batch.push(event))).await?;
        Ok(batch)
    }

    async fn wait_async<O>(
        &self,
        mut take: impl FnMut() -> Result<O, TakeError>,
    ) -> Result<O, TakeError> {
        breathe().await;
        loop {
            match take() {
                Err(TakeError::Empty) => {}
                result => return result,
            }
            let mut sleeper = self.bell.sleeper();
            entered(&mut sleeper).await;
            self.fence();
            match take() {
                Err(TakeError::Empty) => {}
                result => return result,
            }
            sleeper.await;
        }
    }

    /// Returns whether receiving would give something else than `Empty`.
    pub fn is_ready(&self) -> bool {
        self.lanes.iter().any(|lane| !lane.is_quiet() && lane.is_ready())
    }

    /// As [`EventSubscription::sleep_unless_ready`].
    pub fn sleep_unless_ready(&self, sleep: impl FnOnce(&mut Parking<'_, '_>)) {
        let mut sleeper = self.bell.sleeper();
        sleeper.enter();
        self.fence();
        if !self.is_ready() {
            sleep(&mut Parking::new(Some(&mut sleeper)));
        }
    }

    /// As [`EventSubscription::pass_on`].
    pub fn pass_on(&self) {
        self.lanes.iter().for_each(EventSubscription::pass_on);
    }

    /// As [`EventSubscription::set_waker`].
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::set_waker`].
    pub fn set_waker(&self, waker: Waker) -> Result<bool, ConfigError> {
        self.lanes[0].set_waker(waker)
    }

    /// As [`EventSubscription::place_in_line`].
    pub fn place_in_line(&self) -> Option<PlaceInLine> {
        self.lanes[0].place_in_line()
    }

    /// Asks for wake-ups from all lanes. Look again before sleeping, and arm again to sleep on after
    /// a wake-up.
    pub fn arm(&self) {
        self.bell.arm::<ThreadExclusion>();
        self.fence();
    }

    /// Takes one [`SystemSubscription::arm`] back.
    pub fn disarm(&self) {
        self.bell.disarm::<ThreadExclusion>();
    }

    /// The fence of step S1, that of the rings: the costliest that a lane has, so it is good for
    /// all.
    fn fence(&self) {
        self.lanes[Lane::Normal as usize].fence();
    }
}

/// The events of a subscription as a `Stream`: it gives `Err(LaneLagged)` where events are missing
/// and ends when the subscription is closed and read. Dropping it loses nothing.
///
/// It is made of a reference, or of what shares or owns a subscription, such as an `Arc` or a `Box`:
///
/// ```
/// use std::sync::Arc;
/// use tickbus::{EventSystem, SystemStream};
///
/// let system = EventSystem::new(Default::default())?;
/// let subscription = system.subscribe(Default::default())?;
/// let borrowed = SystemStream::new(&subscription);
/// drop(borrowed);
/// let shared = SystemStream::new(Arc::new(subscription));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SystemStream<S: Deref<Target = SystemSubscription>> {
    subscription: S,
    /// Its place in line between two polls.
    parked: Parked,
}

impl<S: Deref<Target = SystemSubscription>> fmt::Debug for SystemStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemStream").field("id", &self.subscription.id()).finish_non_exhaustive()
    }
}

impl<S: Deref<Target = SystemSubscription>> SystemStream<S> {
    /// Returns a stream of what the subscription receives from now on.
    pub fn new(subscription: S) -> Self {
        Self { subscription, parked: Parked::default() }
    }
}

impl<S: Deref<Target = SystemSubscription>> Drop for SystemStream<S> {
    fn drop(&mut self) {
        self.parked.leave(&*self.subscription);
    }
}

// Nothing in it is pinned in place: the place in line is boxed.
impl<S: Deref<Target = SystemSubscription>> Unpin for SystemStream<S> {}

impl<S: Deref<Target = SystemSubscription>> Stream for SystemStream<S> {
    type Item = Result<Event, LaneLagged>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { subscription, parked } = &mut *self;
        parked.poll(context, &**subscription, |subscription| match subscription.try_recv() {
            Ok(event) => Some(Some(Ok(event))),
            Err(TakeError::Lagged(lagged)) => Some(Some(Err(lagged))),
            Err(TakeError::Closed) => Some(None),
            Err(TakeError::Empty) => None,
        })
    }
}
