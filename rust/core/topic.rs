//! Topics, patterns over them, and the table that says who wants which topic.
//!
//! A topic is compiled once: its row lists the subscriptions that want it, kept right by every
//! join and leave. Publishing reads one row, whatever the number of patterns.

use crate::error::ConfigError;
use crate::sync::Counter;
use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// The most bytes a topic or pattern may have.
pub const MAX_TOPIC_BYTES: usize = 255;

/// A topic known to a bus; publishing on it looks nothing up.
#[derive(Debug, Clone)]
pub struct Topic {
    pub(crate) bus: u64,
    pub(crate) id: u32,
    pub(crate) name: Arc<str>,
    pub(crate) interest: Arc<Interest>,
}

impl PartialEq for Topic {
    fn eq(&self, other: &Self) -> bool {
        (self.bus, self.id) == (other.bus, other.id)
    }
}

impl Eq for Topic {}

impl Hash for Topic {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.bus, self.id).hash(state);
    }
}

/// How many subscriptions want a topic, and which: for publishers that do not hold the token, and
/// may find what was true a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Interest {
    wanting: Counter,
    /// The slots, a bit each; the last bit is for all that have none of their own.
    mask: Counter,
}

/// The bit in [`Interest::mask`] of all slots that have none of their own.
pub(crate) const OTHER_SLOTS: u64 = 1 << (u64::BITS - 1);

/// Returns the bit of a slot in [`Interest::mask`].
#[inline]
pub(crate) fn interest_bit(slot: u32) -> u64 {
    1 << slot.min(OTHER_SLOTS.trailing_zeros())
}

impl Interest {
    #[inline]
    pub(crate) fn wanting(&self) -> usize {
        self.wanting.value() as usize
    }

    #[inline]
    pub(crate) fn mask(&self) -> u64 {
        self.mask.value()
    }
}

impl Topic {
    /// Returns the id of the bus that knows the topic.
    pub fn bus(&self) -> u64 {
        self.bus
    }

    /// Returns the topic's number in its bus: they are counted from 1.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns the topic's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A pattern over topics: levels separated by dots, `*` for one level, `>` for one or more at the
/// end (the wildcards of NATS). Patterns can be combined.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern(Form);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Form {
    Levels(Box<str>),
    Any(Box<[Pattern]>),
    All(Box<[Pattern]>),
}

impl Pattern {
    /// Returns the checked pattern.
    ///
    /// # Errors
    ///
    /// `ConfigError` if a level is empty, a wildcard shares its level, or `>` is not last.
    pub fn new(text: &str) -> Result<Self, ConfigError> {
        check_levels("pattern", text)?;
        let mut levels = text.split('.').peekable();
        while let Some(level) = levels.next() {
            if level.len() > 1 && level.contains(['*', '>']) {
                return Err(ConfigError::new(format!(
                    "pattern was {text:?}; a wildcard must be a whole level, as in \"trades.*\""
                )));
            }
            if level == ">" && levels.peek().is_some() {
                return Err(ConfigError::new(format!(
                    "pattern was {text:?}; \">\" must be the last level, as in \"trades.>\""
                )));
            }
        }
        Ok(Self(Form::Levels(text.into())))
    }

    /// Returns the pattern that wants what at least one of these wants.
    pub fn any_of(patterns: impl IntoIterator<Item = Self>) -> Self {
        Self::combined(patterns, Form::Any)
    }

    /// Returns the pattern that wants what each of these wants.
    pub fn all_of(patterns: impl IntoIterator<Item = Self>) -> Self {
        Self::combined(patterns, Form::All)
    }

    fn combined(patterns: impl IntoIterator<Item = Self>, form: fn(Box<[Self]>) -> Form) -> Self {
        let mut patterns: Vec<_> = patterns.into_iter().collect();
        match patterns.len() {
            1 => patterns.swap_remove(0),
            _ => Self(form(patterns.into())),
        }
    }

    /// Returns whether the pattern wants a topic.
    pub fn matches(&self, topic: &str) -> bool {
        match &self.0 {
            Form::Levels(text) => levels_match(text, topic),
            Form::Any(patterns) => patterns.iter().any(|pattern| pattern.matches(topic)),
            Form::All(patterns) => patterns.iter().all(|pattern| pattern.matches(topic)),
        }
    }
}

