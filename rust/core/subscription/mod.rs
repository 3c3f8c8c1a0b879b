//! Subscriptions: one reader's claim on the events of a bus, read by threads, by tasks, or by a
//! foreign event loop.
//!
//! Readers of one subscription compete; each event goes to exactly one of them. An event leaves
//! the queue only in the step that returns it, so a cancelled `recv` loses nothing.

mod event_reader;

pub use event_reader::EventReader;

use crate::backend::{Found, Reader, Walked};
use crate::bus::Shared;
use crate::error::{ConfigError, Lagged, RecvError, RecvTimeoutError, TryRecvError};
use crate::metrics::{Ages, DropCounters, Standing, SubscriptionMetrics};
use crate::policy::{OnLag, Policy};
use crate::sync::{Counter, Exclusion, Flag, Mutex, ThreadExclusion};
use crate::topic::Pattern;
use crate::wait::{
    Bell, Parked, PlaceInLine, Sleeper, Sleepers, WaitStrategy, breathe, come_round, entered,
    park_on, pass_time_until,
};
use futures_core::Stream;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// What publishers and readers of one subscription share.
pub(crate) struct Inbox<T: Clone, R: Exclusion> {
    pub(crate) id: u64,
    pub(crate) name: Option<String>,
    pub(crate) slot: u32,
    pub(crate) policy: Policy,
    pub(crate) capacity: usize,
    pub(crate) pattern: Option<Pattern>,
    pub(crate) on_lag: OnLag,
    /// Events offered, published after each was queued or missed; on the shared channel those of
    /// the snapshot alone.
    pub(crate) offered: Counter,
    pub(crate) delivered: Counter,
    pub(crate) dropped: DropCounters,
    pub(crate) standing: Standing,
    ages: Mutex<R, Ages>,
    /// Entries of the shared channel stepped over (`broadcast`).
    unwanted: Counter,
    /// Entries of the shared channel, or sequence of the ring, before it joined and when it left
    /// (`broadcast`, `ring`).
    joined_at: u64,
    pub(crate) left_at: Counter,
    /// Events, wanted or not, that a ring no longer had when it joined.
    late: u64,
    /// How far publishers had come when a look found nothing: see `is_quiet`.
    quiet_at: Counter,
    /// What wakes its readers.
    pub(crate) bell: Arc<Bell>,
    /// Publishers in line for room.
    pub(crate) blocked: Sleepers,
    pub(crate) closed: Flag,
    /// A store reads it.
    pub(crate) feeds_store: Flag,
    reader: Mutex<R, Reader<T, R>>,
}

enum Step<T> {
    Event(T),
    Lagged(Lagged),
    Empty,
    Closed,
}

impl<T: Clone, R: Exclusion> Inbox<T, R> {
    #[expect(clippy::too_many_arguments, reason = "one caller, one field each")]
    pub(crate) fn new(
        id: u64,
        name: Option<String>,
        joined: Instant,
        slot: u32,
        policy: Policy,
        on_lag: OnLag,
        capacity: usize,
        pattern: Option<Pattern>,
        snapshot: u64,
        joined_at: u64,
        late: u64,
        reader: Reader<T, R>,
        bell: Arc<Bell>,
    ) -> Self {
        let offered = Counter::default();
        offered.publish(snapshot);
        let dropped = DropCounters::default();
        dropped.overwritten.add_exclusive(late);
        let quiet_at = Counter::default();
        quiet_at.set(u64::MAX);
        Self {
            id,
            name,
            slot,
            policy,
            capacity,
            pattern,
            on_lag,
            offered,
            delivered: Counter::default(),
            dropped,
            standing: Standing::new(joined),
            ages: Mutex::new(Ages::new(joined)),
            unwanted: Counter::default(),
            joined_at,
            left_at: Counter::default(),
            late,
            quiet_at,
            bell,
            blocked: Sleepers::default(),
            closed: Flag::default(),
            feeds_store: Flag::default(),
            reader: Mutex::new(reader),
        }
    }

