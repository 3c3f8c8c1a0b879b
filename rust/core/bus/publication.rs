//! An event on its way, which may have to wait.

use super::Shared;
use super::at_once::AtOnce;
use super::publishing::{Aftermath, PublishState, Unkeyed, Verdict};
use super::slot::{NEWCOMER, Slot};
use crate::conflation::Key;
use crate::error::{KeyError, PublishError};
use crate::histogram::Entry;
use crate::policy::Policy;
use crate::sync::Exclusion;
use crate::wait::park_on;
use smallvec::SmallVec;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Notify;

/// How long a publication may still wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// It may wait for room.
    Left,
    /// It must end now.
    Spent,
}

/// An event on its way.
pub(super) struct Pending<T> {
    pub(super) entry: Entry,
    pub(super) event: Option<T>,
    pub(super) topic: u32,
    pub(super) rejects_wait: bool,
    /// It is published by the bus's `Producer`.
    pub(super) by_producer: bool,
    pub(super) ticket: u64,
    pub(super) notify: Option<Arc<Notify>>,
    /// Its keys, by the ids of the subscriptions that have key functions.
    pub(super) keys: SmallVec<[(u64, Key); 1]>,
    /// The slots in whose lines it stands, and the ids of the subscriptions there.
    pub(super) stands: SmallVec<[(u32, u64); 1]>,
    /// How far it has come, if it does not wait for all to have room.
    pub(super) at_once: Option<AtOnce>,
}

impl<T> Pending<T> {
    pub(super) fn new(entry: Entry, event: T, topic: u32, rejects_wait: bool) -> Self {
        Self {
            entry,
            event: Some(event),
            topic,
            rejects_wait,
            by_producer: false,
            ticket: NEWCOMER,
            notify: None,
            keys: SmallVec::new(),
            stands: SmallVec::new(),
            at_once: None,
        }
    }

    pub(super) fn publication<S, R>(self, shared: S) -> Publication<S, T, R>
    where
        T: Clone,
        R: Exclusion,
        S: Deref<Target = Shared<T, R>>,
    {
        Publication { shared, pending: self, marker: PhantomData }
    }

    /// Asks key functions, which may do anything, also with this bus.
    #[inline(never)]
    pub(super) fn find_keys(&mut self, functions: Unkeyed<T>) -> Result<(), KeyError> {
        let Some(event) = &self.event else {
            unreachable!("a publication is not polled again after it was done")
        };
        for (subscription, function) in functions {
            self.keys.push((subscription, function.key(event)?));
        }
        Ok(())
    }
}

/// An event being published: [`Publication::poll`] it until it is done. Dropping it before that
/// means that nobody has the event.
pub struct Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    shared: S,
    pending: Pending<T>,
    marker: PhantomData<R>,
}

impl<S, T, R> fmt::Debug for Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publication").field("topic", &self.pending.topic).finish_non_exhaustive()
    }
}

