//! Random schedules against a plain model: what every call returns, what every reader finds, and
//! every number of every subscription.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use proptest::prelude::*;
use std::collections::VecDeque;
use support::{Read, assert_row_closes, assert_sums_close, bus_that_keeps, read};
use tickbus::{
    Backend, Dropped, EventBus, EventBusImpl, EventSubscription, KeyFn, OnLag, Patience, Pattern,
    Policy, PublishError, SubscribeOptions, SubscriptionMetrics, Topic,
};

const TOPICS: [&str; 3] = ["trades.BTC", "trades.binance.ETH", "quotes.BTC"];
const PATTERNS: [&str; 4] = ["trades.*", "trades.>", "*.BTC", ">"];
/// By pattern, whether it wants each of the topics.
const WANTED: [[bool; 3]; 4] =
    [[true, false, false], [true, true, false], [true, false, true], [true, true, true]];
/// The broadcast bus's capacity, in events; those of `lock_free` vary.
const CAPACITY: usize = 4;

#[derive(Debug, Clone)]
enum Step {
    /// On one of the topics, or on none.
    Publish(Option<usize>),
    PublishMany(usize),
    Recv(usize),
    RecvMany(usize, usize),
    IsReady(usize),
    Join {
        policy: Policy,
        capacity: usize,
        pattern: Option<usize>,
        on_lag: OnLag,
        /// Of a subscription that conflates.
        key: Keyed,
        /// If the bus keeps last events.
        snapshot: bool,
    },
    Leave(usize),
    Close,
}

/// How a subscription that conflates finds an event's key.
#[derive(Debug, Clone, Copy)]
enum Keyed {
    Topic,
    Number,
    Text,
}

impl Keyed {
    fn function(self) -> Option<KeyFn<u64>> {
        match self {
            Self::Topic => None,
            Self::Number => Some(KeyFn::number(|event| event % 3)),
            Self::Text => Some(KeyFn::new(|event| format!("{}", event % 7))),
        }
    }

    fn key(self, event: u64, topic: Option<usize>) -> u64 {
        match self {
            Self::Topic => topic.map_or(0, |topic| topic as u64 + 1),
            Self::Number => event % 3,
            Self::Text => event % 7,
        }
    }
}

/// Whether the bus keeps last events, and what is done to it.
fn scenes() -> impl Strategy<Value = (bool, Vec<Step>)> {
    (prop::bool::weighted(0.3), steps())
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let policies = prop::sample::select(Policy::ALL.to_vec());
    let on_lag = prop::sample::select(vec![OnLag::Raise, OnLag::Count]);
    let pattern = prop::option::weighted(0.3, 0..PATTERNS.len());
    let key = prop::sample::select(vec![Keyed::Topic, Keyed::Number, Keyed::Text]);
    let join = (policies, 1..=CAPACITY, pattern, on_lag, key, prop::bool::ANY).prop_map(
        |(policy, capacity, pattern, on_lag, key, snapshot)| Step::Join {
            policy,
            capacity,
            pattern,
            on_lag,
            key,
            snapshot,
        },
    );
    let step = prop_oneof![
        60 => prop::option::of(0..TOPICS.len()).prop_map(Step::Publish),
        10 => (0..12_usize).prop_map(Step::PublishMany),
        50 => (0..8_usize).prop_map(Step::Recv),
        20 => (0..8_usize, 0..6_usize).prop_map(|(place, limit)| Step::RecvMany(place, limit)),
        10 => (0..8_usize).prop_map(Step::IsReady),
        15 => join,
        5 => (0..8_usize).prop_map(Step::Leave),
        1 => Just(Step::Close),
    ];
    prop::collection::vec(step, 1..120)
}

/// The events that were published last on each topic.
#[derive(Default)]
struct Kept {
    by_topic: [Option<u64>; TOPICS.len()],
}

impl Kept {
    fn keep(&mut self, event: u64, topic: Option<usize>) {
        if let Some(topic) = topic {
            self.by_topic[topic] = Some(event);
        }
    }

