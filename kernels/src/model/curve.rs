//! Element-wise functions of perceptrons, with their parameters as numbers.

/// `describe::Activation`, once its parameters have been read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Curve {
    /// `x · sigmoid(x)`
    Silu,
    /// `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`
    GeluTanh,
    /// `max(x, 0)²`
    SquaredRelu,
    /// `α₊ x² + β x` above zero, `α₋ (expm1(min(x, ε)) − x) + β x` below (arXiv 2411.13010).
    Xielu {
        /// α₊
        alpha_p: f32,
        /// α₋
        alpha_n: f32,
        /// β
        beta: f32,
        /// ε
        epsilon: f32,
    },
}
