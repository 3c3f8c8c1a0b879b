//! Where readers sleep: those of one bus, or of several that are read together.
//!
//! ```text
//!  asleep   bit per line, the last one for all lines from 63 on
//!  lines    [first ──▶ place ──▶ place]   a line per subscription, by slot
//!           [foreign]                     or a waker that wakes for it
//! ```
//!
//! One lock guards all lines. A publisher that finds a bit of those that want its event takes the
//! lock once for each lot, moves one waker out of each line, and wakes them when it has let go of
//! the lock: wakers may do anything. Nothing is cloned, counted or allocated for that.
//!
//! The bits are written under the lock alone: a line with somebody in it has its bit, so that one
//! look without the lock is enough where nobody sleeps. Who was woken stands in line no more, and
//! enters anew before it sleeps on.
//!
//! tokio's broadcast channel keeps its waiters so, in one list under one lock.

use super::{Sleepers, wake_together};
use crate::sync::{AtomicU64, Exclusion, Ordering, ThreadMutex};
use crate::topic::{OTHER_SLOTS, interest_bit};
use crossbeam_utils::CachePadded;
use smallvec::SmallVec;
use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};

/// In which lines somebody is asleep, or was not long ago, a bit each: what a publisher compares with
/// those that want its event.
#[derive(Debug)]
pub(crate) struct Asleep(AtomicU64);

impl Default for Asleep {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Asleep {
    /// Step W2 after its fence: returns whether somebody sleeps in a line of the mask.
    #[inline(always)]
    pub(crate) fn any_of(&self, mask: u64) -> bool {
        self.bits() & mask != 0
    }

    fn bits(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Changes the bits; the caller holds the lock of the lines.
    pub(super) fn set(&self, bits: u64) {
        // Publishers read it all the time: it is theirs alone until it changes.
        if bits != self.bits() {
            self.0.store(bits, Ordering::Relaxed);
        }
    }
}

/// Whether a line whose readers a foreign waker wakes is called for every event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calls {
    /// As long as it is armed.
    Every,
    /// Once, unless several are armed: until it is armed again, or a look has found nothing.
    Once,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Dormitory {
    asleep: CachePadded<Asleep>,
    lines: ThreadMutex<Lines>,
    calls: Calls,
}

#[derive(Debug)]
struct Lines {
    lines: Vec<Line>,
    places: Vec<Place>,
    /// The first place that nobody has; the others follow it.
    free: u32,
}

/// So many are woken after each time under the lock.
const LOT: usize = 16;

/// No place.
const NONE: u32 = u32::MAX;
/// The last place of a line that nobody has.
const NOBODYS: u32 = NONE - 1;
/// What stands before a place whose sleeper was woken.
const WOKEN: u32 = NONE - 1;

#[derive(Debug)]
struct Line {
    first: u32,
    /// Of an empty line it means nothing.
    last: u32,
    foreign: Option<Arc<Foreign>>,
}

const NO_LINE: Line = Line { first: NONE, last: NOBODYS, foreign: None };

// A publisher that wakes many reads so many lines of the cache.
const _: () = assert!(size_of::<Line>() == 16 && size_of::<Place>() == 24, "bytes");

#[derive(Debug)]
struct Place {
    /// `None` until the sleeper is about to sleep, and once it was woken.
    waker: Option<Waker>,
    /// Of the first in line it means nothing.
    before: u32,
    after: u32,
}

/// What wakes the readers of a foreign event loop, and how many want that.
struct Foreign {
    waker: Waker,
    armed: Sleepers,
}

impl fmt::Debug for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Foreign").field("armed", &self.armed).finish_non_exhaustive()
    }
}

impl Wake for Foreign {
    fn wake(self: Arc<Self>) {
        self.waker.wake_by_ref();
    }
}

impl Foreign {
    #[cold]
    fn call(self: &Arc<Self>, calls: Calls, waker: &mut Option<Waker>) -> bool {
        if self.armed.any() {
            *waker = Some(Waker::from(self.clone()));
        }
        self.has_left(calls)
    }

    /// Returns whether somebody is left after it was called.
    fn has_left(&self, calls: Calls) -> bool {
        self.armed.count() > usize::from(calls == Calls::Once)
    }
}

