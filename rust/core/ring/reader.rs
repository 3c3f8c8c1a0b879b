//! A reader of the ring: its cursor, and what it knows without asking.

use super::Ring;
use super::cursor::Cursor;
use crate::sync::Exclusion;
use std::sync::Arc;

/// The most events that are read under one pin, so that a publisher that must move the reader waits
/// no longer than for these.
pub(crate) const BATCH: usize = 64;

/// Where a reader is, for whoever asks.
pub(crate) struct Place<T, R> {
    ring: Arc<Ring<T, R>>,
    cursor: Arc<Cursor>,
    /// It wants every event.
    pub(crate) is_wide: bool,
}

impl<T, R> Clone for Place<T, R> {
    fn clone(&self) -> Self {
        Self { ring: self.ring.clone(), cursor: self.cursor.clone(), is_wide: self.is_wide }
    }
}

impl<T, R: Exclusion> Place<T, R> {
    /// Returns the sequence before which it has read, stepped over or lost everything.
    pub(crate) fn position(&self) -> u64 {
        self.cursor.look().position
    }

    /// Returns how many events before a sequence, or all, are wanted and wait to be read.
    pub(crate) fn pending(&self, before: Option<u64>, wants: impl FnMut(u32) -> bool) -> u64 {
        let tail = before.unwrap_or_else(|| self.ring.right.tail());
        let position = self.position();
        match self.is_wide {
            true => tail.saturating_sub(position),
            false => self.wanted_in(position, tail, wants),
        }
    }

    fn wanted_in(&self, from: u64, to: u64, mut wants: impl FnMut(u32) -> bool) -> u64 {
        (from..to).filter(|&sequence| wants(self.ring.slots.topic(sequence))).count() as u64
    }
}

/// The reading half of one subscription; whoever has it reads alone.
pub(crate) struct RingReader<T, R> {
    pub(crate) place: Place<T, R>,
    /// Nobody moves it, so it need not pin.
    stays: bool,
    /// Its position, unless it was moved since it last looked.
    next: u64,
    /// The ring's tail when it last looked.
    tail: u64,
    /// Of the events that it lost in all, those that it has found out about.
    known_lost: u64,
    /// Those that its user has still to be told about, before anything else.
    untold: u64,
    /// Whether all of the untold were wanted.
    untold_is_exact: bool,
    /// The most events that were ever found pending.
    pub(crate) peak: u64,
}

/// A hole: so many events that the reader wanted are missing here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Missed {
    pub(crate) missed: u64,
    /// All of them were wanted.
    pub(crate) exact: bool,
}

/// A pinned cursor; dropping it releases the cursor at `next`, also when a clone panics.
struct Pinned<'a> {
    cursor: &'a Cursor,
    next: &'a mut u64,
}

impl Drop for Pinned<'_> {
    #[inline]
    fn drop(&mut self) {
        self.cursor.release(*self.next);
    }
}

impl<T, R: Exclusion> RingReader<T, R> {
    /// Returns a reader at the cursor's position. `stays` says that no sweep will move it; `late`
    /// events before the position are a hole.
    pub(crate) fn new(
        ring: Arc<Ring<T, R>>,
        cursor: Arc<Cursor>,
        is_wide: bool,
        stays: bool,
        late: u64,
    ) -> Self {
        let next = cursor.look().position;
        Self {
            place: Place { ring, cursor, is_wide },
            stays: stays || R::SERIALIZES_SLEEP,
            next,
            tail: next,
            known_lost: 0,
            untold: late,
            untold_is_exact: is_wide || late == 0,
            peak: 0,
        }
    }

    /// Pins the cursor, learns what was lost since, and returns whether a hole is to be told.
    #[inline]
    fn pin(&mut self, wants: &mut impl FnMut(u32) -> bool) -> bool {
        // With nothing at the same time a move is seen without a pin too.
        let position = self.place.cursor.pin(self.stays);
        if position != self.next {
            self.find_move(position);
        }
        if self.tail <= self.next {
            self.look_ahead(wants);
        }
        self.untold > 0
    }

    /// Looks how far publishers have come, and how many events that makes pending: never more than
    /// just before some are read.
    #[inline]
    fn look_ahead(&mut self, wants: &mut impl FnMut(u32) -> bool) {
        self.tail = self.place.ring.right.tail();
        let pending = match self.place.is_wide {
            true => self.tail - self.next,
            false => self.place.wanted_in(self.next, self.tail, wants),
        };
        self.peak = self.peak.max(pending);
    }

    #[cold]
    fn find_move(&mut self, position: u64) {
        let lost = self.place.cursor.lost_at(position);
        self.untold += lost - self.known_lost;
        self.known_lost = lost;
        self.next = position;
    }

    /// Runs `f` on up to `limit` events that are wanted, stepping over the others, and returns how
    /// many. A hole ends it before the first one: `Err` tells it, once, or, with `in_batch`, leaves
    /// it for the next call. With `quiet`, holes are stepped over.
    #[inline]
    pub(crate) fn read(
        &mut self,
        limit: usize,
        quiet: bool,
        in_batch: bool,
        mut wants: impl FnMut(u32) -> bool,
        mut f: impl FnMut(&T),
    ) -> Result<usize, Missed> {
        // Whoever was moved is moved to what was published.
        if self.untold == 0 && self.tail <= self.next && self.place.ring.right.tail() == self.next {
            return Ok(0);
        }
        if self.pin(&mut wants) {
            let hole = Missed { missed: self.untold, exact: self.untold_is_exact };
            if quiet || !in_batch {
                self.untold = 0;
                self.untold_is_exact = true;
            }
            if !quiet {
                self.place.cursor.release(self.next);
                return if in_batch { Ok(0) } else { Err(hole) };
            }
        }
        let pinned = Pinned { cursor: &self.place.cursor, next: &mut self.next };
        let mut read = 0;
        while read < limit {
            let sequence = *pinned.next;
            if sequence == self.tail {
                // Nothing that is wanted was found yet: perhaps there is more by now.
                let tail = self.place.ring.right.tail();
                if read > 0 || tail == sequence {
                    break;
                }
                self.tail = tail;
            }
            if wants(self.place.ring.slots.topic(sequence)) {
                // SAFETY: the tail is beyond the sequence, and the cursor, which is at most there,
                // is pinned or never moved.
                unsafe { self.place.ring.slots.read(sequence, &mut f) };
                read += 1;
            }
            *pinned.next = sequence + 1;
        }
        Ok(read)
    }

    /// As [`Place::pending`].
    pub(crate) fn pending(&mut self, before: Option<u64>, wants: impl FnMut(u32) -> bool) -> u64 {
        let pending = self.place.pending(before, wants);
        self.peak = self.peak.max(pending);
        pending
    }

    /// Returns whether `read` would find a hole or an event, stepping over what is not wanted.
    pub(crate) fn is_ready(&mut self, quiet: bool, mut wants: impl FnMut(u32) -> bool) -> bool {
        if self.pin(&mut wants) && !quiet {
            self.place.cursor.release(self.next);
            return true;
        }
        while self.next < self.tail && !wants(self.place.ring.slots.topic(self.next)) {
            self.next += 1;
            if self.next == self.tail {
                self.tail = self.place.ring.right.tail();
            }
        }
        self.place.cursor.release(self.next);
        self.next < self.tail
    }
}
