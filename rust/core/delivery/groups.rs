//! What groups have read of a log: decided here, without a clock and without a disk.
//!
//! ```text
//!        cursor      done above it      frontier           durable
//!  ───────┼─────────████████─────▒▒▒▒▒▒▒▒──┼─────────────────┼──►
//!   done  │  to be          in flight      │ not handed out  │ not to be read yet
//!         │  delivered again               │                 │
//! ```
//!
//! What is done and who there is follows from entries of the ledger; who has what in his hands is
//! known to this process only, and is handed out again after a restart.

use super::entry::{Entry, GroupId};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// How a group is served in this process. Times are in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Serving {
    pub(crate) lease: u64,
    pub(crate) max_in_flight: u64,
}

/// Records that somebody was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lent {
    pub(crate) from: u64,
    pub(crate) end: u64,
    /// How often they were given to somebody since the log was opened.
    pub(crate) attempt: u32,
}

/// What there is for who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    Lent(Lent),
    /// So many records are gone before the next one.
    Lagged(u64),
    /// Nothing now.
    Nothing,
    /// Nothing before others are done.
    TooMany,
}

/// Numbers of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct GroupNumbers {
    pub(crate) redelivered: u64,
    pub(crate) stalled: u64,
    pub(crate) expired: u64,
}

#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) name: Arc<str>,
    /// Everything below is done.
    pub(crate) cursor: u64,
    /// Ranges above it that are done, by their first sequences. None touches another.
    done: BTreeMap<u64, u64>,
    /// Records below were handed out, or are done.
    frontier: u64,
    /// What is in somebody's hands until a time, by its first sequence.
    lent: BTreeMap<u64, (Lent, u64)>,
    /// What nobody has in his hands any more, with the attempt that was in vain.
    returned: BTreeMap<u64, Lent>,
    in_flight: u64,
    serving: Serving,
    max_idle: Option<u64>,
    /// When it was last active: by the wall clock, and when it expires by the process's.
    at: u64,
    expires: Option<u64>,
    /// Consumers that wait.
    waiting: usize,
    pub(crate) is_expired: bool,
    /// Records that were gone when it came back, and nobody was told of.
    missed: u64,
    /// Somebody was told that there are too many in flight.
    is_stalled: bool,
    pub(crate) numbers: GroupNumbers,
}

/// All groups of a log.
#[derive(Debug)]
pub(crate) struct Groups {
    all: BTreeMap<GroupId, Group>,
    ids: HashMap<Arc<str>, GroupId>,
    pub(crate) next: GroupId,
}

impl Default for Groups {
    fn default() -> Self {
        Self { all: BTreeMap::new(), ids: HashMap::new(), next: 1 }
    }
}

impl Groups {
    /// Returns the group of a name.
    pub(crate) fn id(&self, name: &str) -> Option<GroupId> {
        self.ids.get(name).copied()
    }

