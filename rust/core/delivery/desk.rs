//! Where decisions are made one at a time: decided, written into the ledger, made true, told.
//!
//! ```text
//!  call, or timer ─► lock ─► decide ─► ledger.append ─► apply ─► unlock ─► commit ─► answer
//!                                                         └─► those that wait look again
//! ```
//!
//! Whoever answers somebody has committed before, so that nothing that anybody was told is forgotten.

use super::entry::{ConsumerId, Entry, GroupId};
use super::groups::Groups;
use super::ledger::Ledger;
use super::mutants::{Mutant, is_broken};
use super::payload::Payload;
use super::risk::{Risk, Rules};
use crate::store::{Committed, Hold, Holds, Storage, StoreError};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Notify;

/// With more events than these on their way, further ones are read from the log again.
const MAX_PAYLOADS: usize = 4096;

/// The time, in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    /// Of this process: groups live by it.
    pub(crate) real: u64,
    /// Of the risk system: retries, leases and escalations live by it.
    pub(crate) risk: u64,
    /// Since the Unix epoch.
    pub(crate) wall: u64,
}

/// An event in the log that somebody may still get.
pub(crate) struct Kept {
    /// Keeps it in the log.
    _hold: Option<Hold>,
    /// What it is, unless it has to be read.
    pub(crate) payload: Option<Arc<Payload>>,
}

/// What need not be held any more once the ledger is durable so far.
enum Release {
    /// Up to its cursor; all of it, if it has none any more.
    Group(GroupId, Option<u64>),
    Event(u64),
}

/// All that is known.
pub(crate) struct Books<S: Storage> {
    ledger: Ledger<S>,
    pub(crate) groups: Groups,
    pub(crate) risk: Risk,
    /// Records of the log below are durable.
    pub(crate) durable: u64,
    /// The latest time that the risk system was told.
    risk_now: u64,
    /// Its time goes on by itself.
    pub(crate) has_real_time: bool,
    pub(crate) is_closed: bool,
    /// How often somebody was told to look again.
    version: u64,
    /// When time is let pass at the latest.
    timer_until: u64,
    /// What time has decided was written, and nobody has committed it.
    is_unsettled: bool,
    /// What keeps records in the log.
    holds: Option<Arc<Holds>>,
    group_holds: HashMap<GroupId, Hold>,
    kept: HashMap<u64, Kept>,
    releases: VecDeque<(u64, Release)>,
    live: HashMap<ConsumerId, Live>,
}

/// What a consumer of this process gets without a record of it, because none can be written.
#[derive(Default)]
struct Live {
    handles: usize,
    events: VecDeque<LiveEvent>,
}

/// An event, and its key.
pub(crate) type LiveEvent = (Arc<Payload>, Option<Arc<str>>);

/// The one place where decisions are made.
pub(crate) struct Desk<S: Storage> {
    committed: Arc<Committed<S>>,
    books: Mutex<Books<S>>,
    changed: Condvar,
    notify: Notify,
    /// Something is due earlier than it was.
    timer: Condvar,
}

impl<S: Storage> Desk<S> {
    /// Returns a desk with what the ledger says. `holds` are those of the log.
    pub(crate) fn open(
        committed: Arc<Committed<S>>,
        mut ledger: Ledger<S>,
        holds: Option<Arc<Holds>>,
        times: Times,
    ) -> Result<Self, StoreError> {
        let entries = ledger.read()?;
        let mut books = Books {
            ledger,
            groups: Groups::default(),
            risk: Risk::default(),
            durable: 0,
            risk_now: 0,
            has_real_time: true,
            is_closed: false,
            version: 0,
            timer_until: u64::MAX,
            is_unsettled: false,
            holds,
            group_holds: HashMap::new(),
            kept: HashMap::new(),
            releases: VecDeque::new(),
            live: HashMap::new(),
        };
        entries.iter().for_each(|entry| books.apply(entry, times));
        // What is in the ledger is durable, or will be before anybody is answered.
        (books.risk.settled, books.releases) = Default::default();
        let groups: Vec<_> =
            books.groups.all().map(|(id, g)| (id, g.cursor, g.is_expired)).collect();
        for (id, cursor, is_expired) in groups {
            if !is_expired {
                books.hold_group(id, cursor);
            }
        }
        for id in books.risk.needed() {
            books.keep(id, None);
        }
        let books = Mutex::new(books);
        let (changed, notify, timer) = (Condvar::new(), Notify::new(), Condvar::new());
        Ok(Self { committed, books, changed, notify, timer })
    }

