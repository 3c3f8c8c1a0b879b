//! Histories of groups and risk events with crashes at each step, over the code that decides and writes
//! and a disk that loses its power.
//!
//! What is outside of them keeps its own books: what was published, which effects a database has,
//! what was acknowledged, and who was promised what. An answer that a crash swallowed may have been
//! given or not; whatever was answered has to be true for ever.

use super::desk::{Desk, Times};
use super::entry::{ConsumerId, Entry};
use super::groups::{Lent, Offer, Serving};
use super::ledger::Ledger;
use super::risk::{Begun, Notice, Rules};
use crate::store::log::Limits;
use crate::store::sim::{Random, SimDisk};
use crate::store::workload::{from_environment, open_log};
use crate::store::{Committed, StoreError};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// Something that happens.
#[derive(Debug, Clone, Copy)]
enum Step {
    Register {
        consumer: u8,
        is_ordered: bool,
    },
    Publish {
        key: u8,
    },
    Take {
        consumer: u8,
    },
    /// One of the attempts so far, old ones too.
    Ack {
        which: u8,
    },
    Nack {
        which: u8,
    },
    /// Time passes.
    Pass {
        time: u16,
    },
    Redeliver {
        which: u8,
    },
    /// So many records are appended, of which a group is not told otherwise.
    Append {
        count: u8,
    },
    Fetch {
        limit: u8,
    },
    Commit {
        which: u8,
    },
    GiveBack {
        which: u8,
    },
    Restart,
}

/// What happens, and at which change of the disk the power goes in the middle of it, if it does.
type Happening = (Step, Option<u8>);

const CONSUMERS: [&str; 2] = ["limits", "audit"];
const LEASE: u64 = 50;
const MAX_ATTEMPTS: u32 = 3;
const LIMITS: Limits = Limits { segment_bytes: 4096 + 2000, max_bytes: None };

#[derive(Debug)]
struct Histories;

impl ReferenceStateMachine for Histories {
    /// Nothing: each step is possible at any time.
    type State = ();
    type Transition = Happening;

    fn init_state() -> BoxedStrategy<()> {
        Just(()).boxed()
    }

    fn transitions((): &()) -> BoxedStrategy<Happening> {
        let choose = |(what, which, cut): (u8, u16, u8)| {
            let byte = which as u8;
            let step = match what {
                0..3 => Step::Register { consumer: byte, is_ordered: which & 0x300 != 0 },
                3..8 => Step::Publish { key: byte },
                8..14 => Step::Take { consumer: byte },
                14..18 => Step::Ack { which: byte },
                18..20 => Step::Nack { which: byte },
                20..22 => Step::Pass { time: which % 100 },
                22 => Step::Redeliver { which: byte },
                23..25 => Step::Append { count: byte % 6 },
                25..28 => Step::Fetch { limit: byte % 5 },
                28..30 => Step::Commit { which: byte },
                30 => Step::GiveBack { which: byte },
                _ => Step::Restart,
            };
            (step, (cut < 40).then_some(cut))
        };
        (0..32_u8, any::<u16>(), any::<u8>()).prop_map(choose).boxed()
    }

    fn apply((): (), _: &Happening) {}
}

/// What a consumer was given of an event.
#[derive(Debug, Clone, Copy)]
struct Seen {
    attempt: u32,
    /// In which life of the process, and until when it is his.
    life: u32,
    until: u64,
    /// He gave it up, or the answer to that was swallowed.
    is_released: bool,
}

/// What is outside.
struct World {
    disk: SimDisk,
    desk: Desk<SimDisk>,
    random: Random,
    life: u32,
    now: u64,
    /// Records of the log, all of them durable.
    records: u64,
    registered: BTreeMap<ConsumerId, bool>,
    keys: BTreeMap<u64, Option<u8>>,
    /// Whom it was promised to.
    promised: BTreeSet<(ConsumerId, u64)>,
    seen: BTreeMap<(ConsumerId, u64), Seen>,
    attempts: Vec<(ConsumerId, u64, u32)>,
    /// Rows of a database, and how often one was put.
    effects: HashMap<(ConsumerId, u64), u32>,
    acked: HashSet<(ConsumerId, u64)>,
    may_be_acked: HashSet<(ConsumerId, u64)>,
    /// Told in this life.
    escalated: HashSet<(Option<Arc<str>>, u64)>,
    redelivered: HashSet<u64>,
    lents: Vec<(Lent, u32)>,
    lent_at: HashMap<u64, (u32, u32, u64, bool)>,
    done: HashSet<u64>,
    may_be_done: HashSet<u64>,
}

