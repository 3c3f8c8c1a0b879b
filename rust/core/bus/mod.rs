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

mod at_once;
mod faces;
mod on_ring;
mod options;
mod producer;
mod publication;
mod publishing;
pub(crate) mod replaying;
mod slot;
#[cfg(all(test, feature = "broadcast", not(any(tickbus_loom, tickbus_shuttle))))]
mod stopped;
#[cfg(all(test, not(any(tickbus_loom, tickbus_shuttle))))]
mod stopped_strictly;

#[cfg(feature = "broadcast")]
pub use faces::BroadcastEventBus;
pub use faces::{EventBus, EventBusImpl, LockFreeEventBus, RingEventBus};
pub use options::{
    Backend, BusConfig, Producers, Start, SubscribeError, SubscribeOptions, WakeMode,
};
pub use producer::Producer;
pub use publication::{Patience, Publication};

use crate::backend::{Channel, Reader, Source, TopicNames};
use crate::barrier::Fences;
use crate::conflation::Conflation;
use crate::error::{ConfigError, PublishError, PublishManyError};
use crate::histogram::{Entry, Latencies};
use crate::last::LastEvents;
use crate::metrics::{EventBusMetrics, Explanation, SubscriptionMetrics, Warning};
use crate::policy::{BackpressureConfig, Policy, rounded_capacity};
use crate::ring::Ring;
use crate::ring::cursor::Cursor;
use crate::ring::reader::RingReader;
use crate::ring::sweep::Member;
use crate::subscription::{EventSubscription, Inbox};
use crate::sync::{
    AtomicU64, Counter, Exclusion, Flag, Mutex, Ordering, ThreadExclusion, store_load_fence,
};
use crate::topic::{Interest, NO_TOPIC, OTHER_SLOTS, Topic, TopicTable, check_topic, interest_bit};
use crate::wait::{Bell, Calls, Dormitory, wake_together};
use arc_swap::ArcSwap;
use at_once::AtOnce;
use on_ring::{RingState, apart};
use parking_lot::RwLock;
use publication::Pending;
use publishing::PublishState;
use replaying::Replaying;
use slot::{Carrier, Conflating, OnRing, Other, Slot};
use smallvec::SmallVec;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;
use tokio::sync::Notify;
#[cfg(feature = "broadcast")]
use tokio::sync::broadcast;

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
    /// What publishers on a ring look at without the token.
    pub(crate) ring: Option<Arc<Ring<T, R>>>,
    untitled: Arc<Interest>,
    /// Where its readers sleep: with nobody there, publishing looks at no line.
    pub(crate) dormitory: Arc<Dormitory>,
    /// Those between whoever publishes or reads and whoever is about to sleep.
    pub(crate) fences: Fences,
    /// Nobody sleeps for events: readers look again by themselves, and are not woken.
    pub(crate) is_polled: bool,
    /// The subscriptions, for readers of metrics, who never take the token.
    roster: ArcSwap<Roster<T, R>>,
    latencies: Latencies<R>,
    /// By topic id, for readers of the shared channel, who never take the token.
    topic_names: RwLock<Vec<Arc<str>>>,
    pub(crate) closed: Flag,
    published: Counter,
    replaying: Replaying,
    /// Entries ever sent through the shared channel (`broadcast`).
    pub(crate) sent: Counter,
    next_subscription: AtomicU64,
    on_warning: OnceLock<WarningSink>,
}

/// The id of a topic, and who wants it.
pub(crate) type Address<'a> = (u32, &'a Interest);

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

/// What subscriptions of several buses that are read together have in common.
pub(crate) struct Joint {
    pub(crate) id: u64,
    /// Of a line of the dormitory that the buses share.
    pub(crate) bell: Arc<Bell>,
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
    /// Returns whether subscriptions have no channels of their own.
    #[cfg(feature = "broadcast")]
    pub(crate) fn is_shared_channel(&self) -> bool {
        self.backend == Backend::Broadcast
    }

    #[cfg(not(feature = "broadcast"))]
    pub(crate) fn is_shared_channel(&self) -> bool {
        false
    }

