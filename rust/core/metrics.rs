//! Numbers read at one moment, and what they say about who stops the publishers.

use crate::histogram::LatencyHistogram;
use crate::policy::Policy;
use crate::sync::Counter;
use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

/// Why a subscription did not get an event that it wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Overwritten by newer events, or by other keys, before they were read.
    pub overwritten: u64,
    /// Refused because there was no room (`drop_newest`).
    pub refused: u64,
    /// Refused because the publisher's patience ended (`block`).
    pub block_expired: u64,
    /// Replaced by a newer event of the same key.
    pub conflated: u64,
    /// Still pending when the subscription was closed.
    pub closed: u64,
}

impl Dropped {
    /// Returns the sum over all reasons.
    pub fn total(&self) -> u64 {
        self.overwritten + self.refused + self.block_expired + self.conflated + self.closed
    }
}

/// One subscription's numbers: whenever nothing moves,
/// `offered == delivered + dropped.total() + pending`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionMetrics {
    /// The subscription's id, unique in its bus.
    pub id: u64,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// Its pattern over topics, if it has one.
    pub pattern: Option<String>,
    /// What happens when it has no room.
    pub policy: Policy,
    /// The most events it can hold.
    pub capacity: usize,
    /// Events waiting to be read.
    pub pending: u64,
    /// The most events that ever waited. An event that is taken at the very moment in which another
    /// comes may count as waiting; on the shared channel it is what readings and metrics saw.
    pub peak_pending: u64,
    /// Wanted events published since it joined, and those of its snapshot.
    pub offered: u64,
    /// Events read.
    pub delivered: u64,
    /// Events lost, by reason.
    pub dropped: Dropped,
    /// False where `offered`, `pending` and `overwritten` may count events that the subscription
    /// had not wanted (a pattern on the broadcast backend, or with a start that a ring had no longer).
    pub exact: bool,
    /// An upper bound of the time since the oldest pending event, or the hole before it, was
    /// published; `None` if nothing is pending. It is too long by at most the time between two
    /// readings of the metrics (before the first: since it joined), unless they were so frequent
    /// that not all of them are remembered.
    pub oldest_age: Option<Duration>,
    /// Publishers in line for its room.
    pub waiting_publishers: usize,
    /// The time since a publisher that has to respect it first found no room, if there was none
    /// since and there still is none.
    pub full_for: Option<Duration>,
    /// The patience of publishers with this `block` subscription has ended: until it reads, they
    /// pass it over, and it misses what it has no room for.
    pub is_passed_over: bool,
}

impl SubscriptionMetrics {
    /// Returns the events for which there is room.
    pub fn room(&self) -> u64 {
        (self.capacity as u64).saturating_sub(self.pending)
    }

    /// Returns whether it stops publishers now: those of events that it wants wait for its room, or
    /// are refused (`reject`).
    pub fn is_gating(&self) -> bool {
        matches!(self.policy, Policy::Block | Policy::Reject)
            && !self.is_passed_over
            && self.room() <= self.waiting_publishers as u64
    }

    fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("subscription {}", self.id))
    }
}

/// A bus's numbers.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EventBusMetrics {
    /// Events published, wanted or not.
    pub total_published: u64,
    /// Events that a subscription wanted and did not get, over all subscriptions, also those that
    /// have left.
    pub total_dropped: u64,
    /// Subscriptions now.
    pub subscriber_count: usize,
    /// The mean of the pending events of all subscriptions.
    pub avg_queue_depth: f64,
    /// How long publishing took.
    pub publish_latency: LatencyHistogram,
    /// A row per subscription, in the order in which they joined.
    pub subscriptions: Vec<SubscriptionMetrics>,
}

/// Who stops the publishers of a bus, how far each subscription is behind, and since when. It is
/// made to be printed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Explanation {
    /// The bus's id.
    pub bus: u64,
    /// Whether the bus is closed.
    pub closed: bool,
    /// The ids of the subscriptions that stop a publisher now, in the order in which they joined.
    pub gating: Vec<u64>,
    /// A row per subscription, in the order in which they joined.
    pub subscriptions: Vec<SubscriptionMetrics>,
}

impl Explanation {
    pub(crate) fn new(bus: u64, closed: bool, subscriptions: Vec<SubscriptionMetrics>) -> Self {
        let gating = match closed {
            true => Vec::new(),
            false => subscriptions.iter().filter(|r| r.is_gating()).map(|r| r.id).collect(),
        };
        Self { bus, closed, gating, subscriptions }
    }
}

