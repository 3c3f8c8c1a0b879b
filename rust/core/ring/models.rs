//! Models of the ring's protocols, run by `make loom` on the code itself: the slots are cells that
//! loom watches. Each has a twin that lacks one fence, pin, lock or cell, and must fail.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::Ring;
use super::cursor::Cursor;
use super::reader::{Missed, RingReader};
use super::right::{Held, Right, Stop};
use super::strict::{Passed, Turn};
use super::sweep::{Member, Sweep};
use crate::barrier::Fences;
use crate::sync::ThreadExclusion;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;

type TestRing = Ring<u64, ThreadExclusion>;

/// What the bus's token guards.
#[derive(Default)]
struct State {
    members: Vec<Option<Member>>,
    reach: u64,
}

struct Bus {
    ring: std::sync::Arc<TestRing>,
    state: Mutex<State>,
    /// How far a sweep lets publishers go.
    stride: u64,
}

impl Bus {
    fn new(capacity: usize, fences: Fences) -> Self {
        let ring = std::sync::Arc::new(Ring::new(capacity, fences));
        Self { ring, state: Mutex::default(), stride: 2 }
    }

    /// Whose publishers hold no lock, and come as far as there is room.
    fn strict(capacity: usize, fences: Fences) -> Self {
        let ring = std::sync::Arc::new(Ring::strict(capacity, fences));
        Self { ring, state: Mutex::default(), stride: capacity as u64 }
    }

    /// Joins at the next event.
    fn join(&self, may_lose: bool, stays: bool) -> RingReader<u64, ThreadExclusion> {
        let mut state = self.state.lock().unwrap();
        let tail = self.ring.right.tail();
        let cursor = std::sync::Arc::new(Cursor::new(tail));
        state.members.push(Some(Member::new(cursor.clone(), true, may_lose, tail)));
        RingReader::new(self.ring.clone(), cursor, true, stays, 0)
    }

    /// Publishes, asking where it must; false if a reader that loses nothing is in the way.
    fn publish(&self, event: u64) -> bool {
        if self.ring.right.is_strict() {
            return self.publish_strictly(event);
        }
        // Every other publication is one to be measured.
        let go_on = || matches!(self.ring.right.ask(|next| next + 1), Stop::Sample(_));
        if let Some(claim) = self.ring.claim().or_else(|| go_on().then(|| self.ring.claim())?) {
            assert_eq!(self.ring.publish(claim, 0, event), None);
            return true;
        }
        if self.ring.publish_among_others(0, event).is_ok() {
            return true;
        }
        self.publish_under_the_token(&mut self.state.lock().unwrap(), event)
    }

    /// As `publish`; at the limit it sweeps while others go on.
    fn publish_strictly(&self, event: u64) -> bool {
        let right = &self.ring.right;
        let publish = || {
            let turn = right.take_turn(1).ok()?;
            assert_eq!(self.ring.publish_turn(&turn, 0, event, &mut Passed::new()), None);
            Some(())
        };
        if publish().is_some() {
            return true;
        }
        let mut state = self.state.lock().unwrap();
        if right.is_granted() {
            self.sweep(&mut state, right.tail());
            right.raise(state.reach);
        }
        publish().is_some() || self.publish_under_the_token(&mut state, event)
    }

    fn sweep(&self, state: &mut State, next: u64) {
        let sweep = Sweep {
            slots: &self.ring.slots,
            next,
            stride: self.stride,
            wanted: |_, _| u64::MAX,
            lost: |_, _| (),
        };
        state.reach = sweep.run(&mut state.members);
    }

    fn publish_under_the_token(&self, state: &mut State, event: u64) -> bool {
        let held = self.ring.right.seize(false).unwrap();
        loop {
            self.sweep(state, held.next());
            if state.reach > held.next() {
                break;
            }
            if state.members.iter().flatten().all(|member| !member.may_lose) {
                return false;
            }
            thread::yield_now();
        }
        // SAFETY: the right is held, and the sweep found room.
        assert_eq!(unsafe { self.ring.write(&held, 0, event) }, None);
        held.grant(state.reach);
        true
    }
}

/// Checks every interleaving with up to three preemptions, which is where mistakes show.
fn model(checked: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(checked);
}

