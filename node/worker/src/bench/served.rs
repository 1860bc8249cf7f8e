//! Sessions that decode beside each other through a worker's pipes, as a node's seats ask: one order of each at a time.

use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::thread;
use std::time::Instant;

use polder_kernels::stage::ServeStage;
use polder_protocol::work::frame::{decode_head, frame_start, head_bytes, payload_bytes};
use polder_protocol::work::{Answer, Order, Reply, Sampling, Task, Written};

use super::{BenchError, PROMPT_TOKENS, Plan, prompt};
use crate::compute::Compute;
use crate::host::host;
use crate::words::Words;

/// Tokens a second of `plan.sessions` sessions together.
pub(super) fn served(stage: ServeStage, plan: Plan) -> Result<f64, BenchError> {
    let prompts = prompt(&stage, PROMPT_TOKENS + plan.sessions);
    let (orders, to_worker) = pipe()?;
    let (from_worker, replies) = pipe()?;
    // It ends with the orders.
    let worker = thread::spawn(move || host(orders, replies, move || Compute::holding(stage), Words::default));
    let measured = Asking { to_worker, from_worker }.ask(&prompts, plan);
    let ended = worker.join();
    match (measured, ended) {
        (Ok(speed), Ok(Ok(()))) => Ok(speed),
        (Err(error), _) => Err(error),
        (Ok(_), _) => Err(BenchError::Worker {
            reason: "it ended early".to_owned(),
        }),
    }
}

struct Asking {
    to_worker: PipeWriter,
    from_worker: PipeReader,
}

impl Asking {
    fn ask(mut self, prompts: &[u32], plan: Plan) -> Result<f64, BenchError> {
        let sessions = u64::from(plan.sessions);
        for session in 0..sessions {
            // One token more than is counted: time begins with the first.
            let context_tokens_max = PROMPT_TOKENS + plan.decode_tokens + 1;
            self.order(
                session,
                Task::OpenSession {
                    stage: Compute::HELD,
                    session,
                    context_tokens_max,
                    earlier: None,
                },
            )?;
            self.answer()?;
        }
        let mut began = None;
        for (session, prompt) in (0..sessions).zip(prompts.windows(PROMPT_TOKENS as usize)) {
            self.order(session, forward(session, 0, prompt.to_vec()))?;
        }
        let mut reached = vec![0; prompts.len()];
        let mut waiting = sessions;
        while waiting > 0 {
            let (session, answer) = self.answer()?;
            let Answer::Sampled { chosen, .. } = answer else {
                return Err(BenchError::Worker {
                    reason: format!("it answered {answer:?}"),
                });
            };
            // All have taken their prompts in when the first of them has decoded a token.
            let generated = reached.get_mut(session as usize).ok_or(BenchError::NoLogits)?;
            let position = PROMPT_TOKENS + *generated;
            if *generated == 1 {
                began.get_or_insert_with(Instant::now);
            }
            if *generated > plan.decode_tokens {
                waiting -= 1;
                continue;
            }
            *generated += 1;
            self.order(session, forward(session, position, vec![chosen.token]))?;
        }
        let seconds = began.ok_or(BenchError::NoLogits)?.elapsed().as_secs_f64();
        Ok(f64::from(plan.decode_tokens) * f64::from(plan.sessions) / seconds)
    }

    fn order(&mut self, id: u64, task: Task) -> Result<(), BenchError> {
        let start = frame_start(&Order { id, task }, 0).map_err(std::io::Error::other)?;
        Ok(self.to_worker.write_all(&start)?)
    }

    fn answer(&mut self) -> Result<(u64, Answer), BenchError> {
        let mut prefix = [0; 4];
        self.from_worker.read_exact(&mut prefix)?;
        let mut head = vec![0; head_bytes(prefix).map_err(std::io::Error::other)?];
        self.from_worker.read_exact(&mut head)?;
        let Reply { id, answer } = decode_head(&head).map_err(std::io::Error::other)?;
        let mut prefix = [0; 8];
        self.from_worker.read_exact(&mut prefix)?;
        let mut payload = vec![0; payload_bytes(prefix).map_err(std::io::Error::other)?];
        self.from_worker.read_exact(&mut payload)?;
        Ok((id, answer))
    }
}

fn forward(session: u64, position: u32, tokens: Vec<u32>) -> Task {
    Task::Forward {
        stage: Compute::HELD,
        session,
        position,
        tokens,
        sample: Some(Sampling::GREEDY),
        written: Written::default(),
    }
}
