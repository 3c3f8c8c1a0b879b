//! What publishing costs: rows of one publisher, of two at once, of readers that lag and that sleep.

use crate::harness::{
    CAPACITY, Case, Comparison, Row, Target, Trade, assert_all_arrived, case, clock_cost,
    median_of_means, nanoseconds, pin, publish_cost, two_cpus,
};
use crate::lmax;
use crate::peers::with_disruptor;
use std::pin::Pin;
use std::sync::Barrier;
use std::task::{Context, Poll, Waker};
use std::time::Instant;
use tickbus::{
    AsyncEventSubscription, BusConfig, EventBus, EventSubscription, Pattern, Policy, Producers,
    RingEventBus, SubscribeOptions, Topic, TryRecvError, WakeMode,
};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::TryRecvError as TokioError;

const SUBSCRIBERS: [usize; 4] = [1, 4, 16, 64];
const TOPICS: usize = 16;
/// Events that each of two threads publishes, in calls of one or of `GROUP`.
const CONTENDED: u64 = 1 << 18;
const GROUP: u64 = 8;
const WAKES: usize = 4_096;

pub(crate) fn comparisons() -> Vec<Comparison> {
    let mut all: Vec<_> = SUBSCRIBERS.into_iter().map(to_many).collect();
    all.push(slope());
    all.extend(SUBSCRIBERS.map(with_filters));
    all.push(beside_sleepers());
    all.extend([1, 16].map(contended));
    all.push(lagging());
    all.extend([1, 4, 16].map(waking));
    all
}

/// Returns a bus with and without latencies sampled.
fn ring(latency_sampling: Option<u32>) -> RingEventBus<Trade> {
    let config = BusConfig { capacity: CAPACITY, latency_sampling, ..Default::default() };
    RingEventBus::with_config(config).expect("the capacity is good")
}

fn sampled() -> RingEventBus<Trade> {
    ring(BusConfig::default().latency_sampling)
}

fn strict() -> RingEventBus<Trade> {
    let producers = Producers::Strict;
    let config = BusConfig { capacity: CAPACITY, producers, ..Default::default() };
    RingEventBus::with_config(config).expect("the capacity is good")
}

/// Returns a bus that wakes nobody.
fn polling() -> RingEventBus<Trade> {
    let wake_mode = WakeMode::Polling;
    let config = BusConfig { capacity: CAPACITY, wake_mode, ..Default::default() };
    RingEventBus::with_config(config).expect("the capacity is good")
}

fn subscribe(bus: &RingEventBus<Trade>, count: usize) -> Vec<EventSubscription<Trade>> {
    (0..count).map(|_| bus.subscribe(CAPACITY).expect("the capacity is good")).collect()
}

fn subscribe_to(bus: &RingEventBus<Trade>, pattern: &str) -> EventSubscription<Trade> {
    let pattern = Some(Pattern::new(pattern).expect("it is a pattern"));
    bus.subscribe_with(SubscribeOptions { pattern, ..Default::default() })
        .expect("the options are good")
}

/// Reads an event, with a check that its reader was told of no hole.
fn read(subscription: &EventSubscription<Trade>) -> Option<Trade> {
    match subscription.try_recv() {
        Ok(trade) => Some(trade),
        Err(TryRecvError::Empty) => None,
        Err(error) => panic!("a subscription with room reads {error}"),
    }
}

fn to_many(k: usize) -> Comparison {
    let mut cases = vec![
        case("Producer", move || producer(&sampled(), k)),
        case("Producer, no samples", move || producer(&ring(None), k)),
        case("shared", move || shared(&sampled(), k)),
        case("shared, no samples", move || shared(&ring(None), k)),
        case("strict", move || shared(&strict(), k)),
        case("Producer, polling", move || producer(&polling(), k)),
        case("shared, polling", move || shared(&polling(), k)),
        case("tokio broadcast", move || tokio_broadcast(k)),
        case("rtrb", move || rtrb_each(k)),
        case("disruptor", move || disruptor_single(k)),
        case("disruptor, multi", move || disruptor_multi(k)),
    ];
    cases.extend(lmax::case("LMAX", format!("publish single {k}")));
    cases.extend(lmax::case("LMAX, multi", format!("publish multi {k}")));
    let row = |name: &str, ours, target| {
        let name = format!("{name}, {k} subscribers");
        Row::new(name, ours, &["tokio broadcast"], target)
    };
    Comparison {
        cases,
        rows: vec![
            row("publish, Producer", "Producer", Target::TimesLess(20.0)),
            row("publish, Producer, no samples", "Producer, no samples", Target::None),
            row("publish, shared", "shared", Target::TimesLess(15.0)),
            row("publish, shared, no samples", "shared, no samples", Target::None),
            row("publish, strict", "strict", Target::None),
            row("publish, Producer, polling", "Producer, polling", Target::None),
            row("publish, shared, polling", "shared, polling", Target::None),
        ],
    }
}

