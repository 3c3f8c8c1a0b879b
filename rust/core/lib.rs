#![doc = include_str!("../../README.md")]
#![cfg_attr(
    not(feature = "broadcast"),
    allow(dead_code, unused_variables, reason = "only the shared channel is walked over")
)]

pub mod arrow;
mod backend;
#[cfg(not(tickbus_loom))]
mod barrier;
#[cfg(tickbus_loom)]
pub mod barrier;
mod bus;
mod conflation;
#[cfg(all(feature = "store", unix))]
mod delivery;
mod error;
mod event;
mod event_queue;
mod event_type;
mod histogram;
mod last;
mod metrics;
mod names;
mod policy;
mod queue;
#[cfg(not(tickbus_loom))]
mod ring;
#[cfg(tickbus_loom)]
pub mod ring;
mod select;
#[cfg(all(feature = "store", unix))]
mod store;
mod subscription;
mod system;
mod table;
mod topic;

#[cfg(not(tickbus_loom))]
mod sync;
#[cfg(tickbus_loom)]
pub mod sync;
#[cfg(not(tickbus_loom))]
mod wait;
#[cfg(tickbus_loom)]
pub mod wait;

#[cfg(feature = "broadcast")]
pub use bus::BroadcastEventBus;
pub use bus::{
    Backend, Bus, BusConfig, EventBus, EventBusImpl, LockFreeEventBus, Patience, Producer,
    Producers, Publication, RingEventBus, Shared, Start, SubscribeError, SubscribeOptions,
    WakeMode, WeakBus,
};
pub use conflation::{Key, KeyFn};
#[cfg(all(feature = "store", unix))]
pub use delivery::{
    ConsumerStats, CriticalDelivery, DeadLetter, DeliveryClock, DeliveryError, FailedAttempt,
    Group, GroupBatch, GroupConfig, GroupStart, GroupStats, Notice, Payload, PublishCriticalError,
    RiskConfig, RiskConsumer, RiskEventSystem, RiskStats, StoredObject, Token,
};
#[cfg(all(feature = "store", unix, tickbus_fuzz))]
pub use delivery::{look_at_any_entry, real_entries};
pub use error::{
    ConfigError, DequeueError, EnqueueError, EventTypeError, KeyError, Lagged, NameError,
    PublishError, PublishManyError, RecvError, RecvTimeoutError, ReplayRefused, TimestampError,
    TryRecvError,
};
pub use event::{EVENT_BYTES, Event, Lane, Priority};
pub use event_queue::LockFreeEventQueue;
pub use event_type::EventType;
pub use histogram::{Entry, LatencyBucket, LatencyHistogram};
pub use metrics::{Dropped, EventBusMetrics, Explanation, SubscriptionMetrics, Warning};
pub use names::{MAX_NAME_BYTES, MAX_SOURCES, MAX_SYMBOLS, Names, SourceId, Symbol};
pub use policy::{BackpressureConfig, MAX_CAPACITY, OnLag, Policy};
pub use queue::{CrossbeamQueue, EventQueue};
pub use ring::overwrite::{OverwritePublisher, OverwriteReader, OverwriteRing, PlainEvent};
pub use select::{Selected, Selector, Shutdown, select};
#[cfg(all(feature = "store", unix))]
pub use store::{
    AppendError, Attachment, Batch, Compression, Digest, Durability, EventStore, Found, Gap, Hold,
    NewRecords, Object, Objects, Query, Records, Recovery, Replay, ReplayBatch, ReplayError,
    ReplayOptions, ReplayProgress, ReplayState, Replayed, ReplayedObject, Retention, Retired,
    Salvage, SegmentReport, Sink, Source, StoreConfig, StoreError, StoreQuery, StoreReader,
    StoreStats, Ticket, Transport, Verification, VirtualClock,
};
#[cfg(all(feature = "store", unix, tickbus_fuzz))]
pub use store::{look_at_any_log, real_logs};
pub use subscription::{AsyncEventSubscription, EventReader, EventSubscription, Parking};
pub use sync::{Exclusion, ThreadExclusion};
pub use system::{
    CriticalOverflow, CriticalPublication, EventSystem, EventSystemConfig, EventSystemMetrics,
    LaneLagged, SystemBatchError, SystemError, SystemStream, SystemSubscribeOptions,
    SystemSubscription, TakeError, WeakEventSystem,
};
pub use topic::{MAX_TOPIC_BYTES, Pattern, Topic};
pub use wait::{AnySubscription, PlaceInLine, WaitStrategy, wake_last};

/// The names that were asked for, compiled.
#[cfg(doctest)]
#[doc = include_str!("../../docs/names.md")]
struct AskedFor;
