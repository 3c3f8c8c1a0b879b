//! A store as a subscriber: what is published is appended, by a thread of its own.

use super::attachment::{Attached, Attachment};
use super::durability::Appender;
use super::error::StoreError;
use super::event_store::EventStore;
use crate::error::{Lagged, TryRecvError};
use crate::event::{Event, Lane};
use crate::select::select;
use crate::subscription::EventSubscription;
use crate::sync::ThreadExclusion;
use crate::system::{SystemSubscription, TakeError};
use crate::wait::AnySubscription;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::thread::current;
use std::time::{Duration, Instant};

/// Events that are appended at once: a frame of them.
const BATCH: usize = 2048;
/// How long it lets events gather, so that who publishes need not wake it for each.
const NAPS: RangeInclusive<Duration> = Duration::from_micros(50)..=Duration::from_micros(250);
/// The least that publishing an event takes: no publisher fills half of the room during a nap.
const LEAST_PER_EVENT: Duration = Duration::from_nanos(4);

/// A subscription from which a store takes events: one of an `EventSystem` or of a bus of events.
///
/// It should have the policy `block`, so that publishers wait for the store rather than overtake it. What
/// it misses all the same is in the log as a gap.
pub trait Source: AnySubscription + Send + Sync + 'static {
    /// Adds pending events, at most `limit`. `Ok` is false when there are none and there never will be.
    #[doc(hidden)]
    fn take(&self, events: &mut Vec<Event>, limit: usize) -> Result<bool, Lagged>;

    /// Returns for how many events it has room where most of them go.
    #[doc(hidden)]
    fn room(&self) -> usize;

    /// Notes that a store takes what it receives.
    #[doc(hidden)]
    fn begin(&self);

    /// Ends the subscription.
    #[doc(hidden)]
    fn end(&self);
}

impl Source for SystemSubscription {
    fn take(&self, events: &mut Vec<Event>, limit: usize) -> Result<bool, Lagged> {
        match self.try_recv_each(limit, |event| events.push(event)) {
            Ok(_) | Err(TakeError::Empty) => Ok(true),
            Err(TakeError::Lagged(lagged)) => Err(Lagged { missed: lagged.missed, exact: true }),
            Err(TakeError::Closed) => Ok(false),
        }
    }

    fn room(&self) -> usize {
        // What is urgent is rare: who fills another lane within a nap waits for the rest of it.
        self.capacity(Lane::Normal)
    }

    fn begin(&self) {
        self.feed_store();
    }

    fn end(&self) {
        self.close();
    }
}

impl Source for EventSubscription<Event, ThreadExclusion> {
    fn take(&self, events: &mut Vec<Event>, limit: usize) -> Result<bool, Lagged> {
        match self.try_recv_batch(events, limit) {
            Ok(_) | Err(TryRecvError::Empty) => Ok(true),
            Err(TryRecvError::Lagged(lagged)) => Err(lagged),
            Err(TryRecvError::Closed) => Ok(false),
        }
    }

    fn room(&self) -> usize {
        self.capacity()
    }

    fn begin(&self) {
        self.feed_store();
    }

    fn end(&self) {
        self.close();
    }
}

/// What a store does with what a replay publishes, which some log has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Replayed {
    /// Leaves it out.
    #[default]
    Skip,
    /// Stores it too; the log says of each event that it was replayed.
    Keep,
}