impl Lines {
    /// Puts a sleeper at the end of a line and returns its place.
    fn enter(&mut self, line: u32, waker: Option<Waker>) -> u32 {
        let queue = &mut self.lines[line as usize];
        let place = Place { waker, before: queue.last, after: NONE };
        let index = match self.places.get_mut(self.free as usize) {
            Some(free) => {
                let index = self.free;
                self.free = free.after;
                *free = place;
                index
            }
            None => {
                self.places.push(place);
                self.places.len() as u32 - 1
            }
        };
        match queue.first {
            NONE => queue.first = index,
            _ => self.places[queue.last as usize].after = index,
        }
        queue.last = index;
        index
    }

    /// Takes a place out of its line.
    fn unlink(&mut self, line: u32, index: u32) {
        let Place { before, after, .. } = self.places[index as usize];
        let line = &mut self.lines[line as usize];
        match line.first == index {
            true => line.first = after,
            false => self.places[before as usize].after = after,
        }
        match after {
            NONE => line.last = before,
            after => self.places[after as usize].before = before,
        }
    }

    /// Gives a place back that stands in no line.
    fn give_back(&mut self, index: u32) {
        self.places[index as usize].after = self.free;
        self.free = index;
    }

    /// Lets the first in line go, or calls the foreign waker: puts in place of `waker`, which is
    /// `None`, whom the caller has to wake, if it sleeps already. Returns whether somebody is left.
    #[inline(always)]
    fn call(&mut self, line: u32, calls: Calls, waker: &mut Option<Waker>) -> bool {
        let Some(line) = self.lines.get_mut(line as usize) else { return false };
        if let Some(foreign) = &line.foreign {
            return foreign.call(calls, waker);
        }
        let Some(place) = self.places.get_mut(line.first as usize) else { return false };
        std::mem::swap(&mut place.waker, waker);
        place.before = WOKEN;
        line.first = place.after;
        line.first != NONE
    }

    /// Returns whether somebody is left in a line after it was called.
    #[inline]
    fn has_left(&self, line: u32, calls: Calls) -> bool {
        let Some(line) = self.lines.get(line as usize) else { return false };
        match &line.foreign {
            Some(foreign) => foreign.has_left(calls),
            None => line.first != NONE,
        }
    }
}

impl Dormitory {
    pub(crate) fn new(calls: Calls) -> Self {
        let lines = Lines { lines: Vec::new(), places: Vec::new(), free: NONE };
        Self { asleep: CachePadded::default(), lines: ThreadMutex::new(lines), calls }
    }

    /// Returns who is asleep.
    #[inline(always)]
    pub(crate) fn asleep(&self) -> &Asleep {
        &self.asleep
    }

    /// Returns the bell of the first line that nobody has.
    pub(crate) fn bell(self: &Arc<Self>) -> Bell {
        let mut lines = self.lines.lock();
        let line = match lines.lines.iter().position(|line| line.last == NOBODYS) {
            Some(free) => free,
            None => {
                lines.lines.push(NO_LINE);
                // One reader of each can sleep without memory being asked for.
                let (readers, places) = (lines.lines.len(), lines.places.len());
                lines.places.reserve(readers.saturating_sub(places));
                readers - 1
            }
        };
        lines.lines[line].last = NONE;
        Bell { dormitory: self.clone(), line: line as u32, foreign: OnceLock::new() }
    }

    /// Wakes one of each line of the mask, but for those without a bit of their own. Called without
    /// any lock.
    #[inline]
    pub(crate) fn wake(&self, mask: u64) {
        let called = self.asleep.bits() & mask & !OTHER_SLOTS;
        match called & called.wrapping_sub(1) {
            0 => self.wake_each(called),
            _ => wake_together(|| self.wake_each(called)),
        }
    }

    /// Wakes one of each line with a bit in `called`, a lot of them after each time under the lock.
    #[inline(always)]
    fn wake_each(&self, mut called: u64) {
        let mut lot = [const { None::<Waker> }; LOT];
        while called != 0 {
            let (mut count, mut forgotten) = (0, 0);
            let mut lines = self.lines.lock();
            for waker in &mut lot {
                if called == 0 {
                    break;
                }
                let line = called.trailing_zeros();
                let bit = called & called.wrapping_neg();
                called ^= bit;
                if !lines.call(line, self.calls, waker) {
                    forgotten |= bit;
                }
                count += 1;
            }
            self.asleep.set(self.asleep.bits() & !forgotten);
            drop(lines);
            lot[..count].iter_mut().filter_map(Option::take).for_each(Waker::wake);
        }
        // Nobody is left in it: it need not be searched for who is to be dropped.
        std::mem::forget(lot);
    }

