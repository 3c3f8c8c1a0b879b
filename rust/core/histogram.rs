//! How long publishing takes: a random sample of the calls, in buckets as wide as an eighth of
//! their values.
//!
//! A call is drawn when it begins, before it waits for anything, so that waiting counts. A
//! countdown begins at a number drawn from an exponential distribution, and every call takes its
//! bus's rate off; whoever crosses zero is measured. An exponential distribution has no memory, so
//! each call is drawn with the probability of its own bus, independently of all others, whatever
//! buses and rates are mixed; no pattern in the calls can hide from it.
//! Each thread has a countdown, so that nothing is shared before the token; where the exclusion is
//! there already, each bus has one, which is found sooner. A call that is not drawn reads no clock.

use crate::error::ConfigError;
use crate::sync::{Counter, Exclusion, Mutex};
use std::cell::Cell;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

/// Buckets for each power of two.
const PER_OCTAVE: usize = 1 << PER_OCTAVE_BITS;
const PER_OCTAVE_BITS: u32 = 3;
/// All `u64` nanoseconds: those below `PER_OCTAVE` each for itself, then one octave for each
/// further bit.
const BUCKETS: usize = PER_OCTAVE * (1 + (u64::BITS - PER_OCTAVE_BITS) as usize);

/// The fixed point of countdowns and rates.
const ONE: f64 = (1_u64 << 40) as f64;

#[derive(Clone, Copy)]
struct Countdown {
    left: i64,
    /// The state of the generator; 0 before the first draw.
    seed: u64,
}

thread_local! {
    static COUNTDOWN: Cell<Countdown> = const { Cell::new(Countdown::NEW) };
}

impl Countdown {
    const NEW: Self = Self { left: 0, seed: 0 };

    /// Counts a call and returns whether it is measured.
    #[inline]
    fn count(&mut self, rate: i64) -> bool {
        self.left -= rate;
        self.left < 0 && self.crossed(rate)
    }

    /// Counts so many calls and returns how many are measured.
    #[inline]
    fn count_many(&mut self, rate: i64, calls: usize) -> u64 {
        if self.outlasts(rate, calls) {
            self.left -= rate * calls as i64;
            return 0;
        }
        (0..calls).filter(|_| self.count(rate)).count() as u64
    }

    /// Returns whether none of so many calls is measured.
    #[inline]
    fn outlasts(&self, rate: i64, calls: usize) -> bool {
        self.left >= rate.saturating_mul(calls as i64)
    }

    /// Draws anew for a call that crossed zero, and returns whether it is measured: the first call
    /// crosses because nothing was drawn before.
    #[cold]
    fn crossed(&mut self, rate: i64) -> bool {
        if self.seed_once() {
            self.left = self.draw() - rate;
            if self.left >= 0 {
                return false;
            }
        }
        self.left = self.draw();
        true
    }

    /// Seeds the generator and returns whether it had to be done.
    fn seed_once(&mut self) -> bool {
        let is_first = self.seed == 0;
        if is_first {
            // A fresh hasher is keyed at random; any odd number is a good seed.
            self.seed = RandomState::new().build_hasher().finish() | 1;
        }
        is_first
    }

