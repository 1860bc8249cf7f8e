//! The line to one living worker: numbers orders, writes them one after another, and finds who waits for a reply.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use polder_protocol::work::frame::{decode_head, frame_start, head_bytes, payload_bytes};
use polder_protocol::work::{Answer, Order, Reply, Task};
use tokio::io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};

use super::DeviceError;

/// Orders on their way to the pipe. Those who wait for room are not in it, so a flood waits where it began.
const OUTGOING_ORDERS_MAX: usize = 16;

#[derive(Debug, Clone)]
pub(super) struct Line {
    outgoing: mpsc::Sender<Outgoing>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug)]
struct Outgoing {
    id: u64,
    start: Vec<u8>,
    payload: Bytes,
}

#[derive(Debug, Default)]
struct Waiting {
    ids: u64,
    replies: BTreeMap<u64, oneshot::Sender<(Answer, Bytes)>>,
    closed: Option<String>,
}

impl Line {
    /// A line over two streams, and the future that serves it until one of them ends. It answers with the reason.
    pub(super) fn over(
        input: impl AsyncWrite + Unpin,
        output: impl AsyncRead + Unpin,
    ) -> (Self, impl Future<Output = String>) {
        let (outgoing, orders) = mpsc::channel(OUTGOING_ORDERS_MAX);
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let line = Self {
            outgoing,
            waiting: Arc::clone(&waiting),
        };
        let serving = async move {
            let written = write_orders(orders, input, &waiting);
            let read = read_replies(io::BufReader::new(output), &waiting);
            tokio::select! {
                // A worker that has died is told of by its output first: an error there says more than a broken pipe.
                biased;
                reason = read => reason,
                reason = written => reason,
            }
        };
        (line, serving)
    }

    pub(super) async fn order(&self, task: Task, payload: Bytes) -> Result<(Answer, Bytes), DeviceError> {
        let (reply, replied) = oneshot::channel();
        let id = {
            let mut waiting = lock(&self.waiting);
            if waiting.closed.is_some() {
                return Err(died(&waiting));
            }
            waiting.ids += 1;
            let id = waiting.ids;
            waiting.replies.insert(id, reply);
            id
        };
        let _forget = Forget {
            waiting: &self.waiting,
            id,
        };
        let start = frame_start(&Order { id, task }, payload.len())?;
        let outgoing = Outgoing { id, start, payload };
        if self.outgoing.send(outgoing).await.is_err() {
            return Err(self.died_soon().await);
        }
        match replied.await {
            Ok((Answer::Failed { reason }, _)) => Err(DeviceError::Failed { reason }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(died(&lock(&self.waiting))),
        }
    }

    /// Fails every order under way and all that come later.
    pub(super) fn close(&self, reason: &str) {
        let mut waiting = lock(&self.waiting);
        waiting.closed = Some(reason.to_owned());
        waiting.replies.clear();
    }

    /// The reason of a death whose cause is still being found out.
    async fn died_soon(&self) -> DeviceError {
        let (reply, replied) = oneshot::channel();
        {
            let mut waiting = lock(&self.waiting);
            if waiting.closed.is_none() {
                waiting.ids += 1;
                let id = waiting.ids;
                waiting.replies.insert(id, reply);
            }
        }
        // Nobody answers this one: it ends when the line is closed.
        let _ = replied.await;
        died(&lock(&self.waiting))
    }
}

/// Takes an order back when its caller has gone.
struct Forget<'a> {
    waiting: &'a Mutex<Waiting>,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).replies.remove(&self.id);
    }
}

fn died(waiting: &Waiting) -> DeviceError {
    DeviceError::Died {
        reason: waiting.closed.clone().unwrap_or_else(|| "its pipe closed".to_owned()),
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write_orders(
    mut orders: mpsc::Receiver<Outgoing>,
    mut input: impl AsyncWrite + Unpin,
    waiting: &Mutex<Waiting>,
) -> String {
    while let Some(order) = orders.recv().await {
        if !lock(waiting).replies.contains_key(&order.id) {
            continue; // Taken back.
        }
        let written = async {
            input.write_all(&order.start).await?;
            input.write_all(&order.payload).await?;
            input.flush().await
        };
        if let Err(error) = written.await {
            return format!("its input broke: {error}");
        }
    }
    "nobody needs it".to_owned()
}

async fn read_replies(mut output: impl AsyncRead + Unpin, waiting: &Mutex<Waiting>) -> String {
    loop {
        match read_reply(&mut output).await {
            Ok((reply, payload)) => {
                let waits = lock(waiting).replies.remove(&reply.id);
                if let Some(waits) = waits {
                    // Whoever waited may have gone meanwhile.
                    let _ = waits.send((reply.answer, payload));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return "its output ended".to_owned(),
            Err(error) => return format!("its output broke: {error}"),
        }
    }
}

async fn read_reply(output: &mut (impl AsyncRead + Unpin)) -> io::Result<(Reply, Bytes)> {
    let mut prefix = [0; 4];
    output.read_exact(&mut prefix).await?;
    let mut head = vec![0; head_bytes(prefix).map_err(io::Error::other)?];
    output.read_exact(&mut head).await?;
    let reply = decode_head(&head).map_err(io::Error::other)?;
    let mut prefix = [0; 8];
    output.read_exact(&mut prefix).await?;
    let mut payload = vec![0; payload_bytes(prefix).map_err(io::Error::other)?];
    output.read_exact(&mut payload).await?;
    Ok((reply, payload.into()))
}