/// Asserts that loom finds a data race, a lost wake-up or a failed assertion.
#[track_caller]
fn assert_fails(twin: impl Fn() + Sync + Send + 'static) {
    let found = catch_unwind(AssertUnwindSafe(|| model(twin)));
    assert!(found.is_err(), "the twin passed: the model does not see what it is about");
}

/// Reads what is there and checks that the numbers and the holes between them add up.
fn read_some(reader: &mut RingReader<u64, ThreadExclusion>, next: &mut u64) {
    let wanted = |_| true;
    let mut events = Vec::new();
    match reader.read(2, false, false, wanted, |event| events.push(*event)) {
        Ok(_) => events.into_iter().for_each(|event| {
            assert_eq!(event, *next);
            *next += 1;
        }),
        Err(Missed { missed, .. }) => *next += missed,
    }
}

/// A reader that may be moved on, and a publisher that laps it.
fn a_reader_that_is_lapped(bus: Bus, stays: bool) {
    let bus = Arc::new(bus);
    let mut reader = bus.join(true, stays);
    // So that the first look finds something: the preemptions that a model draws are few.
    assert!(bus.publish(0));
    let publisher = {
        let bus = bus.clone();
        thread::spawn(move || (1..4).for_each(|event| assert!(bus.publish(event))))
    };
    let mut next = 0;
    read_some(&mut reader, &mut next);
    publisher.join().unwrap();
    (0..4).for_each(|_| read_some(&mut reader, &mut next));
    assert_eq!(next, 4, "events and holes are all that was published");
}

#[test]
fn a_reader_reads_whole_events_and_exact_holes_while_it_is_moved_on() {
    model(|| a_reader_that_is_lapped(Bus::new(2, Fences::Symmetric), false));
    model(|| a_reader_that_is_lapped(Bus::strict(2, Fences::Symmetric), false));
}

#[test]
fn a_reader_that_does_not_pin_is_overwritten_while_it_reads() {
    assert_fails(|| a_reader_that_is_lapped(Bus::new(2, Fences::Symmetric), true));
    assert_fails(|| a_reader_that_is_lapped(Bus::strict(2, Fences::Symmetric), true));
}

#[test]
fn a_reader_that_nobody_moves_need_not_pin() {
    model(|| {
        let bus = Arc::new(Bus::new(2, Fences::Symmetric));
        let mut reader = bus.join(false, true);
        let publisher = {
            let bus = bus.clone();
            thread::spawn(move || (0..4).take_while(|&event| bus.publish(event)).count() as u64)
        };
        let mut next = 0;
        read_some(&mut reader, &mut next);
        let published = publisher.join().unwrap();
        (0..4).for_each(|_| read_some(&mut reader, &mut next));
        assert_eq!(next, published);
    });
}

/// A thread with a seat, and another one that takes the right from it.
fn two_publishers(fences: Fences) {
    let bus = Arc::new(Bus::new(4, fences));
    assert!(bus.publish(0), "and gets the seat");
    let other = {
        let bus = bus.clone();
        thread::spawn(move || assert!(bus.publish(1)))
    };
    assert!(bus.publish(2));
    other.join().unwrap();
    assert_eq!(bus.ring.right.tail(), 3);
    let read = |sequence| {
        // SAFETY: everything was published, and nobody publishes any more.
        unsafe { bus.ring.slots.read(sequence, |event| *event) }
    };
    assert_eq!(read(0) + read(1) + read(2), 3, "each event has a slot");
}

#[test]
fn a_seat_is_taken_away_between_two_publications() {
    model(|| two_publishers(Fences::Symmetric));
}

#[test]
fn without_a_fence_on_both_sides_two_publish_at_once() {
    // Asymmetric fences need `membarrier`, which loom does not have: one side has none.
    assert_fails(|| two_publishers(Fences::Asymmetric));
}

