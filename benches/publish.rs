//! What publishing a 32-byte event costs with 1, 4, 16 and 64 subscriptions: an empty base case,
//! every backend, and other channels as they are; and what it costs on a topic that one of 1 and
//! one of 256 patterns wants.
//!
//! Channels that hand each event to one receiver (flume, kanal) get one channel for each. All are
//! bounded by the batch, and are used through the call that does not wait.
//!
//! Only publishing is timed. After each batch every subscription is read and its count and content
//! are compared with what was published; a difference ends the run.

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};
#[cfg(feature = "broadcast")]
use tickbus::BroadcastEventBus;
use tickbus::{
    BusConfig, EventBus, EventSubscription, LockFreeEventBus, Pattern, RingEventBus,
    SubscribeOptions, TryRecvError,
};
use tokio::sync::broadcast;

const SUBSCRIPTIONS: [usize; 4] = [1, 4, 16, 64];
const PATTERNS: [usize; 2] = [1, 256];
/// Events published before they are read.
const BATCH: u64 = 1_024;
const CAPACITY: usize = BATCH as usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Trade {
    sequence: u64,
    price: u64,
    quantity: u64,
    ts_event: u64,
}

const _: () = assert!(size_of::<Trade>() == 32);

impl Trade {
    fn numbered(sequence: u64) -> Self {
        let (price, quantity) = (sequence ^ 0x5555, sequence.rotate_left(17));
        Self { sequence, price, quantity, ts_event: !sequence }
    }
}

/// Times `publish` for `count` events, each made just before, as a feed makes them, and has `check`
/// read each batch outside of the time.
fn timed(
    count: u64,
    mut publish: impl FnMut(Trade),
    mut check: impl FnMut(Range<u64>),
) -> Duration {
    let mut spent = Duration::ZERO;
    let mut next = 0;
    while next < count {
        let end = count.min(next + BATCH);
        let start = Instant::now();
        for number in next..end {
            publish(Trade::numbered(black_box(number)));
        }
        spent += start.elapsed();
        check(next..end);
        next = end;
    }
    spent
}

/// Compares everything that can be read with what was published.
fn assert_all_arrived<T>(published: &Range<u64>, mut read: impl FnMut() -> Result<Trade, T>) {
    let mut next = published.start;
    while let Ok(trade) = read() {
        assert_eq!(trade, Trade::numbered(next), "event {next} is another one");
        next += 1;
    }
    assert_eq!(next, published.end, "events are missing");
}

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Benches one way to publish under `name` with so many subscriptions or patterns.
fn bench(
    group: &mut Group<'_>,
    name: &str,
    parameter: usize,
    mut publish: impl FnMut(Trade),
    mut check: impl FnMut(Range<u64>),
) {
    group.bench_function(BenchmarkId::new(name, parameter), |bencher| {
        bencher.iter_custom(|count| timed(count, &mut publish, &mut check));
    });
}

fn bench_bus<B: EventBus<Trade>>(group: &mut Group<'_>, name: &str, subscribers: usize, bus: &B) {
    let subscriptions: Vec<EventSubscription<Trade>> =
        (0..subscribers).map(|_| bus.subscribe(CAPACITY).expect("the capacity is good")).collect();
    let publish = |trade| assert!(bus.publish(trade).is_ok_and(|taken| taken == subscribers));
    bench(group, name, subscribers, publish, |batch| {
        for subscription in &subscriptions {
            assert_all_arrived(&batch, || subscription.try_recv());
            assert!(matches!(subscription.try_recv(), Err(TryRecvError::Empty)));
        }
    });
}

fn bench_producer(group: &mut Group<'_>, name: &str, subscribers: usize, config: &BusConfig) {
    let bus = RingEventBus::with_config(config.clone()).expect("the capacity is good");
    let subscriptions: Vec<EventSubscription<Trade>> =
        (0..subscribers).map(|_| bus.subscribe(CAPACITY).expect("the capacity is good")).collect();
    let mut producer = bus.bus().producer().expect("there is no other");
    let publish = |trade| assert!(producer.publish(trade).is_ok_and(|taken| taken == subscribers));
    bench(group, name, subscribers, publish, |batch| {
        for subscription in &subscriptions {
            assert_all_arrived(&batch, || subscription.try_recv());
            assert!(matches!(subscription.try_recv(), Err(TryRecvError::Empty)));
        }
    });
}

fn bench_patterns(group: &mut Group<'_>, patterns: usize) {
    let bus = LockFreeEventBus::new(CAPACITY).expect("the capacity is good");
    let subscriptions: Vec<EventSubscription<Trade>> = (0..patterns)
        .map(|number| {
            let pattern = Some(Pattern::new(&format!("trades.S{number}.*")).expect("it is one"));
            bus.subscribe_with(SubscribeOptions { pattern, ..Default::default() })
                .expect("the options are good")
        })
        .collect();
    let (wanting, others) = subscriptions.split_first().expect("there is a subscription");
    let topic = bus.topic("trades.S0.binance").expect("there is room for a topic");
    let publish = |trade| assert!(bus.publish_to(&topic, trade).is_ok_and(|taken| taken == 1));
    bench(group, "lock_free", patterns, publish, |batch| {
        assert_all_arrived(&batch, || wanting.try_recv());
        assert!(others.iter().all(|other| other.pending() == 0));
    });
}

