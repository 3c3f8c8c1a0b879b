//! The ways of carrying events: one bounded channel per subscription, one shared overwriting
//! channel, or one ring. Beside each stands the map of a conflating subscription.
//!
//! A `lock_free` entry carries the number of events offered to its subscription before it, so the
//! reader sees a hole by comparing numbers: refused and overwritten events alike, exactly where
//! they are missing. A `broadcast` entry carries its topic, because every reader walks over every
//! entry; tokio tells how many were overwritten. On a `ring` the topic stands beside the event, and
//! whoever moves a reader over events that it wanted tells it how many.

use crate::conflation::Conflation;
use crate::error::Lagged;
use crate::queue::EventQueue;
use crate::ring::reader::{BATCH, Missed, Place, RingReader};
use crate::sync::{Exclusion, Mutex};
use crate::topic::{NO_TOPIC, Pattern};
use std::sync::Arc;
#[cfg(feature = "broadcast")]
use tokio::sync::broadcast;

/// An event in a subscription's own channel, with its index among the events offered there.
#[derive(Debug)]
pub(crate) struct Numbered<T> {
    pub(crate) index: u64,
    pub(crate) event: T,
}

/// An event in the shared channel.
#[cfg(feature = "broadcast")]
#[derive(Debug, Clone)]
pub(crate) struct Addressed<T> {
    pub(crate) topic: u32,
    pub(crate) event: T,
}

/// Both ends of a subscription's own queue. The publisher has the same: it looks for room, and
/// takes the oldest to overwrite it.
pub(crate) struct Channel<T, R: Exclusion> {
    queue: R::Queue<Numbered<T>>,
    /// At most one event, which was taken out while the hole before it had still to be told. It
    /// is the oldest, and counts against the capacity like the others.
    hold: R::Queue<Numbered<T>>,
}

impl<T, R: Exclusion> Clone for Channel<T, R> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), hold: self.hold.clone() }
    }
}

impl<T, R: Exclusion> Channel<T, R> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { queue: R::Queue::bounded(capacity), hold: R::Queue::bounded(1) }
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len() + self.hold.len()
    }

    #[inline]
    pub(crate) fn push(&self, entry: Numbered<T>) -> Result<(), Numbered<T>> {
        self.queue.push(entry)
    }

    /// Takes the oldest event.
    pub(crate) fn take_oldest(&self) -> Option<Numbered<T>> {
        match self.hold.is_empty() {
            true => self.queue.pop(),
            false => self.hold.pop().or_else(|| self.queue.pop()),
        }
    }
}

/// What a reader reads from.
pub(crate) enum Source<T, R: Exclusion> {
    Channel(Channel<T, R>),
    #[cfg(feature = "broadcast")]
    Broadcast(broadcast::Receiver<Addressed<T>>),
    Ring(RingReader<T, R>),
    /// A place in a ring that is read by who has borrowed the reader for good.
    Lent(Place<T, R>),
    Conflation(Arc<Mutex<R, Conflation<T>>>),
    /// The last events of topics from before the reader joined, then what it joined.
    Snapshot(Box<Snapshot<T, R>>),
}

/// At least one event, and what comes after.
pub(crate) struct Snapshot<T, R: Exclusion> {
    events: std::vec::IntoIter<T>,
    then: Option<Source<T, R>>,
}

impl<T, R: Exclusion> Source<T, R> {
    /// Puts events before everything else.
    pub(crate) fn after(self, events: Vec<T>) -> Self {
        match events.is_empty() {
            true => self,
            false => {
                Self::Snapshot(Box::new(Snapshot { events: events.into_iter(), then: Some(self) }))
            }
        }
    }

    /// Returns how many events (on the shared channel: entries) wait, and how many more than
    /// `capacity` before them were overwritten.
    fn backlog(&mut self, capacity: usize, mut wants: impl FnMut(u32) -> bool) -> (usize, usize) {
        let queued = match self {
            Self::Channel(channel) => channel.len(),
            #[cfg(feature = "broadcast")]
            Self::Broadcast(receiver) => receiver.len(),
            Self::Ring(reader) => return (reader.pending(None, &mut wants) as usize, 0),
            Self::Lent(place) => return (place.pending(None, &mut wants) as usize, 0),
            Self::Conflation(map) => map.lock().len(),
            Self::Snapshot(snapshot) => {
                let before = snapshot.events.len();
                let wants: &mut dyn FnMut(u32) -> bool = &mut wants;
                let then = snapshot.then.as_mut().map(|source| source.backlog(capacity, wants));
                let (kept, uncounted) = then.unwrap_or_default();
                return (kept + before, uncounted);
            }
        };
        let kept = queued.min(capacity);
        (kept, queued - kept)
    }
}

