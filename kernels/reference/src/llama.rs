//! A whole Llama, from tokens to logits.

use crate::{Rope, attention, frequencies, matmul, rms_norm, rotate, swiglu};

/// The shape of a Llama.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated layer.
    pub intermediate: usize,
    /// Blocks.
    pub blocks: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub epsilon: f32,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope: Rope,
    /// Whether the output projection is the embedding.
    pub tied: bool,
}

/// Everything that a forward pass shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// The embedding's output, then each block's: `blocks + 1` of `[seq, hidden]`.
    pub hidden: Vec<Vec<f32>>,
    /// After the final norm, `[seq, hidden]`.
    pub normed: Vec<f32>,
    /// `[seq, vocabulary]`.
    pub logits: Vec<f32>,
}

impl Llama {
    /// Runs `tokens` from position 0. `weight` finds a tensor by its Hugging Face name.
    pub fn forward<'a>(&self, weight: &dyn Fn(&str) -> &'a [f32], tokens: &[u32]) -> Trace {
        let embedding = weight("model.embed_tokens.weight");
        let mut x: Vec<f32> = tokens
            .iter()
            .flat_map(|token| &embedding[*token as usize * self.hidden..][..self.hidden])
            .copied()
            .collect();
        let mut hidden = vec![x.clone()];
        for block in 0..self.blocks {
            self.block(&|name| weight(&format!("model.layers.{block}.{name}.weight")), &mut x);
            hidden.push(x.clone());
        }
        let mut normed = vec![0.0; x.len()];
        rms_norm(&mut normed, &x, weight("model.norm.weight"), self.epsilon);
        let output = if self.tied { embedding } else { weight("lm_head.weight") };
        let logits = product(&normed, output, self.hidden);
        Trace { hidden, normed, logits }
    }

    fn block<'a>(&self, weight: &dyn Fn(&str) -> &'a [f32], x: &mut [f32]) {
        let mut normed = vec![0.0; x.len()];
        rms_norm(&mut normed, x, weight("input_layernorm"), self.epsilon);
        let mut q = product(&normed, weight("self_attn.q_proj"), self.hidden);
        let mut k = product(&normed, weight("self_attn.k_proj"), self.hidden);
        let v = product(&normed, weight("self_attn.v_proj"), self.hidden);
        let frequencies = frequencies(self.rope, self.theta, self.head_dim);
        for (heads, rows) in [(self.heads, &mut q), (self.kv_heads, &mut k)] {
            for (index, head) in rows.chunks_exact_mut(self.head_dim).enumerate() {
                rotate(head, index / heads, &frequencies);
            }
        }
        let mut mixed = vec![0.0; q.len()];
        attention(&mut mixed, &q, &k, &v, self.heads, self.kv_heads, self.head_dim);
        add(
            x,
            &product(&mixed, weight("self_attn.o_proj"), self.heads * self.head_dim),
        );

        rms_norm(&mut normed, x, weight("post_attention_layernorm"), self.epsilon);
        let gate = product(&normed, weight("mlp.gate_proj"), self.hidden);
        let up = product(&normed, weight("mlp.up_proj"), self.hidden);
        let mut gated = vec![0.0; gate.len()];
        swiglu(&mut gated, &gate, &up);
        add(x, &product(&gated, weight("mlp.down_proj"), self.intermediate));
    }
}

fn product(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / inputs * (weight.len() / inputs)];
    matmul(&mut out, x, weight, inputs);
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_zeros_pass_the_embedding_through() {
        let llama = Llama {
            hidden: 2,
            intermediate: 2,
            blocks: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            epsilon: 0.0,
            theta: 10_000.0,
            rope: Rope::Default,
            tied: true,
        };
        let embedding = [1.0, 1.0, 2.0, -2.0];
        let trace = llama.forward(
            &|name| match name {
                "model.embed_tokens.weight" => &embedding,
                "model.norm.weight" => &[1.0, 1.0],
                _ => &[0.0; 4],
            },
            &[1, 0],
        );
        assert_eq!(trace.hidden[1], [2.0, -2.0, 1.0, 1.0]);
        assert_eq!(trace.normed, [1.0, -1.0, 1.0, 1.0]);
        assert_eq!(trace.logits, [0.0, 4.0, 2.0, 0.0]);
    }
}
