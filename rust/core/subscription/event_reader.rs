//! A subscription that one thread reads by reference.

use super::{EventSubscription, Step, received};
use crate::backend::wanting;
use crate::error::{Lagged, RecvError, TryRecvError};
use crate::metrics::SubscriptionMetrics;
use crate::policy::OnLag;
use crate::ring::reader::{BATCH, Missed, RingReader};
use crate::sync::{Counter, Exclusion, ThreadExclusion, wait_a_moment};
use crate::wait::{WaitStrategy, park_on};
use std::fmt;
use std::pin::Pin;

/// Who read fewer events than these, and found them at its first look, is faster than the publisher:
/// it fetches the lines that the publisher writes for every event, which slows down both. So it
/// stays behind for about half a microsecond.
const CLOSE_BEHIND: usize = 16;
const PAUSES_CLOSE_BEHIND: u32 = 16;

/// A subscription in the hands of one reader, who sees events where they are.
///
/// On a ring it reads without a lock and without a copy, up to 64 events for each look at its
/// place, whose slots publishers leave alone meanwhile. Elsewhere each event is taken out first.
pub struct EventReader<T: Clone, R: Exclusion = ThreadExclusion> {
    subscription: EventSubscription<T, R>,
    ring: Option<RingReader<T, R>>,
    /// By topic id, whether the pattern wants it, as far as known.
    wanted: Vec<Option<bool>>,
    is_close_behind: bool,
}

impl<T: Clone, R: Exclusion> fmt::Debug for EventReader<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventReader").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl<T: Clone, R: Exclusion> From<EventSubscription<T, R>> for EventReader<T, R> {
    fn from(subscription: EventSubscription<T, R>) -> Self {
        let ring = subscription.inbox.reader.lock().lend();
        Self { subscription, ring, wanted: Vec::new(), is_close_behind: false }
    }
}

/// Events that were read, to be counted also if a user's code panics.
struct Delivered<'a> {
    counter: &'a Counter,
    count: usize,
}

impl Drop for Delivered<'_> {
    #[inline]
    fn drop(&mut self) {
        self.counter.add_exclusive(self.count as u64);
    }
}

impl<T: Clone, R: Exclusion> EventReader<T, R> {
    /// Returns the subscription's id, unique in its bus.
    pub fn id(&self) -> u64 {
        self.subscription.id()
    }

    /// Returns how many events wait to be read.
    pub fn pending(&self) -> usize {
        self.subscription.pending()
    }

    /// Returns the subscription's numbers.
    pub fn metrics(&self) -> SubscriptionMetrics {
        self.subscription.metrics()
    }

    /// Leaves the bus, as [`EventSubscription::close`] does.
    pub fn close(&mut self) {
        self.subscription.close();
    }

