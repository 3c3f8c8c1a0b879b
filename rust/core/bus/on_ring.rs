//! Publishing on a ring: the way without a question, and under the token what is decided when there
//! is one.
//!
//! Without a question a publisher looks at its permit and at who sleeps, and at nothing else.
//! Where publishers hold no lock, their turns take the place of the permit.
//! The permit is 0 where every publication has something to decide: a subscription conflates,
//! somebody stands in line, last events are kept, a threshold is watched, or the bus is closed.

use super::publication::{Patience, Pending};
use super::publishing::{Aftermath, PublishState, Verdict};
use super::slot::{Carrier, NEWCOMER, Other, Slot};
use super::{Address, Shared};
use crate::barrier::Fences;
use crate::error::PublishManyError;
use crate::histogram::Entry;
use crate::policy::Policy;
use crate::ring::right::{Claim, Held, Stop};
use crate::ring::strict::{Passed, Turn};
use crate::ring::sweep::{Member, Sweep};
use crate::ring::{BATCH, Displaced, Ring};
use crate::sync::{Exclusion, wait_a_moment};
use crate::topic::{Topic, TopicTable};
use crate::wait::Asleep;
use smallvec::SmallVec;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Instant;

/// How often a publisher looks for room before it stands in line: to sleep and to be woken takes
/// longer than a reader needs for many events.
const LOOKS_FOR_ROOM: u32 = 32;
/// So often with pauses in between, about 30 ns each; later it lets others run.
const LOOKS_WITH_PAUSES: u32 = 24;
const PAUSES: u32 = 8;
/// So often it is not content with less than a 16th of the ring: a look costs more than an event.
const LOOKS_FOR_MORE: u32 = 8;

/// How far a call that publishes several events has come.
struct Stretch {
    by_producer: bool,
    accepted: usize,
    deadline: Option<Option<Instant>>,
}

/// What only the holder of the publish token touches.
pub(super) struct RingState<T, R> {
    pub(super) ring: Arc<Ring<T, R>>,
    /// By slot; `None` where the subscription does not read from the ring.
    pub(super) members: Vec<Option<Member>>,
    /// The sequence that the last sweep allowed to come to.
    pub(super) reach: u64,
}

impl<T, R: Exclusion> RingState<T, R> {
    pub(super) fn new(ring: Arc<Ring<T, R>>) -> Self {
        Self { ring, members: Vec::new(), reach: 0 }
    }

    /// Returns the oldest sequence that stays where it is until the next sweep.
    pub(super) fn oldest_kept(&self) -> u64 {
        self.reach.saturating_sub(self.ring.slots.capacity())
    }

    pub(super) fn join(&mut self, slot: usize, member: Member) {
        if self.members.len() <= slot {
            self.members.resize_with(slot + 1, || None);
        }
        self.members[slot] = Some(member);
    }

    /// Moves readers that are half a ring behind, or behind at all on a tiny one, over what they do not
    /// want; nobody loses anything.
    pub(super) fn step_over(&mut self, next: u64, topics: &TopicTable) {
        let capacity = self.ring.slots.capacity();
        let may_lose: Vec<bool> = self
            .members
            .iter_mut()
            .map(|member| member.as_mut().is_some_and(|m| std::mem::take(&mut m.may_lose)))
            .collect();
        let sweep = Sweep {
            slots: &self.ring.slots,
            next,
            stride: if capacity < 4 { capacity } else { capacity / 2 },
            wanted: |topic, word| topics.mask(topic, word),
            lost: |_, _| unreachable!("nobody may lose anything"),
        };
        sweep.run(&mut self.members);
        for (member, may_lose) in self.members.iter_mut().zip(may_lose) {
            if let Some(member) = member {
                member.may_lose = may_lose;
            }
        }
    }

