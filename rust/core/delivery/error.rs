//! What can go wrong with delivery.

use crate::error::Lagged;
use crate::store::StoreError;
use std::sync::Arc;

/// Why something was not delivered, or not taken back.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DeliveryError {
    /// The log, or the ledger of what was delivered, did not do what it was asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Records are gone that the group had not read. It goes on behind them.
    #[error("{}", lagged(.0))]
    Lagged(Lagged),
    /// It was delivered again since, or is settled.
    #[error(
        "attempt {attempt} at {what} is not the newest one any more: it was delivered again, or is \
         settled; drop it, and raise the lease if that is too short"
    )]
    Stale {
        /// Of what.
        what: String,
        /// The attempt.
        attempt: u32,
    },
    /// There is no such group or consumer any more.
    #[error("{name:?} was removed; register it again")]
    Removed {
        /// Its name.
        name: Arc<str>,
    },
    /// There is no such event or dead letter.
    #[error("there is no {what} {id}; it may be settled by now")]
    Unknown {
        /// What it is not.
        what: &'static str,
        /// The event.
        id: u64,
    },
}

fn lagged(Lagged { missed, .. }: &Lagged) -> String {
    format!(
        "the group had expired, and {missed} records that it had not read are gone; fetch again to \
         go on behind them, and raise max_idle to keep them longer"
    )
}

/// A risk event that is not durable.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}; {delivered_live} consumers got the event all the same, once and unrecorded")]
pub struct PublishCriticalError {
    /// Why it is not.
    #[source]
    pub error: StoreError,
    /// How many consumers of this process got it all the same, once. None of them counts as an
    /// acknowledgment.
    pub delivered_live: usize,
}
