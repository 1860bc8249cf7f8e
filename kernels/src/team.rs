//! A team of threads for work that is done in microseconds.
//!
//! A token of a small model is two hundred products of ten to a hundred microseconds each; handing those to a general
//! pool costs as much as some of them take. Members of this team wait a moment with open eyes before they sleep, and a
//! job is one pointer and one counter. Its size is that of rayon's global pool, which `--threads` sets.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a member without work stays awake. Between two products of a token lie a few microseconds; a member that
/// must be woken comes fifty too late.
const AWAKE: Duration = Duration::from_micros(200);
/// Looks at the job between two looks at the clock.
const SPINS: u32 = 64;
/// Pieces of one job: the lower half of the state counts them.
const PIECES_MAX: usize = u32::MAX as usize / 2;

/// Calls `work` with every number below `pieces`, on all threads. Pieces may run in any order and at once.
///
/// Where the team is busy with another job, the caller does all pieces itself.
///
/// # Panics
///
/// When `work` does.
pub(crate) fn in_pieces(pieces: usize, work: impl Fn(usize) + Sync) {
    let team = Team::global();
    if pieces <= 1 || pieces > PIECES_MAX || team.members.is_empty() {
        return (0..pieces).for_each(work);
    }
    match team.turn.try_lock() {
        Ok(_turn) => team.carry_out(pieces, &work),
        Err(TryLockError::Poisoned(poisoned)) => {
            let _turn = poisoned.into_inner();
            team.carry_out(pieces, &work);
        }
        Err(TryLockError::WouldBlock) => (0..pieces).for_each(work),
    }
}

/// Calls `work` with each `part` elements of `x` and their number, on all threads where there are many.
pub(crate) fn in_parts(x: &mut [f32], part: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    /// Elements below which one thread does all: they take as long as telling another.
    const ELEMENTS_MIN: usize = 8_192;
    if x.len() < ELEMENTS_MIN || part == 0 {
        x.chunks_mut(part.max(1))
            .enumerate()
            .for_each(|(index, x)| work(index, x));
        return;
    }
    in_parts_always(x, part, work);
}

/// As [`in_parts`], however few elements there are: for work that grows with something else.
pub(crate) fn in_parts_always(x: &mut [f32], part: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    struct Start(*mut f32);
    // SAFETY: every piece takes a part of its own.
    unsafe impl Sync for Start {}
    impl Start {
        const fn at(&self, index: usize) -> *mut f32 {
            self.0.wrapping_add(index)
        }
    }
    let (start, len) = (Start(x.as_mut_ptr()), x.len());
    in_pieces(len.div_ceil(part.max(1)), |index| {
        let first = index * part;
        // SAFETY: parts lie within `x`, which is borrowed until all are done, and none overlaps another.
        let own = unsafe { std::slice::from_raw_parts_mut(start.at(first), part.min(len - first)) };
        work(index, own);
    });
}

/// Threads that work on a job, the caller's among them.
pub(crate) fn threads() -> usize {
    Team::global().members.len() + 1
}

struct Team {
    shared: &'static Shared,
    members: Vec<Thread>,
    /// Held by whoever has a job.
    turn: Mutex<()>,
}

/// What caller and members see. A job's fields change only while no piece of a job is left to claim.
struct Shared {
    /// The job's number in the upper half, pieces that are not claimed yet in the lower.
    state: AtomicU64,
    /// Pieces that are claimed and not done, and those not claimed.
    undone: AtomicUsize,
    /// The closure.
    work: AtomicPtr<()>,
    /// The function that calls it.
    call: AtomicPtr<()>,
    /// Members that sleep, or are about to.
    sleeping: AtomicUsize,
    /// Pieces whose work panicked.
    failed: AtomicUsize,
}

type Call = unsafe fn(*const (), usize);