    /// Events are numbered as they are published.
    fn snapshot(&self, pattern: Option<usize>) -> VecDeque<u64> {
        let wanted = |topic: usize| pattern.is_none_or(|pattern| WANTED[pattern][topic]);
        let topics = (0..TOPICS.len()).filter(|&topic| wanted(topic));
        let mut events: Vec<_> = topics.filter_map(|topic| self.by_topic[topic]).collect();
        events.sort_unstable();
        events.into()
    }

    fn compare(&self, bus: &EventBusImpl<u64>, keeps: bool) {
        for (name, &event) in TOPICS.iter().zip(&self.by_topic) {
            match keeps {
                true => assert_eq!(bus.last(name), Ok(event)),
                false => assert!(bus.last(name).is_err()),
            }
        }
    }
}

/// What a subscription of `lock_free`, or one that conflates, is, said without channels, tokens,
/// slots or rooms.
struct Model {
    id: u64,
    policy: Policy,
    capacity: usize,
    pattern: Option<usize>,
    quiet: bool,
    key: Keyed,
    snapshot: VecDeque<u64>,
    /// Indices among the offered events (of one that conflates, keys), and the events.
    queue: VecDeque<(u64, u64)>,
    /// Events lost before the queue and not told yet, of one that conflates.
    missed: u64,
    expected: u64,
    offered: u64,
    delivered: u64,
    dropped: Dropped,
    left: bool,
}

impl Model {
    fn new(
        subscription: &EventSubscription<u64>,
        pattern: Option<usize>,
        on_lag: OnLag,
        key: Keyed,
        snapshot: VecDeque<u64>,
    ) -> Self {
        Self {
            id: subscription.id(),
            policy: subscription.policy(),
            capacity: subscription.capacity(),
            pattern,
            quiet: on_lag == OnLag::Count,
            key,
            queue: VecDeque::new(),
            missed: 0,
            expected: snapshot.len() as u64,
            offered: snapshot.len() as u64,
            snapshot,
            delivered: 0,
            dropped: Dropped::default(),
            left: false,
        }
    }

    fn wants(&self, topic: Option<usize>) -> bool {
        !self.left
            && match (self.pattern, topic) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(pattern), Some(topic)) => WANTED[pattern][topic],
            }
    }

    fn is_full(&self) -> bool {
        self.queue.len() == self.capacity
    }

    fn conflate(&mut self, event: u64, topic: Option<usize>) {
        self.offered += 1;
        let key = self.key.key(event, topic);
        if let Some(pending) = self.queue.iter_mut().find(|(other, _)| *other == key) {
            pending.1 = event;
            self.dropped.conflated += 1;
            return;
        }
        if self.is_full() {
            self.queue.pop_front();
            self.dropped.overwritten += 1;
            self.missed += 1;
        }
        self.queue.push_back((key, event));
    }

    /// Returns whether it took the event.
    fn offer(&mut self, event: u64, topic: Option<usize>) -> bool {
        if self.policy == Policy::Conflate {
            self.conflate(event, topic);
            return true;
        }
        let taken = match self.policy {
            _ if !self.is_full() => true,
            Policy::DropOldest => {
                self.queue.pop_front();
                self.dropped.overwritten += 1;
                true
            }
            Policy::DropNewest => {
                self.dropped.refused += 1;
                false
            }
            _ => {
                self.dropped.block_expired += 1;
                false
            }
        };
        if taken {
            self.queue.push_back((self.offered, event));
        }
        self.offered += 1;
        taken
    }

    /// Returns what is next; a batch ends before a hole.
    fn recv(&mut self, closed: bool, in_batch: bool) -> Option<Read> {
        if self.left {
            return Some(Read::Closed);
        }
        if let Some(event) = self.snapshot.pop_front() {
            self.delivered += 1;
            return Some(Read::Event(event));
        }
        if self.policy == Policy::Conflate {
            return self.recv_conflated(closed, in_batch);
        }
        let index = self.queue.front().map_or(self.offered, |&(index, _)| index);
        let missed = index - self.expected;
        if missed > 0 && !self.quiet {
            if in_batch {
                return None;
            }
            self.expected = index;
            return Some(Read::Missed(missed));
        }
        self.expected = index;
        let Some((_, event)) = self.queue.pop_front() else {
            return closed.then_some(Read::Closed);
        };
        self.expected += 1;
        self.delivered += 1;
        Some(Read::Event(event))
    }

    fn recv_conflated(&mut self, closed: bool, in_batch: bool) -> Option<Read> {
        if self.missed > 0 && !self.quiet {
            return (!in_batch).then(|| Read::Missed(std::mem::take(&mut self.missed)));
        }
        let Some((_, event)) = self.queue.pop_front() else {
            return closed.then_some(Read::Closed);
        };
        self.delivered += 1;
        Some(Read::Event(event))
    }

    fn pending(&self) -> usize {
        self.snapshot.len() + self.queue.len()
    }

    fn is_ready(&self, closed: bool) -> bool {
        let conflates = self.policy == Policy::Conflate;
        let hole = !self.quiet && !conflates && self.offered > self.expected;
        self.left || closed || self.pending() > 0 || hole
    }

    fn leave(&mut self) {
        if !self.left {
            self.left = true;
            self.dropped.closed += self.pending() as u64;
            self.queue.clear();
            self.snapshot.clear();
        }
    }

    fn compare(&self, subscription: &EventSubscription<u64>) {
        let row: SubscriptionMetrics = subscription.metrics();
        assert_row_closes(&row);
        assert_eq!(row.offered, self.offered);
        assert_eq!(row.delivered, self.delivered);
        assert_eq!(row.dropped, self.dropped);
        assert_eq!(row.pending, self.pending() as u64);
        assert_eq!(subscription.pending(), self.pending());
        assert!(row.exact);
    }
}

