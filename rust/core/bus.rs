//! The bus: one publish token, under which room is reserved at every subscription first and the
//! event is pushed second, so that an error means that nobody has it.
//!
//! ```text
//!  publish ─► token ─► row of the topic ─► 1 room everywhere? ─► 2 push ─► release ─► wake, drop
//!                                             │ no: block waits in line, without the token
//! ```
//!
//! The publisher keeps a private count of each subscription's room and asks the queue only when
//! the count is used up. Waiting publishers stand in line at the subscription that stops them, in
//! the order in which they came; freed room goes to the first in line.
//! Events that made way for newer ones, and those that nobody wanted, are dropped after the token
//! is released, and so are wake-ups and warnings given. Key functions run before it is taken:
//! a publication that lacks a key when it has the token gives it back, asks, and tries again.

#[cfg(feature = "broadcast")]
use crate::backend::Addressed;
use crate::backend::{Channel, Numbered, Reader, Source, TopicNames};
use crate::conflation::{Conflation, Displaced, Key, KeyFn};
use crate::error::{ConfigError, KeyError, PublishError, PublishManyError};
use crate::histogram::{Entry, Latencies};
use crate::last::LastEvents;
use crate::metrics::{EventBusMetrics, Explanation, SubscriptionMetrics, Warning};
use crate::policy::{BackpressureConfig, OnLag, Policy, rounded_capacity};
use crate::subscription::{AsyncEventSubscription, EventSubscription, Inbox};
use crate::sync::{
    AtomicU64, Counter, Exclusion, Flag, Mutex, Ordering, ThreadExclusion, store_load_fence,
};
use crate::topic::{NO_TOPIC, Pattern, Topic, TopicTable, check_topic};
use crate::wait::{Sleepers, breathe, park_on};
use arc_swap::ArcSwap;
use parking_lot::RwLock;
use smallvec::SmallVec;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::pin::pin;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
#[cfg(feature = "broadcast")]
use tokio::sync::broadcast;

/// How a bus carries events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// One bounded channel per subscription.
    LockFree,
    /// One shared channel that overwrites.
    #[cfg(feature = "broadcast")]
    Broadcast,
}

impl Backend {
    /// Every backend that is compiled in.
    pub const ALL: &[Self] = &[
        Self::LockFree,
        #[cfg(feature = "broadcast")]
        Self::Broadcast,
    ];

    /// Returns the backend's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::LockFree => "lock_free",
            #[cfg(feature = "broadcast")]
            Self::Broadcast => "broadcast",
        }
    }

    /// Returns the policy that a subscription has, or why the backend cannot keep it.
    fn policy(self, asked: Option<Policy>, drop_oldest: bool) -> Result<Policy, ConfigError> {
        match self {
            Self::LockFree => Ok(asked.unwrap_or(match drop_oldest {
                true => Policy::DropOldest,
                false => Policy::Block,
            })),
            #[cfg(feature = "broadcast")]
            Self::Broadcast => match asked {
                None | Some(Policy::DropOldest) => Ok(Policy::DropOldest),
                Some(Policy::Conflate) => Ok(Policy::Conflate),
                Some(policy) => Err(ConfigError::new(format!(
                    "policy was {}; backend broadcast can only overwrite (drop_oldest) and \
                     conflate: use backend lock_free",
                    policy.name()
                ))),
            },
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, ConfigError> {
        Self::ALL.iter().copied().find(|backend| backend.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|backend| backend.name()).collect();
            ConfigError::new(format!(
                "backend was {name:?}; it must be one of {}",
                names.join(", ")
            ))
        })
    }
}

/// What a bus is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusConfig {
    /// The capacity of a subscription that asks for none (`lock_free`), or of the shared channel
    /// (`broadcast`), in events; rounded up to a power of two.
    pub capacity: usize,
    /// What happens to subscriptions that cannot keep up.
    pub backpressure: BackpressureConfig,
    /// The most topics the bus will know.
    pub max_topics: usize,
    /// The topics of which the last event is kept for [`EventBus::last`] and for snapshots; `None`
    /// keeps nothing.
    pub keep_last: Option<Pattern>,
    /// Publications for each one whose latency is measured, in the mean: they are drawn at random.
    /// `None` measures none.
    pub latency_sampling: Option<u32>,
}

impl Default for BusConfig {
    fn default() -> Self {
        Self {
            capacity: 10_000,
            backpressure: BackpressureConfig::default(),
            max_topics: 65_536,
            keep_last: None,
            latency_sampling: Some(128),
        }
    }
}

/// What a subscription asks for.
#[derive(Debug, Clone)]
pub struct SubscribeOptions<T> {
    /// What metrics and explanations call it, unique among the subscriptions of the bus.
    pub name: Option<String>,
    /// The topics it wants; `None` wants everything, also events without a topic.
    pub pattern: Option<Pattern>,
    /// The most events it can hold, rounded up to a power of two; `None` is the bus's capacity.
    pub capacity: Option<usize>,
    /// What happens when it has no room; `None` is the bus's.
    pub policy: Option<Policy>,
    /// What its reader is told about missed events.
    pub on_lag: OnLag,
    /// What a `conflate` subscription keeps the newest event of; `None` is the topic, and events
    /// without one are one key of their own. Other policies have no key.
    pub key: Option<KeyFn<T>>,
    /// Whether it begins with the last events of the topics that it wants, as far as the bus keeps
    /// them, in the order in which they were published. They count as offered, stand before
    /// everything else, and take no room. Live events go on exactly where they end.
    pub snapshot: bool,
}

impl<T> Default for SubscribeOptions<T> {
    fn default() -> Self {
        Self {
            pattern: None,
            capacity: None,
            policy: None,
            on_lag: OnLag::default(),
            key: None,
            snapshot: false,
            name: None,
        }
    }
}

/// Why a subscription could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The backend cannot keep what was asked for.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The bus is closed.
    #[error("the bus is closed; subscribe before close()")]
    Closed,
}

/// A bus on either backend. [`LockFreeEventBus`](crate::LockFreeEventBus) and
/// [`BroadcastEventBus`](crate::BroadcastEventBus) are its two public faces; the handle is cheap
/// to clone, and dropping the last one closes the bus.
pub struct Bus<T: Clone, R: Exclusion = ThreadExclusion> {
    owner: Arc<Owner<T, R>>,
}

impl<T: Clone, R: Exclusion> Clone for Bus<T, R> {
    fn clone(&self) -> Self {
        Self { owner: self.owner.clone() }
    }
}

impl<T: Clone, R: Exclusion> fmt::Debug for Bus<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus")
            .field("id", &self.shared().id)
            .field("backend", &self.shared().backend)
            .field("capacity", &self.shared().capacity)
            .finish_non_exhaustive()
    }
}

/// A handle that does not keep the bus open.
pub struct WeakBus<T: Clone, R: Exclusion = ThreadExclusion>(Weak<Owner<T, R>>);

impl<T: Clone, R: Exclusion> fmt::Debug for WeakBus<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakBus").field("is_alive", &self.is_alive()).finish()
    }
}

impl<T: Clone, R: Exclusion> WeakBus<T, R> {
    /// Returns the bus, unless its last handle was dropped.
    pub fn upgrade(&self) -> Option<Bus<T, R>> {
        self.0.upgrade().map(|owner| Bus { owner })
    }

