//! The single-producer handle of a ring.

use super::on_ring::apart;
use super::options::Producers;
use super::publication::Pending;
use super::{Bus, Shared};
use crate::error::{ConfigError, PublishError, PublishManyError};
use crate::ring::Ring;
use crate::sync::{Exclusion, ThreadExclusion};
use crate::topic::Topic;
use crate::wait::Dormitory;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// The only publisher of a ring: it publishes without a locked instruction and without asking who
/// publishes. As long as it lives, everybody else gets `PublishError::Reserved`; subscriptions join
/// and leave as ever.
///
/// Like a subscription it does not keep the bus open.
pub struct Producer<T: Clone, R: Exclusion = ThreadExclusion> {
    shared: Arc<Shared<T, R>>,
    ring: Arc<Ring<T, R>>,
    /// The bus's, a step nearer.
    dormitory: Arc<Dormitory>,
}

impl<T: Clone, R: Exclusion> fmt::Debug for Producer<T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("bus", &self.shared.id).finish_non_exhaustive()
    }
}

impl<T: Clone, R: Exclusion> Drop for Producer<T, R> {
    fn drop(&mut self) {
        let _token = self.shared.token.lock();
        if let Some(held) = self.ring.right.seize(true) {
            held.end_producer();
        }
    }
}

impl<T: Clone, R: Exclusion> Bus<T, R> {
    /// Returns the bus's only publisher from now on.
    ///
    /// # Errors
    ///
    /// `ConfigError` if the bus has one already, is not a ring, or its producers are strict.
    pub fn producer(&self) -> Result<Producer<T, R>, ConfigError> {
        let shared = self.shared();
        let Some(ring) = &shared.ring else {
            return Err(ConfigError::new(format!(
                "a Producer was asked of backend {}; only backend ring has one: publish through \
                 the bus",
                shared.backend.name()
            )));
        };
        if shared.config.producers == Producers::Strict {
            return Err(ConfigError::new(
                "a Producer was asked of a bus whose producers are strict; they claim slots that \
                 cannot be given back, so none publishes alone or in place: publish through the bus, \
                 or make it with producers shared",
            ));
        }
        let _token = shared.token.lock();
        let Some(held) = ring.right.seize(false) else {
            return Err(ConfigError::new(
                "the bus has a Producer; there is one at a time: publish through it, or drop it",
            ));
        };
        held.lend_to_producer();
        let dormitory = shared.dormitory.clone();
        Ok(Producer { shared: shared.clone(), ring: ring.clone(), dormitory })
    }
}

impl<T: Clone, R: Exclusion> Producer<T, R> {
    /// Returns the id of the bus.
    pub fn bus_id(&self) -> u64 {
        self.shared.id
    }

    /// Publishes an event, as [`EventBus::publish`](crate::EventBus::publish) does.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish`](crate::EventBus::publish).
    #[inline(always)] // the event goes straight into its slot
    pub fn publish(&mut self, event: T) -> Result<usize, PublishError<T>> {
        self.publish_on(None, event)
    }

    /// Publishes an event on a topic, as [`EventBus::publish_to`](crate::EventBus::publish_to)
    /// does.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish`](crate::EventBus::publish).
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline(always)] // the event goes straight into its slot
    pub fn publish_to(&mut self, topic: &Topic, event: T) -> Result<usize, PublishError<T>> {
        self.publish_on(Some(topic), event)
    }

    #[inline(always)]
    fn publish_on(&mut self, topic: Option<&Topic>, event: T) -> Result<usize, PublishError<T>> {
        let (shared, ring, fences) = (&*self.shared, &*self.ring, self.shared.fences);
        let Some(claim) = ring.right.claim_as_producer(fences) else {
            return self.publish_slowly(apart(event), topic);
        };
        let (address, asleep) = (shared.address(topic), self.dormitory.asleep());
        Ok(shared.publish_on_ring(ring, claim, address, event, fences, asleep))
    }

    #[cold]
    #[inline(never)]
    fn publish_slowly(
        &mut self,
        event: T,
        topic: Option<&Topic>,
    ) -> Result<usize, PublishError<T>> {
        let (shared, ring, fences) = (&*self.shared, &*self.ring, self.shared.fences);
        let (id, interest) = shared.address(topic);
        if let Some(entry) = shared.go_on(ring, true)
            && let Some(claim) = ring.right.claim_as_producer(fences)
        {
            let asleep = self.dormitory.asleep();
            let taken = shared.publish_on_ring(ring, claim, (id, interest), event, fences, asleep);
            shared.latencies.leave(entry);
            return Ok(taken);
        }
        self.ask(event, id)
    }

    fn ask(&mut self, event: T, topic: u32) -> Result<usize, PublishError<T>> {
        let shared = &*self.shared;
        let mut pending = Pending::new(shared.latencies.enter(), event, topic, false);
        pending.by_producer = true;
        let patience = shared.config.backpressure.max_block_duration;
        pending.publication(shared).run(|| Instant::now().checked_add(patience))
    }

    /// Publishes clones of events in order, each stretch of them at once, and returns how many:
    /// all.
    ///
    /// # Errors
    ///
    /// `PublishManyError` with the number of events published before the one that failed.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    pub fn publish_batch(
        &mut self,
        topic: Option<&Topic>,
        events: &[T],
    ) -> Result<usize, PublishManyError<T>> {
        self.shared.publish_batch_on_ring(&self.ring, true, topic, events)
    }

    /// Lets `f` fill the next event where it will be read, and publishes it. Before that it is an
    /// older event of the ring, or `T::default()`. Returns how many subscriptions took it.
    ///
    /// If `f` panics, nothing is published.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish`](crate::EventBus::publish), with the event as `f` filled it.
    ///
    /// # Panics
    ///
    /// If the topic belongs to another bus.
    #[inline]
    pub fn publish_with(
        &mut self,
        topic: Option<&Topic>,
        f: impl FnOnce(&mut T),
    ) -> Result<usize, PublishError<T>>
    where
        T: Default,
    {
        let entry = match self.ring.right.permitted_to_producer() {
            Some(_) => None,
            None => self.shared.go_on(&self.ring, true),
        };
        let (id, interest) = self.shared.address(topic);
        match self.ring.publish_in_place(id, T::default, f) {
            Ok(()) => {
                let (fences, asleep) = (self.shared.fences, self.dormitory.asleep());
                let taken = self.shared.taken_on_ring((id, interest), fences, asleep);
                if let Some(entry) = entry {
                    self.shared.latencies.leave(entry);
                }
                Ok(taken)
            }
            Err(event) => self.ask(event, id),
        }
    }
}
