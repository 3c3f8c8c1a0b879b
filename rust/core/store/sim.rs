//! A disk for tests: it can lose its power between any two calls, keep any part of what was not
//! synced, and fail any call.

use super::storage::{ReadAt, Storage, StorageFile};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::sync::Arc;

/// What a disk writes at once: a crash may come between two of them.
const SECTOR: usize = 512;

/// Random numbers of a seed: splitmix64.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Returns a number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// Returns true once in so many times.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// Something that was done to a file and not synced.
#[derive(Debug, Clone)]
enum Change {
    /// At most a sector.
    Bytes(usize, Vec<u8>),
    Length(usize),
}

/// Something that was done to the folder and not synced.
#[derive(Debug, Clone)]
enum NameChange {
    Put(String, usize),
    Rename(String, String, usize),
    Remove(String),
}

#[derive(Debug, Clone, Default)]
struct Inode {
    now: Vec<u8>,
    synced: Arc<Vec<u8>>,
    changes: Vec<Change>,
}

/// What a disk is at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Moment {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    synced_names: BTreeMap<String, usize>,
    name_changes: Vec<NameChange>,
    /// Records that were acknowledged.
    pub(crate) acknowledged: u64,
}

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `EIO`. A sync drops what it should have written.
    Io,
    /// `ENOSPC`, where something is written or created.
    NoSpace,
    /// `EINTR`.
    Interrupted,
    /// Half of the bytes are written.
    Short,
}

#[derive(Default)]
struct State {
    moment: Moment,
    /// One after each change, if they are wanted.
    moments: Option<Vec<Moment>>,
    calls: u64,
    fault: Option<(u64, Fault)>,
    /// The file of the call that failed.
    failed: Option<String>,
    random: u64,
}

/// A disk.
#[derive(Clone, Default)]
pub(crate) struct SimDisk(Arc<Mutex<State>>);

impl SimDisk {
    /// Returns a disk that keeps a copy of itself after each change.
    pub(crate) fn recording(seed: u64) -> Self {
        let disk = Self::default();
        *disk.0.lock() = State { moments: Some(Vec::new()), random: seed, ..State::default() };
        disk
    }

    /// Returns a disk with random numbers of its own.
    pub(crate) fn new(seed: u64) -> Self {
        let disk = Self::default();
        disk.0.lock().random = seed;
        disk
    }

    /// Keeps a copy of itself after each change from now on, and one of what it is now.
    pub(crate) fn record(&self) {
        let mut state = self.0.lock();
        state.moments = Some(Vec::new());
        state.note();
    }

    /// Makes the call of this number fail.
    pub(crate) fn fail(&self, call: u64, fault: Fault) {
        self.0.lock().fault = Some((call, fault));
    }

    /// Returns whether a call has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.lock().failed.is_some()
    }

    /// Returns the file of the call that has failed.
    pub(crate) fn failed(&self) -> Option<String> {
        self.0.lock().failed.clone()
    }

    /// Notes what was acknowledged.
    pub(crate) fn acknowledge(&self, records: u64) {
        let mut state = self.0.lock();
        state.moment.acknowledged = state.moment.acknowledged.max(records);
        state.note();
    }

    /// Returns what was noted since the last call.
    pub(crate) fn take_moments(&self) -> Vec<Moment> {
        let mut state = self.0.lock();
        state.moments.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Returns what it is now.
    pub(crate) fn moment(&self) -> Moment {
        self.0.lock().moment.clone()
    }

    /// Returns the disk after a power cut that only what was synced has survived.
    pub(crate) fn rebooted(&self, seed: u64) -> Self {
        self.moment().crashed(seed, false, || false, || false)
    }

    /// Returns a disk as it would be after all was synced, to be read or to be damaged.
    pub(crate) fn settled(&self) -> Self {
        let disk = Self::default();
        let moment = self.moment();
        disk.0.lock().moment = Moment {
            inodes: moment.inodes.iter().map(|inode| Inode::of(inode.now.clone())).collect(),
            synced_names: moment.names.clone(),
            names: moment.names,
            ..Moment::default()
        };
        disk
    }

    /// Returns the contents of a file.
    pub(crate) fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.0.lock();
        let inode = *state.moment.names.get(name)?;
        Some(state.moment.inodes[inode].now.clone())
    }

    /// Puts a file in the place of the one with its name.
    pub(crate) fn put(&self, name: &str, contents: Vec<u8>) {
        let mut state = self.0.lock();
        let moment = &mut state.moment;
        moment.names.insert(name.to_owned(), moment.inodes.len());
        moment.synced_names = moment.names.clone();
        moment.inodes.push(Inode::of(contents));
    }
}

impl Inode {
    fn of(contents: Vec<u8>) -> Self {
        Self { synced: Arc::new(contents.clone()), now: contents, changes: Vec::new() }
    }
}

impl Moment {
    /// Returns how many changes were not synced.
    pub(crate) fn changes(&self) -> usize {
        self.name_changes.len() + self.inodes.iter().map(|inode| inode.changes.len()).sum::<usize>()
    }

