//! Risk events: durable before `publish_critical` returns, and delivered to each consumer until that
//! acknowledges them or they are dead letters, after somebody was told.

use super::Delivery;
use super::desk::LiveEvent;
use super::entry::{ConsumerId, Entry, FailedAttempt, NOBODY};
use super::error::{DeliveryError, PublishCriticalError};
use super::group::{check_name, nanoseconds};
use super::payload::Payload;
use super::risk::{Notice, Outcome, Risk, Rules};
use super::risk_consumer::{CriticalDelivery, RiskConsumer};
use crate::error::ConfigError;
use crate::store::{EventStore, StoreError};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A clock by which retries, leases and escalations live, in nanoseconds from any start. One that
/// does not go on by itself is looked at when something happens, and by
/// [`RiskEventSystem::check_deadlines`].
#[derive(Clone)]
pub struct DeliveryClock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl DeliveryClock {
    /// Returns a clock that says what `now` returns. A step backwards is no step.
    pub fn new(now: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    pub(super) fn now(&self) -> u64 {
        (self.0)()
    }
}

impl fmt::Debug for DeliveryClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryClock").finish_non_exhaustive()
    }
}

/// How risk events are delivered.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RiskConfig {
    /// How long a consumer may have an event before that attempt has failed.
    pub lease: Duration,
    /// Attempts before an event becomes a dead letter, from 1 to 512.
    pub max_attempts: u32,
    /// The longest wait after the first attempt that failed; it doubles with each further one. The
    /// wait is drawn from 0 to that.
    pub retry_base: Duration,
    /// The longest wait after any attempt.
    pub retry_cap: Duration,
    /// An event that a consumer has not acknowledged at this age is escalated, and again so long after
    /// a restart.
    pub escalate_after: Duration,
    /// Events that a consumer may have at a time.
    pub max_in_flight: usize,
    /// What waits are drawn from; `None` is another one each time.
    pub seed: Option<u64>,
    /// What tells the time; `None` is the system's monotonic clock.
    pub clock: Option<DeliveryClock>,
}

impl Default for RiskConfig {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(30),
            max_attempts: 10,
            retry_base: Duration::from_millis(100),
            retry_cap: Duration::from_secs(30),
            escalate_after: Duration::from_secs(5),
            max_in_flight: 1_000,
            seed: None,
            clock: None,
        }
    }
}

/// The most bytes of a key.
const MAX_KEY: usize = 1024;
/// So many that the history of an event fits into an entry of the ledger.
const MAX_ATTEMPTS: u32 = 512;

impl RiskConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.lease.is_zero() {
            return Err(ConfigError::new("the lease was 0; it must be longer"));
        }
        if !(1..=MAX_ATTEMPTS).contains(&self.max_attempts) {
            return Err(ConfigError::new(format!(
                "max_attempts was {}; it must be from 1 to {MAX_ATTEMPTS}",
                self.max_attempts
            )));
        }
        if self.retry_cap < self.retry_base {
            return Err(ConfigError::new(format!(
                "retry_cap was {:?}; it must be at least retry_base, {:?}",
                self.retry_cap, self.retry_base
            )));
        }
        if self.max_in_flight == 0 {
            return Err(ConfigError::new("max_in_flight was 0; it must be at least 1"));
        }
        Ok(())
    }

    fn rules(&self) -> Rules {
        Rules {
            lease: nanoseconds(self.lease),
            max_attempts: self.max_attempts,
            retry_base: nanoseconds(self.retry_base),
            retry_cap: nanoseconds(self.retry_cap),
            escalate_after: nanoseconds(self.escalate_after),
            max_in_flight: self.max_in_flight,
        }
    }
}

/// An event that a consumer gets no more, unless it is told to be delivered again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The event: its sequence in the log, which keeps it.
    pub id: u64,
    /// The consumer; `None` if there was none when the event was published.
    pub consumer: Option<Arc<str>>,
    /// Its key.
    pub key: Option<Arc<str>>,
    /// Why.
    pub reason: Arc<str>,
    /// The attempts that failed, in order.
    pub attempts: Vec<FailedAttempt>,
}

