//! The right to publish: who may write the next slot, and up to where without asking.
//!
//! Somebody has the right at any time, or nobody: `holder` is `FREE`, `HELD` by a thread that is in
//! the middle of a publication, or lent to a *seat*. A seat is a thread that published alone, or a
//! `Producer`: it publishes without a locked instruction as long as its *permit* lasts.
//!
//! ```text
//!  seat                                     who pauses it, under the bus's token
//!  claim = next + 1                         permit = 0
//!       fence (often)                            fence (rarely)
//!  next < permit ? write, tail = next + 1   wait until claim == tail
//!                : claim = next, ask
//! ```
//!
//! | store | load that may miss it | why not both |
//! |---|---|---|
//! | `permit = 0` | the seat's look at its permit | one of the fences comes first: the seat sees 0, or it is seen to publish and waited for |
//! | `claim` | the look at it while pausing | as above |
//! | `tail`, `claim = next` | that look | release and acquire: what the seat wrote is seen by who has paused it |
//!
//! A thread's seat is taken away for good by the first other thread that publishes: a thread that
//! was descheduled between its look at `holder` and its claim may wake up late, and must find a
//! permit of 0 and a claim that nobody looks at. Whoever later publishes alone again, longer each
//! time, gets one of the seats that are left; when all are used the right is a lock.
//!
//! The permit is at once the ring's limit, the switch that close() throws, the next publication to be
//! measured, and the request to give the right back: one comparison asks for all of them.
//! The idea of lending a lock to one thread is that of biased locking (Kawachiya et al. 2002).

use super::strict::{Passed, Strict, Turn};
use crate::barrier::Fences;
#[cfg(not(tickbus_loom))]
use crate::sync::thread_local;
use crate::sync::{AtomicU64, Counter, Ordering, wait_a_moment};
use crossbeam_utils::CachePadded;
use std::cell::Cell;

const FREE: u64 = 0;
const HELD: u64 = 1;

/// A holder that is a seat is its thread's id in the high bits, the seat in the low ones.
const SEAT_BITS: u32 = 3;
/// Threads that publish alone, one after the other.
const THREAD_SEATS: usize = 4;
/// The seat of a `Producer`, of which there is one at a time.
const PRODUCER_SEAT: usize = THREAD_SEATS;
const PRODUCER: u64 = u64::MAX << SEAT_BITS | PRODUCER_SEAT as u64;
/// What stands for all publishers together where they hold no lock, for good.
const EVERYBODY_SEAT: usize = PRODUCER_SEAT + 1;
const EVERYBODY: u64 = u64::MAX << SEAT_BITS | EVERYBODY_SEAT as u64;

/// Publications in a row after which a thread has the next seat.
const ALONE_AFTER: [u64; THREAD_SEATS] = [0, 256, 4_096, 65_536];

/// No publication to be measured was drawn yet. A permit is 0 for other reasons.
const UNDRAWN: u64 = 1;

#[derive(Debug)]
struct Seat {
    /// One more than the sequence being written, or the next sequence while nothing is.
    claim: Counter,
    /// The sequence at which it has to ask.
    permit: Counter,
    /// The sequence of the next publication whose latency is measured, which a permit ends at too.
    sample_at: Counter,
}

impl Default for Seat {
    fn default() -> Self {
        let sample_at = Counter::default();
        sample_at.set(UNDRAWN);
        Self { claim: Counter::default(), permit: Counter::default(), sample_at }
    }
}

/// What the holder of the right alone touches.
#[derive(Debug, Default)]
struct Streak {
    thread: Counter,
    length: Counter,
    seats_used: Counter,
}

/// See the module.
#[derive(Debug)]
pub struct Right {
    /// One more than the last sequence that can be read.
    tail: CachePadded<Counter>,
    lock: CachePadded<Lock>,
    seats: [CachePadded<Seat>; THREAD_SEATS + 1],
    fences: Fences,
    /// Where publishers hold no lock.
    strict: Option<Box<Strict>>,
}

/// What publishers without a seat pass from one to the other, in one line.
#[derive(Debug)]
struct Lock {
    holder: AtomicU64,
    /// The sequence at which a publisher without a seat has to ask.
    limit: Counter,
    streak: Streak,
}

/// No thread has it, so that one whose number was not asked for yet has no seat.
const UNNUMBERED: u64 = 1 << 63;

