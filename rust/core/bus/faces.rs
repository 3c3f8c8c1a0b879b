//! The buses by name, and what all of them do.

use super::{Backend, Bus, BusConfig, Patience, SubscribeError, SubscribeOptions};
use crate::error::{ConfigError, PublishError, PublishManyError};
use crate::metrics::{EventBusMetrics, Explanation};
use crate::subscription::{AsyncEventSubscription, EventSubscription};
use crate::topic::Topic;
use crate::wait::breathe;
use std::time::{Duration, Instant};

/// What every bus does.
///
/// The number that publishing returns says how many subscriptions took the event. An error means
/// that nobody has it.
pub trait EventBus<T: Clone> {
    /// Returns the bus behind this face.
    fn bus(&self) -> &Bus<T>;

    /// Publishes an event, waiting at most `max_block_duration` for `block` subscriptions, and
    /// returns how many took it. On a ring, a subscription that joins or leaves at the same moment
    /// counts or does not, whether or not it has the event.
    ///
    /// # Errors
    ///
    /// `Full` if a `reject` subscription has no room, `Closed` after `close()`.
    #[inline(always)] // the event goes straight into its slot
    fn publish(&self, event: T) -> Result<usize, PublishError<T>> {
        self.bus().publish_as_configured(event, None)
    }

    /// Publishes an event on a topic, as [`EventBus::publish`] does.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish`].
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline(always)] // the event goes straight into its slot
    fn publish_to(&self, topic: &Topic, event: T) -> Result<usize, PublishError<T>> {
        self.bus().publish_as_configured(event, Some(topic))
    }

    /// Publishes an event, waiting at most `timeout` for `block` and for `reject` subscriptions.
    ///
    /// # Errors
    ///
    /// `Timeout` if a `reject` subscription still has no room then, `Closed` after `close()`.
    fn publish_timeout(
        &self,
        event: T,
        topic: Option<&Topic>,
        timeout: Duration,
    ) -> Result<usize, PublishError<T>> {
        self.bus().publication(event, topic, true).run(|| Instant::now().checked_add(timeout))
    }

    /// Publishes events in order with one patience for all and returns how many.
    ///
    /// # Errors
    ///
    /// `PublishManyError` with the number of events published before the one that failed.
    fn publish_many<I>(&self, events: I) -> Result<usize, PublishManyError<T>>
    where
        I: IntoIterator<Item = T>,
        Self: Sized,
    {
        self.bus().publish_each(events.into_iter().map(|event| (None, event)))
    }

    /// Publishes clones of events in order, with one patience for all, and returns how many. On a
    /// ring a stretch of them is published at once.
    ///
    /// # Errors
    ///
    /// `PublishManyError` with the number of events published before the one that failed.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    fn publish_batch(
        &self,
        topic: Option<&Topic>,
        events: &[T],
    ) -> Result<usize, PublishManyError<T>> {
        self.bus().publish_batch(topic, events)
    }

    /// Publishes an event, waiting its turn without blocking the thread. The patience is the
    /// caller's: cancelled, nobody has the event.
    ///
    /// # Errors
    ///
    /// `Closed` after `close()`.
    fn publish_async(
        &self,
        event: T,
        topic: Option<&Topic>,
    ) -> impl Future<Output = Result<usize, PublishError<T>>> {
        let mut publication = self.bus().owned_publication(event, topic, true);
        async move {
            breathe().await;
            loop {
                if let Some(taken) = publication.poll(Patience::Left)? {
                    return Ok(taken);
                }
                publication.notified().await;
            }
        }
    }

    /// Returns a subscription to everything that holds up to `capacity` events, rounded up to a
    /// power of two.
    ///
    /// # Errors
    ///
    /// As [`Bus::subscribe_with`].
    fn subscribe(&self, capacity: usize) -> Result<EventSubscription<T>, SubscribeError> {
        let capacity = Some(capacity);
        self.bus().subscribe_with(SubscribeOptions { capacity, ..Default::default() })
    }

    /// Returns a subscription to be awaited, to everything, that holds up to `capacity` events,
    /// rounded up to a power of two.
    ///
    /// # Errors
    ///
    /// As [`Bus::subscribe_with`].
    fn subscribe_async(
        &self,
        capacity: usize,
    ) -> Result<AsyncEventSubscription<T>, SubscribeError> {
        self.subscribe(capacity).map(AsyncEventSubscription::from)
    }

    /// Returns a subscription with more wishes than a capacity.
    ///
    /// # Errors
    ///
    /// As [`Bus::subscribe_with`].
    fn subscribe_with(
        &self,
        options: SubscribeOptions<T>,
    ) -> Result<EventSubscription<T>, SubscribeError> {
        self.bus().subscribe_with(options)
    }

    /// Returns the last event that was published on a topic, if there is one; nobody has to
    /// subscribe to it. It stays readable after `close()`.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the name is no topic's, or the bus does not keep its last event: see
    /// [`BusConfig::keep_last`].
    fn last(&self, topic: &str) -> Result<Option<T>, ConfigError> {
        self.bus().last(topic)
    }

    /// Returns the named topic.
    ///
    /// # Errors
    ///
    /// As [`Bus::topic`].
    fn topic(&self, name: &str) -> Result<Topic, ConfigError> {
        self.bus().topic(name)
    }

    /// Returns the bus's numbers.
    fn metrics(&self) -> EventBusMetrics {
        self.bus().metrics()
    }

    /// Returns who stops publishers now, how far each subscription is behind, and since when.
    fn explain(&self) -> Explanation {
        self.bus().explain()
    }

    /// Closes the bus: publishing ends at once, readers first read what is pending.
    fn close(&self) {
        self.bus().close();
    }
}

