//! `EventSystem`: compact events in three lanes, of which the urgent ones overtake.
//!
//! ```text
//!  publish ─► lane by type and priority ─┬─ Critical: a channel for each subscription, at once ─┐
//!             topic by type and symbol   ├─ High: a ring, overwrites the oldest ────────────────┼─► recv
//!                                        └─ Normal: a ring, overwrites the oldest ──────────────┘
//! ```
//!
//! Each lane is a bus, and a subscription is one in each of them, with one bell for all three. It
//! takes what is critical first, then what is high, then the rest; inside a lane events come in the
//! order in which they were published. Lanes order, number and lag separately.

mod overflow;
mod subscription;
mod topics;

pub use overflow::{CriticalOverflow, CriticalPublication};
pub use subscription::{LaneLagged, SystemStream, SystemSubscription, TakeError};

use crate::bus::replaying::Replaying;
use crate::bus::{Backend, Bus, BusConfig, Joint, Patience, SubscribeError, SubscribeOptions};
use crate::error::{ConfigError, ReplayRefused};
use crate::event::{Event, Lane};
use crate::event_type::EventType;
use crate::metrics::EventBusMetrics;
use crate::names::Symbol;
use crate::policy::{BackpressureConfig, OnLag, Policy};
use crate::ring::BATCH;
use crate::sync::{Flag, ThreadMutex};
use crate::topic::{NO_TOPIC, Pattern, Topic};
use crate::wait::{Calls, Dormitory, breathe, park_on};
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use topics::Topics;

/// What an event system is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventSystemConfig {
    /// The most critical events that a subscription holds; rounded up to a power of two.
    pub critical_capacity: usize,
    /// The most high events that the ring for all subscriptions holds; rounded up to a power of two.
    pub high_capacity: usize,
    /// The most normal events that the ring for all subscriptions holds; rounded up to a power of
    /// two.
    pub normal_capacity: usize,
    /// The longest time that one call of `publish` waits for room for critical events.
    pub max_block_duration: Duration,
    /// The most pairs of type and symbol that the system will know.
    pub max_topics: usize,
    /// As [`BusConfig::latency_sampling`].
    pub latency_sampling: Option<u32>,
}

impl Default for EventSystemConfig {
    fn default() -> Self {
        let BusConfig { backpressure, max_topics, latency_sampling, .. } = BusConfig::default();
        Self {
            critical_capacity: 1_024,
            high_capacity: 8_192,
            normal_capacity: 65_536,
            max_block_duration: backpressure.max_block_duration,
            max_topics,
            latency_sampling,
        }
    }
}

/// What a subscription of an event system asks for. An event is wanted if it meets each list that
/// is not empty, by any item of it. With all lists empty everything is wanted; otherwise events
/// whose type or symbol has no name are not.
#[derive(Debug, Clone, Default)]
pub struct SystemSubscribeOptions {
    /// The types it wants.
    pub types: Vec<EventType>,
    /// The topics it wants, as in `price_update.*`.
    pub topics: Vec<Pattern>,
    /// The symbols it wants.
    pub symbols: Vec<Symbol>,
    /// What metrics call it, unique among the subscriptions of the system.
    pub name: Option<String>,
    /// What its reader is told about missed events.
    pub on_lag: OnLag,
}

impl SystemSubscribeOptions {
    /// Returns the pattern over derived topics that says the same.
    fn pattern(&self) -> Result<Option<Pattern>, ConfigError> {
        let mut kinds = Vec::new();
        if !self.types.is_empty() {
            let mut types = Vec::with_capacity(2 * self.types.len());
            for &event_type in &self.types {
                let Some(name) = event_type.name() else {
                    return Err(nameless("types", &event_type, "EventType::register()"));
                };
                types.push(Pattern::new(name)?);
                types.push(Pattern::new(&format!("{name}.>"))?);
            }
            kinds.push(Pattern::any_of(types));
        }
        if !self.topics.is_empty() {
            kinds.push(Pattern::any_of(self.topics.iter().cloned()));
        }
        if !self.symbols.is_empty() {
            let mut symbols = Vec::with_capacity(self.symbols.len());
            for &symbol in &self.symbols {
                let Some(name) = symbol.name() else {
                    return Err(nameless("symbols", &symbol, "Symbol::new()"));
                };
                symbols.push(Pattern::new(&format!("*.{name}"))?);
            }
            kinds.push(Pattern::any_of(symbols));
        }
        Ok((!kinds.is_empty()).then(|| Pattern::all_of(kinds)))
    }
}