/// Numbers of a consumer at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerStats {
    /// Its name.
    pub name: Arc<str>,
    /// Events of a key wait for one another.
    pub is_ordered: bool,
    /// Events that it has not acknowledged, those in flight included.
    pub pending: usize,
    /// Events that it has been given.
    pub in_flight: usize,
}

/// Numbers of a risk system at one moment, since it was opened unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RiskStats {
    /// Events.
    pub published: u64,
    /// Acknowledgments.
    pub acked: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Escalations.
    pub escalated: u64,
    /// Events that became dead letters.
    pub dead_lettered: u64,
    /// How often a consumer had as many events as it may, and more were there.
    pub limited: u64,
    /// Events that the log refused, so that they were delivered live.
    pub refused: u64,
    /// Dead letters that there are now.
    pub dead_letters: usize,
    /// A row for each consumer.
    pub consumers: Vec<ConsumerStats>,
}

/// Delivers events that nobody may miss.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use tickbus::{Event, EventStore, Payload, RiskConfig, RiskEventSystem, StoreConfig};
///
/// # let folder = std::env::temp_dir().join(format!("tickbus-risk-{}", std::process::id()));
/// let (store, _) = EventStore::open(&folder, StoreConfig::default())?;
/// let store = Arc::new(store);
/// let risk = RiskEventSystem::new(&store, RiskConfig::default())?;
/// let limits = risk.register("limits", true)?;
/// let id = risk.publish_critical(Payload::Event(Event::from_bytes([0; 32])), Some("account 7"))?;
/// if let Some(delivery) = limits.take(None)? {
///     limits.ack(delivery.token)?; // durable
/// }
/// assert_eq!(risk.wait_ack(id, None)?, Some(true));
/// # risk.close();
/// # store.close()?;
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RiskEventSystem {
    store: Arc<EventStore>,
    delivery: Arc<Delivery>,
    /// The log may have another one once this one is closed.
    life: u64,
    handlers: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for RiskEventSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RiskEventSystem").field("store", &self.store).finish_non_exhaustive()
    }
}

impl RiskEventSystem {
    /// Begins to deliver the risk events of a log: those too that consumers had not acknowledged when
    /// it was closed, or its process ended.
    ///
    /// # Errors
    ///
    /// `Config` if a setting cannot be kept, or the log has a risk system already; otherwise as
    /// [`EventStore::sync`].
    pub fn new(store: &Arc<EventStore>, config: RiskConfig) -> Result<Self, StoreError> {
        config.check()?;
        let delivery = store.delivery()?;
        let seed = config.seed.unwrap_or_else(|| {
            let random = std::hash::BuildHasher::hash_one(
                &std::collections::hash_map::RandomState::new(),
                store.path(),
            );
            random ^ delivery.real_times().wall
        });
        let clock = config.clock.clone();
        let now = clock.as_ref().map_or_else(|| delivery.real_times().real, DeliveryClock::now);
        let life = {
            let mut books = delivery.desk.books();
            books.check()?;
            if books.risk.is_running() {
                return Err(ConfigError::new(
                    "the log has a risk system already; use that one, or close it first",
                )
                .into());
            }
            let life = books.start_risk(config.rules(), seed, now, clock.is_none());
            *delivery.clock.write() = clock;
            delivery.desk.tell(&mut books);
            life
        };
        let handlers = Mutex::default();
        Ok(Self { store: store.clone(), delivery, life, handlers })
    }

    /// Publishes an event: it is in the log, and delivered from now on to each consumer that is
    /// registered. Returns its id, its sequence in the log, once that is durable.
    ///
    /// # Errors
    ///
    /// It is not durable; where the log has no room or has failed, the consumers of this process get it
    /// all the same, once. `Config` if a replay has published it, which makes nobody act.
    pub fn publish_critical(
        &self,
        event: Payload,
        key: Option<&str>,
    ) -> Result<u64, PublishCriticalError> {
        let event: LiveEvent = (Arc::new(event), key.map(Arc::from));
        let publish = || {
            self.check(&event.0, key)?;
            let hold = self.store.hold(self.store.next_sequence());
            let ticket = self.store.append_many_durable(&[event.0.record()]);
            let id = ticket.map_err(|refused| refused.error)?.wait()?;
            let end = self.note(id, &event)?;
            drop(hold);
            self.delivery.desk.commit(end)?;
            Ok(id)
        };
        publish().map_err(|error| self.deliver_live(error, &event))
    }

