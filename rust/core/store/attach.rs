//! A store as a subscriber: what is published is appended, by a thread of its own.

use super::error::StoreError;
use super::event_store::EventStore;
use crate::error::{Lagged, TryRecvError};
use crate::event::Event;
use crate::select::{Selected, Shutdown, select};
use crate::subscription::EventSubscription;
use crate::sync::{Counter, ThreadExclusion};
use crate::system::{SystemSubscription, TakeError};
use crate::wait::AnySubscription;
use parking_lot::Mutex;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;

/// Events that are appended at once.
const BATCH: usize = 4096;

/// A subscription from which a store takes events: one of an `EventSystem` or of a bus of events.
///
/// It should have the policy `block`, so that publishers wait for the store rather than overtake it. What
/// it misses all the same is in the log as a gap.
pub trait Source: AnySubscription + Send + Sync + 'static {
    /// Adds pending events, at most `limit`. `Ok` is false when there are none and there never will be.
    #[doc(hidden)]
    fn take(&self, events: &mut Vec<Event>, limit: usize) -> Result<bool, Lagged>;

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

    fn end(&self) {
        self.close();
    }
}

/// What both sides of an attachment know.
#[derive(Default)]
pub(super) struct Attached {
    shutdown: Shutdown,
    stored: Counter,
    missed: Counter,
    failure: OnceLock<StoreError>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Attached {
    /// Stores what is pending and ends.
    pub(super) fn detach(&self) {
        self.shutdown.set();
        if let Some(thread) = self.thread.lock().take() {
            // It panics only where the log does.
            _ = thread.join();
        }
    }
}

/// A store that takes what a bus publishes. Dropping it leaves it attached.
#[derive(Clone)]
pub struct Attachment(Arc<Attached>);

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("stored", &self.stored()).finish_non_exhaustive()
    }
}

impl Attachment {
    /// Returns how many events were appended.
    pub fn stored(&self) -> u64 {
        self.0.stored.value()
    }

    /// Returns how many events the store missed; where, the gaps in the log say.
    pub fn missed(&self) -> u64 {
        self.0.missed.value()
    }

    /// Returns why the store has detached itself, if it has.
    pub fn failure(&self) -> Option<&StoreError> {
        self.0.failure.get()
    }

    /// Stores what is pending, and ends. Whoever publishes meanwhile may be stored or not.
    pub fn detach(&self) {
        self.0.detach();
    }
}

impl EventStore {
    /// Appends what a subscription receives from now on, until it is closed or the store is. A store
    /// that fails, or has no room, detaches itself: it closes the subscription, so that no publisher
    /// waits for it, and tells `on_failure`.
    ///
    /// # Errors
    ///
    /// `Closed`; `Io` if no thread can be started.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    /// use tickbus::{Event, EventStore, EventSystem, StoreConfig};
    ///
    /// # let folder = std::env::temp_dir().join(format!("tickbus-attach-{}", std::process::id()));
    /// let (store, _) = EventStore::open(&folder, StoreConfig::default())?;
    /// let (store, system) = (Arc::new(store), EventSystem::new(Default::default())?);
    /// let attachment = store.attach(system.subscribe(Default::default())?, |error| eprintln!("{error}"))?;
    /// system.publish(Event::from_bytes([0; 32]))?;
    /// attachment.detach();
    /// assert_eq!(attachment.stored(), 1);
    /// store.close()?;
    /// # std::fs::remove_dir_all(&folder).ok();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn attach(
        self: &Arc<Self>,
        source: impl Source,
        on_failure: impl FnOnce(&StoreError) + Send + 'static,
    ) -> Result<Attachment, StoreError> {
        let attached = Arc::new(Attached::default());
        let (store, shared) = (Arc::downgrade(self), attached.clone());
        let run = move || {
            if let Err(error) = run(&store, &source, &shared) {
                source.end();
                on_failure(&error);
                _ = shared.failure.set(error);
            } else {
                source.end();
            }
        };
        let thread = std::thread::Builder::new().name("tickbus-attach".to_owned()).spawn(run);
        let thread = thread.map_err(StoreError::io("starting", "a thread"))?;
        *attached.thread.lock() = Some(thread);
        self.remember(&attached)?;
        Ok(Attachment(attached))
    }
}

/// Appends until the subscription ends or is told to.
fn run(
    store: &Weak<EventStore>,
    source: &impl Source,
    attached: &Attached,
) -> Result<(), StoreError> {
    let mut events = Vec::with_capacity(BATCH);
    let mut is_ending = false;
    loop {
        events.clear();
        let taken = source.take(&mut events, BATCH);
        let Some(store) = store.upgrade() else { return Ok(()) };
        if !events.is_empty() {
            store.append(&events)?;
            attached.stored.add_exclusive(events.len() as u64);
        }
        match taken {
            Err(Lagged { missed, exact }) => {
                store.append_gap(missed, exact)?;
                attached.missed.add_exclusive(missed);
            }
            Ok(false) => return Ok(()),
            Ok(true) if !events.is_empty() => {}
            Ok(true) if is_ending => return Ok(()),
            Ok(true) => {
                drop(store);
                is_ending = select(&[source], Some(&attached.shutdown), None) == Selected::Shutdown;
            }
        }
    }
}
