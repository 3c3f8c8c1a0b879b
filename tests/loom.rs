//! Models of the protocols that locks alone do not carry, over every interleaving and every value
//! that a relaxed load may return: waiting for room, telling a hole at the end, closing, joining and
//! leaving, and names that are read while others are added. Each stands beside a twin that lacks one
//! fence, ordering or lock, and in which loom must find the mistake.
//!
//! The queues are stand-ins: loom cannot see into crossbeam's. Run by `make loom`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![cfg(tickbus_loom)]

use loom::model;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex, Notify};
use loom::thread;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tickbus::barrier::Fences;
use tickbus::sync::{Counter, Flag};
use tickbus::wait::Sleepers;
use tickbus::{Exclusion, ThreadExclusion as Fenced};

/// An exclusion that claims to make the fences superfluous, which it does not.
struct Unfenced(parking_lot::RawMutex);

// SAFETY: every call is passed on to parking_lot's lock.
unsafe impl lock_api::RawMutex for Unfenced {
    #[expect(clippy::declare_interior_mutable_const, reason = "the trait wants it")]
    const INIT: Self = Self(<parking_lot::RawMutex as lock_api::RawMutex>::INIT);
    type GuardMarker = <parking_lot::RawMutex as lock_api::RawMutex>::GuardMarker;

    fn lock(&self) {
        self.0.lock();
    }

    fn try_lock(&self) -> bool {
        self.0.try_lock()
    }

    unsafe fn unlock(&self) {
        // SAFETY: the caller holds the lock.
        unsafe { self.0.unlock() };
    }
}

// SAFETY: it is a lock; that it serializes sleeping is the lie that the twins are about.
unsafe impl Exclusion for Unfenced {
    type Queue<E> = tickbus::CrossbeamQueue<E>;
    const SERIALIZES_SLEEP: bool = true;
}

/// Asserts that loom finds a lost wake-up or a failed assertion.
#[track_caller]
fn assert_fails(twin: impl Fn() + Sync + Send + 'static) {
    let found = catch_unwind(AssertUnwindSafe(|| model(twin)));
    assert!(found.is_err(), "the twin passed: the model does not see what it is about");
}

/// Events in a queue: written with release and read with acquire, as crossbeam's slots are.
struct Queue(AtomicUsize);

impl Queue {
    fn holding(events: usize) -> Self {
        Self(AtomicUsize::new(events))
    }

    fn len(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }

    fn push(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    fn take(&self) -> bool {
        self.len() > 0 && {
            self.0.fetch_sub(1, Ordering::AcqRel);
            true
        }
    }
}

/// A queue for one event, with the publisher's line behind the token.
struct Room {
    queue: Queue,
    blocked: Sleepers,
    token: Mutex<Option<Arc<Notify>>>,
}

impl Room {
    /// As `PublishState::offer` and `stand_in_line`.
    fn publish<R: Exclusion>(&self) {
        let turn = Arc::new(Notify::new());
        loop {
            {
                let mut line = self.token.lock().unwrap();
                if line.take().is_some() {
                    self.blocked.disarm::<R>();
                }
                if self.queue.len() == 0 {
                    return self.queue.push();
                }
                *line = Some(turn.clone());
                self.blocked.arm::<R>(Fences::Symmetric);
                if self.queue.len() == 0 {
                    *line = None;
                    self.blocked.disarm::<R>();
                    return self.queue.push();
                }
            }
            turn.wait();
        }
    }

