//! A store-load fence of which one side pays for both.
//!
//! In a Dekker handshake each of two threads stores one variable and then loads the other's; unless
//! a full fence stands between, both may load old values. Where the system can make every running
//! thread of the process execute such a fence (`membarrier`, Linux 4.14), the side that is rarely
//! taken asks for that, some microseconds, and the other one only keeps the compiler from
//! reordering, which costs nothing.
//!
//! | side | asymmetric | symmetric |
//! |---|---|---|
//! | `often` | compiler fence | `fence(SeqCst)`, about 5 ns |
//! | `rarely` | `membarrier`, 0.3 to 9 us | `fence(SeqCst)` |
//!
//! The idea is that of liburcu and folly's `asymmetricThreadFence`.

use crate::sync::full_fence;
use std::sync::atomic::{Ordering, compiler_fence};

/// How the two sides of a handshake are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fences {
    /// The side that is rarely taken pays.
    Asymmetric,
    /// Both sides pay.
    Symmetric,
}

impl Fences {
    /// Returns the cheapest that the system has.
    pub fn best() -> Self {
        match system::is_asymmetric() {
            true => Self::Asymmetric,
            false => Self::Symmetric,
        }
    }

    /// The fence between store and load on the side that is taken often.
    #[inline(always)]
    pub fn often(self) {
        match self {
            // ORDERING: pairs with `rarely`, which puts a full fence into this thread.
            Self::Asymmetric => compiler_fence(Ordering::SeqCst),
            Self::Symmetric => full_fence(),
        }
    }

    /// Returns the ones of who has a seat, which are known to be asymmetric.
    #[inline(always)]
    pub fn of_seat(self) -> Self {
        // Loom has no `membarrier`, so that a model of such a place takes symmetric ones.
        if cfg!(tickbus_loom) { self } else { Self::Asymmetric }
    }

    /// The fence between store and load on the side that is taken rarely.
    pub fn rarely(self) {
        match self {
            Self::Asymmetric => system::fence_all_threads(),
            Self::Symmetric => full_fence(),
        }
    }
}

#[cfg(all(target_os = "linux", not(any(tickbus_loom, tickbus_shuttle, tickbus_tsan, miri))))]
mod system {
    use std::sync::LazyLock;

    /// Whether the kernel has the command and has registered the process for it. A child of fork
    /// keeps the registration.
    static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
        let commands = membarrier(libc::MEMBARRIER_CMD_QUERY);
        let wanted = libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED;
        commands > 0
            && commands & libc::c_long::from(wanted) != 0
            && membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) == 0
    });

    fn membarrier(command: libc::c_int) -> libc::c_long {
        // SAFETY: the system call touches no memory of ours; an unknown command is an error.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
    }

    pub(super) fn is_asymmetric() -> bool {
        *REGISTERED
    }

    pub(super) fn fence_all_threads() {
        let result = membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
        assert!(
            result == 0,
            "membarrier was registered and then refused: it cannot be done without"
        );
    }
}

#[cfg(not(all(target_os = "linux", not(any(tickbus_loom, tickbus_shuttle, tickbus_tsan, miri)))))]
mod system {
    pub(super) fn is_asymmetric() -> bool {
        false
    }

    pub(super) fn fence_all_threads() {
        super::full_fence();
    }
}
