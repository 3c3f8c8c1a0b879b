//! Databases that keep events by their sequence, each by its fastest documented way to append.

use crate::Folder;
use crate::load::{Load, Synced};
use fjall::{KeyspaceCreateOptions, PersistMode};
use redb::{ReadableDatabase, ReadableTableMetadata, TableDefinition};
use tickbus::Event;

/// SQLite in WAL mode, a transaction for each batch, by a prepared statement.
pub(crate) fn sqlite(load: Load, synced: Synced) -> f64 {
    let folder = Folder::new();
    let database = rusqlite::Connection::open(folder.path().join("log")).expect("it opens");
    let synchronous = match synced {
        Synced::No => "OFF",
        Synced::Each => "FULL",
    };
    database
        .execute_batch(&format!(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = {synchronous};
             CREATE TABLE events (sequence INTEGER PRIMARY KEY, timestamp INTEGER, type INTEGER,
                 priority INTEGER, source INTEGER, symbol INTEGER, value REAL, metadata INTEGER)"
        ))
        .expect("a table");
    let mut insert = database
        .prepare("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")
        .expect("a statement");
    let mut begin = database.prepare("BEGIN").expect("a statement");
    let mut commit = database.prepare("COMMIT").expect("a statement");
    let mut sequence = 0_i64;
    let cost = load.run(|events| {
        begin.execute(()).expect("it begins");
        for event in events {
            let Event { timestamp, event_type, priority, source_id, symbol, value, metadata } =
                event;
            let row = (
                sequence,
                *timestamp as i64,
                event_type.0,
                priority.0,
                source_id.0,
                symbol.0,
                value,
                *metadata as i64,
            );
            insert.execute(row).expect("it is inserted");
            sequence += 1;
        }
        commit.execute(()).expect("it is committed");
    });
    let count = database.query_row("SELECT count(*) FROM events", (), |row| row.get::<_, i64>(0));
    assert_eq!(count, Ok(load.events() as i64), "events are missing, or there are too many");
    cost
}

/// redb, a write transaction for each batch.
pub(crate) fn redb(load: Load, synced: Synced) -> f64 {
    const EVENTS: TableDefinition<'_, u64, &[u8; 32]> = TableDefinition::new("events");
    let folder = Folder::new();
    let database = redb::Database::create(folder.path().join("log")).expect("it opens");
    let durability = match synced {
        Synced::No => redb::Durability::None,
        Synced::Each => redb::Durability::Immediate,
    };
    let mut sequence = 0;
    let cost = load.run(|events| {
        let mut write = database.begin_write().expect("it begins");
        write.set_durability(durability).expect("nothing was changed yet");
        let mut table = write.open_table(EVENTS).expect("a table");
        for event in events {
            table.insert(sequence, &event.to_bytes()).expect("it is inserted");
            sequence += 1;
        }
        drop(table);
        write.commit().expect("it is committed");
    });
    let read = database.begin_read().expect("it begins");
    let count = read.open_table(EVENTS).expect("the table").len().expect("a count");
    assert_eq!(count, load.events(), "events are missing, or there are too many");
    cost
}

/// fjall, a batch for each batch.
pub(crate) fn fjall(load: Load, synced: Synced) -> f64 {
    let folder = Folder::new();
    let database = fjall::Database::builder(folder.path()).open().expect("it opens");
    let events_of =
        database.keyspace("events", KeyspaceCreateOptions::default).expect("a keyspace");
    let mode = match synced {
        Synced::No => None,
        Synced::Each => Some(PersistMode::SyncData),
    };
    let mut sequence = 0_u64;
    let cost = load.run(|events| {
        let mut batch = database.batch().durability(mode);
        for event in events {
            batch.insert(&events_of, sequence.to_be_bytes(), event.to_bytes());
            sequence += 1;
        }
        batch.commit().expect("it is committed");
    });
    let count = events_of.len().expect("a count") as u64;
    assert_eq!(count, load.events(), "events are missing, or there are too many");
    cost
}
