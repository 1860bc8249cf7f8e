//! Sums of gradients over micro-batches, on the device that made them.

use burn::tensor::{Gradients, Tensor};

use super::Leaves;
use super::leaves::Leaf;
use crate::train::TrainError;
use crate::train::checks::all_numbers;

/// Per part and parameter, flat; `None` before the first gradient of a parameter.
#[derive(Debug, Default)]
pub(super) struct Sums(Vec<Vec<Option<Tensor<1>>>>);

impl Sums {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the gradients of a part's parameters out of a backward and adds them.
    pub(super) fn add(&mut self, leaves: &Leaves, part: usize, gradients: &mut Gradients) {
        if self.0.is_empty() {
            self.0 = leaves.parts().iter().map(|part| vec![None; part.len()]).collect();
        }
        let (Some(leaves), Some(sums)) = (leaves.parts().get(part), self.0.get_mut(part)) else {
            return;
        };
        for (leaf, sum) in leaves.iter().zip(sums) {
            // Flat: gradients of weights come out transposed, and a step reads them in the weights' order.
            let gradient = match leaf {
                Leaf::Vector(vector) => vector.grad_remove(gradients),
                Leaf::Matrix(matrix) => {
                    let gradient = matrix.grad_remove(gradients);
                    gradient.map(|gradient| gradient.reshape([leaf.elements()]))
                }
            };
            if let Some(gradient) = gradient {
                *sum = Some(match sum.take() {
                    Some(sum) => sum + gradient,
                    None => gradient,
                });
            }
        }
    }

    /// The sum of a parameter's gradients.
    #[cfg(feature = "gpu")]
    pub(super) fn of(&self, part: usize, leaf: usize) -> Option<&Tensor<1>> {
        self.0.get(part)?.get(leaf)?.as_ref()
    }

    /// Adds all to sums on the host, as long as the parts, and keeps nothing back from the device but what it has.
    pub(super) fn add_to(&self, leaves: &Leaves, sums: &mut [Vec<f32>]) -> Result<(), TrainError> {
        for ((own, leaves), sums) in self.0.iter().zip(leaves.parts()).zip(sums) {
            let mut values = all_numbers(own.iter().flatten().cloned())?.into_iter();
            let mut rest = &mut sums[..];
            for (own, leaf) in own.iter().zip(leaves) {
                let (sums, others) = rest.split_at_mut(leaf.elements());
                if own.is_some() {
                    for (sum, value) in sums.iter_mut().zip(values.next().unwrap_or_default()) {
                        *sum += value;
                    }
                }
                rest = others;
            }
        }
        Ok(())
    }
}