    #[inline]
    fn step(&self, shared: &Shared<T, R>, in_batch: bool) -> Step<T> {
        match self.take_ready(shared) {
            Some(event) => Step::Event(event),
            None => self.step_slowly(shared, in_batch),
        }
    }

    /// Takes the next event if nothing has to be told before it; `None` decides nothing.
    #[inline]
    fn take_ready(&self, shared: &Shared<T, R>) -> Option<T> {
        let event = {
            let mut reader = self.reader.lock();
            // Under the lock: see `step_slowly`.
            if self.closed.is_set() {
                return None;
            }
            let event = reader.take_ready()?;
            self.delivered.add_exclusive(1);
            event
        };
        self.pass_room_on(shared);
        Some(event)
    }

    /// Tells publishers in line that an event was taken; the caller no longer holds the reader.
    /// A hole that is told frees no room: the event behind it waits on hold.
    #[inline]
    fn pass_room_on(&self, shared: &Shared<T, R>) {
        if matches!(self.policy, Policy::Block | Policy::Reject)
            && self.blocked.any_after_store::<R>(shared.fences)
        {
            shared.room_was_freed(self);
        }
    }

    #[inline(never)]
    fn step_slowly(&self, shared: &Shared<T, R>, in_batch: bool) -> Step<T> {
        // Before looking: what was published before closing is seen below.
        let bus_closed = shared.closed.is_set();
        let mut walked = Walked::default();
        let found = {
            let mut reader = self.reader.lock();
            // Under the lock: who leaves the bus sets it before discarding what is pending, and
            // nothing is taken after that.
            if self.closed.is_set() {
                return Step::Closed;
            }
            let quiet = self.on_lag == OnLag::Count;
            let offered = self.offered.observe();
            let pattern = self.pattern.as_ref();
            let come = self.come(shared);
            self.look_for_a_peak(shared);
            let found = reader.take(offered, quiet, in_batch, &mut walked, shared, pattern);
            self.count(&walked);
            match found {
                Found::Event(_) => self.delivered.add_exclusive(1),
                Found::Nothing if !in_batch => self.quiet_at.set(come),
                _ => {}
            }
            found
        };
        match found {
            Found::Event(event) => {
                self.pass_room_on(shared);
                Step::Event(event)
            }
            Found::Hole(lagged) => Step::Lagged(lagged),
            Found::Nothing => {
                // As in `step_many`.
                if shared.ring.is_some() {
                    self.pass_room_on(shared);
                }
                match bus_closed {
                    true => Step::Closed,
                    false if self.note_again(shared) => self.step_slowly(shared, in_batch),
                    false => Step::Empty,
                }
            }
        }
    }

    /// Returns how far publishers have come, as far as a reader of its own channel or of the ring
    /// can see.
    #[inline]
    fn come(&self, shared: &Shared<T, R>) -> u64 {
        match &shared.ring {
            Some(ring) => ring.right.tail(),
            None => self.offered.observe(),
        }
    }

    /// Returns whether a step would give `Empty` for sure, without locking anything. It knows
    /// nothing of the shared channel and of maps.
    #[inline]
    fn is_quiet(&self, shared: &Shared<T, R>) -> bool {
        self.come(shared) == self.quiet_at.value()
            && !shared.closed.is_set()
            && !self.closed.is_set()
            && !self.bell.is_forgotten()
    }

    /// Tells publishers who have called a foreign waker that its readers sleep on: an event that
    /// woke them is gone, or they have read it. Returns whether to look again.
    #[inline]
    fn note_again(&self, shared: &Shared<T, R>) -> bool {
        let is_forgotten = self.bell.is_forgotten();
        if is_forgotten {
            // Step S1 again.
            self.bell.note();
            shared.fence_asleep();
        }
        is_forgotten
    }