    /// Returns whether the bus has a handle.
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

struct Owner<T: Clone, R: Exclusion>(Arc<Shared<T, R>>);

impl<T: Clone, R: Exclusion> Drop for Owner<T, R> {
    fn drop(&mut self) {
        self.0.close();
    }
}

type WarningSink = Box<dyn Fn(Warning) + Send + Sync>;

/// What publishers and readers of one bus share.
pub struct Shared<T: Clone, R: Exclusion> {
    id: u64,
    backend: Backend,
    config: BusConfig,
    capacity: usize,
    /// Publishing where there is room decides nothing: nobody asked to be warned, and nothing is
    /// kept.
    may_skip_decisions: bool,
    token: Mutex<R, PublishState<T, R>>,
    /// The subscriptions, for readers of metrics, who never take the token.
    roster: ArcSwap<Roster<T, R>>,
    latencies: Latencies,
    /// By topic id, for readers of the shared channel, who never take the token.
    topic_names: RwLock<Vec<Arc<str>>>,
    /// Sleeping readers over all subscriptions: with none, publishing looks at no gate.
    pub(crate) sleepers: Sleepers,
    pub(crate) closed: Flag,
    published: Counter,
    /// Entries ever sent through the shared channel (`broadcast`).
    pub(crate) sent: Counter,
    next_subscription: AtomicU64,
    on_warning: OnceLock<WarningSink>,
}

/// Who is here and what those who left have lost: one, so that sums over both never step back.
struct Roster<T: Clone, R: Exclusion> {
    inboxes: Vec<Arc<Inbox<T, R>>>,
    left_dropped: u64,
}

impl<T: Clone, R: Exclusion> Default for Roster<T, R> {
    fn default() -> Self {
        Self { inboxes: Vec::new(), left_dropped: 0 }
    }
}

/// What only the holder of the publish token touches.
struct PublishState<T: Clone, R: Exclusion> {
    slots: Vec<Option<Slot<T, R>>>,
    topics: TopicTable,
    next_ticket: u64,
    closed: bool,
    /// Subscriptions that conflate: with none, nobody asks for keys.
    conflating: usize,
    last: Option<LastEvents<T>>,
    #[cfg(feature = "broadcast")]
    broadcast: Option<broadcast::Sender<Addressed<T>>>,
}

/// The publisher's side of one subscription.
struct Slot<T: Clone, R: Exclusion> {
    inbox: Arc<Inbox<T, R>>,
    /// The inbox's, kept where the publisher looks anyway.
    policy: Policy,
    carrier: Carrier<T, R>,
    /// Events surely accepted before the queue must be asked again; 0 where there is none.
    room: usize,
    offered: u64,
    /// Until more events than these were offered, the pending ones cannot be more than ever before.
    peak_holds_until: u64,
    /// The threshold was reported and has not been armed again.
    warned: bool,
    /// Publishers in line for room, by ticket.
    line: Vec<InLine>,
}

/// A publisher in line. Once told that there is room it is not told again, and readers do not look
/// for it, until it has tried.
struct InLine {
    ticket: u64,
    notify: Arc<Notify>,
    told: bool,
}

enum Carrier<T, R: Exclusion> {
    Own(Channel<T, R>),
    Other(Other<T, R>),
}

/// What has no room to be counted; apart, because so the carrier is two words and no tag.
enum Other<T, R: Exclusion> {
    #[cfg(feature = "broadcast")]
    Shared,
    Conflating(Box<Conflating<T, R>>),
}

struct Conflating<T, R: Exclusion> {
    map: Arc<Mutex<R, Conflation<T>>>,
    /// `None` is the topic.
    key: Option<KeyFn<T>>,
}

impl<T, R: Exclusion> Carrier<T, R> {
    #[inline]
    fn own(&self) -> &Channel<T, R> {
        match self {
            Self::Own(channel) => channel,
            Self::Other(_) => unreachable!("only a channel of its own has room"),
        }
    }
}

/// A newcomer stands behind everybody in line.
const NEWCOMER: u64 = u64::MAX;

impl<T: Clone, R: Exclusion> Slot<T, R> {
    fn refresh_room(&mut self) {
        // An event that a reader moves on hold is in neither place for a moment, and a push then
        // leaves one event too many until the next read.
        self.room = self.inbox.capacity.saturating_sub(self.carrier.own().len());
        if matches!(self.policy, Policy::Block | Policy::Reject) {
            self.inbox.standing.find(self.room > 0);
        }
    }

    #[inline]
    fn has_room(&mut self, ticket: u64) -> bool {
        if self.room == 0 {
            self.refresh_room();
        }
        if self.line.is_empty() {
            return self.room > 0;
        }
        self.refresh_room();
        let ahead = self.line.iter().take_while(|other| other.ticket < ticket).count();
        self.room > ahead
    }

    /// Returns whether a publisher may still wait for the reader: patience spent on it is not
    /// spent again until it reads.
    fn deserves_patience(&self) -> bool {
        !self.inbox.standing.is_spent(self.inbox.delivered.value())
    }

    #[inline(always)] // the whole of what a ready publish does for each subscription
    fn push(&mut self, event: T) -> Result<(), T> {
        match self.carrier.own().push(Numbered { index: self.offered, event }) {
            Ok(()) => {
                self.room = self.room.saturating_sub(1);
                Ok(())
            }
            Err(error) => {
                self.room = 0;
                Err(error.event)
            }
        }
    }

    /// As `push` and `offer`, where there is room: nobody but publishers adds events, so what the
    /// publisher counted as free is free.
    #[inline]
    fn push_into_room(&mut self, event: T) {
        if self.push(event).is_err() {
            unreachable!("a queue with {} free places was full", self.room);
        }
        self.offer();
    }

    /// Counts an event that the subscription misses for want of room. Only a publisher that
    /// `waited` has spent patience.
    fn miss(&mut self, waited: bool) {
        if self.policy != Policy::Block {
            self.inbox.dropped.refused.add_exclusive(1);
            return;
        }
        self.inbox.dropped.block_expired.add_exclusive(1);
        if waited {
            self.inbox.standing.spend(self.inbox.delivered.value());
        }
    }

    /// Makes an event its key's newest.
    fn conflate(
        &mut self,
        publication: &Pending<T>,
        event: T,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T, R>,
    ) {
        let Carrier::Other(Other::Conflating(conflating)) = &self.carrier else {
            unreachable!("a subscription that conflates has a map")
        };
        let own_key = match &conflating.key {
            None => None,
            Some(_) => match publication.keys.iter().find(|(id, _)| *id == self.inbox.id) {
                Some((_, key)) => Some(key),
                None => unreachable!("keys are found before anything is pushed"),
            },
        };
        let (before, displaced, after) = {
            let mut map = conflating.map.lock();
            let before = map.len();
            let displaced = match own_key {
                Some(key) => map.put(key, event, self.offered),
                None => map.put(&u64::from(publication.topic).into(), event, self.offered),
            };
            (before, displaced, map.len())
        };
        match displaced {
            Displaced::Nothing => {}
            Displaced::Replaced(older) => {
                self.inbox.dropped.conflated.add_exclusive(1);
                aftermath.displaced.push(older);
            }
            Displaced::Forgotten(key) => aftermath.forgotten.push(key),
            Displaced::Overwritten(oldest, key) => {
                self.inbox.dropped.overwritten.add_exclusive(1);
                aftermath.displaced.push(oldest);
                aftermath.forgotten.push(key);
            }
        }
        self.offer();
        if let Some(threshold) = shared.config.backpressure.warn_threshold
            && let Some(pending) = self.cross(before, after, threshold)
        {
            aftermath.warnings.push(self.warning(shared.id, pending, threshold));
        }
    }