impl Team {
    fn global() -> &'static Self {
        static TEAM: OnceLock<Team> = OnceLock::new();
        TEAM.get_or_init(|| Self::new(rayon::current_num_threads()))
    }

    fn new(threads: usize) -> Self {
        // Members outlive every owner that one could name.
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            state: AtomicU64::new(0),
            undone: AtomicUsize::new(0),
            work: AtomicPtr::new(std::ptr::null_mut()),
            call: AtomicPtr::new(std::ptr::null_mut()),
            sleeping: AtomicUsize::new(0),
            failed: AtomicUsize::new(0),
        }));
        let members = (1..threads).filter_map(|index| {
            let builder = thread::Builder::new().name(format!("product-{index}"));
            // A thread that the system refuses leaves its work to the others.
            builder.spawn(|| shared.serve()).ok()
        });
        Self {
            shared,
            members: members.map(|handle| handle.thread().clone()).collect(),
            turn: Mutex::new(()),
        }
    }

    fn carry_out<W: Fn(usize) + Sync>(&self, pieces: usize, work: &W) {
        /// # Safety
        ///
        /// `work` points to a `W` that lives.
        unsafe fn call<W: Fn(usize)>(work: *const (), piece: usize) {
            // SAFETY: the caller's promise.
            unsafe { (*work.cast::<W>())(piece) }
        }
        let shared = self.shared;
        shared
            .work
            .store(std::ptr::from_ref(work).cast_mut().cast(), Ordering::Relaxed);
        shared.call.store(call::<W> as Call as *mut (), Ordering::Relaxed);
        shared.failed.store(0, Ordering::Relaxed);
        shared.undone.store(pieces, Ordering::Relaxed);
        let job = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Sequentially consistent with `sleeping`: either the sleeper sees the job or it is seen.
        shared.state.store(job << 32 | pieces as u64, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.members.iter().for_each(Thread::unpark);
        }
        while shared.piece() {}
        let mut spins = 0u32;
        while shared.undone.load(Ordering::Acquire) > 0 {
            spins += 1;
            match spins % SPINS {
                // A member may have lost its core to another process.
                0 => thread::yield_now(),
                _ => spin_loop(),
            }
        }
        assert_eq!(shared.failed.load(Ordering::Relaxed), 0, "a piece of work panicked");
    }
}

impl Shared {
    /// Claims one piece and does it; `false` where none is left.
    fn piece(&self) -> bool {
        let state = self.state.load(Ordering::Acquire);
        let left = state & u64::from(u32::MAX);
        if left == 0 {
            return false;
        }
        let (work, call) = (self.work.load(Ordering::Relaxed), self.call.load(Ordering::Relaxed));
        if self
            .state
            .compare_exchange(state, state - 1, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            return true; // Somebody else claimed it; there may be another.
        }
        // SAFETY: the claim succeeded, so the job is still that of `state`: its fields were written before `state` was,
        // and its caller waits, with the closure alive, until this piece is done. `call` was made from a `Call`.
        let done = std::panic::catch_unwind(|| unsafe {
            let call: Call = std::mem::transmute::<*mut (), Call>(call);
            call(work, left as usize - 1);
        });
        if done.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.undone.fetch_sub(1, Ordering::Release);
        true
    }

    fn serve(&self) {
        loop {
            let mut start = Instant::now();
            loop {
                while self.piece() {
                    start = Instant::now();
                }
                (0..SPINS).for_each(|_| spin_loop());
                if self.state.load(Ordering::Relaxed) & u64::from(u32::MAX) == 0 && start.elapsed() > AWAKE {
                    break;
                }
            }
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            if self.state.load(Ordering::SeqCst) & u64::from(u32::MAX) == 0 {
                thread::park();
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        let team = Team::new(4);
        for pieces in [1, 2, 3, 7, 100] {
            for _ in 0..200 {
                let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
                team.carry_out(pieces, &|piece: usize| {
                    done[piece].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn members_that_sleep_are_woken() {
        let team = Team::new(3);
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(2));
            let sum = AtomicUsize::new(0);
            team.carry_out(50, &|piece: usize| {
                sum.fetch_add(piece, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 49 * 25);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(2);
        let run = || team.carry_out(8, &|piece: usize| assert_ne!(piece, 5, "this one fails"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        team.carry_out(8, &|_| {});
    }

    #[test]
    fn callers_at_once_and_within_each_other_do_not_wait() {
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    in_pieces(10, |_| {
                        in_pieces(10, |piece| {
                            sum.fetch_add(piece, Ordering::Relaxed);
                        });
                    });
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4 * 10 * 45);
    }
}
