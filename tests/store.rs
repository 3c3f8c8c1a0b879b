//! The event log in a real folder: what is appended is read again, what was acknowledged is there
//! after whatever ended the writer, and who may not have it is told why.
#![cfg(all(feature = "store", unix))]

use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tickbus::{
    Durability, Event, EventBus, EventStore, EventSystem, EventSystemConfig, EventType, Found, Gap,
    LockFreeEventBus, NewRecords, Object, Policy, Priority, Query, Records, Retention,
    RingEventBus, SourceId, StoreConfig, StoreError, StoreReader, SubscribeOptions, Symbol,
    SystemSubscribeOptions,
};

fn folder() -> TempDir {
    tempfile::tempdir().expect("there is a folder for temporary files")
}

fn config(durability: Durability) -> StoreConfig {
    let mut config = StoreConfig::default();
    config.durability = durability;
    config.segment_bytes = 64 << 10;
    config
}

fn open(folder: &Path) -> EventStore {
    EventStore::open(folder, config(Durability::Group)).expect("it opens").0
}

/// Ends a log, so that it may be opened again.
fn close(store: EventStore) {
    store.close().expect("it is durable");
}

/// Returns the folder of a log that was written and closed.
fn closed_log(write: impl FnOnce(&EventStore)) -> TempDir {
    let folder = folder();
    let store = open(folder.path());
    write(&store);
    close(store);
    folder
}

/// Changes what is in a file.
fn change(path: &Path, by: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).expect("it is there");
    by(&mut bytes);
    std::fs::write(path, bytes).expect("it is written");
}

fn event(number: u64) -> Event {
    Event {
        timestamp: number,
        event_type: EventType::PriceUpdate,
        priority: Priority::Normal,
        source_id: SourceId::new("binance").expect("it is a name"),
        symbol: Symbol::new("BTCUSDT").expect("it is a name"),
        value: number as f64,
        metadata: !number,
    }
}

fn events(count: u64) -> Vec<Event> {
    (0..count).map(event).collect()
}

/// A record, as it is compared.
#[derive(Debug, Clone, PartialEq)]
enum Record {
    Event(Event),
    Object(u64, Option<String>, String, u32, Vec<u8>, bool),
    Gap(Gap),
}

/// Reads all that there is, and checks that sequences have no gaps.
fn read(reader: &mut StoreReader) -> Vec<Record> {
    let mut records = Vec::new();
    let mut next = reader.sequence();
    while let Some(batch) = reader.next_batch().expect("it is what was written") {
        assert_eq!(batch.sequence, next);
        next += batch.len();
        match batch.records {
            Records::Events(events) => records.extend(events.iter().copied().map(Record::Event)),
            Records::Objects(objects) => records.extend(objects.iter().map(|object| {
                let topic = object.topic.map(str::to_owned);
                let (schema, bytes) = (object.schema.to_owned(), object.bytes.to_vec());
                let (version, is_replayed) = (object.version, object.is_replayed);
                Record::Object(object.timestamp, topic, schema, version, bytes, is_replayed)
            })),
            Records::Gap(gap) => records.push(Record::Gap(gap)),
            _ => unreachable!("there are no others"),
        }
    }
    assert_eq!(reader.sequence(), next);
    records
}

fn fill(topic: &str, bytes: &[u8]) -> Record {
    Record::Object(7, Some(topic.to_owned()), "Fill".to_owned(), 2, bytes.to_vec(), true)
}

fn append_fill(store: &EventStore, topic: &str, bytes: &[u8]) -> u64 {
    let topic = Some(topic);
    let object =
        Object { timestamp: 7, topic, schema: "Fill", version: 2, bytes, is_replayed: true };
    store.append_object(&object).expect("there is room")
}

#[test]
fn events_objects_and_gaps_are_read_in_the_order_in_which_they_were_appended() {
    let folder = folder();
    let store = open(folder.path());
    assert_eq!(store.append(&events(3)).expect("there is room"), 0);
    assert_eq!(append_fill(&store, "fills.BTCUSDT", b"one"), 3);
    assert_eq!(append_fill(&store, "fills.ETHUSDT", b""), 4);
    assert_eq!(store.append_gap(9, false).expect("there is room"), 5);
    assert_eq!(store.append(&events(5_000)).expect("there is room"), 6);
    let mut expected: Vec<_> = events(3).into_iter().map(Record::Event).collect();
    expected.extend([fill("fills.BTCUSDT", b"one"), fill("fills.ETHUSDT", b"")]);
    expected.push(Record::Gap(Gap { missed: 9, is_exact: false }));
    expected.extend(events(5_000).into_iter().map(Record::Event));
    assert_eq!(read(&mut store.read(0)), expected);
    assert!(store.stats().segments > 1, "it was more than a segment");
    // The same from the middle, and by those that open it later.
    for from in [1, 4, 2_500] {
        assert_eq!(read(&mut store.read(from)), expected[from as usize..]);
    }
    store.close().expect("it is durable");
    let mut reader = EventStore::read_only(folder.path(), 0).expect("it is sound");
    assert_eq!(read(&mut reader), expected);
    let (again, recovery) =
        EventStore::open(folder.path(), config(Durability::Group)).expect("it is sound");
    assert_eq!((recovery.next_sequence, recovery.cut_bytes), (5_006, 0));
    assert_eq!(recovery.scanned_bytes, 0, "a log that was closed is not read");
    assert_eq!(again.append(&events(1)).expect("there is room"), 5_006);
    assert_eq!(read(&mut again.read(5_005)).len(), 2);
}

#[test]
fn a_reader_reads_on_when_more_was_appended() {
    let folder = folder();
    let store = open(folder.path());
    let mut reader = store.read(0);
    assert!(read(&mut reader).is_empty());
    for round in 1..=300 {
        store.append(&events(round % 40 + 1)).expect("there is room");
        assert_eq!(read(&mut reader).len() as u64, round % 40 + 1);
    }
}

#[test]
fn each_durability_acknowledges_what_another_process_finds_durable() {
    let durabilities = [
        Durability::None,
        Durability::Interval(Duration::from_millis(2)),
        Durability::Group,
        Durability::Always,
        Durability::Double,
    ];
    for durability in durabilities {
        let folder = folder();
        let (store, _) = EventStore::open(folder.path(), config(durability)).expect("it opens");
        let ticket = store.append_durable(&events(10)).expect("there is room");
        assert_eq!(ticket.wait().expect("it is durable"), 9);
        assert_eq!(store.durable_sequence(), Some(9), "{durability:?}");
        store.append(&events(1)).expect("there is room");
        if matches!(durability, Durability::Always | Durability::Double) {
            assert_eq!(store.durable_sequence(), Some(10), "{durability:?}");
        }
        store.sync().expect("it is durable");
        let mut reader = EventStore::read_only(folder.path(), 0).expect("it is sound");
        assert_eq!(read(&mut reader).len(), 11, "{durability:?}");
    }
}