#[cfg(not(tickbus_loom))]
thread_local! {
    static THREAD: Cell<u64> = const { Cell::new(UNNUMBERED) };
}
#[cfg(tickbus_loom)]
loom::thread_local! {
    static THREAD: Cell<u64> = Cell::new(UNNUMBERED);
}

/// Returns the high bits of a holder that is the calling thread, if it has a number.
#[inline(always)]
fn this_thread_if_numbered() -> u64 {
    THREAD.with(Cell::get)
}

/// As above, and the thread has a number from now on.
fn this_thread() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let known = this_thread_if_numbered();
    if known != UNNUMBERED {
        return known;
    }
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed) << SEAT_BITS;
    THREAD.with(|own| own.set(number));
    number
}

/// Returns the thread whose seat a holder is.
fn thread_of(holder: u64) -> u64 {
    holder & !((1 << SEAT_BITS) - 1)
}

/// Why a publisher may not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its permit ended for the sake of a measurement, and goes on now; whether this publication is
    /// the one to be measured.
    Sample(bool),
    /// It has come to the limit of the last sweep; whether this publication is to be measured, as far
    /// as that was drawn before. It has no seat if that is not known.
    Limit(Option<bool>),
    /// Somebody else has the right, or there is something to be decided.
    Other,
}

/// Sequences that may be written now. Dropped without [`Claim::publish`], nobody reads them and they
/// are claimed again.
#[derive(Debug)]
#[must_use]
pub struct Claim<'a> {
    tail: &'a Counter,
    seat: &'a Seat,
    /// The first sequence of the claim.
    pub sequence: u64,
    /// One more than the last.
    pub end: u64,
}

impl Claim<'_> {
    /// Makes the claimed sequences readable.
    #[inline]
    pub fn publish(self) {
        // ORDERING: pairs with `Right::tail` and with the wait of `Right::pause`.
        self.tail.publish(self.end);
        std::mem::forget(self);
    }
}

impl Drop for Claim<'_> {
    #[inline]
    fn drop(&mut self) {
        self.seat.claim.publish(self.sequence);
    }
}

/// The right, held by the caller; dropping it gives it back.
#[derive(Debug)]
#[must_use]
pub struct Held<'a> {
    right: &'a Right,
    /// A paused seat keeps the right; otherwise it was free.
    seat: Option<usize>,
    /// The seat is the caller's, who does not publish from it meanwhile.
    is_own: bool,
    /// The caller publishes, and earns a seat by that.
    publishes: bool,
}

impl Right {
    /// Returns the right to publish from sequence 0 on. Nobody has a permit yet.
    pub fn new(fences: Fences) -> Self {
        Self {
            tail: CachePadded::default(),
            lock: CachePadded::new(Lock {
                holder: AtomicU64::new(FREE),
                limit: Counter::default(),
                streak: Streak::default(),
            }),
            seats: Default::default(),
            fences,
            strict: None,
        }
    }

    /// As [`Right::new`], for publishers that hold no lock; `capacity` is that of the ring.
    pub(crate) fn strict(capacity: usize, fences: Fences) -> Self {
        let mut right = Self::new(fences);
        right.lock.holder = AtomicU64::new(EVERYBODY);
        right.strict = Some(Box::new(Strict::new(capacity, fences)));
        right
    }

    /// Returns whether publishers hold no lock: then they take turns.
    #[inline]
    pub(crate) fn is_strict(&self) -> bool {
        self.strict.is_some()
    }

    /// Claims up to `count` sequences for a publisher that holds no lock.
    #[inline]
    pub(crate) fn take_turn(&self, count: u64) -> Result<Turn, Stop> {
        // ORDERING: pairs with `raise`: who sweeps has seen readers done with what the slots had, which
        // the publisher that raises the limit hands on to all others by it.
        self.take_turn_below(|| self.lock.limit.observe(), count)
    }

    #[inline]
    fn take_turn_below(&self, limit: impl Fn() -> u64, count: u64) -> Result<Turn, Stop> {
        let Some(strict) = &self.strict else { return Err(Stop::Other) };
        strict.claim(limit, count).map_err(|at_limit| match at_limit {
            true => Stop::Limit(None),
            false => Stop::Other,
        })
    }

    /// As [`Right::take_turn`] of one, with a look at the limit that acquires nothing: a twin that must
    /// fail.
    #[cfg(all(test, tickbus_loom))]
    pub(crate) fn take_turn_without_a_word(&self) -> Result<Turn, Stop> {
        self.take_turn_below(|| self.lock.limit.value(), 1)
    }

