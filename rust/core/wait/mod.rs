//! Sleeping without losing a wake-up, and without spinning.
//!
//! A wake-up never carries an event: the event stays queued until the sleeper's own next step takes
//! it, so cancelling a sleeper loses nothing.
//!
//! ```text
//!  sleeper                                 waker
//!  S1  say so: a bit, or sleepers += 1     W1  make the event (or the room) visible
//!      fence                                   fence
//!  S2  look again; leave if there is one   W2  said so ? wake one : nothing to do
//!  S3  park until woken
//! ```
//!
//! | store | load that may miss it | why not both |
//! |---|---|---|
//! | W1 event, room | S2 | one of the two fences comes first: either S2 sees W1 or W2 sees S1 |
//! | S1 bit, `sleepers` | W2 | as above |
//! | W1 closed | S2 | the end is told to lines under their lock, which S1 takes too |
//! | W2 forgets a bit | S1 | both under the lock of the lines: who enters after it sees W1 |
//!
//! Readers sleep for events (`dormitory.rs`) and publishers sleep for room (`Sleepers`) by the same
//! protocol. `models.rs` and `tests/loom.rs` check it, and that it fails without either fence.

mod dormitory;
#[cfg(all(test, tickbus_loom))]
mod models;

pub(crate) use dormitory::{Asleep, Bell, Calls, Dormitory, Sleeper};

use crate::barrier::Fences;
use crate::sync::{AtomicUsize, Exclusion, Ordering, thread, thread_local, wait_a_moment};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

/// What a thread does while there is nothing to receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum WaitStrategy {
    /// It looks again and again: the least latency, for a core of its own.
    Spin,
    /// It lets other threads run before it looks again.
    Yield,
    /// It sleeps until it is woken, where somebody does
    /// ([`WakeMode::Polling`](crate::WakeMode::Polling)).
    #[default]
    Park,
}

/// Looks at an empty ring that follow one another closely; after so many, it pauses in between, so
/// that the line that the publisher writes is not fetched all the time.
const EAGER_LOOKS: u32 = 32;
const PAUSES: u32 = 32;

impl WaitStrategy {
    /// Waits before the next look; false if that is to be done asleep. `looks` were in vain.
    pub(crate) fn pass_time(self, looks: u32) -> bool {
        match self {
            Self::Spin if looks < EAGER_LOOKS => std::hint::spin_loop(),
            Self::Spin => (0..PAUSES).for_each(|_| std::hint::spin_loop()),
            Self::Yield => thread::yield_now(),
            Self::Park => return false,
        }
        true
    }
}

/// How many are asleep, or about to be.
#[derive(Debug)]
pub struct Sleepers(AtomicUsize);

impl Default for Sleepers {
    fn default() -> Self {
        Self(AtomicUsize::new(0))
    }
}

impl Sleepers {
    /// Step S1: announces a sleeper, who must look again before it parks.
    #[inline]
    pub fn arm<R: Exclusion>(&self, fences: Fences) {
        self.count_in::<R>();
        if !R::SERIALIZES_SLEEP {
            fences.rarely();
        }
    }

    /// As `arm`, for who fences later.
    pub(crate) fn count_in<R: Exclusion>(&self) {
        match R::SERIALIZES_SLEEP {
            true => self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Relaxed),
            false => _ = self.0.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Takes an announcement back.
    #[inline]
    pub fn disarm<R: Exclusion>(&self) {
        match R::SERIALIZES_SLEEP {
            true => self.0.store(self.0.load(Ordering::Relaxed) - 1, Ordering::Relaxed),
            false => _ = self.0.fetch_sub(1, Ordering::Relaxed),
        }
    }

    /// Returns how many there are.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Step W2 after its fence: returns whether somebody must be woken.
    #[inline]
    pub fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Step W2 with its fence.
    #[inline]
    pub fn any_after_store<R: Exclusion>(&self, fences: Fences) -> bool {
        if !R::SERIALIZES_SLEEP {
            fences.often();
        }
        self.any()
    }
}

/// Whether a thread wakes several in a row, and has somebody to wake after all of them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Row {
    No,
    Nobody,
    Somebody,
}

thread_local! {
    static ROW: Cell<Row> = const { Cell::new(Row::No) };
    /// Who is woken at the end of the row.
    static LAST: RefCell<SmallVec<[Waker; 4]>> = RefCell::default();
}

/// Ends a row when it is dropped.
struct Together;

impl Drop for Together {
    fn drop(&mut self) {
        if ROW.with(|row| row.replace(Row::No)) == Row::Somebody {
            LAST.with(RefCell::take).into_iter().for_each(Waker::wake);
        }
    }
}

/// Runs `wake`, which wakes several, and then wakes whom their wakers named by [`wake_last`].
pub(crate) fn wake_together(wake: impl FnOnce()) {
    let is_outermost = ROW.with(Cell::get) == Row::No;
    let _together = is_outermost.then(|| {
        ROW.with(|row| row.set(Row::Nobody));
        Together
    });
    wake();
}

/// Wakes `waker` once, after all others that the same event wakes: called by their wakers, of which
/// several may stand for one sleeper, such as an event loop.
pub fn wake_last(waker: Waker) {
    if ROW.with(Cell::get) == Row::No {
        return waker.wake();
    }
    ROW.with(|row| row.set(Row::Somebody));
    let _known = LAST.with(|last| {
        let mut last = last.borrow_mut();
        if last.iter().any(|other| other.will_wake(&waker)) {
            return Some(waker);
        }
        last.push(waker);
        None
    });
}

