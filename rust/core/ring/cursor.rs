//! A reader's position, which the publisher may move on.
//!
//! ```text
//!  reader                                    publisher, in a sweep
//!  pin      position |= PINNED               move   cell.lost, cell.to = what is lost by then
//!  if it was moved: read the cell for it            position: CAS from -> to, only if not pinned
//!  read the slots                                   it did: the other cell is free
//!  release  position = next, not pinned
//! ```
//!
//! | store | load | |
//! |---|---|---|
//! | `release` | `look`, `try_move` | what was read is read before the slot is overwritten |
//! | `try_move` | `pin` | the move, and before it its cell, is seen before the slots are read |
//! | `cell.to` | `lost_at` | the number of lost events belongs to the position |
//!
//! Two cells, because a move that fails against a pin must not touch the cell of the last one that
//! succeeded. The reader finds the one for its position without waiting.

use crate::sync::{AtomicU64, Counter, Ordering};
use crossbeam_utils::CachePadded;

/// Beside a position: its reader is reading, and must not be moved.
const PINNED: u64 = 1 << 63;

/// A position that no reader comes to.
const NOWHERE: u64 = u64::MAX;

/// What was lost in all, by a reader that was moved to a position.
#[derive(Debug)]
struct Cell {
    to: AtomicU64,
    lost: AtomicU64,
}

/// Where a reader is in the ring.
#[derive(Debug)]
pub(crate) struct Cursor {
    position: CachePadded<AtomicU64>,
    cells: [Cell; 2],
    /// The cell of the last move that succeeded, and what was lost by then. Written by the one
    /// publisher that sweeps.
    committed: Counter,
    lost: Counter,
}

/// A position as another thread sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) position: u64,
    pub(crate) is_pinned: bool,
}

impl Cursor {
    pub(crate) fn new(position: u64) -> Self {
        let cell = || Cell { to: AtomicU64::new(NOWHERE), lost: AtomicU64::new(0) };
        Self {
            position: CachePadded::new(AtomicU64::new(position)),
            cells: [cell(), cell()],
            committed: Counter::default(),
            lost: Counter::default(),
        }
    }

    /// Keeps the publisher from moving the reader, and returns the position. `alone` says that
    /// nothing can happen at the same time.
    #[inline]
    pub(crate) fn pin(&self, alone: bool) -> u64 {
        match alone {
            true => self.position.load(Ordering::Relaxed),
            // ORDERING: pairs with `try_move`.
            false => self.position.fetch_or(PINNED, Ordering::Acquire) & !PINNED,
        }
    }

    /// Gives up everything before `position`, and the pin.
    #[inline]
    pub(crate) fn release(&self, position: u64) {
        // ORDERING: pairs with `look` and `try_move`.
        self.position.store(position, Ordering::Release);
    }

    /// Returns where the reader is.
    #[inline]
    pub(crate) fn look(&self) -> Seen {
        // ORDERING: pairs with `release`.
        let seen = self.position.load(Ordering::Acquire);
        Seen { position: seen & !PINNED, is_pinned: seen & PINNED != 0 }
    }

    /// Moves the reader, which loses `lost` events by it, if it is still at `from` and not reading.
    pub(crate) fn try_move(&self, from: u64, to: u64, lost: u64) -> bool {
        let free = 1 - self.committed.value();
        let lost = self.lost.value() + lost;
        let cell = &self.cells[free as usize];
        cell.lost.store(lost, Ordering::Relaxed);
        // ORDERING: pairs with `lost_at`. Who finds the position that the cell was for before has
        // been moved there by the last move but one, and looks no more.
        cell.to.store(to, Ordering::Release);
        // ORDERING: pairs with `pin` by its release and with `release` by its acquire half.
        let moved = self.position.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
        if moved.is_ok() {
            self.committed.publish(free);
            self.lost.publish(lost);
        }
        moved.is_ok()
    }

    /// Returns how many events were lost in all by a reader that was moved to `position`. The
    /// caller has pinned it there.
    #[cold]
    pub(crate) fn lost_at(&self, position: u64) -> u64 {
        // ORDERING: pairs with `try_move`.
        let cell = self.cells.iter().find(|cell| cell.to.load(Ordering::Acquire) == position);
        match cell {
            Some(cell) => cell.lost.load(Ordering::Relaxed),
            None => unreachable!("a reader was moved to {position} without a word about it"),
        }
    }
}
