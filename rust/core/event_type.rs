//! What an event tells, as a byte: codes with names, in five ranges.
//!
//! A newtype and not an enumeration, because any byte may come in from a file or a network, and
//! because programs register codes of their own.

use crate::error::{ConfigError, EventTypeError};
use crate::names::check_name;
use crate::sync::Counter;
use parking_lot::Mutex;
use std::fmt;
use std::sync::{LazyLock, OnceLock};

/// What an event tells. The range of its code says for whom, and from 128 on how urgently.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable)]
pub struct EventType(pub u8);

macro_rules! event_types {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        #[expect(non_upper_case_globals, reason = "they read like the variants of an enum")]
        impl EventType {
            $($(#[$doc])* pub const $name: Self = Self($code);)*

            /// The types that are always there, with the names of their constants.
            pub const BUILT_IN: &[(Self, &str)] = &[$((Self($code), stringify!($name)),)*];
        }

        const fn built_in_name(code: u8) -> Option<&'static str> {
            match code {
                $($code => Some($text),)*
                _ => None,
            }
        }
    };
}

event_types! {
    /// A price changed.
    PriceUpdate = 0, "price_update";
    /// More is traded than usual.
    VolumeSpike = 1, "volume_spike";
    /// One side of the order book outweighs the other.
    OrderBookImbalance = 2, "order_book_imbalance";
    /// Bid and ask move apart.
    SpreadWidening = 3, "spread_widening";
    /// A strategy wants a position.
    SignalGenerated = 32, "signal_generated";
    /// An order was sent to a venue.
    OrderPlaced = 33, "order_placed";
    /// An order was filled.
    OrderFilled = 34, "order_filled";
    /// An order was canceled.
    OrderCancelled = 35, "order_cancelled";
    /// A position was opened.
    PositionOpened = 36, "position_opened";
    /// A position was closed.
    PositionClosed = 37, "position_closed";
    /// A risk limit is near.
    RiskLimitApproached = 64, "risk_limit_approached";
    /// A stop loss was triggered.
    StopLossTriggered = 65, "stop_loss_triggered";
    /// A drawdown passed its limit.
    DrawdownAlert = 66, "drawdown_alert";
    /// What moved apart moves together.
    CorrelationSpike = 67, "correlation_spike";
    /// A strategy was started.
    StrategyStarted = 96, "strategy_started";
    /// A strategy was paused.
    StrategyPaused = 97, "strategy_paused";
    /// Something cannot keep up.
    SystemOverload = 98, "system_overload";
    /// A connection was lost.
    ConnectionLost = 99, "connection_lost";
    /// A replay has come to its end; the metadata says how many records it has replayed.
    ReplayEnded = 100, "replay_ended";
    /// Everything has to stop.
    EmergencyStop = 128, "emergency_stop";
    /// A market looks manipulated.
    MarketManipulation = 129, "market_manipulation";
    /// Something happened that no model knows.
    BlackSwanDetected = 130, "black_swan_detected";
    /// A venue stopped trading.
    CircuitBreaker = 131, "circuit_breaker";
}

/// Names of codes that were registered.
static REGISTERED: [OnceLock<Box<str>>; 256] = [const { OnceLock::new() }; 256];
static REGISTERING: Mutex<()> = Mutex::new(());
static REGISTRATIONS: LazyLock<Counter> = LazyLock::new(Counter::default);

impl EventType {
    /// Gives a code a name, for the life of the process. Doing it again changes nothing.
    ///
    /// # Errors
    ///
    /// `EventTypeError` if the name has another code, the code has another name, or the name is not
    /// made of small ASCII letters, digits and underscores, with a letter first.
    pub fn register(name: &str, code: u8) -> Result<Self, EventTypeError> {
        check_type_name(name)?;
        let _registering = REGISTERING.lock();
        match (Self::from_name(name), Self(code).name()) {
            (Some(known), _) if known.0 == code => Ok(known),
            (Some(known), _) => {
                Err(EventTypeError::NameTaken { name: name.into(), code, known: known.0 })
            }
            (None, Some(known)) => {
                Err(EventTypeError::CodeTaken { code, name: name.into(), known })
            }
            (None, None) => {
                // Whoever finds it finds it counted, and whoever has counted too early counts again.
                REGISTRATIONS.add(1);
                let is_new = REGISTERED[usize::from(code)].set(name.into()).is_ok();
                debug_assert!(is_new, "codes are registered under the lock");
                REGISTRATIONS.add(1);
                Ok(Self(code))
            }
        }
    }

