//! Processes of a simulation: tasks that run, stand still or die together, all on one thread.
//!
//! Everything that a node starts (see [`crate::task`]) belongs to the process that started it. A
//! process that is paused is polled no more until it goes on, while time does; one that is killed
//! loses its tasks at the next moment when the runtime takes them up, and none of them runs again.
//!
//! Blocking work is a coroutine with a stack of its own: it runs until it ends or waits, and nothing
//! else runs meanwhile. So a cluster is one thread.
//!
//! Whose turn it is among tasks that can go on, is decided by the seed ([`schedule`]), not by the order
//! in which the runtime wakes them: that order is not the same every time.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

/// Bytes of a coroutine's stack.
const STACK: usize = 1 << 20;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Process>>> = const { RefCell::new(None) };
    /// The way back from the coroutine that runs.
    static YIELDER: Cell<*const Yielder<(), ()>> = const { Cell::new(std::ptr::null()) };
    /// Wakes the task that the running coroutine belongs to.
    static WAKER: RefCell<Option<Waker>> = const { RefCell::new(None) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
    static TURNS: RefCell<Option<Turns>> = const { RefCell::new(None) };
    /// When the simulation on this thread began.
    static BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Who waits for a turn, by the order in which tasks were made.
struct Turns {
    rng: StdRng,
    waiting: BTreeMap<u64, Waker>,
    /// The task whose turn it is.
    turn: Option<u64>,
    scheduler: Option<Waker>,
    tasks: u64,
}

impl Turns {
    fn wake_scheduler(&mut self) {
        if let Some(waker) = self.scheduler.take() {
            waker.wake();
        }
    }
}

/// Gives turns, one at a time, to tasks that can go on; for ever.
pub(crate) async fn schedule() {
    loop {
        // Whoever was woken together is there before one is chosen.
        let mut before = usize::MAX;
        loop {
            tokio::task::yield_now().await;
            let now = TURNS.with_borrow(|t| t.as_ref().map_or(0, |t| t.waiting.len()));
            if now == before {
                break;
            }
            before = now;
        }
        let chosen = TURNS.with_borrow_mut(|turns| {
            let turns = turns.as_mut()?;
            let n = turns.waiting.len();
            if n == 0 {
                return None;
            }
            let nth = turns.rng.random_range(0..n);
            let id = *turns.waiting.keys().nth(nth)?;
            turns.turn = Some(id);
            turns.waiting.remove(&id)
        });
        if let Some(waker) = chosen {
            waker.wake();
        }
        // Until the turn is over, or somebody waits for one.
        std::future::poll_fn(|cx| {
            TURNS.with_borrow_mut(|turns| {
                let Some(turns) = turns else {
                    return Poll::Pending;
                };
                if turns.turn.is_none() && !turns.waiting.is_empty() {
                    return Poll::Ready(());
                }
                turns.scheduler = Some(cx.waker().clone());
                Poll::Pending
            })
        })
        .await;
    }
}

/// Starts a task of the simulation itself, of no process.
pub(crate) fn spawn_free<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(Gated::new(None, future))
}

/// One life of a node.
#[derive(Default)]
pub(crate) struct Process {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    paused: bool,
    dead: bool,
    tasks: Vec<AbortHandle>,
    /// Tasks that wait for the process to go on.
    parked: Vec<Waker>,
    /// Why a task of it panicked.
    panic: Option<String>,
}

/// The process whose task runs now; `None`: this is no simulation, or it is the simulation itself.
pub(crate) fn current() -> Option<Arc<Process>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Says that the simulation of this thread begins.
pub(crate) fn begin(seed: u64) {
    BEGAN.set(Some(Instant::now()));
    TURNS.set(Some(Turns {
        rng: StdRng::seed_from_u64(!seed),
        waiting: BTreeMap::new(),
        turn: None,
        scheduler: None,
        tasks: 0,
    }));
    tokio::spawn(schedule());
}

/// Says that it is over.
pub(crate) fn end() {
    BEGAN.set(None);
    TURNS.take();
    STACKS.take();
}

/// The simulation's clock of the machine; `None`: this is no simulation.
pub(crate) fn boot_time() -> Option<u64> {
    let began = BEGAN.get()?;
    let nanos = Instant::now().duration_since(began).as_nanos() as u64;
    Some(nanos + 1_000_000_000)
}