fn bench_tokio(group: &mut Group<'_>, subscribers: usize) {
    let (sender, _) = broadcast::channel(CAPACITY);
    let mut receivers: Vec<_> = (0..subscribers).map(|_| sender.subscribe()).collect();
    let publish = |trade| assert!(sender.send(trade).is_ok_and(|taken| taken == subscribers));
    bench(group, "tokio_broadcast", subscribers, publish, |batch| {
        for receiver in &mut receivers {
            assert_all_arrived(&batch, || receiver.try_recv());
        }
    });
}

fn bench_async_broadcast(group: &mut Group<'_>, subscribers: usize) {
    let (sender, first) = async_broadcast::broadcast(CAPACITY);
    let mut receivers = vec![first; subscribers];
    let publish = |trade| assert!(matches!(sender.try_broadcast(trade), Ok(None)));
    bench(group, "async_broadcast", subscribers, publish, |batch| {
        for receiver in &mut receivers {
            assert_all_arrived(&batch, || receiver.try_recv());
        }
    });
}

fn bench_bus_crate(group: &mut Group<'_>, subscribers: usize) {
    let mut bus = bus::Bus::new(CAPACITY);
    let mut readers: Vec<_> = (0..subscribers).map(|_| bus.add_rx()).collect();
    let publish = |trade| assert!(bus.try_broadcast(trade).is_ok());
    bench(group, "bus", subscribers, publish, |batch| {
        for reader in &mut readers {
            assert_all_arrived(&batch, || reader.try_recv());
        }
    });
}

fn bench_flume(group: &mut Group<'_>, subscribers: usize) {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..subscribers).map(|_| flume::bounded(CAPACITY)).unzip();
    let publish = |trade| assert!(senders.iter().all(|sender| sender.try_send(trade).is_ok()));
    bench(group, "flume", subscribers, publish, |batch| {
        for receiver in &receivers {
            assert_all_arrived(&batch, || receiver.try_recv());
        }
    });
}

fn bench_kanal(group: &mut Group<'_>, subscribers: usize) {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..subscribers).map(|_| kanal::bounded(CAPACITY)).unzip();
    let publish = |trade| assert!(senders.iter().all(|s| matches!(s.try_send(trade), Ok(true))));
    bench(group, "kanal", subscribers, publish, |batch| {
        for receiver in &receivers {
            assert_all_arrived(&batch, || receiver.try_recv().ok().flatten().ok_or(()));
        }
    });
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> Group<'a> {
    let mut group = criterion.benchmark_group(name);
    group
        .throughput(Throughput::Elements(1))
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    group
}

fn publish(criterion: &mut Criterion) {
    let mut group = group(criterion, "publish");
    group.bench_function("empty", |bencher| {
        bencher.iter_custom(|count| timed(count, |trade| _ = black_box(trade.price), |_| ()));
    });
    for subscribers in SUBSCRIPTIONS {
        let bus = LockFreeEventBus::new(CAPACITY).expect("the capacity is good");
        bench_bus(&mut group, "lock_free", subscribers, &bus);
        let unsampled =
            BusConfig { capacity: CAPACITY, latency_sampling: None, ..Default::default() };
        let sampled = BusConfig { capacity: CAPACITY, ..Default::default() };
        for (name, config) in [("", &sampled), (", no latency sampling", &unsampled)] {
            let bus = RingEventBus::with_config(config.clone()).expect("the capacity is good");
            bench_bus(&mut group, &format!("ring{name}"), subscribers, &bus);
            bench_producer(&mut group, &format!("ring, Producer{name}"), subscribers, config);
        }
        let bus = LockFreeEventBus::with_config(unsampled).expect("the capacity is good");
        bench_bus(&mut group, "lock_free, no latency sampling", subscribers, &bus);
        #[cfg(feature = "broadcast")]
        {
            let bus = BroadcastEventBus::new(CAPACITY).expect("the capacity is good");
            bench_bus(&mut group, "broadcast", subscribers, &bus);
        }
        bench_tokio(&mut group, subscribers);
        bench_async_broadcast(&mut group, subscribers);
        bench_bus_crate(&mut group, subscribers);
        bench_flume(&mut group, subscribers);
        bench_kanal(&mut group, subscribers);
    }
    group.finish();
}

fn patterns(criterion: &mut Criterion) {
    let mut group = group(criterion, "patterns");
    for patterns in PATTERNS {
        bench_patterns(&mut group, patterns);
    }
    group.finish();
}

criterion_group!(benches, publish, patterns);
criterion_main!(benches);
