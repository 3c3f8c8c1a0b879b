//! What publishing a 32-byte event costs with 1, 4 and 16 subscriptions: an empty base case, both
//! backends, and tokio's broadcast channel as it is.
//!
//! Only publishing is timed. After each batch every subscription is read and its count and content
//! are compared with what was published; a difference ends the run.

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use std::hint::black_box;
use std::time::{Duration, Instant};
#[cfg(feature = "broadcast")]
use tickbus::BroadcastEventBus;
use tickbus::{EventBus, EventSubscription, LockFreeEventBus, TryRecvError};
use tokio::sync::broadcast;

const SUBSCRIPTIONS: [usize; 3] = [1, 4, 16];
/// Events published before they are read.
const BATCH: u64 = 1_024;

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

/// Times `publish` for `count` events and has `check` read each batch outside of the time.
fn timed(count: u64, mut publish: impl FnMut(Trade), mut check: impl FnMut(&[Trade])) -> Duration {
    let mut spent = Duration::ZERO;
    let mut batch = Vec::with_capacity(BATCH as usize);
    let mut next = 0;
    while next < count {
        let end = count.min(next + BATCH);
        batch.clear();
        batch.extend((next..end).map(Trade::numbered));
        let start = Instant::now();
        for trade in &batch {
            publish(black_box(*trade));
        }
        spent += start.elapsed();
        check(&batch);
        next = end;
    }
    spent
}

/// Compares everything that can be read with what was published.
fn assert_all_arrived<T>(published: &[Trade], mut read: impl FnMut() -> Result<Trade, T>) {
    let mut count = 0;
    while let Ok(trade) = read() {
        assert_eq!(Some(&trade), published.get(count), "event {count} of a batch is another one");
        count += 1;
    }
    assert_eq!(count, published.len(), "events are missing");
}

fn bench_bus<B: EventBus<Trade>>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    subscribers: usize,
    bus: &B,
) {
    let subscriptions: Vec<EventSubscription<Trade>> = (0..subscribers)
        .map(|_| bus.subscribe(BATCH as usize).expect("the capacity is good"))
        .collect();
    group.bench_function(BenchmarkId::new(name, subscribers), |bencher| {
        bencher.iter_custom(|count| {
            let publish = |trade| {
                assert!(bus.publish(trade).is_ok_and(|taken| taken == subscribers));
            };
            timed(count, publish, |batch| {
                for subscription in &subscriptions {
                    assert_all_arrived(batch, || subscription.try_recv());
                    assert!(matches!(subscription.try_recv(), Err(TryRecvError::Empty)));
                }
            })
        });
    });
}

fn bench_tokio(group: &mut BenchmarkGroup<'_, WallTime>, subscribers: usize) {
    let (sender, _) = broadcast::channel(BATCH as usize);
    let mut receivers: Vec<_> = (0..subscribers).map(|_| sender.subscribe()).collect();
    group.bench_function(BenchmarkId::new("tokio_broadcast", subscribers), |bencher| {
        bencher.iter_custom(|count| {
            let publish = |trade| assert!(sender.send(trade).is_ok_and(|n| n == subscribers));
            timed(count, publish, |batch| {
                for receiver in &mut receivers {
                    assert_all_arrived(batch, || receiver.try_recv());
                }
            })
        });
    });
}

fn publish(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish");
    group
        .throughput(Throughput::Elements(1))
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    group.bench_function("empty", |bencher| {
        bencher.iter_custom(|count| timed(count, |trade| _ = black_box(trade), |_| ()));
    });
    for subscribers in SUBSCRIPTIONS {
        let capacity = BATCH as usize;
        let bus = LockFreeEventBus::new(capacity).expect("the capacity is good");
        bench_bus(&mut group, "lock_free", subscribers, &bus);
        #[cfg(feature = "broadcast")]
        {
            let bus = BroadcastEventBus::new(capacity).expect("the capacity is good");
            bench_bus(&mut group, "broadcast", subscribers, &bus);
        }
        bench_tokio(&mut group, subscribers);
    }
    group.finish();
}

criterion_group!(benches, publish);
criterion_main!(benches);