fn producer(bus: &RingEventBus<Trade>, k: usize) -> f64 {
    let subscriptions = subscribe(bus, k);
    let mut producer = bus.bus().producer().expect("there is no other");
    let publish = move |trade| assert!(producer.publish(trade).is_ok_and(|taken| taken == k));
    publish_cost(k, publish, |batch| {
        for subscription in &subscriptions {
            assert_all_arrived(batch.clone(), || read(subscription));
        }
    })
}

fn shared(bus: &RingEventBus<Trade>, k: usize) -> f64 {
    let subscriptions = subscribe(bus, k);
    let bus = bus.clone();
    let publish = move |trade| assert!(bus.publish(trade).is_ok_and(|taken| taken == k));
    publish_cost(k, publish, |batch| {
        for subscription in &subscriptions {
            assert_all_arrived(batch.clone(), || read(subscription));
        }
    })
}

fn tokio_broadcast(k: usize) -> f64 {
    let (sender, first) = broadcast::channel(CAPACITY);
    let mut receivers = vec![first];
    receivers.resize_with(k, || sender.subscribe());
    let publish = move |trade| assert!(sender.send(trade).is_ok_and(|taken| taken == k));
    publish_cost(k, publish, |batch| {
        for receiver in &mut receivers {
            assert_all_arrived(batch.clone(), || receiver.try_recv().ok());
        }
    })
}

/// A channel for each reader.
fn rtrb_each(k: usize) -> f64 {
    let (mut producers, mut consumers): (Vec<_>, Vec<_>) =
        (0..k).map(|_| rtrb::RingBuffer::new(CAPACITY)).unzip();
    let publish = move |trade| assert!(producers.iter_mut().all(|p| p.push(trade).is_ok()));
    publish_cost(k, publish, |batch| {
        for consumer in &mut consumers {
            assert_all_arrived(batch.clone(), || consumer.pop().ok());
        }
    })
}

/// Publishes through a disruptor, and has its pollers read each batch whole.
macro_rules! disruptor_case {
    ($name:ident, $build:ident) => {
        fn $name(k: usize) -> f64 {
            with_disruptor!($build, k, |mut producer, mut pollers| {
                publish_cost(
                    k,
                    move |trade| disruptor::Producer::publish(&mut producer, |slot| *slot = trade),
                    |batch| {
                        for poller in &mut pollers {
                            let mut events = poller.poll().expect("events were published");
                            let mut events = (&mut events).copied();
                            assert_all_arrived(batch.clone(), || events.next());
                        }
                    },
                )
            })
        }
    };
}

disruptor_case!(disruptor_single, build_single_producer);
disruptor_case!(disruptor_multi, build_multi_producer);

fn slope() -> Comparison {
    Comparison {
        cases: vec![
            case("Producer, 1 subscriber", || producer(&sampled(), 1)),
            case("Producer, 16 subscribers", || producer(&sampled(), 16)),
        ],
        rows: vec![Row::new(
            "publish, Producer, to 16 against 1",
            "Producer, 16 subscribers",
            &["Producer, 1 subscriber"],
            Target::TimesAsMuch(1.1),
        )],
    }
}