#[test]
fn what_nobody_waits_for_becomes_durable_by_itself() {
    for durability in [Durability::Group, Durability::Interval(Duration::from_millis(2))] {
        let folder = folder();
        let (store, _) = EventStore::open(folder.path(), config(durability)).expect("it opens");
        for round in 0..20 {
            store.append(&events(1)).expect("there is room");
            while store.durable_sequence() < Some(round) {
                std::thread::yield_now();
            }
        }
    }
}

#[test]
fn threads_that_wait_at_once_are_all_served_and_none_before_its_turn() {
    let folder = folder();
    let store = Arc::new(open(folder.path()));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let ticket = store.append_durable(&events(3)).expect("there is room");
                    let last = ticket.wait().expect("it is durable");
                    assert!(store.durable_sequence() >= Some(last));
                }
            });
        }
    });
    assert_eq!(read(&mut store.read(0)).len(), 8 * 50 * 3);
}

#[tokio::test]
async fn tasks_wait_without_blocking_their_thread() {
    let folder = folder();
    let store = open(folder.path());
    let wait = |number| {
        let ticket = store.append_durable(&events(1)).expect("there is room");
        async move { assert_eq!(ticket.wait_async().await.expect("it is durable"), number) }
    };
    tokio::join!(wait(0), wait(1), wait(2), wait(3));
    store.close().expect("it is durable");
    assert!(matches!(store.append(&events(1)), Err(StoreError::Closed)));
}

#[test]
fn a_log_has_one_writer_and_says_who() {
    let folder = folder();
    let store = open(folder.path());
    let second = EventStore::open(folder.path(), StoreConfig::default());
    let Err(error @ StoreError::AlreadyOpen { .. }) = second else { panic!("it opened twice") };
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    close(store);
    open(folder.path());
}

#[test]
fn a_writer_that_was_dropped_has_lost_nothing_it_appended() {
    let folder = folder();
    let store = open(folder.path());
    store.append(&events(2_000)).expect("there is room");
    drop(store);
    let mut reader = EventStore::read_only(folder.path(), 0).expect("it is sound");
    assert_eq!(read(&mut reader).len(), 2_000);
}

#[test]
fn damage_to_what_was_acknowledged_is_an_error_with_its_place_and_a_torn_tail_is_not() {
    let folder = closed_log(|store| {
        for _ in 0..2 {
            let ticket = store.append_durable(&events(300)).expect("there is room");
            ticket.wait().expect("it is durable");
        }
    });
    let path = folder.path().join(format!("{:020}.elog", 0));
    let whole = std::fs::read(&path).expect("it is there");
    let verified = EventStore::verify(folder.path()).expect("it is sound");
    assert_eq!((verified.next_sequence, verified.torn_bytes), (600, 0));
    change(&path, |bytes| bytes[5_000] ^= 4);
    let error = EventStore::verify(folder.path()).expect_err("a bit is wrong");
    let StoreError::Corrupt { segment, offset, sequence: 0, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(segment, &format!("{:020}.elog", 0));
    assert!((4096..5_000).contains(offset), "{error}");
    let mut reader = EventStore::read_only(folder.path(), 0).expect("its end is sound");
    assert!(matches!(reader.next_batch(), Err(StoreError::Corrupt { .. })));
    // Without its last part it was never acknowledged as far as it says itself.
    std::fs::write(&path, &whole[..4096 + 300 * 32]).expect("it is written");
    let (store, recovery) =
        EventStore::open(folder.path(), config(Durability::Group)).expect("its tail is torn");
    assert!(recovery.cut_bytes > 0 && recovery.cut_records == 300, "{recovery:?}");
    assert_eq!(store.append(&events(1)).expect("there is room"), 0);
}

#[test]
fn a_log_that_is_full_refuses_and_goes_on_once_it_was_opened_with_room() {
    let folder = folder();
    let mut small = config(Durability::Group);
    small.max_bytes = Some(2 * small.segment_bytes);
    let (store, _) = EventStore::open(folder.path(), small).expect("it opens");
    let error = loop {
        if let Err(error) = store.append(&events(256)) {
            break error;
        }
    };
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    let kept = store.stats().next_sequence;
    close(store);
    let store = open(folder.path());
    assert_eq!(store.append(&events(1)).expect("there is room"), kept);
}

#[test]
fn of_a_batch_for_which_there_is_not_enough_room_all_or_nothing_is_taken() {
    let folder = folder();
    let mut small = config(Durability::Group);
    small.max_bytes = Some(4 * small.segment_bytes);
    let (store, _) = EventStore::open(folder.path(), small).expect("it opens");
    let batch = events(5_000);
    let mut taken = 0;
    loop {
        match store.append(&batch) {
            Ok(first) => assert_eq!(first, std::mem::replace(&mut taken, first + 5_000)),
            Err(error) => break assert!(matches!(error, StoreError::Full { .. }), "{error}"),
        }
    }
    assert_eq!(store.stats().next_sequence, taken);
    assert!(store.stats().bytes <= 4 * small.segment_bytes);
    store.sync().expect("what was taken has room");
    assert_eq!(store.durable_sequence(), Some(taken - 1));
}

/// Returns the bytes of all segments in a folder.
fn segment_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).expect("it is there").map(|file| file.expect("a file"));
    let is_segment = |name: &str| name.contains(".elog");
    let segments = files.filter(|file| file.file_name().to_str().is_some_and(is_segment));
    segments.map(|file| file.metadata().expect("it is there").len()).sum()
}

#[test]
fn a_log_that_is_opened_again_knows_how_large_it_is() {
    let folder = folder();
    let store = open(folder.path());
    (0..100).for_each(|_| _ = store.append(&events(100)).expect("there is room"));
    store.compress(Duration::ZERO).expect("there is room");
    (0..100).for_each(|_| _ = store.append(&events(100)).expect("there is room"));
    store.close().expect("it is durable");
    let written = segment_bytes(folder.path());
    let store = open(folder.path());
    assert_eq!(store.stats().bytes, written);
    store.close().expect("it is durable");

    let mut small = config(Durability::Group);
    small.max_bytes = Some(written + small.segment_bytes * 3 / 2);
    let (store, _) = EventStore::open(folder.path(), small).expect("it opens");
    let refused = (0..100).find_map(|_| store.append(&events(100)).err());
    assert!(matches!(refused, Some(StoreError::Full { .. })), "{refused:?}");
    store.close().expect("it is durable");
    let grown = segment_bytes(folder.path()) - written;
    assert!((1..=small.segment_bytes).contains(&grown), "one segment had room, not {grown} bytes");
}