    /// As [`RiskEventSystem::publish_critical`], in a task. Cancelled in the middle, the event may be
    /// delivered or not.
    ///
    /// # Errors
    ///
    /// As [`RiskEventSystem::publish_critical`].
    pub async fn publish_critical_async(
        &self,
        event: Payload,
        key: Option<&str>,
    ) -> Result<u64, PublishCriticalError> {
        let event: LiveEvent = (Arc::new(event), key.map(Arc::from));
        let publish = async {
            self.check(&event.0, key)?;
            let hold = self.store.hold(self.store.next_sequence());
            let ticket = self.store.append_many_durable(&[event.0.record()]);
            let id = ticket.map_err(|refused| refused.error)?.wait_async().await?;
            let end = self.note(id, &event)?;
            drop(hold);
            self.delivery.desk.commit_async(end).await?;
            Ok(id)
        };
        publish.await.map_err(|error| self.deliver_live(error, &event))
    }

    fn check(&self, event: &Payload, key: Option<&str>) -> Result<(), StoreError> {
        if !self.delivery.desk.books().risk.is_in(self.life) {
            return Err(StoreError::Closed);
        }
        if let Payload::Event(event) = event
            && event.is_replayed()
        {
            return Err(ConfigError::new(
                "the event was published by a replay; a risk event is about what happens now: \
                 publish a new one",
            )
            .into());
        }
        match key.map_or(0, str::len) {
            0..=MAX_KEY => Ok(()),
            bytes => Err(ConfigError::new(format!(
                "the key had {bytes} bytes; it must have at most {MAX_KEY}"
            ))
            .into()),
        }
    }

    /// Notes an event that is in the log, and returns what has to be committed.
    fn note(&self, id: u64, event: &LiveEvent) -> Result<u64, StoreError> {
        let desk = &self.delivery.desk;
        let noted = desk.decide::<_, StoreError>(self.delivery.times(), |books| {
            books.keep(id, Some(event.0.clone()));
            Ok((books.risk.publish(id, event.1.clone()), ()))
        });
        let (_, end) = noted.inspect_err(|_| desk.books().forget(id))?;
        Ok(end)
    }

    fn deliver_live(&self, error: StoreError, event: &LiveEvent) -> PublishCriticalError {
        let is_refused = !matches!(error, StoreError::Config(_) | StoreError::Closed);
        let delivered_live = match is_refused {
            true => {
                let mut books = self.delivery.desk.books();
                books.risk.numbers.refused += 1;
                let consumers = books.deliver_live(event);
                self.delivery.desk.tell(&mut books);
                consumers
            }
            false => 0,
        };
        PublishCriticalError { error, delivered_live }
    }

    /// Registers a consumer durably: it gets each event that is published from now on, and what it has
    /// not acknowledged since it was registered first. `is_ordered` has each event of a key wait
    /// until the one before is acknowledged, or a dead letter.
    ///
    /// # Errors
    ///
    /// `Config` if nothing can be named so; otherwise as [`EventStore::sync`].
    pub fn register(&self, name: &str, is_ordered: bool) -> Result<RiskConsumer, StoreError> {
        check_name("consumer", name)?;
        let desk = &self.delivery.desk;
        let (id, end) = desk.decide::<_, StoreError>(self.delivery.times(), |books| {
            if !books.risk.is_in(self.life) {
                return Err(StoreError::Closed);
            }
            let (id, entry) = books.risk.register(name, is_ordered);
            Ok((entry.into_iter().collect(), id))
        })?;
        desk.commit(end)?;
        Ok(RiskConsumer::new(&self.delivery, self.life, id, name))
    }

    /// As [`RiskEventSystem::register`], with a thread that calls `handler` with each event: `Ok`
    /// acknowledges it, an error or a panic is a failure with that reason.
    ///
    /// # Errors
    ///
    /// As [`RiskEventSystem::register`]; `Io` if no thread can be started.
    pub fn register_handler(
        &self,
        name: &str,
        is_ordered: bool,
        handler: impl Fn(&CriticalDelivery) -> Result<(), String> + Send + 'static,
    ) -> Result<(), StoreError> {
        let consumer = self.register(name, is_ordered)?;
        let run = move || consumer.run(&handler);
        let thread = std::thread::Builder::new().name("tickbus-risk".to_owned()).spawn(run);
        let thread = thread.map_err(StoreError::io("starting", "a thread"))?;
        self.handlers.lock().push(thread);
        Ok(())
    }

