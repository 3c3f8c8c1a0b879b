//! Faults that tests put into delivery on purpose, to see that its histories find them.
//!
//! [`is_broken`] is false at compile time in whatever is not a test of this crate.

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Answers are given before they are durable.
    AnswersBeforeDurable,
    /// Events are not written into the ledger.
    LosesPublished,
    /// Attempts are not written into the ledger.
    LosesAttempts,
    /// Acknowledgments are not written into the ledger.
    LosesAcks,
    /// What groups have done is not written into the ledger.
    LosesDone,
    /// An acknowledgment of an older attempt counts.
    TakesStaleTokens,
    /// Events of a key do not wait for one another.
    NoOrder,
    /// What was in flight when the process ended stays so.
    ForgetsInFlight,
    /// Dead letters come without an escalation.
    NoEscalation,
    /// A snapshot begins with an event less than there is.
    SnapshotForgetsOne,
    /// A snapshot says that no attempt was made.
    SnapshotForgetsAttempts,
    /// A snapshot that was not finished counts.
    TrustsHalfSnapshot,
    /// A snapshot is retired with what stands before it.
    RetiresSnapshot,
}

#[cfg(test)]
impl Mutant {
    pub(crate) const ALL: [Self; 13] = [
        Self::AnswersBeforeDurable,
        Self::LosesPublished,
        Self::LosesAttempts,
        Self::LosesAcks,
        Self::LosesDone,
        Self::TakesStaleTokens,
        Self::NoOrder,
        Self::ForgetsInFlight,
        Self::NoEscalation,
        Self::SnapshotForgetsOne,
        Self::SnapshotForgetsAttempts,
        Self::TrustsHalfSnapshot,
        Self::RetiresSnapshot,
    ];
}

#[cfg(test)]
mod switch {
    use super::Mutant;
    use std::cell::Cell;

    thread_local! {
        static BROKEN: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Returns whether this thread runs with the fault.
    pub(crate) fn is_broken(mutant: Mutant) -> bool {
        BROKEN.get() == Some(mutant)
    }

    /// Has this thread run with a fault from now on, or without any.
    pub(crate) fn set(mutant: Option<Mutant>) {
        BROKEN.set(mutant);
    }
}

#[cfg(test)]
pub(crate) use switch::{is_broken, set};

/// Returns whether this thread runs with the fault.
#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn is_broken(_: Mutant) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::super::model::play;
    use super::{Mutant, set};

    #[test]
    fn each_fault_that_is_put_into_delivery_is_found_by_a_history() {
        for mutant in Mutant::ALL {
            set(Some(mutant));
            let found = std::panic::catch_unwind(|| play(40_000, 1));
            set(None);
            assert!(!matches!(found, Ok(Ok(()))), "{mutant:?} is not found");
            println!("{mutant:?} is found");
        }
    }
}