    /// Takes the oldest event out to make room.
    fn overwrite_oldest(&mut self) -> Option<T> {
        let oldest = self.carrier.own().take_oldest()?;
        self.inbox.dropped.overwritten.add_exclusive(1);
        Some(oldest.event)
    }

    /// Counts the event as offered, after it was pushed or missed.
    #[inline]
    fn offer(&mut self) {
        self.offered += 1;
        self.inbox.offered.publish(self.offered);
        if self.offered > self.peak_holds_until {
            self.look_for_a_peak();
        }
    }

    /// Compares what is pending now with the peak. Each event adds at most one, so it need not be
    /// done again before the difference was offered.
    fn look_for_a_peak(&mut self) {
        let Inbox { dropped, delivered, capacity, standing, .. } = &*self.inbox;
        let gone = dropped.read().total() + delivered.value();
        let capacity = *capacity as u64;
        let pending = self.offered.saturating_sub(gone).min(capacity);
        let peak = standing.raise_peak(pending);
        self.peak_holds_until = match peak == capacity {
            true => u64::MAX,
            false => self.offered + peak - pending,
        };
    }

    /// Tells as many of those in line as there is room for.
    fn serve_line(&mut self) {
        if !self.line.is_empty() {
            self.refresh_room();
            for publisher in self.line.iter_mut().take(self.room).filter(|other| !other.told) {
                publisher.told = true;
                self.inbox.blocked.disarm::<R>();
                publisher.notify.notify_one();
            }
        }
    }

    /// Returns the pending events if they have just reached the threshold; `grew` says whether the
    /// last event made them more.
    #[inline]
    fn crossing(&mut self, threshold: usize, grew: bool) -> Option<usize> {
        let capacity = self.inbox.capacity;
        if !self.warned && capacity - self.room < threshold {
            return None;
        }
        self.refresh_room();
        let pending = capacity - self.room;
        self.cross(pending.saturating_sub(usize::from(grew)), pending, threshold)
    }

    /// As `crossing`, from the pending events before and after the last event: it is armed again
    /// by what was left before it.
    fn cross(&mut self, before: usize, after: usize, threshold: usize) -> Option<usize> {
        if self.warned && before <= threshold / 2 {
            self.warned = false;
        }
        if self.warned || after < threshold {
            return None;
        }
        self.warned = true;
        Some(after)
    }

    fn warning(&self, bus: u64, pending: usize, threshold: usize) -> Warning {
        Warning { bus, subscription: self.inbox.id, pending, threshold }
    }
}

/// How long a publication may still wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// It may wait for room.
    Left,
    /// It must end now.
    Spent,
}

type Woken<T, R> = SmallVec<[Arc<Inbox<T, R>>; 8]>;

/// What is done after the token was released.
struct Aftermath<T: Clone, R: Exclusion> {
    wake: Woken<T, R>,
    displaced: SmallVec<[T; 8]>,
    forgotten: SmallVec<[Key; 1]>,
    warnings: SmallVec<[Warning; 1]>,
}

impl<T: Clone, R: Exclusion> Aftermath<T, R> {
    #[inline]
    fn new() -> Self {
        Self {
            wake: SmallVec::new(),
            displaced: SmallVec::new(),
            forgotten: SmallVec::new(),
            warnings: SmallVec::new(),
        }
    }

