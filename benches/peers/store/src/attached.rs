//! Publishing beside a store that is attached, and how fast it takes what is published flat out.

use crate::Folder;
use crate::harness::{Comparison, Row, Target, case};
use crate::load::{Load, event_at};
use crate::writing::{open, tickbus_unsynced};
use std::time::{Duration, Instant};
use tickbus::{
    Attachment, Durability, Event, EventBus, EventStore, Policy, RingEventBus, SubscribeOptions,
};

const CAPACITY: usize = 1 << 16;
const EVENTS: usize = 4_000_000;
/// Events of a burst, which fit the ring, and how many bursts there are.
const BURST: usize = 30_000;
const BURSTS: usize = 40;
/// Events that are published at once at a pace of 5 M events a second, and how often.
const PACED: usize = 50;
const PACE: Duration = Duration::from_micros(10);
const TURNS: usize = 40_000;

const OURS: &str = "tickbus";
const WITHOUT: &str = "no store";

/// A bus with a reader that is overtaken, and with a store or without one.
struct Published {
    bus: RingEventBus<Event>,
    attached: Option<(Attachment, EventStore, Folder)>,
    count: u64,
}

impl Published {
    fn new(has_store: bool) -> Self {
        let bus = RingEventBus::new(CAPACITY).expect("the capacity is good");
        let subscribe = |policy| {
            let options = SubscribeOptions { policy: Some(policy), ..SubscribeOptions::default() };
            bus.subscribe_with(options).expect("the options are good")
        };
        // In both cases there is somebody to publish to.
        std::mem::forget(subscribe(Policy::DropOldest));
        let attached = has_store.then(|| {
            let folder = Folder::new();
            let (store, _) = open(folder.path(), Durability::Interval(Duration::from_millis(100)));
            let attachment = store
                .attach(subscribe(Policy::Block), |error| panic!("{error}"))
                .expect("there are threads");
            (attachment, store, folder)
        });
        Self { bus, attached, count: 0 }
    }

    fn publish(&mut self, count: usize) {
        for _ in 0..count {
            self.bus.publish(*event_at(self.count)).expect("it is open");
            self.count += 1;
        }
    }

    /// Waits until everything is stored.
    fn settle(&self) {
        if let Some((attachment, ..)) = &self.attached {
            while attachment.stored() < self.count {
                std::thread::yield_now();
            }
            assert_eq!(attachment.missed(), 0);
        }
    }

    fn end(self) {
        self.settle();
        self.bus.close();
        if let Some((_, store, _folder)) = &self.attached {
            store.close().expect("the log closes");
        }
    }
}

/// Returns what publishing an event takes in bursts that fit the ring, in nanoseconds.
fn bursts(has_store: bool) -> f64 {
    let mut published = Published::new(has_store);
    let mut spent = Duration::ZERO;
    for _ in 0..BURSTS {
        let start = Instant::now();
        published.publish(BURST);
        spent += start.elapsed();
        published.settle();
    }
    published.end();
    spent.as_nanos() as f64 / (BURST * BURSTS) as f64
}

/// Returns what publishing an event takes at 5 M events a second, in nanoseconds.
fn paced(has_store: bool) -> f64 {
    let mut published = Published::new(has_store);
    let mut spent = Duration::ZERO;
    let begun = Instant::now();
    for turn in 0..TURNS {
        while begun.elapsed() < PACE * turn as u32 {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        published.publish(PACED);
        spent += start.elapsed();
    }
    published.end();
    spent.as_nanos() as f64 / (PACED * TURNS) as f64
}

/// Returns what an event takes that is published flat out until all are stored, in nanoseconds.
fn flat_out() -> f64 {
    let mut published = Published::new(true);
    let start = Instant::now();
    published.publish(EVENTS);
    published.settle();
    let spent = start.elapsed().as_nanos() as f64;
    published.end();
    spent / EVENTS as f64
}

pub(crate) fn comparisons() -> Vec<Comparison> {
    let beside = |name, run: fn(bool) -> f64| Comparison {
        limit: case(WITHOUT, move || run(false)),
        cases: vec![case(OURS, move || run(true))],
        rows: vec![Row { name, ours: OURS, against: WITHOUT, target: Target::TimesAsMuch(1.3) }],
    };
    const APPEND: &str = "append, batches of 1,000";
    let name = "published flat out until it is stored";
    let target = Target::TimesLess(0.8);
    vec![
        beside("publish beside a store, bursts of 30,000", bursts),
        beside("publish beside a store, 5 M events a second", paced),
        Comparison {
            limit: case(APPEND, || tickbus_unsynced(Load::Batches(EVENTS, 1_000))),
            cases: vec![case(OURS, flat_out)],
            rows: vec![Row { name, ours: OURS, against: APPEND, target }],
        },
    ]
}
