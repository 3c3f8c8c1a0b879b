//! Faults that tests put into the log on purpose, to see that its proofs find them.
//!
//! [`is_broken`] is false at compile time in whatever is not a test of this crate.

/// Defines `Mutant`, an enum of faults, and the switch that puts one of them into a thread.
macro_rules! mutants {
    ($($(#[doc = $what:literal])+ $name:ident,)+) => {
        /// A fault.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Mutant {
            $($(#[doc = $what])+ $name,)+
        }

        #[cfg(test)]
        impl Mutant {
            pub(crate) const ALL: &[Self] = &[$(Self::$name),+];

            /// Runs `f` with a fault, or without any.
            pub(crate) fn with<O>(mutant: Option<Self>, f: impl FnOnce() -> O) -> O {
                struct Mended(Option<Mutant>);
                impl Drop for Mended {
                    fn drop(&mut self) {
                        BROKEN.set(self.0);
                    }
                }
                let _mended = Mended(BROKEN.replace(mutant));
                f()
            }
        }

        #[cfg(test)]
        thread_local! {
            static BROKEN: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
        }

        /// Returns whether this thread runs with the fault.
        #[cfg(test)]
        pub(crate) fn is_broken(mutant: Mutant) -> bool {
            BROKEN.get() == Some(mutant)
        }

        /// Returns whether this thread runs with the fault.
        #[cfg(not(test))]
        #[inline(always)]
        pub(crate) const fn is_broken(_: Mutant) -> bool {
            false
        }
    };
}

pub(crate) use mutants;

mutants! {
    /// Records are durable before they are synced.
    AckBeforeSync,
    /// Only the newest file is synced.
    SyncOnlyNewest,
    /// The folder is never synced.
    NoFolderSync,
    /// The watermark in frames is one too high.
    WatermarkTooHigh,
    /// The watermark in frames counts what was written.
    WatermarkIsWritten,
    /// A seal says that all is durable without a sync.
    SealTrustsUnsynced,
    /// The CRC of a frame's header is not compared.
    NoFrameHeaderCrc,
    /// The CRC of a payload is not compared.
    NoPayloadCrc,
    /// The CRC of a segment's header is not compared.
    NoSegmentHeaderCrc,
    /// A frame's sequence is not compared.
    NoSequenceCheck,
    /// A frame's salt is not compared.
    NoSaltCheck,
    /// A segment's base is not compared with the end of the one before.
    NoBaseCheck,
    /// A segment's chain is not compared with that of the one before.
    NoChainCheck,
    /// What was acknowledged and is damaged is cut off.
    CutsDamage,
    /// Whether what is damaged was acknowledged is asked in its own segment only.
    LooksForWatermarkInOneSegment,
    /// A damaged frame is stepped over.
    SkipsHoles,
    /// Segments behind a cut stay.
    KeepsSegmentsBehind,
    /// A cut is sealed without being synced.
    NoSyncAfterCut,
    /// What follows a segment that was removed has its chain.
    ChainOfRemovedSegment,
    /// Sequences go on one too low after a recovery.
    ReusesSequence,
    /// A write that fails is forgotten.
    ForgetsFailedWrite,
    /// A sync that fails is tried again.
    RetriesSync,
    /// A short write counts as a whole one.
    ShortWriteIsWhole,
    /// No marker follows a commit.
    NoMarker,
    /// A log without room says that it took the event.
    FullTakes,
    /// What was retired is part of the log as long as it is there.
    KeepsRetired,
    /// Segments are retired without a note of it.
    RetiresWithoutNote,
    /// The note that segments are retired is not synced before they are removed.
    NoSyncOfNote,
    /// A file is used again with the header of the segment before.
    NoWipe,
    /// What takes the place of a segment is not synced before that is removed.
    NoSyncOfCompressed,
    /// Damage in a compressed segment is taken for a torn tail.
    CutsCompressed,
    /// A segment that cannot be opened is looked for in a compressed one.
    TakesAnyFailureForMissing,
    /// A commit is answered before it has its turn.
    AnswersBeforeTurn,
    /// A sync that fails is forgotten where many commit together.
    ForgetsFailedSync,
    /// A commit counts what others have written while it was synced.
    AcksWhatCameMeanwhile,
    /// The marker that `double` waits for is not synced.
    NoSecondSync,
    /// What was synced along with the marker of `double` is acknowledged without one.
    AcksWithSecondSync,
    /// Nothing reminds the committer of a marker that is not synced.
    NeverConfirms,
    /// The committer takes a marker for synced that is not.
    ConfirmsWithoutSync,
    /// What becomes durable with such a marker gets none.
    SettlesWithoutMarker,
}

#[cfg(test)]
mod tests {
    use super::super::sim::{Calls, Fault};
    use super::super::{crash, damage, failing};
    use super::Mutant;

    /// Returns the first proof that fails with the fault.
    fn found_by(mutant: Option<Mutant>) -> Option<&'static str> {
        type Proof = (&'static str, Box<dyn Fn() -> Result<(), String>>);
        let failures = |fault| move || failing::failures(Calls::Changing, fault, 60, 1).map(|_| ());
        let openings =
            |calls| move || failing::failed_openings(1, calls, Fault::Io, 10).map(|_| ());
        let proofs: [Proof; 15] = [
            ("behind", Box::new(|| damage::behind(1))),
            ("histories", Box::new(|| damage::histories(1))),
            ("parts", Box::new(|| damage::parts(1).map(|_| ()))),
            ("compressed flips", Box::new(|| damage::compressed_flips(1, 500))),
            ("reuse", Box::new(|| crash::reuse(1))),
            ("room", Box::new(failing::room)),
            ("settling", Box::new(crash::settling)),
            ("power cuts", Box::new(|| crash::power_cuts(1, 3_000).map(|_| ()))),
            ("flips", Box::new(|| damage::flips(1, 2_000).map(|_| ()))),
            ("EIO", Box::new(failures(Fault::Io))),
            ("ENOSPC", Box::new(failures(Fault::NoSpace))),
            ("short writes", Box::new(failures(Fault::Short))),
            ("openings", Box::new(openings(Calls::Changing))),
            ("reading openings", Box::new(openings(Calls::Reading))),
            ("more power cuts", Box::new(|| crash::power_cuts(2, 30_000).map(|_| ()))),
        ];
        proofs.into_iter().find_map(|(name, proof)| {
            let run = std::panic::AssertUnwindSafe(|| Mutant::with(mutant, &proof));
            (!matches!(std::panic::catch_unwind(run), Ok(Ok(())))).then_some(name)
        })
    }

    #[test]
    fn each_fault_that_is_put_into_the_log_is_found_by_a_proof_that_holds_without_it() {
        assert_eq!(found_by(None), None, "a proof fails although nothing is broken");
        for &mutant in Mutant::ALL {
            let Some(proof) = found_by(Some(mutant)) else { panic!("{mutant:?} is not found") };
            println!("{mutant:?} is found by {proof}");
        }
    }
}