    /// Returns the type of a name such as `price_update`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::known().find(|known| known.name() == Some(name))
    }

    /// Returns the types that have names, in the order of their codes.
    pub fn known() -> impl Iterator<Item = Self> {
        (0..=u8::MAX).map(Self).filter(|event_type| event_type.name().is_some())
    }

    /// Returns the types that were registered.
    pub(crate) fn registered() -> impl Iterator<Item = Self> {
        Self::known().filter(|known| built_in_name(known.0).is_none())
    }

    /// Returns how often a type was registered.
    #[inline]
    pub(crate) fn registrations() -> u64 {
        REGISTRATIONS.observe()
    }

    /// Returns the name, the first level of the topics of such events, without a lock; `None` if
    /// the code was never registered.
    #[inline]
    pub fn name(self) -> Option<&'static str> {
        match built_in_name(self.0) {
            None => REGISTERED[usize::from(self.0)].get().map(Box::as_ref),
            name => name,
        }
    }

    /// Returns whether it tells something about a market: codes 0 to 31.
    #[inline]
    pub const fn is_market(self) -> bool {
        self.0 < 32
    }

    /// Returns whether it tells something about orders and positions: codes 32 to 63.
    #[inline]
    pub const fn is_trading(self) -> bool {
        matches!(self.0, 32..64)
    }

    /// Returns whether it tells something about risk: codes 64 to 95.
    #[inline]
    pub const fn is_risk(self) -> bool {
        matches!(self.0, 64..96)
    }

    /// Returns whether it tells something about the system: codes 96 to 127.
    #[inline]
    pub const fn is_system(self) -> bool {
        matches!(self.0, 96..128)
    }

    /// Returns whether it is critical, whatever the priority of the event: codes 128 to 255.
    #[inline]
    pub const fn is_critical(self) -> bool {
        self.0 >= 128
    }
}

impl fmt::Debug for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "EventType({}: {name})", self.0),
            None => write!(f, "EventType({})", self.0),
        }
    }
}

fn check_type_name(name: &str) -> Result<(), ConfigError> {
    check_name("event type", name)?;
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) || !name.chars().all(is_plain) {
        return Err(ConfigError::new(format!(
            "event type was {name:?}; it must be small letters, digits and underscores, with a \
             letter first, as in \"price_update\""
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::EventType;
    use crate::error::EventTypeError;

    #[test]
    fn the_built_in_codes_are_those_that_were_promised() {
        let codes = EventType::BUILT_IN.iter().map(|(event_type, name)| (event_type.0, *name));
        let promised = [
            (0, "PriceUpdate"),
            (1, "VolumeSpike"),
            (2, "OrderBookImbalance"),
            (3, "SpreadWidening"),
            (32, "SignalGenerated"),
            (33, "OrderPlaced"),
            (34, "OrderFilled"),
            (35, "OrderCancelled"),
            (36, "PositionOpened"),
            (37, "PositionClosed"),
            (64, "RiskLimitApproached"),
            (65, "StopLossTriggered"),
            (66, "DrawdownAlert"),
            (67, "CorrelationSpike"),
            (96, "StrategyStarted"),
            (97, "StrategyPaused"),
            (98, "SystemOverload"),
            (99, "ConnectionLost"),
            (100, "ReplayEnded"),
            (128, "EmergencyStop"),
            (129, "MarketManipulation"),
            (130, "BlackSwanDetected"),
            (131, "CircuitBreaker"),
        ];
        assert!(codes.eq(promised));
    }

    #[test]
    fn the_name_of_a_built_in_type_is_its_constant_in_small_letters() {
        for &(event_type, constant) in EventType::BUILT_IN {
            let mut expected = String::new();
            for c in constant.chars() {
                if c.is_ascii_uppercase() && !expected.is_empty() {
                    expected.push('_');
                }
                expected.push(c.to_ascii_lowercase());
            }
            assert_eq!(event_type.name(), Some(expected.as_str()));
            assert_eq!(EventType::from_name(&expected), Some(event_type));
        }
    }

    #[test]
    fn every_code_is_in_exactly_one_range() {
        for code in 0..=u8::MAX {
            let t = EventType(code);
            let ranges =
                [t.is_market(), t.is_trading(), t.is_risk(), t.is_system(), t.is_critical()];
            let expected = usize::from(code / 32).min(4);
            assert!((0..5).all(|range| ranges[range] == (range == expected)), "{code}");
        }
    }

    #[test]
    fn a_code_is_registered_once_and_conflicts_are_refused_both_ways() {
        assert_eq!(EventType(41).name(), None);
        assert_eq!(EventType::register("alpha_decay", 41), Ok(EventType(41)));
        assert_eq!(EventType::register("alpha_decay", 41), Ok(EventType(41)));
        assert_eq!(EventType(41).name(), Some("alpha_decay"));
        assert!(EventType::known().any(|known| known == EventType(41)));

        let name_taken = EventType::register("alpha_decay", 42);
        let expected =
            EventTypeError::NameTaken { name: "alpha_decay".into(), code: 42, known: 41 };
        assert_eq!(name_taken, Err(expected));
        let code_taken = EventType::register("beta_decay", 41);
        let expected =
            EventTypeError::CodeTaken { code: 41, name: "beta_decay".into(), known: "alpha_decay" };
        assert_eq!(code_taken, Err(expected));
        assert_eq!((EventType::from_name("beta_decay"), EventType(42).name()), (None, None));

        assert!(EventType::register("price_update", 0).is_ok());
        assert!(EventType::register("price_update", 43).is_err());
        assert!(EventType::register("emergency", 128).is_err());
    }

    #[test]
    fn a_name_that_is_no_level_of_a_topic_is_refused() {
        for name in ["", "Alpha", "alpha.decay", "alpha-decay", "alpha decay", "_a", "9a", "ä"] {
            let refused = EventType::register(name, 200);
            assert!(matches!(refused, Err(EventTypeError::Invalid(_))), "{name:?}");
        }
        assert_eq!(EventType(200).name(), None);
    }
}