    /// Gives up to `limit` events to `sink` and returns how many; it ends before a hole.
    fn step_many(&self, shared: &Shared<T, R>, sink: &mut impl FnMut(T), limit: usize) -> usize {
        let mut walked = Walked::default();
        let taken = {
            let mut reader = self.reader.lock();
            if self.closed.is_set() {
                return 0;
            }
            let quiet = self.on_lag == OnLag::Count;
            let offered = self.offered.observe();
            let pattern = self.pattern.as_ref();
            let taken = reader.take_many(sink, limit, offered, quiet, &mut walked, shared, pattern);
            self.count(&walked);
            self.delivered.add_exclusive(taken as u64);
            taken
        };
        // On a ring it may have stood in the way while it looked at what it does not want.
        if taken > 0 || shared.ring.is_some() {
            self.pass_room_on(shared);
        }
        taken
    }

    fn is_ready(&self, shared: &Shared<T, R>) -> bool {
        shared.closed.is_set() || self.has_something(shared) || self.closed.is_set()
    }

    /// Returns whether a step would give an event or tell a hole.
    fn has_something(&self, shared: &Shared<T, R>) -> bool {
        let mut reader = self.reader.lock();
        // Under the lock: see `step_slowly`.
        if self.closed.is_set() {
            return false;
        }
        let mut walked = Walked::default();
        let quiet = self.on_lag == OnLag::Count;
        let offered = self.offered.observe();
        let ready = reader.is_ready(offered, quiet, &mut walked, shared, self.pattern.as_ref());
        self.count(&walked);
        drop(reader);
        if shared.ring.is_some() {
            self.pass_room_on(shared);
        }
        ready || (self.note_again(shared) && self.is_ready(shared))
    }

    /// Counts what reading stepped over; the caller holds the reader.
    #[inline]
    fn count(&self, walked: &Walked) {
        if walked.unwanted + walked.overwritten > 0 {
            self.unwanted.add_exclusive(walked.unwanted);
            self.dropped.overwritten.add_exclusive(walked.overwritten);
        }
    }

    /// Counts what is pending as closed and returns it to be dropped without any lock. The caller
    /// holds the publish token, so nothing is added meanwhile.
    pub(crate) fn discard(&self, shared: &Shared<T, R>) -> Vec<T> {
        let mut discarded = Vec::new();
        let mut reader = self.reader.lock();
        self.look_for_a_peak(shared);
        let mut walked = Walked::default();
        let pattern = self.pattern.as_ref();
        let offered = self.offered.observe();
        if let Some(pending) = reader.pending_on_ring(self.left_at.value(), shared, pattern) {
            self.standing.raise_peak(reader.peak());
            self.dropped.closed.add_exclusive(pending);
            reader.leave();
            return discarded;
        }
        while let Found::Event(event) =
            reader.take(offered, true, false, &mut walked, shared, pattern)
        {
            discarded.push(event);
        }
        self.count(&walked);
        self.dropped.closed.add_exclusive(discarded.len() as u64);
        reader.leave();
        discarded
    }

    /// Returns the events that wait to be read and those that were overwritten without being
    /// counted yet.
    pub(crate) fn backlog(&self, shared: &Shared<T, R>) -> (usize, usize) {
        self.reader.lock().backlog(self.capacity, shared, self.pattern.as_ref())
    }

    fn entries_passed(&self) -> u64 {
        self.joined_at
            + self.delivered.value()
            + self.unwanted.value()
            + self.dropped.overwritten.value()
    }

    /// Returns how many entries of the shared channel it has still to walk over.
    pub(crate) fn entries_behind(&self, shared: &Shared<T, R>) -> u64 {
        (self.offered.value() + shared.sent.observe()).saturating_sub(self.entries_passed())
    }

    /// Returns whether it reads from the channel that all share.
    fn reads_shared_channel(&self, shared: &Shared<T, R>) -> bool {
        shared.is_shared_channel() && self.policy != Policy::Conflate
    }

    /// On the shared channel readers note how far they were behind, since publishing looks at no
    /// subscription; the caller holds the reader.
    #[inline]
    fn look_for_a_peak(&self, shared: &Shared<T, R>) {
        if self.reads_shared_channel(shared) {
            self.standing.raise_peak(self.entries_behind(shared).min(self.capacity as u64));
        }
    }

