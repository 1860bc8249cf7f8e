//! Attention by kernels of our own, as an operation of a graph: no matrix of scores is kept, nor made.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Cube};
use burn::tensor::Tensor;

use crate::device::Device;
use crate::device::cube::{Attended, CubeError, Cubes, Floats, Primitive, SequenceAttention};
use crate::train::TrainError;

/// The kernels of a device that has them.
#[derive(Debug, Clone)]
pub(in crate::train) struct Attending(Cubes);

impl Attending {
    pub(in crate::train) fn new(device: &Device) -> Option<Self> {
        Cubes::of(device).map(Self).ok()
    }

    /// Whether heads of these widths are attended from here.
    pub(in crate::train) fn covers(&self, width: usize, value: usize) -> bool {
        self.0.attends_sequences(width, value)
    }

    /// As the tensors' [`attend`](super::attention::attend), with a window in place of a mask.
    pub(super) fn attend(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        scale: f32,
        window: Option<usize>,
    ) -> Result<Tensor<2>, TrainError> {
        let ([batch, seq, heads, width], [_, _, kv_heads, value]) = (q.dims(), v.dims());
        let shape = SequenceAttention {
            batch,
            seq,
            heads,
            kv_heads,
            width,
            value,
            window,
            scale,
        };
        let flat = |x: Tensor<4>| {
            let elements = x.dims().iter().product::<usize>();
            x.reshape([elements])
        };
        let [q, k, v] = [flat(q), flat(k), flat(v)];
        let out = match q.is_autodiff() {
            true => self.tracked(shape, [q, k, v])?,
            false => {
                let [q, k, v] = [plain(q)?, plain(k)?, plain(v)?];
                let operands = [self.floats(&q)?, self.floats(&k)?, self.floats(&v)?];
                let attended = self.forward(&shape, &operands)?;
                Tensor::<1>::from_primitive::<Cube>(self.0.to_primitive(&attended.out, &q))
            }
        };
        Ok(out.reshape([batch * seq, heads * value]))
    }

    fn tracked(&self, shape: SequenceAttention, operands: [Tensor<1>; 3]) -> Result<Tensor<1>, TrainError> {
        let [q, k, v] = operands.map(|x| x.try_into_primitive::<Autodiff<Cube>>());
        let ((q, q_node), (k, k_node), (v, v_node)) = (
            q.map_err(other)?.into_parts(),
            k.map_err(other)?.into_parts(),
            v.map_err(other)?.into_parts(),
        );
        let operands = [self.floats(&q)?, self.floats(&k)?, self.floats(&v)?];
        let attended = self.forward(&shape, &operands)?;
        let out = self.0.to_primitive(&attended.out, &q);
        let prepared = AttentionBackward
            .prepare::<NoCheckpointing>([q_node, k_node, v_node])
            .compute_bound()
            .stateful();
        let out = match prepared {
            OpsKind::Tracked(prepared) => {
                let state = State {
                    cubes: self.0.clone(),
                    shape,
                    operands,
                    attended,
                };
                prepared.finish(state, out)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(out),
        };
        Ok(Tensor::from_primitive::<Autodiff<Cube>>(out))
    }

    fn floats(&self, primitive: &Primitive) -> Result<Floats, TrainError> {
        self.0.of_primitive(primitive).map_err(failed)
    }

    fn forward(&self, shape: &SequenceAttention, [q, k, v]: &[Floats; 3]) -> Result<Attended, TrainError> {
        self.0.attend_sequences(shape, q, k, v).map_err(failed)
    }
}

/// What the backward needs.
#[derive(Debug, Clone)]
struct State {
    cubes: Cubes,
    shape: SequenceAttention,
    operands: [Floats; 3],
    attended: Attended,
}

#[derive(Debug)]
struct AttentionBackward;

impl Backward<Cube, 3> for AttentionBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let State {
            cubes,
            shape,
            operands: [q, k, v],
            attended,
        } = ops.state;
        let d_out = gradients.consume::<Cube>(&ops.node);
        let made = cubes
            .of_primitive(&d_out)
            .or_else(|_| cubes.of_tensor(&in_a_row(d_out.clone())))
            .and_then(|d_out| cubes.attend_sequences_backward(&shape, (&q, &k, &v), &attended, &d_out));
        // The forward has had all of this, and burn has no way to say that a backward failed.
        let made = made.unwrap_or_else(|error| panic!("attention's backward: {error}"));
        for (node, gradient) in ops.parents.into_iter().zip(&made) {
            if let Some(node) = node {
                gradients.register::<Cube>(node.id, cubes.to_primitive(gradient, &d_out));
            }
        }
    }
}

/// The same numbers without gaps, such as those that a sum's gradient has.
fn in_a_row(x: Primitive) -> Tensor<1> {
    let x = Tensor::<1>::from_primitive::<Cube>(x);
    x.zeros_like() + x
}

fn plain(x: Tensor<1>) -> Result<Primitive, TrainError> {
    x.try_into_primitive::<Cube>().map_err(other)
}

fn other(error: impl std::fmt::Debug) -> TrainError {
    TrainError::Device {
        reason: format!("a tensor is not where it was put: {error:?}"),
    }
}

fn failed(error: CubeError) -> TrainError {
    TrainError::Device {
        reason: error.to_string(),
    }
}