fn rules() -> Rules {
    Rules {
        lease: LEASE,
        max_attempts: MAX_ATTEMPTS,
        retry_base: 8,
        retry_cap: 30,
        escalate_after: 40,
        max_in_flight: 3,
    }
}

fn open(disk: &SimDisk, now: u64, records: u64) -> Desk<SimDisk> {
    let times = Times { real: now, risk: now, wall: 0 };
    let (log, _) = open_log(disk, LIMITS).expect("what was acknowledged is whole");
    let committed = Arc::new(Committed::new(log, false));
    let ledger = Ledger::new(committed.clone()).snapshot_after(300);
    let desk = Desk::open(committed, ledger, None, times).expect("the ledger can be read");
    {
        let mut books = desk.books();
        books.start_risk(rules(), now, now, true);
        books.durable = records;
    }
    desk
}

impl World {
    fn new() -> Self {
        let disk = SimDisk::new(1);
        let desk = open(&disk, 0, 0);
        let mut world = Self {
            disk,
            desk,
            random: Random(1),
            life: 0,
            now: 0,
            records: 0,
            registered: BTreeMap::new(),
            keys: BTreeMap::new(),
            promised: BTreeSet::new(),
            seen: BTreeMap::new(),
            attempts: Vec::new(),
            effects: HashMap::new(),
            acked: HashSet::new(),
            may_be_acked: HashSet::new(),
            escalated: HashSet::new(),
            redelivered: HashSet::new(),
            lents: Vec::new(),
            lent_at: HashMap::new(),
            done: HashSet::new(),
            may_be_done: HashSet::new(),
        };
        world.serve();
        world
    }

    fn times(&self) -> Times {
        Times { real: self.now, risk: self.now, wall: 0 }
    }

    /// Registers the one group, or joins it again.
    fn serve(&mut self) {
        let (group, end) = self
            .desk
            .decide::<_, StoreError>(self.times(), |books| {
                let (group, entry) = books.groups.join("readers", 0, None, 0, 0);
                Ok((entry.into_iter().collect(), group))
            })
            .expect("the disk has room");
        self.desk.commit(end).expect("the disk is whole");
        let serving = Serving { lease: LEASE, max_in_flight: 8 };
        self.desk.books().groups.serve(group, serving, 0);
    }

    /// Decides, and commits.
    fn decide<O>(
        &self,
        decide: impl FnOnce(&mut super::desk::Books<SimDisk>) -> (Vec<Entry>, O),
    ) -> O {
        let decided = self.desk.decide::<_, StoreError>(self.times(), |books| Ok(decide(books)));
        let (value, end) = decided.expect("the disk has room");
        self.desk.commit(end).expect("the disk is whole");
        value
    }

    /// Loses its memory and what the disk has not synced, at a change since `record` was called.
    fn crash(&mut self, at: Option<u8>) {
        let moments = self.disk.take_moments();
        let moment = match at {
            Some(at) if !moments.is_empty() => moments[usize::from(at) % moments.len()].clone(),
            _ => self.disk.moment(),
        };
        let mut chance = Random(self.random.next());
        let rest = chance.below(4);
        let survives = || rest == 3 || chance.once_in(rest + 1);
        self.disk = moment.crashed(self.random.next(), false, survives, || false);
        self.begin();
    }

    fn begin(&mut self) {
        self.life += 1;
        self.escalated.clear();
        self.desk = open(&self.disk, self.now, self.records);
        let known: BTreeMap<ConsumerId, bool> =
            self.desk.books().risk.consumers().map(|(id, c)| (id, c.is_ordered)).collect();
        for consumer in self.registered.keys() {
            assert!(known.contains_key(consumer), "consumer {consumer} was forgotten");
        }
        self.registered = known;
        self.serve();
    }