    /// Returns the numbers; `now` was read before.
    pub(crate) fn metrics(&self, shared: &Shared<T, R>, now: Instant) -> SubscriptionMetrics {
        let shared_channel = self.reads_shared_channel(shared);
        let mut ages = self.ages.lock();
        let mut reader = self.reader.lock();
        let has_left = reader.has_left();
        let on_ring = shared.ring.is_some() && self.policy != Policy::Conflate;
        let (pending, uncounted) = reader.backlog(self.capacity, shared, self.pattern.as_ref());
        self.standing.raise_peak(reader.peak());
        let delivered = self.delivered.value();
        let mut dropped = self.dropped.read();
        dropped.overwritten += uncounted as u64;
        let unwanted = self.unwanted.value();
        let position = reader.oldest(delivered + unwanted + dropped.overwritten);
        if !has_left {
            self.look_for_a_peak(shared);
        }
        drop(reader);
        let (offered, indexed) = match (shared_channel, &shared.ring) {
            (_, Some(ring)) if on_ring => {
                let end = match has_left {
                    true => self.left_at.observe(),
                    false => ring.right.tail(),
                };
                let offered = match self.pattern {
                    None => self.offered.value() + end.saturating_sub(self.joined_at),
                    // Publishing looks at no subscription: what was offered is what became of it.
                    Some(_) => delivered + dropped.total() + pending as u64,
                };
                (offered, end)
            }
            (false, _) => {
                let offered = self.offered.observe();
                (offered, offered)
            }
            (true, _) => {
                let end = match has_left {
                    true => self.left_at.observe(),
                    false => shared.sent.observe(),
                };
                let indexed = self.offered.value() + end.saturating_sub(self.joined_at);
                (indexed.saturating_sub(unwanted), indexed)
            }
        };
        let oldest_age = (pending > 0).then(|| ages.bound(position, now));
        ages.observe(indexed, now);
        drop(ages);
        let pending = pending as u64;
        let waiting_publishers = if has_left { 0 } else { self.standing.waiting() };
        let is_full = waiting_publishers > 0 || pending >= self.capacity as u64;
        SubscriptionMetrics {
            id: self.id,
            name: self.name.clone(),
            pattern: self.pattern.as_ref().map(ToString::to_string),
            policy: self.policy,
            capacity: self.capacity,
            pending,
            peak_pending: self.standing.peak_pending().max(pending),
            offered,
            delivered,
            dropped,
            exact: self.pattern.is_none() || !(shared_channel || self.late > 0),
            oldest_age,
            waiting_publishers,
            full_for: is_full.then(|| self.standing.full_for(now)).flatten(),
            is_passed_over: is_full && self.standing.is_spent(delivered),
        }
    }
}

/// A subscription: receives in the calling thread, and parks it while there is nothing.
///
/// Dropping it closes it. Share it between threads by reference: they compete, and each event
/// goes to exactly one of them.
pub struct EventSubscription<T: Clone, R: Exclusion = ThreadExclusion> {
    shared: Arc<Shared<T, R>>,
    inbox: Arc<Inbox<T, R>>,
}

impl<T: Clone, R: Exclusion> fmt::Debug for EventSubscription<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSubscription")
            .field("id", &self.inbox.id)
            .field("policy", &self.inbox.policy)
            .finish_non_exhaustive()
    }
}

impl<T: Clone, R: Exclusion> Drop for EventSubscription<T, R> {
    fn drop(&mut self) {
        self.close();
    }
}

impl<T: Clone, R: Exclusion> EventSubscription<T, R> {
    pub(crate) fn new(shared: Arc<Shared<T, R>>, inbox: Arc<Inbox<T, R>>) -> Self {
        Self { shared, inbox }
    }

    /// Returns the subscription's id, unique in its bus.
    pub fn id(&self) -> u64 {
        self.inbox.id
    }

    /// Returns the name that it was given, if any.
    pub fn name(&self) -> Option<&str> {
        self.inbox.name.as_deref()
    }