/// The log in tests/golden/1.0: two segments of one process, one of another with other numbers, which
/// ends with half a frame.
fn golden() -> Vec<Record> {
    let golden = |number: u64, symbol: &str, source: &str, event_type| Event {
        timestamp: 1_700_000_000_000_000_000 + number,
        event_type,
        symbol: Symbol::new(symbol).expect("it is a name"),
        source_id: SourceId::new(source).expect("it is a name"),
        priority: Priority::High,
        value: 0.5 * number as f64,
        metadata: number,
    };
    let basis = EventType::register("basis", 17).expect("the code is free");
    let mut records = Vec::new();
    for number in 0..2_000 {
        let symbol = ["BTCUSDT", "ETHUSDT", "SOLUSDT"][number as usize % 3];
        let event_type = if number % 2 == 0 { EventType::PriceUpdate } else { basis };
        records.push(Record::Event(golden(number, symbol, "binance", event_type)));
    }
    records.push(fill("fills.BTCUSDT", b"\x81\xa5price\xcd\x03\xe8"));
    records.push(Record::Gap(Gap { missed: 12, is_exact: true }));
    for number in 2_002..2_010 {
        records.push(Record::Event(golden(number, "SOLUSDT", "kraken", EventType::EmergencyStop)));
    }
    records
}

#[test]
fn the_log_of_format_1_0_is_read_and_recovered_as_it_was_written() {
    let golden_folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1.0");
    let verified = EventStore::verify(&golden_folder).expect("it is sound");
    assert_eq!((verified.segments, verified.next_sequence), (3, 2_010));
    let mut reader = EventStore::read_only(&golden_folder, 0).expect("it is sound");
    assert_eq!(read(&mut reader), golden());
    let folder = folder();
    for file in std::fs::read_dir(&golden_folder).expect("it is there") {
        let file = file.expect("it is there");
        std::fs::copy(file.path(), folder.path().join(file.file_name())).expect("there is room");
    }
    let (store, recovery) =
        EventStore::open(folder.path(), config(Durability::Group)).expect("its tail is torn");
    assert_eq!((recovery.segments, recovery.next_sequence), (3, 2_010));
    assert_eq!((recovery.cut_bytes, recovery.cut_records), (60, 1));
    assert_eq!(store.append(&events(1)).expect("there is room"), 2_010);
    assert_eq!(read(&mut store.read(0))[..2_010], golden());
}

#[test]
fn the_indexes_of_format_1_0_are_what_is_made_of_its_segments() {
    let golden_folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = folder();
    for name in ["00000000000000000000.elog", "00000000000000001600.elog"] {
        let segment = golden_folder.join("1.0").join(name);
        std::fs::copy(segment, folder.path().join(name)).expect("there is room");
    }
    let store = open(folder.path());
    let found = |store: &EventStore| {
        let mut found = store.query(&Query::default()).expect("it is sound");
        let mut records = 0;
        while let Some(found) = found.next_found().expect("it is sound") {
            records += match found {
                Found::Events(sequences, _) => sequences.len(),
                Found::Objects(objects) => objects.len(),
                _ => unreachable!("there are no others"),
            };
        }
        records
    };
    assert_eq!(found(&store), 2_001, "all but the gap");
    store.close().expect("it is durable");
    let indexes = std::fs::read_dir(golden_folder.join("1.0-index")).expect("it is there");
    for index in indexes.map(|index| index.expect("it is there")) {
        let made = folder.path().join(index.file_name());
        let golden = std::fs::read(index.path()).expect("it is there");
        assert_eq!(std::fs::read(made).expect("it was made"), golden, "{:?}", index.file_name());
    }
    let verified = EventStore::verify(folder.path()).expect("it is sound");
    assert_eq!((verified.indexes, verified.wrong_indexes), (2, 0));
    let reports = EventStore::inspect(folder.path()).expect("it is sound");
    assert!(reports.iter().all(|report| report.index_bytes > 0), "{reports:?}");
    assert_eq!(found(&open(folder.path())), 2_001);
}

#[test]
fn the_compressed_log_of_format_1_0_is_read_as_the_one_it_was_made_of() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/1.0-compressed");
    let verified = EventStore::verify(&folder).expect("it is sound");
    assert_eq!((verified.oldest_sequence, verified.next_sequence), (1_600, 2_010));
    let mut reader = EventStore::read_only(&folder, 0).expect("it is sound");
    let records = read(&mut reader);
    assert_eq!(records[0], Record::Gap(Gap { missed: 1_600, is_exact: true }));
    assert_eq!(records[1..], golden()[1_600..]);
}

#[test]
fn an_attached_store_has_what_was_published_in_the_order_of_its_bus_and_a_gap_where_it_missed_some()
{
    let folder = folder();
    let store = Arc::new(open(folder.path()));
    let bus = RingEventBus::<Event>::new(1024).expect("the capacity is good");
    let attach = |options| {
        let subscription = bus.subscribe_with(options).expect("the options are good");
        store.attach(subscription, |error| panic!("{error}")).expect("there are threads")
    };
    let attachment = attach(SubscribeOptions { policy: Some(Policy::Block), ..Default::default() });
    for number in 0..20_000 {
        assert_eq!(bus.publish(event(number)), Ok(1));
    }
    attachment.detach();
    assert_eq!((attachment.stored(), attachment.missed()), (20_000, 0));
    let all: Vec<_> = events(20_000).into_iter().map(Record::Event).collect();
    assert_eq!(read(&mut store.read(0)), all);
    // One that may be overtaken: whatever it misses is in the log as a number, where it is missing.
    let attachment =
        attach(SubscribeOptions { policy: Some(Policy::DropOldest), ..Default::default() });
    for number in 0..200_000 {
        assert_eq!(bus.publish(event(number)), Ok(1));
    }
    attachment.detach();
    assert_eq!(attachment.stored() + attachment.missed(), 200_000);
    let mut next = 0;
    for record in read(&mut store.read(20_000)) {
        match record {
            Record::Event(event) => {
                assert_eq!(event.timestamp, next);
                next += 1;
            }
            Record::Gap(gap) => next += gap.missed,
            Record::Object(..) => panic!("nobody stored an object"),
        }
    }
    assert_eq!(next, 200_000);
}

#[test]
fn closing_a_store_stores_what_attached_lanes_still_hold() {
    let folder = folder();
    let store = Arc::new(open(folder.path()));
    let system = EventSystem::new(EventSystemConfig::default()).expect("the capacities are good");
    let subscription = system.subscribe(SystemSubscribeOptions::default()).expect("it is named");
    let attachment =
        store.attach(subscription, |error| panic!("{error}")).expect("there are threads");
    let critical = Event { event_type: EventType::EmergencyStop, ..event(1) };
    for _ in 0..50 {
        assert_eq!(system.publish(critical).ok(), Some(1));
        assert_eq!(system.publish(event(2)).ok(), Some(1));
    }
    store.close().expect("it is durable");
    assert_eq!((attachment.stored(), attachment.missed()), (100, 0));
    assert_eq!(system.publish(event(3)).ok(), Some(0), "nobody waits for a store that has gone");
}