/// What the next look into a source gave.
#[derive(Debug)]
pub(crate) enum Found<T> {
    Event(T),
    /// Events are missing exactly here.
    Hole(Lagged),
    Nothing,
}

/// A subscription's reading half, guarded by its read exclusion.
pub(crate) struct Reader<T, R: Exclusion> {
    source: Source<T, R>,
    /// Index of the next event if none is missing (`lock_free`).
    expected: u64,
    /// Whether it put an event on hold (`lock_free`); a publisher may have taken that since.
    holds: bool,
    /// An event that was taken out to see whether it is wanted (`broadcast`).
    fetched: Option<T>,
    /// A hole that was found and has still to be told (`broadcast`); never beside a fetched event.
    untold: Option<Lagged>,
    /// By topic id, whether the pattern wants it, as far as known (`broadcast`, `ring`).
    wanted: Vec<Option<bool>>,
    /// What was pending has been discarded; what the shared channel carries since is none of its.
    has_left: bool,
}

/// Numbers that reading changes besides what it returns.
#[derive(Debug, Default)]
pub(crate) struct Walked {
    /// Entries of the shared channel that the subscription had not wanted.
    pub(crate) unwanted: u64,
    /// Entries of the shared channel that were overwritten before they were read.
    pub(crate) overwritten: u64,
}

impl<T: Clone, R: Exclusion> Reader<T, R> {
    /// Returns a reader of a source before which `offered` events were counted.
    pub(crate) fn new(source: Source<T, R>, offered: u64) -> Self {
        Self {
            source,
            expected: offered,
            holds: false,
            fetched: None,
            untold: None,
            wanted: Vec::new(),
            has_left: false,
        }
    }

    /// Returns how many events (on the shared channel: entries) wait to be read, and how many were
    /// overwritten without being counted yet, because the reader has not come to them. `capacity`
    /// is that of the subscription.
    pub(crate) fn backlog(
        &mut self,
        capacity: usize,
        topics: &dyn TopicNames,
        pattern: Option<&Pattern>,
    ) -> (usize, usize) {
        if self.has_left {
            return (0, 0);
        }
        let wants = wanting(&mut self.wanted, topics, pattern);
        let (kept, uncounted) = self.source.backlog(capacity, wants);
        (kept + usize::from(self.fetched.is_some()), uncounted)
    }

    /// Ends reading, after what was pending was taken.
    pub(crate) fn leave(&mut self) {
        self.has_left = true;
    }

    /// Returns how many events are pending before a sequence of a ring, where nothing has to be
    /// taken out; `None` where they have to be.
    pub(crate) fn pending_on_ring(
        &mut self,
        end: u64,
        topics: &dyn TopicNames,
        pattern: Option<&Pattern>,
    ) -> Option<u64> {
        let wants = wanting(&mut self.wanted, topics, pattern);
        match &mut self.source {
            Source::Ring(reader) => Some(reader.pending(Some(end), wants)),
            Source::Lent(place) => Some(place.pending(Some(end), wants)),
            Source::Snapshot(snapshot) => match &mut snapshot.then {
                Some(Source::Ring(reader)) => {
                    Some(snapshot.events.len() as u64 + reader.pending(Some(end), wants))
                }
                _ => None,
            },
            _ => None,
        }
    }

    /// Returns the most events that it ever found pending, where it is the reader who notices.
    pub(crate) fn peak(&self) -> u64 {
        match &self.source {
            Source::Ring(reader) => reader.peak,
            _ => 0,
        }
    }

    /// Lends the place in a ring for good to who reads without asking for this reader.
    pub(crate) fn lend(&mut self) -> Option<RingReader<T, R>> {
        let Source::Ring(reader) = &self.source else { return None };
        let lent = Source::Lent(reader.place.clone());
        match std::mem::replace(&mut self.source, lent) {
            Source::Ring(reader) => Some(reader),
            _ => unreachable!("it was a ring just now"),
        }
    }

    pub(crate) fn has_left(&self) -> bool {
        self.has_left
    }