    /// Returns the pattern over topics, if it has one.
    pub fn pattern(&self) -> Option<&Pattern> {
        self.inbox.pattern.as_ref()
    }

    /// Returns what happens when it has no room.
    pub fn policy(&self) -> Policy {
        self.inbox.policy
    }

    /// Returns the most events it can hold, a power of two.
    pub fn capacity(&self) -> usize {
        self.inbox.capacity
    }

    /// Returns how many events wait to be read.
    pub fn pending(&self) -> usize {
        self.inbox.backlog(&self.shared).0
    }

    /// Returns whether it was closed, by itself or with its bus.
    pub fn is_closed(&self) -> bool {
        self.inbox.closed.is_set() || self.shared.closed.is_set()
    }

    /// Returns the subscription's numbers.
    pub fn metrics(&self) -> SubscriptionMetrics {
        self.inbox.metrics(&self.shared, Instant::now())
    }

    /// Notes that what is published goes into a store: whoever replays into the bus asks for it.
    pub fn feed_store(&self) {
        self.inbox.feeds_store.set();
    }

    /// Leaves the bus: what is pending is counted as `closed`, waiting publishers go on without
    /// this subscription, and waiting readers get `Closed`. Closing again does nothing.
    pub fn close(&self) {
        self.shared.unsubscribe(&self.inbox);
    }