impl fmt::Display for Explanation {
    /// Writes a line about the bus and one about each subscription.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gating = self.subscriptions.iter().filter(|row| self.gating.contains(&row.id));
        let gating: Vec<_> = gating.map(SubscriptionMetrics::label).collect();
        write!(f, "bus {}: ", self.bus)?;
        match &*gating {
            _ if self.closed => write!(f, "closed")?,
            [] => write!(f, "nothing stops publishers")?,
            [one] => write!(f, "{one} stops publishers")?,
            [others @ .., last] => {
                write!(f, "{} and {last} stop publishers", others.join(", "))?;
            }
        }
        self.subscriptions.iter().try_for_each(|row| write!(f, "\n  {}", Line(row)))
    }
}

/// What an explanation says about one subscription.
struct Line<'a>(&'a SubscriptionMetrics);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = self.0;
        write!(f, "{}", row.label())?;
        if let Some(pattern) = &row.pattern {
            write!(f, " ({pattern})")?;
        }
        write!(f, ": {}, {} of {} pending", row.policy.name(), row.pending, row.capacity)?;
        if let Some(age) = row.oldest_age {
            write!(f, ", the oldest for at most {:.3} s", age.as_secs_f64())?;
        }
        if let Some(full) = row.full_for {
            write!(f, ", full for {:.3} s", full.as_secs_f64())?;
        }
        match row.waiting_publishers {
            0 => {}
            1 => write!(f, ", 1 publisher waits")?,
            several => write!(f, ", {several} publishers wait")?,
        }
        if row.is_passed_over {
            write!(f, ", passed over until it reads")?;
        }
        match row.dropped.total() {
            0 => Ok(()),
            lost => write!(f, ", {lost} lost"),
        }
    }
}

/// The counters behind [`Dropped`]; each has one writer at a time.
#[derive(Debug, Default)]
pub(crate) struct DropCounters {
    pub(crate) overwritten: Counter,
    pub(crate) refused: Counter,
    pub(crate) block_expired: Counter,
    pub(crate) conflated: Counter,
    pub(crate) closed: Counter,
}

impl DropCounters {
    pub(crate) fn read(&self) -> Dropped {
        Dropped {
            overwritten: self.overwritten.value(),
            refused: self.refused.value(),
            block_expired: self.block_expired.value(),
            conflated: self.conflated.value(),
            closed: self.closed.value(),
        }
    }
}

/// How publishers stand to one subscription: written under the publish token (on the shared channel
/// the peak under the reader's lock), read by anyone. All but the peak change only where a publisher
/// finds no room.
#[derive(Debug)]
pub(crate) struct Standing {
    joined: Instant,
    peak_pending: Counter,
    waiting: Counter,
    /// One more than the nanoseconds after joining at which it was found full, or 0.
    full_since: Counter,
    /// One more than the number of events its reader had read when a publisher's patience with it
    /// ended, or 0.
    spent_at: Counter,
}

impl Standing {
    pub(crate) fn new(joined: Instant) -> Self {
        Self {
            joined,
            peak_pending: Counter::default(),
            waiting: Counter::default(),
            full_since: Counter::default(),
            spent_at: Counter::default(),
        }
    }

    /// Notes that so many events were pending at once, and returns the peak.
    pub(crate) fn raise_peak(&self, pending: u64) -> u64 {
        self.peak_pending.raise(pending)
    }

    pub(crate) fn peak_pending(&self) -> u64 {
        self.peak_pending.value()
    }

    /// Notes the length of the line.
    pub(crate) fn line_up(&self, waiting: usize) {
        self.waiting.publish(waiting as u64);
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.value() as usize
    }

    /// Notes whether a publisher that asked the queue found room; it is stamped once.
    pub(crate) fn find(&self, has_room: bool) {
        let is_full = self.full_since.value() > 0;
        if has_room == is_full {
            let since = if has_room { 0 } else { self.joined.elapsed().as_nanos() as u64 + 1 };
            self.full_since.publish(since);
        }
    }

    pub(crate) fn full_for(&self, now: Instant) -> Option<Duration> {
        let since = Duration::from_nanos(self.full_since.value().checked_sub(1)?);
        Some(now.saturating_duration_since(self.joined + since))
    }

