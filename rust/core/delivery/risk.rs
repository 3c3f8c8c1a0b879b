//! Which consumer has acknowledged which risk event: decided here, without a clock and without a disk.
//!
//! ```text
//!  Published ─► ready ─► AttemptBegun ─► in flight ─► Acked
//!     │ (an earlier one    ▲                │
//!     │  of its key first) │                ├─► Failed ─► waits ─┐
//!     │                    └────────────────┼────────────────────┘
//!     └─► Escalated, by age                 └─► Failed, the last one ─► Escalated ─► DeadLettered
//! ```
//!
//! Each word with a capital is an entry of the ledger, which is made true by [`Risk::apply`], now as
//! after a restart. What was in flight when the process ended has failed.

use super::entry::{ConsumerId, Entry, FailedAttempt, NOBODY};
use super::mutants::{Mutant, is_broken};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

/// How risk events are delivered in this process. Times are in nanoseconds.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) lease: u64,
    pub(crate) max_attempts: u32,
    pub(crate) retry_base: u64,
    pub(crate) retry_cap: u64,
    pub(crate) escalate_after: u64,
    pub(crate) max_in_flight: usize,
}

/// An attempt to deliver an event, as it is given to a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Begun {
    pub(crate) id: u64,
    pub(crate) attempt: u32,
    pub(crate) key: Option<Arc<str>>,
}

/// Something that somebody has to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A consumer has not acknowledged an event in time, or there is none.
    Escalated {
        /// The event.
        id: u64,
        /// The consumer; `None` if there was none when the event was published.
        consumer: Option<Arc<str>>,
        /// Attempts so far.
        attempts: u32,
    },
    /// A consumer gets an event no more.
    DeadLettered {
        /// The event.
        id: u64,
        /// The consumer; `None` if there was none when the event was published.
        consumer: Option<Arc<str>>,
        /// Why.
        reason: Arc<str>,
    },
    /// A consumer has so many events in its hands that it gets no more before it acknowledges some.
    TooManyInFlight {
        /// The consumer.
        consumer: Arc<str>,
        /// Events in its hands.
        in_flight: usize,
    },
}

/// Numbers since the log was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RiskNumbers {
    pub(crate) published: u64,
    pub(crate) acked: u64,
    pub(crate) failed: u64,
    pub(crate) escalated: u64,
    pub(crate) dead_lettered: u64,
    pub(crate) limited: u64,
    pub(crate) refused: u64,
}

/// What has come of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Somebody has not acknowledged it, after so many attempts.
    Pending(u32),
    /// Each consumer has acknowledged it.
    Acked,
    /// It is a dead letter.
    Dead,
    /// There is no such event.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// An earlier event of its key comes first.
    Blocked,
    Ready,
    /// Until a time.
    InFlight(u64),
    /// It is tried again at a time.
    Waiting(u64),
}

#[derive(Debug)]
struct Item {
    key: Option<Arc<str>>,
    /// Its place in the order in which events came.
    place: u64,
    phase: Phase,
    attempts: u32,
    history: Vec<FailedAttempt>,
    is_escalated: bool,
    /// Its last attempt was begun by this process.
    is_own: bool,
}

#[derive(Debug)]
pub(crate) struct Consumer {
    pub(crate) name: Arc<str>,
    pub(crate) is_ordered: bool,
    items: HashMap<u64, Item>,
    /// Events of a key, in order; without a key there is no order.
    queues: HashMap<Arc<str>, VecDeque<u64>>,
    /// Places and events.
    ready: BTreeSet<(u64, u64)>,
    in_flight: usize,
    is_limited: bool,
}

/// An event that a consumer gets no more, before it is delivered again or discarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Letter {
    pub(crate) key: Option<Arc<str>>,
    pub(crate) reason: Arc<str>,
    pub(crate) history: Vec<FailedAttempt>,
}

/// What happens at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Retry,
    Lease,
    Escalate,
}