#[test]
fn a_store_without_room_detaches_itself_and_no_publisher_waits_for_it() {
    let folder = folder();
    let mut small = config(Durability::Group);
    small.max_bytes = Some(2 * small.segment_bytes);
    let (store, _) = EventStore::open(folder.path(), small).expect("it opens");
    let store = Arc::new(store);
    let bus = RingEventBus::<Event>::new(64).expect("the capacity is good");
    let options = SubscribeOptions { policy: Some(Policy::Block), ..Default::default() };
    let subscription = bus.subscribe_with(options).expect("the options are good");
    let (tell, told) = std::sync::mpsc::channel();
    let attachment = store
        .attach(subscription, move |error| tell.send(error.to_string()).expect("it is awaited"))
        .expect("there are threads");
    let mut number = 0;
    while bus.publish(event(number)) == Ok(1) {
        number += 1;
    }
    assert_eq!(bus.publish(event(number)), Ok(0));
    assert!(told.recv().expect("it is told").contains("no room"));
    attachment.wait();
    assert!(matches!(attachment.failure(), Some(StoreError::Full { .. })));
    assert_eq!(store.stats().detached, 1);
    // What it had taken is not in the log, and no gap for it.
    assert!((1..=number - attachment.stored()).contains(&attachment.missed()));
    assert_eq!(store.stats().missed, attachment.missed());
}

#[test]
fn what_was_missed_behind_the_last_event_is_a_gap_when_a_store_is_detached() {
    let folder = folder();
    let store = open(folder.path());
    let options = SubscribeOptions { policy: Some(Policy::DropNewest), ..Default::default() };
    for round in 1..=50 {
        let bus = LockFreeEventBus::<Event>::new(4).expect("the capacity is good");
        let subscription = bus.subscribe_with(options.clone()).expect("the options are good");
        (0..6).for_each(|number| _ = bus.publish(event(number)));
        let attachment =
            store.attach(subscription, |error| panic!("{error}")).expect("there are threads");
        attachment.detach();
        assert_eq!((attachment.stored(), attachment.missed()), (4, 2));
        assert_eq!(store.stats().next_sequence, 5 * round);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_query_finds_what_reading_everything_would_find(
        records in prop::collection::vec((0..1_000_u64, 0..3_u8, 0..4_usize, 0..12_u8), 1..6_000),
        times in (0..1_000_u64, 0..1_100_u64),
        types in prop::collection::vec(0..3_u8, 0..3),
        symbols in prop::collection::vec(0..4_usize, 0..3),
        appended_later in 0..2_000_usize,
    ) {
        let folder = folder();
        let store = open(folder.path());
        let names = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT"];
        let names = names.map(|name| Symbol::new(name).expect("it is a name"));
        let mut all = Vec::new();
        let mut append = |(timestamp, code, symbol, kind): (u64, u8, usize, u8)| {
            if kind == 0 {
                let object = Object {
                    timestamp,
                    topic: None,
                    schema: "Fill",
                    version: 1,
                    bytes: &[code],
                    is_replayed: false,
                };
                store.append_object(&object).expect("there is room");
                all.push((timestamp, None));
            } else {
                let symbol = names[symbol];
                let event = Event { timestamp, event_type: EventType(code), symbol, ..event(0) };
                store.append(&[event]).expect("there is room");
                all.push((timestamp, Some(event)));
            }
        };
        let query = Query {
            times: times.0..times.1,
            types: types.iter().map(|code| EventType(*code)).collect(),
            symbols: symbols.iter().map(|symbol| names[*symbol]).collect(),
        };
        let find = |mut found: tickbus::StoreQuery| {
            let mut sequences = Vec::new();
            while let Some(found) = found.next_found().expect("it is what was written") {
                match found {
                    Found::Events(numbers, events) => {
                        assert_eq!(numbers.len(), events.len());
                        sequences.extend(numbers.iter().copied().zip(events.iter().copied().map(Some)));
                    }
                    Found::Objects(objects) => {
                        sequences.extend(objects.iter().map(|(number, _)| (*number, None)));
                    }
                    _ => unreachable!("there are no others"),
                }
            }
            sequences
        };
        let later = records.len().saturating_sub(appended_later);
        records[..later].iter().copied().for_each(&mut append);
        // An index that is made now is to go on with what comes later.
        find(store.query(&query).expect("it is sound"));
        records[later..].iter().copied().for_each(&mut append);
        let is_wanted = |timestamp: &u64, event: &Option<Event>| {
            let fits = |event: &Event| {
                (query.types.is_empty() || query.types.contains(&event.event_type))
                    && (query.symbols.is_empty() || query.symbols.contains(&event.symbol))
            };
            let is_object_wanted = query.types.is_empty() && query.symbols.is_empty();
            query.times.contains(timestamp) && event.as_ref().map_or(is_object_wanted, fits)
        };
        let expected: Vec<_> = (0..)
            .zip(&all)
            .filter(|(_, (timestamp, event))| is_wanted(timestamp, event))
            .map(|(sequence, (_, event))| (sequence, *event))
            .collect();
        prop_assert_eq!(find(store.query(&query).expect("it is sound")), expected.clone());
        store.close().expect("it is durable");
        let found = EventStore::query_only(folder.path(), &query).expect("it is sound");
        prop_assert_eq!(find(found), expected);
    }
}

#[test]
fn a_reader_that_waits_at_the_end_learns_new_names() {
    let folder = folder();
    let store = open(folder.path());
    let mut reader = store.read(0);
    for name in ["FIRST", "SECOND", "THIRD"] {
        let named = Event { symbol: Symbol::new(name).expect("it is a name"), ..event(0) };
        store.append(&[named]).expect("there is room");
        append_fill(&store, name, b"x");
        assert_eq!(read(&mut reader), [Record::Event(named), fill(name, b"x")]);
    }
}

#[test]
fn what_a_full_log_refuses_is_not_stored_later() {
    let folder = folder();
    let mut small = config(Durability::Always);
    small.max_bytes = Some(2 * small.segment_bytes);
    let (store, _) = EventStore::open(folder.path(), small).expect("it opens");
    let mut taken = 0;
    for _ in 0..200 {
        match store.append(&events(100)) {
            Ok(first) => assert_eq!(first, std::mem::replace(&mut taken, first + 100)),
            Err(error) => assert!(matches!(error, StoreError::Full { .. }), "{error}"),
        }
    }
    assert_eq!(store.stats().next_sequence, taken);
    assert_eq!(store.durable_sequence(), Some(taken - 1));
    store.close().expect("it is durable");
    let mut reader = EventStore::read_only(folder.path(), 0).expect("it is sound");
    assert_eq!(read(&mut reader).len() as u64, taken);
}

#[test]
fn a_segment_that_is_missing_is_damage_and_not_a_gap() {
    let folder = closed_log(|store| append_segments(store, 3));
    for missing in [0, 100] {
        let path = folder.path().join(format!("{missing:020}.elog"));
        let bytes = std::fs::read(&path).expect("it is there");
        std::fs::remove_file(&path).expect("it is there");
        let is_corrupt = |error: StoreError| matches!(error, StoreError::Corrupt { .. });
        assert!(EventStore::verify(folder.path()).is_err_and(is_corrupt), "{missing}");
        if missing == 100 {
            let mut reader = EventStore::read_only(folder.path(), 0).expect("its end is sound");
            assert!(reader.next_batch().expect("it is there").is_some());
            assert!(reader.next_batch().is_err_and(is_corrupt));
            let found = EventStore::query_only(folder.path(), &Query::default());
            assert!(found.expect("its end is sound").next_found().is_err_and(is_corrupt));
        }
        std::fs::write(&path, bytes).expect("it is written");
    }
}

#[test]
fn whoever_is_told_that_a_store_failed_can_close_it() {
    let folder = folder();
    let mut small = config(Durability::Group);
    small.max_bytes = Some(2 * small.segment_bytes);
    let (store, _) = EventStore::open(folder.path(), small).expect("it opens");
    let store = Arc::new(store);
    let bus = RingEventBus::<Event>::new(64).expect("the capacity is good");
    let options = SubscribeOptions { policy: Some(Policy::Block), ..Default::default() };
    let (tell, told) = std::sync::mpsc::channel();
    let told_store = store.clone();
    let on_failure = move |_: &StoreError| tell.send(told_store.close()).expect("it is awaited");
    let subscription = bus.subscribe_with(options).expect("the options are good");
    let attachment = store.attach(subscription, on_failure).expect("there are threads");
    let mut number = 0;
    while bus.publish(event(number)) == Ok(1) {
        number += 1;
    }
    told.recv().expect("it is told").expect("what was taken is durable");
    assert!(attachment.missed() > 0);
    assert_eq!(store.stats().durable_end, attachment.stored());
}

#[test]
fn a_log_that_syncs_nothing_by_itself_does_not_run_out_of_files() {
    let folder = folder();
    let (store, _) = EventStore::open(folder.path(), config(Durability::None)).expect("it opens");
    let open_files = || std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count());
    for _ in 0..50 {
        store.append(&events(2_000)).expect("there is room");
    }
    assert!(store.stats().segments > 20);
    // Its thread comes once a second.
    while open_files() > 20 {
        std::thread::yield_now();
    }
}