    #[inline]
    fn run(&mut self, shared: &Shared<T, R>) {
        if !self.wake.is_empty() || !self.warnings.is_empty() {
            self.wake_and_warn(shared);
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_and_warn(&mut self, shared: &Shared<T, R>) {
        for inbox in self.wake.drain(..) {
            inbox.gate.wake_one();
        }
        if let Some(sink) = shared.on_warning.get() {
            self.warnings.drain(..).for_each(sink);
        }
    }
}

/// Key functions to be asked, with the subscriptions that have them.
type Unkeyed<T> = SmallVec<[(u64, KeyFn<T>); 1]>;

enum Verdict<T> {
    Done(usize),
    InLine,
    Rejected(Vec<u64>),
    Unkeyed(Unkeyed<T>),
    Closed,
}

impl<T: Clone, R: Exclusion> PublishState<T, R> {
    /// One try to publish: decides, and pushes if nothing stands in the way.
    #[inline]
    fn offer(
        &mut self,
        publication: &mut Pending<T>,
        patience: Patience,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T, R>,
    ) -> Verdict<T> {
        if publication.stand.is_some() {
            self.leave_line(publication);
        }
        if self.closed {
            return Verdict::Closed;
        }
        if self.conflating > 0 {
            let unkeyed = self.unkeyed(publication);
            if !unkeyed.is_empty() {
                return Verdict::Unkeyed(unkeyed);
            }
        }
        #[cfg(feature = "broadcast")]
        if self.broadcast.is_some() {
            self.keep_last(publication, shared, aftermath);
            return Verdict::Done(self.send_to_all(publication, shared, aftermath));
        }
        loop {
            match self.stopped_at(publication, patience) {
                Ok(None) => break,
                Ok(Some(slot)) => {
                    if self.stand_in_line(publication, slot) {
                        return Verdict::InLine;
                    }
                }
                Err(rejecting) => return Verdict::Rejected(rejecting),
            }
        }
        self.keep_last(publication, shared, aftermath);
        Verdict::Done(self.push_to_each(publication, shared, aftermath))
    }

    /// Returns the key functions that want the event and have not been asked.
    #[cold]
    fn unkeyed(&self, publication: &Pending<T>) -> Unkeyed<T> {
        let slots = self.topics.wanted(publication.topic).iter();
        let keyed = slots.filter_map(|&index| {
            let slot = self.slots[index as usize].as_ref()?;
            let Carrier::Other(Other::Conflating(conflating)) = &slot.carrier else { return None };
            Some((slot.inbox.id, conflating.key.clone()?))
        });
        keyed.filter(|(id, _)| publication.keys.iter().all(|(other, _)| other != id)).collect()
    }

    /// Keeps the event as its topic's last, before anybody can have it.
    #[inline]
    fn keep_last(
        &mut self,
        publication: &Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T, R>,
    ) {
        if let Some(last) = &mut self.last
            && let Some(event) = &publication.event
        {
            let number = shared.published.value();
            aftermath.displaced.extend(last.keep(publication.topic, number, event));
        }
    }

    /// Publishes if somebody wants the event and, on channels of their own, every subscription
    /// has room and nobody stands in line, which needs neither policy nor patience. Gives the
    /// event back otherwise.
    #[inline]
    fn publish_ready(&mut self, topic: u32, event: T, shared: &Shared<T, R>) -> Result<usize, T> {
        let wanted = self.topics.wanted(topic);
        let Some((&last, others)) = wanted.split_last() else { return Err(event) };
        #[cfg(feature = "broadcast")]
        if let Some(sender) = &self.broadcast {
            if self.closed || self.conflating > 0 {
                return Err(event);
            }
            send(sender, topic, event, shared)?;
            return Ok(wanted.len());
        }
        let has_room = |&index: &u32| {
            let slot = self.slots[index as usize].as_ref();
            slot.is_some_and(|slot| slot.room > 0 && slot.line.is_empty())
        };
        if self.closed || !has_room(&last) || !others.iter().all(has_room) {
            return Err(event);
        }
        let mut push = |index: u32, event: T| {
            let Some(slot) = &mut self.slots[index as usize] else { return };
            slot.push_into_room(event);
        };
        for &index in others {
            push(index, event.clone());
        }
        push(last, event);
        Ok(wanted.len())
    }

    /// Returns the slot for whose room the publication has to wait, if there is one.
    #[inline]
    fn stopped_at(
        &mut self,
        publication: &Pending<T>,
        patience: Patience,
    ) -> Result<Option<u32>, Vec<u64>> {
        let mut stopped = None;
        let mut rejecting = Vec::new();
        for &index in self.topics.wanted(publication.topic) {
            let Some(slot) = &mut self.slots[index as usize] else { continue };
            match slot.policy {
                Policy::Block => {
                    if !slot.has_room(publication.ticket)
                        && patience == Patience::Left
                        && slot.deserves_patience()
                    {
                        stopped = stopped.or(Some(index));
                    }
                }
                Policy::Reject => {
                    if !slot.has_room(publication.ticket) {
                        if publication.rejects_wait && patience == Patience::Left {
                            stopped = stopped.or(Some(index));
                        } else {
                            rejecting.push(slot.inbox.id);
                        }
                    }
                }
                Policy::DropNewest | Policy::DropOldest | Policy::Conflate => {}
            }
        }
        if rejecting.is_empty() { Ok(stopped) } else { Err(rejecting) }
    }

    #[inline]
    fn push_to_each(
        &mut self,
        publication: &mut Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T, R>,
    ) -> usize {
        let wanted = self.topics.wanted(publication.topic);
        let threshold = shared.config.backpressure.warn_threshold;
        let mut taken = 0;
        for (position, &index) in wanted.iter().enumerate() {
            let Some(slot) = &mut self.slots[index as usize] else { continue };
            let is_last = position + 1 == wanted.len();
            if slot.policy == Policy::Conflate {
                let copy =
                    if is_last { publication.event.take() } else { publication.event.clone() };
                let Some(event) = copy else { continue };
                slot.conflate(publication, event, shared, aftermath);
                taken += 1;
                continue;
            }
            let displaced = aftermath.displaced.len();
            let room = match slot.policy {
                Policy::Block | Policy::Reject => slot.has_room(publication.ticket),
                Policy::DropNewest => slot.has_room(NEWCOMER),
                Policy::DropOldest => {
                    if !slot.has_room(NEWCOMER) {
                        aftermath.displaced.extend(slot.overwrite_oldest());
                    }
                    true
                }
                Policy::Conflate => unreachable!("it has no room"),
            };
            let copy = match is_last {
                _ if !room => None,
                true => publication.event.take(),
                false => publication.event.clone(),
            };
            let pushed = copy.is_some_and(|mut event| {
                loop {
                    let Err(refused) = slot.push(event) else { break true };
                    if slot.policy != Policy::DropOldest {
                        aftermath.displaced.push(refused);
                        break false;
                    }
                    // The reader moved the oldest on hold meanwhile, so that was taken instead.
                    aftermath.displaced.extend(slot.overwrite_oldest());
                    event = refused;
                }
            });
            if pushed {
                taken += 1;
            } else {
                slot.miss(publication.ticket != NEWCOMER);
            }
            slot.offer();
            slot.serve_line();
            if let Some(threshold) = threshold
                && let Some(pending) =
                    slot.crossing(threshold, pushed && aftermath.displaced.len() == displaced)
            {
                aftermath.warnings.push(slot.warning(shared.id, pending, threshold));
            }
        }
        shared.published.add_exclusive(1);
        self.collect_sleepers(publication.topic, shared, aftermath);
        taken
    }

    #[cfg(feature = "broadcast")]
    fn send_to_all(
        &mut self,
        publication: &mut Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T, R>,
    ) -> usize {
        let wanted = self.topics.wanted(publication.topic);
        let taken = wanted.len();
        let mut beside = 0;
        if self.conflating > 0 {
            for &index in wanted {
                let Some(slot) = &mut self.slots[index as usize] else { continue };
                if slot.policy == Policy::Conflate
                    && let Some(event) = publication.event.clone()
                {
                    slot.conflate(publication, event, shared, aftermath);
                    beside += 1;
                }
            }
        }
        shared.published.add_exclusive(1);
        if taken > beside
            && let Some(event) = publication.event.take()
            && let Some(sender) = &self.broadcast
        {
            aftermath.displaced.extend(send(sender, publication.topic, event, shared).err());
            if let Some(threshold) = shared.config.backpressure.warn_threshold {
                for &index in wanted {
                    let Some(slot) = &mut self.slots[index as usize] else { continue };
                    if slot.policy == Policy::Conflate {
                        continue;
                    }
                    let behind = slot.inbox.entries_behind(shared);
                    let after = behind.min(shared.capacity as u64) as usize;
                    let before = behind.saturating_sub(1).min(shared.capacity as u64) as usize;
                    if let Some(pending) = slot.cross(before, after, threshold) {
                        aftermath.warnings.push(slot.warning(shared.id, pending, threshold));
                    }
                }
            }
        }
        if taken > 0 {
            self.collect_sleepers(publication.topic, shared, aftermath);
        }
        taken
    }

    fn collect_sleepers(&self, topic: u32, shared: &Shared<T, R>, aftermath: &mut Aftermath<T, R>) {
        // Step W2 for every subscription at once.
        if shared.sleepers.any_after_store::<R>() {
            aftermath.wake = self.sleepers_on(topic);
        }
    }

    /// Returns who sleeps among those that want the topic.
    #[inline(never)]
    fn sleepers_on(&self, topic: u32) -> Woken<T, R> {
        let slots =
            self.topics.wanted(topic).iter().filter_map(|&i| self.slots[i as usize].as_ref());
        let sleeping = slots.filter(|slot| slot.inbox.gate.sleepers.any());
        sleeping.map(|slot| slot.inbox.clone()).collect()
    }

    /// Puts the publication in line at a slot; false if room has appeared meanwhile.
    fn stand_in_line(&mut self, publication: &mut Pending<T>, index: u32) -> bool {
        if publication.ticket == NEWCOMER {
            publication.ticket = self.next_ticket;
            self.next_ticket += 1;
        }
        let Some(slot) = &mut self.slots[index as usize] else { return false };
        let notify = publication.notify.get_or_insert_default().clone();
        let place = slot.line.partition_point(|other| other.ticket < publication.ticket);
        slot.line.insert(place, InLine { ticket: publication.ticket, notify, told: false });
        slot.inbox.standing.line_up(slot.line.len());
        publication.stand = Some((index, slot.inbox.id));
        slot.inbox.blocked.arm::<R>();
        if slot.has_room(publication.ticket) {
            self.leave_line(publication);
            return false;
        }
        true
    }

    fn leave_line(&mut self, publication: &mut Pending<T>) {
        let Some((index, id)) = publication.stand.take() else { return };
        if let Some(slot) = &mut self.slots[index as usize]
            && slot.inbox.id == id
        {
            if let Some(place) = slot.line.iter().position(|o| o.ticket == publication.ticket)
                && !slot.line.remove(place).told
            {
                slot.inbox.blocked.disarm::<R>();
            }
            slot.inbox.standing.line_up(slot.line.len());
            slot.serve_line();
        }
    }
}

/// Sends an event through the shared channel; gives it back if the channel has no reader.
#[cfg(feature = "broadcast")]
#[inline]
fn send<T: Clone, R: Exclusion>(
    sender: &broadcast::Sender<Addressed<T>>,
    topic: u32,
    event: T,
    shared: &Shared<T, R>,
) -> Result<(), T> {
    let sent = sender.send(Addressed { topic, event });
    sent.map_err(|unsent| unsent.0.event)?;
    shared.sent.publish(shared.sent.value() + 1);
    Ok(())
}

/// An event on its way.
struct Pending<T> {
    entry: Entry,
    event: Option<T>,
    topic: u32,
    rejects_wait: bool,
    ticket: u64,
    notify: Option<Arc<Notify>>,
    /// Its keys, by the ids of the subscriptions that have key functions.
    keys: SmallVec<[(u64, Key); 1]>,
    /// The slot in whose line it stands, and the id of the subscription there.
    stand: Option<(u32, u64)>,
}

impl<T> Pending<T> {
    /// Asks key functions, which may do anything, also with this bus.
    #[inline(never)]
    fn find_keys(&mut self, functions: Unkeyed<T>) -> Result<(), KeyError> {
        let Some(event) = &self.event else {
            unreachable!("a publication is not polled again after it was done")
        };
        for (subscription, function) in functions {
            self.keys.push((subscription, function.key(event)?));
        }
        Ok(())
    }
}

/// An event being published: [`Publication::poll`] it until it is done. Dropping it before that
/// means that nobody has the event.
pub struct Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    shared: S,
    pending: Pending<T>,
    marker: PhantomData<R>,
}

impl<S, T, R> fmt::Debug for Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publication").field("topic", &self.pending.topic).finish_non_exhaustive()
    }
}