#[cold]
fn nameless(list: &str, item: &dyn fmt::Debug, instead: &str) -> ConfigError {
    ConfigError::new(format!(
        "{list} had {item:?}, which has no name in this process; give it one first by {instead}"
    ))
}

/// Why an event was not published, or not to all.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SystemError {
    /// Some subscriptions miss a critical event; the others have it.
    #[error(transparent)]
    Overflow(#[from] CriticalOverflow),
    /// The system is closed; nobody has the event.
    #[error("the event system is closed; events can be published only before close()")]
    Closed(Event),
    /// The system knows too many pairs of type and symbol; nobody has the event.
    #[error("{error}")]
    TooManyTopics {
        /// The event, given back.
        event: Event,
        /// How many there are.
        error: ConfigError,
    },
}

/// Where a batch stopped: the first `accepted` events were published to all who want them.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{accepted} events were published, then: {error}")]
pub struct SystemBatchError {
    /// How many events were published to all who want them.
    pub accepted: usize,
    /// What happened to the next one.
    pub error: SystemError,
}

/// The numbers of an event system, a bus for each lane. A subscription has a row with the same id in
/// each of them.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EventSystemMetrics {
    /// Those of the critical lane.
    pub critical: EventBusMetrics,
    /// Those of the high lane.
    pub high: EventBusMetrics,
    /// Those of the normal lane.
    pub normal: EventBusMetrics,
}

impl EventSystemMetrics {
    /// Returns the numbers of a lane.
    pub fn lane(&self, lane: Lane) -> &EventBusMetrics {
        match lane {
            Lane::Critical => &self.critical,
            Lane::High => &self.high,
            Lane::Normal => &self.normal,
        }
    }
}

type OverflowHandler = dyn Fn(CriticalOverflow) -> Result<usize, CriticalOverflow> + Send + Sync;

/// Carries compact events in three lanes. The handle is cheap to clone, and dropping the last one
/// closes the system.
///
/// A critical event (its type is 128 or above, or its priority is critical) goes at once to every
/// subscription with room. For the others the publisher waits at most `max_block_duration`; those
/// that then still have no room are named by a [`CriticalOverflow`] and told where they miss it.
/// High and normal events never wait: a subscription that stands a whole ring behind loses its
/// oldest ones of that lane, and is told how many.
///
/// ```
/// use tickbus::{Event, EventSystem, EventType, Symbol, SystemSubscribeOptions};
/// # use tickbus::{Priority, SourceId};
/// # fn event(event_type: EventType, symbol: Symbol) -> Event {
/// #     let (priority, source_id) = (Priority::Normal, SourceId::NONE);
/// #     Event { timestamp: 0, event_type, priority, source_id, symbol, value: 0.0, metadata: 0 }
/// # }
///
/// let system = EventSystem::new(Default::default())?;
/// let btc = Symbol::new("BTCUSDT")?;
/// let all = system.subscribe(SystemSubscribeOptions::default())?;
/// let prices = system.subscribe(SystemSubscribeOptions {
///     types: vec![EventType::PriceUpdate],
///     symbols: vec![btc],
///     ..Default::default()
/// })?;
/// assert_eq!(system.publish(event(EventType::PriceUpdate, btc))?, 2);
/// assert_eq!(system.publish(event(EventType::EmergencyStop, Symbol::NONE))?, 1);
/// // What is critical overtakes.
/// assert_eq!(all.recv()?.event_type, EventType::EmergencyStop);
/// assert_eq!(all.recv()?.event_type, EventType::PriceUpdate);
/// assert_eq!(prices.recv()?.symbol, btc);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct EventSystem {
    inner: Arc<Inner>,
}

struct Inner {
    /// In the order of [`Lane::ALL`].
    lanes: [Bus<Event>; 3],
    /// Where the readers of all lanes sleep.
    dormitory: Arc<Dormitory>,
    topics: Topics,
    max_block_duration: Duration,
    /// Held while a subscription joins the lanes: the next one's id.
    joining: ThreadMutex<u64>,
    on_overflow: ThreadMutex<Option<Arc<OverflowHandler>>>,
    ending: Arc<Ending>,
    replaying: Replaying,
}

/// Whether somebody waits for readers to come to the end.
#[derive(Debug, Default)]
struct Ending {
    is_awaited: Flag,
    read: Notify,
}

impl Ending {
    /// Tells who waits that something was read, or will not be.
    #[inline]
    fn tell(&self) {
        // ORDERING: the flag is set before what is pending is counted, under the lock under which
        // the caller has just taken something: if it was not counted as taken, it is seen here.
        if self.is_awaited.is_set() {
            self.read.notify_waiters();
        }
    }
}