#[test]
fn settings_that_cannot_be_kept_are_refused_with_what_to_do() {
    let folder = folder();
    let refused = |change: fn(&mut StoreConfig)| {
        let mut config = StoreConfig::default();
        change(&mut config);
        match EventStore::open(folder.path(), config) {
            Err(StoreError::Config(error)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    };
    assert!(
        refused(|config| config.segment_bytes = 100).contains("was 100; it must be from 65536")
    );
    assert!(refused(|config| config.max_bytes = Some(1)).contains("at least two segments"));
    assert!(
        refused(|config| config.durability = Durability::Interval(Duration::ZERO))
            .contains("the interval was 0")
    );
    let store = open(folder.path());
    let (object, limit) = (vec![0; 1 << 20], (1 << 20) - 24);
    let object = Object {
        timestamp: 0,
        topic: None,
        schema: "Big",
        version: 1,
        bytes: &object,
        is_replayed: false,
    };
    let error = store.append_object(&object).expect_err("it is too large");
    assert!(matches!(error, StoreError::TooLarge { bytes: 1_048_576, limit: l } if l == limit));
    let object = Object { bytes: &object.bytes[..limit], ..object };
    assert_eq!(store.append_object(&object).expect("it fits"), 0);
    assert_eq!(read(&mut store.read(0)).len(), 1);
}

#[test]
fn many_records_are_appended_together_and_a_refusal_says_how_many_were_stored() {
    let folder = folder();
    let mut config = config(Durability::Group);
    config.max_bytes = Some(2 * config.segment_bytes);
    let (store, _) = EventStore::open(folder.path(), config).expect("it opens");
    let some = events(3);
    let object = Object {
        timestamp: 7,
        topic: Some("fills.BTCUSDT"),
        schema: "Fill",
        version: 2,
        bytes: b"one",
        is_replayed: true,
    };
    let gap = NewRecords::Gap(Gap { missed: 9, is_exact: false });
    let records = [NewRecords::Events(&some), NewRecords::Object(object), gap];
    assert_eq!(store.append_many(&records).expect("there is room"), 0..5);
    let ticket = store.append_many_durable(&records).expect("there is room");
    assert_eq!((ticket.wait().expect("it is durable"), ticket.is_durable()), (9, true));
    let many = events(1_000);
    let refused =
        store.append_many(&[NewRecords::Events(&many); 50]).expect_err("there is no room");
    assert!(matches!(refused.error, StoreError::Full { .. }), "{}", refused.error);
    assert!(refused.accepted > 0 && refused.accepted % 1_000 == 0, "{}", refused.accepted);
    assert_eq!(store.stats().next_sequence, 10 + refused.accepted);
    let mut stored: Vec<_> = some.iter().copied().map(Record::Event).collect();
    stored.push(fill("fills.BTCUSDT", b"one"));
    stored.push(Record::Gap(Gap { missed: 9, is_exact: false }));
    stored.extend_from_within(..);
    for _ in 0..refused.accepted / 1_000 {
        stored.extend(many.iter().copied().map(Record::Event));
    }
    assert_eq!(read(&mut store.read(0)), stored);
}

#[test]
fn an_object_whose_names_do_not_fit_is_refused() {
    let folder = folder();
    let store = open(folder.path());
    let fine = Object {
        timestamp: 0,
        topic: None,
        schema: "Fill",
        version: 1,
        bytes: b"",
        is_replayed: false,
    };
    let (topic, schema) = ("x".repeat(70_000), "y".repeat(70_000));
    let refused = [
        Object { topic: Some(&topic), ..fine },
        Object { topic: Some("a.*"), ..fine },
        Object { schema: &schema, ..fine },
        Object { schema: "", ..fine },
    ];
    for object in &refused {
        let error = store.append_object(object).expect_err("it has no room");
        assert!(matches!(error, StoreError::Config(_)), "{error}");
    }
    assert_eq!(store.append_object(&fine).expect("there is room"), 0);
}

#[test]
fn a_ticket_that_is_not_durable_in_time_may_be_waited_for_again() {
    let folder = folder();
    let (store, _) =
        EventStore::open(folder.path(), config(Durability::Interval(IDLE))).expect("it opens");
    let ticket = store.append_durable(&events(1)).expect("there is room");
    assert_eq!(ticket.wait_timeout(Duration::ZERO).expect("nothing fails"), None);
    assert_eq!(ticket.wait_timeout(IDLE).expect("nothing fails"), Some(0));
    store.close().expect("it is durable");
    assert_eq!(ticket.clone().wait_timeout(Duration::ZERO).expect("nothing fails"), Some(0));
}

/// Longer than any test takes.
const IDLE: Duration = Duration::from_secs(3_600);

#[test]
fn a_log_is_looked_at_while_it_is_written() {
    let folder = folder();
    let store = open(folder.path());
    store.append(&events(5_000)).expect("there is room");
    store.seal().expect("it is durable");
    let (recovery, stats) = EventStore::look(folder.path()).expect("it is sound");
    let mut written = store.stats();
    assert_eq!((recovery.next_sequence, recovery.segments), (5_000, written.segments));
    // What the writer does is not in the log.
    (written.syncs, written.sync_time) = (0, Duration::ZERO);
    assert_eq!(stats, written);
}

/// Returns where the first bytes of a segment's file are that were written, from an offset on.
#[cfg(target_os = "linux")]
fn written_from(folder: &Path, segment: u64, offset: u64) -> Option<u64> {
    use rustix::fs::{SeekFrom, seek};
    let file = std::fs::File::open(folder.join(format!("{segment:020}.elog"))).expect("a segment");
    seek(file, SeekFrom::Data(offset)).ok()
}

#[test]
#[cfg(target_os = "linux")]
fn blocks_are_written_ahead_of_syncs_that_follow_one_another() {
    let folder = folder();
    let store = EventStore::open(folder.path(), StoreConfig::default()).expect("it opens").0;
    const BEHIND: u64 = 64 << 10;
    for (commits, is_written) in [(1, false), (2, true)] {
        let ticket = store.append_durable(&events(1)).expect("there is room");
        ticket.wait().expect("it is durable");
        // Some file systems write all that they reserve.
        let written = written_from(folder.path(), 0, BEHIND).is_some();
        assert!(written || !is_written, "nothing is written ahead of commit {commits}");
    }
    store.close().expect("it is durable");
    let bytes = folder.path().join(format!("{:020}.elog", 0)).metadata().expect("a file").len();
    assert!(bytes < BEHIND, "what was written ahead stays: {bytes} bytes");
}

#[test]
#[cfg(unix)]
fn of_the_files_that_are_retired_the_one_that_was_written_most_is_used_again() {
    use std::os::unix::fs::MetadataExt;
    let folder = folder();
    let store = EventStore::open(folder.path(), StoreConfig::default()).expect("it opens").0;
    for count in [10, 5_000, 20] {
        store.append(&events(count)).expect("there is room");
        store.seal().expect("it is durable");
    }
    let inode = |segment: u64| {
        let file = folder.path().join(format!("{segment:020}.elog"));
        file.metadata().expect("a segment").ino()
    };
    let fullest = inode(10);
    store.append(&events(1)).expect("there is room");
    store.sync().expect("it is durable");
    let nothing = Retention { records: Some(0), ..Retention::default() };
    assert_eq!(store.retain(&nothing).expect("nothing fails").segments, 3);
    store.seal().expect("it is durable");
    store.append(&events(1)).expect("there is room");
    store.sync().expect("it is durable");
    assert_eq!(inode(5_031), fullest);
    store.close().expect("it is durable");
}

#[test]
fn a_file_that_is_longer_than_segments_are_now_is_not_used_again() {
    let folder = folder();
    let store = EventStore::open(folder.path(), StoreConfig::default()).expect("it opens").0;
    store.append(&events(5_000)).expect("there is room");
    store.close().expect("it is durable");
    let mut config = StoreConfig::default();
    (config.segment_bytes, config.max_bytes) = (64 << 10, Some(256 << 10));
    let store = EventStore::open(folder.path(), config).expect("it opens").0;
    store.append(&events(1)).expect("there is room");
    store.sync().expect("it is durable");
    let nothing = Retention { records: Some(0), ..Retention::default() };
    assert_eq!(store.retain(&nothing).expect("nothing fails").segments, 1);
    assert!(!folder.path().join("segment.spare").exists());
    store.close().expect("it is durable");
}

/// Returns a bus whose store lets events gather.
fn wide_bus() -> RingEventBus<Event> {
    RingEventBus::new(1 << 16).expect("the capacity is good")
}

#[test]
fn whoever_detaches_a_store_that_lets_events_gather_loses_none_of_them() {
    let folder = folder();
    let store = open(folder.path());
    let bus = wide_bus();
    for published in 1..=50 {
        let attachment = store
            .attach(bus.subscribe(1 << 16).expect("it is open"), |error| panic!("{error}"))
            .expect("there are threads");
        for event in events(published) {
            bus.publish(event).expect("it is open");
            std::thread::yield_now();
        }
        attachment.detach();
        assert_eq!((attachment.stored(), attachment.missed()), (published, 0));
    }
    store.close().expect("it is durable");
}

/// Appends so many segments of 100 events each, which are durable.
fn append_segments(store: &EventStore, count: u64) {
    for _ in 0..count {
        store.append(&events(100)).expect("there is room");
        store.seal().expect("it is durable");
    }
}

fn retained(bytes: Option<u64>, records: Option<u64>, age: Option<Duration>) -> Retention {
    Retention { bytes, records, age }
}

#[test]
fn retaining_keeps_what_it_promises_and_readers_behind_it_are_told_what_is_gone() {
    let folder = folder();
    let store = open(folder.path());
    append_segments(&store, 10);
    let mut behind = store.read(0);
    assert!(behind.next_batch().expect("it is there").is_some());
    assert_eq!(store.retain(&Retention::default()).expect("it can").segments, 0);
    let an_hour = Some(Duration::from_secs(3_600));
    assert_eq!(store.retain(&retained(None, None, an_hour)).expect("it can").segments, 0);
    let retired = store.retain(&retained(None, Some(750), None)).expect("it can");
    assert_eq!((retired.segments, retired.records), (2, 200), "750 records are kept, and 800 are");
    let bytes = store.stats().bytes;
    let retired = store.retain(&retained(Some(bytes / 2), None, None)).expect("it can");
    assert_eq!((retired.segments, retired.records), (4, 400));
    assert_eq!(store.stats().oldest_sequence, 600);
    assert!(store.stats().bytes >= bytes / 2);

    assert_eq!(read(&mut store.read(750)).len(), 250);
    let missing = Record::Gap(Gap { missed: 600, is_exact: true });
    assert_eq!(read(&mut store.read(0))[0], missing);
    assert_eq!(read(&mut behind)[0], Record::Gap(Gap { missed: 500, is_exact: true }));

    let retired = store.retain(&retained(None, None, Some(Duration::ZERO))).expect("it can");
    assert_eq!(retired.records, 300, "the last segment stays, however old it is");
    close(store);
    let (store, recovery) =
        EventStore::open(folder.path(), config(Durability::Group)).expect("it is sound");
    assert_eq!((recovery.oldest_sequence, recovery.next_sequence), (900, 1_000));
    assert_eq!(store.append(&events(1)).expect("there is room"), 1_000);
    store.sync().expect("it is durable");
    assert_eq!(EventStore::verify(folder.path()).expect("it is sound").oldest_sequence, 900);
}

#[test]
fn what_somebody_holds_is_not_retired() {
    let folder = folder();
    let store = open(folder.path());
    append_segments(&store, 4);
    let all = retained(None, Some(0), None);
    let (slow, fast) = (store.hold(150), store.hold(399));
    assert_eq!(store.retain(&all).expect("it can").segments, 1);
    assert_eq!(store.stats().held_from, Some(150));
    slow.advance(250);
    assert_eq!(store.retain(&all).expect("it can").segments, 1);
    assert_eq!(store.hold(0).sequence(), 200, "what is gone cannot be held");
    drop(slow);
    assert_eq!(store.retain(&all).expect("it can").segments, 1);
    drop(fast);
    assert_eq!(store.retain(&all).expect("it can").segments, 0);
    assert_eq!(read(&mut store.read(0)).len(), 101);
}

#[test]
fn a_log_that_is_retained_uses_its_files_again_and_finds_nothing_old_in_them() {
    let folder = folder();
    let store = open(folder.path());
    let files = || std::fs::read_dir(folder.path()).expect("it is there").count();
    let mut next = 0;
    let mut most = 0;
    for round in 0..20 {
        // The second half of each file is what it was before.
        append_segments(&store, 1);
        next += 100;
        store.append(&events(if round % 2 == 0 { 1_500 } else { 10 })).expect("there is room");
        next += if round % 2 == 0 { 1_500 } else { 10 };
        store.retain(&retained(None, Some(0), None)).expect("it can");
        most = most.max(files());
    }
    assert!(most <= 6, "{most} files");
    close(store);
    let (store, recovery) =
        EventStore::open(folder.path(), config(Durability::None)).expect("it is sound");
    assert_eq!(recovery.next_sequence, next);
    append_segments(&store, 3);
    let mut reader = store.read(store.stats().oldest_sequence);
    assert_eq!(read(&mut reader).len() as u64, next + 300 - recovery.oldest_sequence);
    EventStore::verify(folder.path()).expect("it is sound");
}

#[test]
fn a_segment_that_comes_back_after_it_was_retired_is_none_of_the_log() {
    let folder = folder();
    let store = open(folder.path());
    append_segments(&store, 3);
    let first = folder.path().join(format!("{:020}.elog", 0));
    let bytes = std::fs::read(&first).expect("it is there");
    store.retain(&retained(None, Some(0), None)).expect("it can");
    std::fs::write(&first, bytes).expect("it is written");
    assert_eq!(EventStore::verify(folder.path()).expect("it is sound").oldest_sequence, 200);
    close(store);
    let (store, recovery) =
        EventStore::open(folder.path(), config(Durability::Group)).expect("it is sound");
    assert_eq!(recovery.oldest_sequence, 200);
    assert!(!first.exists(), "whoever opens it for writing removes it");
    // The note without what it is about is damage.
    close(store);
    let last = folder.path().join(format!("{:020}.elog", 200));
    std::fs::remove_file(last).expect("it is there");
    let is_corrupt = |error: StoreError| matches!(error, StoreError::Corrupt { .. });
    assert!(EventStore::verify(folder.path()).is_err_and(is_corrupt));
    let opened = EventStore::open(folder.path(), config(Durability::Group));
    assert!(opened.map(|_| ()).is_err_and(is_corrupt));
}

#[test]
fn a_compressed_log_is_read_queried_and_continued_as_before() {
    let folder = folder();
    let store = open(folder.path());
    append_segments(&store, 3);
    append_fill(&store, "fills.BTCUSDT", b"one");
    store.append(&events(5_000)).expect("there is room");
    store.sync().expect("it is durable");
    let before = read(&mut store.read(0));
    let mut behind = store.read(0);
    assert!(behind.next_batch().expect("it is there").is_some());
    let an_hour = Duration::from_secs(3_600);
    assert_eq!(store.compress(an_hour).expect("it can").segments, 0, "none is that old");
    let written = store.stats();
    let compression = store.compress(Duration::ZERO).expect("it can");
    assert_eq!(compression.segments, written.segments - 1, "all but the one that is written");
    assert!(compression.bytes_after < compression.bytes_before / 2, "{compression:?}");
    let saved = compression.bytes_before - compression.bytes_after;
    assert_eq!(store.stats().bytes, written.bytes - saved);
    assert_eq!(store.compress(Duration::ZERO).expect("it can").segments, 0);

    assert_eq!(read(&mut store.read(0)), before);
    assert_eq!(read(&mut behind), before[100..]);
    let mut found = store.query(&Query { times: 10..12, ..Query::default() }).expect("it can");
    let mut sequences: Vec<u64> = Vec::new();
    while let Some(Found::Events(numbers, _)) = found.next_found().expect("it is sound") {
        sequences.extend(numbers);
    }
    assert_eq!(sequences, [10, 11, 110, 111, 210, 211, 311, 312]);

    close(store);
    let verified = EventStore::verify(folder.path()).expect("it is sound");
    assert_eq!(verified.next_sequence, before.len() as u64);
    let (store, recovery) =
        EventStore::open(folder.path(), config(Durability::Group)).expect("it is sound");
    assert_eq!(recovery.next_sequence, before.len() as u64);
    assert_eq!(recovery.scanned_bytes, 0, "sealed segments are trusted");
    assert_eq!(read(&mut store.read(0)), before);
    assert!(store.compress(Duration::ZERO).expect("it can").segments > 0);
    let retired = store.retain(&retained(None, Some(0), None)).expect("it can");
    assert!(retired.segments > 3);
    append_segments(&store, 1);
    EventStore::verify(folder.path()).expect("it is sound");
}

#[test]
fn any_decompressor_of_zstd_gives_the_segment() {
    let folder = folder();
    let store = open(folder.path());
    append_segments(&store, 1);
    let path = folder.path().join(format!("{:020}.elog", 0));
    let original = std::fs::read(&path).expect("it is there");
    store.compress(Duration::ZERO).expect("it can");
    assert!(!path.exists());
    let compressed = std::fs::File::open(path.with_extension("elog.zst")).expect("it is there");
    assert_eq!(zstd::decode_all(compressed).expect("it is zstd"), original);
}

#[test]
fn a_segment_of_many_blocks_is_read_from_any_of_them_once_it_is_compressed() {
    // 2 MB: eight blocks of 256 KiB, and frames that go across their ends.
    const EVENTS: u64 = 60_000;
    let folder = folder();
    let mut config = config(Durability::None);
    config.segment_bytes = 4 << 20;
    let (store, _) = EventStore::open(folder.path(), config).expect("it opens");
    store.append(&events(EVENTS)).expect("there is room");
    store.seal().expect("it is durable");
    let original =
        std::fs::read(folder.path().join(format!("{:020}.elog", 0))).expect("it is there");
    assert_eq!(store.compress(Duration::ZERO).expect("it can").segments, 1);
    let path = folder.path().join(format!("{:020}.elog.zst", 0));
    let compressed = std::fs::File::open(&path).expect("it is there");
    assert!(zstd::decode_all(compressed).expect("it is zstd") == original, "other bytes");

    let record = |number| Record::Event(event(number));
    for from in [0, 1, 8_000, 31_234, EVENTS - 1] {
        assert!(read(&mut store.read(from)).into_iter().eq((from..EVENTS).map(record)), "{from}");
    }
    let mut found =
        store.query(&Query { times: 44_990..45_010, ..Query::default() }).expect("it can");
    let Some(Found::Events(sequences, _)) = found.next_found().expect("it is sound") else {
        panic!("it has them")
    };
    assert!(sequences.iter().copied().eq(44_990..45_010), "{sequences:?}");
    close(store);

    // One block is lost, and the frames that begin or end in it.
    change(&path, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle..middle + 100].fill(0);
    });
    let mut reader = EventStore::read_only(folder.path(), 0).expect("it opens");
    let error = loop {
        match reader.next_batch() {
            Ok(batch) => assert!(batch.is_some(), "damage was taken for the end"),
            Err(error) => break error,
        }
    };
    let StoreError::Corrupt { sequence, .. } = error else { panic!("{error}") };
    let new = folder.path().with_extension("repaired");
    let salvage = EventStore::salvage(folder.path(), &new).expect("it can");
    std::fs::remove_dir_all(&new).expect("it is there");
    let [lost] = &salvage.lost[..] else { panic!("{salvage:?}") };
    assert_eq!((lost.start, salvage.next_sequence), (sequence, EVENTS));
    let most = (256 << 10) / 32 + 2 * 2_048;
    assert!(lost.end - lost.start <= most, "{lost:?}");
    assert_eq!(salvage.kept, EVENTS - (lost.end - lost.start));
}