    /// Makes the sequences of a turn readable as soon as all before them are, and notes the topics
    /// of those of others that it makes readable.
    #[inline]
    pub(crate) fn publish_turn(
        &self,
        turn: &Turn,
        topic: impl Fn(u64) -> u32,
        passed: &mut Passed,
    ) {
        if let Some(strict) = &self.strict {
            strict.publish(turn, &self.tail, topic, passed);
        }
    }

    /// As [`Held::grant`], for publishers that hold no lock and go on meanwhile: a later limit.
    pub(crate) fn raise(&self, limit: u64) {
        // ORDERING: pairs with `take_turn`.
        self.lock.limit.publish(limit);
    }

    /// Returns the sequence before which publishers that hold no lock have claimed everything.
    pub(crate) fn claimed(&self) -> u64 {
        self.strict.as_ref().map_or_else(|| self.tail(), |strict| strict.claimed())
    }

    /// Returns whether one of them could claim a sequence below the limit just now.
    pub(crate) fn has_room(&self) -> bool {
        self.claimed() < self.lock.limit.value()
    }

    /// Returns whether there are publications that need no question.
    pub(crate) fn is_granted(&self) -> bool {
        self.lock.limit.value() > 0
    }

    /// Returns one more than the last sequence that can be read.
    #[inline]
    pub fn tail(&self) -> u64 {
        self.tail.observe()
    }