    /// Returns an index, among the events offered (on the shared channel: the entries), not above
    /// that of any pending one. `gone` of them were read, stepped over or overwritten.
    pub(crate) fn oldest(&self, gone: u64) -> u64 {
        match &self.source {
            // What was refused is not gone, but lies behind.
            Source::Channel(_) => gone.max(self.expected),
            #[cfg(feature = "broadcast")]
            Source::Broadcast(_) => gone,
            Source::Ring(reader) => reader.place.position(),
            Source::Lent(place) => place.position(),
            Source::Conflation(map) => map.lock().since().unwrap_or(gone),
            Source::Snapshot(_) => 0,
        }
    }

    /// Takes the next event if it is queued and nothing is missing before it; `None` decides
    /// nothing.
    #[inline]
    pub(crate) fn take_ready(&mut self) -> Option<T> {
        match &mut self.source {
            Source::Channel(channel) if !self.holds => {
                let next = channel.queue.pop()?;
                if next.index != self.expected {
                    self.holds = channel.hold.push(next).is_ok();
                    return None;
                }
                self.expected += 1;
                Some(next.event)
            }
            Source::Ring(reader) if reader.place.is_wide => {
                let mut event = None;
                // A hole is left for `take`.
                _ = reader.read(1, false, true, |_| true, |found: &T| event = Some(found.clone()));
                event
            }
            Source::Conflation(map) => {
                let mut map = map.lock();
                if map.missed > 0 { None } else { map.pop() }
            }
            _ => None,
        }
    }

