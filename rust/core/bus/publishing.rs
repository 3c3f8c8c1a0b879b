//! What happens under the publish token: room is asked for everywhere first, then the event is
//! pushed.

use super::Shared;
use super::on_ring::RingState;
use super::publication::{Patience, Pending};
use super::slot::{Carrier, InLine, NEWCOMER, Other, Slot};
#[cfg(feature = "broadcast")]
use crate::backend::Addressed;
use crate::barrier::Fences;
use crate::conflation::{Key, KeyFn};
use crate::last::LastEvents;
use crate::metrics::Warning;
use crate::policy::Policy;
use crate::sync::Exclusion;
use crate::topic::TopicTable;
use smallvec::SmallVec;
#[cfg(feature = "broadcast")]
use tokio::sync::broadcast;

/// What only the holder of the publish token touches.
pub(super) struct PublishState<T: Clone, R: Exclusion> {
    pub(super) slots: Vec<Option<Slot<T, R>>>,
    pub(super) topics: TopicTable,
    pub(super) next_ticket: u64,
    pub(super) closed: bool,
    /// Subscriptions that conflate: with none, nobody asks for keys.
    pub(super) conflating: usize,
    pub(super) last: Option<LastEvents<T>>,
    pub(super) ring: Option<RingState<T, R>>,
    #[cfg(feature = "broadcast")]
    pub(super) broadcast: Option<broadcast::Sender<Addressed<T>>>,
}

/// What is done after the token was released.
pub(super) struct Aftermath<T> {
    /// The topic whose sleepers are woken, and its mask.
    pub(super) wake: Option<(u32, u64)>,
    pub(super) displaced: SmallVec<[T; 8]>,
    pub(super) forgotten: SmallVec<[Key; 1]>,
    pub(super) warnings: SmallVec<[Warning; 1]>,
}

impl<T: Clone> Aftermath<T> {
    #[inline]
    pub(super) fn new() -> Self {
        Self {
            wake: None,
            displaced: SmallVec::new(),
            forgotten: SmallVec::new(),
            warnings: SmallVec::new(),
        }
    }

    #[inline]
    pub(super) fn run<R: Exclusion>(&mut self, shared: &Shared<T, R>) {
        if self.wake.is_some() || !self.warnings.is_empty() {
            self.wake_and_warn(shared);
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn wake_and_warn<R: Exclusion>(&mut self, shared: &Shared<T, R>) {
        if let Some((topic, wanted)) = self.wake.take() {
            shared.wake(topic, wanted);
        }
        if let Some(sink) = shared.on_warning.get() {
            self.warnings.drain(..).for_each(sink);
        }
    }
}

/// Key functions to be asked, with the subscriptions that have them.
pub(super) type Unkeyed<T> = SmallVec<[(u64, KeyFn<T>); 1]>;

pub(super) enum Verdict<T> {
    Done(usize),
    InLine,
    Rejected(Vec<u64>),
    Missed { taken: usize, missing: Vec<u64> },
    Unkeyed(Unkeyed<T>),
    Closed,
    Reserved,
}

impl<T: Clone, R: Exclusion> PublishState<T, R> {
    /// One try to publish: decides, and pushes if nothing stands in the way.
    #[inline]
    pub(super) fn offer(
        &mut self,
        publication: &mut Pending<T>,
        patience: Patience,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) -> Verdict<T> {
        if !publication.stands.is_empty() {
            self.leave_lines(publication);
        }
        if publication.at_once.is_some() {
            return self.offer_at_once(publication, patience, shared, aftermath);
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
        if self.ring.is_some() {
            return self.offer_on_ring(publication, patience, shared, aftermath);
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
                    if self.stand_in_line(publication, slot, shared.fences) {
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
    pub(super) fn unkeyed(&self, publication: &Pending<T>) -> Unkeyed<T> {
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
    pub(super) fn keep_last(
        &mut self,
        publication: &Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) {
        if let Some(last) = &mut self.last
            && let Some(event) = &publication.event
        {
            let number = shared.published();
            aftermath.displaced.extend(last.keep(publication.topic, number, event));
        }
    }

    /// Publishes if somebody wants the event and, on channels of their own, every subscription
    /// has room and nobody stands in line, which needs neither policy nor patience. Gives the
    /// event back otherwise.
    #[inline]
    pub(super) fn publish_ready(
        &mut self,
        topic: u32,
        event: T,
        shared: &Shared<T, R>,
    ) -> Result<usize, T> {
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
    pub(super) fn stopped_at(
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
    pub(super) fn push_to_each(
        &mut self,
        publication: &mut Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
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
        self.look_for_sleepers(publication.topic, shared, aftermath);
        taken
    }

    #[cfg(feature = "broadcast")]
    pub(super) fn send_to_all(
        &mut self,
        publication: &mut Pending<T>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
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
            self.look_for_sleepers(publication.topic, shared, aftermath);
        }
        taken
    }

    /// Step W2 under the token, for which `aftermath` does the rest.
    pub(super) fn look_for_sleepers(
        &self,
        topic: u32,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) {
        if shared.is_any_reader_asleep() {
            aftermath.wake = Some((topic, self.topics.interest(topic).mask()));
        }
    }

    /// Puts the publication in line at a slot; false if room has appeared meanwhile.
    pub(super) fn stand_in_line(
        &mut self,
        publication: &mut Pending<T>,
        index: u32,
        fences: Fences,
    ) -> bool {
        if publication.ticket == NEWCOMER {
            publication.ticket = self.next_ticket;
            self.next_ticket += 1;
        }
        let Some(slot) = &mut self.slots[index as usize] else { return false };
        let notify = publication.notify.get_or_insert_default().clone();
        let place = slot.line.partition_point(|other| other.ticket < publication.ticket);
        slot.line.insert(place, InLine { ticket: publication.ticket, notify, told: false });
        slot.inbox.standing.line_up(slot.line.len());
        publication.stands.push((index, slot.inbox.id));
        slot.inbox.blocked.arm::<R>(fences);
        if slot.has_room(publication.ticket) {
            self.leave_lines(publication);
            return false;
        }
        true
    }

    pub(super) fn leave_lines(&mut self, publication: &mut Pending<T>) {
        for (index, id) in publication.stands.drain(..) {
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
}

/// Sends an event through the shared channel; gives it back if the channel has no reader.
#[cfg(feature = "broadcast")]
#[inline]
pub(super) fn send<T: Clone, R: Exclusion>(
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
