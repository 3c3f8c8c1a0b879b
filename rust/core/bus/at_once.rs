//! Publishing at once to every subscription with room, and waiting only for the others: what is
//! urgent is not held up for all by one of them.
//!
//! Whoever still has no room when the patience has ended misses the event and is told so where it
//! is missing; the publisher is told who that is, and may try again for those alone.

use super::Shared;
use super::publication::{Patience, Pending};
use super::publishing::{Aftermath, PublishState, Verdict};
use super::slot::NEWCOMER;
use crate::sync::Exclusion;
use smallvec::SmallVec;

/// Subscriptions, by slot and id.
type Places = SmallVec<[(u32, u64); 16]>;

/// How far an event has come.
#[derive(Debug, Default)]
pub(super) struct AtOnce {
    taken: usize,
    /// Who wants it and does not have it; `None` before the first try.
    missing: Option<Places>,
    /// They were told before that they miss it.
    is_retry: bool,
}

impl AtOnce {
    /// Returns the state of an event that only these subscriptions, which miss it, shall get.
    pub(super) fn again(missing: impl IntoIterator<Item = (u32, u64)>) -> Self {
        Self { taken: 0, missing: Some(missing.into_iter().collect()), is_retry: true }
    }
}

impl<T: Clone, R: Exclusion> PublishState<T, R> {
    /// As `offer`, at once to those with room.
    pub(super) fn offer_at_once(
        &mut self,
        publication: &mut Pending<T>,
        patience: Patience,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) -> Verdict<T> {
        let mut at_once = publication.at_once.take().unwrap_or_default();
        if self.closed && at_once.taken == 0 {
            return Verdict::Closed;
        }
        let mut missing = match at_once.missing.take() {
            Some(missing) => missing,
            None => {
                let wanted = self.topics.wanted(publication.topic).iter();
                let place = |&index: &u32| Some((index, self.slots[index as usize].as_ref()?));
                wanted.filter_map(place).map(|(index, slot)| (index, slot.inbox.id)).collect()
            }
        };
        // What is pushed when the bus is closed may find its reader gone.
        while !self.closed {
            let before = at_once.taken;
            missing.retain(|place| !self.reach(*place, publication, &mut at_once.taken));
            if !at_once.is_retry && before == 0 && at_once.taken > 0 {
                shared.published.add_exclusive(1);
            }
            if patience == Patience::Spent {
                break;
            }
            match self.stand_in_lines(publication, &missing, at_once.is_retry, shared) {
                Some(true) => {
                    self.look_for_sleepers(publication.topic, shared, aftermath);
                    at_once.missing = Some(missing);
                    publication.at_once = Some(at_once);
                    return Verdict::InLine;
                }
                Some(false) => break,
                None => {}
            }
        }
        let waited = publication.ticket != NEWCOMER;
        if !at_once.is_retry {
            shared.published.add_exclusive(u64::from(at_once.taken == 0));
            self.miss(&missing, waited);
        }
        self.look_for_sleepers(publication.topic, shared, aftermath);
        match missing.is_empty() {
            true => {
                publication.event = None;
                Verdict::Done(at_once.taken)
            }
            false => Verdict::Missed {
                taken: at_once.taken,
                missing: missing.into_iter().map(|(_, id)| id).collect(),
            },
        }
    }

    /// Gives the event to a subscription; false if that has no room.
    fn reach(&mut self, place: (u32, u64), publication: &Pending<T>, taken: &mut usize) -> bool {
        let (index, id) = place;
        let slot = self.slots[index as usize].as_mut().filter(|slot| slot.inbox.id == id);
        // Who has left misses nothing.
        let (Some(slot), Some(event)) = (slot, &publication.event) else { return true };
        if !slot.has_room(publication.ticket) {
            return false;
        }
        slot.push_into_room(event.clone());
        slot.serve_line();
        *taken += 1;
        true
    }

    /// Stands in the lines of all that deserve patience, and returns whether there was one; `None`
    /// if there is room by now.
    fn stand_in_lines(
        &mut self,
        publication: &mut Pending<T>,
        missing: &[(u32, u64)],
        is_retry: bool,
        shared: &Shared<T, R>,
    ) -> Option<bool> {
        let mut stands = false;
        for &(index, _) in missing {
            let slot = self.slots[index as usize].as_ref();
            // Who tries again has decided to wait once more.
            if slot.is_some_and(|slot| is_retry || slot.deserves_patience()) {
                if !self.stand_in_line(publication, index, shared.fences) {
                    return None;
                }
                stands = true;
            }
        }
        Some(stands)
    }

    /// Counts an event as missed, which each subscription is told where it is missing.
    fn miss(&mut self, missing: &[(u32, u64)], waited: bool) {
        for &(index, _) in missing {
            if let Some(slot) = &mut self.slots[index as usize] {
                slot.miss(waited);
                slot.offer();
                slot.serve_line();
            }
        }
    }

    /// Ends a publication that waits. If some have its event, the others are told that they miss it.
    pub(super) fn abandon(
        &mut self,
        publication: &mut Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) {
        self.leave_lines(publication);
        if let Some(AtOnce { taken: 1.., missing: Some(mut missing), is_retry: false }) =
            publication.at_once.take()
        {
            missing.retain(|(index, id)| {
                self.slots[*index as usize].as_ref().is_some_and(|slot| slot.inbox.id == *id)
            });
            self.miss(&missing, false);
            self.look_for_sleepers(publication.topic, shared, aftermath);
        }
    }
}