/// The most ready completions in a row on one thread before a task lets others run.
const READY_RUN: u16 = 256;

/// Enters a line, for the task that is polled.
pub(crate) async fn entered(sleeper: &mut Sleeper<&Bell>) {
    poll_fn(|context| {
        sleeper.enter_for(context);
        Poll::Ready(())
    })
    .await;
}

/// Suspends the task once in every 256 calls on one thread.
pub(crate) async fn breathe() {
    poll_fn(poll_breath).await;
}

/// As [`breathe`], polled.
fn poll_breath(context: &mut Context<'_>) -> Poll<()> {
    thread_local! {
        static RUN: Cell<u16> = const { Cell::new(0) };
    }
    RUN.with(|run| {
        if run.get() < READY_RUN {
            run.set(run.get() + 1);
            Poll::Ready(())
        } else {
            run.set(0);
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
}

/// A subscription of a bus or of an event system, whatever its events are: what it takes to wait for
/// it. The methods are those of the same names.
pub trait AnySubscription {
    /// Returns its id, unique in its bus or system.
    fn id(&self) -> u64;

    /// Returns how many events wait to be read.
    fn pending(&self) -> usize;

    /// Returns whether it was closed, by itself or with its bus or system.
    fn is_closed(&self) -> bool;

    /// Returns whether receiving would give something else than `Empty`.
    fn is_ready(&self) -> bool;

    /// Asks for wake-ups, once there is a place in line. Look again before sleeping, and arm again
    /// to sleep on after one.
    fn arm(&self);

    /// Takes one [`AnySubscription::arm`] back.
    fn disarm(&self);

    /// Returns a place in the line of those that sleep; `None` if nobody wakes them, so that whoever
    /// waits looks again by itself.
    fn place_in_line(&self) -> Option<PlaceInLine>;

    /// Wakes another sleeper if something is left to receive.
    fn pass_on(&self);
}

/// A place in the line of those that sleep: a future that is done once it is worth looking again.
///
/// Dropped after it was woken and before it was polled, it wakes the next in line.
#[derive(Debug)]
pub struct PlaceInLine(Sleeper);

impl PlaceInLine {
    pub(crate) fn new(bell: &Arc<Bell>) -> Self {
        Self(bell.owned_sleeper())
    }

    /// Enters the line, or enters it anew after it was woken. Polling it does that too.
    pub fn enter(&mut self) {
        self.0.enter();
    }
}

impl Future for PlaceInLine {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll(context)
    }
}

/// A stream's place in the line of those that sleep, between two polls.
#[derive(Debug, Default)]
pub(crate) struct Parked(Option<PlaceInLine>);

impl Parked {
    /// Polls for what `look` finds in the subscription, and sleeps while that is nothing.
    pub(crate) fn poll<S: AnySubscription, O>(
        &mut self,
        context: &mut Context<'_>,
        subscription: &S,
        look: impl Fn(&S) -> Option<O>,
    ) -> Poll<O> {
        if poll_breath(context).is_pending() {
            return Poll::Pending;
        }
        loop {
            if let Some(found) = look(subscription) {
                self.leave(subscription);
                return Poll::Ready(found);
            }
            match &mut self.0 {
                Some(place) => {
                    if Pin::new(place).poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    self.leave(subscription);
                }
                None => {
                    let Some(mut place) = subscription.place_in_line() else {
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    };
                    place.0.enter_for(context);
                    subscription.arm();
                    self.0 = Some(place);
                }
            }
        }
    }

    /// Leaves the line.
    pub(crate) fn leave(&mut self, subscription: &impl AnySubscription) {
        if self.0.take().is_some() {
            subscription.disarm();
        }
    }
}

/// Suspends the task until its executor comes round again, for who is not woken.
pub(crate) async fn come_round() {
    let mut has_come = false;
    poll_fn(|context| match std::mem::replace(&mut has_come, true) {
        true => Poll::Ready(()),
        false => {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await;
}

/// Passes the time in this thread before the next look of who is not woken, after so many looks in
/// vain; false if the deadline has passed.
pub(crate) fn pass_time_until(looks: &mut u32, deadline: Option<Instant>) -> bool {
    wait_a_moment(looks);
    deadline.is_none_or(|deadline| Instant::now() < deadline)
}

struct Unparker(thread::Thread);

impl Wake for Unparker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

thread_local! {
    static UNPARKER: Waker = Waker::from(Arc::new(Unparker(thread::current())));
}

/// Parks the thread until `future` is done or the deadline has passed; `None` if it passed.
pub(crate) fn park_on<F: Future>(
    mut future: Pin<&mut F>,
    deadline: Option<Instant>,
) -> Option<F::Output> {
    park_until(deadline, |context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    })
}

/// Parks the thread until one of `futures` is done, and returns its place, or the deadline has
/// passed.
pub(crate) fn park_on_any<F: Future + Unpin>(
    futures: &mut [F],
    deadline: Option<Instant>,
) -> Option<usize> {
    park_until(deadline, |context| {
        futures.iter_mut().position(|future| Pin::new(future).poll(context).is_ready())
    })
}

fn park_until<O>(
    deadline: Option<Instant>,
    mut poll: impl FnMut(&mut Context<'_>) -> Option<O>,
) -> Option<O> {
    UNPARKER.with(|waker| {
        let mut context = Context::from_waker(waker);
        loop {
            if let Some(output) = poll(&mut context) {
                return Some(output);
            }
            match deadline {
                None => thread::park(),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    thread::park_timeout(left);
                }
            }
        }
    })
}
