import com.lmax.disruptor.BusySpinWaitStrategy;
import com.lmax.disruptor.EventPoller;
import com.lmax.disruptor.RingBuffer;
import com.lmax.disruptor.WaitStrategy;
import com.lmax.disruptor.YieldingWaitStrategy;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.atomic.AtomicReference;

/**
 * Measures the LMAX Disruptor as benches/targets measures the others: each line read is a request,
 * each line written its figures in nanoseconds. Readers poll, as there; every event is compared with
 * what was published, and a difference ends the process.
 *
 * <pre>
 * publish single|multi READERS    median over batches, per event
 * latency HOPS                    p50, p99 and p99.9 of one way, less the clock
 * stream PRODUCERS READERS COUNT  per event, from the first start to the last end
 * </pre>
 */
public final class Lmax {
    private static final int CAPACITY = 1024;
    private static final int WARM_UP_BATCHES = 16;
    private static final int WARM_UPS = 5;
    private static final int AVERAGED = 16;
    private static final int PRODUCER_SHIFT = 48;

    private static final class Trade {
        long sequence;
        long price;
        long quantity;
        long tsEvent;

        void set(long number) {
            sequence = number;
            price = number ^ 0x5555;
            quantity = number + 0x12345678;
            tsEvent = ~number;
        }

        boolean is(long number) {
            return sequence == number
                    && price == (number ^ 0x5555)
                    && quantity == number + 0x12345678
                    && tsEvent == ~number;
        }
    }

    /** Compares the events of a stream, by producer, with what was published. */
    private static final class Check implements EventPoller.Handler<Trade> {
        private final long[] next;
        private long seen;

        Check(int producers) {
            next = new long[producers];
        }

        @Override
        public boolean onEvent(Trade trade, long sequence, boolean endOfBatch) {
            int producer = (int) (trade.sequence >>> PRODUCER_SHIFT);
            long number = next[producer]++;
            if (!trade.is(((long) producer << PRODUCER_SHIFT) | number)) {
                throw new AssertionError("event " + number + " is another one");
            }
            seen++;
            return true;
        }
    }

    private final RingBuffer<Trade> ring;
    private final List<EventPoller<Trade>> pollers = new ArrayList<>();

    private Lmax(boolean single, int readers, boolean crowded) {
        WaitStrategy wait = crowded ? new YieldingWaitStrategy() : new BusySpinWaitStrategy();
        ring = single
                ? RingBuffer.createSingleProducer(Trade::new, CAPACITY, wait)
                : RingBuffer.createMultiProducer(Trade::new, CAPACITY, wait);
        for (int reader = 0; reader < readers; reader++) {
            EventPoller<Trade> poller = ring.newPoller();
            ring.addGatingSequences(poller.getSequence());
            pollers.add(poller);
        }
    }

    private void publish(long number) {
        long sequence = ring.next();
        ring.get(sequence).set(number);
        ring.publish(sequence);
    }

    private static double publishing(boolean single, int readers) throws Exception {
        Lmax lmax = new Lmax(single, readers, false);
        Check[] checks = new Check[readers];
        Arrays.setAll(checks, reader -> new Check(1));
        double[] batches = new double[Math.max(1024 / readers, 128)];
        long next = 0;
        for (int batch = -WARM_UP_BATCHES; batch < batches.length; batch++) {
            long end = next + CAPACITY;
            long start = System.nanoTime();
            for (; next < end; next++) {
                lmax.publish(next);
            }
            long spent = System.nanoTime() - start;
            if (batch >= 0) {
                batches[batch] = (double) spent / CAPACITY;
            }
            for (int reader = 0; reader < readers; reader++) {
                while (checks[reader].seen < end) {
                    lmax.pollers.get(reader).poll(checks[reader]);
                }
            }
        }
        Arrays.sort(batches);
        return batches[batches.length / 2];
    }

    /** Returns the median of means of a few times that follow one another. */
    private static double medianOfMeans(double[] times) {
        double[] means = new double[times.length / AVERAGED];
        Arrays.setAll(means, few ->
                Arrays.stream(times, few * AVERAGED, (few + 1) * AVERAGED).sum() / AVERAGED);
        Arrays.sort(means);
        return means[means.length / 2];
    }

