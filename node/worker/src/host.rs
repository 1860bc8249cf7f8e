//! Takes orders from a pipe, hands them to engines, and writes what comes of them.

use std::any::Any;
use std::collections::VecDeque;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use polder_protocol::work::frame::{FrameError, decode_head, frame_start, head_bytes, payload_bytes};
use polder_protocol::work::{Answer, Order, Reply, Task};
use thiserror::Error;

/// Orders that wait for an engine. The pipe holds back the rest.
const WAITING_ORDERS_MAX: usize = 64;

/// An answer and its payload, or a sentence that says what happened, to what.
pub(crate) type Performed = Result<(Answer, Vec<u8>), String>;

/// An order that came, with its payload.
pub(crate) type Waiting = (Order, Vec<u8>);

/// Carries out orders, one after another or several at once.
pub trait Engine {
    /// Carries out one order with its payload; answers with an answer and its payload.
    ///
    /// # Errors
    ///
    /// A sentence that says what happened, to what; it becomes [`Answer::Failed`], and nothing has changed.
    fn perform(&mut self, task: Task, payload: Vec<u8>) -> Result<(Answer, Vec<u8>), String>;

    /// Which of the orders that wait, oldest first, are carried out next, in one go: indices, ascending, at least one.
    fn next(&self, _waiting: &VecDeque<(Order, Vec<u8>)>) -> Vec<usize> {
        vec![0]
    }

    /// Carries out what [`Engine::next`] chose, where it is more than one. One answer for each, in order.
    fn perform_together(&mut self, orders: Vec<(Task, Vec<u8>)>) -> Vec<Result<(Answer, Vec<u8>), String>> {
        let each = |(task, payload)| self.perform(task, payload);
        orders.into_iter().map(each).collect()
    }

    /// Hears that [`Engine::perform`] panicked.
    fn panicked(&mut self, _message: &str) {}

    /// Called when an answer is on its way. An engine that cannot go on ends the process here.
    fn answered(&mut self) {}
}

