//! What a bus and a subscription are asked to be.

use crate::conflation::KeyFn;
use crate::error::ConfigError;
use crate::policy::{BackpressureConfig, OnLag, Policy};
use crate::topic::Pattern;

/// How a bus carries events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// One bounded channel per subscription.
    LockFree,
    /// One shared channel that overwrites.
    #[cfg(feature = "broadcast")]
    Broadcast,
    /// One sequence of slots for all subscriptions, each with a cursor of its own.
    Ring,
}

impl Backend {
    /// Every backend that is compiled in.
    pub const ALL: &[Self] = &[
        Self::LockFree,
        #[cfg(feature = "broadcast")]
        Self::Broadcast,
        Self::Ring,
    ];

    /// Returns the backend's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::LockFree => "lock_free",
            #[cfg(feature = "broadcast")]
            Self::Broadcast => "broadcast",
            Self::Ring => "ring",
        }
    }

    /// Returns the policy that a subscription has, or why the backend cannot keep it.
    pub(super) fn policy(
        self,
        asked: Option<Policy>,
        drop_oldest: bool,
    ) -> Result<Policy, ConfigError> {
        match self {
            Self::LockFree | Self::Ring => match asked {
                Some(Policy::DropNewest) if self == Self::Ring => Err(ConfigError::new(
                    "policy was drop_newest; on backend ring a slot is for everybody, it cannot be \
                     kept from one subscription: use drop_oldest, or backend lock_free",
                )),
                Some(policy) => Ok(policy),
                None if drop_oldest => Ok(Policy::DropOldest),
                None => Ok(Policy::Block),
            },
            #[cfg(feature = "broadcast")]
            Self::Broadcast => match asked {
                None | Some(Policy::DropOldest) => Ok(Policy::DropOldest),
                Some(Policy::Conflate) => Ok(Policy::Conflate),
                Some(policy) => Err(ConfigError::new(format!(
                    "policy was {}; backend broadcast can only overwrite (drop_oldest) and \
                     conflate: use backend lock_free",
                    policy.name()
                ))),
            },
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, ConfigError> {
        Self::ALL.iter().copied().find(|backend| backend.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|backend| backend.name()).collect();
            ConfigError::new(format!(
                "backend was {name:?}; it must be one of {}",
                names.join(", ")
            ))
        })
    }
}

/// What a bus is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusConfig {
    /// The capacity of a subscription that asks for none (`lock_free`), or of what all share
    /// (`broadcast`, `ring`), in events; rounded up to a power of two.
    pub capacity: usize,
    /// What happens to subscriptions that cannot keep up.
    pub backpressure: BackpressureConfig,
    /// The most topics the bus will know.
    pub max_topics: usize,
    /// The topics of which the last event is kept for [`EventBus::last`](crate::EventBus::last)
    /// and for snapshots; `None` keeps nothing.
    pub keep_last: Option<Pattern>,
    /// Publications for each one whose latency is measured, in the mean: they are drawn at random.
    /// A measurement takes longer than 20 publications on a ring. `None` measures none.
    pub latency_sampling: Option<u32>,
    /// How publishers on a ring get past each other.
    pub producers: Producers,
    /// Who pays for finding out that a reader sleeps.
    pub wake_mode: WakeMode,
}

impl Default for BusConfig {
    fn default() -> Self {
        Self {
            capacity: 10_000,
            backpressure: BackpressureConfig::default(),
            max_topics: 65_536,
            keep_last: None,
            latency_sampling: Some(1_024),
            producers: Producers::default(),
            wake_mode: WakeMode::default(),
        }
    }
}

/// How the publishers of a ring get past each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Producers {
    /// Whoever publishes alone does so without a locked instruction; several take turns, one slot at
    /// a time. A thread that is descheduled in the middle of a publication stops the others.
    #[default]
    Shared,
    /// Publishers hold no lock while they write. One that is descheduled in the middle of a
    /// publication keeps what comes after it from being read until it goes on, but keeps nobody from
    /// publishing before the limit of the last sweep. Each publication has a price: two locked
    /// instructions and a fence. There is no [`Producer`](crate::Producer). Only backend `ring` has
    /// it; where an exclusion serializes publishers anyway (Python) it changes nothing.
    Strict,
}

impl Producers {
    /// Both ways.
    pub const ALL: &[Self] = &[Self::Shared, Self::Strict];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Strict => "strict",
        }
    }
}

impl std::str::FromStr for Producers {
    type Err = ConfigError;

    fn from_str(name: &str) -> Result<Self, ConfigError> {
        Self::ALL.iter().copied().find(|producers| producers.name() == name).ok_or_else(|| {
            ConfigError::new(format!("producers was {name:?}; it must be shared or strict"))
        })
    }
}