    /// Returns the id of a topic, and who wants it.
    #[inline]
    fn address<'a>(&'a self, topic: Option<&'a Topic>) -> Address<'a> {
        let Some(topic) = topic else { return (NO_TOPIC, &self.untitled) };
        assert!(
            topic.bus == self.id,
            "topic {:?} belongs to another bus; make it with topic() of this one",
            topic.name
        );
        (topic.id, &topic.interest)
    }

    /// Returns how many events were published.
    fn published(&self) -> u64 {
        self.ring.as_ref().map_or_else(|| self.published.value(), |ring| ring.right.tail())
    }

    /// The fence of step S1, of a reader that is in line.
    pub(crate) fn fence_asleep(&self) {
        if !R::SERIALIZES_SLEEP && !self.is_polled {
            self.fences.rarely();
        }
    }

    /// The fence of step W2 for readers; false if there is nobody to look for. Where the fence costs
    /// nothing, looking for who is never there costs less than asking whether readers are polled.
    #[inline(always)]
    fn fence_awake(&self, fences: Fences) -> bool {
        if R::SERIALIZES_SLEEP {
            return true;
        }
        if fences == Fences::Symmetric && self.is_polled {
            return false;
        }
        fences.often();
        true
    }

    /// The fence of step W2 for one who was woken and goes away.
    pub(crate) fn fence_waker(&self) {
        self.fence_awake(self.fences);
    }

    /// Step W2: returns whether any reader may be asleep.
    #[inline]
    fn is_any_reader_asleep(&self) -> bool {
        self.fence_awake(self.fences) && self.dormitory.asleep().any_of(u64::MAX)
    }

    /// Wakes a reader of each subscription that wants the topic, whose mask is `wanted`, and sleeps.
    /// Called without any lock; the token is taken where several subscriptions have one bit.
    #[cold]
    #[inline(never)]
    fn wake(&self, topic: u32, wanted: u64) {
        self.dormitory.wake(wanted);
        if self.dormitory.asleep().any_of(wanted & OTHER_SLOTS) {
            let is_other = |slot: &u32| interest_bit(*slot) == OTHER_SLOTS;
            let others: SmallVec<[u32; 64]> = {
                let state = self.token.lock();
                state.topics.wanted(topic).iter().copied().filter(is_other).collect()
            };
            self.dormitory.wake_others(&others);
        }
    }

    /// Begins to publish an event again, to those of the named subscriptions that are still here and
    /// to nobody else.
    pub(crate) fn publication_again(
        self: &Arc<Self>,
        event: T,
        topic: u32,
        missing: &[u64],
    ) -> Publication<Arc<Self>, T, R> {
        let mut pending = Pending::new(self.latencies.enter(), event, topic, false);
        let state = self.token.lock();
        let here = state.slots.iter().flatten().map(|slot| (slot.inbox.slot, slot.inbox.id));
        pending.at_once = Some(AtOnce::again(here.filter(|(_, id)| missing.contains(id))));
        drop(state);
        pending.publication(self.clone())
    }

    fn close(&self) {
        let lines: Vec<Arc<Notify>> = {
            let mut state = self.token.lock();
            let paused = self.ring.as_ref().map(|ring| ring.right.pause());
            state.closed = true;
            if let Some(paused) = paused {
                paused.grant(0);
            }
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
            let roster = self.roster.load();
            wake_together(|| roster.inboxes.iter().for_each(|inbox| inbox.bell.wake_all()));
        }
    }

    /// Passes freed room on to the publishers in line.
    #[cold]
    pub(crate) fn room_was_freed(&self, inbox: &Inbox<T, R>) {
        let mut state = self.token.lock();
        let PublishState { slots, .. } = &mut *state;
        let is_it = |slot: &&mut Slot<T, R>| slot.inbox.id == inbox.id;
        let Some(slot) = slots[inbox.slot as usize].as_mut().filter(is_it) else { return };
        slot.serve_line();
        if slot.room > 0 || slot.line.is_empty() {
            return;
        }
        // Whoever reads cannot be moved over what it does not want, and the publisher that found it
        // reading sleeps: so it is moved now.
        let Some(ring) = &self.ring else { return };
        let paused = ring.right.pause();
        state.sweep(&paused);
        paused.grant(state.permit(self));
        if let Some(slot) = &mut state.slots[inbox.slot as usize] {
            slot.serve_line();
        }
    }

