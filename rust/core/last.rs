//! The last event of each topic, for those who ask later: `last` reads one, a snapshot reads all.
//!
//! Only the holder of the publish token touches it, so what is kept and what was published are
//! never apart: who joins under the token gets a snapshot that ends exactly where the live events
//! begin.

use crate::error::ConfigError;
use crate::topic::Pattern;

/// The last events of the topics that a pattern wants; as many as the bus knows topics at most.
#[derive(Debug)]
pub(crate) struct LastEvents<T> {
    pattern: Pattern,
    /// By topic id; `None` where the pattern does not want the topic.
    topics: Vec<Option<Last<T>>>,
}

#[derive(Debug)]
struct Last<T> {
    /// When it was published, as a number that only grows.
    number: u64,
    event: Option<T>,
}

impl<T: Clone> LastEvents<T> {
    pub(crate) fn new(pattern: Pattern) -> Self {
        // Events without a topic have no place of their own.
        Self { pattern, topics: Vec::from([None]) }
    }

    /// Makes a place for a topic; ids come one after another.
    pub(crate) fn learn(&mut self, id: u32, name: &str) {
        if self.topics.len() == id as usize {
            let wanted = self.pattern.matches(name);
            self.topics.push(wanted.then_some(Last { number: 0, event: None }));
        }
    }

    /// Keeps an event as the last of its topic, if the topic is wanted, and returns the one before.
    pub(crate) fn keep(&mut self, topic: u32, number: u64, event: &T) -> Option<T> {
        let last = self.topics[topic as usize].as_mut()?;
        last.number = number;
        last.event.replace(event.clone())
    }

    /// Returns the last event of a topic, `None` if the bus does not know it.
    pub(crate) fn last(&self, id: Option<u32>, name: &str) -> Result<Option<T>, ConfigError> {
        if let Some(last) = id.and_then(|id| self.topics[id as usize].as_ref()) {
            return Ok(last.event.clone());
        }
        if id.is_none() && self.pattern.matches(name) {
            return Ok(None);
        }
        Err(ConfigError::new(format!(
            "topic was {name:?}; the bus keeps the last events of {:?} only: make it with a \
             keep_last that matches",
            self.pattern.to_string()
        )))
    }

    /// Returns the last events of the topics that `wants` picks by their ids, in the order in which
    /// they were published.
    pub(crate) fn snapshot(&self, wants: impl Fn(u32) -> bool) -> Vec<T> {
        let mut found: Vec<_> = self.each().filter(|&(id, ..)| wants(id)).collect();
        found.sort_unstable_by_key(|&(_, number, _)| number);
        found.into_iter().map(|(.., event)| event.clone()).collect()
    }

    /// Yields the last event of each topic that has one, with the topic's id and the event's number.
    pub(crate) fn each(&self) -> impl Iterator<Item = (u32, u64, &T)> {
        let topics = (0..).zip(&self.topics);
        topics.filter_map(|(id, last)| {
            let last = last.as_ref()?;
            Some((id, last.number, last.event.as_ref()?))
        })
    }
}