    /// Removes a consumer durably: what it has not acknowledged becomes dead letters. Returns whether
    /// there was one.
    ///
    /// # Errors
    ///
    /// As [`EventStore::sync`].
    pub fn unregister(&self, name: &str) -> Result<bool, StoreError> {
        let desk = &self.delivery.desk;
        let (is_there, end) = desk.decide::<_, StoreError>(self.delivery.times(), |books| {
            let consumer = books.risk.id(name);
            let entries = consumer.map(|consumer| books.risk.remove(consumer));
            Ok((entries.unwrap_or_default(), consumer.is_some()))
        })?;
        desk.commit(end)?;
        Ok(is_there)
    }

    /// Waits until each consumer has acknowledged an event durably: true; false if it is a dead letter
    /// of one of them and nobody gets it any more; `None` once the deadline has passed.
    ///
    /// # Errors
    ///
    /// `Unknown` if no such event was published; `Store`.
    pub fn wait_ack(
        &self,
        id: u64,
        deadline: Option<Instant>,
    ) -> Result<Option<bool>, DeliveryError> {
        let found = self.delivery.desk.wait(deadline, || self.outcome(id))?;
        let Some((is_acked, end)) = found else { return Ok(None) };
        self.delivery.desk.commit(end)?;
        Ok(Some(is_acked))
    }

    /// As [`RiskEventSystem::wait_ack`], in a task, without a deadline.
    ///
    /// # Errors
    ///
    /// As [`RiskEventSystem::wait_ack`].
    pub async fn wait_ack_async(&self, id: u64) -> Result<bool, DeliveryError> {
        let (is_acked, end) = self.delivery.desk.wait_async(|| self.outcome(id)).await?;
        self.delivery.desk.commit_async(end).await?;
        Ok(is_acked)
    }

    /// Returns whether an event was acknowledged, and what has to be committed before it is said.
    fn outcome(&self, id: u64) -> Result<Option<(bool, u64)>, DeliveryError> {
        let books = self.delivery.desk.books();
        books.check()?;
        match books.risk.outcome(id) {
            Outcome::Pending(_) if books.risk.is_in(self.life) => Ok(None),
            Outcome::Pending(_) => Err(StoreError::Closed.into()),
            Outcome::Acked => Ok(Some((true, books.end()))),
            Outcome::Dead => Ok(Some((false, books.end()))),
            Outcome::Unknown => Err(DeliveryError::Unknown { what: "risk event", id }),
        }
    }

    /// Returns how often an event was tried by the consumer that tried it most; `None` if none waits
    /// for it.
    pub fn attempts(&self, id: u64) -> Option<u32> {
        match self.delivery.desk.books().risk.outcome(id) {
            Outcome::Pending(attempts) => Some(attempts),
            _ => None,
        }
    }

    /// Waits for something that somebody has to be told; `None` once the deadline has passed. Each
    /// notice is given to one caller.
    ///
    /// # Errors
    ///
    /// `Closed` once the system is, and all was told.
    pub fn next_notice(&self, deadline: Option<Instant>) -> Result<Option<Notice>, StoreError> {
        self.delivery.desk.wait(deadline, || {
            let mut books = self.delivery.desk.books();
            if books.risk.is_past(self.life) {
                // What there is to be told is another one's.
                return Err(StoreError::Closed);
            }
            match books.risk.notices.pop_front() {
                Some(notice) => Ok(Some(notice)),
                None if books.risk.is_running() => books.check().map(|()| None),
                None => Err(StoreError::Closed),
            }
        })
    }