    pub(crate) fn books(&self) -> MutexGuard<'_, Books<S>> {
        self.books.lock()
    }

    /// Decides on something: entries are written and made true, in this order. Returns what was
    /// decided and where the ledger ends then; until that is committed nobody may be told.
    pub(crate) fn decide<O, E: From<StoreError>>(
        &self,
        times: Times,
        decide: impl FnOnce(&mut Books<S>) -> Result<(Vec<Entry>, O), E>,
    ) -> Result<(O, u64), E> {
        let mut books = self.books.lock();
        books.check()?;
        let mut has_changed = books.pass(times);
        let decided = decide(&mut books);
        let recorded = decided.and_then(|(entries, value)| {
            has_changed |= !entries.is_empty();
            let end = books.record(&entries, times)?;
            Ok((value, end))
        });
        match has_changed {
            true => self.tell(&mut books),
            // What was lent is due some time.
            false => self.set_timer(&books),
        }
        recorded
    }

    /// Lets time pass. Returns when something is due again, of what lives by the process's time.
    pub(crate) fn pass(&self, times: Times) -> Option<u64> {
        let mut books = self.books.lock();
        if books.pass(times) {
            self.tell(&mut books);
        }
        books.deadline()
    }

    /// Has all that wait look again.
    pub(crate) fn tell(&self, books: &mut Books<S>) {
        books.version += 1;
        self.changed.notify_all();
        self.notify.notify_waiters();
        self.set_timer(books);
    }

    /// Has time be let pass earlier than was known, if something is due earlier.
    fn set_timer(&self, books: &Books<S>) {
        let is_earlier = books.deadline().is_some_and(|deadline| deadline < books.timer_until);
        if is_earlier || books.is_closed || books.is_unsettled {
            self.timer.notify_all();
        }
    }

    /// Waits until what was decided so far is durable.
    pub(crate) fn commit(&self, end: u64) -> Result<(), StoreError> {
        if !is_broken(Mutant::AnswersBeforeDurable) {
            self.committed.commit(end)?;
        }
        self.release();
        Ok(())
    }

    /// As `commit`, in a task.
    pub(crate) async fn commit_async(&self, end: u64) -> Result<(), StoreError> {
        self.committed.wait(end).await?;
        self.release();
        Ok(())
    }

    fn release(&self) {
        let durable = self.committed.durable();
        self.books.lock().release(durable);
    }

    /// Runs `look` until it gives something, again each time that something has changed; `None` once
    /// the deadline has passed.
    pub(crate) fn wait<O, E>(
        &self,
        deadline: Option<Instant>,
        mut look: impl FnMut() -> Result<Option<O>, E>,
    ) -> Result<Option<O>, E> {
        loop {
            let version = self.books.lock().version;
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            let mut books = self.books.lock();
            while books.version == version {
                match deadline {
                    None => self.changed.wait(&mut books),
                    Some(deadline) if self.changed.wait_until(&mut books, deadline).timed_out() => {
                        return Ok(None);
                    }
                    Some(_) => {}
                }
            }
        }
    }

    /// As `wait`, in a task. Cancelling it loses nothing.
    pub(crate) async fn wait_async<O, E>(
        &self,
        mut look: impl FnMut() -> Result<Option<O>, E>,
    ) -> Result<O, E> {
        loop {
            let notified = self.notify.notified();
            if let Some(found) = look()? {
                return Ok(found);
            }
            notified.await;
        }
    }

    /// Lets time pass by itself, until the desk is closed. `times` returns the time, and `at` when a
    /// time of the process is.
    pub(crate) fn run(&self, times: impl Fn() -> Times, at: impl Fn(u64) -> Instant) {
        loop {
            // A clock of the user's is not asked under the lock.
            let times = times();
            let mut books = self.books.lock();
            if books.is_closed {
                return;
            }
            if books.pass(times) {
                self.tell(&mut books);
            }
            if std::mem::take(&mut books.is_unsettled) {
                let end = books.end();
                drop(books);
                // Whoever asks next is told if the ledger has failed.
                _ = self.commit(end);
                continue;
            }
            let deadline = books.deadline();
            books.timer_until = deadline.unwrap_or(u64::MAX);
            match deadline.map(&at) {
                Some(deadline) => _ = self.timer.wait_until(&mut books, deadline),
                None => self.timer.wait(&mut books),
            }
        }
    }

    /// Ends all waiting, with an error.
    pub(crate) fn close(&self) {
        let mut books = self.books.lock();
        books.is_closed = true;
        self.tell(&mut books);
    }
}