/// All risk events that somebody has not acknowledged.
#[derive(Debug)]
pub(crate) struct Risk {
    consumers: BTreeMap<ConsumerId, Consumer>,
    ids: HashMap<Arc<str>, ConsumerId>,
    pub(crate) next: ConsumerId,
    letters: BTreeMap<(u64, ConsumerId), Letter>,
    /// Names of dead letters' consumers that are gone.
    gone: HashMap<ConsumerId, Arc<str>>,
    pub(crate) last_published: Option<u64>,
    next_place: u64,
    /// `None` while this process delivers none.
    rules: Option<Rules>,
    /// How often it has begun to deliver.
    life: u64,
    random: u64,
    timers: BTreeSet<(u64, Timer, ConsumerId, u64)>,
    /// What nobody was told yet.
    pub(crate) notices: VecDeque<Notice>,
    /// Events that nobody needs any more.
    pub(crate) settled: Vec<u64>,
    pub(crate) numbers: RiskNumbers,
}

impl Default for Risk {
    fn default() -> Self {
        Self {
            consumers: BTreeMap::new(),
            ids: HashMap::new(),
            next: NOBODY + 1,
            letters: BTreeMap::new(),
            gone: HashMap::new(),
            last_published: None,
            next_place: 0,
            rules: None,
            life: 0,
            random: 0,
            timers: BTreeSet::new(),
            notices: VecDeque::new(),
            settled: Vec::new(),
            numbers: RiskNumbers::default(),
        }
    }
}

/// Why an attempt failed that was in flight when the process ended.
const PROCESS_ENDED: &str = "the process ended before it was acknowledged";
const LEASE_ENDED: &str = "it was not acknowledged before its lease ended";
const NO_CONSUMER: &str = "no consumer was registered when it was published";
const REMOVED: &str = "its consumer was removed";
/// Notices that nobody asks for are kept up to so many.
const MAX_NOTICES: usize = 65_536;

impl Risk {
    /// Returns the consumer of a name.
    pub(crate) fn id(&self, name: &str) -> Option<ConsumerId> {
        self.ids.get(name).copied()
    }

    pub(crate) fn consumers(&self) -> impl Iterator<Item = (ConsumerId, &Consumer)> {
        self.consumers.iter().map(|(id, consumer)| (*id, consumer))
    }

    pub(crate) fn get(&self, consumer: ConsumerId) -> Option<&Consumer> {
        self.consumers.get(&consumer)
    }

    pub(crate) fn letters(&self) -> impl Iterator<Item = (u64, ConsumerId, &Letter)> {
        self.letters.iter().map(|((id, consumer), letter)| (*id, *consumer, letter))
    }

    /// Returns the name of a consumer, of one that is gone too.
    pub(crate) fn name(&self, consumer: ConsumerId) -> Option<Arc<str>> {
        let known = self.consumers.get(&consumer).map(|consumer| &consumer.name);
        known.or_else(|| self.gone.get(&consumer)).cloned()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.rules.is_some()
    }

    /// Returns whether this process still delivers as it has since `start` has returned this.
    pub(crate) fn is_in(&self, life: u64) -> bool {
        self.is_running() && !self.is_past(life)
    }

    /// Returns whether this process has begun to deliver anew since `start` has returned this.
    pub(crate) fn is_past(&self, life: u64) -> bool {
        self.life != life
    }

    /// Begins to deliver in this process: what was in flight has failed, and ages count from now.
    /// Returns which of its lives that is.
    pub(crate) fn start(&mut self, rules: Rules, seed: u64, now: u64) -> u64 {
        self.life += 1;
        let escalate = now.saturating_add(rules.escalate_after);
        (self.rules, self.random) = (Some(rules), seed);
        self.numbers = RiskNumbers::default();
        self.notices.clear();
        self.timers.clear();
        let mut waiting = Vec::new();
        for (&id, consumer) in &mut self.consumers {
            consumer.is_limited = false;
            for (&event, item) in &mut consumer.items {
                (item.is_escalated, item.is_own) = (false, false);
                self.timers.insert((escalate, Timer::Escalate, id, event));
                match &mut item.phase {
                    Phase::InFlight(_) if is_broken(Mutant::ForgetsInFlight) => {}
                    Phase::InFlight(until) => {
                        *until = now;
                        self.timers.insert((now, Timer::Lease, id, event));
                    }
                    Phase::Waiting(_) => waiting.push((id, event, item.attempts)),
                    Phase::Blocked | Phase::Ready => {}
                }
            }
        }
        // In an order that a seed determines.
        waiting.sort_unstable();
        for (id, event, attempts) in waiting {
            let due = now.saturating_add(self.delay(attempts));
            if let Some(item) = self.consumers.get_mut(&id).and_then(|c| c.items.get_mut(&event)) {
                item.phase = Phase::Waiting(due);
                self.timers.insert((due, Timer::Retry, id, event));
            }
        }
        self.life
    }