fn with_filters(k: usize) -> Comparison {
    let row = |name: &str, ours| {
        let name = format!("publish on {TOPICS} topics, {name}, {k} subscribers");
        Row::new(name, ours, &["no topics"], Target::TimesAsMuch(1.25))
    };
    Comparison {
        cases: vec![
            case("no topics", move || producer(&sampled(), k)),
            case("each wants one", move || on_topics(k, |number| format!("trades.S{number}.*"))),
            case("each wants all", move || on_topics(k, |_| "trades.>".to_owned())),
        ],
        rows: vec![
            row("each wants one", "each wants one"),
            row("each wants all", "each wants all"),
        ],
    }
}

/// Publishes on each topic in turn, to subscriptions with these patterns.
fn on_topics(k: usize, pattern: impl Fn(usize) -> String) -> f64 {
    let bus = sampled();
    let topics: Vec<Topic> = (0..TOPICS)
        .map(|number| bus.topic(&format!("trades.S{number}.binance")).expect("there is room"))
        .collect();
    let readers: Vec<_> = (0..k)
        .map(|number| {
            let pattern = pattern(number % TOPICS);
            let wants_all = pattern.ends_with('>');
            (number % TOPICS, wants_all, subscribe_to(&bus, &pattern))
        })
        .collect();
    let mut producer = bus.bus().producer().expect("there is no other");
    let mut taken = 0;
    let publish = |trade: Trade| {
        let topic = &topics[trade.sequence as usize % TOPICS];
        taken += producer.publish_to(topic, trade).unwrap_or_default();
    };
    let mut arrived = 0;
    let cost = publish_cost(k, publish, |batch| {
        for (topic, wants_all, subscription) in &readers {
            let wanted = |number: &u64| *wants_all || *number as usize % TOPICS == *topic;
            arrived += batch.clone().filter(wanted).count();
            assert_all_arrived(batch.clone().filter(wanted), || read(subscription));
        }
    });
    assert_eq!(taken, arrived, "publishing returned another number of takers");
    cost
}

fn beside_sleepers() -> Comparison {
    let row = |sleepers, ours| {
        let name = format!("publish, Producer, beside {sleepers} sleeping narrow readers");
        Row::new(name, ours, &["no sleepers"], Target::TimesAsMuch(1.8))
    };
    Comparison {
        cases: vec![
            case("no sleepers", || producer(&sampled(), 1)),
            case("16 sleepers", || with_sleepers(16)),
            case("64 sleepers", || with_sleepers(64)),
        ],
        rows: vec![row(16, "16 sleepers"), row(64, "64 sleepers")],
    }
}

/// Publishes on a topic that one reader wants who is awake, and none of those who sleep.
fn with_sleepers(sleepers: usize) -> f64 {
    let bus = sampled();
    let awake = subscribe_to(&bus, "trades.*");
    let sleeping: Vec<AsyncEventSubscription<Trade>> =
        (0..sleepers).map(|_| subscribe_to(&bus, "quotes.*").into()).collect();
    let mut waits: Vec<_> = sleeping.iter().map(|reader| Box::pin(reader.recv())).collect();
    assert_asleep(&mut waits);
    let topic = bus.topic("trades.BTCUSDT").expect("there is room");
    let mut producer = bus.bus().producer().expect("there is no other");
    let publish = |trade| assert!(producer.publish_to(&topic, trade).is_ok_and(|taken| taken == 1));
    let cost = publish_cost(1, publish, |batch| assert_all_arrived(batch, || read(&awake)));
    assert_asleep(&mut waits);
    cost
}

/// Polls everything once, with a waker that does nothing; nothing is ready.
fn assert_asleep<F: Future>(waits: &mut [Pin<Box<F>>]) {
    let mut context = Context::from_waker(Waker::noop());
    for wait in waits {
        assert!(wait.as_mut().poll(&mut context).is_pending(), "a reader does not sleep");
    }
}

fn contended(k: usize) -> Comparison {
    let row = |name: &str, ours, target| {
        let name = format!("publish, 2 threads at once, {name}, {k} subscribers");
        Row::new(name, ours, &["tokio broadcast"], target)
    };
    let cases: Vec<Case> = vec![
        case("one by one", move || two_at_once(&sampled(), k, 1)),
        case("in batches", move || two_at_once(&sampled(), k, GROUP)),
        case("strict", move || two_at_once(&strict(), k, 1)),
        case("tokio broadcast", move || two_at_once_by_tokio(k)),
    ];
    let rows = vec![
        row("one by one", "one by one", Target::TimesLess(3.5)),
        row("in batches of 8", "in batches", Target::TimesLess(10.0)),
        row("strict, one by one", "strict", Target::None),
    ];
    Comparison { cases, rows }
}

