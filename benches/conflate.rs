//! What publishing a 32-byte event to one conflating subscription costs: an empty base case,
//! `drop_oldest`, mostly without room, and the newest of one key and of 1,000 keys, by a number
//! and by bytes that are looked up.
//!
//! Only publishing is timed. After each batch the subscription is read: every key's event must be
//! the newest of the batch.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::{Duration, Instant};
use tickbus::{EventBus, KeyFn, LockFreeEventBus, OnLag, Policy, SubscribeOptions};

const CAPACITY: usize = 1_024;
/// Events published before they are read.
const BATCH: u64 = 8 * CAPACITY as u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Quote {
    sequence: u64,
    instrument: u64,
    bid: u64,
    ask: u64,
}

const _: () = assert!(size_of::<Quote>() == 32);

fn bench_policy(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    policy: Policy,
    instruments: u64,
    key: Option<KeyFn<Quote>>,
) {
    let bus = LockFreeEventBus::new(CAPACITY).expect("the capacity is good");
    let options =
        SubscribeOptions { policy: Some(policy), on_lag: OnLag::Count, key, ..Default::default() };
    let subscription = bus.subscribe_with(options).expect("the policy is kept");
    let quote = |sequence: u64| {
        // Every instrument in turn, in an order that is not that of the numbers.
        let instrument = (sequence * 0x9e37) % instruments;
        Quote { sequence, instrument, bid: sequence, ask: !sequence }
    };
    let mut next = 0;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|count| {
            let (mut spent, end) = (Duration::ZERO, next + count);
            while next < end {
                let first = next;
                next = end.min(next + BATCH);
                let batch: Vec<_> = (first..next).map(quote).collect();
                let start = Instant::now();
                for quote in &batch {
                    assert!(bus.publish(black_box(*quote)).is_ok());
                }
                spent += start.elapsed();
                let kept = instruments.min(CAPACITY as u64);
                while let Ok(quote) = subscription.try_recv() {
                    assert!(quote.sequence + kept >= next, "an older event was kept");
                }
            }
            spent
        });
    });
}

fn conflate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("conflate");
    group
        .throughput(Throughput::Elements(1))
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    group.bench_function("empty", |bencher| {
        bencher.iter(|| black_box(Quote { sequence: 0, instrument: 0, bid: 0, ask: 0 }));
    });
    bench_policy(&mut group, "drop_oldest", Policy::DropOldest, CAPACITY as u64, None);
    bench_policy(&mut group, "by topic", Policy::Conflate, 1, None);
    for instruments in [1, 1_000] {
        let number = KeyFn::number(|quote: &Quote| quote.instrument);
        let name = format!("by number, {instruments} keys");
        bench_policy(&mut group, &name, Policy::Conflate, instruments, Some(number));
        let bytes = KeyFn::new(|quote: &Quote| quote.instrument.to_be_bytes());
        let name = format!("by bytes, {instruments} keys");
        bench_policy(&mut group, &name, Policy::Conflate, instruments, Some(bytes));
    }
    group.finish();
}

criterion_group!(benches, conflate);
criterion_main!(benches);
