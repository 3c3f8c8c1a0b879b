//! Faults that tests put into delivery on purpose, to see that its histories find them.

use crate::store::mutants::mutants;

mutants! {
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
mod tests {
    use super::super::model::play;
    use super::Mutant;

    #[test]
    fn each_fault_that_is_put_into_delivery_is_found_by_a_history() {
        for &mutant in Mutant::ALL {
            let broken = || Mutant::with(Some(mutant), || play(40_000, 1));
            let found = std::panic::catch_unwind(broken);
            assert!(!matches!(found, Ok(Ok(()))), "{mutant:?} is not found");
            println!("{mutant:?} is found");
        }
    }
}
