//! Sleeping without losing a wake-up, and without spinning.
//!
//! A wake-up never carries an event: the event stays queued until the sleeper's own next step takes
//! it, so cancelling a sleeper loses nothing.
//!
//! ```text
//!  sleeper                                 waker
//!  S1  sleepers += 1                       W1  make the event (or the room) visible
//!      fence                                   fence
//!  S2  look again; leave if there is one   W2  sleepers > 0 ? wake one : nothing to do
//!  S3  park until woken
//! ```
//!
//! | store | load that may miss it | why not both |
//! |---|---|---|
//! | W1 event, room, closed | S2 | one of the two fences comes first: either S2 sees W1 or W2 sees S1 |
//! | S1 `sleepers` | W2 | as above |
//!
//! Readers sleep for events and publishers sleep for room by the same protocol.
//! `tests/loom.rs` checks it, and that it fails without either fence.

use crate::barrier::Fences;
use crate::sync::{
    AtomicU64, AtomicUsize, Exclusion, Ordering, thread, thread_local, wait_a_moment,
};
use smallvec::SmallVec;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

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

/// In which slots somebody is asleep, or was not long ago, a bit each: what a publisher who holds no
/// lock compares with those that want its event.
#[derive(Debug)]
pub struct Asleep(AtomicU64);

impl Default for Asleep {
    fn default() -> Self {
        Self(AtomicU64::new(0))
    }
}

impl Asleep {
    /// Notes a sleeper in a slot with this bit, who was counted before and has still to fence and to
    /// look again.
    pub fn note(&self, bit: u64) {
        // ORDERING: with `forget`, in whose order it is: a publisher that forgets a sleeper noted
        // before counts it afterwards.
        self.0.fetch_or(bit, Ordering::AcqRel);
    }

    /// Forgets the sleepers of the slots with these bits; the caller counts them afterwards, and
    /// notes them again if some are left that nobody wakes.
    pub fn forget(&self, bits: u64) {
        self.0.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Returns whether somebody sleeps in a slot of the mask.
    #[inline]
    pub fn any_of(&self, mask: u64) -> bool {
        self.0.load(Ordering::Relaxed) & mask != 0
    }
}

/// What wakes the readers of one subscription, or of several that are read together.
#[derive(Default)]
pub(crate) struct Bell {
    notify: Arc<Notify>,
    waker: OnceLock<Waker>,
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bell").finish_non_exhaustive()
    }
}

impl Bell {
    /// Sends all wake-ups to `waker` from now on, for readers that live in a foreign event loop.
    /// Returns false if there was one already.
    pub(crate) fn set_waker(&self, waker: Waker) -> bool {
        self.waker.set(waker).is_ok()
    }

    /// Wakes the reader that sleeps longest. Called without any lock.
    pub(crate) fn wake_one(&self) {
        match self.waker.get() {
            Some(waker) => waker.wake_by_ref(),
            None => self.notify.notify_one(),
        }
    }

    /// Wakes every reader: the end is near.
    pub(crate) fn wake_all(&self) {
        match self.waker.get() {
            Some(waker) => waker.wake_by_ref(),
            None => self.notify.notify_waiters(),
        }
    }

    pub(crate) fn notified(&self) -> tokio::sync::futures::Notified<'_> {
        self.notify.notified()
    }

    pub(crate) fn notified_owned(&self) -> tokio::sync::futures::OwnedNotified {
        self.notify.clone().notified_owned()
    }
}

thread_local! {
    /// While several are woken in a row: who is woken after all of them.
    static LAST: RefCell<Option<SmallVec<[Waker; 4]>>> = const { RefCell::new(None) };
}

/// Wakes the last ones when it is dropped.
struct Together;

impl Drop for Together {
    fn drop(&mut self) {
        let last = LAST.with(RefCell::take);
        last.iter().flatten().for_each(Waker::wake_by_ref);
    }
}

/// Runs `wake`, which wakes several, and then wakes whom their wakers named by [`wake_last`].
pub(crate) fn wake_together(wake: impl FnOnce()) {
    let is_outermost = LAST.with(|last| match &mut *last.borrow_mut() {
        last @ None => last.replace(SmallVec::new()).is_none(),
        Some(_) => false,
    });
    let _together = is_outermost.then_some(Together);
    wake();
}

/// Wakes `waker` once, after all others that the same event wakes: called by their wakers, of which
/// several may stand for one sleeper, such as an event loop.
pub fn wake_last(waker: Waker) {
    let alone = LAST.with(|last| match &mut *last.borrow_mut() {
        None => Some(waker),
        Some(last) => {
            if !last.iter().any(|other| other.will_wake(&waker)) {
                last.push(waker);
            }
            None
        }
    });
    if let Some(waker) = alone {
        waker.wake();
    }
}

/// Where the readers of one subscription sleep.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    pub(crate) sleepers: Sleepers,
    pub(crate) bell: Arc<Bell>,
}

/// The most ready completions in a row on one thread before a task lets others run.
const READY_RUN: u16 = 256;

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

    /// Asks for wake-ups. Look again before sleeping, and arm again to sleep on after one.
    fn arm(&self);

    /// Takes one [`AnySubscription::arm`] back.
    fn disarm(&self);

    /// Returns a place in the line of those that sleep; `None` if nobody wakes them, so that whoever
    /// waits looks again by itself.
    fn notified_owned(&self) -> Option<OwnedNotified>;

    /// Wakes another sleeper if something is left to receive.
    fn pass_on(&self);
}

/// A stream's place in the line of those that sleep, between two polls.
#[derive(Debug, Default)]
pub(crate) struct Parked(Option<Pin<Box<OwnedNotified>>>);

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
                Some(notified) => {
                    if notified.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    self.leave(subscription);
                }
                None => {
                    let Some(notified) = subscription.notified_owned() else {
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    };
                    let mut notified = Box::pin(notified);
                    notified.as_mut().enable();
                    subscription.arm();
                    self.0 = Some(notified);
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
pub(crate) fn park_on_any<F: Future>(
    futures: &mut [Pin<Box<F>>],
    deadline: Option<Instant>,
) -> Option<usize> {
    park_until(deadline, |context| {
        futures.iter_mut().position(|future| future.as_mut().poll(context).is_ready())
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