    /// Delivers nothing more in this process, unless it has begun anew since.
    pub(crate) fn stop(&mut self, life: u64) {
        if !self.is_past(life) {
            self.rules = None;
        }
    }

    /// Decides on a consumer that wants events from now on.
    pub(crate) fn register(&self, name: &str, is_ordered: bool) -> (ConsumerId, Option<Entry>) {
        match self.id(name) {
            Some(id) if self.get(id).is_some_and(|known| known.is_ordered == is_ordered) => {
                (id, None)
            }
            known => {
                let consumer = known.unwrap_or(self.next);
                let name = name.into();
                (consumer, Some(Entry::ConsumerRegistered { consumer, name, is_ordered }))
            }
        }
    }

    /// Decides on a consumer that wants no more: what it has not acknowledged becomes dead letters.
    pub(crate) fn remove(&self, consumer: ConsumerId) -> Vec<Entry> {
        let Some(known) = self.get(consumer) else { return Vec::new() };
        let mut entries = Vec::new();
        for (_, id) in known.in_order() {
            if !known.items[&id].is_escalated {
                entries.push(Entry::Escalated { consumer, id });
            }
            entries.push(Entry::DeadLettered { consumer, id, reason: REMOVED.into() });
        }
        entries.push(Entry::ConsumerRemoved { consumer });
        entries
    }

    /// Decides on an event.
    pub(crate) fn publish(&self, id: u64, key: Option<Arc<str>>) -> Vec<Entry> {
        let mut entries = vec![Entry::Published { id, key }];
        if self.consumers.is_empty() {
            let consumer = NOBODY;
            entries.push(Entry::Escalated { consumer, id });
            entries.push(Entry::DeadLettered { consumer, id, reason: NO_CONSUMER.into() });
        }
        entries
    }

    /// Decides on what a consumer gets next.
    pub(crate) fn take(&self, consumer: ConsumerId) -> Option<(Begun, Entry)> {
        let max_in_flight = self.rules.as_ref()?.max_in_flight;
        let known = self.consumers.get(&consumer)?;
        if known.in_flight >= max_in_flight {
            return None;
        }
        let &(_, id) = known.ready.first()?;
        let item = &known.items[&id];
        let attempt = item.attempts + 1;
        let begun = Begun { id, attempt, key: item.key.clone() };
        Some((begun, Entry::AttemptBegun { consumer, id, attempt }))
    }

    /// Decides on an acknowledgment; `None` if its attempt is not the newest one any more.
    pub(crate) fn ack(&self, consumer: ConsumerId, id: u64, attempt: u32) -> Option<Entry> {
        let item = self.get(consumer)?.items.get(&id)?;
        let is_newest = item.attempts == attempt || is_broken(Mutant::TakesStaleTokens);
        is_newest.then_some(Entry::Acked { consumer, id })
    }

    /// Decides on a failure that a consumer tells; `None` if its attempt is not in flight any more.
    pub(crate) fn nack(
        &self,
        consumer: ConsumerId,
        id: u64,
        attempt: u32,
        reason: &str,
    ) -> Option<Vec<Entry>> {
        let item = self.get(consumer)?.items.get(&id)?;
        let is_in_flight = matches!(item.phase, Phase::InFlight(_)) && item.attempts == attempt;
        is_in_flight.then(|| self.fail(consumer, id, item, reason))
    }

    fn fail(&self, consumer: ConsumerId, id: u64, item: &Item, reason: &str) -> Vec<Entry> {
        let reason: Arc<str> = reason.into();
        let failed = FailedAttempt { attempt: item.attempts, reason: reason.clone() };
        let mut entries = vec![Entry::Failed { consumer, id, failed }];
        let is_escalated = item.is_escalated || is_broken(Mutant::NoEscalation);
        if self.is_last(item) {
            if !is_escalated {
                entries.push(Entry::Escalated { consumer, id });
            }
            entries.push(Entry::DeadLettered { consumer, id, reason });
        }
        entries
    }