    /// Returns the disk after a power cut at this moment, with those changes for which `survives` is
    /// true, which is asked in order. A sector may have been written in part.
    pub(crate) fn crashed(
        &self,
        seed: u64,
        is_recording: bool,
        mut survives: impl FnMut() -> bool,
        mut is_torn: impl FnMut() -> bool,
    ) -> SimDisk {
        let mut names = self.synced_names.clone();
        for change in &self.name_changes {
            if survives() {
                match change {
                    NameChange::Put(name, inode) => _ = names.insert(name.clone(), *inode),
                    NameChange::Remove(name) => _ = names.remove(name),
                    NameChange::Rename(from, to, inode) => {
                        if names.get(from) == Some(inode) {
                            names.remove(from);
                        }
                        names.insert(to.clone(), *inode);
                    }
                }
            }
        }
        let mut inodes = Vec::with_capacity(self.inodes.len());
        for (number, inode) in self.inodes.iter().enumerate() {
            let is_there = names.values().any(|named| *named == number);
            let mut contents = if is_there { (*inode.synced).clone() } else { Vec::new() };
            for change in &inode.changes {
                if !survives() || !is_there {
                    continue;
                }
                match change {
                    Change::Length(length) => contents.resize(*length, 0),
                    Change::Bytes(offset, bytes) => {
                        let bytes = &bytes[..if is_torn() { bytes.len() / 2 } else { bytes.len() }];
                        let end = offset + bytes.len();
                        if contents.len() < end {
                            contents.resize(end, 0);
                        }
                        contents[*offset..end].copy_from_slice(bytes);
                    }
                }
            }
            inodes.push(Inode::of(contents));
        }
        let moment = Moment {
            inodes,
            synced_names: names.clone(),
            names,
            name_changes: Vec::new(),
            acknowledged: self.acknowledged,
        };
        let moments = is_recording.then(Vec::new);
        SimDisk(Arc::new(Mutex::new(State { moment, moments, random: seed, ..State::default() })))
    }
}

impl State {
    fn note(&mut self) {
        if let Some(moments) = &mut self.moments {
            moments.push(self.moment.clone());
        }
    }

    /// Counts a call to an open file and returns how it fails, if it does.
    fn call_to(&mut self, inode: usize) -> io::Result<Option<Fault>> {
        let mut names = self.moment.names.iter().filter(|(_, named)| **named == inode);
        let name = names.next().map_or_else(String::new, |(name, _)| name.clone());
        self.call(&name)
    }

    /// Counts a call and returns how it fails, if it does.
    fn call(&mut self, name: &str) -> io::Result<Option<Fault>> {
        self.calls += 1;
        let Some((_, fault)) = self.fault.filter(|(call, _)| *call == self.calls) else {
            return Ok(None);
        };
        self.failed = Some(name.to_owned());
        match fault {
            Fault::Io => Err(io::Error::from_raw_os_error(5)),
            Fault::NoSpace => Err(io::ErrorKind::StorageFull.into()),
            Fault::Interrupted => Err(io::ErrorKind::Interrupted.into()),
            Fault::Short => Ok(Some(Fault::Short)),
        }
    }
}

impl Storage for SimDisk {
    type File = SimFile;

    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().moment.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<SimFile> {
        let mut state = self.0.lock();
        state.call(name)?;
        let moment = &mut state.moment;
        let inode = moment.inodes.len();
        moment.inodes.push(Inode::default());
        moment.names.insert(name.to_owned(), inode);
        moment.name_changes.push(NameChange::Put(name.to_owned(), inode));
        state.note();
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        let contents = self.contents(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(contents.len() as u64)
    }

    fn open(&self, name: &str, _: bool) -> io::Result<SimFile> {
        let state = self.0.lock();
        let inode = *state.moment.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.call(from)?;
        let moment = &mut state.moment;
        let inode = moment.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        moment.names.insert(to.to_owned(), inode);
        moment.name_changes.push(NameChange::Rename(from.to_owned(), to.to_owned(), inode));
        state.note();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.call(name)?;
        let moment = &mut state.moment;
        moment.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        moment.name_changes.push(NameChange::Remove(name.to_owned()));
        state.note();
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.call(".")?;
        let moment = &mut state.moment;
        moment.synced_names = moment.names.clone();
        moment.name_changes.clear();
        state.note();
        Ok(())
    }

    fn random(&self) -> u64 {
        let mut state = self.0.lock();
        state.random += 1;
        Random(state.random).next()
    }

    fn now(&self) -> u64 {
        0
    }
}

pub(crate) struct SimFile {
    disk: SimDisk,
    inode: usize,
}

impl ReadAt for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().moment.inodes[self.inode].now.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.0.lock();
        let contents = &state.moment.inodes[self.inode].now;
        let from = contents.get(offset as usize..).unwrap_or_default();
        let count = from.len().min(buffer.len());
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }
}

impl StorageFile for SimFile {
    fn write_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let fault = state.call_to(self.inode)?;
        let mut bytes: Vec<u8> = buffers.iter().flat_map(|buffer| buffer.iter().copied()).collect();
        if fault == Some(Fault::Short) {
            bytes.truncate(bytes.len().div_ceil(2));
        }
        let inode = &mut state.moment.inodes[self.inode];
        let (from, end) = (offset as usize, offset as usize + bytes.len());
        if inode.now.len() < end {
            inode.now.resize(end, 0);
        }
        inode.now[from..end].copy_from_slice(&bytes);
        let mut at = from;
        while at < end {
            let next = end.min(at / SECTOR * SECTOR + SECTOR);
            inode.changes.push(Change::Bytes(at, inode.now[at..next].to_vec()));
            at = next;
        }
        state.note();
        Ok(bytes.len())
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let bytes = self.len()?.max(bytes);
        self.set_len(bytes)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.call_to(self.inode)?;
        let inode = &mut state.moment.inodes[self.inode];
        inode.now.resize(bytes as usize, 0);
        inode.changes.push(Change::Length(bytes as usize));
        state.note();
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let result = state.call_to(self.inode);
        let inode = &mut state.moment.inodes[self.inode];
        match result {
            Ok(_) => inode.synced = Arc::new(inode.now.clone()),
            // The pages count as clean: another sync would find nothing to do.
            Err(ref error) if error.kind() != io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        inode.changes.clear();
        state.note();
        result.map(|_| ())
    }
}