/// The bus under test, its model, and the subscriptions of both.
struct Pair {
    bus: EventBusImpl<u64>,
    topics: Vec<Topic>,
    subscriptions: Vec<EventSubscription<u64>>,
    models: Vec<Model>,
    keeps: bool,
    kept: Kept,
    closed: bool,
    published: u64,
    next_event: u64,
}

impl Pair {
    fn new(backend: Backend, keeps: bool) -> Self {
        let bus = bus_that_keeps(backend, CAPACITY, keeps.then_some(">"));
        let topics = TOPICS.iter().map(|name| bus.topic(name).unwrap()).collect();
        Self {
            bus,
            topics,
            subscriptions: Vec::new(),
            models: Vec::new(),
            keeps,
            kept: Kept::default(),
            closed: false,
            published: 0,
            next_event: 0,
        }
    }

    /// Publishes to the model; the error names the subscriptions that reject.
    fn model_publish(&mut self, event: u64, topic: Option<usize>) -> Result<usize, Vec<u64>> {
        let wanting = || self.models.iter().filter(|model| model.wants(topic));
        let rejecting: Vec<_> = wanting()
            .filter(|model| model.policy == Policy::Reject && model.is_full())
            .map(|model| model.id)
            .collect();
        if !rejecting.is_empty() {
            return Err(rejecting);
        }
        self.published += 1;
        self.kept.keep(event, topic);
        let wanting = self.models.iter_mut().filter(|model| model.wants(topic));
        Ok(wanting.map(|model| usize::from(model.offer(event, topic))).sum())
    }

    fn publish(&mut self, topic: Option<usize>) {
        let event = self.next_event;
        self.next_event += 1;
        let handle = topic.map(|topic| &self.topics[topic]);
        let result = self
            .bus
            .bus()
            .publication(event, handle, false)
            .poll(Patience::Spent)
            .map(|taken| taken.expect("without patience it does not wait"));
        let expected = match self.closed {
            true => Err(PublishError::Closed(event)),
            false => self
                .model_publish(event, topic)
                .map_err(|subscriptions| PublishError::Full { event, subscriptions }),
        };
        assert_eq!(result, expected);
    }

    fn publish_many(&mut self, count: usize) {
        let first = self.next_event;
        self.next_event += count as u64;
        let result = self.bus.publish_many(first..self.next_event);
        let mut accepted = 0;
        let mut refused = self.closed && count > 0;
        for event in first..self.next_event {
            refused = refused || self.model_publish(event, None).is_err();
            if refused {
                break;
            }
            accepted += 1;
        }
        match result {
            Ok(published) => assert_eq!((published, false), (accepted, refused)),
            Err(error) => assert_eq!((error.accepted, true), (accepted, refused)),
        }
    }

