//! A disk for tests: it can lose its power between any two calls, keep any part of what was not
//! synced, and fail any call.

use super::storage::{ReadAt, Reserved, Storage, StorageFile};
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

/// Shared as long as nothing changes.
#[derive(Debug, Clone, Default)]
struct Inode {
    now: Arc<Vec<u8>>,
    synced: Arc<Vec<u8>>,
    changes: Vec<Change>,
}

type Names = BTreeMap<String, usize>;

/// What a disk is at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Moment {
    inodes: Vec<Arc<Inode>>,
    names: Arc<Names>,
    synced_names: Arc<Names>,
    name_changes: Vec<NameChange>,
    /// Records that were acknowledged.
    pub(crate) acknowledged: u64,
    /// Records of which the disk says so.
    pub(crate) confirmed: u64,
}

/// Calls that are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calls {
    /// `create`, `rename`, `remove`, writes, cuts and syncs.
    Changing,
    /// `names`, `open`, `len` and reads.
    Reading,
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
    /// Half of the bytes are written or read.
    Short,
}

#[derive(Default)]
struct State {
    moment: Moment,
    /// One after each change, if they are wanted.
    moments: Option<Vec<Moment>>,
    /// How many there were, of either kind.
    calls: [u64; 2],
    fault: Option<(Calls, u64, Fault)>,
    /// The file of the call that failed.
    failed: Option<String>,
    random: u64,
    /// What others do while a file is synced, and how many syncs there are before that.
    meanwhile: Option<(u64, Meanwhile)>,
}

type Meanwhile = Box<dyn FnOnce() + Send>;

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
    pub(crate) fn fail(&self, calls: Calls, call: u64, fault: Fault) {
        self.0.lock().fault = Some((calls, call, fault));
    }

    /// Has something done while a file is synced, after so many syncs of others. What is written then is
    /// not synced by that.
    pub(crate) fn do_while_syncing(&self, syncs: u64, meanwhile: impl FnOnce() + Send + 'static) {
        self.0.lock().meanwhile = Some((syncs, Box::new(meanwhile)));
    }

    /// Has nothing done any more that was not.
    pub(crate) fn do_nothing_while_syncing(&self) {
        let forgotten = self.0.lock().meanwhile.take();
        drop(forgotten);
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

    /// Notes of what the disk says that it was acknowledged.
    pub(crate) fn confirm(&self, records: u64) {
        let mut state = self.0.lock();
        state.moment.confirmed = state.moment.confirmed.max(records);
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
            inodes: moment.inodes.iter().map(|inode| Inode::of(&inode.now)).collect(),
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
        Some((*state.moment.inodes[inode].now).clone())
    }

    /// Puts a file in the place of the one with its name.
    pub(crate) fn put(&self, name: &str, contents: Vec<u8>) {
        let mut state = self.0.lock();
        let moment = &mut state.moment;
        let inode = moment.inodes.len();
        moment.names_mut().insert(name.to_owned(), inode);
        moment.synced_names = moment.names.clone();
        moment.inodes.push(Inode::of(&Arc::new(contents)));
    }
}

impl Inode {
    fn of(contents: &Arc<Vec<u8>>) -> Arc<Self> {
        Arc::new(Self { synced: contents.clone(), now: contents.clone(), changes: Vec::new() })
    }
}

/// Makes sure of so many bytes; new ones are zeros.
fn extend(contents: &mut Vec<u8>, bytes: usize) {
    const ZEROS: [u8; 4096] = [0; 4096];
    // Faster than `resize` where the library's own checks are compiled in.
    while contents.len() < bytes {
        contents.extend_from_slice(&ZEROS[..ZEROS.len().min(bytes - contents.len())]);
    }
}

/// Cuts or extends it to so many bytes.
fn set_len(contents: &mut Vec<u8>, bytes: usize) {
    contents.truncate(bytes);
    extend(contents, bytes);
}

impl Moment {
    fn names_mut(&mut self) -> &mut Names {
        Arc::make_mut(&mut self.names)
    }