    /// Gives up to `limit` events to `sink` and returns how many; it ends before a hole.
    #[expect(clippy::too_many_arguments, reason = "as `take`, and where to and how many")]
    pub(crate) fn take_many(
        &mut self,
        sink: &mut impl FnMut(T),
        limit: usize,
        offered: u64,
        quiet: bool,
        walked: &mut Walked,
        topics: &dyn TopicNames,
        pattern: Option<&Pattern>,
    ) -> usize {
        let mut taken = 0;
        while taken < limit {
            if let Source::Ring(reader) = &mut self.source {
                let wants = wanting(&mut self.wanted, topics, pattern);
                let wish = (limit - taken).min(BATCH);
                let clone = |event: &T| sink(event.clone());
                match reader.read(wish, quiet, true, wants, clone) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => taken += count,
                }
                continue;
            }
            match self.take(offered, quiet, true, walked, topics, pattern) {
                Found::Event(event) => sink(event),
                Found::Hole(_) | Found::Nothing => break,
            }
            taken += 1;
        }
        taken
    }

    /// Takes the next event, or tells a hole before it. `offered` was read before this call.
    /// With `quiet`, holes are stepped over; with `in_batch`, a hole is left for the next call
    /// and `Nothing` ends the batch.
    #[inline]
    pub(crate) fn take(
        &mut self,
        offered: u64,
        quiet: bool,
        in_batch: bool,
        walked: &mut Walked,
        topics: &dyn TopicNames,
        pattern: Option<&Pattern>,
    ) -> Found<T> {
        match &mut self.source {
            Source::Channel(channel) => {
                let next = match std::mem::take(&mut self.holds) {
                    true => channel.take_oldest(),
                    false => channel.queue.pop(),
                };
                let (index, next) = match next {
                    Some(next) => (next.index, Some(next)),
                    // All events below `offered` were queued before it was read: what is not
                    // here any more is a hole at the end.
                    None => (offered, None),
                };
                let missed = index.saturating_sub(self.expected);
                if missed > 0 && !quiet {
                    // The hold is empty: this reader alone fills it, and has just looked.
                    self.holds = next.is_some_and(|next| channel.hold.push(next).is_ok());
                    if in_batch {
                        return Found::Nothing;
                    }
                    self.expected = index;
                    return Found::Hole(Lagged { missed, exact: true });
                }
                match next {
                    Some(next) => {
                        self.expected = index + 1;
                        Found::Event(next.event)
                    }
                    None => {
                        self.expected = self.expected.max(index);
                        Found::Nothing
                    }
                }
            }
            #[cfg(feature = "broadcast")]
            Source::Broadcast(receiver) => {
                if let Some(event) = self.fetched.take() {
                    return Found::Event(event);
                }
                if let Some(hole) = self.untold.take()
                    && !quiet
                {
                    if in_batch {
                        self.untold = Some(hole);
                        return Found::Nothing;
                    }
                    return Found::Hole(hole);
                }
                loop {
                    match receiver.try_recv() {
                        Ok(entry) => {
                            if pattern.is_none_or(|pattern| {
                                wants(&mut self.wanted, pattern, entry.topic, topics)
                            }) {
                                return Found::Event(entry.event);
                            }
                            walked.unwanted += 1;
                        }
                        Err(broadcast::error::TryRecvError::Lagged(missed)) => {
                            walked.overwritten += missed;
                            if quiet {
                                continue;
                            }
                            let hole = Lagged { missed, exact: pattern.is_none() };
                            if in_batch {
                                self.untold = Some(hole);
                                return Found::Nothing;
                            }
                            return Found::Hole(hole);
                        }
                        Err(_) => return Found::Nothing,
                    }
                }
            }
            Source::Ring(reader) => {
                let wants = wanting(&mut self.wanted, topics, pattern);
                let mut event = None;
                let clone = |found: &T| event = Some(found.clone());
                match reader.read(1, quiet, in_batch, wants, clone) {
                    Err(Missed { missed, exact }) => Found::Hole(Lagged { missed, exact }),
                    Ok(_) => event.map_or(Found::Nothing, Found::Event),
                }
            }
            Source::Lent(_) => Found::Nothing,
            Source::Conflation(map) => {
                let mut map = map.lock();
                // What was overwritten was the oldest: the hole is before everything pending.
                if map.missed > 0 && in_batch && !quiet {
                    return Found::Nothing;
                }
                let missed = std::mem::take(&mut map.missed);
                if missed > 0 && !quiet {
                    return Found::Hole(Lagged { missed, exact: true });
                }
                map.pop().map_or(Found::Nothing, Found::Event)
            }
            Source::Snapshot(snapshot) => {
                let event = snapshot.events.next();
                if snapshot.events.len() == 0
                    && let Some(then) = snapshot.then.take()
                {
                    self.source = then;
                }
                event.map_or(Found::Nothing, Found::Event)
            }
        }
    }

    /// Returns whether `take` would give an event or tell a hole. On the shared channel a reader
    /// with a pattern steps over what it does not want to find out.
    pub(crate) fn is_ready(
        &mut self,
        offered: u64,
        quiet: bool,
        walked: &mut Walked,
        topics: &dyn TopicNames,
        pattern: Option<&Pattern>,
    ) -> bool {
        if self.fetched.is_some() || self.untold.is_some() {
            return true;
        }
        match &mut self.source {
            Source::Channel(channel) => channel.len() > 0 || (!quiet && offered > self.expected),
            // A hole of a map is before a pending event.
            Source::Conflation(map) => map.lock().len() > 0,
            Source::Lent(_) => false,
            Source::Snapshot(_) => true,
            Source::Ring(reader) => {
                reader.is_ready(quiet, wanting(&mut self.wanted, topics, pattern))
            }
            #[cfg(feature = "broadcast")]
            Source::Broadcast(receiver) if pattern.is_none() => !receiver.is_empty(),
            #[cfg(feature = "broadcast")]
            Source::Broadcast(_) => {
                match self.take(offered, quiet, false, walked, topics, pattern) {
                    Found::Event(event) => self.fetched = Some(event),
                    Found::Hole(hole) => self.untold = Some(hole),
                    Found::Nothing => return false,
                }
                true
            }
        }
    }
}

/// Where a reader of the shared channel looks up what a topic id means.
pub(crate) trait TopicNames {
    fn topic_name(&self, id: u32) -> Arc<str>;
}

/// Returns whether a pattern wants a topic, asking once for each.
pub(crate) fn wanting<'a>(
    known: &'a mut Vec<Option<bool>>,
    topics: &'a dyn TopicNames,
    pattern: Option<&'a Pattern>,
) -> impl FnMut(u32) -> bool + 'a {
    move |topic| pattern.is_none_or(|pattern| wants(known, pattern, topic, topics))
}

fn wants(
    known: &mut Vec<Option<bool>>,
    pattern: &Pattern,
    topic: u32,
    topics: &dyn TopicNames,
) -> bool {
    if topic == NO_TOPIC {
        return false;
    }
    let index = topic as usize;
    if known.len() <= index {
        known.resize(index + 1, None);
    }
    *known[index].get_or_insert_with(|| pattern.matches(&topics.topic_name(topic)))
}