impl<S, T, R> Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    /// Tries to publish. Returns how many subscriptions took the event, or `None` if it has to
    /// wait, which happens only with [`Patience::Left`].
    ///
    /// # Errors
    ///
    /// `PublishError`, with the event: nobody has it.
    #[inline]
    pub fn poll(&mut self, patience: Patience) -> Result<Option<usize>, PublishError<T>> {
        let shared = &*self.shared;
        let mut aftermath = Aftermath::new();
        let verdict = loop {
            let verdict = {
                let mut state = shared.token.lock();
                state.offer(&mut self.pending, patience, shared, &mut aftermath)
            };
            let Verdict::Unkeyed(functions) = verdict else { break verdict };
            if let Err(error) = self.pending.find_keys(functions) {
                return Err(self.give_back(|event, _| PublishError::Key { event, error }, vec![]));
            }
        };
        aftermath.run(shared);
        match verdict {
            Verdict::Done(taken) => {
                shared.latencies.leave(self.pending.entry);
                Ok(Some(taken))
            }
            Verdict::InLine => Ok(None),
            Verdict::Unkeyed(_) => unreachable!("the keys were found above"),
            Verdict::Reserved => {
                Err(self.give_back(|event, _| PublishError::Reserved(event), vec![]))
            }
            Verdict::Closed => Err(self.give_back(|event, _| PublishError::Closed(event), vec![])),
            Verdict::Missed { taken, missing } => Err(self.give_back(
                |event, missing| PublishError::Overflow { event, taken, missing },
                missing,
            )),
            Verdict::Rejected(subscriptions) => Err(match self.pending.rejects_wait {
                true => self.give_back(
                    |event, subscriptions| PublishError::Timeout { event, subscriptions },
                    subscriptions,
                ),
                false => self.give_back(
                    |event, subscriptions| PublishError::Full { event, subscriptions },
                    subscriptions,
                ),
            }),
        }
    }

    #[cold]
    pub(super) fn give_back(
        &mut self,
        error: impl FnOnce(T, Vec<u64>) -> PublishError<T>,
        subscriptions: Vec<u64>,
    ) -> PublishError<T> {
        match self.pending.event.take() {
            Some(event) => error(event, subscriptions),
            None => unreachable!("a publication is not polled again after it was done"),
        }
    }

    /// Returns the subscriptions that want the event, have no room for it, and refuse to lose
    /// others for it: those that it may have to wait for.
    pub fn without_room(&self) -> SmallVec<[u64; 4]> {
        let mut state = self.shared.token.lock();
        let PublishState { slots, topics, ring, .. } = &mut *state;
        let without_room = |slot: &mut Slot<T, R>| {
            if !matches!(slot.policy, Policy::Block | Policy::Reject) {
                return None;
            }
            slot.refresh_room();
            (slot.room == 0).then_some(slot.inbox.id)
        };
        // On a ring an event waits for those too that do not want it.
        if ring.is_some() {
            return slots.iter_mut().flatten().filter_map(without_room).collect();
        }
        let wanted = topics.wanted(self.pending.topic).iter();
        wanted.filter_map(|&index| without_room(slots[index as usize].as_mut()?)).collect()
    }

    /// Parks the thread until room was freed or the deadline has passed; false if it passed.
    pub fn park(&self, deadline: Option<Instant>) -> bool {
        let Some(notify) = &self.pending.notify else { return true };
        park_on(pin!(notify.notified()), deadline).is_some()
    }

    /// Waits until it is worth polling again.
    pub async fn notified(&self) {
        if let Some(notify) = &self.pending.notify {
            notify.notified().await;
        }
    }

    /// Returns where the publication waits for room, once it has to.
    pub fn notify(&self) -> Option<&Arc<Notify>> {
        self.pending.notify.as_ref()
    }

    /// Publishes, waiting in this thread until the deadline at most.
    /// `None` is no deadline.
    pub(crate) fn run(
        &mut self,
        deadline: impl FnOnce() -> Option<Instant>,
    ) -> Result<usize, PublishError<T>> {
        if let Some(taken) = self.poll(Patience::Left)? {
            return Ok(taken);
        }
        let deadline = deadline();
        let mut patience = Patience::Left;
        loop {
            // A publisher that is woken again and again in vain, by one full queue after the other,
            // is late too.
            if !self.park(deadline) || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                patience = Patience::Spent;
            }
            if let Some(taken) = self.poll(patience)? {
                return Ok(taken);
            }
        }
    }
}

impl<S, T, R> Drop for Publication<S, T, R>
where
    T: Clone,
    R: Exclusion,
    S: Deref<Target = Shared<T, R>>,
{
    #[inline]
    fn drop(&mut self) {
        if !self.pending.stands.is_empty() {
            let mut aftermath = Aftermath::new();
            self.shared.token.lock().abandon(&mut self.pending, &self.shared, &mut aftermath);
            aftermath.run(&self.shared);
        }
    }
}
