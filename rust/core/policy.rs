//! What happens when a subscription has no room, and what its reader is told.

use crate::error::ConfigError;
use std::time::Duration;

/// What a publisher does at a subscription without room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Policy {
    /// It waits for room, at most `max_block_duration`; then this subscription misses the event.
    Block,
    /// Nobody gets the event and the publisher is told.
    Reject,
    /// The subscription misses the event.
    DropNewest,
    /// The subscription loses its oldest event.
    DropOldest,
    /// The subscription keeps the newest event of each key; with as many keys pending as it can
    /// hold, a new one takes the place of the oldest.
    Conflate,
}

impl Policy {
    /// Every policy, in the order of the documentation.
    pub const ALL: [Self; 5] =
        [Self::Block, Self::Reject, Self::DropNewest, Self::DropOldest, Self::Conflate];

    /// Returns the policy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Reject => "reject",
            Self::DropNewest => "drop_newest",
            Self::DropOldest => "drop_oldest",
            Self::Conflate => "conflate",
        }
    }
}

impl std::str::FromStr for Policy {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, ConfigError> {
        Self::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|policy| policy.name()).collect();
            ConfigError::new(format!("policy was {name:?}; it must be one of {}", names.join(", ")))
        })
    }
}

/// What a reader is told about events it missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnLag {
    /// `Lagged` stands in the stream exactly where the events are missing.
    #[default]
    Raise,
    /// Missed events are only counted.
    Count,
}

/// How a bus treats subscriptions that cannot keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackpressureConfig {
    /// Whether a subscription without a policy of its own overwrites instead of blocking.
    pub drop_oldest: bool,
    /// The number of pending events of one subscription that is reported, once per crossing; it
    /// is armed again when the subscription is down to half of it. `None` reports nothing.
    pub warn_threshold: Option<usize>,
    /// The longest time that one call of `publish` waits for room.
    pub max_block_duration: Duration,
}

impl Default for BackpressureConfig {
    fn default() -> Self {
        Self {
            drop_oldest: false,
            warn_threshold: None,
            max_block_duration: Duration::from_secs(1),
        }
    }
}

/// The most events a subscription can be asked to hold.
pub const MAX_CAPACITY: usize = 1 << 30;

/// Returns `capacity` (events) rounded up to a power of two.
pub(crate) fn rounded_capacity(capacity: usize) -> Result<usize, ConfigError> {
    if capacity == 0 {
        return Err(ConfigError::new("capacity was 0; it must be at least 1"));
    }
    if capacity > MAX_CAPACITY {
        return Err(ConfigError::new(format!(
            "capacity was {capacity}; it must be at most {MAX_CAPACITY}"
        )));
    }
    Ok(capacity.next_power_of_two())
}