#[test]
fn damage_in_a_compressed_segment_is_named_and_stops_nothing_before_it() {
    let folder = closed_log(|store| {
        append_segments(store, 3);
        store.compress(Duration::ZERO).expect("it can");
    });
    let path = folder.path().join(format!("{:020}.elog.zst", 200));
    change(&path, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    });
    let error = EventStore::verify(folder.path()).expect_err("it is damaged");
    let StoreError::Corrupt { segment, sequence, .. } = &error else { panic!("{error}") };
    assert_eq!((&**segment, *sequence), ("00000000000000000200.elog.zst", 200));
    let mut reader = EventStore::read_only(folder.path(), 0).expect("its end is sound");
    assert_eq!(reader.next_batch().expect("it is sound").map(|batch| batch.end), Some(100));
    assert_eq!(reader.next_batch().expect("it is sound").map(|batch| batch.end), Some(200));
    let error = reader.next_batch().map(|_| ()).expect_err("it is damaged");
    assert!(matches!(error, StoreError::Corrupt { sequence: 200, .. }), "{error}");
}

/// Damages a log, and returns what is said of it when it is verified, and opened or read.
fn words_of(damage: impl FnOnce(&Path)) -> [String; 2] {
    let folder = closed_log(|store| append_segments(store, 3));
    damage(folder.path());
    let read = || -> Result<(), StoreError> {
        let (store, _) = EventStore::open(folder.path(), config(Durability::Group))?;
        let mut reader = store.read(0);
        while reader.next_batch()?.is_some() {}
        Ok(())
    };
    let found = [EventStore::verify(folder.path()).map(|_| ()), read()];
    found.map(|result| result.expect_err("it is damaged").to_string())
}