    /// Returns the next event if one is pending.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::try_recv`].
    #[inline]
    pub fn try_recv(&mut self) -> Result<T, TryRecvError> {
        let mut event = None;
        self.read(1, |next| event = Some(next.clone()))?;
        event.ok_or(TryRecvError::Empty)
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::recv`].
    #[inline]
    pub fn recv(&mut self, strategy: WaitStrategy) -> Result<T, RecvError> {
        let mut event = None;
        loop {
            self.read_by(strategy, 1, |next| event = Some(next.clone()))?;
            if let Some(event) = event.take() {
                return Ok(event);
            }
        }
    }

    /// Runs `f` on up to `limit` events that are pending, and returns on how many: none only if the
    /// limit is 0. They end before a hole.
    ///
    /// While `f` runs, a publisher that has to overwrite what it sees waits for it: `f` must not
    /// publish to the same bus. If it panics, the event that it was called with is read again.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::try_recv`], if there was no event before it.
    #[inline]
    pub fn read(&mut self, limit: usize, mut f: impl FnMut(&T)) -> Result<usize, TryRecvError> {
        let Self { subscription: EventSubscription { shared, inbox }, ring, wanted, .. } = self;
        let Some(ring) = ring else { return self.read_copies(limit, f) };
        if limit == 0 {
            return Ok(0);
        }
        // Before looking: what was published before closing is seen below.
        let bus_closed = shared.closed.is_set();
        if inbox.closed.is_set() {
            return Err(TryRecvError::Closed);
        }
        let quiet = inbox.on_lag == OnLag::Count;
        let mut read = Delivered { counter: &inbox.delivered, count: 0 };
        let outcome = loop {
            let before = read.count;
            let wish = (limit - before).min(BATCH);
            let count = |event: &T| {
                f(event);
                read.count += 1;
            };
            let batch = match ring.place.is_wide {
                true => ring.read(wish, quiet, before > 0, |_| true, count),
                false => {
                    let wants = wanting(wanted, &**shared, inbox.pattern.as_ref());
                    ring.read(wish, quiet, before > 0, wants, count)
                }
            };
            match batch {
                Ok(0) => break Ok(before),
                Ok(batch) if before + batch == limit => break Ok(limit),
                Ok(_) => {}
                Err(missed) => break Err(missed),
            }
        };
        drop(read);
        inbox.standing.raise_peak(ring.peak);
        // Also without an event: it may have stood in the way while it looked at what it does not
        // want.
        inbox.pass_room_on(shared);
        match outcome {
            Err(Missed { missed, exact }) => Err(TryRecvError::Lagged(Lagged { missed, exact })),
            Ok(0) if bus_closed => Err(TryRecvError::Closed),
            Ok(0) => Err(TryRecvError::Empty),
            Ok(read) => Ok(read),
        }
    }

    /// Waits for an event, then runs `f` on it and on those behind it, as [`EventReader::read`]
    /// does.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::recv`].
    #[inline]
    pub fn read_by(
        &mut self,
        strategy: WaitStrategy,
        limit: usize,
        mut f: impl FnMut(&T),
    ) -> Result<usize, RecvError> {
        if self.is_close_behind && strategy == WaitStrategy::Spin {
            (0..PAUSES_CLOSE_BEHIND).for_each(|_| std::hint::spin_loop());
        }
        let mut looks = 0;
        loop {
            if let Some(result) = received(self.read(limit, &mut f)) {
                self.is_close_behind =
                    looks == 0 && result.as_ref().is_ok_and(|&n| n < limit.min(CLOSE_BEHIND));
                return result;
            }
            if !strategy.pass_time(looks) {
                match self.subscription.shared.is_polled {
                    true => wait_a_moment(&mut { looks }),
                    false => self.sleep(),
                }
            }
            looks = looks.saturating_add(1);
        }
    }

    /// Sleeps until it is worth looking again.
    #[cold]
    fn sleep(&mut self) {
        let Self { subscription: EventSubscription { shared, inbox }, ring, wanted, .. } = self;
        let mut sleeper = inbox.bell.sleeper();
        sleeper.enter();
        shared.fence_asleep();
        let is_ready = match ring {
            Some(ring) => {
                let quiet = inbox.on_lag == OnLag::Count;
                let wants = wanting(wanted, &**shared, inbox.pattern.as_ref());
                shared.closed.is_set() || inbox.closed.is_set() || ring.is_ready(quiet, wants)
            }
            None => inbox.is_ready(shared),
        };
        // It may have stood in the way while it looked.
        inbox.pass_room_on(shared);
        if !is_ready {
            park_on(Pin::new(&mut sleeper), None);
        }
    }

    fn read_copies(&mut self, limit: usize, mut f: impl FnMut(&T)) -> Result<usize, TryRecvError> {
        if limit == 0 {
            return Ok(0);
        }
        f(&self.subscription.try_recv()?);
        let EventSubscription { shared, inbox } = &self.subscription;
        let mut read = 1;
        while read < limit {
            let Step::Event(event) = inbox.step(shared, true) else { break };
            f(&event);
            read += 1;
        }
        Ok(read)
    }
}