fn levels_match(pattern: &str, topic: &str) -> bool {
    let mut topic_levels = topic.split('.');
    for level in pattern.split('.') {
        match (level, topic_levels.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (level, Some(found)) if level == found => {}
            _ => return false,
        }
    }
    topic_levels.next().is_none()
}

impl fmt::Display for Pattern {
    /// Writes the text; combined ones as in `(a|b)&c`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (patterns, sign) = match &self.0 {
            Form::Levels(text) => return f.write_str(text),
            Form::Any(patterns) => (patterns, "|"),
            Form::All(patterns) => (patterns, "&"),
        };
        for (place, pattern) in patterns.iter().enumerate() {
            if place > 0 {
                f.write_str(sign)?;
            }
            match pattern.0 {
                Form::Levels(_) => write!(f, "{pattern}")?,
                _ => write!(f, "({pattern})")?,
            }
        }
        Ok(())
    }
}

fn check_levels(what: &str, text: &str) -> Result<(), ConfigError> {
    if text.len() > MAX_TOPIC_BYTES {
        return Err(ConfigError::new(format!(
            "{what} had {} bytes; it must have at most {MAX_TOPIC_BYTES}",
            text.len()
        )));
    }
    if text.split('.').any(str::is_empty) {
        return Err(ConfigError::new(format!(
            "{what} was {text:?}; every level between dots must have at least one character"
        )));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(ConfigError::new(format!(
            "{what} was {text:?}; it must not contain spaces or control characters"
        )));
    }
    Ok(())
}

/// Returns an error if the name is no topic's.
pub(crate) fn check_topic(name: &str) -> Result<(), ConfigError> {
    check_exact("topic", name)
}

/// Returns an error if the name, that of a `what`, cannot stand in a topic.
pub(crate) fn check_exact(what: &str, name: &str) -> Result<(), ConfigError> {
    check_levels(what, name)?;
    if name.contains(['*', '>']) {
        return Err(ConfigError::new(format!(
            "{what} was {name:?}; wildcards belong to patterns, an event has one exact topic"
        )));
    }
    Ok(())
}

/// The row of events without a topic: wanted by every subscription without a pattern.
pub(crate) const NO_TOPIC: u32 = 0;

/// Who wants which topic. Guarded by the publish token.
#[derive(Debug)]
pub(crate) struct TopicTable {
    ids: HashMap<Arc<str>, u32>,
    /// By topic id; the first row is [`NO_TOPIC`].
    rows: Vec<Row>,
    max_topics: usize,
}

#[derive(Debug)]
struct Row {
    name: Arc<str>,
    /// Slots of the subscriptions that want the topic, in the order in which they joined.
    wanted: Vec<u32>,
    /// The same as bits, 64 slots each.
    masks: Vec<u64>,
    interest: Arc<Interest>,
}

/// Slots in one word of a mask.
const MASK_BITS: usize = u64::BITS as usize;

impl Row {
    fn new(name: Arc<str>, wanted: Vec<u32>) -> Self {
        let mut row = Self { name, wanted, masks: Vec::new(), interest: Arc::default() };
        row.tell_interest();
        row
    }

    fn tell_interest(&mut self) {
        self.masks.clear();
        for &slot in &self.wanted {
            let word = slot as usize / MASK_BITS;
            if self.masks.len() <= word {
                self.masks.resize(word + 1, 0);
            }
            self.masks[word] |= 1 << (slot as usize % MASK_BITS);
        }
        self.interest.mask.set(self.wanted.iter().fold(0, |mask, &slot| mask | interest_bit(slot)));
        self.interest.wanting.set(self.wanted.len() as u64);
    }
}

impl TopicTable {
    pub(crate) fn new(max_topics: usize) -> Self {
        let untitled = Row::new("".into(), Vec::new());
        Self { ids: HashMap::new(), rows: vec![untitled], max_topics }
    }

