//! Numbers read at one moment.

use crate::policy::Policy;
use crate::sync::Counter;

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
    /// Its pattern over topics, if it has one.
    pub pattern: Option<String>,
    /// What happens when it has no room.
    pub policy: Policy,
    /// The most events it can hold.
    pub capacity: usize,
    /// Events waiting to be read.
    pub pending: u64,
    /// Wanted events published since it joined, and those of its snapshot.
    pub offered: u64,
    /// Events read.
    pub delivered: u64,
    /// Events lost, by reason.
    pub dropped: Dropped,
    /// False where `offered`, `pending` and `overwritten` may count events that the subscription
    /// had not wanted (a pattern on the broadcast backend).
    pub exact: bool,
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
    /// A row per subscription, in the order in which they joined.
    pub subscriptions: Vec<SubscriptionMetrics>,
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