    /// Does something. With `is_answered` false, nobody hears the answer.
    fn step(&mut self, step: Step, is_answered: bool) {
        match step {
            Step::Register { consumer, is_ordered } => {
                let name = CONSUMERS[usize::from(consumer) % 2];
                let id = self.decide(|books| {
                    let (id, entry) = books.risk.register(name, is_ordered);
                    (entry.into_iter().collect(), id)
                });
                if is_answered {
                    self.registered.insert(id, is_ordered);
                }
            }
            Step::Publish { key } => self.publish(key, is_answered),
            Step::Take { consumer } => self.take(usize::from(consumer), is_answered),
            Step::Ack { which } => self.ack(which, is_answered),
            Step::Nack { which } => self.nack(which),
            Step::Pass { time } => {
                self.now += u64::from(time);
                self.desk.pass(self.times());
                self.hear();
            }
            Step::Redeliver { which } => self.redeliver(which, is_answered),
            Step::Append { count } => {
                self.records += u64::from(count);
                self.desk.books().durable = self.records;
            }
            Step::Fetch { limit } => self.fetch(limit, is_answered),
            Step::Commit { which } => self.commit(which, is_answered),
            Step::GiveBack { which } => {
                if let Some((lent, life)) = self.pick(which)
                    && life == self.life
                {
                    let group = self.desk.books().groups.id("readers").expect("it is there");
                    if self.desk.books().groups.give_back(group, lent) {
                        for record in lent.from..lent.end {
                            self.lent_at.entry(record).and_modify(|lent| lent.3 = true);
                        }
                    }
                }
            }
            Step::Restart => self.begin(),
        }
        self.hear();
    }

    fn publish(&mut self, key: u8, is_answered: bool) {
        let id = self.records;
        self.records += 1;
        let key = Some(key % 3).filter(|key| *key > 0);
        self.keys.insert(id, key);
        self.desk.books().durable = self.records;
        self.decide(|books| {
            let key = key.map(|key| key.to_string().into());
            (books.risk.publish(id, key), ())
        });
        if is_answered {
            self.promised.extend(self.registered.keys().map(|consumer| (*consumer, id)));
        }
    }

    fn take(&mut self, which: usize, is_answered: bool) {
        let Some((&consumer, &is_ordered)) =
            self.registered.iter().nth(which % self.registered.len().max(1))
        else {
            return;
        };
        let begun = self.decide(|books| match books.risk.take(consumer) {
            Some((begun, entry)) => (vec![entry], Some(begun)),
            None => (Vec::new(), None),
        });
        let Some(Begun { id, attempt, .. }) = begun.filter(|_| is_answered) else { return };
        let place = (consumer, id);
        assert!(!self.acked.contains(&place), "{place:?} was acknowledged, and delivered again");
        assert!(attempt <= MAX_ATTEMPTS, "attempt {attempt} of {MAX_ATTEMPTS}");
        if let Some(seen) = self.seen.get(&place) {
            assert!(attempt > seen.attempt, "attempt {attempt} after {}", seen.attempt);
            let is_over = seen.is_released || seen.life < self.life || seen.until <= self.now;
            assert!(is_over, "{place:?} is delivered while somebody has it");
        }
        if is_ordered && !self.redelivered.contains(&id) {
            self.check_order(consumer, id);
        }
        // The handler's effect and the row that says so are one transaction.
        self.effects.entry(place).or_insert(1);
        let (life, until) = (self.life, self.now + LEASE);
        self.seen.insert(place, Seen { attempt, life, until, is_released: false });
        self.attempts.push((consumer, id, attempt));
    }

    /// Each event of the key that was promised before is settled.
    fn check_order(&self, consumer: ConsumerId, id: u64) {
        let Some(Some(key)) = self.keys.get(&id) else { return };
        let books = self.desk.books();
        for (&earlier, of) in self.keys.range(..id) {
            let place = (consumer, earlier);
            if *of != Some(*key)
                || !self.promised.contains(&place)
                || self.redelivered.contains(&earlier)
            {
                continue;
            }
            let is_settled = self.acked.contains(&place)
                || self.may_be_acked.contains(&place)
                || books.risk.letters().any(|(id, by, _)| (by, id) == place);
            assert!(is_settled, "{id} of key {key} is delivered before {earlier}");
        }
    }