impl<S, T, R> Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    /// Tries to publish. Returns how many subscriptions took the event, or `None` if it has to
    /// wait, which happens only with [`Patience::Left`].
    ///
    /// # Errors
    ///
    /// `PublishError`, with the event: nobody has it.
    #[inline]
    pub fn poll(&mut self, patience: Patience) -> Result<Option<usize>, PublishError<T>> {
        let shared = &*self.shared;
        let mut aftermath = Aftermath::new();
        let verdict = loop {
            let verdict = {
                let mut state = shared.token.lock();
                state.offer(&mut self.pending, patience, shared, &mut aftermath)
            };
            let Verdict::Unkeyed(functions) = verdict else { break verdict };
            if let Err(error) = self.pending.find_keys(functions) {
                return Err(self.give_back(|event, _| PublishError::Key { event, error }, vec![]));
            }
        };
        aftermath.run(shared);
        match verdict {
            Verdict::Done(taken) => {
                shared.latencies.leave(self.pending.entry);
                Ok(Some(taken))
            }
            Verdict::InLine => Ok(None),
            Verdict::Unkeyed(_) => unreachable!("the keys were found above"),
            Verdict::Closed => Err(self.give_back(|event, _| PublishError::Closed(event), vec![])),
            Verdict::Rejected(subscriptions) => Err(match self.pending.rejects_wait {
                true => self.give_back(
                    |event, subscriptions| PublishError::Timeout { event, subscriptions },
                    subscriptions,
                ),
                false => self.give_back(
                    |event, subscriptions| PublishError::Full { event, subscriptions },
                    subscriptions,
                ),
            }),
        }
    }

    #[cold]
    fn give_back(
        &mut self,
        error: impl FnOnce(T, Vec<u64>) -> PublishError<T>,
        subscriptions: Vec<u64>,
    ) -> PublishError<T> {
        match self.pending.event.take() {
            Some(event) => error(event, subscriptions),
            None => unreachable!("a publication is not polled again after it was done"),
        }
    }

    /// Returns the subscriptions that want the event, have no room for it, and refuse to lose
    /// others for it: those that it may have to wait for.
    pub fn without_room(&self) -> SmallVec<[u64; 4]> {
        let mut state = self.shared.token.lock();
        let PublishState { slots, topics, .. } = &mut *state;
        let wanted = topics.wanted(self.pending.topic).iter();
        wanted
            .filter_map(|&index| {
                let slot = slots[index as usize].as_mut()?;
                if !matches!(slot.policy, Policy::Block | Policy::Reject) {
                    return None;
                }
                slot.refresh_room();
                (slot.room == 0).then_some(slot.inbox.id)
            })
            .collect()
    }

    /// Parks the thread until room was freed or the deadline has passed; false if it passed.
    pub fn park(&self, deadline: Option<Instant>) -> bool {
        let Some(notify) = &self.pending.notify else { return true };
        park_on(pin!(notify.notified()), deadline).is_some()
    }

    /// Waits until it is worth polling again.
    pub async fn notified(&self) {
        if let Some(notify) = &self.pending.notify {
            notify.notified().await;
        }
    }

    /// Returns where the publication waits for room, once it has to.
    pub fn notify(&self) -> Option<&Arc<Notify>> {
        self.pending.notify.as_ref()
    }

    /// Publishes, waiting in this thread until the deadline at most.
    /// `None` is no deadline.
    fn run(
        &mut self,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Result<usize, PublishError<T>> {
        if let Some(taken) = self.poll(Patience::Left)? {
            return Ok(taken);
        }
        let deadline = deadline();
        let mut patience = Patience::Left;
        loop {
            // A publisher that is woken again and again in vain, by one full queue after the other,
            // is late too.
            if !self.park(deadline) || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                patience = Patience::Spent;
            }
            if let Some(taken) = self.poll(patience)? {
                return Ok(taken);
            }
        }
    }
}

impl<S, T, R> Drop for Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    #[inline]
    fn drop(&mut self) {
        if self.pending.stand.is_some() {
            self.shared.token.lock().leave_line(&mut self.pending);
        }
    }
}

impl<T: Clone, R: Exclusion> fmt::Debug for Shared<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<T: Clone, R: Exclusion> TopicNames for Shared<T, R> {
    fn topic_name(&self, id: u32) -> Arc<str> {
        self.topic_names.read()[id as usize].clone()
    }
}

impl<T: Clone, R: Exclusion> Shared<T, R> {
    pub(crate) fn is_shared_channel(&self) -> bool {
        self.backend != Backend::LockFree
    }

    fn close(&self) {
        let lines: Vec<Arc<Notify>> = {
            let mut state = self.token.lock();
            state.closed = true;
            state
                .slots
                .iter()
                .flatten()
                .flat_map(|slot| &slot.line)
                .map(|other| other.notify.clone())
                .collect()
        };
        if self.closed.set() {
            store_load_fence::<R>();
            lines.iter().for_each(|notify| notify.notify_one());
            for inbox in &self.roster.load().inboxes {
                inbox.gate.wake_all();
            }
        }
    }

    /// Passes freed room on to the publishers in line.
    #[cold]
    pub(crate) fn room_was_freed(&self, inbox: &Inbox<T, R>) {
        let mut state = self.token.lock();
        if let Some(slot) = &mut state.slots[inbox.slot as usize]
            && slot.inbox.id == inbox.id
        {
            slot.serve_line();
        }
    }

