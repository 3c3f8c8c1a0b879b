//! Random schedules against a plain model: what every call returns, what every reader finds, and
//! every number of every subscription.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(feature = "broadcast")]

mod support;

use proptest::prelude::*;
use std::collections::VecDeque;
use support::{Read, assert_row_closes, assert_sums_close, bus, read};
use tickbus::{
    Backend, Dropped, EventBus, EventBusImpl, EventSubscription, OnLag, Patience, Pattern, Policy,
    PublishError, SubscribeOptions, SubscriptionMetrics, Topic,
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
    },
    Leave(usize),
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let policies = prop::sample::select(Policy::ALL.to_vec());
    let on_lag = prop::sample::select(vec![OnLag::Raise, OnLag::Count]);
    let join =
        (policies, 1..=CAPACITY, prop::option::weighted(0.3, 0..PATTERNS.len()), on_lag).prop_map(
            |(policy, capacity, pattern, on_lag)| Step::Join { policy, capacity, pattern, on_lag },
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

/// What a subscription of `lock_free` is, said without channels, tokens or rooms.
struct Model {
    id: u64,
    policy: Policy,
    capacity: usize,
    pattern: Option<usize>,
    quiet: bool,
    /// Indices among the offered events, and the events.
    queue: VecDeque<(u64, u64)>,
    expected: u64,
    offered: u64,
    delivered: u64,
    dropped: Dropped,
    left: bool,
}

impl Model {
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

    /// Returns whether it took the event.
    fn offer(&mut self, event: u64) -> bool {
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

    fn pending(&self) -> usize {
        self.queue.len()
    }

    fn is_ready(&self, closed: bool) -> bool {
        let hole = !self.quiet && self.offered > self.expected;
        self.left || closed || self.pending() > 0 || hole
    }

    fn leave(&mut self) {
        if !self.left {
            self.left = true;
            self.dropped.closed += self.pending() as u64;
            self.queue.clear();
        }
    }
}

/// The bus under test, its model, and the subscriptions of both.
struct Pair {
    bus: EventBusImpl<u64>,
    topics: Vec<Topic>,
    subscriptions: Vec<EventSubscription<u64>>,
    models: Vec<Model>,
    closed: bool,
    published: u64,
    next_event: u64,
}

impl Pair {
    fn new(backend: Backend) -> Self {
        let bus = bus(backend, CAPACITY);
        let topics = TOPICS.iter().map(|name| bus.topic(name).unwrap()).collect();
        Self {
            bus,
            topics,
            subscriptions: Vec::new(),
            models: Vec::new(),
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
        let wanting = self.models.iter_mut().filter(|model| model.wants(topic));
        Ok(wanting.map(|model| usize::from(model.offer(event))).sum())
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

    fn join(&mut self, policy: Policy, capacity: usize, pattern: Option<usize>, on_lag: OnLag) {
        let result = self.bus.subscribe_with(SubscribeOptions {
            pattern: pattern.map(|pattern| Pattern::new(PATTERNS[pattern]).unwrap()),
            capacity: Some(capacity),
            policy: Some(policy),
            on_lag,
        });
        let Ok(subscription) = result else {
            assert!(self.closed);
            return;
        };
        self.models.push(Model {
            id: subscription.id(),
            policy,
            capacity: subscription.capacity(),
            pattern,
            quiet: on_lag == OnLag::Count,
            queue: VecDeque::new(),
            expected: 0,
            offered: 0,
            delivered: 0,
            dropped: Dropped::default(),
            left: false,
        });
        self.subscriptions.push(subscription);
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Publish(topic) => self.publish(topic),
            Step::PublishMany(count) => self.publish_many(count),
            Step::Join { policy, capacity, pattern, on_lag } => {
                self.join(policy, capacity, pattern, on_lag);
            }
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
        for (subscription, model) in self.subscriptions.iter().zip(&self.models) {
            let row: SubscriptionMetrics = subscription.metrics();
            assert_row_closes(&row);
            assert_eq!(row.offered, model.offered);
            assert_eq!(row.delivered, model.delivered);
            assert_eq!(row.dropped, model.dropped);
            assert_eq!(row.pending, model.pending() as u64);
            assert_eq!(subscription.pending(), model.pending());
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
    fn lock_free_does_what_its_model_does(steps in steps()) {
        let mut pair = Pair::new(Backend::LockFree);
        steps.iter().for_each(|step| pair.run(step));
    }
}

/// What a subscription of `broadcast` is: a place in the list of everything sent.
struct Walker {
    pattern: Option<usize>,
    quiet: bool,
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

    fn recv(&mut self, sent: &[(Option<usize>, u64)], closed: bool) -> Option<Read> {
        if self.left {
            return Some(Read::Closed);
        }
        if let Some(event) = self.fetched.take() {
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
            let wanted = match (self.pattern, topic) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(pattern), Some(topic)) => WANTED[pattern][topic],
            };
            if wanted {
                self.delivered += 1;
                return Some(Read::Event(event));
            }
            self.unwanted += 1;
        }
        closed.then_some(Read::Closed)
    }

    fn is_ready(&mut self, sent: &[(Option<usize>, u64)], closed: bool) -> bool {
        if self.left || closed || self.untold.is_some() || self.fetched.is_some() {
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
}

fn check_broadcast(steps: &[Step]) {
    let bus = bus(Backend::Broadcast, CAPACITY);
    let topics: Vec<_> = TOPICS.iter().map(|name| bus.topic(name).unwrap()).collect();
    let (mut subscriptions, mut walkers) = (Vec::new(), Vec::<Walker>::new());
    let (mut sent, mut closed) = (Vec::new(), false);
    for step in steps {
        match *step {
            Step::Publish(topic) if !closed => {
                let event = sent.len() as u64;
                let taken = match topic {
                    Some(topic) => bus.publish_to(&topics[topic], event),
                    None => bus.publish(event),
                };
                let wanting = walkers
                    .iter()
                    .filter(|walker| {
                        !walker.left
                            && walker.pattern.is_none_or(|pattern| {
                                topic.is_some_and(|topic| WANTED[pattern][topic])
                            })
                    })
                    .count();
                assert_eq!(taken, Ok(wanting));
                if wanting > 0 {
                    sent.push((topic, event));
                }
            }
            Step::Join { pattern, on_lag, .. } if !closed => {
                let options = SubscribeOptions {
                    pattern: pattern.map(|pattern| Pattern::new(PATTERNS[pattern]).unwrap()),
                    on_lag,
                    ..Default::default()
                };
                subscriptions.push(bus.subscribe_with(options).unwrap());
                walkers.push(Walker {
                    pattern,
                    quiet: on_lag == OnLag::Count,
                    place: sent.len(),
                    joined: sent.len(),
                    unwanted: 0,
                    delivered: 0,
                    overwritten: 0,
                    untold: None,
                    fetched: None,
                    left: false,
                });
            }
            Step::Recv(place) | Step::RecvMany(place, _) if place < walkers.len() => {
                let expected = walkers[place].recv(&sent, closed);
                assert_eq!(read(&subscriptions[place]), expected);
            }
            Step::IsReady(place) if place < walkers.len() => {
                let expected = walkers[place].is_ready(&sent, closed);
                assert_eq!(subscriptions[place].is_ready(), expected);
            }
            Step::Leave(place) if place < walkers.len() => {
                subscriptions[place].close();
                walkers[place].left = true;
                assert_row_closes(&subscriptions[place].metrics());
            }
            Step::Close => {
                bus.close();
                closed = true;
            }
            _ => {}
        }
        for (subscription, walker) in subscriptions.iter().zip(&walkers) {
            let row = subscription.metrics();
            assert_row_closes(&row);
            assert_eq!(row.delivered, walker.delivered);
            if !walker.left {
                let lapped = walker.lapped(sent.len());
                let behind = sent.len() - walker.place - lapped;
                let pending = behind + usize::from(walker.fetched.is_some());
                assert_eq!(row.pending, pending as u64);
                assert_eq!(row.dropped.overwritten, walker.overwritten + lapped as u64);
                assert_eq!(row.offered as usize, sent.len() - walker.joined - walker.unwanted);
            }
        }
        assert_sums_close(&bus.metrics());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn broadcast_does_what_its_model_does(steps in steps()) {
        check_broadcast(&steps);
    }
}