    fn draw(&mut self) -> i64 {
        // splitmix64 (Steele, Lea, Flood 2014).
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^= bits >> 31;
        // In (0, 1], so that the logarithm is finite.
        let uniform = ((bits >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        (-uniform.ln() * ONE) as i64
    }
}

/// When a call that is measured began; the others have nothing.
#[derive(Debug, Clone, Copy)]
pub struct Entry(Option<Instant>);

/// The latencies of one bus.
pub(crate) struct Latencies<R: Exclusion> {
    /// What a call takes off the countdown; 0 where nothing is measured.
    rate: i64,
    /// Of the bus, where locking costs nothing; elsewhere threads have their own.
    countdown: Mutex<R, Countdown>,
    buckets: Box<[Counter]>,
    nanoseconds: Counter,
}

impl<R: Exclusion> Latencies<R> {
    /// Measures one in `mean_gap` calls in the mean, or none.
    pub(crate) fn new(mean_gap: Option<u32>) -> Result<Self, ConfigError> {
        let rate = match mean_gap {
            Some(0) => {
                return Err(ConfigError::new(
                    "latency_sampling was 0; it must be at least 1 publication for each sample, \
                     or None for no samples",
                ));
            }
            // The countdown ends within one call with probability 1 / gap. A gap of 1 saturates.
            Some(gap) => (-(-1.0 / f64::from(gap)).ln_1p() * ONE) as i64,
            None => 0,
        };
        let buckets = if mean_gap.is_some() { BUCKETS } else { 0 };
        Ok(Self {
            rate,
            countdown: Mutex::new(Countdown::NEW),
            buckets: (0..buckets).map(|_| Counter::default()).collect(),
            nanoseconds: Counter::default(),
        })
    }

    /// Begins a call.
    #[inline]
    pub(crate) fn enter(&self) -> Entry {
        if self.rate == 0 {
            return Entry(None);
        }
        let is_measured = self.with_countdown(|countdown| countdown.count(self.rate));
        Entry(is_measured.then(Instant::now))
    }

    #[inline]
    fn with_countdown<O>(&self, f: impl FnOnce(&mut Countdown) -> O) -> O {
        match R::SERIALIZES_SLEEP {
            true => f(&mut self.countdown.lock()),
            false => COUNTDOWN.with(|of_thread| {
                let mut countdown = of_thread.get();
                let result = f(&mut countdown);
                of_thread.set(countdown);
                result
            }),
        }
    }

    /// Begins a call that publishes up to so many events at once.
    #[inline]
    pub(crate) fn enter_batch(&self, events: usize) -> Entry {
        if self.rate == 0 {
            return Entry(None);
        }
        let none = self.with_countdown(|countdown| countdown.outlasts(self.rate, events));
        Entry((!none).then(Instant::now))
    }

    /// Ends a call that has published so many events at once: each is measured as any other, and
    /// took as long as all.
    #[inline]
    pub(crate) fn leave_batch(&self, entry: Entry, events: usize) {
        if self.rate == 0 {
            return;
        }
        let samples = self.with_countdown(|countdown| countdown.count_many(self.rate, events));
        if let Some(entered) = entry.0
            && samples > 0
        {
            self.record(entered.elapsed(), samples);
        }
    }

    /// Returns the next publication to be measured, at or after a sequence, for who publishes the
    /// events of a bus alone, and so takes one comparison for the others.
    pub(crate) fn next_sample(&self, sequence: u64) -> u64 {
        self.draw_gap().saturating_add(sequence)
    }

    /// Begins a call of which that has said whether it is measured.
    pub(crate) fn enter_sampled(&self, is_measured: bool) -> Entry {
        Entry(is_measured.then(Instant::now))
    }

    /// Draws how many publications go before the next one that is measured.
    fn draw_gap(&self) -> u64 {
        if self.rate == 0 {
            return u64::MAX;
        }
        COUNTDOWN.with(|of_thread| {
            let mut countdown = of_thread.get();
            countdown.seed_once();
            let gap = countdown.draw() / self.rate;
            of_thread.set(countdown);
            gap as u64
        })
    }

    /// Ends a call that has published.
    #[inline]
    pub(crate) fn leave(&self, entry: Entry) {
        if let Some(entered) = entry.0 {
            self.record(entered.elapsed(), 1);
        }
    }

    #[cold]
    fn record(&self, latency: Duration, samples: u64) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[index(nanoseconds)].add(samples);
        self.nanoseconds.add(nanoseconds.saturating_mul(samples));
    }

    pub(crate) fn read(&self) -> LatencyHistogram {
        let counts = self.buckets.iter().map(Counter::value).enumerate();
        LatencyHistogram {
            buckets: counts
                .filter(|&(_, count)| count > 0)
                .map(|(index, count)| LatencyBucket {
                    upper: Duration::from_nanos(upper(index)),
                    count,
                })
                .collect(),
            sum: Duration::from_nanos(self.nanoseconds.value()),
        }
    }
}

/// Returns the bucket of a latency: the first whose upper bound is not below it.
fn index(nanoseconds: u64) -> usize {
    let below = nanoseconds.saturating_sub(1);
    let octave = (below >> PER_OCTAVE_BITS).checked_ilog2().map_or(0, |bit| bit + 1);
    if octave == 0 {
        return below as usize;
    }
    octave as usize * PER_OCTAVE + (below >> (octave - 1)) as usize % PER_OCTAVE
}

/// Returns the longest latency of a bucket, in nanoseconds.
fn upper(index: usize) -> u64 {
    let (octave, place) = (index / PER_OCTAVE, index % PER_OCTAVE);
    if octave == 0 {
        return place as u64 + 1;
    }
    let bound = ((PER_OCTAVE + place + 1) as u128) << (octave - 1);
    u64::try_from(bound).unwrap_or(u64::MAX)
}

/// How long a random sample of the publications took, each from the call to its return, waiting
/// for other publishers and for room included; those that failed are left out.
///
/// It counts the samples, not the publications, of which `total_published` is the exact number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LatencyHistogram {
    /// The buckets that have samples, from short to long.
    pub buckets: Vec<LatencyBucket>,
    /// The sum of the latencies of all samples.
    pub sum: Duration,
}