    fn ack(&mut self, which: u8, is_answered: bool) {
        let Some(&(consumer, id, attempt)) = self.attempts.get(self.index(which)) else { return };
        let place = (consumer, id);
        let is_taken = self.decide(|books| {
            let entry = books.risk.ack(consumer, id, attempt);
            let is_taken = entry.is_some();
            (entry.into_iter().collect(), is_taken)
        });
        let is_newest = self.seen.get(&place).is_some_and(|seen| seen.attempt == attempt);
        if is_taken {
            assert!(is_newest, "attempt {attempt} at {place:?} was taken, and is not the newest");
            assert!(!self.acked.contains(&place), "{place:?} was acknowledged twice");
            match is_answered {
                true => _ = self.acked.insert(place),
                false => _ = self.may_be_acked.insert(place),
            }
        }
    }

    fn nack(&mut self, which: u8) {
        let Some(&(consumer, id, attempt)) = self.attempts.get(self.index(which)) else { return };
        let is_taken = self.decide(|books| {
            let entries = books.risk.nack(consumer, id, attempt, "it does not suit me");
            let is_taken = entries.is_some();
            (entries.unwrap_or_default(), is_taken)
        });
        if is_taken && let Some(seen) = self.seen.get_mut(&(consumer, id)) {
            assert_eq!(attempt, seen.attempt, "an attempt that is not the newest has failed");
            seen.is_released = true;
        }
    }

    fn redeliver(&mut self, which: u8, is_answered: bool) {
        let letters: Vec<(u64, ConsumerId)> =
            self.desk.books().risk.letters().map(|(id, consumer, _)| (id, consumer)).collect();
        let Some(&(id, consumer)) = letters.get(usize::from(which) % letters.len().max(1)) else {
            return;
        };
        let receivers = self.desk.books().risk.receivers(consumer);
        self.decide(|books| (books.risk.redeliver(consumer, id).into_iter().collect(), ()));
        for to in receivers {
            self.redelivered.insert(id);
            // Its attempts are counted anew.
            self.seen.remove(&(to, id));
            self.attempts.retain(|(consumer, event, _)| (*consumer, *event) != (to, id));
            if is_answered {
                self.promised.insert((to, id));
            }
        }
    }

    fn fetch(&mut self, limit: u8, is_answered: bool) {
        let (now, records) = (self.now, self.records);
        let limit = 1 + u64::from(limit);
        let offer = self.decide(|books| {
            let group = books.groups.id("readers").expect("it is there");
            (Vec::new(), books.groups.lend(group, limit, records, now))
        });
        let Some(Offer::Lent(lent)) = offer else { return };
        assert!(lent.from < lent.end && lent.end <= records, "{lent:?} of {records} records");
        for record in lent.from..lent.end {
            assert!(!self.done.contains(&record), "{record} was committed, and is given out again");
            if let Some((attempt, life, until, is_released)) = self.lent_at.get(&record) {
                let is_over = *is_released || *life < self.life || *until <= now;
                assert!(is_over, "{record} is given out while somebody has it");
                assert!(*life < self.life || lent.attempt > *attempt, "attempt {}", lent.attempt);
            }
            let until = if is_answered { now + LEASE } else { 0 };
            self.lent_at.insert(record, (lent.attempt, self.life, until, false));
        }
        self.lents.push((lent, self.life));
    }

    fn commit(&mut self, which: u8, is_answered: bool) {
        let Some((lent, life)) = self.pick(which) else { return };
        if life < self.life {
            return;
        }
        let is_taken = self.decide(|books| {
            let group = books.groups.id("readers").expect("it is there");
            let entry = books.groups.finish(group, lent, 0);
            let is_taken = entry.is_some();
            (entry.into_iter().collect(), is_taken)
        });
        if is_taken {
            for record in lent.from..lent.end {
                let newest = self.lent_at.get(&record).map(|(attempt, ..)| *attempt);
                assert_eq!(newest, Some(lent.attempt), "{record} was committed by a late one");
                match is_answered {
                    true => _ = self.done.insert(record),
                    false => _ = self.may_be_done.insert(record),
                }
            }
        }
    }

