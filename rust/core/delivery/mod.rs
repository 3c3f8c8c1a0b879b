//! Delivery: what was read of a log, and which risk event was acknowledged, whatever happens to the
//! process.
//!
//! ```text
//!  Group, RiskEventSystem ─► Desk ─► Groups, Risk     decided: no clock, no disk
//!                             │
//!                             └────► Ledger ─► Log    written: the log of the folder `groups`
//! ```
//!
//! The ledger is a log like any other, in a folder inside the log's own, so that what users store,
//! replay and compare stays free of it. `model.rs` plays histories with crashes over the same code.

mod desk;
mod entry;
mod error;
mod group;
mod groups;
mod ledger;
#[cfg(test)]
mod model;
mod mutants;
mod payload;
mod risk;
mod risk_consumer;
mod risk_system;

pub use entry::FailedAttempt;
#[cfg(tickbus_fuzz)]
pub use entry::{look_at_any_entry, real_entries};
pub use error::{DeliveryError, PublishCriticalError};
pub use group::{Group, GroupBatch, GroupConfig, GroupStart, GroupStats};
pub use payload::{Payload, StoredObject};
pub use risk::Notice;
pub use risk_consumer::{CriticalDelivery, RiskConsumer, Token};
pub use risk_system::{
    ConsumerStats, DeadLetter, DeliveryClock, RiskConfig, RiskEventSystem, RiskStats,
};

use crate::store::{
    Directory, Durability, EventStore, Recovery, StoreConfig, StoreError, Tenant, oldest,
};
use desk::{Desk, Times};
use ledger::Ledger;
use parking_lot::{Mutex, RwLock};
use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// The folder of the ledger in that of its log.
const FOLDER: &str = "groups";
/// Bytes of a segment of the ledger.
const LEDGER_SEGMENT: u64 = 1 << 20;

/// The delivery of a log in this process.
pub(crate) struct Delivery {
    desk: Desk<Directory>,
    /// The log of decisions.
    ledger: EventStore,
    /// Where the log itself is read.
    storage: Arc<Directory>,
    began: Instant,
    /// The risk system's own clock, if it has one.
    clock: RwLock<Option<DeliveryClock>>,
    timer: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("ledger", &self.ledger).finish_non_exhaustive()
    }
}

impl EventStore {
    /// Opens or creates the log in a folder for writing, after it has recovered what was there. What
    /// groups and risk consumers have not read stays in it from now on.
    ///
    /// # Errors
    ///
    /// `Corrupt` if something that was acknowledged is damaged, `AlreadyOpen` if another one writes
    /// it, `ReadOnly` if it may not be written, `Version`, `Config`, `Io`.
    pub fn open(
        path: impl AsRef<Path>,
        config: StoreConfig,
    ) -> Result<(Self, Recovery), StoreError> {
        let path = path.as_ref();
        let (store, recovery) = Self::open_alone(path, config)?;
        if path.join(FOLDER).is_dir() {
            store.delivery()?;
        }
        Ok((store, recovery))
    }

    /// Returns the delivery of this log, begun by who asks first.
    pub(crate) fn delivery(&self) -> Result<Arc<Delivery>, StoreError> {
        self.check()?;
        let make = || Delivery::open(self).map(|delivery| delivery as Arc<dyn Tenant>);
        let tenant = self.committed().tenancy().get_or_make(make)?;
        tenant.durable(self.committed().durable());
        // Whoever closed the log meanwhile may not have seen it.
        self.check().inspect_err(|_| tenant.close())?;
        let Ok(delivery) = tenant.as_any().downcast() else { unreachable!("there is no other") };
        Ok(delivery)
    }
}

impl Delivery {
    fn open(store: &EventStore) -> Result<Arc<Self>, StoreError> {
        let path = store.path().join(FOLDER);
        let mut config = StoreConfig::default();
        (config.durability, config.segment_bytes) = (Durability::Group, LEDGER_SEGMENT);
        let (ledger, _) = EventStore::open_alone(&path, config)?;
        let committed = ledger.committed().clone();
        let holds = Some(store.holds().clone());
        let began = Instant::now();
        let times = Times { real: 0, risk: 0, wall: wall() };
        let desk = Desk::open(committed.clone(), Ledger::new(committed), holds, times)?;
        let delivery = Arc::new(Self {
            desk,
            ledger,
            storage: store.committed().log().storage().clone(),
            began,
            clock: RwLock::default(),
            timer: Mutex::default(),
        });
        let timed = delivery.clone();
        let run = move || {
            let at = |time| timed.began.checked_add(Duration::from_nanos(time));
            // A time that far away never comes.
            let never = || Instant::now() + Duration::from_secs(1 << 30);
            timed.desk.run(|| timed.real_times(), |time| at(time).unwrap_or_else(never));
        };
        let thread = std::thread::Builder::new().name("tickbus-delivery".to_owned()).spawn(run);
        *delivery.timer.lock() = Some(thread.map_err(StoreError::io("starting", "a thread"))?);
        Ok(delivery)
    }

    /// Returns the oldest sequence that the log has.
    fn oldest(&self) -> Result<u64, StoreError> {
        oldest(&*self.storage)
    }

    /// Returns the time; a clock of the user's is asked.
    fn times(&self) -> Times {
        let clock = self.clock.read().clone();
        let real = self.real_times();
        clock.map_or(real, |clock| Times { risk: clock.now(), ..real })
    }

    /// As `times`, with the risk system's time left as it is if it has a clock of its own.
    fn real_times(&self) -> Times {
        let real = self.began.elapsed().as_nanos() as u64;
        let risk = if self.clock.read().is_some() { 0 } else { real };
        Times { real, risk, wall: wall() }
    }
}

/// Returns nanoseconds since the Unix epoch.
fn wall() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

impl Tenant for Delivery {
    fn durable(&self, upto: u64) {
        let mut books = self.desk.books();
        if books.durable < upto {
            books.durable = upto;
            if books.groups.all().next().is_some() {
                self.desk.tell(&mut books);
            }
        }
    }

    fn close(&self) {
        self.desk.close();
        let timer = self.timer.lock().take();
        if let Some(timer) = timer {
            // It panics only where a decision does, which whoever asks next sees.
            _ = timer.join();
        }
        // What nobody was told of need not be there.
        _ = self.ledger.close();
    }

    fn leave_to_parent(&self) {
        self.ledger.leave_to_parent();
        if let Some(mut timer) = self.timer.try_lock() {
            // The thread is the parent's.
            std::mem::forget(timer.take());
        }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}