    /// Sweeps, and returns whether there is room for one more event.
    fn sweep<S>(&mut self, next: u64, topics: &TopicTable, slots: &[Option<Slot<T, S>>]) -> bool
    where
        T: Clone,
        S: Exclusion,
    {
        let sweep = Sweep {
            slots: &self.ring.slots,
            next,
            stride: self.ring.slots.stride(),
            wanted: |topic, word| topics.mask(topic, word),
            lost: |index: usize, lost| {
                if let Some(slot) = &slots[index] {
                    let dropped = &slot.inbox.dropped;
                    match slot.policy {
                        Policy::Block => dropped.block_expired.add_exclusive(lost),
                        _ => dropped.overwritten.add_exclusive(lost),
                    }
                }
            },
        };
        self.reach = sweep.run(&mut self.members);
        for (member, slot) in self.members.iter().zip(slots) {
            if let (Some(member), Some(slot)) = (member, slot) {
                slot.inbox.standing.raise_peak(member.peak);
            }
        }
        self.reach > next
    }
}

impl<T: Clone, R: Exclusion> PublishState<T, R> {
    /// As `offer`, on a ring.
    pub(super) fn offer_on_ring(
        &mut self,
        publication: &mut Pending<T>,
        patience: Patience,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) -> Verdict<T> {
        let Some(ring) = &shared.ring else { unreachable!("the bus has a ring") };
        let Some(held) = ring.right.seize(publication.by_producer) else {
            return Verdict::Reserved;
        };
        let mut rounds = 0;
        let verdict = loop {
            let has_room = self.sweep(&held);
            match self.stopped_on_ring(publication, patience) {
                Ok(None) if has_room => break None,
                // Somebody reads just now, or has made room since the sweep.
                Ok(None) => wait_a_moment(&mut rounds),
                Ok(Some(slot)) => {
                    if self.stand_in_line(publication, slot, shared.fences) {
                        break Some(Verdict::InLine);
                    }
                }
                Err(rejecting) => break Some(Verdict::Rejected(rejecting)),
            }
        };
        if let Some(state) = &mut self.ring {
            state.members.iter_mut().flatten().for_each(|member| member.is_passed_over = false);
        }
        let verdict = verdict.unwrap_or_else(|| {
            self.keep_last(publication, shared, aftermath);
            Verdict::Done(self.write_on_ring(publication, &held, shared, aftermath))
        });
        held.grant(self.permit(shared));
        verdict
    }

    /// Returns up to where publishers need not ask.
    pub(super) fn permit(&self, shared: &Shared<T, R>) -> u64 {
        let decides = !shared.may_skip_decisions
            || self.closed
            || self.conflating > 0
            || self.slots.iter().flatten().any(|slot| !slot.line.is_empty());
        match &self.ring {
            Some(state) if !decides => state.reach,
            _ => 0,
        }
    }

    pub(super) fn sweep(&mut self, held: &Held<'_>) -> bool {
        let Self { ring, slots, topics, .. } = self;
        ring.as_mut().is_some_and(|state| state.sweep(held.next(), topics, slots))
    }

    /// Sweeps while publishers that hold no lock go on.
    fn sweep_ahead(&mut self, shared: &Shared<T, R>) {
        let Self { ring: Some(state), slots, topics, .. } = self else { return };
        let ring = state.ring.clone();
        // Where each publication asks, the next one sweeps.
        if ring.right.is_granted() {
            state.sweep(ring.right.tail(), topics, slots);
            ring.right.raise(self.permit(shared));
        }
    }

    /// Returns whether somebody stops publishing before or at a sequence, and all who do may be
    /// waited for.
    fn is_worth_a_moment(&self, sequence: u64, shared: &Shared<T, R>) -> bool {
        let Some(state) = &self.ring else { return false };
        let mut somebody = false;
        for (slot, member) in self.slots.iter().zip(&state.members) {
            let (Some(slot), Some(member)) = (slot, member) else { continue };
            if member.at + state.ring.slots.capacity() > sequence {
                continue;
            }
            somebody = true;
            let waits = match slot.policy {
                Policy::Reject => false,
                Policy::Block => {
                    !shared.config.backpressure.max_block_duration.is_zero()
                        && slot.deserves_patience()
                }
                _ => true,
            };
            if !waits {
                return false;
            }
        }
        somebody
    }