macro_rules! face {
    ($(#[$attribute:meta])* $name:ident, $backend:ident) => {
        $(#[$attribute])*
        #[derive(Debug, Clone)]
        pub struct $name<T: Clone>(Bus<T>);

        impl<T: Clone> $name<T> {
            /// Returns a bus of the given capacity in events, rounded up to a power of two.
            ///
            /// # Errors
            ///
            /// `ConfigError` if the capacity is zero or too large.
            pub fn new(capacity: usize) -> Result<Self, ConfigError> {
                Self::with_config(BusConfig { capacity, ..Default::default() })
            }

            /// Returns a bus with more wishes than a capacity.
            ///
            /// # Errors
            ///
            /// `ConfigError` if a number is zero or too large.
            pub fn with_config(config: BusConfig) -> Result<Self, ConfigError> {
                Bus::new(Backend::$backend, config).map(Self)
            }
        }

        impl<T: Clone> EventBus<T> for $name<T> {
            #[inline]
            fn bus(&self) -> &Bus<T> {
                &self.0
            }
        }
    };
}

face!(
    /// One bounded channel per subscription: every subscription has its own capacity and policy,
    /// and blocking ones lose nothing.
    LockFreeEventBus,
    LockFree
);

#[cfg(feature = "broadcast")]
face!(
    /// One shared channel: publishing costs the same for any number of subscriptions, and who is
    /// slow loses the oldest events and is told.
    ///
    /// The channel drops an overwritten event while it is locked: a payload whose `Drop` publishes
    /// to the same bus deadlocks. (The Python module drops objects after publication instead.)
    BroadcastEventBus,
    Broadcast
);

face!(
    /// One sequence of slots, and a cursor for each subscription: publishing writes one slot,
    /// whatever the number of subscriptions, and every subscription sees the same order.
    ///
    /// The ring has the room: a subscription that stands a whole ring behind stops publishing,
    /// moves on or is told that events are missing, by its policy. An event stays in its slot, and
    /// alive, until the ring has come round.
    ///
    /// While a reader clones an event its place is pinned, and a publisher that must move it on
    /// waits for that: a `Clone` that publishes to the same bus may wait for itself.
    RingEventBus,
    Ring
);

/// A bus on a backend chosen at run time.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventBusImpl<T: Clone> {
    /// One shared channel.
    #[cfg(feature = "broadcast")]
    Broadcast(BroadcastEventBus<T>),
    /// One bounded channel per subscription.
    LockFree(LockFreeEventBus<T>),
    /// One sequence of slots for all subscriptions.
    Ring(RingEventBus<T>),
}

impl<T: Clone> EventBusImpl<T> {
    /// Returns a bus on the given backend.
    ///
    /// # Errors
    ///
    /// `ConfigError` if a number is zero or too large.
    pub fn new(backend: Backend, config: BusConfig) -> Result<Self, ConfigError> {
        Ok(match backend {
            #[cfg(feature = "broadcast")]
            Backend::Broadcast => Self::Broadcast(BroadcastEventBus::with_config(config)?),
            Backend::LockFree => Self::LockFree(LockFreeEventBus::with_config(config)?),
            Backend::Ring => Self::Ring(RingEventBus::with_config(config)?),
        })
    }
}

impl<T: Clone> EventBus<T> for EventBusImpl<T> {
    #[inline]
    fn bus(&self) -> &Bus<T> {
        match self {
            #[cfg(feature = "broadcast")]
            Self::Broadcast(bus) => bus.bus(),
            Self::LockFree(bus) => bus.bus(),
            Self::Ring(bus) => bus.bus(),
        }
    }
}