    pub(crate) fn get(&self, group: GroupId) -> Option<&Group> {
        self.all.get(&group)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (GroupId, &Group)> {
        self.all.iter().map(|(id, group)| (*id, group))
    }

    /// Decides on a consumer that wants to read as a group, which begins at `start` if it is new. A
    /// group that has expired goes on with the oldest record that the log still has.
    pub(crate) fn join(
        &self,
        name: &str,
        start: u64,
        max_idle: Option<u64>,
        oldest: u64,
        at: u64,
    ) -> (GroupId, Option<Entry>) {
        let known = self.id(name).and_then(|id| Some((id, self.get(id)?)));
        let (group, cursor) = match known {
            Some((id, group)) if group.is_expired => (id, group.cursor.max(oldest)),
            Some((id, group)) if group.max_idle != max_idle => (id, group.cursor),
            Some((id, _)) => return (id, None),
            None => (self.next, start),
        };
        let (name, is_expired) = (name.into(), false);
        (group, Some(Entry::GroupRegistered { group, name, cursor, max_idle, at, is_expired }))
    }

    /// Has a group be served so from now on. `missed` records are gone before it begins.
    pub(crate) fn serve(&mut self, group: GroupId, serving: Serving, missed: u64) {
        if let Some(group) = self.all.get_mut(&group) {
            group.serving = serving;
            group.missed += missed;
        }
    }

    /// Notes a consumer that waits, or has ended that.
    pub(crate) fn wait(&mut self, group: GroupId, is_waiting: bool, now: u64) {
        if let Some(group) = self.all.get_mut(&group) {
            match is_waiting {
                true => group.waiting += 1,
                false => group.waiting -= 1,
            }
            group.is_active(now);
        }
    }

    /// Gives a consumer at most `limit` records, until the lease ends. `None` if there is no such
    /// group, or it has expired.
    pub(crate) fn lend(
        &mut self,
        group: GroupId,
        limit: u64,
        durable: u64,
        now: u64,
    ) -> Option<Offer> {
        let group = self.all.get_mut(&group).filter(|group| !group.is_expired)?;
        group.is_active(now);
        Some(group.lend(limit, durable, now))
    }

    /// Decides on records that a consumer says are done; `None` if others have them by now.
    pub(crate) fn finish(&self, group: GroupId, lent: Lent, at: u64) -> Option<Entry> {
        let known = self.all.get(&group).filter(|known| known.holds(lent))?;
        let Lent { from, end, .. } = lent;
        (!known.is_expired).then_some(Entry::GroupDone { group, from, end, at })
    }

    /// Takes records back that a consumer does not want; false if others have them by now.
    pub(crate) fn give_back(&mut self, group: GroupId, lent: Lent) -> bool {
        let known = self.all.get_mut(&group).filter(|group| group.holds(lent));
        known.is_some_and(|group| {
            group.take_back(lent);
            true
        })
    }

    /// Takes back what was in somebody's hands for too long, and decides on groups that expire. The
    /// second value says whether something was taken back.
    pub(crate) fn due(&mut self, now: u64) -> (Vec<Entry>, bool) {
        let (mut entries, mut has_taken) = (Vec::new(), false);
        for (id, group) in &mut self.all {
            let late: Vec<Lent> =
                group.lent.values().filter(|(_, until)| *until <= now).map(|(l, _)| *l).collect();
            if !late.is_empty() {
                has_taken = true;
                group.is_active(now);
            }
            late.into_iter().for_each(|lent| group.take_back(lent));
            if group.can_expire() && group.expires.is_some_and(|at| at <= now) {
                entries.push(Entry::GroupExpired { group: *id });
            }
        }
        (entries, has_taken)
    }

    /// Returns when `due` has something to do again.
    pub(crate) fn deadline(&self) -> Option<u64> {
        let deadlines = self.all.values().flat_map(|group| {
            let leases = group.lent.values().map(|(_, until)| *until).min();
            [leases, group.expires.filter(|_| group.can_expire())]
        });
        deadlines.flatten().min()
    }

    /// Makes an entry of the ledger true. `now` is the process's time, `wall` that since the epoch.
    pub(crate) fn apply(&mut self, entry: &Entry, now: u64, wall: u64) {
        match entry {
            Entry::GroupRegistered { group: id, name, cursor, max_idle, at, is_expired } => {
                self.next = self.next.max(id + 1);
                self.ids.insert(name.clone(), *id);
                let group = self.all.entry(*id).or_insert_with(|| Group::new(name, *cursor));
                if group.is_expired {
                    group.numbers.expired += u64::from(!is_expired);
                    group.missed += cursor.saturating_sub(group.cursor);
                    // What was in flight when it expired is nobody's.
                    (group.lent, group.returned, group.in_flight) = Default::default();
                    group.move_to(*cursor);
                    group.frontier = group.cursor;
                }
                (group.max_idle, group.is_expired, group.at) = (*max_idle, *is_expired, *at);
                group.is_active(now);
                group.was_idle(wall.saturating_sub(*at));
            }
            Entry::GroupDone { group, from, end, at } => {
                if let Some(group) = self.all.get_mut(group) {
                    group.has_done(*from, *end);
                    group.at = *at;
                    group.is_active(now);
                    group.was_idle(wall.saturating_sub(*at));
                }
            }
            Entry::GroupExpired { group } => {
                if let Some(group) = self.all.get_mut(group) {
                    group.is_expired = true;
                }
            }
            Entry::GroupRemoved { group } => {
                if let Some(group) = self.all.remove(group) {
                    self.ids.remove(&group.name);
                }
            }
            _ => {}
        }
    }

    /// Returns entries that say all that there is.
    pub(crate) fn snapshot(&self) -> impl Iterator<Item = Entry> {
        self.all.iter().flat_map(|(&id, known)| {
            let registered = Entry::GroupRegistered {
                group: id,
                name: known.name.clone(),
                cursor: known.cursor,
                max_idle: known.max_idle,
                at: known.at,
                is_expired: known.is_expired,
            };
            let done = known.done.iter().map(move |(&from, &end)| {
                let at = known.at;
                Entry::GroupDone { group: id, from, end, at }
            });
            std::iter::once(registered).chain(done)
        })
    }
}

impl Group {
    fn new(name: &Arc<str>, cursor: u64) -> Self {
        Self {
            name: name.clone(),
            cursor,
            done: BTreeMap::new(),
            frontier: cursor,
            lent: BTreeMap::new(),
            returned: BTreeMap::new(),
            in_flight: 0,
            serving: Serving { lease: u64::MAX, max_in_flight: u64::MAX },
            max_idle: None,
            at: 0,
            expires: None,
            waiting: 0,
            is_expired: false,
            missed: 0,
            is_stalled: false,
            numbers: GroupNumbers::default(),
        }
    }