/// Samples of about the same latency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencyBucket {
    /// The longest latency that belongs here; the shortest is at most an eighth less.
    pub upper: Duration,
    /// The number of samples.
    pub count: u64,
}

impl LatencyHistogram {
    /// Returns the number of samples.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.count).sum()
    }

    /// Returns a latency that the fraction `q` of the samples did not exceed, at most an eighth too
    /// long; `None` without samples. `q` is clamped to 0..=1.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let rank = (q.clamp(0.0, 1.0) * self.count() as f64).ceil().max(1.0) as u64;
        let mut passed = 0;
        let mut reached = self.buckets.iter().skip_while(|bucket| {
            passed += bucket.count;
            passed < rank
        });
        reached.next().map(|bucket| bucket.upper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::CrossbeamQueue;
    use crate::sync::ThreadExclusion;

    /// As an exclusion that is there anyway: there each bus has a countdown, and not each thread.
    struct Serial(ThreadExclusion);

    // SAFETY: the lock inside excludes.
    unsafe impl lock_api::RawMutex for Serial {
        const INIT: Self = Self(ThreadExclusion::INIT);

        type GuardMarker = <ThreadExclusion as lock_api::RawMutex>::GuardMarker;

        fn lock(&self) {
            self.0.lock();
        }

        fn try_lock(&self) -> bool {
            self.0.try_lock()
        }

        unsafe fn unlock(&self) {
            // SAFETY: whoever calls this holds the lock, which is the lock inside.
            unsafe { self.0.unlock() }
        }
    }

    // SAFETY: nobody sleeps.
    unsafe impl Exclusion for Serial {
        type Queue<E> = CrossbeamQueue<E>;

        const SERIALIZES_SLEEP: bool = true;
    }

    fn latencies<R: Exclusion>(mean_gap: Option<u32>) -> Latencies<R> {
        Latencies::new(mean_gap).unwrap()
    }

    #[test]
    fn every_latency_is_in_the_bucket_that_bounds_it_within_an_eighth() {
        let near = |bit: u32| [-1, 0, 1, 2].map(|off| (1_u64 << bit).wrapping_add_signed(off));
        let edges = (0..u64::BITS).flat_map(near).chain([u64::MAX - 1, u64::MAX]);
        for latency in (0..5_000).chain(edges) {
            let bucket = index(latency);
            assert!(bucket < BUCKETS, "{latency}");
            assert!(latency <= upper(bucket), "{latency}");
            let lower = if bucket == 0 { 0 } else { upper(bucket - 1) };
            assert!(latency > lower || latency == 0, "{latency}");
            assert!(upper(bucket) - lower <= (lower / 8).max(1), "{latency}");
        }
        assert_eq!(upper(BUCKETS - 1), u64::MAX);
    }

    #[test]
    fn powers_of_two_are_upper_bounds() {
        for bit in 0..u64::BITS {
            assert_eq!(upper(index(1 << bit)), 1 << bit);
        }
    }

    #[test]
    fn a_quantile_is_the_bound_of_the_bucket_that_reaches_it() {
        let latencies = latencies::<ThreadExclusion>(Some(1));
        assert_eq!(latencies.read().quantile(0.5), None);
        for latency in [1, 2, 3, 1_000] {
            latencies.record(Duration::from_nanos(latency), 1);
        }
        let read = latencies.read();
        let quantiles = [-1.0, 0.0, 0.25, 0.26, 0.75, 0.76, 1.0, 7.0, f64::NAN];
        let bounds = quantiles.map(|q| read.quantile(q).unwrap().as_nanos());
        assert_eq!(bounds, [1, 1, 1, 2, 3, 1_024, 1_024, 1_024, 1]);
        assert_eq!((read.count(), read.sum), (4, Duration::from_nanos(1_006)));
    }

    /// Returns the gaps between the calls that are measured, by their position.
    fn gaps<R: Exclusion>(latencies: &Latencies<R>, samples: usize) -> Vec<u64> {
        let mut gap = 0;
        let mut gaps = Vec::new();
        while gaps.len() < samples {
            gap += 1;
            if latencies.enter().0.is_some() {
                gaps.push(gap);
                gap = 0;
            }
        }
        gaps
    }

    fn check_gaps<R: Exclusion>() {
        const SAMPLES: usize = 40_000;
        for mean_gap in [2_u32, 64] {
            let gaps = gaps(&latencies::<R>(Some(mean_gap)), SAMPLES);
            let count = SAMPLES as f64;
            let mean = gaps.iter().sum::<u64>() as f64 / count;
            let variance = gaps.iter().map(|&gap| (gap as f64 - mean).powi(2)).sum::<f64>() / count;
            let wanted = f64::from(mean_gap);
            let deviation = (wanted * (wanted - 1.0)).sqrt();
            // Eight standard errors of the mean; the standard error of the deviation is larger.
            assert!((mean - wanted).abs() < 8.0 * deviation / count.sqrt(), "{mean}");
            assert!((variance.sqrt() / deviation - 1.0).abs() < 0.1, "{variance}");
        }
    }

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_geometric_distribution() {
        check_gaps::<ThreadExclusion>();
        check_gaps::<Serial>();
    }

    #[test]
    fn gaps_between_sequences_have_the_mean_and_the_spread_of_a_geometric_distribution() {
        const SAMPLES: usize = 40_000;
        for mean_gap in [2_u32, 64] {
            let latencies = latencies::<ThreadExclusion>(Some(mean_gap));
            let next = |drawn: &u64| Some(latencies.next_sample(drawn + 1));
            let drawn = std::iter::successors(Some(latencies.next_sample(0)), next);
            let drawn: Vec<u64> = drawn.take(SAMPLES + 1).collect();
            let gaps = drawn.windows(2).map(|pair| (pair[1] - pair[0]) as f64);
            let count = SAMPLES as f64;
            let mean = gaps.clone().sum::<f64>() / count;
            let variance = gaps.map(|gap| (gap - mean).powi(2)).sum::<f64>() / count;
            let wanted = f64::from(mean_gap);
            let spread = wanted * (wanted - 1.0);
            // Four standard errors, and more for the variance, whose own spread is wide.
            assert!((mean - wanted).abs() < 4.0 * (spread / count).sqrt(), "{mean}");
            assert!((variance / spread - 1.0).abs() < 0.1, "{variance} of {spread}");
        }
        assert_eq!(latencies::<ThreadExclusion>(None).next_sample(7), u64::MAX);
    }

    fn check_shares<R: Exclusion>() {
        const CALLS: u32 = 400_000;
        let buses = [Some(1), Some(16), None].map(latencies::<R>);
        let mut drawn = [0_u32; 3];
        for _ in 0..CALLS {
            for (bus, drawn) in buses.iter().zip(&mut drawn) {
                *drawn += u32::from(bus.enter().0.is_some());
            }
        }
        assert_eq!((drawn[0], drawn[2]), (CALLS, 0));
        // 25,000 in the mean, with a standard deviation of 153.
        assert!(drawn[1].abs_diff(CALLS / 16) < 8 * 153, "{}", drawn[1]);
    }

    #[test]
    fn buses_with_other_gaps_in_the_same_thread_do_not_change_a_bus_s_share() {
        check_shares::<ThreadExclusion>();
        check_shares::<Serial>();
    }

    #[test]
    fn an_event_of_a_batch_is_measured_as_often_as_any_other() {
        const BATCHES: usize = 40_000;
        fn check<R: Exclusion>() {
            let buses = [Some(1), Some(16), None].map(latencies::<R>);
            for events in (0..BATCHES).map(|number| number % 20) {
                for bus in &buses {
                    bus.leave_batch(bus.enter_batch(events), events);
                }
            }
            let events = BATCHES as u64 / 20 * 190;
            let [all, some, none] = buses.map(|bus| bus.read().count());
            assert_eq!((all, none), (events, 0));
            // 23,750 in the mean, with a standard deviation of 149.
            assert!(some.abs_diff(events / 16) < 8 * 149, "{some}");
        }
        check::<ThreadExclusion>();
        check::<Serial>();
    }

    #[test]
    fn the_first_call_of_a_thread_or_of_a_bus_is_measured_as_rarely_as_any_other() {
        const FIRST_CALLS: u32 = 400;
        fn is_drawn<R: Exclusion>() -> u32 {
            u32::from(latencies::<R>(Some(4)).enter().0.is_some())
        }
        let in_thread = |_| std::thread::spawn(is_drawn::<ThreadExclusion>).join().unwrap();
        let of_threads: u32 = (0..FIRST_CALLS).map(in_thread).sum();
        let of_buses: u32 = (0..FIRST_CALLS).map(|_| is_drawn::<Serial>()).sum();
        // 100 in the mean, with a standard deviation of 8.7.
        for drawn in [of_threads, of_buses] {
            assert!(drawn.abs_diff(FIRST_CALLS / 4) < 70, "{drawn}");
        }
    }
}