    /// Returns whether an event is not to be tried again after the attempts so far.
    fn is_last(&self, item: &Item) -> bool {
        self.rules.as_ref().is_some_and(|rules| item.attempts >= rules.max_attempts)
    }

    /// Decides on a dead letter that its consumer, or each one if it has none, shall get again.
    /// `None` if there is no such dead letter, or nobody to get it.
    pub(crate) fn redeliver(&self, consumer: ConsumerId, id: u64) -> Option<Entry> {
        let is_there = self.letters.contains_key(&(id, consumer));
        let has_receiver = !self.receivers(consumer).is_empty();
        (is_there && has_receiver).then_some(Entry::Redelivered { consumer, id })
    }

    /// Returns who gets a dead letter again.
    pub(crate) fn receivers(&self, consumer: ConsumerId) -> Vec<ConsumerId> {
        let all = self.consumers.keys().copied();
        all.filter(|known| consumer == NOBODY || *known == consumer).collect()
    }

    /// Decides on a dead letter that nobody shall get; `None` if there is no such one.
    pub(crate) fn discard(&self, consumer: ConsumerId, id: u64) -> Option<Entry> {
        self.letters.contains_key(&(id, consumer)).then_some(Entry::Discarded { consumer, id })
    }

    /// Lets events be tried again whose time has come, and decides on those that took too long.
    /// The second value says whether there is something new to take.
    pub(crate) fn due(&mut self, now: u64) -> (Vec<Entry>, bool) {
        let mut has_ready = false;
        let Some(max_attempts) = self.rules.as_ref().map(|rules| rules.max_attempts) else {
            return (Vec::new(), has_ready);
        };
        while let Some(&(at, timer, consumer, id)) = self.timers.first()
            && at <= now
        {
            let Some(known) = self.consumers.get_mut(&consumer) else {
                self.timers.pop_first();
                continue;
            };
            let Some(item) = known.items.get_mut(&id) else {
                self.timers.pop_first();
                continue;
            };
            match (timer, item.phase) {
                // The process ended before this was said, or fewer attempts are allowed now.
                (Timer::Retry, Phase::Waiting(due))
                    if due == at && item.attempts >= max_attempts =>
                {
                    let reason = item.history.last().map(|failed| failed.reason.clone());
                    let reason = reason.unwrap_or_else(|| PROCESS_ENDED.into());
                    let is_escalated = item.is_escalated;
                    let dead = Entry::DeadLettered { consumer, id, reason };
                    let escalated = (!is_escalated).then_some(Entry::Escalated { consumer, id });
                    return (escalated.into_iter().chain([dead]).collect(), has_ready);
                }
                (Timer::Retry, Phase::Waiting(due)) if due == at => {
                    // Others may have come before it while its consumer kept no order.
                    let is_first = item.key.as_ref().and_then(|key| known.queues.get(key));
                    let is_first = is_first.is_none_or(|queue| queue.front() == Some(&id));
                    item.phase = if is_first { Phase::Ready } else { Phase::Blocked };
                    if is_first {
                        known.ready.insert((item.place, id));
                    }
                    self.timers.pop_first();
                    self.note_limit(consumer);
                    has_ready = true;
                }
                // Its timer stays until the entry is written.
                (Timer::Lease, Phase::InFlight(until)) if until == at => {
                    let reason = if item.is_own { LEASE_ENDED } else { PROCESS_ENDED };
                    let item = &self.consumers[&consumer].items[&id];
                    return (self.fail(consumer, id, item, reason), has_ready);
                }
                (Timer::Escalate, _) if !item.is_escalated => {
                    return (vec![Entry::Escalated { consumer, id }], has_ready);
                }
                _ => _ = self.timers.pop_first(),
            }
        }
        (Vec::new(), has_ready)
    }