    /// Returns how many records are in somebody's hands.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Returns how many records below a sequence are not done.
    pub(crate) fn lag(&self, durable: u64) -> u64 {
        let done: u64 = self.done.iter().map(|(from, end)| end - from).sum();
        durable.saturating_sub(self.cursor).saturating_sub(done)
    }

    /// Returns whether nobody waits for records or has some.
    fn can_expire(&self) -> bool {
        self.waiting == 0 && self.lent.is_empty() && !self.is_expired
    }

    fn is_active(&mut self, now: u64) {
        self.expires = self.max_idle.map(|max_idle| now.saturating_add(max_idle));
    }

    /// Brings its end nearer by the time in which nobody had the log open.
    fn was_idle(&mut self, time: u64) {
        self.expires =
            self.expires.map(|at| at.saturating_sub(time.min(self.max_idle.unwrap_or(0))));
    }

    fn lend(&mut self, limit: u64, durable: u64, now: u64) -> Offer {
        let missed = std::mem::take(&mut self.missed);
        if missed > 0 {
            return Offer::Lagged(missed);
        }
        let room = self.serving.max_in_flight.saturating_sub(self.in_flight);
        let next = self.next(limit.min(room), durable);
        let Some(lent) = next else {
            if room > 0 || self.next(limit, durable).is_none() {
                return Offer::Nothing;
            }
            self.numbers.stalled += u64::from(!std::mem::replace(&mut self.is_stalled, true));
            return Offer::TooMany;
        };
        self.is_stalled = false;
        match self.returned.remove(&lent.from) {
            Some(before) => {
                self.numbers.redelivered += lent.end - lent.from;
                if lent.end < before.end {
                    self.returned.insert(lent.end, Lent { from: lent.end, ..before });
                }
            }
            None => self.frontier = lent.end,
        }
        self.in_flight += lent.end - lent.from;
        self.lent.insert(lent.from, (lent, now.saturating_add(self.serving.lease)));
        Offer::Lent(lent)
    }

    /// Returns what comes next, at most so many: what has come back first.
    fn next(&self, limit: u64, durable: u64) -> Option<Lent> {
        if limit == 0 {
            return None;
        }
        if let Some(Lent { from, end, attempt }) = self.returned.values().next().copied() {
            let end = end.min(from.saturating_add(limit));
            return Some(Lent { from, end, attempt: attempt + 1 });
        }
        let mut from = self.frontier;
        // What was done before a restart is not handed out again.
        if let Some((_, &end)) = self.done.range(..=from).next_back() {
            from = from.max(end);
        }
        let next_done = self.done.range(from..).next().map_or(durable, |(&done, _)| done);
        let end = from.saturating_add(limit).min(durable).min(next_done);
        (from < end).then_some(Lent { from, end, attempt: 1 })
    }

