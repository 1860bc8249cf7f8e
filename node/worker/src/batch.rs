//! Which waiting orders the device carries out in one step: continuous batching.
//!
//! Sessions that decode while another one computes wait together, and are computed together: their weights are read
//! once. A piece of a prompt goes in the same step, so nobody who decodes waits for more than one piece (Yu et al. 2022,
//! Orca; Agrawal et al. 2023, Sarathi).

use std::collections::{BTreeSet, VecDeque};

use polder_kernels::stage::BATCH_ROWS_MAX;
use polder_protocol::work::{Order, Task};

/// A forward that can go with others.
struct Rows {
    stage: u32,
    session: u64,
    rows: usize,
}

/// The oldest order, and of the forwards that follow it without anything else between those of the same stage, one for
/// each session, the shortest first, as many as a step holds. Indices, ascending.
///
/// `width` tells how wide the activations of a stage are that takes them.
pub(crate) fn together(waiting: &VecDeque<(Order, Vec<u8>)>, width: impl Fn(u32) -> Option<usize>) -> Vec<usize> {
    let rows_of = |(order, payload): &(Order, Vec<u8>)| rows(&order.task, payload.len(), &width);
    let Some(first) = waiting.front().and_then(rows_of) else {
        return vec![0];
    };
    let mut sessions = BTreeSet::from([first.session]);
    let mut others = Vec::new();
    for (index, order) in waiting.iter().enumerate().skip(1) {
        // Whatever is no forward may change what a later forward meets.
        let Some(next) = rows_of(order) else { break };
        // A session's orders stay in order: only the first of them can be taken.
        if sessions.insert(next.session) && next.stage == first.stage {
            others.push((next.rows, index));
        }
    }
    others.sort_unstable();
    let mut rows = first.rows;
    let fitting = others.into_iter().take_while(|(more, _)| {
        rows += more;
        rows <= BATCH_ROWS_MAX
    });
    let mut chosen: Vec<usize> = fitting.map(|(_, index)| index).chain([0]).collect();
    chosen.sort_unstable();
    chosen
}

/// `None` for whatever is carried out by itself.
fn rows(task: &Task, payload_bytes: usize, width: impl Fn(u32) -> Option<usize>) -> Option<Rows> {
    let Task::Forward {
        stage,
        session,
        tokens,
        sample: Some(_),
        ..
    } = task
    else {
        return None;
    };
    let rows = match tokens.len() {
        0 => payload_bytes.checked_div(width(*stage)?.checked_mul(4)?)?,
        tokens => tokens,
    };
    Some(Rows {
        stage: *stage,
        session: *session,
        rows,
    })
}

#[cfg(test)]
mod tests {
    use polder_protocol::work::{Sampling, Written};

    use super::*;

    fn forward(stage: u32, session: u64, rows: usize) -> Task {
        Task::Forward {
            stage,
            session,
            position: 0,
            tokens: vec![1; rows],
            sample: Some(Sampling::GREEDY),
            written: Written::default(),
        }
    }

    fn chosen(tasks: Vec<Task>) -> Vec<usize> {
        let orders = (0..).zip(tasks).map(|(id, task)| (Order { id, task }, Vec::new()));
        together(&orders.collect(), |_| Some(8))
    }

    #[test]
    fn sessions_that_wait_go_together() {
        assert_eq!(
            chosen(vec![forward(1, 1, 1), forward(1, 2, 1), forward(1, 3, 1)]),
            [0, 1, 2]
        );
        assert_eq!(chosen(vec![forward(1, 1, 1)]), [0]);
        assert_eq!(chosen(vec![Task::Hello, forward(1, 1, 1)]), [0]);
    }

    #[test]
    fn who_decodes_goes_with_a_piece_of_a_prompt_and_before_another() {
        let piece = |session| forward(1, session, 256);
        let one = |session| forward(1, session, 1);
        assert_eq!(chosen(vec![piece(1), piece(2), one(3), one(4)]), [0, 2, 3]);
        assert_eq!(chosen(vec![one(3), piece(2), one(4)]), [0, 1, 2]);
        // The oldest is never left behind.
        assert_eq!(chosen(vec![forward(1, 1, 5_000), one(2)]), [0]);
    }

    #[test]
    fn a_session_keeps_its_order_and_other_orders_their_place() {
        let one = |session| forward(1, session, 1);
        assert_eq!(chosen(vec![one(1), one(1), one(2)]), [0, 2]);
        let close = Task::CloseSession { stage: 1, session: 2 };
        assert_eq!(chosen(vec![one(1), close, one(2), one(3)]), [0]);
        assert_eq!(chosen(vec![one(1), forward(2, 7, 1), one(7), one(3)]), [0, 3]);
    }

    #[test]
    fn activations_are_counted_by_their_width() {
        let hidden = |id, session, rows: usize| {
            let task = forward(1, session, 0);
            (Order { id, task }, vec![0; rows * 32])
        };
        let waiting = VecDeque::from([hidden(1, 1, 256), hidden(2, 2, 256), hidden(3, 3, 2)]);
        assert_eq!(together(&waiting, |_| Some(8)), [0, 2]);
        // A stage that is not there is asked by itself, and says so.
        assert_eq!(together(&waiting, |_| None), [0]);
    }
}