/// Who pays for finding out that a reader sleeps. On other backends than `ring` publishers hold a lock
/// and fence, unless the mode is [`WakeMode::Polling`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum WakeMode {
    /// A reader that goes to sleep, where the system can fence all threads for it (`membarrier`), some
    /// microseconds each time; elsewhere as [`WakeMode::Fenced`]. Publishing costs nothing more.
    #[default]
    Auto,
    /// Each publication and each reader that goes to sleep, some nanoseconds. Then no thread publishes
    /// without a lock either, but a [`Producer`](crate::Producer) or strict ones. It pays where there
    /// are fewer than about a thousand publications for each time that a reader goes to sleep.
    Fenced,
    /// Each reader, a CPU as long as it waits: nobody sleeps for events, so that publishers fence for
    /// no sleeper and wake nobody. A thread that waits looks a few times and then lets others run
    /// between its looks, also by [`WaitStrategy::Park`](crate::WaitStrategy::Park); a task has its
    /// executor come round again. Of those who wait for one subscription, whoever looks first has the
    /// event. What asks to be told is refused
    /// ([`EventSubscription::set_waker`](crate::EventSubscription::set_waker)).
    ///
    /// Publishers that wait for room sleep as ever and are told by readers, in their turn. Where an
    /// exclusion serializes publishers anyway (Python) it changes nothing.
    Polling,
}

/// What a subscription asks for.
#[derive(Debug, Clone)]
pub struct SubscribeOptions<T> {
    /// What metrics and explanations call it, unique among the subscriptions of the bus.
    pub name: Option<String>,
    /// The topics it wants; `None` wants everything, also events without a topic.
    pub pattern: Option<Pattern>,
    /// The most events it can hold, rounded up to a power of two; `None` is the bus's capacity.
    pub capacity: Option<usize>,
    /// What happens when it has no room; `None` is the bus's.
    pub policy: Option<Policy>,
    /// What its reader is told about missed events.
    pub on_lag: OnLag,
    /// What a `conflate` subscription keeps the newest event of; `None` is the topic, and events
    /// without one are one key of their own. Other policies have no key.
    pub key: Option<KeyFn<T>>,
    /// Whether it begins with the last events of the topics that it wants, as far as the bus keeps
    /// them, in the order in which they were published. They count as offered, stand before
    /// everything else, and take no room. Live events go on exactly where they end.
    pub snapshot: bool,
    /// The first event that it wants; other than [`Start::Now`] on a ring only.
    pub start: Start,
}

/// Where a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Start {
    /// At the first event that is published after it has joined.
    #[default]
    Now,
    /// At the oldest event that is still kept: of a ring of `n` at least three quarters, if so many
    /// were published.
    OldestKept,
    /// At the event with this number in the order of the bus, the first being 0. If it is no longer
    /// kept, the subscription is told how many are missing before the oldest.
    Sequence(u64),
}

impl<T> Default for SubscribeOptions<T> {
    fn default() -> Self {
        Self {
            pattern: None,
            capacity: None,
            policy: None,
            on_lag: OnLag::default(),
            key: None,
            snapshot: false,
            start: Start::Now,
            name: None,
        }
    }
}

/// Why a subscription could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The backend cannot keep what was asked for.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The bus is closed.
    #[error("the bus is closed; subscribe before close()")]
    Closed,
}

#[cfg(all(test, not(any(tickbus_loom, tickbus_shuttle))))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::{Backend, BusConfig, WakeMode};
    use crate::barrier::Fences;
    use crate::bus::Bus;
    use crate::subscription::AsyncEventSubscription;
    use std::future::Future;
    use std::task::{Context, Waker};

    #[test]
    fn a_fenced_ring_asks_the_system_for_nothing() {
        let fences = |wake_mode| {
            let config = BusConfig { wake_mode, ..Default::default() };
            let bus = Bus::<u64>::new(Backend::Ring, config).unwrap();
            bus.share().fences
        };
        assert_eq!(fences(WakeMode::Fenced), Fences::Symmetric);
        assert_eq!(fences(WakeMode::Auto), Fences::best());
        assert_eq!(fences(WakeMode::Polling), Fences::best());
    }

    #[test]
    fn nobody_stands_in_line_where_nobody_is_woken() {
        for &backend in Backend::ALL {
            for (wake_mode, is_woken) in [(WakeMode::Auto, true), (WakeMode::Polling, false)] {
                let config = BusConfig { wake_mode, ..Default::default() };
                let bus = Bus::<u64>::new(backend, config).unwrap();
                let reader = bus.subscribe_with(Default::default()).unwrap();
                let reader = AsyncEventSubscription::from(reader);
                let is_anybody_asleep = || bus.share().dormitory.asleep().any_of(u64::MAX);
                let mut recv = Box::pin(reader.recv());
                let context = &mut Context::from_waker(Waker::noop());
                assert!(recv.as_mut().poll(context).is_pending());
                assert_eq!(is_anybody_asleep(), is_woken);
                drop(recv);
                assert!(!is_anybody_asleep());
            }
        }
    }
}