/// Returns what an event costs while two threads, each on a CPU of its own, run `publish` with their
/// number; from the first start to the last end.
fn at_once(publish: impl Fn(usize) + Sync) -> f64 {
    let (start, cpus) = (Barrier::new(2), two_cpus());
    let run = |number: usize| {
        pin(cpus[number]);
        start.wait();
        let begun = Instant::now();
        publish(number);
        (begun, Instant::now())
    };
    let [one, other] = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        let one = scope.spawn(|| run(0));
        [one, other].map(|thread| thread.join().expect("publishing does not panic"))
    });
    nanoseconds(one.1.max(other.1) - one.0.min(other.0)) / (2 * CONTENDED) as f64
}

/// Checks what a reader is left with after two threads published: the order of each of them, and
/// the sum.
fn assert_sum_closes(mut next: impl FnMut() -> Option<Result<Trade, u64>>) {
    let (mut expected, mut seen) = ([0; 2], 0);
    while let Some(found) = next() {
        match found {
            Err(missed) => seen += missed,
            Ok(trade) => {
                let (producer, number) = trade.origin();
                assert_eq!(trade, Trade::of_producer(producer, number), "an event is another one");
                assert!(number >= expected[producer], "events are out of order");
                expected[producer] = number + 1;
                seen += 1;
            }
        }
    }
    assert!(expected.contains(&CONTENDED), "the last event is missing");
    assert_eq!(seen, 2 * CONTENDED, "received and missed are not what was published");
}

fn drop_oldest(bus: &RingEventBus<Trade>, k: usize) -> Vec<EventSubscription<Trade>> {
    let policy = Some(Policy::DropOldest);
    let options = SubscribeOptions { policy, ..Default::default() };
    let subscribe = |_| bus.subscribe_with(options.clone()).expect("the ring keeps the policy");
    (0..k).map(subscribe).collect()
}

fn take(subscription: &EventSubscription<Trade>) -> Option<Result<Trade, u64>> {
    match subscription.try_recv() {
        Ok(trade) => Some(Ok(trade)),
        Err(TryRecvError::Lagged(lagged)) => Some(Err(lagged.missed)),
        Err(_) => None,
    }
}

fn two_at_once(bus: &RingEventBus<Trade>, k: usize, group: u64) -> f64 {
    let subscriptions = drop_oldest(bus, k);
    let cost = at_once(|producer| {
        for first in (0..CONTENDED).step_by(group as usize) {
            if group == 1 {
                let taken = bus.publish(Trade::of_producer(producer, first));
                assert!(taken.is_ok_and(|taken| taken == k));
            } else {
                let events: [Trade; GROUP as usize] =
                    std::array::from_fn(|i| Trade::of_producer(producer, first + i as u64));
                assert!(bus.publish_batch(None, &events).is_ok());
            }
        }
    });
    subscriptions.iter().for_each(|subscription| assert_sum_closes(|| take(subscription)));
    cost
}

fn two_at_once_by_tokio(k: usize) -> f64 {
    let (sender, first) = broadcast::channel(CAPACITY);
    let mut receivers = vec![first];
    receivers.resize_with(k, || sender.subscribe());
    let cost = at_once(|producer| {
        for number in 0..CONTENDED {
            let taken = sender.send(Trade::of_producer(producer, number));
            assert!(taken.is_ok_and(|taken| taken == k));
        }
    });
    for receiver in &mut receivers {
        assert_sum_closes(|| match receiver.try_recv() {
            Ok(trade) => Some(Ok(trade)),
            Err(TokioError::Lagged(missed)) => Some(Err(missed)),
            Err(_) => None,
        });
    }
    cost
}

fn lagging() -> Comparison {
    Comparison {
        cases: vec![
            case("they keep up", || overwriting(16, true)),
            case("nobody reads", || overwriting(16, false)),
        ],
        rows: vec![Row::new(
            "publish, Producer, drop_oldest, 16 subscribers that lag",
            "nobody reads",
            &["they keep up"],
            Target::TimesAsMuch(1.5),
        )],
    }
}