    fn recv_many(&mut self, place: usize, limit: usize) {
        let mut batch = Vec::new();
        let result = self.subscriptions[place].try_recv_many(&mut batch, limit);
        let model = &mut self.models[place];
        let mut expected = Vec::new();
        while expected.len() < limit {
            match model.recv(self.closed, !expected.is_empty()) {
                Some(Read::Event(event)) => expected.push(event),
                Some(end) if expected.is_empty() => {
                    assert_eq!(result.map_err(as_read), Err(Some(end)));
                    return;
                }
                _ => break,
            }
        }
        match expected.len() {
            0 if limit > 0 => assert_eq!(result.map_err(as_read), Err(None)),
            taken => assert_eq!(result, Ok(taken)),
        }
        assert_eq!(batch, expected);
    }

    fn join(&mut self, step: &Step) {
        let Some((options, pattern)) = options(step, self.keeps) else { return };
        let (on_lag, snapshot) = (options.on_lag, options.snapshot);
        let Step::Join { key, .. } = *step else { return };
        let Ok(subscription) = self.bus.subscribe_with(options) else {
            assert!(self.closed);
            return;
        };
        let snapshot = if snapshot { self.kept.snapshot(pattern) } else { VecDeque::new() };
        self.models.push(Model::new(&subscription, pattern, on_lag, key, snapshot));
        self.subscriptions.push(subscription);
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Publish(topic) => self.publish(topic),
            Step::PublishMany(count) => self.publish_many(count),
            Step::Join { .. } => self.join(step),
            Step::Close => {
                self.bus.close();
                self.closed = true;
            }
            Step::Recv(place) if place < self.models.len() => {
                let expected = self.models[place].recv(self.closed, false);
                assert_eq!(read(&self.subscriptions[place]), expected);
            }
            Step::RecvMany(place, limit) if place < self.models.len() => {
                self.recv_many(place, limit);
            }
            Step::IsReady(place) if place < self.models.len() => assert_eq!(
                self.subscriptions[place].is_ready(),
                self.models[place].is_ready(self.closed)
            ),
            Step::Leave(place) if place < self.models.len() => {
                self.subscriptions[place].close();
                self.models[place].leave();
            }
            _ => {}
        }
        self.compare();
    }

    fn compare(&self) {
        self.kept.compare(&self.bus, self.keeps);
        for (subscription, model) in self.subscriptions.iter().zip(&self.models) {
            model.compare(subscription);
        }
        let metrics = self.bus.metrics();
        assert_sums_close(&metrics);
        assert_eq!(metrics.total_published, self.published);
        assert_eq!(
            metrics.total_dropped,
            self.models.iter().map(|model| model.dropped.total()).sum::<u64>()
        );
    }
}

/// Returns what a join asks for, and its pattern.
fn options(step: &Step, keeps: bool) -> Option<(SubscribeOptions<u64>, Option<usize>)> {
    let Step::Join { policy, capacity, pattern, on_lag, key, snapshot } = *step else {
        return None;
    };
    let options = SubscribeOptions {
        pattern: pattern.map(|pattern| Pattern::new(PATTERNS[pattern]).unwrap()),
        capacity: Some(capacity),
        policy: Some(policy),
        on_lag,
        key: if policy == Policy::Conflate { key.function() } else { None },
        snapshot: snapshot && keeps,
        start: tickbus::Start::Now,
        name: None,
    };
    Some((options, pattern))
}