impl EventStore {
    /// Appends what a subscription receives from now on, until it is closed or the store is. A store
    /// that fails, or has no room, detaches itself: it closes the subscription, so that no publisher
    /// waits for it, and tells `on_failure`. What a replay publishes is left out.
    ///
    /// # Errors
    ///
    /// `Closed`; `Io` if no thread can be started.
    ///
    /// # Examples
    ///
    /// ```
    /// use tickbus::{Event, EventStore, EventSystem, StoreConfig};
    ///
    /// # let folder = std::env::temp_dir().join(format!("tickbus-attach-{}", std::process::id()));
    /// let (store, _) = EventStore::open(&folder, StoreConfig::default())?;
    /// let system = EventSystem::new(Default::default())?;
    /// let attachment = store.attach(system.subscribe(Default::default())?, |error| eprintln!("{error}"))?;
    /// system.publish(Event::from_bytes([0; 32]))?;
    /// attachment.detach();
    /// assert_eq!(attachment.stored(), 1);
    /// store.close()?;
    /// # std::fs::remove_dir_all(&folder).ok();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attach(
        &self,
        source: impl Source,
        on_failure: impl FnOnce(&StoreError) + Send + 'static,
    ) -> Result<Attachment, StoreError> {
        self.attach_with(source, Replayed::Skip, on_failure)
    }

    /// As [`EventStore::attach`], with a say in what becomes of what a replay publishes.
    ///
    /// # Errors
    ///
    /// As [`EventStore::attach`].
    pub fn attach_with(
        &self,
        source: impl Source,
        replayed: Replayed,
        on_failure: impl FnOnce(&StoreError) + Send + 'static,
    ) -> Result<Attachment, StoreError> {
        source.begin();
        let attached = Arc::new(Attached::default());
        let (appender, shared) = (self.appender(), attached.clone());
        let detached = self.detached().clone();
        let run = move || {
            _ = shared.thread_id.set(current().id());
            let result = run(&appender, &source, replayed, &shared);
            let pending = source.pending() as u64;
            source.end();
            if let Err(Failure { error, taken }) = result {
                shared.missed.add_exclusive(taken + pending);
                detached.count(taken + pending);
                on_failure(shared.failure.get_or_init(|| error));
            }
        };
        let thread = std::thread::Builder::new().name("tickbus-attach".to_owned()).spawn(run);
        let thread = thread.map_err(StoreError::io("starting", "a thread"))?;
        *attached.thread.lock() = Some(thread);
        self.remember(&attached)?;
        Ok(Attachment(attached))
    }
}

/// Why a store detaches itself.
struct Failure {
    error: StoreError,
    /// Events that it has taken, of which there is nothing in the log.
    taken: u64,
}

/// Appends until the subscription ends or is told to.
fn run<S: Source>(
    appender: &Appender,
    source: &S,
    replayed: Replayed,
    attached: &Attached,
) -> Result<(), Failure> {
    let mut events = Vec::with_capacity(BATCH);
    // What was pending when it was told to end, less what was taken since; and one more, for what was
    // missed behind that.
    let mut left = usize::MAX;
    let nap = (LEAST_PER_EVENT * (source.room() / 2) as u32).min(*NAPS.end());
    let nap = Some(nap).filter(|nap| NAPS.contains(nap));
    loop {
        if left == usize::MAX && attached.shutdown.is_set() {
            left = source.pending() + 1;
        }
        events.clear();
        let taken = source.take(&mut events, BATCH.min(left));
        let come = events.len();
        if replayed == Replayed::Skip && events.iter().any(Event::is_replayed) {
            events.retain(|event| !event.is_replayed());
        }
        let count = events.len() as u64;
        if count > 0 {
            let hole = taken.as_ref().map_or_else(|lagged| lagged.missed, |_| 0);
            appender
                .append(|log| log.append_events(&events))
                .map_err(|error| Failure { error, taken: count + hole })?;
            attached.stored.add_exclusive(count);
        }
        match taken {
            Err(Lagged { missed, exact }) => {
                appender
                    .append(|log| log.append_gap(missed, exact))
                    .map_err(|error| Failure { error, taken: missed })?;
                attached.missed.add_exclusive(missed);
            }
            Ok(false) => return Ok(()),
            Ok(true) if left != usize::MAX => {
                left = left.saturating_sub(come);
                if left == 0 || come == 0 {
                    return Ok(());
                }
            }
            // While it appended more may have come, for which nobody has to wake it.
            Ok(true) if come > 0 => {
                if let Some(nap) = nap.filter(|_| come < BATCH) {
                    let until = Instant::now() + nap;
                    _ = select::<S>(&[], Some(&attached.shutdown), Some(until));
                }
            }
            Ok(true) => _ = select(&[source], Some(&attached.shutdown), None),
        }
    }
}