    /// Returns the next event if one is pending.
    ///
    /// # Errors
    ///
    /// `Empty`, `Lagged` where events are missing, `Closed` when everything was read.
    #[inline]
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        match self.inbox.step(&self.shared, false) {
            Step::Event(event) => Ok(event),
            Step::Lagged(lagged) => Err(TryRecvError::Lagged(lagged)),
            Step::Empty => Err(TryRecvError::Empty),
            Step::Closed => Err(TryRecvError::Closed),
        }
    }

    /// Returns the next event if one is pending with nothing to be told before it. `None` decides
    /// nothing: [`EventSubscription::try_recv`] says why.
    #[inline]
    pub fn take_ready(&self) -> Option<T> {
        self.inbox.take_ready(&self.shared)
    }

    /// Appends up to `limit` pending events to `batch` and returns how many. A batch ends before a
    /// hole.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::try_recv`], if there was no event before it.
    pub fn try_recv_many<E: Extend<T>>(
        &self,
        batch: &mut E,
        limit: usize,
    ) -> Result<usize, TryRecvError> {
        if limit == 0 {
            return Ok(0);
        }
        batch.extend([self.try_recv()?]);
        let mut taken = 1;
        while taken < limit {
            let Step::Event(event) = self.inbox.step(&self.shared, true) else { break };
            batch.extend([event]);
            taken += 1;
        }
        Ok(taken)
    }

    /// As [`EventSubscription::try_recv_many`], with the reading half locked once for all events
    /// but the first.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::try_recv_many`].
    pub fn try_recv_batch(&self, batch: &mut Vec<T>, limit: usize) -> Result<usize, TryRecvError> {
        if limit == 0 {
            return Ok(0);
        }
        batch.push(self.try_recv()?);
        Ok(1 + self.step_many(&mut |event| batch.push(event), limit - 1))
    }

    /// As [`EventSubscription::try_recv_batch`], without a word about what ends the batch.
    pub(crate) fn step_many(&self, sink: &mut impl FnMut(T), limit: usize) -> usize {
        self.inbox.step_many(&self.shared, sink, limit)
    }

    /// Returns whether nothing is pending for sure, without locking anything; of a bus whose
    /// subscriptions have channels of their own or a ring, and without conflation.
    #[inline]
    pub(crate) fn is_quiet(&self) -> bool {
        self.inbox.is_quiet(&self.shared)
    }

    /// Waits for the next event.
    ///
    /// # Errors
    ///
    /// `Lagged` where events are missing, `Closed` when everything was read.
    pub fn recv(&self) -> Result<T, RecvError> {
        self.recv_until(None).map_err(without_timeout)
    }

    /// Waits for the next event in a way of the caller's choice.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::recv`].
    pub fn recv_by(&self, strategy: WaitStrategy) -> Result<T, RecvError> {
        let mut looks = 0;
        loop {
            if let Some(result) = received(self.try_recv()) {
                return result;
            }
            if !strategy.pass_time(looks) {
                return self.recv();
            }
            looks = looks.saturating_add(1);
        }
    }

    /// Waits for the next event, at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::recv`], and `Timeout`.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        match self.try_recv() {
            Err(TryRecvError::Empty) => self.recv_until(Instant::now().checked_add(timeout)),
            result => result.map_err(with_timeout),
        }
    }

    /// Waits for an event, then takes what is there, up to `limit` events. A batch ends before a
    /// hole.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::recv`].
    pub fn recv_many(&self, limit: usize) -> Result<Vec<T>, RecvError> {
        let mut batch = Vec::with_capacity(limit.min(self.inbox.capacity));
        if limit > 0 {
            batch.push(self.recv()?);
            self.step_many(&mut |event| batch.push(event), limit - 1);
        }
        Ok(batch)
    }

    fn recv_until(&self, deadline: Option<Instant>) -> Result<T, RecvTimeoutError> {
        if self.shared.is_polled {
            return self.poll_until(deadline);
        }
        loop {
            match self.try_recv() {
                Err(TryRecvError::Empty) => {}
                result => return result.map_err(with_timeout),
            }
            let mut sleeper = self.enter_line();
            match self.try_recv() {
                Err(TryRecvError::Empty) => {}
                result => return result.map_err(with_timeout),
            }
            if park_on(Pin::new(&mut sleeper), deadline).is_none() {
                return match self.try_recv() {
                    Err(TryRecvError::Empty) => Err(RecvTimeoutError::Timeout),
                    result => result.map_err(with_timeout),
                };
            }
        }
    }

    /// As `recv_until`, where nobody wakes a reader.
    fn poll_until(&self, deadline: Option<Instant>) -> Result<T, RecvTimeoutError> {
        let mut looks = 0;
        loop {
            match self.try_recv() {
                Err(TryRecvError::Empty) => {}
                result => return result.map_err(with_timeout),
            }
            if !pass_time_until(&mut looks, deadline) {
                return self.try_recv().map_err(with_timeout);
            }
        }
    }

    /// Step S1 for a thread.
    fn enter_line(&self) -> Sleeper<&Bell> {
        let mut sleeper = self.inbox.bell.sleeper();
        sleeper.enter();
        self.fence();
        sleeper
    }

    /// Returns whether receiving would give something else than `Empty`, as far as can be seen
    /// without taking it.
    pub fn is_ready(&self) -> bool {
        self.inbox.is_ready(&self.shared)
    }

    /// As [`EventSubscription::is_ready`], but the end is nothing.
    pub(crate) fn has_something(&self) -> bool {
        self.inbox.has_something(&self.shared)
    }

    /// Runs `sleep` with a handle to park on, unless there is something to receive. For runtimes
    /// that must do something around parking, such as releasing a global lock.
    pub fn sleep_unless_ready(&self, sleep: impl FnOnce(&mut Parking<'_, '_>)) {
        let mut sleeper = (!self.shared.is_polled).then(|| self.enter_line());
        if !self.is_ready() {
            sleep(&mut Parking::new(sleeper.as_mut()));
        }
    }

    /// Wakes another sleeper if something is left to receive: for a reader that was woken and goes
    /// away without receiving.
    pub fn pass_on(&self) {
        self.shared.fence_waker();
        if self.inbox.bell.any_asleep() && self.is_ready() {
            self.inbox.bell.wake_one();
        }
    }

    /// Returns a place in the line of those that sleep: it is done once it is worth looking again.
    /// Enter it, [`EventSubscription::arm`] it, look, and sleep. It is of no use where there is a
    /// waker. `None` under [`WakeMode::Polling`](crate::WakeMode::Polling): whoever waits looks again
    /// by itself.
    pub fn place_in_line(&self) -> Option<PlaceInLine> {
        (!self.shared.is_polled).then(|| PlaceInLine::new(&self.inbox.bell))
    }

    /// Sends every wake-up to `waker` instead of to sleeping threads and tasks, for readers that
    /// live in a foreign event loop. It is called after publication, without any lock, for events
    /// that come while the subscription is armed: at least for the first one after each
    /// [`EventSubscription::arm`] and after each look that found nothing. Returns false if it had one.
    ///
    /// # Errors
    ///
    /// `ConfigError` under [`WakeMode::Polling`](crate::WakeMode::Polling).
    pub fn set_waker(&self, waker: Waker) -> Result<bool, ConfigError> {
        if self.shared.is_polled {
            return Err(ConfigError::new(
                "a waker was set on a bus whose wake mode is polling; publishers wake nobody there: \
                 look for events without it, or make the bus with WakeMode::Auto or Fenced",
            ));
        }
        Ok(self.inbox.bell.set_waker(waker))
    }

    /// Asks for wake-ups: from now on publishing calls the waker, or who stands in line. Look again
    /// before sleeping, and arm again to sleep on after a wake-up. Where there are none it does
    /// nothing ([`EventSubscription::set_waker`] is refused).
    pub fn arm(&self) {
        self.inbox.bell.arm::<R>();
        self.fence();
    }

    /// Takes one [`EventSubscription::arm`] back.
    pub fn disarm(&self) {
        self.inbox.bell.disarm::<R>();
    }

    /// The fence of step S1.
    pub(crate) fn fence(&self) {
        self.shared.fence_asleep();
    }
}