    fn subscribe(&self, options: SubscribeOptions<T>) -> Result<Arc<Inbox<T, R>>, SubscribeError> {
        let policy = self.backend.policy(options.policy, self.config.backpressure.drop_oldest)?;
        if options.key.is_some() && policy != Policy::Conflate {
            return Err(ConfigError::new(format!(
                "key was given with policy {}; only conflate has keys: ask for policy conflate, or \
                 leave the key out",
                policy.name()
            ))
            .into());
        }
        if options.snapshot && self.config.keep_last.is_none() {
            return Err(keeps_nothing("snapshot").into());
        }
        let capacity = match options.capacity {
            Some(capacity) => rounded_capacity(capacity)?,
            None => self.capacity,
        };
        let id = self.next_subscription.fetch_add(1, Ordering::Relaxed);
        let joined = Instant::now();
        let mut state = self.token.lock();
        if state.closed {
            return Err(SubscribeError::Closed);
        }
        let roster = self.roster.load_full();
        if let Some(name) = &options.name {
            check_name(name, roster.inboxes.iter().map(|other| &other.name))?;
        }
        let (capacity, carrier, source) = match self.backend {
            _ if policy == Policy::Conflate => {
                let map = Arc::new(Mutex::new(Conflation::new(capacity)));
                let conflating = Conflating { map: map.clone(), key: options.key };
                let carrier = Carrier::Other(Other::Conflating(Box::new(conflating)));
                (capacity, carrier, Source::Conflation(map))
            }
            Backend::LockFree => {
                let channel = Channel::new(capacity);
                (capacity, Carrier::Own(channel.clone()), Source::Channel(channel))
            }
            #[cfg(feature = "broadcast")]
            Backend::Broadcast => {
                if capacity > self.capacity {
                    return Err(ConfigError::new(format!(
                        "capacity was {capacity}; the shared channel holds {}: ask for less, make \
                         the bus with more, or use backend lock_free",
                        self.capacity
                    ))
                    .into());
                }
                let Some(sender) = &state.broadcast else { return Err(SubscribeError::Closed) };
                let source = Source::Broadcast(sender.subscribe());
                (self.capacity, Carrier::Other(Other::Shared), source)
            }
        };
        let slot = match state.slots.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                state.slots.push(None);
                state.slots.len() - 1
            }
        };
        let index = u32::try_from(slot)
            .map_err(|_| ConfigError::new("a bus cannot have more than 2^32 subscriptions"))?;
        state.topics.join(index, options.pattern.as_ref());
        let snapshot = match &state.last {
            Some(last) if options.snapshot => {
                last.snapshot(|topic| state.topics.wanted(topic).contains(&index))
            }
            _ => Vec::new(),
        };
        let offered = snapshot.len() as u64;
        let inbox = Arc::new(Inbox::new(
            id,
            options.name,
            joined,
            index,
            policy,
            options.on_lag,
            capacity,
            options.pattern,
            offered,
            self.sent.value(),
            Reader::new(source.after(snapshot), offered),
        ));
        let conflates = policy == Policy::Conflate;
        state.conflating += usize::from(conflates);
        state.slots[slot] = Some(Slot {
            inbox: inbox.clone(),
            policy,
            carrier,
            room: if conflates { 0 } else { capacity },
            offered,
            peak_holds_until: 0,
            warned: false,
            line: Vec::new(),
        });
        let mut inboxes = roster.inboxes.clone();
        inboxes.push(inbox.clone());
        self.roster.store(Arc::new(Roster { inboxes, left_dropped: roster.left_dropped }));
        Ok(inbox)
    }

    /// Takes a subscription out of the bus; its pending events are counted as closed.
    pub(crate) fn unsubscribe(&self, inbox: &Inbox<T, R>) {
        let left = {
            let mut state = self.token.lock();
            if !inbox.closed.set() {
                return;
            }
            state.topics.leave(inbox.slot);
            state.conflating -= usize::from(inbox.policy == Policy::Conflate);
            inbox.left_at.publish(self.sent.value());
            let discarded = inbox.discard(self);
            let Roster { inboxes, left_dropped } = &**self.roster.load();
            let mut inboxes = inboxes.clone();
            inboxes.retain(|other| other.id != inbox.id);
            let left_dropped = left_dropped + inbox.dropped.read().total();
            self.roster.store(Arc::new(Roster { inboxes, left_dropped }));
            (state.slots[inbox.slot as usize].take(), discarded)
        };
        store_load_fence::<R>();
        if let (Some(slot), _discarded) = left {
            slot.line.iter().for_each(|other| other.notify.notify_one());
        }
        inbox.gate.wake_all();
    }

    fn rows(&self, roster: &Roster<T, R>) -> Vec<SubscriptionMetrics> {
        let now = Instant::now();
        roster.inboxes.iter().map(|inbox| inbox.metrics(self, now)).collect()
    }
}

/// Returns why a subscription cannot have the name. Where metrics name subscriptions, those without
/// a name are numbers.
fn check_name<'a>(
    name: &str,
    mut others: impl Iterator<Item = &'a Option<String>>,
) -> Result<(), ConfigError> {
    if name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(ConfigError::new(format!(
            "name was {name:?}; it must have something else than digits, or be None"
        )));
    }
    match others.any(|other| other.as_deref() == Some(name)) {
        true => Err(ConfigError::new(format!(
            "name was {name:?}, which another subscription of the bus has; choose another one"
        ))),
        false => Ok(()),
    }
}

#[cold]
fn keeps_nothing(asked: &str) -> ConfigError {
    ConfigError::new(format!(
        "{asked} was asked of a bus that keeps no last events; make the bus with keep_last, as in \
         keep_last=\">\" for every topic"
    ))
}

fn next_bus_id() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

impl<T: Clone, R: Exclusion> Bus<T, R> {
    /// Returns a bus on the given backend.
    ///
    /// # Errors
    ///
    /// `ConfigError` if a number is zero or too large.
    pub fn new(backend: Backend, config: BusConfig) -> Result<Self, ConfigError> {
        let capacity = rounded_capacity(config.capacity)?;
        if config.max_topics == 0 || config.max_topics >= u32::MAX as usize {
            return Err(ConfigError::new(format!(
                "max_topics was {}; it must be between 1 and 2^32 - 2",
                config.max_topics
            )));
        }
        if config.backpressure.warn_threshold == Some(0) {
            return Err(ConfigError::new(
                "warn_threshold was 0; it must be at least 1 pending event, or None",
            ));
        }
        let latencies = Latencies::new(config.latency_sampling)?;
        let shared = Shared {
            id: next_bus_id(),
            backend,
            capacity,
            may_skip_decisions: config.backpressure.warn_threshold.is_none()
                && config.keep_last.is_none(),
            token: Mutex::new(PublishState {
                slots: Vec::new(),
                topics: TopicTable::new(config.max_topics),
                next_ticket: 0,
                closed: false,
                conflating: 0,
                last: config.keep_last.clone().map(LastEvents::new),
                #[cfg(feature = "broadcast")]
                broadcast: (backend == Backend::Broadcast)
                    .then(|| broadcast::Sender::new(capacity)),
            }),
            roster: ArcSwap::default(),
            latencies,
            topic_names: RwLock::new(vec!["".into()]),
            sleepers: Sleepers::default(),
            closed: Flag::default(),
            published: Counter::default(),
            sent: Counter::default(),
            next_subscription: AtomicU64::new(0),
            on_warning: OnceLock::new(),
            config,
        };
        Ok(Self { owner: Arc::new(Owner(Arc::new(shared))) })
    }

    fn shared(&self) -> &Arc<Shared<T, R>> {
        &self.owner.0
    }

    /// Returns a handle that does not keep the bus open.
    pub fn downgrade(&self) -> WeakBus<T, R> {
        WeakBus(Arc::downgrade(&self.owner))
    }

    /// Returns the bus's id, unique in the process.
    pub fn id(&self) -> u64 {
        self.shared().id
    }

    /// Returns how the bus carries events.
    pub fn backend(&self) -> Backend {
        self.shared().backend
    }