#[test]
fn a_segment_that_is_missing_is_named_and_no_other() {
    for base in [0, 100] {
        let name = format!("{base:020}.elog");
        let [verified, read] =
            words_of(|log| std::fs::remove_file(log.join(&name)).expect("it is"));
        let wanted = format!("segment {name} is missing; reading stops at sequence {base}");
        assert!(verified.starts_with(&wanted), "{verified}");
        assert!(read.starts_with(&wanted), "{read}");
    }
}

#[test]
fn a_header_that_is_damaged_is_what_is_told_of() {
    for base in [0, 100] {
        let name = format!("{base:020}.elog");
        let found = words_of(|log| change(&log.join(&name), |bytes| bytes[20] ^= 1));
        let wanted =
            format!("segment {name} is damaged at byte 0: expected the header of a segment;");
        assert!(found.iter().all(|words| words.starts_with(&wanted)), "{found:?}");
    }
}

#[test]
fn a_damaged_compressed_log_is_repaired_into_one_that_has_the_rest() {
    let folder = closed_log(|store| {
        append_segments(store, 3);
        store.compress(Duration::ZERO).expect("it can");
    });
    let path = folder.path().join(format!("{:020}.elog.zst", 100));
    change(&path, |bytes| bytes[..200].fill(0));
    let new = folder.path().with_extension("repaired");
    let salvage = EventStore::salvage(folder.path(), &new).expect("it can");
    assert_eq!((salvage.kept, salvage.next_sequence), (200, 300));
    assert_eq!((salvage.lost.len(), salvage.lost[0].clone()), (1, 100..200));
    let mut reader = EventStore::read_only(&new, 0).expect("it is sound");
    let records = read(&mut reader);
    std::fs::remove_dir_all(&new).expect("it is there");
    let event_of = |number: u64| Record::Event(event(number % 100));
    assert!((0..100).chain(200..300).all(|number| records[number as usize] == event_of(number)));
    assert_eq!(records[150], Record::Gap(Gap { missed: 1, is_exact: true }));
}