    /// Returns the slot for whose room the publication has to wait, if there is one. Whoever stands
    /// a whole ring behind stops every event, also those that it does not want. Those for whom it
    /// waits no more are passed over by the next sweep.
    fn stopped_on_ring(
        &mut self,
        publication: &Pending<T>,
        patience: Patience,
    ) -> Result<Option<u32>, Vec<u64>> {
        let mut stopped = None;
        let mut rejecting = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(slot) = slot else { continue };
            let waits = match slot.policy {
                Policy::Block => patience == Patience::Left && slot.deserves_patience(),
                Policy::Reject => publication.rejects_wait && patience == Patience::Left,
                Policy::DropNewest | Policy::DropOldest | Policy::Conflate => continue,
            };
            // Publishers without a question do not count it down.
            slot.refresh_room();
            if slot.has_room(publication.ticket) {
                continue;
            }
            if waits {
                stopped = stopped.or(Some(index as u32));
            } else if slot.policy == Policy::Reject {
                rejecting.push(slot.inbox.id);
            } else if let Some(state) = &mut self.ring
                && let Some(member) = &mut state.members[index]
            {
                member.is_passed_over = true;
                if publication.ticket != NEWCOMER {
                    slot.inbox.standing.spend(slot.inbox.delivered.value());
                }
            }
        }
        if rejecting.is_empty() { Ok(stopped) } else { Err(rejecting) }
    }

    /// Writes the event for all at once, and into the maps of those that conflate.
    fn write_on_ring(
        &mut self,
        publication: &mut Pending<T>,
        held: &Held<'_>,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) -> usize {
        let topic = publication.topic;
        let taken = self.topics.wanted(topic).len();
        if self.conflating > 0 {
            for &index in self.topics.wanted(topic) {
                if let Some(slot) = &mut self.slots[index as usize]
                    && slot.policy == Policy::Conflate
                    && let Some(event) = publication.event.clone()
                {
                    slot.conflate(publication, event, shared, aftermath);
                }
            }
        }
        let Some(state) = &self.ring else { unreachable!("the bus has a ring") };
        if let Some(event) = publication.event.take() {
            // SAFETY: the right is held, and the last sweep found room.
            aftermath.displaced.extend(unsafe { state.ring.write(held, topic, event) });
        }
        for slot in self.slots.iter_mut().flatten() {
            slot.serve_line();
        }
        if let Some(threshold) = shared.config.backpressure.warn_threshold {
            self.warn_on_ring(topic, threshold, shared, aftermath);
        }
        self.look_for_sleepers(topic, shared, aftermath);
        taken
    }

    #[cold]
    fn warn_on_ring(
        &mut self,
        topic: u32,
        threshold: usize,
        shared: &Shared<T, R>,
        aftermath: &mut Aftermath<T>,
    ) {
        let Some(state) = &self.ring else { return };
        for &index in self.topics.wanted(topic) {
            let Some(slot) = &mut self.slots[index as usize] else { continue };
            let Carrier::Other(Other::Ring(on_ring)) = &slot.carrier else { continue };
            let position = on_ring.cursor.look().position;
            let tail = state.ring.right.tail();
            let pending = match state.members[index as usize].as_ref().is_some_and(|m| m.is_wide) {
                true => tail.saturating_sub(position) as usize,
                false => (position..tail)
                    .filter(|&sequence| self.topics.wants(state.ring.slots.topic(sequence), index))
                    .count(),
            };
            if let Some(pending) = slot.cross(pending.saturating_sub(1), pending, threshold) {
                aftermath.warnings.push(slot.warning(shared.id, pending, threshold));
            }
        }
    }
}

/// Returns the sequence for which a look wants to find room.
fn enough<T, R>(ring: &Ring<T, R>, next: u64, look: u32) -> u64 {
    match look < LOOKS_FOR_MORE {
        true => next + ring.slots.capacity() / 16,
        false => next,
    }
}