    /// Returns the default capacity of a subscription in events, a power of two.
    pub fn capacity(&self) -> usize {
        self.shared().capacity
    }

    /// Returns how the bus treats subscriptions that cannot keep up.
    pub fn backpressure(&self) -> &BackpressureConfig {
        &self.shared().config.backpressure
    }

    /// Calls `sink` in the publisher's thread, after publication, whenever a subscription reaches
    /// `warn_threshold`. Returns false if there was a sink already.
    pub fn on_warning(&self, sink: impl Fn(Warning) + Send + Sync + 'static) -> bool {
        self.shared().on_warning.set(Box::new(sink)).is_ok()
    }

    /// Returns the named topic, compiled against every subscription.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the name is no topic or the bus knows `max_topics` already.
    pub fn topic(&self, name: &str) -> Result<Topic, ConfigError> {
        let mut state = self.shared().token.lock();
        let PublishState { slots, topics, last, .. } = &mut *state;
        let subscriptions =
            slots.iter().flatten().map(|slot| (slot.inbox.slot, slot.inbox.pattern.as_ref()));
        let (id, name) = topics.intern(name, subscriptions)?;
        let mut names = self.shared().topic_names.write();
        if names.len() == id as usize {
            names.push(name.clone());
        }
        if let Some(last) = last {
            last.learn(id, &name);
        }
        Ok(Topic { bus: self.shared().id, id, name })
    }

    /// Returns the last event that was published on a topic, as [`EventBus::last`] does.
    ///
    /// # Errors
    ///
    /// As [`EventBus::last`].
    pub fn last(&self, topic: &str) -> Result<Option<T>, ConfigError> {
        let state = self.shared().token.lock();
        let Some(last) = &state.last else { return Err(keeps_nothing("last()")) };
        let known = state.topics.find(topic);
        if known.is_none() {
            check_topic(topic)?;
        }
        last.last(known, topic)
    }

    /// Begins to publish an event: the time from here on is its latency if it is one of those that
    /// are measured.
    #[inline]
    pub fn enter(&self) -> Entry {
        self.shared().latencies.enter()
    }

    /// Publishes an event where nothing has to be decided: every subscription that wants it has
    /// room and nobody waits for any. Gives the event back otherwise, for a
    /// [`Bus::publication_since`] the same entry.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    pub fn publish_ready(&self, event: T, topic: Option<&Topic>, entry: Entry) -> Result<usize, T> {
        let shared = &**self.shared();
        if !shared.may_skip_decisions {
            return Err(event);
        }
        let topic = self.topic_id(topic);
        let mut state = shared.token.lock();
        let taken = state.publish_ready(topic, event, shared)?;
        shared.published.add_exclusive(1);
        if shared.sleepers.any_after_store::<R>() {
            let wake = state.sleepers_on(topic);
            drop(state);
            wake.into_iter().for_each(|inbox| inbox.gate.wake_one());
        } else {
            drop(state);
        }
        shared.latencies.leave(entry);
        Ok(taken)
    }

    /// Begins to publish an event; `rejects_wait` makes `reject` subscriptions worth waiting for.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    pub fn publication(
        &self,
        event: T,
        topic: Option<&Topic>,
        rejects_wait: bool,
    ) -> Publication<&Shared<T, R>, T, R> {
        self.publication_since(self.enter(), event, topic, rejects_wait)
    }

    /// As [`Bus::publication`], with what was done since the entry as part of its latency.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    pub fn publication_since(
        &self,
        entry: Entry,
        event: T,
        topic: Option<&Topic>,
        rejects_wait: bool,
    ) -> Publication<&Shared<T, R>, T, R> {
        let pending = self.pending(entry, event, topic, rejects_wait);
        Publication { shared: self.shared(), pending, marker: PhantomData }
    }

    #[inline]
    fn publish_as_configured(
        &self,
        event: T,
        topic: Option<&Topic>,
    ) -> Result<usize, PublishError<T>> {
        let entry = self.enter();
        self.publish_ready(event, topic, entry).or_else(|event| {
            let patience = self.backpressure().max_block_duration;
            let mut publication = self.publication_since(entry, event, topic, false);
            publication.run(|| Instant::now().checked_add(patience))
        })
    }

    /// As [`Bus::publication`], for keeping across suspensions.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    pub fn owned_publication(
        &self,
        event: T,
        topic: Option<&Topic>,
        rejects_wait: bool,
    ) -> Publication<Arc<Shared<T, R>>, T, R> {
        let pending = self.pending(self.enter(), event, topic, rejects_wait);
        Publication { shared: self.shared().clone(), pending, marker: PhantomData }
    }

    #[inline]
    fn topic_id(&self, topic: Option<&Topic>) -> u32 {
        let Some(topic) = topic else { return NO_TOPIC };
        assert!(
            topic.bus == self.shared().id,
            "topic {:?} belongs to another bus; make it with topic() of this one",
            topic.name
        );
        topic.id
    }

    fn pending(
        &self,
        entry: Entry,
        event: T,
        topic: Option<&Topic>,
        rejects_wait: bool,
    ) -> Pending<T> {
        Pending {
            entry,
            event: Some(event),
            topic: self.topic_id(topic),
            rejects_wait,
            ticket: NEWCOMER,
            notify: None,
            keys: SmallVec::new(),
            stand: None,
        }
    }

    /// Returns a subscription for this thread's kind of waiting.
    ///
    /// # Errors
    ///
    /// `SubscribeError::Config` if the backend cannot keep what was asked for, `Closed` after
    /// `close()`.
    pub fn subscribe_with(
        &self,
        options: SubscribeOptions<T>,
    ) -> Result<EventSubscription<T, R>, SubscribeError> {
        let inbox = self.shared().subscribe(options)?;
        Ok(EventSubscription::new(self.shared().clone(), inbox))
    }

    /// Closes the bus: publishing ends at once, readers first read what is pending.
    pub fn close(&self) {
        self.shared().close();
    }

    /// Returns whether the bus is closed.
    pub fn is_closed(&self) -> bool {
        self.shared().closed.is_set()
    }

    /// Returns the bus's numbers, read one after another while others go on.
    pub fn metrics(&self) -> EventBusMetrics {
        let shared = self.shared();
        let roster = shared.roster.load_full();
        let subscriptions = shared.rows(&roster);
        let pending: u64 = subscriptions.iter().map(|row| row.pending).sum();
        EventBusMetrics {
            total_published: shared.published.value(),
            total_dropped: roster.left_dropped
                + subscriptions.iter().map(|row| row.dropped.total()).sum::<u64>(),
            subscriber_count: subscriptions.len(),
            avg_queue_depth: pending as f64 / subscriptions.len().max(1) as f64,
            publish_latency: shared.latencies.read(),
            subscriptions,
        }
    }

    /// Returns who stops publishers now, how far each subscription is behind, and since when. It
    /// reads what [`Bus::metrics`] reads and stops nobody either.
    pub fn explain(&self) -> Explanation {
        let shared = self.shared();
        Explanation::new(shared.id, self.is_closed(), shared.rows(&shared.roster.load_full()))
    }
}

/// What every bus does.
///
/// The number that publishing returns says how many subscriptions took the event. An error means
/// that nobody has it.
pub trait EventBus<T: Clone> {
    /// Returns the bus behind this face.
    fn bus(&self) -> &Bus<T>;