    /// Wakes one of each of these lines, which have no bit of their own. Called without any lock.
    pub(crate) fn wake_others(&self, others: &[u32]) {
        let mut wakers = SmallVec::<[Waker; LOT]>::new();
        let mut lines = self.lines.lock();
        for &line in others {
            let mut waker = None;
            lines.call(line, self.calls, &mut waker);
            wakers.extend(waker);
        }
        let mut all = OTHER_SLOTS.trailing_zeros()..lines.lines.len() as u32;
        if !all.any(|line| lines.has_left(line, self.calls)) {
            self.asleep.set(self.asleep.bits() & !OTHER_SLOTS);
        }
        drop(lines);
        wake_together(|| wakers.into_iter().for_each(Waker::wake));
    }

    fn note(&self, line: u32) {
        self.asleep.set(self.asleep.bits() | interest_bit(line));
    }

    /// Forgets a line of its own bit if nobody is left in it.
    fn forget_empty(&self, lines: &Lines, line: u32) {
        let bit = interest_bit(line);
        if bit != OTHER_SLOTS && !lines.has_left(line, self.calls) {
            self.asleep.set(self.asleep.bits() & !bit);
        }
    }
}

/// What wakes the readers of one subscription, or of several that are read together: its line.
pub(crate) struct Bell {
    dormitory: Arc<Dormitory>,
    line: u32,
    foreign: OnceLock<Arc<Foreign>>,
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bell").field("line", &self.line).finish_non_exhaustive()
    }
}

impl Default for Bell {
    /// Returns a bell that has a dormitory for itself.
    fn default() -> Self {
        Arc::new(Dormitory::new(Calls::Every)).bell()
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        // Nobody stands in line who is not forgotten for good: sleepers keep their bells. What a
        // foreign waker does when it is dropped, it does without the lock.
        let _line = {
            let mut lines = self.dormitory.lines.lock();
            std::mem::replace(&mut lines.lines[self.line as usize], NO_LINE)
        };
    }
}

impl Bell {
    /// Returns its line, of which there is no other one while it lives: the subscription's slot.
    pub(crate) fn line(&self) -> u32 {
        self.line
    }

    /// Sends all wake-ups to `waker` from now on, for readers that live in a foreign event loop.
    /// Returns false if there was one already.
    pub(crate) fn set_waker(&self, waker: Waker) -> bool {
        let foreign = Arc::new(Foreign { waker, armed: Sleepers::default() });
        let mut lines = self.dormitory.lines.lock();
        let is_first = self.foreign.set(foreign.clone()).is_ok();
        if is_first {
            lines.lines[self.line as usize].foreign = Some(foreign);
        }
        drop(lines);
        is_first
    }

    /// Step S1 without its fence, for who is woken by a foreign waker; who has a place has taken
    /// it then.
    pub(crate) fn arm<R: Exclusion>(&self) {
        let Some(foreign) = self.foreign.get() else { return };
        foreign.armed.count_in::<R>();
        // Where publishers cannot come in between, a bit that is set stays.
        if !R::SERIALIZES_SLEEP || !self.is_noted() {
            self.note();
        }
    }

    /// Takes one `arm` back.
    pub(crate) fn disarm<R: Exclusion>(&self) {
        if let Some(foreign) = self.foreign.get() {
            foreign.armed.disarm::<R>();
        }
    }

    fn is_noted(&self) -> bool {
        self.dormitory.asleep.any_of(interest_bit(self.line))
    }

    /// Notes that somebody sleeps.
    pub(crate) fn note(&self) {
        let _lines = self.dormitory.lines.lock();
        self.dormitory.note(self.line);
    }

    /// Returns whether publishers, who have called the foreign waker, count on being told that its
    /// readers sleep on.
    #[inline]
    pub(crate) fn is_forgotten(&self) -> bool {
        self.foreign.get().is_some_and(|foreign| foreign.armed.any()) && !self.is_noted()
    }

    /// Step W2 after its fence, for this line alone.
    pub(crate) fn any_asleep(&self) -> bool {
        self.is_noted() || self.is_forgotten()
    }

    /// Wakes the reader that sleeps longest. Called without any lock.
    pub(crate) fn wake_one(&self) {
        let waker = {
            let mut lines = self.dormitory.lines.lock();
            let mut waker = None;
            lines.call(self.line, self.dormitory.calls, &mut waker);
            self.dormitory.forget_empty(&lines, self.line);
            waker
        };
        waker.into_iter().for_each(Waker::wake);
    }