impl<S: Storage> Books<S> {
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        match self.is_closed {
            true => Err(StoreError::Closed),
            false => Ok(()),
        }
    }

    /// Makes an entry true.
    fn apply(&mut self, entry: &Entry, times: Times) {
        self.risk_now = self.risk_now.max(times.risk);
        if let Entry::SnapshotBegun { next_group, next_consumer, published } = entry {
            self.groups.next = self.groups.next.max(*next_group);
            self.risk.next = self.risk.next.max(*next_consumer);
            self.risk.last_published = self.risk.last_published.max(*published);
        }
        self.groups.apply(entry, times.real, times.wall);
        self.risk.apply(entry, self.risk_now);
    }

    /// Writes entries and makes them true. Returns where the ledger ends.
    fn record(&mut self, entries: &[Entry], times: Times) -> Result<u64, StoreError> {
        self.write(entries, times).1
    }

    /// As `record`, with how many were written, which are true whatever happens to the rest.
    fn write(&mut self, entries: &[Entry], times: Times) -> (usize, Result<u64, StoreError>) {
        if entries.is_empty() {
            return (0, Ok(self.ledger.next()));
        }
        if self.ledger.wants_snapshot() {
            let snapshot = self.snapshot();
            if let Err(error) = self.ledger.append_snapshot(&snapshot) {
                return (0, Err(error));
            }
        }
        let (written, result) = self.ledger.append(entries);
        let end = self.ledger.next();
        for entry in &entries[..written] {
            self.apply_and_note(entry, times, end);
        }
        (written, result)
    }

    fn apply_and_note(&mut self, entry: &Entry, times: Times, end: u64) {
        self.apply(entry, times);
        match entry {
            Entry::GroupRegistered { group, .. } => {
                if let Some(cursor) = self.groups.get(*group).map(|group| group.cursor)
                    && !self.group_holds.contains_key(group)
                {
                    self.hold_group(*group, cursor);
                }
            }
            Entry::GroupDone { group, .. } => {
                if let Some(cursor) = self.groups.get(*group).map(|group| group.cursor) {
                    self.releases.push_back((end, Release::Group(*group, Some(cursor))));
                }
            }
            Entry::GroupExpired { group } | Entry::GroupRemoved { group } => {
                self.releases.push_back((end, Release::Group(*group, None)));
            }
            _ => {}
        }
        let settled = std::mem::take(&mut self.risk.settled);
        self.releases.extend(settled.into_iter().map(|id| (end, Release::Event(id))));
    }

    /// Lets time pass and returns whether something has changed. What time decides is true even where
    /// it cannot be written: a restart comes to the same end.
    fn pass(&mut self, times: Times) -> bool {
        self.risk_now = self.risk_now.max(times.risk);
        let (mut entries, mut has_changed) = self.groups.due(times.real);
        loop {
            if !entries.is_empty() {
                has_changed = true;
                let (written, _) = self.write(&entries, times);
                self.is_unsettled |= written > 0;
                let end = self.ledger.next();
                for entry in &entries[written..] {
                    self.apply_and_note(entry, times, end);
                }
            }
            let (due, has_ready) = self.risk.due(self.risk_now);
            has_changed |= has_ready;
            if due.is_empty() {
                return has_changed;
            }
            entries = due;
        }
    }

    /// Returns when `pass` has something to do again, by the time of the process.
    fn deadline(&self) -> Option<u64> {
        let risk = self.risk.deadline().filter(|_| self.has_real_time);
        [self.groups.deadline(), risk].into_iter().flatten().min()
    }

    /// Returns entries from which all follows.
    fn snapshot(&self) -> Vec<Entry> {
        let begun = Entry::SnapshotBegun {
            next_group: self.groups.next,
            next_consumer: self.risk.next,
            published: self.risk.last_published,
        };
        let mut entries = vec![begun];
        entries.extend(self.groups.snapshot());
        entries.extend(self.risk.snapshot());
        if is_broken(Mutant::SnapshotForgetsOne)
            && let Some(at) = entries.iter().position(|e| matches!(e, Entry::Pending { .. }))
        {
            entries.remove(at);
        }
        for entry in &mut entries {
            if let Entry::Pending { attempts, history, .. } = entry
                && is_broken(Mutant::SnapshotForgetsAttempts)
            {
                (*attempts, *history) = (0, Vec::new());
            }
        }
        entries.push(Entry::SnapshotEnded);
        entries
    }

    /// Returns where the ledger ends.
    pub(crate) fn end(&self) -> u64 {
        self.ledger.next()
    }

    /// Begins to deliver risk events, at a time of the risk system's clock, as [`Risk::start`].
    pub(crate) fn start_risk(
        &mut self,
        rules: Rules,
        seed: u64,
        now: u64,
        has_real_time: bool,
    ) -> u64 {
        (self.risk_now, self.has_real_time) = (now, has_real_time);
        self.risk.start(rules, seed, now)
    }

    fn hold_group(&mut self, group: GroupId, cursor: u64) {
        if let Some(holds) = &self.holds {
            self.group_holds.insert(group, holds.hold(cursor));
        }
    }

    /// Keeps an event in the log as long as somebody may get it.
    pub(crate) fn keep(&mut self, id: u64, payload: Option<Arc<Payload>>) {
        let payload = payload.filter(|_| self.kept.len() < MAX_PAYLOADS);
        let _hold = self.holds.as_ref().map(|holds| holds.hold(id));
        self.kept.insert(id, Kept { _hold, payload });
    }

    /// Returns what an event is, if that is known.
    pub(crate) fn payload(&self, id: u64) -> Option<Arc<Payload>> {
        self.kept.get(&id)?.payload.clone()
    }

    /// Keeps an event no more that was not published after all.
    pub(crate) fn forget(&mut self, id: u64) {
        self.kept.remove(&id);
    }

    /// Notes a handle of a consumer.
    pub(crate) fn open_handle(&mut self, consumer: ConsumerId) {
        self.live.entry(consumer).or_default().handles += 1;
    }

    /// Notes that a handle of a consumer is gone.
    pub(crate) fn close_handle(&mut self, consumer: ConsumerId) {
        if let Some(live) = self.live.get_mut(&consumer) {
            live.handles -= 1;
            if live.handles == 0 {
                self.live.remove(&consumer);
            }
        }
    }

    /// Gives an event to each consumer of this process without a record of it, and returns to how many.
    pub(crate) fn deliver_live(&mut self, event: &LiveEvent) -> usize {
        for live in self.live.values_mut() {
            live.events.push_back(event.clone());
        }
        self.live.len()
    }

    /// Returns what a consumer gets without a record of it.
    pub(crate) fn take_live(&mut self, consumer: ConsumerId) -> Option<LiveEvent> {
        self.live.get_mut(&consumer)?.events.pop_front()
    }

    /// Lets go of what nobody needs now that the ledger is durable so far.
    fn release(&mut self, durable: u64) {
        self.ledger.retire(durable);
        while let Some((end, _)) = self.releases.front()
            && *end <= durable
        {
            match self.releases.pop_front() {
                Some((_, Release::Group(group, None))) => {
                    let is_live = self.groups.get(group).is_some_and(|group| !group.is_expired);
                    if !is_live {
                        self.group_holds.remove(&group);
                    }
                }
                Some((_, Release::Group(group, Some(cursor)))) => {
                    if let Some(hold) = self.group_holds.get(&group) {
                        hold.advance(cursor);
                    }
                }
                Some((_, Release::Event(id))) => _ = self.kept.remove(&id),
                None => {}
            }
        }
    }
}