    /// Publishes an event, waiting at most `max_block_duration` for `block` subscriptions.
    ///
    /// # Errors
    ///
    /// `Full` if a `reject` subscription has no room, `Closed` after `close()`.
    #[inline]
    fn publish(&self, event: T) -> Result<usize, PublishError<T>> {
        self.bus().publish_as_configured(event, None)
    }

    /// Publishes an event on a topic, as [`EventBus::publish`] does.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish`].
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    fn publish_to(&self, topic: &Topic, event: T) -> Result<usize, PublishError<T>> {
        self.bus().publish_as_configured(event, Some(topic))
    }

    /// Publishes an event, waiting at most `timeout` for `block` and for `reject` subscriptions.
    ///
    /// # Errors
    ///
    /// `Timeout` if a `reject` subscription still has no room then, `Closed` after `close()`.
    fn publish_timeout(
        &self,
        event: T,
        topic: Option<&Topic>,
        timeout: Duration,
    ) -> Result<usize, PublishError<T>> {
        self.bus().publication(event, topic, true).run(|| Instant::now().checked_add(timeout))
    }

    /// Publishes events in order with one patience for all and returns how many.
    ///
    /// # Errors
    ///
    /// `PublishManyError` with the number of events published before the one that failed.
    fn publish_many<I>(&self, events: I) -> Result<usize, PublishManyError<T>>
    where
        I: IntoIterator<Item = T>,
        Self: Sized,
    {
        let patience = self.bus().backpressure().max_block_duration;
        let mut deadline = None;
        let mut accepted = 0;
        for event in events {
            let entry = self.bus().enter();
            self.bus()
                .publish_ready(event, None, entry)
                .or_else(|event| {
                    self.bus().publication_since(entry, event, None, false).run(|| {
                        *deadline.get_or_insert_with(|| Instant::now().checked_add(patience))
                    })
                })
                .map_err(|error| PublishManyError { accepted, error })?;
            accepted += 1;
        }
        Ok(accepted)
    }

    /// Publishes an event, waiting its turn without blocking the thread. The patience is the
    /// caller's: cancelled, nobody has the event.
    ///
    /// # Errors
    ///
    /// `Closed` after `close()`.
    fn publish_async(
        &self,
        event: T,
        topic: Option<&Topic>,
    ) -> impl Future<Output = Result<usize, PublishError<T>>> {
        let mut publication = self.bus().owned_publication(event, topic, true);
        async move {
            breathe().await;
            loop {
                if let Some(taken) = publication.poll(Patience::Left)? {
                    return Ok(taken);
                }
                publication.notified().await;
            }
        }
    }

    /// Returns a subscription to everything that holds up to `capacity` events, rounded up to a
    /// power of two.
    ///
    /// # Errors
    ///
    /// As [`Bus::subscribe_with`].
    fn subscribe(&self, capacity: usize) -> Result<EventSubscription<T>, SubscribeError> {
        let capacity = Some(capacity);
        self.bus().subscribe_with(SubscribeOptions { capacity, ..Default::default() })
    }

    /// Returns a subscription to be awaited, to everything, that holds up to `capacity` events,
    /// rounded up to a power of two.
    ///
    /// # Errors
    ///
    /// As [`Bus::subscribe_with`].
    fn subscribe_async(
        &self,
        capacity: usize,
    ) -> Result<AsyncEventSubscription<T>, SubscribeError> {
        self.subscribe(capacity).map(AsyncEventSubscription::from)
    }

    /// Returns a subscription with more wishes than a capacity.
    ///
    /// # Errors
    ///
    /// As [`Bus::subscribe_with`].
    fn subscribe_with(
        &self,
        options: SubscribeOptions<T>,
    ) -> Result<EventSubscription<T>, SubscribeError> {
        self.bus().subscribe_with(options)
    }

    /// Returns the last event that was published on a topic, if there is one; nobody has to
    /// subscribe to it. It stays readable after `close()`.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the name is no topic's, or the bus does not keep its last event: see
    /// [`BusConfig::keep_last`].
    fn last(&self, topic: &str) -> Result<Option<T>, ConfigError> {
        self.bus().last(topic)
    }

    /// Returns the named topic.
    ///
    /// # Errors
    ///
    /// As [`Bus::topic`].
    fn topic(&self, name: &str) -> Result<Topic, ConfigError> {
        self.bus().topic(name)
    }

    /// Returns the bus's numbers.
    fn metrics(&self) -> EventBusMetrics {
        self.bus().metrics()
    }

    /// Returns who stops publishers now, how far each subscription is behind, and since when.
    fn explain(&self) -> Explanation {
        self.bus().explain()
    }

    /// Closes the bus: publishing ends at once, readers first read what is pending.
    fn close(&self) {
        self.bus().close();
    }
}

macro_rules! face {
    ($(#[$attribute:meta])* $name:ident, $backend:ident) => {
        $(#[$attribute])*
        #[derive(Debug, Clone)]
        pub struct $name<T: Clone>(Bus<T>);

        impl<T: Clone> $name<T> {
            /// Returns a bus of the given capacity in events, rounded up to a power of two.
            ///
            /// # Errors
            ///
            /// `ConfigError` if the capacity is zero or too large.
            pub fn new(capacity: usize) -> Result<Self, ConfigError> {
                Self::with_config(BusConfig { capacity, ..Default::default() })
            }

            /// Returns a bus with more wishes than a capacity.
            ///
            /// # Errors
            ///
            /// `ConfigError` if a number is zero or too large.
            pub fn with_config(config: BusConfig) -> Result<Self, ConfigError> {
                Bus::new(Backend::$backend, config).map(Self)
            }
        }

        impl<T: Clone> EventBus<T> for $name<T> {
            #[inline]
            fn bus(&self) -> &Bus<T> {
                &self.0
            }
        }
    };
}

face!(
    /// One bounded channel per subscription: every subscription has its own capacity and policy,
    /// and blocking ones lose nothing.
    LockFreeEventBus,
    LockFree
);

#[cfg(feature = "broadcast")]
face!(
    /// One shared channel: publishing costs the same for any number of subscriptions, and who is
    /// slow loses the oldest events and is told.
    ///
    /// The channel drops an overwritten event while it is locked: a payload whose `Drop` publishes
    /// to the same bus deadlocks. (The Python module drops objects after publication instead.)
    BroadcastEventBus,
    Broadcast
);

/// A bus on a backend chosen at run time.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventBusImpl<T: Clone> {
    /// One shared channel.
    #[cfg(feature = "broadcast")]
    Broadcast(BroadcastEventBus<T>),
    /// One bounded channel per subscription.
    LockFree(LockFreeEventBus<T>),
}

impl<T: Clone> EventBusImpl<T> {
    /// Returns a bus on the given backend.
    ///
    /// # Errors
    ///
    /// `ConfigError` if a number is zero or too large.
    pub fn new(backend: Backend, config: BusConfig) -> Result<Self, ConfigError> {
        Ok(match backend {
            #[cfg(feature = "broadcast")]
            Backend::Broadcast => Self::Broadcast(BroadcastEventBus::with_config(config)?),
            Backend::LockFree => Self::LockFree(LockFreeEventBus::with_config(config)?),
        })
    }
}

impl<T: Clone> EventBus<T> for EventBusImpl<T> {
    #[inline]
    fn bus(&self) -> &Bus<T> {
        match self {
            #[cfg(feature = "broadcast")]
            Self::Broadcast(bus) => bus.bus(),
            Self::LockFree(bus) => bus.bus(),
        }
    }
}