/// Why a worker stopped reading.
#[derive(Debug, Error)]
pub enum HostError {
    /// The pipe broke.
    #[error("the orders' pipe broke")]
    Pipe(#[from] io::Error),
    /// What came is no order.
    #[error("what came over the orders' pipe is no order")]
    Frame(#[from] FrameError),
    /// An engine's thread could not be started or has ended.
    #[error("the {name} thread has ended")]
    Thread {
        /// Its name.
        name: &'static str,
    },
}

/// Serves orders from `input` until it ends. Orders that are then still under way are not waited for.
///
/// Each engine is made on its own thread: `compute` takes orders for the device, `text` those of [`Task::is_text`].
///
/// # Errors
///
/// [`HostError`], unless `input` ends between two orders.
pub fn host<C: Engine, T: Engine>(
    input: impl Read,
    output: impl Write + Send + 'static,
    compute: impl FnOnce() -> C + Send + 'static,
    text: impl FnOnce() -> T + Send + 'static,
) -> Result<(), HostError> {
    let output = Arc::new(Mutex::new(BufWriter::new(output)));
    let compute = engine_thread("compute", compute, Arc::clone(&output))?;
    let text = engine_thread("text", text, output)?;
    let mut input = BufReader::new(input);
    while let Some((order, payload)) = read_order(&mut input)? {
        let (engine, name) = if order.task.is_text() {
            (&text, "text")
        } else {
            (&compute, "compute")
        };
        engine.send((order, payload)).map_err(|_| HostError::Thread { name })?;
    }
    Ok(())
}

type Orders = SyncSender<Waiting>;

fn engine_thread<E: Engine>(
    name: &'static str,
    make: impl FnOnce() -> E + Send + 'static,
    output: Arc<Mutex<impl Write + Send + 'static>>,
) -> Result<Orders, HostError> {
    let (send, orders) = sync_channel(WAITING_ORDERS_MAX);
    thread::Builder::new()
        .name(name.to_owned())
        // Models are built and stepped by deep calls.
        .stack_size(16 << 20)
        .spawn(move || serve(&mut make(), &orders, &output))
        .map_err(|_| HostError::Thread { name })?;
    Ok(send)
}

fn serve(engine: &mut impl Engine, orders: &Receiver<Waiting>, output: &Mutex<impl Write>) {
    let mut waiting = VecDeque::new();
    while take_in(orders, &mut waiting) {
        let places = engine.next(&waiting);
        let (ids, chosen) = take_out(&mut waiting, &places);
        for (id, performed) in ids.iter().zip(carry_out(engine, chosen)) {
            let (answer, payload) = performed.unwrap_or_else(|reason| (Answer::Failed { reason }, Vec::new()));
            if let Err(error) = write_reply(output, *id, answer, &payload) {
                tracing::error!(%error, "cannot answer");
                return;
            }
        }
        engine.answered();
    }
}

/// Waits for an order where none is there, and takes those that have come meanwhile. False where no more will.
fn take_in(orders: &Receiver<Waiting>, waiting: &mut VecDeque<Waiting>) -> bool {
    if waiting.is_empty() {
        match orders.recv() {
            Ok(order) => waiting.push_back(order),
            Err(_) => return false,
        }
    }
    while waiting.len() < WAITING_ORDERS_MAX {
        match orders.try_recv() {
            Ok(order) => waiting.push_back(order),
            // What came before the end is still carried out.
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
        }
    }
    true
}

/// The orders at some places, or the oldest where there are none.
fn take_out(waiting: &mut VecDeque<Waiting>, places: &[usize]) -> (Vec<u64>, Vec<(Task, Vec<u8>)>) {
    let places = if places.is_empty() { &[0] } else { places };
    let mut chosen: Vec<Waiting> = places.iter().rev().filter_map(|place| waiting.remove(*place)).collect();
    chosen.reverse();
    let orders = chosen.into_iter();
    orders.map(|(order, payload)| (order.id, (order.task, payload))).unzip()
}

fn carry_out(engine: &mut impl Engine, mut orders: Vec<(Task, Vec<u8>)>) -> Vec<Performed> {
    let count = orders.len();
    // An engine that panicked may hold half a result, but whoever asked learns of it and starts that stage anew. One
    // whose device cannot go on ends the process once it has answered.
    let performed = catch_unwind(AssertUnwindSafe(|| match (orders.pop(), orders.is_empty()) {
        (Some((task, payload)), true) => vec![engine.perform(task, payload)],
        (last, _) => {
            orders.extend(last);
            engine.perform_together(orders)
        }
    }));
    performed.unwrap_or_else(|panic| {
        let message = message(&*panic);
        engine.panicked(message);
        vec![Err(format!("the worker panicked: {message}")); count]
    })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

fn write_reply(output: &Mutex<impl Write>, id: u64, answer: Answer, payload: &[u8]) -> Result<(), HostError> {
    let (start, payload) = match frame_start(&Reply { id, answer }, payload.len()) {
        Ok(start) => (start, payload),
        Err(error) => {
            let reason = error.to_string();
            let answer = Answer::Failed { reason };
            (frame_start(&Reply { id, answer }, 0)?, &[][..])
        }
    };
    let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
    output.write_all(&start)?;
    output.write_all(payload)?;
    output.flush()?;
    Ok(())
}

/// The next order, or `None` where the input ends before one.
fn read_order(input: &mut impl Read) -> Result<Option<(Order, Vec<u8>)>, HostError> {
    let mut prefix = [0; 4];
    let (first, rest) = prefix.split_at_mut(1);
    loop {
        match input.read(first) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    input.read_exact(rest)?;
    let mut head = vec![0; head_bytes(prefix)?];
    input.read_exact(&mut head)?;
    let order = decode_head(&head)?;
    let mut prefix = [0; 8];
    input.read_exact(&mut prefix)?;
    let mut payload = vec![0; payload_bytes(prefix)?];
    input.read_exact(&mut payload)?;
    Ok(Some((order, payload)))
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, PipeReader, pipe};

    use super::*;

    struct Echo;

    impl Engine for Echo {
        fn perform(&mut self, task: Task, payload: Vec<u8>) -> Result<(Answer, Vec<u8>), String> {
            match task {
                Task::Hello => Ok((Answer::Done, payload)),
                Task::Unload { stage: 13 } => panic!("stage 13"),
                Task::Decode { .. } => Ok((
                    Answer::Text {
                        text: "text".to_owned(),
                    },
                    Vec::new(),
                )),
                task => Err(format!("cannot {task:?}")),
            }
        }
    }

    #[test]
    fn orders_are_answered_in_order() {
        let mut output = run([(1, Task::Hello), (2, Task::Unload { stage: 1 }), (3, Task::Hello)]);
        assert_eq!(reply(&mut output), (1, Answer::Done, b"payload".to_vec()));
        let (id, answer, _) = reply(&mut output);
        assert_eq!(id, 2);
        assert!(matches!(answer, Answer::Failed { reason } if reason.contains("Unload")));
        assert_eq!(reply(&mut output), (3, Answer::Done, b"payload".to_vec()));
    }

    #[test]
    fn a_panic_becomes_an_answer_and_the_next_order_is_served() {
        let mut output = run([(1, Task::Unload { stage: 13 }), (2, Task::Hello)]);
        let (_, answer, _) = reply(&mut output);
        assert_eq!(
            answer,
            Answer::Failed {
                reason: "the worker panicked: stage 13".to_owned()
            }
        );
        assert_eq!(reply(&mut output).0, 2);
    }

    #[test]
    fn an_engine_hears_of_its_panic_before_the_answer_and_may_end_after_it() {
        struct Brittle(std::sync::mpsc::Sender<String>);

        impl Engine for Brittle {
            fn perform(&mut self, _: Task, _: Vec<u8>) -> Result<(Answer, Vec<u8>), String> {
                panic!("the driver is gone")
            }

            fn panicked(&mut self, message: &str) {
                self.0.send(message.to_owned()).unwrap();
            }

            fn answered(&mut self) {
                self.0.send("answered".to_owned()).unwrap();
            }
        }

        let (heard, hears) = std::sync::mpsc::channel();
        let (mut output, end) = pipe().unwrap();
        let task = Task::Hello;
        let input = frame_start(&Order { id: 1, task }, 0).unwrap();
        host(Cursor::new(input), end, move || Brittle(heard), || Echo).unwrap();
        assert!(matches!(reply(&mut output).1, Answer::Failed { .. }));
        let heard: Vec<String> = hears.iter().collect();
        assert_eq!(heard, ["the driver is gone", "answered"]);
    }

    #[test]
    fn half_an_order_is_an_error_and_none_is_not() {
        let engines = || (|| Echo, || Echo);
        let (compute, text) = engines();
        assert!(host(Cursor::new(vec![1, 0, 0]), Vec::new(), compute, text).is_err());
        let (compute, text) = engines();
        assert!(host(Cursor::new(vec![]), Vec::new(), compute, text).is_ok());
    }

    fn run<const N: usize>(tasks: [(u64, Task); N]) -> PipeReader {
        let (output, end) = pipe().unwrap();
        let mut input = Vec::new();
        for (id, task) in tasks {
            input.extend(frame_start(&Order { id, task }, 7).unwrap());
            input.extend(b"payload");
        }
        host(Cursor::new(input), end, || Echo, || Echo).unwrap();
        output
    }

    fn reply(output: &mut PipeReader) -> (u64, Answer, Vec<u8>) {
        let mut prefix = [0; 4];
        output.read_exact(&mut prefix).unwrap();
        let mut head = vec![0; head_bytes(prefix).unwrap()];
        output.read_exact(&mut head).unwrap();
        let Reply { id, answer } = decode_head(&head).unwrap();
        let mut prefix = [0; 8];
        output.read_exact(&mut prefix).unwrap();
        let mut payload = vec![0; payload_bytes(prefix).unwrap()];
        output.read_exact(&mut payload).unwrap();
        (id, answer, payload)
    }
}
