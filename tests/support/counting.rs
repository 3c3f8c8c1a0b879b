//! An allocator that counts, per thread, for tests and benchmarks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// How often this thread allocated or freed.
    pub static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    // Freeing the thread's own locals may come after them.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often work is repeated: what a thread allocates once, such as its place in a lock's queue
/// when it first meets somebody there, does not count.
pub const REPEATED: u64 = 5;

/// Returns how often `work` allocated or freed in this thread, at the best of several times.
pub fn allocations(mut work: impl FnMut()) -> u64 {
    let times = (0..REPEATED).map(|_| {
        let before = ALLOCATIONS.get();
        work();
        ALLOCATIONS.get() - before
    });
    times.fold(u64::MAX, u64::min)
}