/// Passes the time before the next look for room.
fn wait_for_room(look: u32) {
    match look < LOOKS_WITH_PAUSES {
        true => (0..PAUSES).for_each(|_| wait_a_moment(&mut 0)),
        // Whoever reads may have no core.
        false => wait_a_moment(&mut { u32::MAX }),
    }
}

/// Moves an event for a call that is rarely made: its place in memory is needed only there, so that
/// elsewhere the event stays in registers.
#[inline(always)]
pub(super) fn apart<T>(event: T) -> T {
    let mut event = MaybeUninit::new(event);
    std::hint::black_box(&mut event);
    // SAFETY: it is an event, which `black_box` leaves as it is.
    unsafe { event.assume_init() }
}

impl<T: Clone, R: Exclusion> Shared<T, R> {
    /// Publishes on the ring with a claim, and returns how many took the event.
    #[inline(always)]
    pub(super) fn publish_on_ring(
        &self,
        ring: &Ring<T, R>,
        claim: Claim<'_>,
        (topic, interest): Address<'_>,
        event: T,
        fences: Fences,
        asleep: &Asleep,
    ) -> usize {
        let displaced = ring.publish(claim, topic, event);
        let taken = self.taken_on_ring((topic, interest), fences, asleep);
        drop(displaced);
        taken
    }

    /// Lets the calling thread, or the `Producer`, go on if nothing but a measurement or the limit of
    /// the last sweep has stopped it, and begins the publication. `None` leaves everything to the
    /// token.
    #[cold]
    #[inline(never)]
    pub(super) fn go_on(&self, ring: &Ring<T, R>, as_producer: bool) -> Option<Entry> {
        if R::SERIALIZES_SLEEP && !as_producer {
            return None;
        }
        let draw = |sequence| self.latencies.next_sample(sequence);
        let ask = || match as_producer {
            true => ring.right.ask_as_producer(draw),
            false => ring.right.ask(draw),
        };
        let entry = match ask() {
            Stop::Sample(is_sample) => return Some(self.latencies.enter_sampled(is_sample)),
            Stop::Limit(Some(is_sample)) => self.latencies.enter_sampled(is_sample),
            Stop::Limit(None) => self.latencies.enter(),
            Stop::Other => return None,
        };
        for look in 0..LOOKS_FOR_ROOM {
            let mut state = self.token.lock();
            // Another one may have swept before.
            if !matches!(ask(), Stop::Limit(_)) {
                return Some(entry);
            }
            let held = ring.right.seize(as_producer)?;
            let has_room = state.sweep(&held);
            held.grant(state.permit(self));
            let is_worth_it = state.is_worth_a_moment(enough(ring, held.next(), look), self);
            drop(held);
            drop(state);
            if has_room && !is_worth_it {
                // The measurement may have been due too.
                ask();
                return Some(entry);
            }
            if !is_worth_it {
                break;
            }
            wait_for_room(look);
        }
        None
    }

    /// Publishes an event as one of several that hold no lock, and returns how many took it; gives
    /// it back if there is a question.
    #[inline]
    pub(super) fn publish_strictly(
        &self,
        ring: &Ring<T, R>,
        (topic, interest): Address<'_>,
        event: T,
    ) -> Result<usize, T> {
        let Some(turn) = self.turn(ring, 1) else { return Err(event) };
        let mut passed = Passed::new();
        let displaced = ring.publish_turn(&turn, topic, event, &mut passed);
        let taken = self.taken_on_ring((topic, interest), self.fences, self.dormitory.asleep());
        self.end_turn(ring, &turn, &passed);
        drop(displaced);
        Ok(taken)
    }

