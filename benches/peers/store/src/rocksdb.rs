//! RocksDB by its C interface, as the system's package has it: to build it takes longer than all
//! that is measured here.

use crate::Folder;
use crate::load::{Load, Synced};
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_void};
use std::os::unix::ffi::OsStrExt;
use std::ptr::null_mut;
use std::sync::OnceLock;
use tickbus::Event;

/// What the linker finds, and the packages of Debian 12 and 13.
const NAMES: [&str; 3] = ["librocksdb.so", "librocksdb.so.7.8", "librocksdb.so.9.10"];

/// Returns the library, or why there is none.
pub(crate) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let load = || {
        // SAFETY: what the library runs when it is loaded asks nothing of us.
        NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok())
    };
    LIBRARY.get_or_init(load).as_ref().ok_or("no RocksDB: Debian has it as librocksdb7.8")
}

/// Returns what the head of the table says about it.
pub(crate) fn about() -> String {
    const FILE: &str = "librocksdb.so.";
    match library() {
        Ok(_) => {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
            let version = maps.lines().find_map(|line| line.split_once(FILE));
            format!("RocksDB {}", version.map_or("?", |(_, version)| version))
        }
        Err(error) => error.to_owned(),
    }
}

/// What the interface points to, without saying what it is.
type Handle = *mut c_void;
type Error = *mut *mut c_char;

/// The calls that are made; `rocksdb/c.h` has them with these types.
struct Calls {
    options_create: Symbol<'static, unsafe extern "C" fn() -> Handle>,
    set_create_if_missing: Symbol<'static, unsafe extern "C" fn(Handle, c_uchar)>,
    open: Symbol<'static, unsafe extern "C" fn(Handle, *const c_char, Error) -> Handle>,
    close: Symbol<'static, unsafe extern "C" fn(Handle)>,
    options_destroy: Symbol<'static, unsafe extern "C" fn(Handle)>,
    writeoptions_create: Symbol<'static, unsafe extern "C" fn() -> Handle>,
    set_sync: Symbol<'static, unsafe extern "C" fn(Handle, c_uchar)>,
    writeoptions_destroy: Symbol<'static, unsafe extern "C" fn(Handle)>,
    batch_create: Symbol<'static, unsafe extern "C" fn() -> Handle>,
    batch_put:
        Symbol<'static, unsafe extern "C" fn(Handle, *const c_char, usize, *const c_char, usize)>,
    batch_clear: Symbol<'static, unsafe extern "C" fn(Handle)>,
    batch_count: Symbol<'static, unsafe extern "C" fn(Handle) -> c_int>,
    batch_destroy: Symbol<'static, unsafe extern "C" fn(Handle)>,
    write: Symbol<'static, unsafe extern "C" fn(Handle, Handle, Handle, Error)>,
    latest_sequence: Symbol<'static, unsafe extern "C" fn(Handle) -> u64>,
}

impl Calls {
    fn of(library: &'static Library) -> Result<Self, libloading::Error> {
        // SAFETY: the types are those of `rocksdb/c.h`, which never changes those of a call.
        unsafe {
            Ok(Self {
                options_create: library.get(b"rocksdb_options_create")?,
                set_create_if_missing: library.get(b"rocksdb_options_set_create_if_missing")?,
                open: library.get(b"rocksdb_open")?,
                close: library.get(b"rocksdb_close")?,
                options_destroy: library.get(b"rocksdb_options_destroy")?,
                writeoptions_create: library.get(b"rocksdb_writeoptions_create")?,
                set_sync: library.get(b"rocksdb_writeoptions_set_sync")?,
                writeoptions_destroy: library.get(b"rocksdb_writeoptions_destroy")?,
                batch_create: library.get(b"rocksdb_writebatch_create")?,
                batch_put: library.get(b"rocksdb_writebatch_put")?,
                batch_clear: library.get(b"rocksdb_writebatch_clear")?,
                batch_count: library.get(b"rocksdb_writebatch_count")?,
                batch_destroy: library.get(b"rocksdb_writebatch_destroy")?,
                write: library.get(b"rocksdb_write")?,
                latest_sequence: library.get(b"rocksdb_get_latest_sequence_number")?,
            })
        }
    }
}

/// Ends the process if a call failed.
fn assert_done(error: *const c_char) {
    // SAFETY: an error that is not null is a string that ends with a zero.
    let text = (!error.is_null()).then(|| unsafe { CStr::from_ptr(error) });
    assert_eq!(text, None, "RocksDB failed");
}

/// A write batch for each batch.
pub(crate) fn run(library: &'static Library, load: Load, synced: Synced) -> f64 {
    let calls = Calls::of(library).expect("all calls are there");
    let folder = Folder::new();
    let path = CString::new(folder.path().as_os_str().as_bytes()).expect("a path has no zeros");
    let mut error = null_mut();
    // SAFETY: each handle comes from the call that makes it, is used by calls that take such a one,
    // and is destroyed once, after the last of them.
    unsafe {
        let options = (calls.options_create)();
        (calls.set_create_if_missing)(options, 1);
        let database = (calls.open)(options, path.as_ptr(), &raw mut error);
        assert_done(error);
        let write_options = (calls.writeoptions_create)();
        (calls.set_sync)(write_options, (synced == Synced::Each).into());
        let batch = (calls.batch_create)();
        let mut sequence = 0_u64;
        let cost = load.run(|events: &[Event]| {
            for event in events {
                let (key, value) = (sequence.to_be_bytes(), event.to_bytes());
                let (key_at, value_at) = (key.as_ptr().cast(), value.as_ptr().cast());
                (calls.batch_put)(batch, key_at, key.len(), value_at, value.len());
                sequence += 1;
            }
            assert_eq!((calls.batch_count)(batch) as usize, events.len(), "all are in the batch");
            (calls.write)(database, write_options, batch, &raw mut error);
            assert_done(error);
            (calls.batch_clear)(batch);
        });
        let count = (calls.latest_sequence)(database);
        assert_eq!(count, load.events(), "events are missing, or there are too many");
        (calls.batch_destroy)(batch);
        (calls.writeoptions_destroy)(write_options);
        (calls.close)(database);
        (calls.options_destroy)(options);
        cost
    }
}