/// Whether this is a coroutine.
pub(crate) fn in_coroutine() -> bool {
    !YIELDER.get().is_null()
}

/// Whether this is a coroutine of an application, not of a node.
pub(crate) fn in_client() -> bool {
    in_coroutine() && current().is_none()
}

/// Gives way, in a coroutine, until the future is done.
pub(crate) fn wait<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let yielder = YIELDER.get();
    assert!(!yielder.is_null(), "only a coroutine waits");
    loop {
        let waker = WAKER.with_borrow(Clone::clone);
        let waker = waker.expect("a coroutine is resumed with a waker");
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        // SAFETY: the yielder is that of the coroutine that runs, as `Work::poll` keeps it, and so
        // lives on its stack until it ends.
        unsafe { &*yielder }.suspend(());
    }
}

/// Work as a future that is done when the work is.
pub(crate) fn coroutine<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> impl Future<Output = T> + Send {
    Work::Waiting(Box::new(work))
}

type Run<T> = Coroutine<(), (), T>;

enum Work<T> {
    Waiting(Box<dyn FnOnce() -> T + Send>),
    Running(Run<T>, *const Yielder<(), ()>),
    Done,
}

// SAFETY: a simulation's runtime has one thread, on which its tasks are made, polled and dropped.
unsafe impl<T> Send for Work<T> {}

impl<T> Unpin for Work<T> {}

impl<T: 'static> Work<T> {
    fn start(work: Box<dyn FnOnce() -> T + Send>) -> Work<T> {
        let stack = STACKS.with_borrow_mut(Vec::pop);
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK).expect("memory for a stack"));
        let run = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            YIELDER.set(yielder);
            work()
        });
        Work::Running(run, std::ptr::null())
    }
}

impl<T: 'static> Future for Work<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        if let Work::Waiting(_) = this {
            let Work::Waiting(work) = std::mem::replace(this, Work::Done) else {
                unreachable!("looked at above")
            };
            *this = Work::start(work);
        }
        let Work::Running(run, yielder) = this else {
            panic!("polled after it was done");
        };
        let outer = (YIELDER.get(), WAKER.take());
        assert!(outer.0.is_null(), "a coroutine within another");
        YIELDER.set(*yielder);
        WAKER.set(Some(cx.waker().clone()));
        let resumed = catch_unwind(AssertUnwindSafe(|| run.resume(())));
        *yielder = YIELDER.replace(outer.0);
        WAKER.set(outer.1);
        match resumed {
            Ok(CoroutineResult::Yield(())) => Poll::Pending,
            Ok(CoroutineResult::Return(value)) => {
                if let Work::Running(run, _) = std::mem::replace(this, Work::Done) {
                    STACKS.with_borrow_mut(|s| s.push(run.into_stack()));
                }
                Poll::Ready(value)
            }
            Err(panic) => {
                *this = Work::Done;
                resume_unwind(panic)
            }
        }
    }
}

impl Process {
    /// Starts a task of this process.
    pub(crate) fn spawn<F>(self: &Arc<Self>, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let task = tokio::spawn(Gated::new(Some(self.clone()), future));
        let mut state = self.state.lock();
        match state.dead {
            true => task.abort(),
            false => {
                state.tasks.retain(|t| !t.is_finished());
                state.tasks.push(task.abort_handle());
            }
        }
        task
    }

    /// Runs this as the process would.
    pub(crate) fn enter<T>(self: &Arc<Self>, run: impl FnOnce() -> T) -> T {
        let outer = CURRENT.replace(Some(self.clone()));
        let result = run();
        CURRENT.set(outer);
        result
    }

    /// Stands still.
    pub(crate) fn pause(&self) {
        self.state.lock().paused = true;
    }

    /// Goes on.
    pub(crate) fn go_on(&self) {
        let mut state = self.state.lock();
        state.paused = false;
        let parked = std::mem::take(&mut state.parked);
        drop(state);
        parked.into_iter().for_each(Waker::wake);
    }

    /// Whether it stands still.
    pub(crate) fn is_paused(&self) -> bool {
        self.state.lock().paused
    }

    /// Whether it was killed.
    pub(crate) fn is_dead(&self) -> bool {
        self.state.lock().dead
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        let mut state = self.state.lock();
        state.dead = true;
        let tasks = std::mem::take(&mut state.tasks);
        drop(state);
        tasks.iter().for_each(AbortHandle::abort);
        self.go_on();
    }