/// Two publishers that hold no lock, and a reader.
fn two_strict_publishers(fences: Fences) {
    let bus = Arc::new(Bus::strict(4, fences));
    let mut reader = bus.join(false, true);
    assert!(bus.publish(0), "and a sweep says how far they may go");
    let other = {
        let bus = bus.clone();
        thread::spawn(move || assert!(bus.publish(1)))
    };
    let reading = thread::spawn(move || {
        let mut events = Vec::new();
        reader.read(4, false, false, |_| true, |event| events.push(*event)).unwrap();
        (reader, events)
    });
    assert!(bus.publish(2));
    other.join().unwrap();
    let (mut reader, mut events) = reading.join().unwrap();
    reader.read(4, false, false, |_| true, |event| events.push(*event)).unwrap();
    assert_eq!(events[0], 0);
    events.sort_unstable();
    assert_eq!(events, [0, 1, 2], "whoever is last makes all of them readable");
}

#[test]
fn of_two_strict_publishers_the_last_one_makes_both_events_readable() {
    model(|| two_strict_publishers(Fences::Symmetric));
}

#[test]
fn without_a_fence_after_the_stamp_two_strict_publishers_leave_events_unread() {
    // One side has none, as above.
    assert_fails(|| two_strict_publishers(Fences::Asymmetric));
}

/// A publisher that holds no lock, and somebody who pauses it and publishes under the token.
fn pausing(pause: impl Fn(&Right) -> Held<'_>) {
    let bus = Arc::new(Bus::strict(4, Fences::Symmetric));
    assert!(bus.publish(0));
    let publisher = {
        let bus = bus.clone();
        thread::spawn(move || assert!(bus.publish(1)))
    };
    {
        let state = bus.state.lock().unwrap();
        let held = pause(&bus.ring.right);
        // SAFETY: there are four slots and three events.
        assert_eq!(unsafe { bus.ring.write(&held, 0, 2) }, None);
        held.grant(state.reach.max(4));
    }
    publisher.join().unwrap();
    assert_eq!(bus.ring.right.tail(), 3);
    // SAFETY: everything was published, and nobody publishes any more.
    let read = |sequence| unsafe { bus.ring.slots.read(sequence, |event| *event) };
    assert_eq!((read(0), read(1) + read(2)), (0, 3), "each event has a slot");
}

#[test]
fn a_pause_waits_for_what_was_claimed_and_lets_nobody_claim() {
    model(|| pausing(Right::pause));
}

#[test]
fn a_pause_that_only_lowers_the_limit_meets_a_publisher_that_has_seen_it_before() {
    assert_fails(|| pausing(Right::pause_without_a_word));
}

/// A publisher that holds no lock and writes over what was read, below a limit that the thread has
/// raised which read it.
fn writing_below_anothers_limit(take_turn: impl Fn(&Right) -> Result<Turn, Stop>) -> bool {
    let bus = Arc::new(Bus::strict(1, Fences::Symmetric));
    let mut reader = bus.join(false, true);
    assert!(bus.publish(0), "and the ring is full");
    let reading = {
        let bus = bus.clone();
        thread::spawn(move || {
            let mut next = 0;
            read_some(&mut reader, &mut next);
            let mut state = bus.state.lock().unwrap();
            bus.sweep(&mut state, next);
            bus.ring.right.raise(state.reach);
        })
    };
    let turn = take_turn(&bus.ring.right);
    if let Ok(turn) = &turn {
        assert_eq!(bus.ring.publish_turn(turn, 0, 1, &mut Passed::new()), None);
    }
    reading.join().unwrap();
    turn.is_ok()
}

