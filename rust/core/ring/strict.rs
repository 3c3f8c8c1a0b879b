//! Publishers that hold no lock while they write: each claims sequences of its own, and the tail
//! follows when they are written.
//!
//! ```text
//!               tail                     claimed             limit
//!   ─────────────┼─────────────────────────┼───────────────────┼──
//!    to be read  │   ·   ✓   ✓   ·   ✓     │  to be claimed    │  ask
//!
//!  publisher                                             who pauses them, under the bus's token
//!  C  claimed: next -> next + 1 if not PAUSED            claimed |= PAUSED
//!     write the slot                                     wait until tail == claimed
//!  S  stamp of the slot = sequence + 1, fence,           ...
//!     if the tail is not there: otherwise tail += 1      claimed = tail, not PAUSED
//!  H  while the slot at the tail has its stamp: tail += 1
//! ```
//!
//! Between C and S nobody waits for the publisher but readers of what comes after, and who pauses:
//! the others claim, write, and leave it to the publisher that stopped to move the tail over their
//! events when it goes on, and to wake whom those may concern.
//!
//! | store | load that may miss it | why not all |
//! |---|---|---|
//! | S | H of another publisher | of all fences and moves of the tail one is last, and who has made it sees every stamp and goes on from where the tail is |
//! | `PAUSED` | C | they are one word: a claim comes before it and is waited for, or fails |
//!
//! | store, release | load, acquire | so that |
//! |---|---|---|
//! | the limit | C | what the slot had was written and is read no more; the tail is seen less than a lap old |
//! | S | H, then the tail | whoever moves the tail hands on what others wrote |
//!
//! Readers, joins, sweeps and closing look at the tail alone, as on any ring. A limit that is read
//! late is too low: limits only rise as long as nobody pauses.
//! One number for each slot is how LMAX's multi-producer sequencer tells what is available.

use crate::barrier::Fences;
use crate::sync::{AtomicU64, Counter, Ordering, wait_a_moment};
use crossbeam_utils::CachePadded;
use smallvec::SmallVec;

/// Beside the next sequence to be claimed: nobody may.
const PAUSED: u64 = 1 << 63;

/// Topics of events of others that a publisher has made readable.
pub(crate) type Passed = SmallVec<[u32; 8]>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Strict {
    claimed: CachePadded<AtomicU64>,
    /// By slot, one more than the sequence that a publisher has written there.
    stamps: Box<[AtomicU64]>,
    fences: Fences,
}

/// Claimed sequences; they must be published, for everything after them waits.
#[derive(Debug)]
#[must_use]
pub(crate) struct Turn {
    /// The first sequence.
    pub(crate) sequence: u64,
    /// One more than the last.
    pub(crate) end: u64,
    limit: u64,
}

impl Turn {
    /// Returns where publishers had to ask when it was claimed.
    #[cfg(all(test, not(tickbus_loom)))]
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Returns whether the way to the limit was halved by this turn, again or for the first time
    /// since a sweep went a `stride` ahead.
    #[inline]
    pub(crate) fn halves_the_way(&self, stride: u64) -> bool {
        let (before, after) = (self.limit - self.sequence, self.limit - self.end);
        after < stride / 2 && before.leading_zeros() != after.leading_zeros()
    }
}

impl Strict {
    /// Returns who publishes, paused; `capacity` is a power of two.
    pub(crate) fn new(capacity: usize, fences: Fences) -> Self {
        Self {
            claimed: CachePadded::new(AtomicU64::new(PAUSED)),
            stamps: (0..capacity).map(|_| AtomicU64::new(0)).collect(),
            fences,
        }
    }

    #[inline]
    fn stamp(&self, sequence: u64) -> &AtomicU64 {
        &self.stamps[sequence as usize & (self.stamps.len() - 1)]
    }

    /// Step C for up to `count` sequences below what `limit` returns. `Err` says whether only the
    /// limit is in the way.
    #[inline]
    pub(crate) fn claim(&self, limit: impl Fn() -> u64, count: u64) -> Result<Turn, bool> {
        let mut next = self.claimed.load(Ordering::Relaxed);
        loop {
            if next & PAUSED != 0 {
                return Err(false);
            }
            let limit = limit();
            let end = limit.min(next + count);
            if end <= next {
                return Err(true);
            }
            // ORDERING: acquires what `resume` released.
            match self.claimed.compare_exchange_weak(
                next,
                end,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(Turn { sequence: next, end, limit }),
                Err(now) => next = now,
            }
        }
    }

    /// Steps S and H; notes the topics of events of others that this makes readable.
    #[inline]
    pub(crate) fn publish(
        &self,
        turn: &Turn,
        tail: &Counter,
        topic: impl Fn(u64) -> u32,
        passed: &mut Passed,
    ) {
        let mut next = tail.latest();
        // Then nobody but this publisher moves it, and no stamp is needed.
        let mut end = turn.end;
        if next != turn.sequence {
            for sequence in turn.sequence..turn.end {
                // ORDERING: pairs with `written_from`.
                self.stamp(sequence).store(sequence + 1, Ordering::Release);
            }
            self.fences.often();
            next = tail.latest();
            end = self.written_from(next);
        }
        while end != next {
            // Before the tail is moved: then their slots may be written again.
            let known = passed.len();
            for sequence in (next..end).filter(|at| !(turn.sequence..turn.end).contains(at)) {
                let topic = topic(sequence);
                if passed.last() != Some(&topic) {
                    passed.push(topic);
                }
            }
            next = match tail.advance(next, end) {
                Ok(()) => end,
                Err(now) => {
                    passed.truncate(known);
                    now
                }
            };
            if cfg!(tickbus_loom) {
                // Loom takes sequentially consistent operations for less than they are.
                self.fences.rarely();
            }
            end = self.written_from(next);
        }
    }

    /// Returns the end of the sequences from `next` on that have their stamps.
    #[inline]
    fn written_from(&self, next: u64) -> u64 {
        let mut end = next;
        // ORDERING: pairs with the stamps, and comes after `Counter::advance` or a full fence.
        while self.stamp(end).load(Ordering::SeqCst) == end + 1 {
            end += 1;
        }
        end
    }

    /// Returns the sequence before which everything is claimed.
    pub(crate) fn claimed(&self) -> u64 {
        self.claimed.load(Ordering::Relaxed) & !PAUSED
    }

    /// Lets nobody claim, and waits until what was claimed can be read.
    pub(crate) fn pause(&self, tail: &Counter) {
        // ORDERING: who claims next acquires what `resume` releases; what was claimed before is seen
        // by the tail.
        let claimed = self.claimed.fetch_or(PAUSED, Ordering::Relaxed) & !PAUSED;
        Self::wait_for_claimed(tail, claimed);
    }

    pub(super) fn wait_for_claimed(tail: &Counter, claimed: u64) {
        let mut rounds = 0;
        while tail.observe() != claimed {
            wait_a_moment(&mut rounds);
        }
    }

    /// Lets the next sequence be claimed again, which is the tail, or nobody still.
    pub(crate) fn resume(&self, tail: &Counter, stays_paused: bool) {
        let paused = if stays_paused { PAUSED } else { 0 };
        // ORDERING: pairs with `claim`.
        self.claimed.store(tail.value() | paused, Ordering::Release);
    }
}