    /// Returns when it does not stand still, or is dead.
    pub(crate) async fn running(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.paused && !state.dead {
                state.parked.push(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }

    /// Why a task of it panicked, if one did.
    pub(crate) fn panic(&self) -> Option<String> {
        self.state.lock().panic.clone()
    }
}

/// A task that runs only when it is its turn, and while its process runs.
struct Gated<F> {
    id: u64,
    process: Option<Arc<Process>>,
    future: Option<Pin<Box<F>>>,
}

impl<F> Gated<F> {
    fn new(process: Option<Arc<Process>>, future: F) -> Gated<F> {
        let id = TURNS.with_borrow_mut(|turns| {
            turns.as_mut().map_or(0, |turns| {
                turns.tasks += 1;
                turns.tasks
            })
        });
        Gated {
            id,
            process,
            future: Some(Box::pin(future)),
        }
    }

    /// Whether it is its turn, or there are none; else it waits for it.
    fn is_its_turn(&self, waker: &Waker) -> bool {
        TURNS.with_borrow_mut(|turns| {
            let Some(turns) = turns.as_mut() else {
                return true;
            };
            if turns.turn == Some(self.id) {
                return true;
            }
            turns.waiting.insert(self.id, waker.clone());
            if turns.turn.is_none() {
                turns.wake_scheduler();
            }
            false
        })
    }

    fn end_turn(&self) {
        TURNS.with_borrow_mut(|turns| {
            if let Some(turns) = turns.as_mut()
                && turns.turn == Some(self.id)
            {
                turns.turn = None;
                turns.wake_scheduler();
            }
        });
    }

    /// Whether its process stands still; it waits for that to be over.
    fn is_held(&self, waker: &Waker) -> bool {
        let Some(process) = &self.process else {
            return false;
        };
        let mut state = process.state.lock();
        let held = state.paused || state.dead;
        if held {
            state.parked.push(waker.clone());
        }
        held
    }
}

impl<F: Future> Future for Gated<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.is_held(cx.waker()) {
            self.end_turn();
            return Poll::Pending;
        }
        if !self.is_its_turn(cx.waker()) {
            return Poll::Pending;
        }
        let process = self.process.clone();
        let future = self.future.as_mut().expect("not yet done");
        let outer = CURRENT.replace(process.clone());
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        CURRENT.set(outer);
        self.end_turn();
        match (polled, process) {
            (Ok(polled), _) => polled,
            (Err(panic), None) => resume_unwind(panic),
            (Err(panic), Some(process)) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                process.state.lock().panic = Some(text.unwrap_or_else(|| "a panic".into()));
                resume_unwind(panic)
            }
        }
    }
}

impl<F> Drop for Gated<F> {
    fn drop(&mut self) {
        let future = self.future.take();
        let outer = CURRENT.replace(self.process.clone());
        drop(future);
        CURRENT.set(outer);
        // The simulation's own may be over by now.
        let _ = TURNS.try_with(|turns| {
            if let Ok(mut turns) = turns.try_borrow_mut()
                && let Some(turns) = turns.as_mut()
            {
                turns.waiting.remove(&self.id);
            }
        });
        self.end_turn();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_gives_way_while_it_waits_and_goes_with_its_process() {
        let process = Arc::new(Process::default());
        let (tx, mut rx) = tokio::sync::mpsc::channel::<u32>(1);
        let work = process.enter(|| {
            crate::task::blocking(move || {
                crate::clock::pause(Duration::from_secs(5));
                let first = crate::task::wait(rx.recv());
                (first, crate::task::wait(rx.recv()))
            })
        });
        let began = Instant::now();
        tx.send(1).await.unwrap();
        tokio::task::yield_now().await;
        process.pause();
        tokio::time::sleep(Duration::from_secs(60)).await;
        tx.try_send(2).unwrap_err();
        process.go_on();
        drop(tx);
        assert_eq!(work.await.unwrap(), (Some(1), None));
        assert!((60..66).contains(&began.elapsed().as_secs()));

        let held = Arc::new(());
        let kept = held.clone();
        let work = process.enter(|| {
            crate::task::blocking(move || {
                let _kept = kept;
                crate::task::wait(std::future::pending::<()>());
            })
        });
        tokio::task::yield_now().await;
        process.kill();
        assert!(work.await.unwrap_err().is_cancelled());
        assert_eq!(Arc::strong_count(&held), 1, "its stack was unwound");
    }
}