    /// As [`Ring::publish_batch_ready`], as one of several that hold no lock.
    fn publish_batch_strictly(
        &self,
        ring: &Ring<T, R>,
        count: usize,
        next: impl FnMut() -> (u32, T),
        displaced: &mut Displaced<T>,
    ) -> usize {
        let Some(turn) = self.turn(ring, count as u64) else { return 0 };
        let mut passed = Passed::new();
        ring.publish_turn_of_many(&turn, next, displaced, &mut passed);
        self.end_turn(ring, &turn, &passed);
        (turn.end - turn.sequence) as usize
    }

    /// Claims up to `count` sequences for a publisher that holds no lock. `None` leaves everything
    /// to the token.
    #[inline]
    fn turn(&self, ring: &Ring<T, R>, count: u64) -> Option<Turn> {
        match ring.right.take_turn(count) {
            Ok(turn) => Some(turn),
            Err(Stop::Limit(_)) => self.turn_beyond_limit(ring, count),
            Err(_) => None,
        }
    }

    #[cold]
    #[inline(never)]
    fn turn_beyond_limit(&self, ring: &Ring<T, R>, count: u64) -> Option<Turn> {
        for look in 0..LOOKS_FOR_ROOM {
            let mut state = self.token.lock();
            if !ring.right.is_granted() {
                return None;
            }
            // Another one may have swept before.
            if !ring.right.has_room() {
                state.sweep_ahead(self);
            }
            let next = ring.right.claimed();
            let is_worth_it = state.is_worth_a_moment(enough(ring, next, look), self);
            drop(state);
            if !is_worth_it || look >= LOOKS_FOR_MORE {
                match ring.right.take_turn(count) {
                    Ok(turn) => return Some(turn),
                    Err(Stop::Limit(_)) => {}
                    Err(_) => return None,
                }
            }
            // Otherwise somebody writes at whose event the sweep ended.
            if !is_worth_it && ring.right.tail() >= next {
                return None;
            }
            wait_for_room(look);
        }
        None
    }

