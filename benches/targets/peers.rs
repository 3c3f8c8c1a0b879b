//! Peers whose types cannot be named.

/// Runs `$body` with the producer of a disruptor and so many pollers.
macro_rules! with_disruptor {
    ($build:ident, $readers:expr, |$producer:pat_param, $pollers:pat_param| $body:expr) => {{
        let builder = disruptor::$build(
            $crate::harness::CAPACITY,
            $crate::harness::Trade::default,
            disruptor::BusySpin,
        );
        if $readers == 1 {
            let (poller, builder) = builder.new_event_poller();
            let ($producer, $pollers) = (builder.build(), vec![poller]);
            $body
        } else {
            let (mut builder, mut pollers) = (builder.with_multi_consumer(), Vec::new());
            for _ in 0..$readers {
                let (poller, rest) = builder.new_event_poller();
                pollers.push(poller);
                builder = rest;
            }
            let ($producer, $pollers) = (builder.build(), pollers);
            $body
        }
    }};
}

pub(crate) use with_disruptor;
