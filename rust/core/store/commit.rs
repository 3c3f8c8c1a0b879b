//! Committing together: whoever needs something durable while nobody syncs does it for all, and
//! who comes meanwhile waits for the next one. So groups are as large as the disk is slow.

use super::error::StoreError;
use super::log::Log;
use super::mutants::{Mutant, is_broken};
use super::storage::Storage;
use super::tenant::Tenancy;
use crate::sync::Counter;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A log that many threads append to, and wait for.
pub(crate) struct Committed<S: Storage> {
    log: Mutex<Log<S>>,
    state: Mutex<State>,
    /// Something in `state` has changed.
    changed: Condvar,
    /// The committer has something to do.
    wishes: Condvar,
    /// The same for tasks.
    notify: Notify,
    /// A marker is waited for before anything is acknowledged.
    is_double: bool,
    /// Who is told what has become durable.
    tenancy: Tenancy,
    refused: Counter,
    syncs: Counter,
    sync_nanoseconds: Counter,
}

#[derive(Debug, Default)]
struct State {
    /// Records below were acknowledged.
    durable: u64,
    is_syncing: bool,
    /// How often that failed, and how the last time.
    failures: u64,
    failure: Option<StoreError>,
    /// A marker was written that is not synced.
    is_unconfirmed: bool,
    /// Somebody asks the committer to sync now.
    is_wanted: bool,
    is_closed: bool,
    /// Why nothing more becomes durable.
    end: Option<StoreError>,
}

impl State {
    /// Returns how waiting for the records below a sequence ends, if it does now; `failures` is how
    /// many there were when it began.
    fn outcome(&self, upto: u64, failures: u64) -> Option<Result<(), StoreError>> {
        if self.durable >= upto {
            return Some(Ok(()));
        }
        let failure = self.failure.as_ref().filter(|_| self.failures > failures);
        failure.or(self.end.as_ref()).map(|error| Err(error.clone()))
    }
}

impl<S: Storage> Committed<S> {
    pub(crate) fn new(log: Log<S>, is_double: bool) -> Self {
        let state = State { durable: log.durable(), ..State::default() };
        Self {
            log: Mutex::new(log),
            state: Mutex::new(state),
            changed: Condvar::new(),
            wishes: Condvar::new(),
            notify: Notify::new(),
            is_double,
            tenancy: Tenancy::default(),
            refused: Counter::default(),
            syncs: Counter::default(),
            sync_nanoseconds: Counter::default(),
        }
    }

    /// Returns the place of what stands on the log.
    pub(crate) fn tenancy(&self) -> &Tenancy {
        &self.tenancy
    }