    /// Claims the next sequence if the calling thread has a seat and its permit lasts.
    #[inline(always)]
    pub fn claim(&self) -> Option<Claim<'_>> {
        let seat = self.own_seat()?;
        // Who has the seat has published last. The tail is always in the same place, which a
        // processor makes use of.
        let sequence = self.tail.value();
        seat.claim.set(sequence + 1);
        self.fences.of_seat().often();
        let claim = Claim { tail: &self.tail, seat, sequence, end: sequence + 1 };
        (sequence < seat.permit.observe()).then_some(claim)
    }

    /// As [`Right::claim`], up to `count` sequences.
    #[inline]
    pub fn claim_many(&self, count: u64) -> Option<Claim<'_>> {
        self.claim_many_at(self.own_seat()?, count)
    }

    #[inline(always)]
    fn own_seat(&self) -> Option<&Seat> {
        // The bits of the thread cancel out.
        let index = self.lock.holder.load(Ordering::Relaxed) ^ this_thread_if_numbered();
        if index >= THREAD_SEATS as u64 {
            return None;
        }
        Some(&self.seats[index as usize])
    }

    /// Returns the next sequence if the permit of the `Producer` lasts for it.
    #[inline]
    pub fn permitted_to_producer(&self) -> Option<u64> {
        let seat = &self.seats[PRODUCER_SEAT];
        let next = seat.claim.value();
        (next < seat.permit.observe()).then_some(next)
    }

    /// Returns what stops the calling thread, and moves its permit on to the next publication to be
    /// measured if that is all: `draw` returns the next one at or after a sequence.
    pub fn ask(&self, draw: impl Fn(u64) -> u64) -> Stop {
        match self.own_seat() {
            Some(seat) => self.ask_at(seat, draw),
            None => match self.lock.holder.load(Ordering::Relaxed) {
                FREE | HELD if (1..=self.tail()).contains(&self.lock.limit.value()) => {
                    Stop::Limit(None)
                }
                _ => Stop::Other,
            },
        }
    }

    /// As [`Right::ask`], of the `Producer`.
    pub fn ask_as_producer(&self, draw: impl Fn(u64) -> u64) -> Stop {
        self.ask_at(&self.seats[PRODUCER_SEAT], draw)
    }

    fn ask_at(&self, seat: &Seat, draw: impl Fn(u64) -> u64) -> Stop {
        let next = seat.claim.value();
        let permit = seat.permit.observe();
        let limit = self.lock.limit.value();
        if permit == 0 || next < permit {
            return Stop::Other;
        }
        if limit <= next {
            let is_due = (UNDRAWN + 1..=next).contains(&seat.sample_at.value());
            return Stop::Limit(Some(is_due));
        }
        let sample_at = match seat.sample_at.value() {
            UNDRAWN => draw(next),
            drawn => drawn,
        };
        let is_due = sample_at <= next;
        let sample_at = if is_due { draw(next + 1) } else { sample_at };
        seat.sample_at.set(sample_at);
        // Whoever has paused the seat since has made it 0, and limits only rise.
        match seat.permit.exchange(permit, limit.min(sample_at)) {
            true => Stop::Sample(is_due),
            false => Stop::Other,
        }
    }

    /// Returns how its handshakes are ordered.
    pub fn fences(&self) -> Fences {
        self.fences
    }

    /// As [`Right::claim`], where nothing happens at the same time.
    #[inline(always)]
    pub fn claim_alone(&self) -> Option<Claim<'_>> {
        self.claim_many_alone(1)
    }

    /// As [`Right::claim_many`], where nothing happens at the same time.
    #[inline]
    pub fn claim_many_alone(&self, count: u64) -> Option<Claim<'_>> {
        if self.lock.holder.load(Ordering::Relaxed) == PRODUCER {
            return None;
        }
        let sequence = self.tail.value();
        let limit = self.lock.limit.value();
        let end = limit.min(sequence + count);
        let claim = Claim { tail: &self.tail, seat: &self.seats[0], sequence, end };
        (sequence < limit).then_some(claim)
    }

    /// As [`Right::claim`], for the `Producer`; the fences are those of the ring.
    #[inline(always)]
    pub fn claim_as_producer(&self, fences: Fences) -> Option<Claim<'_>> {
        let seat = &self.seats[PRODUCER_SEAT];
        let sequence = seat.claim.value();
        seat.claim.set(sequence + 1);
        fences.often();
        let claim = Claim { tail: &self.tail, seat, sequence, end: sequence + 1 };
        (sequence < seat.permit.observe()).then_some(claim)
    }

    /// As [`Right::claim_many`], for the `Producer`.
    #[inline]
    pub fn claim_many_as_producer(&self, count: u64) -> Option<Claim<'_>> {
        self.claim_many_at(&self.seats[PRODUCER_SEAT], count)
    }

    #[inline]
    fn claim_many_at<'a>(&'a self, seat: &'a Seat, count: u64) -> Option<Claim<'a>> {
        let sequence = seat.claim.value();
        seat.claim.set(sequence + count);
        self.fences.often();
        // Nothing is measured. As long as there is a permit the limit stays as it is.
        let limit = if seat.permit.observe() == 0 { 0 } else { self.lock.limit.value() };
        let end = limit.min(sequence + count);
        if sequence < end && end < sequence + count {
            seat.claim.set(end);
        }
        let claim = Claim { tail: &self.tail, seat, sequence, end };
        (sequence < limit).then_some(claim)
    }

    /// Takes the right from among threads that publish at the same time, if a seat does not have
    /// it and the next sequence is below the limit, and returns the limit too.
    #[inline]
    pub fn take(&self) -> Option<(Held<'_>, u64)> {
        let Lock { holder, .. } = &*self.lock;
        let mut rounds = 0;
        loop {
            match holder.compare_exchange_weak(FREE, HELD, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break,
                Err(FREE | HELD) => {}
                Err(_) => return None,
            }
            // Looking without asking for it leaves the line to who publishes, several events in a
            // row: cheaper for all than to take turns.
            let pauses = rounds.clamp(1, 16);
            (0..pauses).for_each(|_| wait_a_moment(&mut rounds));
            while holder.load(Ordering::Relaxed) == HELD {
                wait_a_moment(&mut rounds);
            }
        }
        let held = Held::free(self);
        let limit = self.lock.limit.value();
        (held.next() < limit).then_some((held, limit))
    }

    /// Takes the right, from a seat too. The caller holds the bus's token, so that only one thread
    /// at a time is here; `None` if there is a `Producer` and the caller does not publish for it.
    #[must_use]
    pub fn seize(&self, for_producer: bool) -> Option<Held<'_>> {
        let held = self.pause_for(for_producer);
        match held.seat {
            Some(PRODUCER_SEAT) => for_producer.then_some(held),
            Some(_) if !held.is_own => {
                self.lock.holder.store(HELD, Ordering::Relaxed);
                std::mem::forget(held);
                Some(Held::free(self))
            }
            _ => Some(held),
        }
    }

    /// Keeps everybody from publishing, and waits for who is at it. The caller holds the bus's
    /// token.
    pub fn pause(&self) -> Held<'_> {
        let mut held = self.pause_for(false);
        held.publishes = false;
        held
    }

    /// As [`Right::pause`] of publishers that hold no lock, who are told by the limit only: a twin
    /// that must fail.
    #[cfg(all(test, tickbus_loom))]
    pub(crate) fn pause_without_a_word(&self) -> Held<'_> {
        self.lock.limit.publish(0);
        let strict = self.strict.as_ref().expect("they hold no lock");
        Strict::wait_for_claimed(&self.tail, strict.claimed());
        Held { right: self, seat: Some(EVERYBODY_SEAT), is_own: true, publishes: false }
    }

    fn pause_for(&self, producer: bool) -> Held<'_> {
        if let Some(strict) = &self.strict {
            strict.pause(&self.tail);
            let seat = Some(EVERYBODY_SEAT);
            return Held { right: self, seat, is_own: true, publishes: true };
        }
        let mut rounds = 0;
        loop {
            match self.lock.holder.compare_exchange(
                FREE,
                HELD,
                Ordering::Acquire,
                Ordering::Acquire,
            ) {
                Ok(_) => return Held::free(self),
                Err(HELD) => wait_a_moment(&mut rounds),
                Err(holder) => {
                    let index = holder as usize & ((1 << SEAT_BITS) - 1);
                    let seat = &self.seats[index];
                    seat.permit.replace(0);
                    let is_own = match index {
                        PRODUCER_SEAT => producer,
                        _ => thread_of(holder) == this_thread(),
                    };
                    if !is_own {
                        self.fences.rarely();
                    }
                    while seat.claim.observe() != self.tail.observe() {
                        wait_a_moment(&mut rounds);
                    }
                    return Held { right: self, seat: Some(index), is_own, publishes: true };
                }
            }
        }
    }
}