    /// Does what others gain by: wakes whom events of others that the turn made readable concern,
    /// and sweeps before the limit is reached, if nobody is about to.
    #[inline]
    pub(super) fn end_turn(&self, ring: &Ring<T, R>, turn: &Turn, passed: &Passed) {
        if !passed.is_empty() {
            self.wake_passed(passed);
        }
        if turn.halves_the_way(ring.slots.stride()) {
            self.try_sweep_ahead();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_passed(&self, passed: &Passed) {
        if self.is_any_reader_asleep() {
            for &topic in passed {
                let wanted = self.token.lock().topics.interest(topic).mask();
                self.wake(topic, wanted);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn try_sweep_ahead(&self) {
        if let Some(mut state) = self.token.try_lock() {
            state.sweep_ahead(self);
        }
    }

    /// Returns how many took what was published just now, and wakes those who slept.
    #[inline]
    pub(super) fn taken_on_ring(
        &self,
        (topic, interest): Address<'_>,
        fences: Fences,
        asleep: &Asleep,
    ) -> usize {
        let taken = interest.wanting();
        if self.fence_awake(fences) && asleep.any_of(interest.mask()) {
            self.wake(topic, interest.mask());
        }
        taken
    }

    /// Publishes clones of events in order, as many at once as need no question. The patience is
    /// one for all.
    pub(super) fn publish_batch_on_ring(
        &self,
        ring: &Ring<T, R>,
        by_producer: bool,
        topic: Option<&Topic>,
        events: &[T],
    ) -> Result<usize, PublishManyError<T>> {
        let (id, interest) = self.address(topic);
        let mut stretch = Stretch { by_producer, accepted: 0, deadline: None };
        let mut batch = SmallVec::<[T; BATCH]>::new();
        for events in events.chunks(BATCH) {
            // Cloned before anything is claimed: that may do anything, also with this bus.
            batch.extend(events.iter().cloned());
            let mut left = batch.drain(..);
            let next = || match left.next() {
                Some(event) => (id, event),
                None => unreachable!("there are as many as were counted"),
            };
            self.publish_stretch(ring, &mut stretch, events.len(), &[(id, interest)], next)?;
        }
        Ok(stretch.accepted)
    }

    /// Publishes events, each to its address, as [`Shared::publish_batch_on_ring`] does.
    pub(super) fn publish_copies_on_ring(
        &self,
        ring: &Ring<T, R>,
        addresses: &[Address<'_>],
        events: &[T],
    ) -> Result<usize, PublishManyError<T>>
    where
        T: Copy,
    {
        let mut stretch = Stretch { by_producer: false, accepted: 0, deadline: None };
        let mut left = events.iter().zip(addresses);
        let next = || match left.next() {
            Some((event, (id, _))) => (*id, *event),
            None => unreachable!("there are as many as were counted"),
        };
        self.publish_stretch(ring, &mut stretch, events.len(), addresses, next)?;
        Ok(stretch.accepted)
    }

    /// Publishes `count` events of `next`, which runs nothing that a user wrote. Who sleeps among
    /// those that want one of the topics is woken, too early where their event is not the first.
    #[inline]
    fn publish_stretch(
        &self,
        ring: &Ring<T, R>,
        stretch: &mut Stretch,
        mut count: usize,
        addresses: &[Address<'_>],
        mut next: impl FnMut() -> (u32, T),
    ) -> Result<(), PublishManyError<T>> {
        let Stretch { by_producer, accepted, deadline } = stretch;
        // Dropped when nothing is claimed: that may do anything too.
        let mut displaced = Displaced::new();
        while count > 0 {
            let entry = self.latencies.enter_batch(count);
            let filled = match ring.right.is_strict() {
                true => self.publish_batch_strictly(ring, count, &mut next, &mut displaced),
                false => ring.publish_batch_ready(*by_producer, count, &mut next, &mut displaced),
            };
            if filled > 0 {
                self.wake_for_each(addresses);
                self.latencies.leave_batch(entry, filled);
                displaced.clear();
                *accepted += filled;
                count -= filled;
                continue;
            }
            if self.go_on(ring, *by_producer).is_some() {
                continue;
            }
            let (id, event) = next();
            let mut pending = Pending::new(self.latencies.enter(), event, id, false);
            pending.by_producer = *by_producer;
            let patience = self.config.backpressure.max_block_duration;
            pending
                .publication(self)
                .run(|| *deadline.get_or_insert_with(|| Instant::now().checked_add(patience)))
                .map_err(|error| PublishManyError { accepted: *accepted, error })?;
            *accepted += 1;
            count -= 1;
        }
        Ok(())
    }

    /// Publishes the first of `count` events of `next`, as many at once as need no question: none
    /// where a claim cannot be given back, for `next` may panic.
    #[inline]
    pub(super) fn fill_ring(
        &self,
        ring: &Ring<T, R>,
        topic: Option<&Topic>,
        count: usize,
        mut next: impl FnMut() -> T,
    ) -> usize {
        if ring.right.is_strict() {
            return 0;
        }
        let (id, interest) = self.address(topic);
        // Dropped when nothing is claimed: that may do anything.
        let mut displaced = Displaced::new();
        let (next, count) = (|| (id, next()), count.min(BATCH));
        let entry = self.latencies.enter_batch(count);
        let filled = ring.publish_batch_ready(false, count, next, &mut displaced);
        if filled > 0 {
            self.wake_for_each(&[(id, interest)]);
            self.latencies.leave_batch(entry, filled);
        }
        filled
    }

    /// Step W2 on a ring for events of several topics.
    #[inline]
    fn wake_for_each(&self, addresses: &[Address<'_>]) {
        if !self.fence_awake(self.fences) {
            return;
        }
        let wanted = addresses.iter().fold(0, |wanted, (_, interest)| wanted | interest.mask());
        if self.dormitory.asleep().any_of(wanted) {
            for (id, interest) in addresses {
                // Who was called by the first one sleeps no more.
                if self.dormitory.asleep().any_of(interest.mask()) {
                    self.wake(*id, interest.mask());
                }
            }
        }
    }
}