    /// Returns when `due` has something to do again.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.rules.as_ref()?;
        self.timers.first().map(|(at, ..)| *at)
    }

    /// Returns what has come of an event.
    pub(crate) fn outcome(&self, id: u64) -> Outcome {
        let attempts = self.consumers.values().filter_map(|c| c.items.get(&id)).map(|i| i.attempts);
        match attempts.max() {
            Some(attempts) => Outcome::Pending(attempts),
            None if self.letters.range((id, 0)..=(id, u32::MAX)).next().is_some() => Outcome::Dead,
            None if self.last_published.is_some_and(|last| id <= last) => Outcome::Acked,
            None => Outcome::Unknown,
        }
    }

    /// Returns all events that somebody may still get.
    pub(crate) fn needed(&self) -> BTreeSet<u64> {
        let pending = self.consumers.values().flat_map(|consumer| consumer.items.keys().copied());
        pending.chain(self.letters.keys().map(|(id, _)| *id)).collect()
    }

    /// Makes an entry of the ledger true.
    pub(crate) fn apply(&mut self, entry: &Entry, now: u64) {
        match entry {
            Entry::ConsumerRegistered { consumer, name, is_ordered } => {
                self.next = self.next.max(consumer + 1);
                self.ids.insert(name.clone(), *consumer);
                match self.consumers.get_mut(consumer) {
                    Some(known) => known.order(*is_ordered),
                    None => {
                        let consumer_of_name = Consumer::new(name, *is_ordered);
                        self.consumers.insert(*consumer, consumer_of_name);
                    }
                }
            }
            Entry::ConsumerRemoved { consumer } => {
                if let Some(known) = self.consumers.remove(consumer) {
                    self.ids.remove(&known.name);
                    self.gone.insert(*consumer, known.name);
                }
            }
            Entry::Published { id, key } => {
                self.last_published = self.last_published.max(Some(*id));
                self.numbers.published += 1;
                let consumers: Vec<ConsumerId> = self.consumers.keys().copied().collect();
                for consumer in consumers {
                    self.add(consumer, *id, key.clone(), (0, Vec::new()), now);
                }
                if self.consumers.is_empty() {
                    let letter = Letter {
                        key: key.clone(),
                        reason: NO_CONSUMER.into(),
                        history: Vec::new(),
                    };
                    self.letters.insert((*id, NOBODY), letter);
                }
            }
            Entry::AttemptBegun { consumer, id, attempt } => {
                let lease = self.rules.as_ref().map_or(0, |rules| rules.lease);
                let until = now.saturating_add(lease);
                if let Some(known) = self.consumers.get_mut(consumer)
                    && let Some(item) = known.items.get_mut(id)
                {
                    known.ready.remove(&(item.place, *id));
                    item.attempts = *attempt;
                    item.phase = Phase::InFlight(until);
                    item.is_own = true;
                    known.in_flight += 1;
                    self.timers.insert((until, Timer::Lease, *consumer, *id));
                    self.note_limit(*consumer);
                }
            }
            Entry::Acked { consumer, id } => {
                self.numbers.acked += 1;
                self.settle(*consumer, *id);
            }
            Entry::Failed { consumer, id, failed } => {
                self.numbers.failed += 1;
                let due = now.saturating_add(self.delay(failed.attempt));
                if let Some(known) = self.consumers.get_mut(consumer)
                    && let Some(item) = known.items.get_mut(id)
                {
                    known.in_flight -= usize::from(matches!(item.phase, Phase::InFlight(_)));
                    item.history.push(failed.clone());
                    item.phase = Phase::Waiting(due);
                    self.timers.insert((due, Timer::Retry, *consumer, *id));
                    self.note_room(*consumer);
                }
            }
            Entry::Escalated { consumer, id } => {
                self.numbers.escalated += 1;
                let mut attempts = 0;
                let known = self.consumers.get_mut(consumer);
                if let Some(item) = known.and_then(|known| known.items.get_mut(id)) {
                    item.is_escalated = true;
                    attempts = item.attempts;
                }
                let consumer = self.name(*consumer);
                self.tell(Notice::Escalated { id: *id, consumer, attempts });
            }
            Entry::DeadLettered { consumer, id, reason } => {
                self.numbers.dead_lettered += 1;
                if let Some(Item { key, history, .. }) = self.settle(*consumer, *id) {
                    let letter = Letter { key, reason: reason.clone(), history };
                    self.letters.insert((*id, *consumer), letter);
                    self.settled.retain(|settled| settled != id);
                }
                let consumer = self.name(*consumer);
                self.tell(Notice::DeadLettered { id: *id, consumer, reason: reason.clone() });
            }
            Entry::Redelivered { consumer, id } => {
                if let Some(letter) = self.letters.remove(&(*id, *consumer)) {
                    for to in self.receivers(*consumer) {
                        self.add(to, *id, letter.key.clone(), (0, Vec::new()), now);
                    }
                }
            }
            Entry::Discarded { consumer, id } => {
                self.letters.remove(&(*id, *consumer));
                self.settle_event(*id);
            }
            Entry::Pending { consumer, id, key, attempts, history } => {
                self.add(*consumer, *id, key.clone(), (*attempts, history.clone()), now);
            }
            Entry::Letter { consumer, id, key, reason, history } => {
                let (key, reason, history) = (key.clone(), reason.clone(), history.clone());
                self.letters.insert((*id, *consumer), Letter { key, reason, history });
            }
            _ => {}
        }
    }

    /// Returns entries that say all that there is.
    pub(crate) fn snapshot(&self) -> impl Iterator<Item = Entry> {
        // Names of consumers that are gone come first, so that those that are there follow.
        let gone = self.gone.iter().filter(|(id, _)| self.letters.keys().any(|(_, c)| c == *id));
        let gone = gone.flat_map(|(&consumer, name)| {
            let name = name.clone();
            [
                Entry::ConsumerRegistered { consumer, name, is_ordered: false },
                Entry::ConsumerRemoved { consumer },
            ]
        });
        let consumers = self.consumers.iter().flat_map(|(&consumer, known)| {
            let (name, is_ordered) = (known.name.clone(), known.is_ordered);
            let registered = Entry::ConsumerRegistered { consumer, name, is_ordered };
            let pending = known.in_order().into_iter().map(move |(_, id)| {
                let item = &known.items[&id];
                let (key, attempts) = (item.key.clone(), item.attempts);
                Entry::Pending { consumer, id, key, attempts, history: item.history.clone() }
            });
            std::iter::once(registered).chain(pending)
        });
        let letters = self.letters.iter().map(|(&(id, consumer), letter)| {
            let Letter { key, reason, history } = letter.clone();
            Entry::Letter { consumer, id, key, reason, history }
        });
        gone.chain(consumers).chain(letters)
    }

    /// Adds an event to those of a consumer, behind all others.
    fn add(
        &mut self,
        consumer: ConsumerId,
        id: u64,
        key: Option<Arc<str>>,
        (attempts, history): (u32, Vec<FailedAttempt>),
        now: u64,
    ) {
        let place = self.next_place;
        self.next_place += 1;
        let Some(known) = self.consumers.get_mut(&consumer) else { return };
        if known.items.contains_key(&id) {
            return;
        }
        let is_first = match &key {
            Some(key) if known.is_ordered && !is_broken(Mutant::NoOrder) => {
                let queue = known.queues.entry(key.clone()).or_default();
                queue.push_back(id);
                queue.len() == 1
            }
            _ => true,
        };
        // Without a failure for its last attempt it was in flight.
        let is_in_flight = history.last().map_or(0, |failed| failed.attempt) < attempts;
        let phase = match is_first {
            _ if is_in_flight => {
                known.in_flight += 1;
                self.timers.insert((now, Timer::Lease, consumer, id));
                Phase::InFlight(now)
            }
            _ if attempts > 0 => {
                self.timers.insert((now, Timer::Retry, consumer, id));
                Phase::Waiting(now)
            }
            true => {
                known.ready.insert((place, id));
                Phase::Ready
            }
            false => Phase::Blocked,
        };
        known.items.insert(
            id,
            Item { key, place, phase, attempts, history, is_escalated: false, is_own: false },
        );
        if let Some(rules) = &self.rules {
            let escalate = now.saturating_add(rules.escalate_after);
            self.timers.insert((escalate, Timer::Escalate, consumer, id));
            self.note_limit(consumer);
        }
    }

    /// Takes an event from a consumer and lets the next one of its key follow.
    fn settle(&mut self, consumer: ConsumerId, id: u64) -> Option<Item> {
        let known = self.consumers.get_mut(&consumer)?;
        let item = known.items.remove(&id)?;
        known.ready.remove(&(item.place, id));
        known.in_flight -= usize::from(matches!(item.phase, Phase::InFlight(_)));
        if let Some(key) = &item.key
            && let Some(queue) = known.queues.get_mut(key)
        {
            queue.retain(|queued| *queued != id);
            match queue.front() {
                Some(next) => {
                    if let Some(next_item) = known.items.get_mut(next)
                        && next_item.phase == Phase::Blocked
                    {
                        next_item.phase = Phase::Ready;
                        known.ready.insert((next_item.place, *next));
                    }
                }
                None => _ = known.queues.remove(key),
            }
        }
        if let Phase::InFlight(at) = item.phase {
            self.timers.remove(&(at, Timer::Lease, consumer, id));
        }
        self.note_room(consumer);
        self.settle_event(id);
        Some(item)
    }

    /// Notes an event that nobody needs, if it is one.
    fn settle_event(&mut self, id: u64) {
        let is_needed = self.consumers.values().any(|known| known.items.contains_key(&id))
            || self.letters.range((id, 0)..=(id, u32::MAX)).next().is_some();
        if !is_needed {
            self.settled.push(id);
        }
    }

    /// Returns how long to wait after an attempt that failed: exponential backoff with full jitter.
    fn delay(&mut self, attempt: u32) -> u64 {
        let Some(rules) = &self.rules else { return 0 };
        let factor = 1_u64.checked_shl(attempt.saturating_sub(1)).unwrap_or(u64::MAX);
        let longest = rules.retry_base.saturating_mul(factor).min(rules.retry_cap);
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % longest.saturating_add(1).max(1)
    }

    /// Tells that a consumer has too many in flight, once until it has half as many.
    fn note_limit(&mut self, consumer: ConsumerId) {
        let Some(rules) = &self.rules else { return };
        let Some(known) = self.consumers.get_mut(&consumer) else { return };
        if known.in_flight >= rules.max_in_flight && !known.ready.is_empty() && !known.is_limited {
            known.is_limited = true;
            let notice = Notice::TooManyInFlight {
                consumer: known.name.clone(),
                in_flight: known.in_flight,
            };
            self.numbers.limited += 1;
            self.tell(notice);
        }
    }

    fn note_room(&mut self, consumer: ConsumerId) {
        if let Some(rules) = &self.rules
            && let Some(known) = self.consumers.get_mut(&consumer)
            && known.in_flight <= rules.max_in_flight / 2
        {
            known.is_limited = false;
        }
    }

    fn tell(&mut self, notice: Notice) {
        if self.rules.is_some() {
            if self.notices.len() == MAX_NOTICES {
                self.notices.pop_front();
            }
            self.notices.push_back(notice);
        }
    }
}

