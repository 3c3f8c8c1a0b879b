//! What a replay asks of a bus: that it is alone on it, and how much can be published before anybody
//! misses something.

use super::on_ring::RingState;
use super::slot::{Carrier, Other};
use super::{Bus, Shared};
use crate::error::ReplayRefused;
use crate::policy::{OnLag, Policy};
use crate::subscription::Inbox;
use crate::sync::{Counter, Exclusion, Flag};
use crate::topic::TopicTable;
use crate::wait::wake_together;

/// What was replayed into a bus or a system, and whether it is now.
#[derive(Debug, Default)]
pub(crate) struct Replaying {
    is_on: Flag,
    events: Counter,
}

impl Replaying {
    /// Begins a replay into what has published so many events.
    pub(crate) fn begin(
        &self,
        mixed: bool,
        has_store: bool,
        published: u64,
    ) -> Result<(), ReplayRefused> {
        if !mixed && has_store {
            return Err(ReplayRefused::Store);
        }
        if !self.is_on.set() && !mixed {
            return Err(ReplayRefused::Replay);
        }
        self.check(mixed, published).inspect_err(|_| self.end())
    }

    /// Counts events that a replay has published.
    pub(crate) fn add(&self, events: u64) {
        self.events.add(events);
    }

    /// Returns an error if others have published too.
    pub(crate) fn check(&self, mixed: bool, published: u64) -> Result<(), ReplayRefused> {
        match published.saturating_sub(self.events.value()) {
            others if others > 0 && !mixed => Err(ReplayRefused::Publisher { events: others }),
            _ => Ok(()),
        }
    }

    pub(crate) fn end(&self) {
        self.is_on.clear();
    }
}

impl<T: Clone, R: Exclusion> Inbox<T, R> {
    /// Returns whether a replay waits for it: not if it conflates, nor if it only counts what it
    /// misses.
    fn is_waited_for(&self) -> bool {
        match self.policy {
            Policy::Block | Policy::Reject => true,
            Policy::DropNewest | Policy::DropOldest => self.on_lag == OnLag::Raise,
            Policy::Conflate => false,
        }
    }
}

impl<T: Clone, R: Exclusion> Shared<T, R> {
    fn room(&self) -> usize {
        let room = {
            let mut state = self.token.lock();
            let state = &mut *state;
            let slots = state.slots.iter_mut().flatten();
            let waited_for = slots.filter(|slot| slot.inbox.is_waited_for());
            if let Some(ring) = &self.ring {
                let waited_for: Vec<u32> = waited_for.map(|slot| slot.inbox.slot).collect();
                let paused = ring.right.pause();
                let lag = state
                    .ring
                    .as_mut()
                    .map_or(0, |ring| ring.lag(paused.next(), &state.topics, &waited_for));
                paused.grant(state.permit(self));
                // Whoever is not further behind than this loses nothing, whenever a sweep comes.
                let kept = ring.slots.capacity() - ring.slots.stride();
                let room = if lag == 0 { kept.max(1) } else { kept.saturating_sub(lag) };
                return room as usize;
            }
            let rooms = waited_for.map(|slot| match &slot.carrier {
                Carrier::Own(_) => {
                    slot.refresh_room();
                    slot.room
                }
                #[cfg(feature = "broadcast")]
                Carrier::Other(Other::Shared) => {
                    self.capacity.saturating_sub(slot.inbox.entries_behind(self) as usize)
                }
                Carrier::Other(Other::Ring(_) | Other::Conflating(_)) => usize::MAX,
            });
            rooms.min().unwrap_or(usize::MAX)
        };
        if room == 0 && self.is_shared_channel() {
            // Whoever sleeps has not walked over what it does not want.
            let roster = self.roster.load();
            wake_together(|| roster.inboxes.iter().for_each(|inbox| inbox.bell.wake_all()));
        }
        room
    }
}

impl<T, R: Exclusion> RingState<T, R> {
    /// Moves the readers given over what they do not want, and returns how far the last of them is
    /// behind.
    fn lag(&mut self, next: u64, topics: &TopicTable, readers: &[u32]) -> u64 {
        self.step_over(next, topics);
        let members = readers.iter().filter_map(|slot| self.members.get(*slot as usize)?.as_ref());
        members.map(|member| next.saturating_sub(member.at)).max().unwrap_or(0)
    }
}

impl<T: Clone, R: Exclusion> Bus<T, R> {
    /// Returns how many events can be published before a subscription misses one or stops the
    /// publisher, but for those that conflate or only count what they miss.
    pub fn room(&self) -> usize {
        self.shared().room()
    }

    /// Begins a replay.
    ///
    /// # Errors
    ///
    /// Unless it is `mixed` with what others publish: a store is attached, another one replays, or
    /// others have published.
    pub fn begin_replay(&self, mixed: bool) -> Result<(), ReplayRefused> {
        self.shared().replaying.begin(mixed, self.has_store(), self.published())
    }

    /// Counts events that a replay has published.
    ///
    /// # Errors
    ///
    /// As [`Bus::begin_replay`], if others have published meanwhile.
    pub fn count_replayed(&self, events: u64, mixed: bool) -> Result<(), ReplayRefused> {
        self.shared().replaying.add(events);
        self.shared().replaying.check(mixed, self.published())
    }

    /// Ends a replay.
    pub fn end_replay(&self) {
        self.shared().replaying.end();
    }

    /// Returns whether a store takes what is published.
    pub(crate) fn has_store(&self) -> bool {
        let roster = self.shared().roster.load();
        roster.inboxes.iter().any(|inbox| inbox.feeds_store.is_set())
    }
}