/// Publishes to subscriptions that overwrite, which read each batch, or everything in the end.
fn overwriting(k: usize, keep_up: bool) -> f64 {
    let bus = sampled();
    let subscriptions = drop_oldest(&bus, k);
    let mut producer = bus.bus().producer().expect("there is no other");
    let mut published = 0;
    let publish = move |trade| assert!(producer.publish(trade).is_ok_and(|taken| taken == k));
    let cost = publish_cost(k, publish, |batch| {
        published = batch.end;
        if keep_up {
            for subscription in &subscriptions {
                assert_all_arrived(batch.clone(), || read(subscription));
            }
        }
    });
    for subscription in subscriptions.iter().filter(|_| !keep_up) {
        let mut next = 0;
        while let Some(found) = take(subscription) {
            match found {
                Err(missed) => next += missed,
                Ok(trade) => {
                    assert_eq!(trade, Trade::numbered(next), "the hole is another one");
                    next += 1;
                }
            }
        }
        assert_eq!(next, published, "received and missed are not what was published");
    }
    cost
}

fn waking(k: usize) -> Comparison {
    let row = |name: &str, ours, target| {
        let name = format!("publish, {name}, that wakes {k} sleeping tasks");
        Row::new(name, ours, &["tokio broadcast"], target)
    };
    Comparison {
        cases: vec![
            case("Producer", move || wake(&sampled(), k)),
            case("Producer, no samples", move || wake(&ring(None), k)),
            case("tokio broadcast", move || wake_by_tokio(k)),
        ],
        rows: vec![
            row("Producer", "Producer", Target::TimesLess(1.0)),
            row("Producer, no samples", "Producer, no samples", Target::None),
        ],
    }
}

/// Returns what one publish costs, less what the clock takes, when all readers sleep; wakers do
/// nothing.
/// `round` puts them to sleep, has `timed` run the publish, and reads.
fn wake_cost(mut round: impl FnMut(u64, &mut dyn FnMut(&mut dyn FnMut()))) -> f64 {
    let clock = clock_cost();
    let mut costs = Vec::with_capacity(WAKES);
    for number in 0..WAKES as u64 {
        round(number, &mut |publish| {
            let start = Instant::now();
            publish();
            costs.push(nanoseconds(start.elapsed()) - clock);
        });
    }
    median_of_means(&costs)
}

/// Polls everything once more: each has got the event.
fn assert_woken<F: Future<Output = Option<Trade>>>(waits: &mut [Pin<Box<F>>], trade: Trade) {
    let mut context = Context::from_waker(Waker::noop());
    for wait in waits {
        assert_eq!(wait.as_mut().poll(&mut context), Poll::Ready(Some(trade)), "not woken");
    }
}

fn wake(bus: &RingEventBus<Trade>, k: usize) -> f64 {
    let readers: Vec<AsyncEventSubscription<Trade>> =
        subscribe(bus, k).into_iter().map(Into::into).collect();
    let mut producer = bus.bus().producer().expect("there is no other");
    wake_cost(|number, timed| {
        let wait =
            |reader| Box::pin(async move { AsyncEventSubscription::recv(reader).await.ok() });
        let mut waits: Vec<_> = readers.iter().map(wait).collect();
        assert_asleep(&mut waits);
        let trade = Trade::numbered(number);
        timed(&mut || assert!(producer.publish(trade).is_ok_and(|taken| taken == k)));
        assert_woken(&mut waits, trade);
    })
}

fn wake_by_tokio(k: usize) -> f64 {
    let (sender, first) = broadcast::channel::<Trade>(CAPACITY);
    let mut receivers = vec![first];
    receivers.resize_with(k, || sender.subscribe());
    wake_cost(|number, timed| {
        let wait =
            |receiver| Box::pin(async move { broadcast::Receiver::recv(receiver).await.ok() });
        let mut waits: Vec<_> = receivers.iter_mut().map(wait).collect();
        assert_asleep(&mut waits);
        let trade = Trade::numbered(number);
        timed(&mut || assert!(sender.send(trade).is_ok_and(|taken| taken == k)));
        assert_woken(&mut waits, trade);
    })
}