    /// Notes that a publisher's patience ended when the reader had read so many events.
    pub(crate) fn spend(&self, delivered: u64) {
        self.spent_at.publish(delivered + 1);
    }

    /// Returns whether patience ended and the reader has not read since.
    pub(crate) fn is_spent(&self, delivered: u64) -> bool {
        self.spent_at.value() == delivered + 1
    }
}

/// What observers of one subscription saw: at which time how many events had been offered. It bounds
/// the age of the oldest event without a clock read by publishers, because an event that had not
/// been offered at a time is younger than that.
#[derive(Debug)]
pub(crate) struct Ages(VecDeque<(u64, Instant)>);

/// Observations kept for one subscription.
const OBSERVATIONS: usize = 32;

impl Ages {
    pub(crate) fn new(joined: Instant) -> Self {
        let mut observations = VecDeque::with_capacity(OBSERVATIONS);
        observations.push_back((0, joined));
        Self(observations)
    }

    /// Returns an upper bound of the age at `now` of the event with this index, and forgets what
    /// only older events need.
    pub(crate) fn bound(&mut self, index: u64, now: Instant) -> Duration {
        while self.0.get(1).is_some_and(|&(offered, _)| offered <= index) {
            self.0.pop_front();
        }
        now.saturating_duration_since(self.0[0].1)
    }

    /// Notes that `offered` events, counted after the clock was read, had been offered at `now`.
    pub(crate) fn observe(&mut self, offered: u64, now: Instant) {
        if let Some((last, time)) = self.0.back_mut()
            && *last >= offered
        {
            *time = now.max(*time);
            return;
        }
        if self.0.len() == OBSERVATIONS {
            // Every second one, without the first, which bounds the oldest event now.
            let mut place = 0;
            self.0.retain(|_| {
                place += 1;
                place % 2 == 1
            });
        }
        self.0.push_back((offered, now));
    }
}

/// A subscription that has reached its bus's `warn_threshold`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Warning {
    /// The bus.
    pub bus: u64,
    /// The subscription.
    pub subscription: u64,
    /// Its pending events.
    pub pending: usize,
    /// The threshold it reached.
    pub threshold: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_oldest_event_is_as_old_as_the_last_observation_without_it_at_most() {
        let joined = Instant::now();
        let mut ages = Ages::new(joined);
        assert_eq!(ages.bound(0, joined + SECOND * 5), SECOND * 5, "nobody has looked");
        ages.observe(10, joined + SECOND * 10);
        ages.observe(20, joined + SECOND * 20);
        let now = joined + SECOND * 100;
        assert_eq!(ages.bound(9, now), SECOND * 100, "it was there at the first look");
        assert_eq!(ages.bound(10, now), SECOND * 90);
        assert_eq!(ages.bound(19, now), SECOND * 90);
        assert_eq!(ages.bound(20, now), SECOND * 80);
        assert_eq!(ages.bound(25, now), SECOND * 80, "nobody has looked since");
    }

    #[test]
    fn looking_again_while_nothing_comes_makes_the_next_event_younger() {
        let joined = Instant::now();
        let mut ages = Ages::new(joined);
        ages.observe(0, joined + SECOND * 7);
        assert_eq!(ages.bound(0, joined + SECOND * 9), SECOND * 2);
        ages.observe(1, joined + SECOND * 9);
        ages.observe(1, joined + SECOND * 11);
        ages.observe(1, joined + SECOND * 10);
        assert_eq!(ages.bound(1, joined + SECOND * 12), SECOND);
    }

    #[test]
    fn looking_very_often_takes_no_memory_and_keeps_the_bound_an_upper_one() {
        let joined = Instant::now();
        let mut ages = Ages::new(joined);
        // Event n comes at second n + 1, and somebody looks right after it.
        for offered in 1..=10_000 {
            ages.observe(offered, joined + SECOND * offered as u32);
            assert!(ages.0.len() <= OBSERVATIONS);
        }
        let now = joined + SECOND * 10_000;
        let mut before = Duration::MAX;
        for index in 0..10_000 {
            let bound = ages.bound(index, now);
            assert!(bound >= now - (joined + SECOND * (index as u32 + 1)), "{index}");
            assert!(bound <= before, "{index}: a younger event has no looser bound");
            before = bound;
        }
        assert!(before < SECOND * 10_000 / 8, "the resolution is gone");
    }
}