fn with_timeout(error: TryRecvError) -> RecvTimeoutError {
    match error {
        TryRecvError::Empty => RecvTimeoutError::Timeout,
        TryRecvError::Lagged(lagged) => RecvTimeoutError::Lagged(lagged),
        TryRecvError::Closed => RecvTimeoutError::Closed,
    }
}

fn without_timeout(error: RecvTimeoutError) -> RecvError {
    match error {
        RecvTimeoutError::Lagged(lagged) => RecvError::Lagged(lagged),
        RecvTimeoutError::Closed => RecvError::Closed,
        RecvTimeoutError::Timeout => unreachable!("there was no deadline"),
    }
}

/// A thread about to sleep for an event.
pub struct Parking<'a, 'b> {
    /// `None` if nobody wakes it.
    sleeper: Option<&'a mut Sleeper<&'b Bell>>,
}

impl fmt::Debug for Parking<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parking").finish_non_exhaustive()
    }
}

impl<'a, 'b> Parking<'a, 'b> {
    pub(crate) fn new(sleeper: Option<&'a mut Sleeper<&'b Bell>>) -> Self {
        Self { sleeper }
    }

    /// Parks the thread until it is worth receiving again, at most until the deadline; false if
    /// the deadline passed. Under [`WakeMode::Polling`](crate::WakeMode::Polling) it lets others run
    /// once instead.
    pub fn park(&mut self, deadline: Instant) -> bool {
        match &mut self.sleeper {
            Some(sleeper) => park_on(Pin::new(&mut **sleeper), Some(deadline)).is_some(),
            None => pass_time_until(&mut { u32::MAX }, Some(deadline)),
        }
    }
}

/// A subscription to be awaited, in any async runtime.
///
/// `recv` is cancel-safe: use it in `select!` freely. As a `Stream` it gives `Err(Lagged)` where
/// events are missing and ends when the subscription is closed and read.
pub struct AsyncEventSubscription<T: Clone, R: Exclusion = ThreadExclusion> {
    subscription: EventSubscription<T, R>,
    /// The stream's place in line between two polls.
    parked: Parked,
}

impl<T: Clone, R: Exclusion> fmt::Debug for AsyncEventSubscription<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncEventSubscription").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl<T: Clone, R: Exclusion> From<EventSubscription<T, R>> for AsyncEventSubscription<T, R> {
    fn from(subscription: EventSubscription<T, R>) -> Self {
        Self { subscription, parked: Parked::default() }
    }
}

