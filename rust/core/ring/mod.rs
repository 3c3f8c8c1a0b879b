//! The ring: one sequence of slots for all readers, each with a cursor of its own.
//!
//! ```text
//!             lowest cursor            tail = next to be written
//!                  │                        │            limit = lowest + capacity
//!   ┌────┬────┬────┼────┬────┬────┬────┬────┼────┬────┬────┐      │
//!   │    │    │    │ ◄── to be read ───────►│ ◄── free ───►│ ─────┘
//!   └────┴────┴────┴────┴────┴────┴────┴────┴────┴────┴────┘
//!   cursor A ───────────────────┘        └──── cursor B
//! ```
//!
//! A publisher writes a slot and moves the tail: nothing in it depends on how many readers there
//! are. Only when it comes to the *limit* it asks where the readers stand, in one [`sweep`] for all
//! of them, under the bus's token. Joining and leaving happen under the token too, while publishing
//! goes on.
//!
//! # Who may touch a slot
//!
//! 1. The publisher of sequence `s`, who has the [`right`], or its turn where publishers are
//!    [`strict`], writes slot `s` from the moment that `s` is below the limit until `tail` is beyond
//!    it.
//! 2. A reader reads slot `s` if `s` is at or after its position and `tail` is beyond it, while it
//!    pins its [`cursor`]; readers that are never moved need not pin.
//! 3. The limit is at most one capacity above every position that a sweep has seen, and positions
//!    only rise; the sweep sees a pinned reader where it is. So 1 and 2 never meet in a slot.
//! 4. A reader that joins at a sequence which is at least `limit - capacity` is above everything
//!    that may be overwritten before the next sweep, which will see it.
//!
//! | store | load | so that |
//! |---|---|---|
//! | `tail`, release | reader, acquire | the event is there |
//! | `position`, release | sweep, acquire | the reader is done with what is overwritten |
//! | sweep, token | join, token | 4 |
//!
//! The pairs of the right and of the cursor stand in their modules. `tests/loom.rs` checks all of
//! them, and that the checks fail without an ordering or a fence.
//!
//! The layout is that of the LMAX Disruptor; its gating, batching and padding are taken from there.

pub(crate) mod cursor;
#[cfg(all(test, tickbus_loom))]
mod models;
pub(crate) mod overwrite;
pub(crate) mod reader;
pub(crate) mod right;
pub(crate) mod slots;
pub(crate) mod strict;
pub(crate) mod sweep;

use crate::barrier::Fences;
use crate::sync::Exclusion;
use right::{Claim, Held, Right};
use slots::Slots;
use smallvec::SmallVec;
use std::marker::PhantomData;
use strict::{Passed, Turn};

/// Events that are published at once by one call.
pub(crate) const BATCH: usize = 32;

/// Events that made way for newer ones, to be dropped when nothing is held any more.
pub(crate) type Displaced<T> = SmallVec<[T; BATCH]>;

/// The slots and the right to fill them. `R` says whether everything happens one after the other
/// anyway.
pub(crate) struct Ring<T, R> {
    pub(crate) slots: Slots<T>,
    pub(crate) right: Right,
    exclusion: PhantomData<R>,
}

impl<T, R> Drop for Ring<T, R> {
    fn drop(&mut self) {
        let published = self.right.tail();
        // SAFETY: whoever publishes or reads holds a reference to the ring, and there is none.
        unsafe { self.slots.drop_events(published) };
    }
}

impl<T, R: Exclusion> Ring<T, R> {
    /// Returns an empty ring; `capacity` is a power of two. Before the first
    /// [`Held::grant`] every publisher has to ask.
    pub(crate) fn new(capacity: usize, fences: Fences) -> Self {
        Self { slots: Slots::new(capacity), right: Right::new(fences), exclusion: PhantomData }
    }

    /// As [`Ring::new`], for publishers that hold no lock.
    pub(crate) fn strict(capacity: usize, fences: Fences) -> Self {
        let right = Right::strict(capacity, fences);
        Self { slots: Slots::new(capacity), right, exclusion: PhantomData }
    }