    /// As `Inbox::step` and `Shared::room_was_freed`.
    fn recv<R: Exclusion>(&self) -> bool {
        let found = self.queue.take();
        if found
            && self.blocked.any_after_store::<R>(Fences::Symmetric)
            && let Some(first) = &*self.token.lock().unwrap()
        {
            first.notify();
        }
        found
    }
}

fn a_publisher_that_waits_for_room<Publisher: Exclusion, Reader: Exclusion>() {
    let room = Arc::new(Room {
        queue: Queue::holding(1),
        blocked: Sleepers::default(),
        token: Mutex::new(None),
    });
    let reader = {
        let room = room.clone();
        thread::spawn(move || assert!(room.recv::<Reader>()))
    };
    room.publish::<Publisher>();
    reader.join().unwrap();
    assert_eq!(room.queue.len(), 1);
}

#[test]
fn a_publisher_in_line_hears_of_freed_room() {
    model(a_publisher_that_waits_for_room::<Fenced, Fenced>);
}

#[test]
fn without_the_waiting_publishers_fence_freed_room_goes_unheard() {
    assert_fails(a_publisher_that_waits_for_room::<Unfenced, Fenced>);
}

#[test]
fn without_the_readers_fence_freed_room_goes_unheard() {
    assert_fails(a_publisher_that_waits_for_room::<Fenced, Unfenced>);
}

/// A reader that finds nothing takes the offered events that it has not seen for a hole.
fn a_reader_at_the_end(publish: fn(&Counter), observe: fn(&Counter) -> u64) {
    let shared = Arc::new((AtomicBool::new(false), Counter::default()));
    let publisher = {
        let shared = shared.clone();
        thread::spawn(move || {
            // The slot's stamp; what carries the news is the counter.
            shared.0.store(true, Ordering::Relaxed);
            publish(&shared.1);
        })
    };
    let offered = observe(&shared.1);
    let found = shared.0.load(Ordering::Relaxed);
    assert!(found || offered == 0, "a hole was told where an event is");
    publisher.join().unwrap();
}

#[test]
fn a_hole_at_the_end_is_never_told_too_early() {
    model(|| a_reader_at_the_end(|offered| offered.publish(1), Counter::observe));
}

#[test]
fn without_acquire_a_hole_is_told_where_an_event_is() {
    assert_fails(|| a_reader_at_the_end(|offered| offered.publish(1), Counter::value));
}

/// What was published before closing is read before `Closed`.
fn a_reader_that_sees_the_end(close: fn(&Ending), is_closed: fn(&Ending) -> bool) {
    let ending = Arc::new(Ending::default());
    let publisher = {
        let ending = ending.clone();
        thread::spawn(move || {
            ending.event.store(true, Ordering::Relaxed);
            close(&ending);
        })
    };
    // Before looking, as in `Inbox::step`.
    let closed = is_closed(&ending);
    let found = ending.event.load(Ordering::Relaxed);
    assert!(found || !closed, "Closed came before the last event");
    publisher.join().unwrap();
}

struct Ending {
    event: AtomicBool,
    closed: Flag,
    relaxed: AtomicBool,
}

impl Default for Ending {
    fn default() -> Self {
        Self {
            event: AtomicBool::new(false),
            closed: Flag::default(),
            relaxed: AtomicBool::new(false),
        }
    }
}

#[test]
fn everything_published_is_read_before_the_end_is_told() {
    model(|| {
        a_reader_that_sees_the_end(|end| assert!(end.closed.set()), |end| end.closed.is_set())
    });
}

#[test]
fn a_relaxed_switch_tells_the_end_before_the_last_event() {
    assert_fails(|| {
        a_reader_that_sees_the_end(
            |end| end.relaxed.store(true, Ordering::Relaxed),
            |end| end.relaxed.load(Ordering::Relaxed),
        );
    });
}

/// One subscription of a shared channel: how far the channel is, and who has joined.
struct Bus {
    /// Entries sent, and whether the subscription is there.
    token: Mutex<(usize, bool)>,
    /// Entries that the subscription has walked over.
    reader: Mutex<usize>,
    sent: Counter,
    closed: Flag,
}

impl Bus {
    fn new(joined: bool) -> Arc<Self> {
        Arc::new(Self {
            token: Mutex::new((0, joined)),
            reader: Mutex::new(0),
            sent: Counter::default(),
            closed: Flag::default(),
        })
    }

    /// Returns whether the subscription was offered the event.
    fn publish(&self) -> bool {
        let mut token = self.token.lock().unwrap();
        token.0 += 1;
        self.sent.publish(token.0 as u64);
        token.1
    }

    /// As `Shared::unsubscribe`: returns how many events were offered and how many were pending.
    fn leave(&self) -> (usize, usize) {
        let mut token = self.token.lock().unwrap();
        assert!(self.closed.set());
        token.1 = false;
        let mut walked = self.reader.lock().unwrap();
        let pending = token.0 - *walked;
        *walked = token.0;
        (token.0, pending)
    }

    /// As `Inbox::step`: whether the subscription has left is looked up under the reader's lock.
    fn step(&self) -> bool {
        let mut walked = self.reader.lock().unwrap();
        !self.closed.is_set() && self.walk(&mut walked)
    }

    /// The twin looks before it has the lock.
    fn hasty_step(&self) -> bool {
        if self.closed.is_set() {
            return false;
        }
        let mut walked = self.reader.lock().unwrap();
        self.walk(&mut walked)
    }