    private static double clockCost() {
        double[] costs = new double[16_384];
        for (int look = 0; look < costs.length; look++) {
            long start = System.nanoTime();
            costs[look] = System.nanoTime() - start;
        }
        return medianOfMeans(costs);
    }

    private void hop(long number, Lmax back, Check check) throws Exception {
        publish(number);
        while (check.seen <= number) {
            back.pollers.get(0).poll(check);
        }
    }

    private static String latency(int hops) throws Exception {
        int warmUp = 1000;
        Lmax there = new Lmax(true, 1, false);
        Lmax back = new Lmax(true, 1, false);
        Thread echo = start(() -> {
            Check check = new Check(1);
            for (long number = 0; number < warmUp + hops; number++) {
                while (check.seen <= number) {
                    there.pollers.get(0).poll(check);
                }
                back.publish(number);
            }
        });
        Check check = new Check(1);
        double clock = clockCost();
        double[] latencies = new double[hops];
        for (int number = 0; number < warmUp; number++) {
            there.hop(number, back, check);
        }
        for (int hop = 0; hop < hops; hop++) {
            long start = System.nanoTime();
            there.hop(warmUp + hop, back, check);
            latencies[hop] = (System.nanoTime() - start - clock) / 2.0;
        }
        echo.join();
        double median = medianOfMeans(latencies);
        Arrays.sort(latencies);
        return median
                + " " + latencies[(int) ((hops - 1) * 0.99)]
                + " " + latencies[(int) ((hops - 1) * 0.999)];
    }

    private static double stream(int producers, int readers, long count) throws Exception {
        boolean crowded = producers + readers > 2;
        Lmax lmax = new Lmax(producers == 1, readers, crowded);
        long each = count / producers;
        CyclicBarrier start = new CyclicBarrier(producers + readers);
        long[] begun = new long[producers];
        long[] ended = new long[readers];
        List<Thread> threads = new ArrayList<>();
        for (int number = 0; number < producers; number++) {
            int producer = number;
            threads.add(start(() -> {
                start.await();
                begun[producer] = System.nanoTime();
                for (long event = 0; event < each; event++) {
                    lmax.publish(((long) producer << PRODUCER_SHIFT) | event);
                }
            }));
        }
        for (int number = 0; number < readers; number++) {
            int reader = number;
            threads.add(start(() -> {
                Check check = new Check(producers);
                EventPoller<Trade> poller = lmax.pollers.get(reader);
                start.await();
                while (check.seen < producers * each) {
                    if (poller.poll(check) != EventPoller.PollState.PROCESSING && crowded) {
                        Thread.yield();
                    }
                }
                ended[reader] = System.nanoTime();
            }));
        }
        for (Thread thread : threads) {
            thread.join();
        }
        double spent = Arrays.stream(ended).max().getAsLong() - Arrays.stream(begun).min().getAsLong();
        return spent / (producers * each);
    }

    private interface Work {
        void run() throws Exception;
    }

    private static Thread start(Work work) {
        Thread thread = new Thread(() -> {
            try {
                work.run();
            } catch (Throwable failure) {
                failure.printStackTrace();
                Runtime.getRuntime().halt(1);
            }
        });
        thread.start();
        return thread;
    }

    private static String answer(String[] request) throws Exception {
        switch (request[0]) {
            case "publish":
                return "" + publishing(request[1].equals("single"), Integer.parseInt(request[2]));
            case "latency":
                return latency(Integer.parseInt(request[1]));
            case "stream":
                return "" + stream(
                        Integer.parseInt(request[1]),
                        Integer.parseInt(request[2]),
                        Long.parseLong(request[3]));
            default:
                throw new IllegalArgumentException(request[0]);
        }
    }

    public static void main(String[] arguments) throws Exception {
        // The compiler has seen everything before the first figure.
        for (int round = 0; round < WARM_UPS; round++) {
            for (int readers : new int[] {1, 4}) {
                publishing(true, readers);
                publishing(false, readers);
            }
            latency(10_000);
        }
        System.out.println(
                "ready: LMAX Disruptor " + arguments[0] + " on Java " + System.getProperty("java.version"));
        BufferedReader requests = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = requests.readLine()) != null; ) {
            System.out.println(answer(line.trim().split(" ")));
        }
    }
}