    /// Wakes every reader: the end is near. Called without any lock.
    pub(crate) fn wake_all(&self) {
        let mut wakers = Vec::new();
        {
            let mut lines = self.dormitory.lines.lock();
            match &lines.lines[self.line as usize] {
                Line { foreign: Some(foreign), .. } => wakers.push(Waker::from(foreign.clone())),
                _ => {
                    while lines.has_left(self.line, self.dormitory.calls) {
                        let mut waker = None;
                        lines.call(self.line, self.dormitory.calls, &mut waker);
                        wakers.extend(waker);
                    }
                    self.dormitory.forget_empty(&lines, self.line);
                }
            }
        }
        wake_together(|| wakers.into_iter().for_each(Waker::wake));
    }

    /// Returns a sleeper that has still to enter the line.
    pub(crate) fn sleeper(&self) -> Sleeper<&Self> {
        Sleeper { bell: self, standing: Standing::Outside }
    }

    /// As `sleeper`, for who outlives the borrow.
    pub(crate) fn owned_sleeper(self: &Arc<Self>) -> Sleeper {
        Sleeper { bell: self.clone(), standing: Standing::Outside }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Outside,
    /// At this place, perhaps woken already.
    InLine(u32),
    Woken,
}

/// A future that is done once it is worth looking again. One that was woken and is dropped before
/// it has noticed wakes the next in line.
#[derive(Debug)]
pub(crate) struct Sleeper<B: Deref<Target = Bell> = Arc<Bell>> {
    bell: B,
    standing: Standing,
}

// It holds the number of its place; the place stays where it is.
impl<B: Deref<Target = Bell>> Unpin for Sleeper<B> {}

impl<B: Deref<Target = Bell>> Sleeper<B> {
    /// Step S1 without its fence: enters the line, anew if it was woken.
    pub(crate) fn enter(&mut self) {
        if !matches!(self.standing, Standing::InLine(_)) {
            self.enter_with(None);
        }
    }

    /// As `enter`, and when it is woken, the task of the context is.
    pub(crate) fn enter_for(&mut self, context: &Context<'_>) {
        if !matches!(self.standing, Standing::InLine(_)) {
            self.enter_with(Some(context.waker().clone()));
        }
    }

    fn enter_with(&mut self, waker: Option<Waker>) {
        let Bell { dormitory, line, .. } = &*self.bell;
        let mut lines = dormitory.lines.lock();
        self.standing = Standing::InLine(lines.enter(*line, waker));
        dormitory.note(*line);
    }
}

impl<B: Deref<Target = Bell>> Future for Sleeper<B> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let index = match self.standing {
            Standing::InLine(index) => index,
            Standing::Woken => return Poll::Ready(()),
            Standing::Outside => {
                self.enter_for(context);
                return Poll::Pending;
            }
        };
        let waker = context.waker();
        let mut fresh = None;
        loop {
            // Cloning and dropping wakers may do anything: it is done without the lock.
            let mut lines = self.bell.dormitory.lines.lock();
            let place = &mut lines.places[index as usize];
            if place.before == WOKEN {
                lines.give_back(index);
                drop(lines);
                self.standing = Standing::Woken;
                return Poll::Ready(());
            }
            if place.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
                return Poll::Pending;
            }
            if fresh.is_some() {
                std::mem::swap(&mut place.waker, &mut fresh);
                return Poll::Pending;
            }
            drop(lines);
            fresh = Some(waker.clone());
        }
    }
}

impl<B: Deref<Target = Bell>> Drop for Sleeper<B> {
    fn drop(&mut self) {
        let Standing::InLine(index) = self.standing else { return };
        let Bell { dormitory, line, .. } = &*self.bell;
        let (_own, next) = {
            let mut lines = dormitory.lines.lock();
            let place = &mut lines.places[index as usize];
            let (own, was_woken) = (place.waker.take(), place.before == WOKEN);
            let mut next = None;
            match was_woken {
                true => _ = lines.call(*line, dormitory.calls, &mut next),
                false => lines.unlink(*line, index),
            }
            lines.give_back(index);
            dormitory.forget_empty(&lines, *line);
            (own, next)
        };
        next.into_iter().for_each(Waker::wake);
    }
}