impl Consumer {
    fn new(name: &Arc<str>, is_ordered: bool) -> Self {
        Self {
            name: name.clone(),
            is_ordered,
            items: HashMap::new(),
            queues: HashMap::new(),
            ready: BTreeSet::new(),
            in_flight: 0,
            is_limited: false,
        }
    }

    pub(crate) fn pending(&self) -> usize {
        self.items.len()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Returns places and events, as they came.
    fn in_order(&self) -> Vec<(u64, u64)> {
        let mut all: Vec<_> = self.items.iter().map(|(id, item)| (item.place, *id)).collect();
        all.sort_unstable();
        all
    }

    /// Keeps the order of keys from now on, or does not.
    fn order(&mut self, is_ordered: bool) {
        self.is_ordered = is_ordered;
        self.queues.clear();
        for (place, id) in self.in_order() {
            let Some(item) = self.items.get_mut(&id) else { continue };
            let is_first = match &item.key {
                Some(key) if is_ordered => {
                    let queue = self.queues.entry(key.clone()).or_default();
                    queue.push_back(id);
                    queue.len() == 1
                }
                _ => true,
            };
            match (is_first, item.phase) {
                (true, Phase::Blocked) => {
                    item.phase = Phase::Ready;
                    self.ready.insert((place, id));
                }
                (false, Phase::Ready) => {
                    item.phase = Phase::Blocked;
                    self.ready.remove(&(place, id));
                }
                _ => {}
            }
        }
    }
}