#[test]
fn who_writes_below_a_limit_that_another_raised_meets_no_reader() {
    let written = std::sync::Arc::new(AtomicBool::new(false));
    let by_the_model = written.clone();
    model(move || {
        if writing_below_anothers_limit(|right| right.take_turn(1)) {
            by_the_model.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    });
    assert!(written.load(std::sync::atomic::Ordering::Relaxed), "it was always too early");
}

#[test]
fn without_acquiring_the_limit_a_strict_publisher_writes_over_what_is_being_read() {
    assert_fails(|| _ = writing_below_anothers_limit(Right::take_turn_without_a_word));
}

/// A reader that joins while a thread with a seat publishes more than a lap.
fn joining(bus: Bus, under_the_token: bool) {
    let bus = Arc::new(bus);
    assert!(bus.publish(0));
    let publisher = {
        let bus = bus.clone();
        thread::spawn(move || (1..5).take_while(|&event| bus.publish(event)).count() as u64)
    };
    let mut reader = match under_the_token {
        true => bus.join(false, true),
        false => {
            let tail = bus.ring.right.tail();
            let cursor = std::sync::Arc::new(Cursor::new(tail));
            let reader = RingReader::new(bus.ring.clone(), cursor.clone(), true, true, 0);
            let member = Member::new(cursor, true, false, tail);
            bus.state.lock().unwrap().members.push(Some(member));
            reader
        }
    };
    let mut next = reader.place.position();
    read_some(&mut reader, &mut next);
    let published = 1 + publisher.join().unwrap();
    (0..4).for_each(|_| read_some(&mut reader, &mut next));
    assert_eq!(next, published);
}

#[test]
fn who_joins_while_others_publish_reads_everything_from_there_on() {
    model(|| joining(Bus::new(2, Fences::Symmetric), true));
    model(|| joining(Bus::strict(2, Fences::Symmetric), true));
}

#[test]
fn who_looks_at_the_tail_before_it_has_the_token_is_overwritten() {
    assert_fails(|| joining(Bus::new(2, Fences::Symmetric), false));
    assert_fails(|| joining(Bus::strict(2, Fences::Symmetric), false));
}

/// A cursor as it would be with one cell for what was lost.
struct OneCell {
    position: AtomicU64,
    lost: AtomicU64,
}

const PINNED: u64 = 1 << 63;

#[test]
fn what_a_move_lost_is_known_at_its_position_though_the_next_move_fails() {
    model(|| {
        let cursor = Arc::new(Cursor::new(0));
        let mover = {
            let cursor = cursor.clone();
            thread::spawn(move || {
                cursor.try_move(0, 1, 1);
                let at = cursor.look().position;
                cursor.try_move(at, at + 2, 2)
            })
        };
        let position = cursor.pin(false);
        if position > 0 {
            assert_eq!(cursor.lost_at(position), position);
        }
        cursor.release(position);
        mover.join().unwrap();
    });
}

#[test]
fn with_one_cell_a_failed_move_spoils_what_the_last_one_lost() {
    assert_fails(|| {
        let cursor = Arc::new(OneCell { position: AtomicU64::new(0), lost: AtomicU64::new(0) });
        let try_move = |cursor: &OneCell, from: u64, to: u64| {
            cursor.lost.store(to, Ordering::Release);
            let moved =
                cursor.position.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
            moved.is_ok()
        };
        let mover = {
            let cursor = cursor.clone();
            thread::spawn(move || try_move(&cursor, 0, 1) && try_move(&cursor, 1, 3))
        };
        let position = cursor.position.fetch_or(PINNED, Ordering::Acquire) & !PINNED;
        if position > 0 {
            assert_eq!(cursor.lost.load(Ordering::Acquire), position);
        }
        mover.join().unwrap();
    });
}

/// A reader that is overtaken while it reads; both words of an event are its number.
fn being_overtaken(announced: u64) {
    use super::overwrite::OverwriteRing;
    let (mut publisher, ring) = OverwriteRing::<[u64; 2]>::with_claims(1, announced);
    let mut reader = ring.reader();
    let publishing = thread::spawn(move || (0..3).for_each(|n| publisher.publish(&[n, n])));
    let mut next = 0;
    let mut look = |reader: &mut super::overwrite::OverwriteReader<[u64; 2]>| {
        match reader.try_recv() {
            Ok([first, second]) => {
                assert_eq!((first, second), (next, next));
                next += 1;
            }
            Err(crate::error::TryRecvError::Lagged(lagged)) => next += lagged.missed,
            Err(_) => {}
        }
        next
    };
    look(&mut reader);
    publishing.join().unwrap();
    (0..4).for_each(|_| _ = look(&mut reader));
    assert_eq!(look(&mut reader), 3, "events and holes are all that was published");
}

#[test]
fn a_reader_that_is_overtaken_gives_out_no_torn_event() {
    model(|| being_overtaken(1));
}

#[test]
fn without_announcing_what_it_writes_a_publisher_tears_events() {
    assert_fails(|| being_overtaken(0));
}
