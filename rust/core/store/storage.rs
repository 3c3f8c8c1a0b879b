//! Where a log is kept: the few calls that it makes to a file system, behind a trait, so that the
//! tests drive the very same log over a disk that fails, lies or loses its power.
//!
//! Nothing here retries or completes anything: a write may be short, and any call may be
//! interrupted. [`write_all`] and [`read_all`] know what to do about it.

use super::mutants::{Mutant, is_broken};
use std::io::{self, IoSlice};

/// A folder of files.
pub(crate) trait Storage: Send + Sync + 'static {
    /// An open file, which stays the same one when it is renamed.
    type File: StorageFile;

    /// Returns the names of all files.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Creates a file, or empties the one that is there, to write and to read.
    fn create(&self, name: &str) -> io::Result<Self::File>;

    /// Returns how many bytes a file has.
    fn len(&self, name: &str) -> io::Result<u64>;

    /// Opens a file, to write and to read or only to read.
    fn open(&self, name: &str, writable: bool) -> io::Result<Self::File>;

    /// Gives a file another name, and removes the one that had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Returns once all names are as they are now whatever happens.
    fn sync_names(&self) -> io::Result<()>;

    /// Returns 64 random bits.
    fn random(&self) -> u64;

    /// Returns nanoseconds since the Unix epoch.
    fn now(&self) -> u64;
}

/// Bytes that can be read from anywhere.
pub(crate) trait ReadAt: Send + Sync {
    /// Returns how many bytes there are.
    fn len(&self) -> io::Result<u64>;

    /// Reads at most as many bytes as `buffer` has and returns how many; 0 is the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Returns where, from `offset` on, the first bytes are that may be no zeros; `None` if there are
    /// none up to the end.
    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

impl<F: ReadAt> ReadAt for &F {
    fn len(&self) -> io::Result<u64> {
        F::len(self)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        F::read_at(self, buffer, offset)
    }

    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        F::data_from(self, offset)
    }
}

/// What a file system makes of room that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reserved {
    /// It is there, and what is written stands in it, however often that is.
    InPlace,
    /// It is not, or whatever is written takes room of its own.
    Elsewhere,
}

/// A file of a [`Storage`].
pub(crate) trait StorageFile: ReadAt {
    /// Writes the buffers one after another and returns how many bytes of them.
    fn write_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Makes sure of room for so many bytes, which are zeros as far as they are new, where the file
    /// system can.
    fn allocate(&self, bytes: u64) -> io::Result<Reserved>;

    /// Cuts or extends it to so many bytes.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Returns once its bytes are as they are now whatever happens.
    fn sync_data(&self) -> io::Result<()>;
}

/// Writes all bytes of the buffers.
pub(crate) fn write_all(
    file: &impl StorageFile,
    mut buffers: &mut [IoSlice<'_>],
    mut offset: u64,
) -> io::Result<()> {
    while buffers.iter().any(|buffer| !buffer.is_empty()) {
        match file.write_at(buffers, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) if is_broken(Mutant::ShortWriteIsWhole) => return Ok(()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut buffers, written);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `buffer` and returns how many bytes there were before the end of the file.
pub(crate) fn read_all(file: &impl ReadAt, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Runs a call again as long as it is interrupted.
pub(crate) fn uninterrupted<O>(mut call: impl FnMut() -> io::Result<O>) -> io::Result<O> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