fn as_read(error: tickbus::TryRecvError) -> Option<Read> {
    match error {
        tickbus::TryRecvError::Lagged(lagged) => Some(Read::Missed(lagged.missed)),
        tickbus::TryRecvError::Closed => Some(Read::Closed),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lock_free_does_what_its_model_does((keeps, steps) in scenes()) {
        let mut pair = Pair::new(Backend::LockFree, keeps);
        steps.iter().for_each(|step| pair.run(step));
    }
}

/// What a subscription of `broadcast` is: a place in the list of everything sent.
struct Walker {
    pattern: Option<usize>,
    quiet: bool,
    snapshot: VecDeque<u64>,
    /// Events of the snapshot, read or not.
    began_with: usize,
    place: usize,
    joined: usize,
    unwanted: usize,
    delivered: u64,
    overwritten: u64,
    /// A hole or an event that was looked at and not taken.
    untold: Option<u64>,
    fetched: Option<u64>,
    left: bool,
}

impl Walker {
    /// Returns the number of entries that were overwritten before it.
    fn lapped(&self, sent: usize) -> usize {
        sent.saturating_sub(CAPACITY).saturating_sub(self.place)
    }

    fn wants(&self, topic: Option<usize>) -> bool {
        self.pattern.is_none_or(|pattern| topic.is_some_and(|topic| WANTED[pattern][topic]))
    }

    fn recv(&mut self, sent: &[(Option<usize>, u64)], closed: bool) -> Option<Read> {
        if self.left {
            return Some(Read::Closed);
        }
        let event = self.fetched.take().or_else(|| self.snapshot.pop_front());
        if let Some(event) = event {
            self.delivered += 1;
            return Some(Read::Event(event));
        }
        if let Some(missed) = self.untold.take() {
            return Some(Read::Missed(missed));
        }
        let missed = self.lapped(sent.len());
        if missed > 0 {
            self.overwritten += missed as u64;
            self.place += missed;
            if !self.quiet {
                return Some(Read::Missed(missed as u64));
            }
        }
        while let Some(&(topic, event)) = sent.get(self.place) {
            self.place += 1;
            if self.wants(topic) {
                self.delivered += 1;
                return Some(Read::Event(event));
            }
            self.unwanted += 1;
        }
        closed.then_some(Read::Closed)
    }

    fn is_ready(&mut self, sent: &[(Option<usize>, u64)], closed: bool) -> bool {
        let waits = self.untold.is_some() || self.fetched.is_some() || !self.snapshot.is_empty();
        if self.left || closed || waits {
            return true;
        }
        if self.pattern.is_none() {
            return self.place < sent.len();
        }
        match self.recv(sent, false) {
            Some(Read::Event(event)) => {
                self.delivered -= 1;
                self.fetched = Some(event);
                true
            }
            Some(Read::Missed(missed)) => {
                self.untold = Some(missed);
                true
            }
            _ => false,
        }
    }

    fn compare(&self, subscription: &EventSubscription<u64>, sent: usize) {
        let row = subscription.metrics();
        assert_row_closes(&row);
        assert_eq!(row.delivered, self.delivered);
        if !self.left {
            let lapped = self.lapped(sent);
            let behind = sent - self.place - lapped;
            let pending = behind + usize::from(self.fetched.is_some()) + self.snapshot.len();
            assert_eq!(row.pending, pending as u64);
            assert_eq!(row.dropped.overwritten, self.overwritten + lapped as u64);
            let offered = self.began_with + sent - self.joined - self.unwanted;
            assert_eq!(row.offered as usize, offered);
        }
    }
}

/// A reader of the shared channel, or one beside it.
enum Reader {
    Walker(Walker),
    Conflating(Model),
}

impl Reader {
    fn wants(&self, topic: Option<usize>) -> bool {
        match self {
            Self::Walker(walker) => !walker.left && walker.wants(topic),
            Self::Conflating(model) => model.wants(topic),
        }
    }
}

/// The bus under test and its model.
struct Shared {
    bus: EventBusImpl<u64>,
    topics: Vec<Topic>,
    keeps: bool,
    kept: Kept,
    readers: Vec<(EventSubscription<u64>, Reader)>,
    sent: Vec<(Option<usize>, u64)>,
    closed: bool,
    next_event: u64,
}

impl Shared {
    fn new(keeps: bool) -> Self {
        let bus = bus_that_keeps(Backend::Broadcast, CAPACITY, keeps.then_some(">"));
        let topics = TOPICS.iter().map(|name| bus.topic(name).unwrap()).collect();
        Self {
            bus,
            topics,
            keeps,
            kept: Kept::default(),
            readers: Vec::new(),
            sent: Vec::new(),
            closed: false,
            next_event: 0,
        }
    }

    fn publish(&mut self, topic: Option<usize>) {
        let event = self.next_event;
        self.next_event += 1;
        let taken = match topic {
            Some(topic) => self.bus.publish_to(&self.topics[topic], event),
            None => self.bus.publish(event),
        };
        let wanting = self.readers.iter().filter(|(_, reader)| reader.wants(topic)).count();
        assert_eq!(taken, Ok(wanting));
        self.kept.keep(event, topic);
        let mut is_sent = false;
        for (_, reader) in self.readers.iter_mut().filter(|(_, reader)| reader.wants(topic)) {
            match reader {
                Reader::Walker(_) => is_sent = true,
                Reader::Conflating(model) => assert!(model.offer(event, topic)),
            }
        }
        if is_sent {
            self.sent.push((topic, event));
        }
    }

    fn join(&mut self, step: &Step) {
        let Some((mut options, pattern)) = options(step, self.keeps) else { return };
        let Step::Join { key, on_lag, .. } = *step else { return };
        let conflates = options.policy == Some(Policy::Conflate);
        if !conflates {
            options.policy = None;
        }
        let snapshot = match options.snapshot {
            true => self.kept.snapshot(pattern),
            false => VecDeque::new(),
        };
        let capacity = options.capacity;
        let subscription = self.bus.subscribe_with(options).unwrap();
        let reader = if conflates {
            assert_eq!(Some(subscription.capacity()), capacity.map(usize::next_power_of_two));
            Reader::Conflating(Model::new(&subscription, pattern, on_lag, key, snapshot))
        } else {
            Reader::Walker(Walker {
                pattern,
                quiet: on_lag == OnLag::Count,
                began_with: snapshot.len(),
                snapshot,
                place: self.sent.len(),
                joined: self.sent.len(),
                unwanted: 0,
                delivered: 0,
                overwritten: 0,
                untold: None,
                fetched: None,
                left: false,
            })
        };
        self.readers.push((subscription, reader));
    }

    fn run(&mut self, step: &Step) {
        let Self { readers, sent, closed, .. } = self;
        match *step {
            Step::Publish(topic) if !*closed => self.publish(topic),
            Step::Join { .. } if !*closed => self.join(step),
            Step::Recv(place) | Step::RecvMany(place, _) if place < readers.len() => {
                let (subscription, reader) = &mut readers[place];
                let expected = match reader {
                    Reader::Walker(walker) => walker.recv(sent, *closed),
                    Reader::Conflating(model) => model.recv(*closed, false),
                };
                assert_eq!(read(subscription), expected);
            }
            Step::IsReady(place) if place < readers.len() => {
                let (subscription, reader) = &mut readers[place];
                let expected = match reader {
                    Reader::Walker(walker) => walker.is_ready(sent, *closed),
                    Reader::Conflating(model) => model.is_ready(*closed),
                };
                assert_eq!(subscription.is_ready(), expected);
            }
            Step::Leave(place) if place < readers.len() => {
                let (subscription, reader) = &mut readers[place];
                subscription.close();
                match reader {
                    Reader::Walker(walker) => walker.left = true,
                    Reader::Conflating(model) => model.leave(),
                }
                assert_row_closes(&subscription.metrics());
            }
            Step::Close => {
                self.bus.close();
                *closed = true;
            }
            _ => {}
        }
        self.compare();
    }

    fn compare(&self) {
        for (subscription, reader) in &self.readers {
            match reader {
                Reader::Walker(walker) => walker.compare(subscription, self.sent.len()),
                Reader::Conflating(model) => model.compare(subscription),
            }
        }
        self.kept.compare(&self.bus, self.keeps);
        assert_sums_close(&self.bus.metrics());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn broadcast_does_what_its_model_does((keeps, steps) in scenes()) {
        let mut shared = Shared::new(keeps);
        steps.iter().for_each(|step| shared.run(step));
    }
}