    /// Returns the id and name of a topic, which is compiled against `subscriptions` if it is new.
    pub(crate) fn intern<'a>(
        &mut self,
        name: &str,
        subscriptions: impl Iterator<Item = (u32, Option<&'a Pattern>)>,
    ) -> Result<(u32, Arc<str>), ConfigError> {
        if let Some(&id) = self.ids.get(name) {
            return Ok((id, self.name(id)));
        }
        check_topic(name)?;
        if self.ids.len() >= self.max_topics {
            return Err(ConfigError::new(format!(
                "topic {name:?} would be number {}; the bus was made with max_topics={}: topics \
                 are a bounded vocabulary, put what varies into the event",
                self.ids.len() + 1,
                self.max_topics
            )));
        }
        let id = u32::try_from(self.rows.len())
            .map_err(|_| ConfigError::new("a bus cannot know more than 2^32 topics"))?;
        let name: Arc<str> = name.into();
        let wanted = subscriptions
            .filter(|(_, pattern)| pattern.is_none_or(|pattern| pattern.matches(&name)))
            .map(|(slot, _)| slot)
            .collect();
        self.rows.push(Row::new(name.clone(), wanted));
        self.ids.insert(name.clone(), id);
        Ok((id, name))
    }

    /// Returns the id of a topic that is known.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    pub(crate) fn name(&self, id: u32) -> Arc<str> {
        self.rows[id as usize].name.clone()
    }

    #[inline]
    pub(crate) fn wanted(&self, id: u32) -> &[u32] {
        &self.rows[id as usize].wanted
    }

    /// Returns which of the 64 slots from `word * 64` on want the topic.
    #[inline]
    pub(crate) fn mask(&self, id: u32, word: usize) -> u64 {
        self.rows[id as usize].masks.get(word).copied().unwrap_or(0)
    }

    /// Returns whether a subscription wants the topic.
    pub(crate) fn wants(&self, id: u32, slot: u32) -> bool {
        let mask = self.mask(id, slot as usize / MASK_BITS);
        mask & (1 << (slot as usize % MASK_BITS)) != 0
    }

    pub(crate) fn interest(&self, id: u32) -> &Arc<Interest> {
        &self.rows[id as usize].interest
    }

    pub(crate) fn join(&mut self, slot: u32, pattern: Option<&Pattern>) {
        for (id, row) in self.rows.iter_mut().enumerate() {
            let wants = match pattern {
                None => true,
                Some(pattern) => id != NO_TOPIC as usize && pattern.matches(&row.name),
            };
            if wants {
                row.wanted.push(slot);
                row.tell_interest();
            }
        }
    }

    pub(crate) fn leave(&mut self, slot: u32) {
        for row in &mut self.rows {
            let before = row.wanted.len();
            row.wanted.retain(|&wanting| wanting != slot);
            if row.wanted.len() < before {
                row.tell_interest();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn a_star_is_one_level_and_a_greater_sign_is_the_rest() {
        let matches = |pattern: &str, topic| Pattern::new(pattern).is_ok_and(|p| p.matches(topic));
        assert!(matches("trades.*", "trades.BTCUSDT"));
        assert!(!matches("trades.*", "trades"));
        assert!(!matches("trades.*", "trades.binance.BTCUSDT"));
        assert!(matches("trades.>", "trades.binance.BTCUSDT"));
        assert!(!matches("trades.>", "trades"));
        assert!(matches("*.binance.*", "quotes.binance.BTC-USD"));
        assert!(matches(">", "anything"));
        assert!(matches("a.b", "a.b"));
        assert!(!matches("a.b", "a.bc"));
    }

    #[test]
    fn combined_patterns_want_what_any_or_all_of_them_want() {
        let pattern = |text| Pattern::new(text).expect("it is a pattern");
        let types = || Pattern::any_of(["trade", "trade.>", "quote.>"].map(pattern));
        let both = Pattern::all_of([types(), pattern("*.BRK.B")]);
        for (topic, wanted) in [("trade.BRK.B", true), ("quote.BRK.B", true), ("fill.BRK.B", false)]
        {
            assert_eq!(both.matches(topic), wanted, "{topic}");
        }
        assert!(types().matches("trade") && !both.matches("trade") && !both.matches("trade.B"));
        assert_eq!(both.to_string(), "(trade|trade.>|quote.>)&*.BRK.B");
        assert_eq!(Pattern::any_of([pattern("a.*")]).to_string(), "a.*");
        assert!(!Pattern::any_of([]).matches("a") && Pattern::all_of([]).matches("a"));
    }

    #[test]
    fn a_pattern_that_cannot_match_is_refused() {
        for text in ["", ".", "a..b", "a.>.b", "a*", "a.b*", "a b", &"x".repeat(256)] {
            assert!(Pattern::new(text).is_err(), "{text:?} was accepted");
        }
    }
}