    /// Returns the log, to append to.
    pub(crate) fn log(&self) -> MutexGuard<'_, Log<S>> {
        self.log.lock()
    }

    /// Returns below which sequence all records were acknowledged.
    pub(crate) fn durable(&self) -> u64 {
        self.state.lock().durable
    }

    /// Waits until all records below a sequence are durable, and sees to it if nobody else does.
    pub(crate) fn commit(&self, upto: u64) -> Result<(), StoreError> {
        while self.durable() < upto {
            if is_broken(Mutant::AnswersBeforeTurn) {
                self.state.lock().durable = upto;
            }
            self.turn(upto, || {
                let (durable, is_marked) = self.sync_and_mark()?;
                match self.is_double {
                    true if is_broken(Mutant::NoSecondSync) => {}
                    // What the second sync makes durable besides has no marker yet.
                    true => self.sync_once()?,
                    // A marker goes with the next commit, or after a while without one.
                    false if is_marked => self.leave_unconfirmed(),
                    false => {}
                }
                match () {
                    () if is_broken(Mutant::AcksWhatCameMeanwhile) => Ok(self.log.lock().written()),
                    () if is_broken(Mutant::AcksWithSecondSync) => Ok(self.log.lock().durable()),
                    () => Ok(durable),
                }
            })?;
        }
        Ok(())
    }

    /// Syncs a marker that nothing has followed. What becomes durable besides gets one of its own.
    pub(crate) fn settle(&self) -> Result<(), StoreError> {
        self.state.lock().is_unconfirmed = false;
        if is_broken(Mutant::ConfirmsWithoutSync) {
            return Ok(());
        }
        self.turn(u64::MAX, || {
            let (durable, is_marked) = self.sync_and_mark()?;
            if is_marked && !is_broken(Mutant::SettlesWithoutMarker) {
                self.leave_unconfirmed();
            }
            Ok(durable)
        })
    }

    /// Makes all records durable and ends the current segment.
    pub(crate) fn seal(&self) -> Result<(), StoreError> {
        let next = self.log.lock().next();
        self.commit(next)?;
        self.turn(u64::MAX, || {
            let mut log = self.log.lock();
            log.seal().map(|()| log.durable())
        })
    }

    /// As `seal`, for good.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        let closed = self.turn(u64::MAX, || {
            let mut log = self.log.lock();
            log.close().map(|()| log.durable())
        });
        self.stop(StoreError::Closed);
        closed
    }

    /// Runs `sync` while nobody else does, and acknowledges what it returns. Returns without it once
    /// what is below `upto` is.
    fn turn(
        &self,
        upto: u64,
        sync: impl FnOnce() -> Result<u64, StoreError>,
    ) -> Result<(), StoreError> {
        let mut state = self.state.lock();
        while state.is_syncing {
            self.changed.wait(&mut state);
        }
        if state.durable >= upto {
            return Ok(());
        }
        state.is_syncing = true;
        drop(state);
        let turn = Turn(self);
        let result = sync();
        let mut state = self.state.lock();
        match &result {
            Ok(durable) => state.durable = state.durable.max(*durable),
            Err(error) => {
                state.failures += 1;
                state.failure = Some(error.clone());
            }
        }
        drop(state);
        drop(turn);
        let durable = result?;
        if let Some(tenant) = self.tenancy.get() {
            tenant.durable(durable);
        }
        Ok(())
    }

    /// Has the committer sync a marker after a while.
    fn leave_unconfirmed(&self) {
        if is_broken(Mutant::NeverConfirms) {
            return;
        }
        if !std::mem::replace(&mut self.state.lock().is_unconfirmed, true) {
            self.wishes.notify_all();
        }
    }

    /// Returns whether a marker was written that is not synced.
    pub(crate) fn is_unconfirmed(&self) -> bool {
        self.state.lock().is_unconfirmed
    }

    /// Syncs, and returns below which sequence all is durable then and whether a marker was written that
    /// says so.
    fn sync_and_mark(&self) -> Result<(u64, bool), StoreError> {
        self.sync_once()?;
        let mut log = self.log.lock();
        Ok((log.durable(), log.mark()?))
    }

    fn sync_once(&self) -> Result<(), StoreError> {
        let Some(job) = self.log.lock().begin_sync()? else { return Ok(()) };
        let began = Instant::now();
        let result = job.run();
        self.sync_nanoseconds.add(began.elapsed().as_nanos() as u64);
        self.syncs.add(1);
        let result = match result {
            Err(_) if is_broken(Mutant::ForgetsFailedSync) => Ok(()),
            result => result,
        };
        self.log.lock().end_sync(job, result)
    }

    /// Counts what was appended if it had no room.
    #[inline]
    pub(crate) fn note<T>(&self, appended: Result<T, StoreError>) -> Result<T, StoreError> {
        if matches!(appended, Err(StoreError::Full { .. })) {
            self.refused.add(1);
        }
        appended
    }

    /// Returns how often something had no room.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.value()
    }

    /// Returns how often somebody waited for the disk, and how long that took.
    pub(crate) fn syncs(&self) -> (u64, Duration) {
        (self.syncs.value(), Duration::from_nanos(self.sync_nanoseconds.value()))
    }

    /// As `commit`, but leaves it to the committer, until a deadline: false if that has passed.
    pub(crate) fn wait_until(&self, upto: u64, deadline: Instant) -> Result<bool, StoreError> {
        let failures = self.state.lock().failures;
        self.want_below(upto);
        let mut state = self.state.lock();
        loop {
            if let Some(outcome) = state.outcome(upto, failures) {
                return outcome.map(|()| true);
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return Ok(state.durable >= upto);
            }
        }
    }

    /// As `commit`, but leaves it to the committer while a task waits.
    pub(crate) async fn wait(&self, upto: u64) -> Result<(), StoreError> {
        let failures = self.state.lock().failures;
        let mut notified = self.notify.notified();
        self.want_below(upto);
        loop {
            let outcome = self.state.lock().outcome(upto, failures);
            if let Some(outcome) = outcome {
                return outcome;
            }
            notified.await;
            notified = self.notify.notified();
        }
    }

    /// Asks the committer to sync if a record below a sequence is not durable.
    fn want_below(&self, upto: u64) {
        if self.durable() < upto {
            self.want();
        }
    }

    /// Tells those that wait, and those that will, why nothing more becomes durable.
    pub(crate) fn stop(&self, why: StoreError) {
        self.state.lock().end.get_or_insert(why);
        self.changed.notify_all();
        self.notify.notify_waiters();
    }

    /// Asks the committer to sync.
    pub(crate) fn want(&self) {
        self.state.lock().is_wanted = true;
        self.wishes.notify_all();
    }

    /// Ends the committer.
    pub(crate) fn end(&self) {
        self.state.lock().is_closed = true;
        self.wishes.notify_all();
    }

    /// Waits until somebody asks for a sync, the deadline passes (false) or the store is closed
    /// (`None`). Without a deadline a marker that is not synced ends it too.
    pub(crate) fn wait_for_wish(&self, deadline: Option<Instant>) -> Option<bool> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if std::mem::take(&mut state.is_wanted) {
                return Some(true);
            }
            match deadline {
                None if state.is_unconfirmed => return Some(false),
                None => self.wishes.wait(&mut state),
                Some(deadline) if self.wishes.wait_until(&mut state, deadline).timed_out() => {
                    return Some(false);
                }
                Some(_) => {}
            }
        }
    }
}

/// The right to sync, until it is dropped.
struct Turn<'a, S: Storage>(&'a Committed<S>);

impl<S: Storage> Drop for Turn<'_, S> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.log.lock().poison("a panic while it was synced");
        }
        self.0.state.lock().is_syncing = false;
        self.0.changed.notify_all();
        self.0.notify.notify_waiters();
    }
}
