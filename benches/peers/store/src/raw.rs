//! The system calls under a log, without a log: the limits.

use crate::{Folder, SEGMENT_BYTES};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::os::unix::fs::FileExt;
use tickbus::Event;

/// How the files come to their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Made {
    /// Reserved, as segments are.
    Reserved,
    /// Filled with zeros that are on the disk, in advance.
    Written,
}

/// Writes one after another into files as large as segments.
pub(crate) struct Raw {
    folder: Folder,
    files: usize,
    file: File,
    /// Those to come that were made before.
    written: Vec<File>,
    position: u64,
}

impl Raw {
    pub(crate) fn new(made: Made, bytes: u64) -> Self {
        let folder = Folder::new();
        let count = if made == Made::Written { bytes.div_ceil(SEGMENT_BYTES) } else { 0 };
        let mut written: Vec<_> = (0..count).map(|number| zeroed(&folder, number)).collect();
        let file = written.pop().unwrap_or_else(|| reserved(&folder, 0));
        Self { folder, files: 1, file, written, position: 0 }
    }

    pub(crate) fn write(&mut self, events: &[Event]) {
        let bytes: &[u8] = bytemuck::cast_slice(events);
        if self.position + bytes.len() as u64 > SEGMENT_BYTES {
            let (folder, number) = (&self.folder, self.files);
            self.file = self.written.pop().unwrap_or_else(|| reserved(folder, number));
            self.files += 1;
            self.position = 0;
        }
        self.file.write_all_at(bytes, self.position).expect("it can be written");
        self.position += bytes.len() as u64;
    }

    pub(crate) fn sync(&self) {
        self.file.sync_data().expect("it can be synced");
    }
}

fn create(folder: &Folder, name: &str) -> File {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).open(folder.path().join(name)).expect("a file")
}

fn reserved(folder: &Folder, number: usize) -> File {
    let file = create(folder, &format!("reserved-{number}"));
    fallocate(&file, FallocateFlags::empty(), 0, SEGMENT_BYTES).expect("there is room");
    file
}

fn zeroed(folder: &Folder, number: u64) -> File {
    let file = create(folder, &format!("written-{number}"));
    let zeros = vec![0; 1 << 20];
    for at in (0..SEGMENT_BYTES).step_by(zeros.len()) {
        file.write_all_at(&zeros, at).expect("there is room");
    }
    file.sync_all().expect("it can be synced");
    file
}