/// A handle that does not keep the system open.
#[derive(Clone)]
pub struct WeakEventSystem(Weak<Inner>);

impl fmt::Debug for WeakEventSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakEventSystem").field("is_alive", &self.is_alive()).finish()
    }
}

impl WeakEventSystem {
    /// Returns the system, unless its last handle was dropped.
    pub fn upgrade(&self) -> Option<EventSystem> {
        self.0.upgrade().map(|inner| EventSystem { inner })
    }

    /// Returns whether the system has a handle.
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl fmt::Debug for EventSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSystem")
            .field("total_events", &self.total_events())
            .field("is_closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

impl EventSystem {
    /// Returns a system without subscriptions.
    ///
    /// # Errors
    ///
    /// `ConfigError` if a number is zero or too large.
    pub fn new(config: EventSystemConfig) -> Result<Self, ConfigError> {
        let dormitory = Arc::new(Dormitory::new(Calls::Once));
        let bus = |lane: Lane, backend, capacity| {
            let backpressure = BackpressureConfig {
                drop_oldest: lane != Lane::Critical,
                warn_threshold: None,
                max_block_duration: config.max_block_duration,
            };
            let EventSystemConfig { max_topics, latency_sampling, .. } = config;
            let keep_last = None;
            Bus::beside(
                dormitory.clone(),
                backend,
                BusConfig {
                    capacity,
                    backpressure,
                    max_topics,
                    keep_last,
                    latency_sampling,
                    ..BusConfig::default()
                },
            )
            .map_err(|error| ConfigError::new(format!("{}_{error}", lane.name())))
        };
        let inner = Inner {
            lanes: [
                bus(Lane::Critical, Backend::LockFree, config.critical_capacity)?,
                bus(Lane::High, Backend::Ring, config.high_capacity)?,
                bus(Lane::Normal, Backend::Ring, config.normal_capacity)?,
            ],
            dormitory,
            topics: Topics::new(),
            max_block_duration: config.max_block_duration,
            joining: ThreadMutex::new(0),
            on_overflow: ThreadMutex::new(None),
            ending: Arc::default(),
            replaying: Replaying::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns a handle that does not keep the system open.
    pub fn downgrade(&self) -> WeakEventSystem {
        WeakEventSystem(Arc::downgrade(&self.inner))
    }

    fn lane(&self, lane: Lane) -> &Bus<Event> {
        &self.inner.lanes[lane as usize]
    }

    #[inline]
    fn topic(&self, event: &Event, lane: Lane) -> Result<Option<&Topic>, SystemError> {
        match self.inner.topics.of(event, &self.inner.lanes) {
            Ok(topics) => Ok(topics.map(|topics| &topics[lane as usize])),
            Err(error) => Err(SystemError::TooManyTopics { event: *event, error }),
        }
    }

    /// Publishes an event and returns how many subscriptions took it. For a critical one it waits
    /// at most `max_block_duration` for those without room.
    ///
    /// # Errors
    ///
    /// [`SystemError`]: but for an `Overflow`, nobody has the event.
    #[inline]
    pub fn publish(&self, event: Event) -> Result<usize, SystemError> {
        match self.publish_ready(event)? {
            Some(taken) => Ok(taken),
            None => {
                let patience = self.inner.max_block_duration;
                self.publish_waiting(event, || Instant::now().checked_add(patience))
            }
        }
    }

    /// Publishes an event if that decides nothing: it is not critical, or all who want it have
    /// room. `None` has published nothing.
    ///
    /// # Errors
    ///
    /// As [`EventSystem::publish`].
    #[inline]
    pub fn publish_ready(&self, event: Event) -> Result<Option<usize>, SystemError> {
        let lane = event.lane();
        let topic = self.topic(&event, lane)?;
        let bus = self.lane(lane);
        if lane == Lane::Critical {
            let entry = bus.enter();
            return Ok(bus.publish_ready(event, topic, entry).ok());
        }
        let taken = bus.publish_as_configured(event, topic);
        taken.map(Some).map_err(|error| SystemError::Closed(error.into_event()))
    }

    /// Publishes an event; for a critical one it waits at most `timeout` for those without room.
    ///
    /// # Errors
    ///
    /// As [`EventSystem::publish`].
    pub fn publish_timeout(&self, event: Event, timeout: Duration) -> Result<usize, SystemError> {
        match self.publish_ready(event)? {
            Some(taken) => Ok(taken),
            None => self.publish_waiting(event, || Instant::now().checked_add(timeout)),
        }
    }

    #[inline(never)]
    fn publish_waiting(
        &self,
        event: Event,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Result<usize, SystemError> {
        self.publication(event)?.run(deadline).or_else(|error| self.handled(error))
    }

    /// Publishes an event; a critical one waits for those without room without blocking the thread,
    /// and without a limit. Cancelled before anybody has it, nobody will; otherwise those without
    /// room are told that they miss it.
    ///
    /// # Errors
    ///
    /// As [`EventSystem::publish`].
    pub async fn publish_async(&self, event: Event) -> Result<usize, SystemError> {
        breathe().await;
        if let Some(taken) = self.publish_ready(event)? {
            return Ok(taken);
        }
        let mut publication = self.publication(event)?;
        loop {
            match publication.poll(Patience::Left) {
                Ok(Some(taken)) => return Ok(taken),
                Ok(None) => publication.notified().await,
                Err(error) => return self.handled(error),
            }
        }
    }

    /// Publishes events in order, with one patience for all, and returns how many: all.
    ///
    /// # Errors
    ///
    /// `SystemBatchError` with the number of events published before the one that failed. If that
    /// was an `Overflow`, go on after it: some have it.
    pub fn publish_batch(&self, events: &[Event]) -> Result<usize, SystemBatchError> {
        let mut deadline = None;
        let mut accepted = 0;
        let patience = self.inner.max_block_duration;
        while let Some(event) = events.get(accepted) {
            let done = self.publish_stretch(&events[accepted..]).and_then(|published| {
                if published > 0 {
                    return Ok(published);
                }
                self.publish_waiting(*event, || {
                    *deadline.get_or_insert_with(|| Instant::now().checked_add(patience))
                })
                .map(|_| 1)
            });
            accepted += done.map_err(|error| SystemBatchError { accepted, error })?;
        }
        Ok(accepted)
    }

    /// Publishes the first of some events together with those that follow it in the same lane, as
    /// many as are published at once, and returns how many. 0 has published nothing: a critical
    /// event would have to wait.
    ///
    /// # Errors
    ///
    /// As [`EventSystem::publish`]; nobody has any of them.
    #[inline]
    pub fn publish_stretch(&self, events: &[Event]) -> Result<usize, SystemError> {
        let Some(&first) = events.first() else { return Ok(0) };
        let lane = first.lane();
        if lane == Lane::Critical || events.len() == 1 {
            return Ok(usize::from(self.publish_ready(first)?.is_some()));
        }
        let bus = self.lane(lane);
        let mut addresses = [bus.address(None); BATCH];
        let mut count = 0;
        let (mut last, mut before) = (&first, None);
        for (event, address) in events.iter().zip(&mut addresses) {
            if event.lane() != lane {
                break;
            }
            let is_alike = (event.event_type, event.symbol) == (last.event_type, last.symbol);
            *address = match before {
                Some(before) if is_alike => before,
                _ => match self.inner.topics.of(event, &self.inner.lanes) {
                    Ok(topics) => bus.address(topics.map(|topics| &topics[lane as usize])),
                    // It is the first of the next stretch.
                    Err(_) if count > 0 => break,
                    Err(error) => return Err(SystemError::TooManyTopics { event: *event, error }),
                },
            };
            before = Some(*address);
            last = event;
            count += 1;
        }
        let published = bus.publish_copies(&addresses[..count], &events[..count]);
        published.or_else(|error| match error.accepted {
            // A lane that overwrites refuses nothing, but it may be closed meanwhile.
            0 => Err(SystemError::Closed(error.error.into_event())),
            accepted => Ok(accepted),
        })
    }

    /// Begins to publish a critical event, to be polled.
    ///
    /// # Errors
    ///
    /// As [`EventSystem::publish`].
    pub fn publication(&self, event: Event) -> Result<CriticalPublication, SystemError> {
        let topic = self.topic(&event, Lane::Critical)?;
        let bus = self.lane(Lane::Critical);
        Ok(CriticalPublication::new(
            bus.publication_at_once(event, topic),
            topic.map_or(NO_TOPIC, Topic::id),
            self.inner.max_block_duration,
            bus.share(),
        ))
    }

    /// Has `handler` called with every [`CriticalOverflow`], in the publisher's thread, instead of
    /// handing it to the publisher. What the handler returns is added to the number that `publish`
    /// returns, and an error that it returns is the publisher's after all: `CriticalOverflow::retry`
    /// is a handler that waits once more.
    pub fn handle_critical_overflow(
        &self,
        handler: impl Fn(CriticalOverflow) -> Result<usize, CriticalOverflow> + Send + Sync + 'static,
    ) {
        *self.inner.on_overflow.lock() = Some(Arc::new(handler));
    }

    #[cold]
    fn handled(&self, error: SystemError) -> Result<usize, SystemError> {
        let handler = self.inner.on_overflow.lock().clone();
        match (error, handler) {
            (SystemError::Overflow(overflow), Some(handler)) => {
                let taken = overflow.taken();
                Ok(taken + handler(overflow)?)
            }
            (error, _) => Err(error),
        }
    }

    /// Returns a subscription to what the options want.
    ///
    /// # Errors
    ///
    /// `Config` if a type or symbol has no name or another subscription has the same one, `Closed`
    /// after `close()`.
    pub fn subscribe(
        &self,
        options: SystemSubscribeOptions,
    ) -> Result<SystemSubscription, SubscribeError> {
        let pattern = options.pattern()?;
        let mut id = self.inner.joining.lock();
        let bell = Arc::new(self.inner.dormitory.bell());
        let join = |lane: Lane| {
            let policy = match lane {
                Lane::Critical => Policy::Block,
                Lane::High | Lane::Normal => Policy::DropOldest,
            };
            let options = SubscribeOptions {
                name: options.name.clone(),
                pattern: pattern.clone(),
                policy: Some(policy),
                on_lag: options.on_lag,
                ..Default::default()
            };
            self.lane(lane).subscribe_jointly(options, Joint { id: *id, bell: bell.clone() })
        };
        let lanes = [join(Lane::Critical)?, join(Lane::High)?, join(Lane::Normal)?];
        *id += 1;
        Ok(SystemSubscription::new(lanes, bell, self.inner.ending.clone()))
    }

    /// Returns how many events were published, wanted or not, in all lanes.
    pub fn total_events(&self) -> u64 {
        self.inner.lanes.iter().map(Bus::published).sum()
    }

    /// Returns how many events wait to be read, over all subscriptions and lanes.
    pub fn pending(&self) -> u64 {
        self.inner.lanes.iter().map(Bus::pending).sum()
    }

    /// Returns how many events can be published in a lane before a subscription misses one or, in the
    /// critical lane, stops the publisher; but for subscriptions that only count what they miss.
    pub fn room(&self, lane: Lane) -> usize {
        self.lane(lane).room()
    }

    /// Begins a replay, as [`Bus::begin_replay`].
    ///
    /// # Errors
    ///
    /// As [`Bus::begin_replay`].
    pub fn begin_replay(&self, mixed: bool) -> Result<(), ReplayRefused> {
        let has_store = self.inner.lanes.iter().any(Bus::has_store);
        self.inner.replaying.begin(mixed, has_store, self.total_events())
    }

    /// Counts events that a replay has published.
    ///
    /// # Errors
    ///
    /// As [`Bus::count_replayed`].
    pub fn count_replayed(&self, events: u64, mixed: bool) -> Result<(), ReplayRefused> {
        self.inner.replaying.add(events);
        self.inner.replaying.check(mixed, self.total_events())
    }

    /// Ends a replay.
    pub fn end_replay(&self) {
        self.inner.replaying.end();
    }

    /// Returns the system's numbers.
    pub fn metrics(&self) -> EventSystemMetrics {
        let [critical, high, normal] = &self.inner.lanes;
        EventSystemMetrics {
            critical: critical.metrics(),
            high: high.metrics(),
            normal: normal.metrics(),
        }
    }

    /// Closes the system: publishing ends at once, readers first read what is pending.
    pub fn close(&self) {
        self.inner.lanes.iter().for_each(Bus::close);
        self.inner.ending.tell();
    }

    /// Returns whether the system is closed.
    pub fn is_closed(&self) -> bool {
        self.inner.lanes.iter().all(Bus::is_closed)
    }

    /// Closes the system and waits until everything pending was read, at most `timeout`; `None`
    /// waits for ever. Returns how many events are left: 0 is the good end.
    pub fn drain(&self, timeout: Option<Duration>) -> u64 {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.begin_to_drain();
        loop {
            let mut read = pin!(self.inner.ending.read.notified());
            read.as_mut().enable();
            let left = self.pending();
            if left == 0 || park_on(read.as_mut(), deadline).is_none() {
                return self.pending();
            }
        }
    }

    /// As [`EventSystem::drain`], without blocking the thread and without a limit.
    pub async fn drain_async(&self) {
        self.begin_to_drain();
        loop {
            let mut read = pin!(self.inner.ending.read.notified());
            read.as_mut().enable();
            if self.pending() == 0 {
                return;
            }
            read.await;
        }
    }

    fn begin_to_drain(&self) {
        self.inner.ending.is_awaited.set();
        self.close();
    }
}