    /// Hears what is told: whatever becomes a dead letter was escalated.
    fn hear(&mut self) {
        let notices = std::mem::take(&mut self.desk.books().risk.notices);
        for notice in notices {
            match notice {
                Notice::Escalated { id, consumer, .. } => _ = self.escalated.insert((consumer, id)),
                Notice::DeadLettered { id, consumer, .. } => {
                    let is_escalated = self.escalated.contains(&(consumer, id));
                    assert!(is_escalated, "{id} is a dead letter that nobody was told of");
                }
                Notice::TooManyInFlight { .. } => {}
            }
        }
    }

    fn index(&self, which: u8) -> usize {
        let count = self.attempts.len().max(1);
        // The newest ones first.
        count - 1 - usize::from(which) % count.min(6)
    }

    fn pick(&self, which: u8) -> Option<(Lent, u32)> {
        let count = self.lents.len();
        let last = count.checked_sub(1)?;
        self.lents.get(last - usize::from(which) % count.min(4)).copied()
    }

    /// Goes on without any fault until nothing is left to do: nothing was lost.
    fn settle(mut self) {
        self.crash(None);
        for _ in 0..10_000 {
            let before = (self.attempts.len(), self.lents.len());
            for consumer in 0..2 {
                self.step(Step::Take { consumer }, true);
                self.step(Step::Ack { which: 0 }, true);
            }
            self.step(Step::Fetch { limit: 4 }, true);
            self.step(Step::Commit { which: 0 }, true);
            let is_waiting = self.desk.books().risk.consumers().any(|(_, c)| c.pending() > 0);
            if before == (self.attempts.len(), self.lents.len()) {
                if !is_waiting {
                    break;
                }
                self.step(Step::Pass { time: 60 }, true);
            }
        }
        let letters: HashSet<(ConsumerId, u64)> =
            self.desk.books().risk.letters().map(|(id, consumer, _)| (consumer, id)).collect();
        for place in &self.promised {
            let is_settled = self.acked.contains(place) || self.may_be_acked.contains(place);
            assert!(is_settled || letters.contains(place), "{place:?} is lost");
            let effects = self.effects.get(place).copied().unwrap_or_default();
            assert!(effects == 1 || letters.contains(place), "{place:?} has {effects} effects");
        }
        for record in 0..self.records {
            let is_done = self.done.contains(&record) || self.may_be_done.contains(&record);
            assert!(is_done, "record {record} was never committed");
        }
    }
}

impl StateMachineTest for Histories {
    type SystemUnderTest = World;
    type Reference = Self;

    fn init_test((): &()) -> World {
        World::new()
    }

    fn apply(mut world: World, (): &(), (step, cut): Happening) -> World {
        if cut.is_some() {
            world.disk.record();
        }
        world.step(step, cut.is_none());
        if cut.is_some() {
            world.crash(cut);
        }
        world
    }

    fn teardown(world: World, (): ()) {
        world.settle();
    }
}

/// Plays so many histories; fails with the shortest one that breaks a promise.
pub(super) fn play(histories: u32, max_shrink_iters: u32) -> Result<(), String> {
    let config = Config {
        cases: histories,
        failure_persistence: None,
        max_shrink_iters,
        ..Config::default()
    };
    let seed = from_environment("SEED", 1).to_le_bytes().repeat(4);
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(config.clone(), random);
    let all = Histories::sequential_strategy(1..32);
    let played = runner.run(&all, |((), steps, seen)| {
        Histories::test_sequential(config.clone(), (), steps, seen);
        Ok::<_, TestCaseError>(())
    });
    played.map_err(|error| error.to_string())
}

/// `DELIVERY_HISTORIES` of them.
#[test]
fn whatever_happens_and_wherever_it_crashes_no_event_is_lost_and_no_promise_broken() {
    let histories = from_environment("DELIVERY_HISTORIES", 300) as u32;
    if let Err(wrong) = play(histories, 10_000) {
        panic!("{wrong}");
    }
    println!("{histories} histories of groups and risk events, 0 losses");
}