impl<T: Clone, R: Exclusion> Drop for AsyncEventSubscription<T, R> {
    fn drop(&mut self) {
        self.parked.leave(&self.subscription);
    }
}

impl<T: Clone, R: Exclusion> AsyncEventSubscription<T, R> {
    /// Returns what threads read it by.
    pub(crate) fn subscription(&self) -> &EventSubscription<T, R> {
        &self.subscription
    }

    /// Returns the subscription's id, unique in its bus.
    pub fn id(&self) -> u64 {
        self.subscription.id()
    }

    /// Returns what happens when it has no room.
    pub fn policy(&self) -> Policy {
        self.subscription.policy()
    }

    /// Returns the most events it can hold, a power of two.
    pub fn capacity(&self) -> usize {
        self.subscription.capacity()
    }

    /// Returns how many events wait to be read.
    pub fn pending(&self) -> usize {
        self.subscription.pending()
    }

    /// Returns whether it was closed, by itself or with its bus.
    pub fn is_closed(&self) -> bool {
        self.subscription.is_closed()
    }

    /// Returns the subscription's numbers.
    pub fn metrics(&self) -> SubscriptionMetrics {
        self.subscription.metrics()
    }

    /// Leaves the bus, as [`EventSubscription::close`] does.
    pub fn close(&self) {
        self.subscription.close();
    }

    /// Returns the next event if one is pending.
    ///
    /// # Errors
    ///
    /// As [`EventSubscription::try_recv`].
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        self.subscription.try_recv()
    }

    /// Waits for the next event. Cancelled at any point, nothing is lost. It suspends once in
    /// every 256 completions that were ready, so a busy reader cannot starve other tasks.
    ///
    /// # Errors
    ///
    /// `Lagged` where events are missing, `Closed` when everything was read.
    pub async fn recv(&self) -> Result<T, RecvError> {
        breathe().await;
        let EventSubscription { shared, inbox } = &self.subscription;
        loop {
            if let Some(result) = received(self.try_recv()) {
                return result;
            }
            if shared.is_polled {
                come_round().await;
                continue;
            }
            let mut sleeper = inbox.bell.sleeper();
            entered(&mut sleeper).await;
            shared.fence_asleep();
            if let Some(result) = received(self.try_recv()) {
                return result;
            }
            sleeper.await;
        }
    }

    /// Waits for an event, then takes what is there, up to `limit` events. A batch ends before a
    /// hole. Cancelled at any point, nothing is lost.
    ///
    /// # Errors
    ///
    /// As [`AsyncEventSubscription::recv`].
    pub async fn recv_many(&self, limit: usize) -> Result<Vec<T>, RecvError> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let mut batch = vec![self.recv().await?];
        let EventSubscription { shared, inbox } = &self.subscription;
        while batch.len() < limit {
            let Step::Event(event) = inbox.step(shared, true) else { break };
            batch.push(event);
        }
        Ok(batch)
    }
}

fn received<T>(result: Result<T, TryRecvError>) -> Option<Result<T, RecvError>> {
    match result {
        Ok(event) => Some(Ok(event)),
        Err(TryRecvError::Empty) => None,
        Err(TryRecvError::Lagged(lagged)) => Some(Err(RecvError::Lagged(lagged))),
        Err(TryRecvError::Closed) => Some(Err(RecvError::Closed)),
    }
}

// Nothing in it is pinned in place: the place in line is boxed.
impl<T: Clone, R: Exclusion> Unpin for AsyncEventSubscription<T, R> {}

impl<T: Clone, R: Exclusion> Stream for AsyncEventSubscription<T, R> {
    type Item = Result<T, Lagged>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Self { subscription, parked } = &mut *self;
        parked.poll(context, subscription, |subscription| match subscription.try_recv() {
            Ok(event) => Some(Some(Ok(event))),
            Err(TryRecvError::Lagged(lagged)) => Some(Some(Err(lagged))),
            Err(TryRecvError::Closed) => Some(None),
            Err(TryRecvError::Empty) => None,
        })
    }
}