    fn walk(&self, walked: &mut usize) -> bool {
        let found = self.sent.observe() as usize > *walked;
        *walked += usize::from(found);
        found
    }
}

fn leaving_under_a_reader_and_a_publisher(step: fn(&Bus) -> bool) {
    let bus = Bus::new(true);
    let publisher = {
        let bus = bus.clone();
        thread::spawn(move || bus.publish())
    };
    let reader = {
        let bus = bus.clone();
        thread::spawn(move || step(&bus))
    };
    let (offered, closed) = bus.leave();
    let taken = publisher.join().unwrap();
    let delivered = reader.join().unwrap();
    assert_eq!(offered, usize::from(taken), "the publisher's number is the subscription's");
    assert_eq!(offered, usize::from(delivered) + closed, "the sum closes");
}

#[test]
fn leaving_counts_each_event_once() {
    model(|| leaving_under_a_reader_and_a_publisher(Bus::step));
}

#[test]
fn a_reader_that_looks_before_it_locks_takes_an_event_after_leaving() {
    assert_fails(|| leaving_under_a_reader_and_a_publisher(Bus::hasty_step));
}

/// A publish that starts after `subscribe` returned reaches the subscription. How one thread
/// learned that the other has returned is not the bus's: a relaxed flag is enough.
fn joining_before_a_publish(publish: fn(&Bus, &AtomicUsize) -> bool) {
    let bus = Bus::new(false);
    let (unlocked, returned) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let subscriber = {
        let (bus, unlocked, returned) = (bus.clone(), unlocked.clone(), returned.clone());
        thread::spawn(move || {
            bus.token.lock().unwrap().1 = true;
            unlocked.store(1, Ordering::Relaxed);
            returned.store(true, Ordering::Relaxed);
        })
    };
    let after = returned.load(Ordering::Relaxed);
    let taken = publish(&bus, &unlocked);
    assert!(taken || !after, "a publish missed a subscription that had joined");
    subscriber.join().unwrap();
}

#[test]
fn every_publish_after_joining_reaches_the_subscription() {
    model(|| joining_before_a_publish(|bus, _| bus.publish()));
}

#[test]
fn a_list_read_without_the_token_misses_a_subscription_that_joined() {
    assert_fails(|| {
        joining_before_a_publish(|_, unlocked| unlocked.load(Ordering::Relaxed) == 1);
    });
}

/// A table of names with one place: a name's text, the index's place, and a wider index.
#[derive(Default)]
struct Table {
    /// What carries the news is what comes after it.
    text: Relaxed,
    place: Counter,
    wider: Counter,
    level: Counter,
}

/// A number without any ordering; 0 at first.
struct Relaxed(AtomicUsize);

impl Default for Relaxed {
    fn default() -> Self {
        Self(AtomicUsize::new(0))
    }
}

impl Table {
    /// As `table::Table::probe`: the number that is found at the newest level.
    fn find(&self, observe: fn(&Counter) -> u64) -> u64 {
        match observe(&self.level) {
            0 => observe(&self.place),
            _ => observe(&self.wider),
        }
    }

    /// As `table::Table::add`.
    fn add(&self) {
        self.text.0.store(7, Ordering::Relaxed);
        self.place.publish(1);
    }

    /// As `table::Table::grow`: the wider index is filled before anybody looks into it.
    fn grow(&self) {
        self.wider.add_exclusive(self.place.value());
        self.level.publish(1);
    }
}

/// Whoever finds a number reads its name.
fn a_name_that_is_added(observe: fn(&Counter) -> u64) {
    let table = Arc::new(Table::default());
    let adding = {
        let table = table.clone();
        thread::spawn(move || {
            table.add();
            table.grow();
        })
    };
    if table.find(observe) == 1 {
        assert_eq!(table.text.0.load(Ordering::Relaxed), 7, "a number without its name");
    }
    adding.join().unwrap();
}

#[test]
fn a_number_that_is_found_has_its_name() {
    model(|| a_name_that_is_added(Counter::observe));
}

#[test]
fn without_acquire_a_number_is_found_before_its_name() {
    assert_fails(|| a_name_that_is_added(Counter::value));
}

/// Whoever knows a name goes on knowing it while the index grows.
fn a_name_that_is_known(observe: fn(&Counter) -> u64) {
    let table = Arc::new(Table::default());
    table.add();
    let growing = {
        let table = table.clone();
        thread::spawn(move || table.grow())
    };
    assert_eq!(table.find(observe), 1, "a known name was not found");
    growing.join().unwrap();
}

#[test]
fn a_known_name_stays_known_while_the_index_grows() {
    model(|| a_name_that_is_known(Counter::observe));
}

#[test]
fn without_acquire_a_known_name_is_missed_while_the_index_grows() {
    assert_fails(|| a_name_that_is_known(Counter::value));
}