    /// Claims the next sequence if its publisher has a permit for it.
    #[inline(always)]
    pub(crate) fn claim(&self) -> Option<Claim<'_>> {
        match R::SERIALIZES_SLEEP {
            true => self.right.claim_alone(),
            false => self.right.claim(),
        }
    }

    /// Publishes an event, and returns the one that it displaced.
    #[inline(always)] // so that it goes from the caller's registers into the slot
    pub(crate) fn publish(&self, claim: Claim<'_>, topic: u32, event: T) -> Option<T> {
        // SAFETY: the sequence was claimed.
        let displaced = unsafe { self.slots.write(claim.sequence, topic, event) };
        claim.publish();
        displaced
    }

    /// Publishes an event as one of several threads, and returns the one that it displaced; gives
    /// it back if there is a question, or a seat.
    #[inline]
    pub(crate) fn publish_among_others(&self, topic: u32, event: T) -> Result<Option<T>, T> {
        if R::SERIALIZES_SLEEP {
            return Err(event);
        }
        let Some((held, _)) = self.right.take() else { return Err(event) };
        // SAFETY: the right is held, and the limit is above.
        Ok(unsafe { self.write(&held, topic, event) })
    }

    /// Publishes the event of a turn, notes the topics of those of others that this makes readable,
    /// and returns the one that it displaced.
    #[inline]
    pub(crate) fn publish_turn(
        &self,
        turn: &Turn,
        topic: u32,
        event: T,
        passed: &mut Passed,
    ) -> Option<T> {
        // SAFETY: the sequence was claimed below the limit.
        let displaced = unsafe { self.slots.write(turn.sequence, topic, event) };
        self.right.publish_turn(turn, |sequence| self.slots.topic(sequence), passed);
        displaced
    }

    /// As [`Ring::publish_turn`], for a turn of several. `next` returns each event with its topic;
    /// nothing that a user wrote may run in it.
    #[inline]
    pub(crate) fn publish_turn_of_many(
        &self,
        turn: &Turn,
        mut next: impl FnMut() -> (u32, T),
        displaced: &mut Displaced<T>,
        passed: &mut Passed,
    ) {
        for sequence in turn.sequence..turn.end {
            let (topic, event) = next();
            // SAFETY: the sequences were claimed below the limit, each once.
            displaced.extend(unsafe { self.slots.write(sequence, topic, event) });
        }
        self.right.publish_turn(turn, |sequence| self.slots.topic(sequence), passed);
    }

    /// Lets `f` fill the next place, for the one `Producer`, and publishes it. Gives the filled
    /// event back if that needs a question.
    #[inline]
    pub(crate) fn publish_in_place(
        &self,
        topic: u32,
        first: impl Fn() -> T,
        f: impl FnOnce(&mut T),
    ) -> Result<(), T>
    where
        T: Clone,
    {
        let Some(next) = self.right.permitted_to_producer() else {
            let mut event = first();
            f(&mut event);
            return Err(event);
        };
        // Not claimed yet: `f` may do anything, and nobody waits for it.
        // SAFETY: nobody else publishes as long as there is a `Producer`, and `next` is below the
        // limit, so that nobody is entitled to the slot before it was published.
        unsafe { self.slots.write_in_place(next, topic, first, f) };
        if let Some(claim) = self.right.claim_as_producer(self.right.fences()) {
            claim.publish();
            return Ok(());
        }
        // SAFETY: it was written just now, and stays until it is written again.
        Err(unsafe { self.slots.read(next, T::clone) })
    }

    /// Publishes the first of `count` events, as many as need no question, and returns how many.
    /// `next` returns each with its topic; nothing that a user wrote may run in it, because their
    /// sequences are claimed.
    #[inline]
    pub(crate) fn publish_batch_ready(
        &self,
        by_producer: bool,
        count: usize,
        mut next: impl FnMut() -> (u32, T),
        displaced: &mut Displaced<T>,
    ) -> usize {
        let mut fill = |from: u64, end: u64| {
            for sequence in from..end {
                let (topic, event) = next();
                // SAFETY: the sequences up to the end were claimed, or the right is held.
                displaced.extend(unsafe { self.slots.write(sequence, topic, event) });
            }
            (end - from) as usize
        };
        let count = count as u64;
        let claim = match by_producer {
            true => self.right.claim_many_as_producer(count),
            false if R::SERIALIZES_SLEEP => self.right.claim_many_alone(count),
            false => self.right.claim_many(count),
        };
        if let Some(claim) = claim {
            let filled = fill(claim.sequence, claim.end);
            claim.publish();
            return filled;
        }
        if by_producer || R::SERIALIZES_SLEEP {
            return 0;
        }
        let Some((held, limit)) = self.right.take() else { return 0 };
        let next = held.next();
        let end = limit.min(next + count);
        let filled = fill(next, end);
        held.publish(end);
        filled
    }

    /// Writes the next event with the right in hand, and returns the one that it displaced.
    ///
    /// # Safety
    ///
    /// The next sequence is below the limit of a sweep.
    #[inline]
    pub(crate) unsafe fn write(&self, held: &Held<'_>, topic: u32, event: T) -> Option<T> {
        let next = held.next();
        // SAFETY: the right is held; the caller vouches for the limit.
        let displaced = unsafe { self.slots.write(next, topic, event) };
        held.publish(next + 1);
        displaced
    }
}
