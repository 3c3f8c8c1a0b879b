//! The sweep: finds out how far publishing may go, and moves on whom it may.
//!
//! A reader that wants only some topics (a narrow one) is moved over what it never wanted, so that
//! it neither stops publishers nor loses anything; one that may lose events is moved over what it
//! wanted too, and told. All narrow readers are served by one walk over the slots, and who was far
//! enough at the last look is not looked at, so the price of a sweep hardly grows with their
//! number. It happens once in at least a quarter of the ring.

use super::cursor::Cursor;
use super::slots::Slots;
use std::sync::Arc;

/// Readers in one word of a topic's mask.
pub(crate) const GROUP: usize = u64::BITS as usize;

/// A reader, as the publisher knows it. Guarded by the bus's token.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) cursor: Arc<Cursor>,
    /// It wants every event.
    pub(crate) is_wide: bool,
    /// It may lose events that it wants.
    pub(crate) may_lose: bool,
    /// It may lose some in this sweep, if it stands a whole ring behind: nobody waits for it now.
    pub(crate) is_passed_over: bool,
    /// What the last sweep made of the two above.
    loses: bool,
    /// Where the last sweep that looked found it or put it.
    pub(crate) at: u64,
    /// Of a wide reader, the most events that a sweep that looked found pending.
    pub(crate) peak: u64,
}

/// What a sweep works on.
pub(crate) struct Sweep<'a, T, W, L> {
    pub(crate) slots: &'a Slots<T>,
    /// The sequence to be written next.
    pub(crate) next: u64,
    /// How far publishing may go, and whoever is moved is moved, at once.
    pub(crate) stride: u64,
    /// Returns the members of a group that want a topic.
    pub(crate) wanted: W,
    /// Is told which member was moved on though it wanted events, and how many it lost.
    pub(crate) lost: L,
}

impl<T, W, L> Sweep<'_, T, W, L>
where
    W: Fn(u32, usize) -> u64,
    L: FnMut(usize, u64),
{
    /// Moves members, and returns the sequence before which publishing need not ask again. At or
    /// below `next`, there is no room: whoever stands a whole ring behind `next` stops it.
    pub(crate) fn run(mut self, members: &mut [Option<Member>]) -> u64 {
        // Whoever may be moved is moved up to here: then there is room for a stride.
        let target = (self.next + self.stride).saturating_sub(self.slots.capacity());
        let mut lowest = self.next;
        for (group, members) in members.chunks_mut(GROUP).enumerate() {
            let narrow = self.run_wide(group, members, target);
            if narrow != 0 {
                self.run_narrow(group, members, target, narrow);
            }
            lowest = members.iter().flatten().map(|member| member.at).fold(lowest, u64::min);
        }
        // Asking again after a stride keeps the rest for who joins late.
        (lowest + self.slots.capacity()).min(self.next + self.stride)
    }

    /// Looks at the members of a group that may be below the target, moves the wide ones that may
    /// lose, and returns the narrow ones that can be moved.
    fn run_wide(&mut self, group: usize, members: &mut [Option<Member>], target: u64) -> u64 {
        let mut narrow = 0;
        for (index, member) in members.iter_mut().enumerate() {
            // Positions only rise: who was far enough at the last look is so now.
            let Some(member) = member.as_mut().filter(|member| member.at < target) else {
                continue;
            };
            let seen = member.cursor.look();
            member.at = seen.position;
            if member.is_wide {
                // It may have read on where publishers hold no lock.
                member.peak = member.peak.max(self.next.saturating_sub(seen.position));
            }
            if seen.is_pinned || seen.position >= target {
                continue;
            }
            let stops = seen.position + self.slots.capacity() <= self.next;
            member.loses = member.may_lose || (member.is_passed_over && stops);
            if !member.is_wide {
                narrow |= 1 << index;
            } else if member.loses {
                let lost = target - seen.position;
                if member.move_to(target, lost) {
                    (self.lost)(group * GROUP + index, lost);
                }
            }
        }
        narrow
    }

    /// Moves the members given over what they did not want, and, up to the target, those that may
    /// lose events over what they wanted too.
    fn run_narrow(
        &mut self,
        group: usize,
        members: &mut [Option<Member>],
        target: u64,
        narrow: u64,
    ) {
        let mut moves = [(self.next, 0_u64); GROUP];
        let mut left = narrow;
        let mut loses = 0;
        let mut from = self.next;
        for index in bits(narrow) {
            let Some(member) = &members[index] else { continue };
            loses |= u64::from(member.loses) << index;
            from = from.min(member.at);
        }
        for sequence in from..self.next {
            if left == 0 {
                break;
            }
            let wanting = (self.wanted)(self.slots.topic(sequence), group) & left;
            for index in bits(wanting) {
                if members[index].as_ref().is_none_or(|member| sequence < member.at) {
                    continue;
                }
                if loses & (1 << index) != 0 && sequence < target {
                    moves[index].1 += 1;
                } else {
                    moves[index].0 = sequence;
                    left &= !(1 << index);
                }
            }
        }
        for index in bits(narrow) {
            let Some(member) = &mut members[index] else { continue };
            let (to, lost) = moves[index];
            if to > member.at && member.move_to(to, lost) && lost > 0 {
                (self.lost)(group * GROUP + index, lost);
            }
        }
    }
}

impl Member {
    pub(crate) fn new(cursor: Arc<Cursor>, is_wide: bool, may_lose: bool, at: u64) -> Self {
        Self { cursor, is_wide, may_lose, is_passed_over: false, loses: false, at, peak: 0 }
    }

    /// Moves the reader; if it has begun to read instead, looks again where it is.
    fn move_to(&mut self, to: u64, lost: u64) -> bool {
        let moved = self.cursor.try_move(self.at, to, lost);
        self.at = if moved { to } else { self.cursor.look().position };
        moved
    }
}

/// Returns the indices of the bits that are set.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let index = mask.trailing_zeros() as usize;
        mask &= mask.checked_sub(1)?;
        Some(index)
    })
}
