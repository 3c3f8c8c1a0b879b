//! The publisher's side of one subscription: its room, and who stands in line for it.

use super::Shared;
use super::publication::Pending;
use super::publishing::Aftermath;
use crate::backend::{Channel, Numbered};
use crate::conflation::{Conflation, Displaced, KeyFn};
use crate::metrics::Warning;
use crate::policy::Policy;
use crate::ring::Ring;
use crate::ring::cursor::Cursor;
use crate::subscription::Inbox;
use crate::sync::{Exclusion, Mutex};
use std::sync::Arc;
use tokio::sync::Notify;

/// The publisher's side of one subscription.
pub(super) struct Slot<T: Clone, R: Exclusion> {
    pub(super) inbox: Arc<Inbox<T, R>>,
    /// The inbox's, kept where the publisher looks anyway.
    pub(super) policy: Policy,
    pub(super) carrier: Carrier<T, R>,
    /// Events surely accepted before the queue must be asked again; 0 where there is none.
    pub(super) room: usize,
    pub(super) offered: u64,
    /// Until more events than these were offered, the pending ones cannot be more than ever before.
    pub(super) peak_holds_until: u64,
    /// The threshold was reported and has not been armed again.
    pub(super) warned: bool,
    /// Publishers in line for room, by ticket.
    pub(super) line: Vec<InLine>,
}

/// A publisher in line. Once told that there is room it is not told again, and readers do not look
/// for it, until it has tried.
pub(super) struct InLine {
    pub(super) ticket: u64,
    pub(super) notify: Arc<Notify>,
    pub(super) told: bool,
}

pub(super) enum Carrier<T, R: Exclusion> {
    Own(Channel<T, R>),
    Other(Other<T, R>),
}

/// What has no room to be counted; apart, because so the carrier is two words and no tag.
pub(super) enum Other<T, R: Exclusion> {
    #[cfg(feature = "broadcast")]
    Shared,
    Ring(Box<OnRing<T, R>>),
    Conflating(Box<Conflating<T, R>>),
}

/// A reader's place in the ring.
pub(super) struct OnRing<T, R> {
    pub(super) ring: Arc<Ring<T, R>>,
    pub(super) cursor: Arc<Cursor>,
}

pub(super) struct Conflating<T, R: Exclusion> {
    pub(super) map: Arc<Mutex<R, Conflation<T>>>,
    /// `None` is the topic.
    pub(super) key: Option<KeyFn<T>>,
}

impl<T, R: Exclusion> Carrier<T, R> {
    #[inline]
    pub(super) fn own(&self) -> &Channel<T, R> {
        match self {
            Self::Own(channel) => channel,
            Self::Other(_) => unreachable!("only a channel of its own has room"),
        }
    }
}

/// A newcomer stands behind everybody in line.
pub(super) const NEWCOMER: u64 = u64::MAX;

impl<T: Clone, R: Exclusion> Slot<T, R> {
    pub(super) fn refresh_room(&mut self) {
        // An event that a reader moves on hold is in neither place for a moment, and a push then
        // leaves one event too many until the next read.
        let pending = match &self.carrier {
            Carrier::Own(channel) => channel.len(),
            // What it has not wanted takes room too: the slot behind it may be one that it wants.
            Carrier::Other(Other::Ring(place)) => {
                let tail = place.ring.right.tail();
                tail.saturating_sub(place.cursor.look().position) as usize
            }
            Carrier::Other(_) => unreachable!("only a channel of its own or a cursor has room"),
        };
        self.room = self.inbox.capacity.saturating_sub(pending);
        if matches!(self.policy, Policy::Block | Policy::Reject) {
            self.inbox.standing.find(self.room > 0);
        }
    }

    #[inline]
    pub(super) fn has_room(&mut self, ticket: u64) -> bool {
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
    pub(super) fn deserves_patience(&self) -> bool {
        !self.inbox.standing.is_spent(self.inbox.delivered.value())
    }

    #[inline(always)] // the whole of what a ready publish does for each subscription
    pub(super) fn push(&mut self, event: T) -> Result<(), T> {
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
    pub(super) fn push_into_room(&mut self, event: T) {
        if self.push(event).is_err() {
            unreachable!("a queue with {} free places was full", self.room);
        }
        self.offer();
    }

    /// Counts an event that the subscription misses for want of room. Only a publisher that
    /// `waited` has spent patience.
    pub(super) fn miss(&mut self, waited: bool) {
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
    pub(super) fn conflate(
        &mut self,
        publication: &Pending<T>,
        event: T,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
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
    pub(super) fn overwrite_oldest(&mut self) -> Option<T> {
        let oldest = self.carrier.own().take_oldest()?;
        self.inbox.dropped.overwritten.add_exclusive(1);
        Some(oldest.event)
    }

    /// Counts the event as offered, after it was pushed or missed.
    #[inline]
    pub(super) fn offer(&mut self) {
        self.offered += 1;
        self.inbox.offered.publish(self.offered);
        if self.offered > self.peak_holds_until {
            self.look_for_a_peak();
        }
    }

    /// Compares what is pending now with the peak. Each event adds at most one, so it need not be
    /// done again before the difference was offered.
    pub(super) fn look_for_a_peak(&mut self) {
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
    pub(super) fn serve_line(&mut self) {
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
    pub(super) fn crossing(&mut self, threshold: usize, grew: bool) -> Option<usize> {
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
    pub(super) fn cross(&mut self, before: usize, after: usize, threshold: usize) -> Option<usize> {
        if self.warned && before <= threshold / 2 {
            self.warned = false;
        }
        if self.warned || after < threshold {
            return None;
        }
        self.warned = true;
        Some(after)
    }

    pub(super) fn warning(&self, bus: u64, pending: usize, threshold: usize) -> Warning {
        Warning { bus, subscription: self.inbox.id, pending, threshold }
    }
}