    /// Returns whether these records were given to nobody else since.
    fn holds(&self, lent: Lent) -> bool {
        let is_lent = self.lent.get(&lent.from).is_some_and(|(known, _)| *known == lent);
        is_lent || self.returned.get(&lent.from) == Some(&lent)
    }

    fn take_back(&mut self, lent: Lent) {
        if self.lent.remove(&lent.from).is_some() {
            self.in_flight -= lent.end - lent.from;
            self.returned.insert(lent.from, lent);
        }
    }

    fn has_done(&mut self, from: u64, end: u64) {
        if let Some((lent, _)) = self.lent.remove(&from) {
            self.in_flight -= lent.end - lent.from;
        }
        self.returned.remove(&from);
        let from = from.max(self.cursor);
        if from < end {
            let (mut first, mut last) = (from, end);
            if let Some((&before, &until)) = self.done.range(..=from).next_back()
                && until >= from
            {
                first = before;
                last = last.max(until);
            }
            while let Some((&next, &until)) = self.done.range(first..=last).next() {
                self.done.remove(&next);
                last = last.max(until);
            }
            self.done.insert(first, last);
        }
        self.move_to(self.cursor);
    }

    /// Moves the cursor to a sequence, and over what is done there.
    fn move_to(&mut self, cursor: u64) {
        self.cursor = cursor;
        while let Some((&from, &end)) = self.done.first_key_value()
            && from <= self.cursor
        {
            self.done.remove(&from);
            self.cursor = self.cursor.max(end);
        }
        self.frontier = self.frontier.max(self.cursor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVING: Serving = Serving { lease: 10, max_in_flight: 6 };

    /// Groups with one of ten records, served so.
    fn one(max_idle: Option<u64>) -> (Groups, GroupId) {
        let mut groups = Groups::default();
        let (id, entry) = groups.join("one", 0, max_idle, 0, 0);
        if let Some(entry) = entry {
            groups.apply(&entry, 0, 0);
        }
        groups.serve(id, SERVING, 0);
        (groups, id)
    }

    fn lend(groups: &mut Groups, id: GroupId, limit: u64, now: u64) -> Offer {
        groups.lend(id, limit, 10, now).unwrap_or(Offer::Nothing)
    }

    fn finish(groups: &mut Groups, id: GroupId, lent: Lent) -> bool {
        let Some(entry) = groups.finish(id, lent, 0) else { return false };
        groups.apply(&entry, 0, 0);
        true
    }

    #[test]
    fn each_record_is_given_to_one_consumer_and_again_only_when_its_lease_has_ended() {
        let (mut groups, id) = one(None);
        let first = Lent { from: 0, end: 4, attempt: 1 };
        assert_eq!(lend(&mut groups, id, 4, 0), Offer::Lent(first));
        let second = Lent { from: 4, end: 6, attempt: 1 };
        assert_eq!(lend(&mut groups, id, 4, 1), Offer::Lent(second), "at most 6 in flight");
        assert_eq!(lend(&mut groups, id, 4, 1), Offer::TooMany);
        assert!(finish(&mut groups, id, second));
        assert_eq!(groups.get(id).map(|g| (g.cursor, g.lag(10), g.in_flight())), Some((0, 8, 4)));
        assert_eq!(groups.deadline(), Some(10));
        assert_eq!(groups.due(9), (vec![], false));
        assert_eq!(lend(&mut groups, id, 1, 9), Offer::Lent(Lent { from: 6, end: 7, attempt: 1 }));
        assert_eq!(groups.due(10), (vec![], true));
        let again = Lent { from: 0, end: 3, attempt: 2 };
        assert_eq!(lend(&mut groups, id, 3, 10), Offer::Lent(again));
        assert!(!finish(&mut groups, id, first), "others have it");
        assert!(finish(&mut groups, id, again));
        let rest = Lent { from: 3, end: 4, attempt: 2 };
        assert_eq!(lend(&mut groups, id, 9, 10), Offer::Lent(rest));
        assert!(finish(&mut groups, id, rest));
        assert_eq!(groups.get(id).map(|g| g.cursor), Some(6));
        assert!(!finish(&mut groups, id, rest), "it is done");
    }

    #[test]
    fn whoever_is_late_may_still_be_done_while_nobody_else_has_it() {
        let (mut groups, id) = one(None);
        let lent = Lent { from: 0, end: 2, attempt: 1 };
        assert_eq!(lend(&mut groups, id, 2, 0), Offer::Lent(lent));
        groups.due(10);
        assert!(finish(&mut groups, id, lent));
        assert_eq!(lend(&mut groups, id, 1, 11), Offer::Lent(Lent { from: 2, end: 3, attempt: 1 }));
        let back = Lent { from: 2, end: 3, attempt: 1 };
        assert!(groups.give_back(id, back));
        let again = Lent { attempt: 2, ..back };
        assert_eq!(lend(&mut groups, id, 5, 11), Offer::Lent(again));
        assert!(!groups.give_back(id, back));
    }

    #[test]
    fn after_a_restart_what_was_not_done_is_handed_out_and_nothing_else() {
        let (mut groups, id) = one(None);
        let lents: Vec<_> = (0..3).map(|_| lend(&mut groups, id, 2, 0)).collect();
        let Offer::Lent(middle) = lents[1] else { panic!("{lents:?}") };
        assert!(finish(&mut groups, id, middle));
        let mut again = Groups::default();
        groups.snapshot().for_each(|entry| again.apply(&entry, 0, 0));
        assert_eq!(again.next, groups.next);
        again.serve(id, SERVING, 0);
        assert_eq!(lend(&mut again, id, 9, 0), Offer::Lent(Lent { from: 0, end: 2, attempt: 1 }));
        assert_eq!(lend(&mut again, id, 9, 0), Offer::Lent(Lent { from: 4, end: 8, attempt: 1 }));
    }

    #[test]
    fn a_group_that_nobody_uses_expires_and_is_told_what_it_missed_when_it_returns() {
        let (mut groups, id) = one(Some(100));
        groups.wait(id, true, 50);
        assert_eq!(groups.deadline(), None, "it waits");
        assert_eq!(groups.due(500).0, []);
        groups.wait(id, false, 500);
        assert_eq!(groups.deadline(), Some(600));
        assert_eq!(groups.due(599).0, []);
        let (expired, _) = groups.due(600);
        assert_eq!(expired, [Entry::GroupExpired { group: id }]);
        groups.apply(&expired[0], 600, 0);
        assert_eq!((groups.deadline(), groups.lend(id, 1, 10, 600)), (None, None));
        let (same, entry) = groups.join("one", 9, Some(100), 7, 0);
        let Some(entry) = entry else { panic!("it returns") };
        groups.apply(&entry, 700, 0);
        assert_eq!(same, id);
        assert_eq!(lend(&mut groups, id, 9, 700), Offer::Lagged(7));
        assert_eq!(
            lend(&mut groups, id, 2, 700),
            Offer::Lent(Lent { from: 7, end: 9, attempt: 1 })
        );
        assert_eq!(groups.get(id).map(|g| g.numbers.expired), Some(1));
    }

    #[test]
    fn the_time_in_which_nobody_had_the_log_open_counts_as_idle() {
        let (groups, id) = one(Some(100));
        let mut again = Groups::default();
        groups.snapshot().for_each(|entry| again.apply(&entry, 1_000, 40));
        assert_eq!(again.deadline(), Some(1_060));
        let mut late = Groups::default();
        groups.snapshot().for_each(|entry| late.apply(&entry, 1_000, 4_000));
        assert_eq!(late.due(1_000).0, [Entry::GroupExpired { group: id }]);
    }
}