    fn inode_mut(&mut self, inode: usize) -> &mut Inode {
        Arc::make_mut(&mut self.inodes[inode])
    }

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
        let mut synced_names = self.synced_names.clone();
        for change in &self.name_changes {
            if survives() {
                let names = Arc::make_mut(&mut synced_names);
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
            let is_there = synced_names.values().any(|named| *named == number);
            let mut synced = if is_there { inode.synced.clone() } else { Arc::default() };
            for change in &inode.changes {
                if !survives() || !is_there {
                    continue;
                }
                let contents = Arc::make_mut(&mut synced);
                match change {
                    Change::Length(length) => set_len(contents, *length),
                    Change::Bytes(offset, bytes) => {
                        let bytes = &bytes[..if is_torn() { bytes.len() / 2 } else { bytes.len() }];
                        let end = offset + bytes.len();
                        extend(contents, end);
                        contents[*offset..end].copy_from_slice(bytes);
                    }
                }
            }
            inodes.push(Inode::of(&synced));
        }
        let moment = Moment {
            inodes,
            names: synced_names.clone(),
            synced_names,
            name_changes: Vec::new(),
            acknowledged: self.acknowledged,
            confirmed: self.confirmed,
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
    fn call_to(&mut self, calls: Calls, inode: usize) -> io::Result<Option<Fault>> {
        let mut names = self.moment.names.iter().filter(|(_, named)| **named == inode);
        let name = names.next().map_or_else(String::new, |(name, _)| name.clone());
        self.call(calls, &name)
    }

    /// Counts a call and returns how it fails, if it does.
    fn call(&mut self, calls: Calls, name: &str) -> io::Result<Option<Fault>> {
        let count = &mut self.calls[calls as usize];
        *count += 1;
        let place = (calls, *count);
        let Some((.., fault)) = self.fault.filter(|(calls, call, _)| (*calls, *call) == place)
        else {
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
        let mut state = self.0.lock();
        state.call(Calls::Reading, ".")?;
        Ok(state.moment.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<SimFile> {
        let mut state = self.0.lock();
        state.call(Calls::Changing, name)?;
        let moment = &mut state.moment;
        let inode = moment.inodes.len();
        moment.inodes.push(Arc::default());
        moment.names_mut().insert(name.to_owned(), inode);
        moment.name_changes.push(NameChange::Put(name.to_owned(), inode));
        state.note();
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        self.0.lock().call(Calls::Reading, name)?;
        let contents = self.contents(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(contents.len() as u64)
    }

    fn open(&self, name: &str, _: bool) -> io::Result<SimFile> {
        let mut state = self.0.lock();
        state.call(Calls::Reading, name)?;
        let inode = *state.moment.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile { disk: self.clone(), inode })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.call(Calls::Changing, from)?;
        let moment = &mut state.moment;
        let inode = moment.names_mut().remove(from).ok_or(io::ErrorKind::NotFound)?;
        moment.names_mut().insert(to.to_owned(), inode);
        moment.name_changes.push(NameChange::Rename(from.to_owned(), to.to_owned(), inode));
        state.note();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.call(Calls::Changing, name)?;
        let moment = &mut state.moment;
        moment.names_mut().remove(name).ok_or(io::ErrorKind::NotFound)?;
        moment.name_changes.push(NameChange::Remove(name.to_owned()));
        state.note();
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        state.call(Calls::Changing, ".")?;
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
        let mut state = self.disk.0.lock();
        state.call_to(Calls::Reading, self.inode)?;
        Ok(state.moment.inodes[self.inode].now.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let fault = state.call_to(Calls::Reading, self.inode)?;
        let contents = &state.moment.inodes[self.inode].now;
        let from = contents.get(offset as usize..).unwrap_or_default();
        let mut count = from.len().min(buffer.len());
        if fault == Some(Fault::Short) {
            count = count.div_ceil(2);
        }
        buffer[..count].copy_from_slice(&from[..count]);
        Ok(count)
    }

    /// Every sector of zeros is a hole, as it may be on a disk.
    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        let mut state = self.disk.0.lock();
        state.call_to(Calls::Reading, self.inode)?;
        let contents = &state.moment.inodes[self.inode].now;
        let from = contents.get(offset as usize..).unwrap_or_default();
        let data = from.iter().position(|byte| *byte != 0).map(|at| offset + at as u64);
        Ok(data.map(|at| (at / SECTOR as u64 * SECTOR as u64).max(offset)))
    }
}

impl StorageFile for SimFile {
    fn write_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let fault = state.call_to(Calls::Changing, self.inode)?;
        let mut bytes = buffers.iter().map(|buffer| &**buffer).collect::<Vec<_>>().concat();
        if fault == Some(Fault::Short) {
            bytes.truncate(bytes.len().div_ceil(2));
        }
        let inode = state.moment.inode_mut(self.inode);
        let now = Arc::make_mut(&mut inode.now);
        let (from, end) = (offset as usize, offset as usize + bytes.len());
        extend(now, end);
        now[from..end].copy_from_slice(&bytes);
        let mut at = from;
        while at < end {
            let next = end.min(at / SECTOR * SECTOR + SECTOR);
            inode.changes.push(Change::Bytes(at, now[at..next].to_vec()));
            at = next;
        }
        state.note();
        Ok(bytes.len())
    }

    fn allocate(&self, bytes: u64) -> io::Result<Reserved> {
        let there = self.disk.0.lock().moment.inodes[self.inode].now.len();
        self.set_len(bytes.max(there as u64))?;
        Ok(Reserved::InPlace)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        state.call_to(Calls::Changing, self.inode)?;
        let inode = state.moment.inode_mut(self.inode);
        set_len(Arc::make_mut(&mut inode.now), bytes as usize);
        inode.changes.push(Change::Length(bytes as usize));
        state.note();
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        let result = state.call_to(Calls::Changing, self.inode);
        let inode = &state.moment.inodes[self.inode];
        let (now, changes) = (inode.now.clone(), inode.changes.len());
        let meanwhile = match &mut state.meanwhile {
            Some((0, _)) => state.meanwhile.take(),
            Some((syncs, _)) => {
                *syncs -= 1;
                None
            }
            None => None,
        };
        if let Some((_, meanwhile)) = meanwhile {
            drop(state);
            meanwhile();
            state = self.disk.0.lock();
        }
        let inode = state.moment.inode_mut(self.inode);
        match result {
            Ok(_) => inode.synced = now,
            // The pages count as clean: another sync would find nothing to do.
            Err(ref error) if error.kind() != io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        inode.changes.drain(..changes);
        state.note();
        result.map(|_| ())
    }
}
