//! A folder of the file system as the storage of a log.

use super::error::StoreError;
use super::storage::{ReadAt, Reserved, Storage, StorageFile};
use rustix::fs::{AtFlags, FlockOperation, flock, statat};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The file that the one writer of a log holds locked.
const LOCK: &str = "LOCK";

/// A folder.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    /// To sync the names in it, and to ask about files.
    folder: File,
}

/// The right to write into a folder. Dropping it gives it up, unless another process has a copy of
/// the file by `fork`.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Lock {
    /// Gives it up, whoever else has a copy of the file.
    pub(crate) fn release(self) {
        // What fails here is tried again by the system when the file is closed.
        _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl Directory {
    /// Opens a folder to read only.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let folder = File::open(path).map_err(io_error("opening", path))?;
        Ok(Self { path: path.to_owned(), folder })
    }

    /// Gives a folder another name, for good.
    pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
        fs::rename(from, to).map_err(io_error("renaming", from))?;
        sync_around(to)
    }

    /// Opens a folder to read only that nobody writes as long as the lock lives.
    pub(crate) fn still(path: &Path) -> Result<(Self, Option<Lock>), StoreError> {
        let folder = Self::open(path)?;
        let lock = match File::open(path.join(LOCK)) {
            Ok(mut file) => {
                hold(&mut file, FlockOperation::NonBlockingLockShared, path)?;
                Some(Lock { file })
            }
            // Nobody has ever opened it here: it may be a copy.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io_error("opening", &path.join(LOCK))(error)),
        };
        Ok((folder, lock))
    }

    /// Opens or creates a folder for one writer.
    pub(crate) fn lock(path: &Path) -> Result<(Self, Lock), StoreError> {
        let missing: Vec<_> = path.ancestors().take_while(|folder| !folder.exists()).collect();
        fs::create_dir_all(path).map_err(refusal("creating", path))?;
        for folder in missing {
            sync_around(folder)?;
        }
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join(LOCK))
            .map_err(refusal("opening", &path.join(LOCK)))?;
        hold(&mut lock, FlockOperation::NonBlockingLockExclusive, path)?;
        let owner = format!("{}\n", std::process::id());
        // For people only: a full disk is no reason not to open the log.
        _ = lock.set_len(0).and_then(|()| lock.write_all(owner.as_bytes()));
        Ok((Self::open(path)?, Lock { file: lock }))
    }
}

/// Returns once the folder around a path has its name whatever happens.
fn sync_around(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let synced = File::open(parent).and_then(|parent| parent.sync_all());
    synced.map_err(io_error("syncing", parent))
}

/// Locks a file, or says who has it.
fn hold(lock: &mut File, operation: FlockOperation, path: &Path) -> Result<(), StoreError> {
    match flock(&*lock, operation) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut owner = String::new();
            // Who it is helps, and is not worth an error of its own.
            _ = lock.read_to_string(&mut owner);
            let owner = owner.trim().to_owned();
            Err(StoreError::AlreadyOpen { path: path.to_owned(), owner })
        }
        Err(error) => Err(io_error("locking", path)(error.into())),
    }
}

/// Returns what makes an error of the system one of the log.
fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |error| StoreError::io(what, &path.display().to_string())(error)
}

/// As `io_error`, where the system may say that nothing can be written there.
fn refusal(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |error| match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
            StoreError::ReadOnly { path: path.to_owned(), why: error.to_string() }
        }
        _ => io_error(what, path)(error),
    }
}

impl Storage for Directory {
    type File = File;

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            // What is not UTF-8 is none of the log's.
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).open(self.path.join(name))
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        Ok(statat(&self.folder, name, AtFlags::empty())?.st_size as u64)
    }

    fn open(&self, name: &str, writable: bool) -> io::Result<File> {
        OpenOptions::new().read(true).write(writable).open(self.path.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_names(&self) -> io::Result<()> {
        self.folder.sync_all()
    }

    fn random(&self) -> u64 {
        // Salts and identities have to differ, not to be secret.
        getrandom::u64()
            .unwrap_or_else(|_| self.now() ^ u64::from(std::process::id()).rotate_left(40))
    }

    fn now(&self) -> u64 {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        since.map_or(0, |since| since.as_nanos() as u64)
    }
}

impl ReadAt for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        use rustix::fs::{SeekFrom, seek};
        match seek(self, SeekFrom::Data(offset)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // Some file systems cannot tell.
            Err(_) => Ok(Some(offset)),
        }
    }
}

impl StorageFile for File {
    fn write_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pwritev(self, buffers, offset)?)
    }

    #[cfg(any(target_os = "linux", target_os = "android", target_os = "freebsd"))]
    fn allocate(&self, bytes: u64) -> io::Result<Reserved> {
        use rustix::fs::{FallocateFlags, fallocate};
        match fallocate(self, FallocateFlags::empty(), 0, bytes) {
            Ok(()) if copies_on_write(self)? => Ok(Reserved::Elsewhere),
            Ok(()) => Ok(Reserved::InPlace),
            // Some file systems cannot reserve: they say later that they are full.
            Err(rustix::io::Errno::OPNOTSUPP) => extend(self, bytes),
            Err(error) => Err(error.into()),
        }
    }

    #[cfg(not(any(target_os = "linux", target_os = "android", target_os = "freebsd")))]
    fn allocate(&self, bytes: u64) -> io::Result<Reserved> {
        extend(self, bytes)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
}

/// Makes a file so long at least, without room for it.
fn extend(file: &File, bytes: u64) -> io::Result<Reserved> {
    if file.metadata()?.len() < bytes {
        file.set_len(bytes)?;
    }
    Ok(Reserved::Elsewhere)
}

/// Returns whether a file system writes what is written again to another place.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn copies_on_write(file: &File) -> io::Result<bool> {
    const BTRFS: u64 = 0x9123_683e;
    const BCACHEFS: u64 = 0xca45_1a4e;
    // It has 32 bits, and their sign is not the same everywhere.
    let kind = rustix::fs::fstatfs(file)?.f_type as u64 & u64::from(u32::MAX);
    Ok(kind == BTRFS || kind == BCACHEFS)
}

/// Returns whether a file system writes what is written again to another place.
#[cfg(target_os = "freebsd")]
fn copies_on_write(_: &File) -> io::Result<bool> {
    Ok(true)
}