    /// Returns the dead letters, in the order of their events.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        let books = self.delivery.desk.books();
        let letters = books.risk.letters().map(|(id, consumer, letter)| DeadLetter {
            id,
            consumer: books.risk.name(consumer),
            key: letter.key.clone(),
            reason: letter.reason.clone(),
            attempts: letter.history.clone(),
        });
        letters.collect()
    }

    /// Has a dead letter be delivered again, as if it was published now: to its consumer, or to each
    /// one if it has none (`None`).
    ///
    /// # Errors
    ///
    /// `Unknown` if there is no such dead letter; `Store`: `Config` if there is no consumer to get it.
    pub fn redeliver(&self, id: u64, consumer: Option<&str>) -> Result<(), DeliveryError> {
        self.settle_letter(id, consumer, |risk, consumer| risk.redeliver(consumer, id))
    }

    /// Drops a dead letter durably: nobody gets its event, and the log may lose it.
    ///
    /// # Errors
    ///
    /// `Unknown` if there is no such dead letter; `Store`.
    pub fn discard(&self, id: u64, consumer: Option<&str>) -> Result<(), DeliveryError> {
        self.settle_letter(id, consumer, |risk, consumer| risk.discard(consumer, id))
    }

    fn settle_letter(
        &self,
        id: u64,
        consumer: Option<&str>,
        decide: impl FnOnce(&Risk, ConsumerId) -> Option<Entry>,
    ) -> Result<(), DeliveryError> {
        let desk = &self.delivery.desk;
        let unknown = || DeliveryError::Unknown { what: "dead letter", id };
        let (_, end) = desk.decide::<_, DeliveryError>(self.delivery.times(), |books| {
            let named = |name| {
                // A consumer of this name that is gone may have some too.
                let mut of_letter = books.risk.letters().filter(|(of, ..)| *of == id);
                of_letter
                    .find(|(_, consumer, _)| books.risk.name(*consumer).as_deref() == Some(name))
            };
            let consumer = match consumer {
                Some(name) => named(name).map(|(_, consumer, _)| consumer).ok_or_else(unknown)?,
                None => NOBODY,
            };
            if !books.risk.letters().any(|(of, its, _)| (of, its) == (id, consumer)) {
                return Err(unknown());
            }
            let entry = decide(&books.risk, consumer).ok_or_else(|| {
                StoreError::from(ConfigError::new(format!(
                    "nobody is registered to get dead letter {id}; register a consumer first"
                )))
            })?;
            Ok((vec![entry], ()))
        })?;
        Ok(desk.commit(end)?)
    }

    /// Returns an event that the log has.
    ///
    /// # Errors
    ///
    /// `Unknown` if it has none of this id any more; `Store`.
    pub fn event(&self, id: u64) -> Result<Arc<Payload>, DeliveryError> {
        self.delivery.event(id, &Mutex::default())
    }

    /// Does what is due by now. Only a clock of one's own needs it, after it has advanced.
    pub fn check_deadlines(&self) {
        self.delivery.desk.pass(self.delivery.times());
    }

    /// Returns the numbers of this moment.
    pub fn stats(&self) -> RiskStats {
        let books = self.delivery.desk.books();
        let numbers = books.risk.numbers;
        let consumers = books.risk.consumers().map(|(_, consumer)| ConsumerStats {
            name: consumer.name.clone(),
            is_ordered: consumer.is_ordered,
            pending: consumer.pending(),
            in_flight: consumer.in_flight(),
        });
        RiskStats {
            published: numbers.published,
            acked: numbers.acked,
            failed: numbers.failed,
            escalated: numbers.escalated,
            dead_lettered: numbers.dead_lettered,
            limited: numbers.limited,
            refused: numbers.refused,
            dead_letters: books.risk.letters().count(),
            consumers: consumers.collect(),
        }
    }

    /// Ends delivery in this process, after handlers have returned: all that wait get `Closed`, and what
    /// is not acknowledged is delivered when the log has a risk system again. Closing again does
    /// nothing.
    pub fn close(&self) {
        {
            let mut books = self.delivery.desk.books();
            books.risk.stop(self.life);
            self.delivery.desk.tell(&mut books);
        }
        for handler in std::mem::take(&mut *self.handlers.lock()) {
            if handler.thread().id() != std::thread::current().id() {
                // Panics of handlers were caught.
                _ = handler.join();
            }
        }
    }

    /// Returns whether it was closed, or its log was.
    pub fn is_closed(&self) -> bool {
        let books = self.delivery.desk.books();
        books.is_closed || !books.risk.is_in(self.life)
    }
}

impl Drop for RiskEventSystem {
    /// As [`RiskEventSystem::close`].
    fn drop(&mut self) {
        self.close();
    }
}