impl<'a> Held<'a> {
    #[inline]
    fn free(right: &'a Right) -> Self {
        Self { right, seat: None, is_own: false, publishes: true }
    }

    /// Returns the next sequence to be written.
    #[inline]
    pub fn next(&self) -> u64 {
        self.right.tail.value()
    }

    /// Makes everything before `next` readable.
    #[inline]
    pub fn publish(&self, next: u64) {
        // ORDERING: pairs with `tail`.
        self.right.tail.publish(next);
    }

    /// Lets publishers go on up to `limit` without asking; 0 makes them ask always. The caller
    /// holds the bus's token.
    pub fn grant(&self, limit: u64) {
        self.right.raise(limit);
    }

    /// Gives the right to a `Producer`, if no other has it. The caller holds the bus's token.
    pub fn lend_to_producer(mut self) {
        self.seat = Some(PRODUCER_SEAT);
        self.is_own = true;
        // ORDERING: pairs with `take` and `pause`.
        self.right.lock.holder.store(PRODUCER, Ordering::Release);
    }

    /// Takes it back from a `Producer`.
    pub fn end_producer(mut self) {
        self.seat = None;
    }

    /// Returns the seat that the calling thread has earned by publishing alone.
    #[inline]
    fn earned_seat(&self, thread: u64) -> Option<usize> {
        let Right { lock, fences, .. } = self.right;
        let streak = &lock.streak;
        let length = match streak.thread.value() == thread {
            true => streak.length.value() + 1,
            false => 0,
        };
        streak.thread.set(thread);
        streak.length.set(length);
        let seat = streak.seats_used.value() as usize;
        // Where both sides pay, a lock is as cheap as a seat. A model takes one all the same.
        let alone = (*fences == Fences::Asymmetric || cfg!(any(tickbus_loom, tickbus_shuttle)))
            && ALONE_AFTER.get(seat).is_some_and(|after| length >= *after);
        if alone {
            streak.seats_used.set(seat as u64 + 1);
        }
        alone.then_some(seat)
    }
}

impl Drop for Held<'_> {
    #[inline]
    fn drop(&mut self) {
        let Right { lock, seats, tail, strict, .. } = self.right;
        let Lock { holder, limit, .. } = &**lock;
        let permit = |index: usize, sits_anew: bool| {
            if sits_anew {
                seats[index].claim.set(tail.value());
            }
            seats[index].permit.publish(limit.value().min(seats[index].sample_at.value()));
        };
        if let Some(index) = self.seat {
            return match strict {
                Some(strict) => strict.resume(tail, !self.right.is_granted()),
                None => permit(index, self.is_own),
            };
        }
        let thread = this_thread();
        let earned = if self.publishes { self.earned_seat(thread) } else { None };
        let next_holder = match earned {
            Some(index) => {
                permit(index, true);
                thread | index as u64
            }
            None => FREE,
        };
        // ORDERING: pairs with `take` and `pause`.
        holder.store(next_holder, Ordering::Release);
    }
}