    fn subscribe(
        &self,
        options: SubscribeOptions<T>,
        joint: Option<Joint>,
    ) -> Result<Arc<Inbox<T, R>>, SubscribeError> {
        let policy = self.backend.policy(options.policy, self.config.backpressure.drop_oldest)?;
        if options.start != Start::Now && (self.ring.is_none() || policy == Policy::Conflate) {
            return Err(ConfigError::new(format!(
                "start was {:?}; only backend ring keeps events for who joins late, and not for \
                 policy conflate: use backend ring, or Start::Now",
                options.start
            ))
            .into());
        }
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
        let (id, bell) = match joint {
            Some(Joint { id, bell }) => (id, bell),
            None => {
                let id = self.next_subscription.fetch_add(1, Ordering::Relaxed);
                (id, Arc::new(self.dormitory.bell()))
            }
        };
        let joined = Instant::now();
        let mut state = self.token.lock();
        if state.closed {
            return Err(SubscribeError::Closed);
        }
        let roster = self.roster.load_full();
        if let Some(name) = &options.name {
            check_name(name, roster.inboxes.iter().map(|other| &other.name))?;
        }
        let mut member = None;
        let mut late = 0;
        let mut joined_at = self.sent.value();
        let (capacity, carrier, source) = match self.backend {
            _ if policy == Policy::Conflate => {
                // From now on every publication asks.
                if let Some(ring) = &self.ring {
                    ring.right.pause().grant(0);
                }
                let map = Arc::new(Mutex::new(Conflation::new(capacity)));
                let conflating = Conflating { map: map.clone(), key: options.key };
                let carrier = Carrier::Other(Other::Conflating(Box::new(conflating)));
                (capacity, carrier, Source::Conflation(map))
            }
            Backend::LockFree => {
                let channel = Channel::new(capacity);
                (capacity, Carrier::Own(channel.clone()), Source::Channel(channel))
            }
            _ if capacity > self.capacity => {
                return Err(ConfigError::new(format!(
                    "capacity was {capacity}; what all subscriptions share on backend {} holds \
                     {}: ask for less, make the bus with more, or use backend lock_free",
                    self.backend.name(),
                    self.capacity
                ))
                .into());
            }
            Backend::Ring => {
                let Some(ring) = &self.ring else { return Err(SubscribeError::Closed) };
                let tail = ring.right.tail();
                let oldest = state.ring.as_ref().map_or(tail, RingState::oldest_kept);
                let wanted = match options.start {
                    Start::Now => tail,
                    Start::OldestKept => oldest,
                    Start::Sequence(sequence) if sequence > tail => {
                        return Err(ConfigError::new(format!(
                            "start was sequence {sequence}; the next event has {tail}: ask for \
                             one that was published, or for Start::Now"
                        ))
                        .into());
                    }
                    Start::Sequence(sequence) => sequence,
                };
                let position = wanted.max(oldest);
                let cursor = Arc::new(Cursor::new(position));
                let is_wide = options.pattern.is_none();
                let stays = is_wide && policy == Policy::Reject;
                member = Some(Member::new(
                    cursor.clone(),
                    is_wide,
                    policy == Policy::DropOldest,
                    position,
                ));
                late = position - wanted;
                joined_at = wanted;
                let place = OnRing { ring: ring.clone(), cursor: cursor.clone() };
                let reader = RingReader::new(ring.clone(), cursor, is_wide, stays, late);
                let carrier = Carrier::Other(Other::Ring(Box::new(place)));
                (self.capacity, carrier, Source::Ring(reader))
            }
            #[cfg(feature = "broadcast")]
            Backend::Broadcast => {
                let Some(sender) = &state.broadcast else { return Err(SubscribeError::Closed) };
                let source = Source::Broadcast(sender.subscribe());
                (self.capacity, Carrier::Other(Other::Shared), source)
            }
        };
        let index = bell.line();
        let slot = index as usize;
        if state.slots.len() <= slot {
            state.slots.resize_with(slot + 1, || None);
        }
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
            joined_at,
            late,
            Reader::new(source.after(snapshot), offered),
            bell,
        ));
        if let (Some(member), Some(ring)) = (member, &mut state.ring) {
            ring.join(slot, member);
        }
        let conflates = policy == Policy::Conflate;
        state.conflating += usize::from(conflates);
        state.slots[slot] = Some(Slot {
            inbox: inbox.clone(),
            policy,
            carrier,
            room: if conflates || self.ring.is_some() { 0 } else { capacity },
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
            inbox.left_at.publish(match &self.ring {
                Some(ring) => ring.right.tail(),
                None => self.sent.value(),
            });
            let discarded = inbox.discard(self);
            if let Some(ring) = &mut state.ring
                && let Some(member) = ring.members.get_mut(inbox.slot as usize)
            {
                *member = None;
            }
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
        inbox.bell.wake_all();
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
        let calls = match backend {
            Backend::Ring if !R::SERIALIZES_SLEEP => Calls::Once,
            _ => Calls::Every,
        };
        Self::beside(Arc::new(Dormitory::new(calls)), backend, config)
    }

    /// As [`Bus::new`], for a bus whose readers sleep together with those of others.
    pub(crate) fn beside(
        dormitory: Arc<Dormitory>,
        backend: Backend,
        config: BusConfig,
    ) -> Result<Self, ConfigError> {
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
        if config.producers == Producers::Strict && backend != Backend::Ring {
            return Err(ConfigError::new(format!(
                "producers was strict on backend {}; only on backend ring publishers can do without \
                 a lock: use backend ring, or producers shared",
                backend.name()
            )));
        }
        let latencies = Latencies::new(config.latency_sampling)?;
        let topics = TopicTable::new(config.max_topics);
        let untitled = topics.interest(NO_TOPIC).clone();
        let (ring, fences) = match backend {
            Backend::Ring => {
                let fences = match config.wake_mode {
                    WakeMode::Fenced => Fences::Symmetric,
                    _ if R::SERIALIZES_SLEEP => Fences::Symmetric,
                    WakeMode::Auto | WakeMode::Polling => Fences::best(),
                };
                let ring = match config.producers {
                    Producers::Strict if !R::SERIALIZES_SLEEP => {
                        Ring::strict(capacity, Fences::Symmetric)
                    }
                    _ => Ring::new(capacity, fences),
                };
                (Some(Arc::new(ring)), fences)
            }
            _ => (None, Fences::Symmetric),
        };
        let shared = Shared {
            id: next_bus_id(),
            backend,
            capacity,
            may_skip_decisions: config.backpressure.warn_threshold.is_none()
                && config.keep_last.is_none(),
            token: Mutex::new(PublishState {
                slots: Vec::new(),
                topics,
                next_ticket: 0,
                closed: false,
                conflating: 0,
                last: config.keep_last.clone().map(LastEvents::new),
                #[cfg(feature = "broadcast")]
                broadcast: (backend == Backend::Broadcast)
                    .then(|| broadcast::Sender::new(capacity)),
                ring: ring.clone().map(RingState::new),
            }),
            untitled,
            dormitory,
            fences,
            is_polled: config.wake_mode == WakeMode::Polling && !R::SERIALIZES_SLEEP,
            ring,
            roster: ArcSwap::default(),
            latencies,
            topic_names: RwLock::new(vec!["".into()]),
            closed: Flag::default(),
            published: Counter::default(),
            replaying: Replaying::default(),
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
        let interest = topics.interest(id).clone();
        Ok(Topic { bus: self.shared().id, id, name, interest })
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

    /// Calls `look` with each last event that the bus keeps, its topic's id, and how many events
    /// were published before it. `look` runs under the publish token.
    pub fn each_last(&self, mut look: impl FnMut(u32, u64, &T)) {
        let state = self.shared().token.lock();
        for (topic, number, event) in state.last.iter().flat_map(LastEvents::each) {
            look(topic, number, event);
        }
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
        if let Some(ring) = &shared.ring {
            let (topic, interest) = shared.address(topic);
            if !R::SERIALIZES_SLEEP && ring.right.is_strict() {
                let taken = shared.publish_strictly(ring, (topic, interest), event)?;
                shared.latencies.leave(entry);
                return Ok(taken);
            }
            let taken = match ring.claim() {
                Some(claim) => {
                    let fences = shared.fences;
                    let asleep = shared.dormitory.asleep();
                    shared.publish_on_ring(ring, claim, (topic, interest), event, fences, asleep)
                }
                None => {
                    let displaced = ring.publish_among_others(topic, event)?;
                    let asleep = shared.dormitory.asleep();
                    let taken = shared.taken_on_ring((topic, interest), shared.fences, asleep);
                    drop(displaced);
                    taken
                }
            };
            shared.latencies.leave(entry);
            return Ok(taken);
        }
        if !shared.may_skip_decisions {
            return Err(event);
        }
        let (topic, interest) = shared.address(topic);
        let mut state = shared.token.lock();
        let taken = state.publish_ready(topic, event, shared)?;
        shared.published.add_exclusive(1);
        drop(state);
        if shared.is_any_reader_asleep() {
            shared.wake(topic, interest.mask());
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
        let (topic, _) = self.shared().address(topic);
        Pending::new(entry, event, topic, rejects_wait).publication(self.shared())
    }

    #[inline(always)]
    pub(crate) fn publish_as_configured(
        &self,
        event: T,
        topic: Option<&Topic>,
    ) -> Result<usize, PublishError<T>> {
        self.publish_before(event, topic, || {
            Instant::now().checked_add(self.backpressure().max_block_duration)
        })
    }

    #[inline(always)]
    fn publish_before(
        &self,
        event: T,
        topic: Option<&Topic>,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Result<usize, PublishError<T>> {
        let shared = &**self.shared();
        // Everything else is a call, so that here the event goes straight into its slot.
        if let Some(ring) = shared.ring.as_deref()
            && let Some(claim) = ring.claim()
        {
            let (address, asleep) = (shared.address(topic), shared.dormitory.asleep());
            let fences = shared.fences.of_seat();
            return Ok(shared.publish_on_ring(ring, claim, address, event, fences, asleep));
        }
        self.publish_slowly(apart(event), topic, deadline)
    }

    #[inline(never)]
    fn publish_slowly(
        &self,
        event: T,
        topic: Option<&Topic>,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Result<usize, PublishError<T>> {
        let shared = &**self.shared();
        let ring = shared.ring.as_ref().filter(|ring| !ring.right.is_strict());
        let entry = ring.and_then(|ring| shared.go_on(ring, false)).unwrap_or_else(|| self.enter());
        self.publish_ready(event, topic, entry)
            .or_else(|event| self.publication_since(entry, event, topic, false).run(deadline))
    }

    /// Publishes events in order with one patience for all, and returns how many.
    fn publish_each<'a>(
        &self,
        events: impl Iterator<Item = (Option<&'a Topic>, T)>,
    ) -> Result<usize, PublishManyError<T>> {
        let patience = self.backpressure().max_block_duration;
        let mut deadline = None;
        let mut accepted = 0;
        for (topic, event) in events {
            self.publish_before(event, topic, || {
                *deadline.get_or_insert_with(|| Instant::now().checked_add(patience))
            })
            .map_err(|error| PublishManyError { accepted, error })?;
            accepted += 1;
        }
        Ok(accepted)
    }

    /// As [`EventBus::publish_batch`].
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish_batch`].
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    pub fn publish_batch(
        &self,
        topic: Option<&Topic>,
        events: &[T],
    ) -> Result<usize, PublishManyError<T>> {
        match &self.shared().ring {
            Some(ring) => self.shared().publish_batch_on_ring(ring, false, topic, events),
            None => self.publish_each(events.iter().map(|event| (topic, event.clone()))),
        }
    }

    /// Publishes the first of `count` events at once where nothing has to be decided, and returns
    /// how many: 0 but on a ring. `next` returns each; as long as it runs others wait, and it uses
    /// no bus.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    pub fn publish_ready_batch(
        &self,
        topic: Option<&Topic>,
        count: usize,
        next: impl FnMut() -> T,
    ) -> usize {
        let shared = &**self.shared();
        shared.ring.as_ref().map_or(0, |ring| shared.fill_ring(ring, topic, count, next))
    }

    /// Returns where events on a topic go.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    pub(crate) fn address<'a>(&'a self, topic: Option<&'a Topic>) -> Address<'a> {
        self.shared().address(topic)
    }

    /// As [`Bus::publish_batch`] on a ring, each event to an address of its own.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish_batch`].
    #[inline]
    pub(crate) fn publish_copies(
        &self,
        addresses: &[Address<'_>],
        events: &[T],
    ) -> Result<usize, PublishManyError<T>>
    where
        T: Copy,
    {
        let Some(ring) = &self.shared().ring else { unreachable!("the bus has a ring") };
        self.shared().publish_copies_on_ring(ring, addresses, events)
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
        let (topic, _) = self.shared().address(topic);
        Pending::new(self.enter(), event, topic, rejects_wait).publication(self.shared().clone())
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
        let inbox = self.shared().subscribe(options, None)?;
        Ok(EventSubscription::new(self.shared().clone(), inbox))
    }

    /// As [`Bus::subscribe_with`], as one of several subscriptions that are read together.
    pub(crate) fn subscribe_jointly(
        &self,
        options: SubscribeOptions<T>,
        joint: Joint,
    ) -> Result<EventSubscription<T, R>, SubscribeError> {
        let inbox = self.shared().subscribe(options, Some(joint))?;
        Ok(EventSubscription::new(self.shared().clone(), inbox))
    }

    /// Begins to publish an event at once to every subscription with room, waiting for the others
    /// only. See [`PublishError::Overflow`].
    pub(crate) fn publication_at_once(
        &self,
        event: T,
        topic: Option<&Topic>,
    ) -> Publication<Arc<Shared<T, R>>, T, R> {
        let (topic, _) = self.shared().address(topic);
        let mut pending = Pending::new(self.enter(), event, topic, false);
        pending.at_once = Some(AtOnce::default());
        pending.publication(self.shared().clone())
    }

    /// Returns what publishers and readers share, which does not keep the bus open.
    pub(crate) fn share(&self) -> Arc<Shared<T, R>> {
        self.shared().clone()
    }

    /// Closes the bus: publishing ends at once, readers first read what is pending.
    pub fn close(&self) {
        self.shared().close();
    }

    /// Returns whether the bus is closed.
    pub fn is_closed(&self) -> bool {
        self.shared().closed.is_set()
    }

    /// Returns how many events were published, wanted or not.
    pub fn published(&self) -> u64 {
        self.shared().published()
    }

    /// Returns how many events wait to be read, over all subscriptions.
    pub(crate) fn pending(&self) -> u64 {
        let shared = self.shared();
        let inboxes = &shared.roster.load().inboxes;
        inboxes.iter().map(|inbox| inbox.backlog(shared).0 as u64).sum()
    }

    /// Calls `look` with topic id, sequence and event of each that a ring keeps for who joins late,
    /// the oldest first, while nobody publishes. Other backends keep none.
    pub fn each_kept(&self, mut look: impl FnMut(u32, u64, &T)) {
        let shared = self.shared();
        let state = shared.token.lock();
        let (Some(kept), Some(ring)) = (&state.ring, &shared.ring) else { return };
        let paused = ring.right.pause();
        for sequence in kept.oldest_kept()..paused.next() {
            // SAFETY: it was published, and nobody overwrites anything before the pause ends.
            unsafe {
                ring.slots.read(sequence, |event| look(ring.slots.topic(sequence), sequence, event))
            };
        }
    }

    /// Returns the bus's numbers, read one after another while others go on.
    pub fn metrics(&self) -> EventBusMetrics {
        let shared = self.shared();
        let roster = shared.roster.load_full();
        let subscriptions = shared.rows(&roster);
        let pending: u64 = subscriptions.iter().map(|row| row.pending).sum();
        EventBusMetrics {
            total_published: shared.published(),
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
