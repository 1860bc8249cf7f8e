//! Mixtures of experts: what the families share, and Mixtral, which is nothing more.

use super::super::config::Base;
use super::super::describe::{Activation, Experts, Linear, Mixer, Mlp, NormKind, Router};
use super::super::keys::{CONTEXT_MAX, EXPERTS_MAX, Keys, WIDTH_MAX};
use super::super::part::{Feed, Part};
use super::super::positions::RopeKeys;
use super::super::routing::{Rule, Score};
use super::super::{Config, ConfigError};
use super::dense::{Dense, Layer};

/// Experts of all blocks together: the largest open models have 23,000.
const EXPERTS_TOTAL_MAX: usize = 1 << 17;

/// Names of the tensors of experts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Names {
    /// `experts.{e}.{gate}.weight` and so on: gate, up, down.
    Separate([&'static str; 3]),
    /// `experts.gate_up_proj` and `experts.down_proj`, each one tensor for all experts.
    Fused,
}

impl Names {
    /// As most have them.
    pub(super) const EXPERTS: Self = Self::Separate(["gate_proj", "up_proj", "down_proj"]);
}

/// What a mixture is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mixture {
    pub(super) hidden: usize,
    pub(super) experts: usize,
    pub(super) rule: Rule,
    /// Whether the router has a correction of its scores.
    pub(super) correction: bool,
    /// Width of an expert.
    pub(super) wide: usize,
    pub(super) gated: bool,
    pub(super) activation: Activation,
    pub(super) names: Names,
    /// Width of what is computed for every token, if anything.
    pub(super) shared: Option<usize>,
    /// Biases of what is computed for every token, and of the way into the experts' width.
    pub(super) shared_bias: bool,
    /// Width that experts work in, where it is not the model's.
    pub(super) latent: Option<usize>,
}

impl Mixture {
    pub(super) fn new(hidden: usize, names: Names) -> Self {
        Self {
            hidden,
            experts: 1,
            rule: Rule {
                score: Score::Softmax,
                top: 1,
                groups: 1,
                groups_top: 1,
                group_best: 2,
                normalised: true,
                scale: 1.0,
            },
            correction: false,
            wide: 1,
            gated: true,
            activation: Activation::Silu,
            names,
            shared: None,
            shared_bias: false,
            latent: None,
        }
    }

    /// Refuses what cannot be chosen from.
    pub(super) fn check(&self, keys: Keys<'_>, base: &Base) -> Result<(), ConfigError> {
        let Rule {
            top,
            groups,
            groups_top,
            ..
        } = self.rule;
        if self.experts * base.blocks > EXPERTS_TOTAL_MAX {
            return Err(keys.wrong("num_hidden_layers", "fewer, with so many experts each"));
        }
        if !self.experts.is_multiple_of(groups) {
            return Err(keys.wrong("n_group", "a divisor of the number of experts"));
        }
        if groups_top > groups {
            return Err(keys.wrong("topk_group", "at most n_group"));
        }
        if top > self.experts / groups * groups_top {
            return Err(keys.wrong("num_experts_per_tok", "at most the experts that can be chosen from"));
        }
        Ok(())
    }

    /// The experts of one block, under `name`.
    pub(super) fn experts(&self, part: &mut Part, name: &str) -> Experts {
        let weight = part.linear(&format!("{name}.gate"), [self.experts, self.hidden], false);
        let correction_name = format!("{name}.gate.e_score_correction_bias");
        let router = Router {
            weight,
            correction: self.correction.then(|| part.tensor(&correction_name, &[self.experts])),
            rule: self.rule,
        };
        let latent = self.latent.map(|latent| {
            let down = part.linear(
                &format!("{name}.fc1_latent_proj"),
                [latent, self.hidden],
                self.shared_bias,
            );
            let up = part.linear(
                &format!("{name}.fc2_latent_proj"),
                [self.hidden, latent],
                self.shared_bias,
            );
            (down, up)
        });
        let width = self.latent.unwrap_or(self.hidden);
        let feed = Feed {
            hidden: width,
            wide: self.wide,
            gated: self.gated,
            bias: false,
            activation: self.activation,
        };
        let experts = match self.names {
            Names::Separate(names) => (0..self.experts)
                .map(|expert| part.mlp_named(&format!("{name}.experts.{expert}"), names, feed))
                .collect(),
            Names::Fused => self.fused(part, name, width),
        };
        let shared_name = format!("{name}.shared_experts");
        let shared = self.shared.map(|wide| Feed {
            hidden: self.hidden,
            wide,
            bias: self.shared_bias,
            ..feed
        });
        Experts {
            router,
            latent,
            experts,
            shared: shared.map(|feed| part.mlp(&shared_name, feed)),
        }
    }

    fn fused(&self, part: &mut Part, name: &str, width: usize) -> Vec<Mlp> {
        let wide = self.wide;
        let first = part.tensor(
            &format!("{name}.experts.gate_up_proj"),
            &[self.experts, 2 * wide, width],
        );
        let second = part.tensor(&format!("{name}.experts.down_proj"), &[self.experts, width, wide]);
        let rows = |weight, first_row, [rows, cols]: [usize; 2]| Linear {
            weight,
            first_row,
            rows,
            cols,
            bias: None,
        };
        (0..self.experts)
            .map(|expert| Mlp {
                gate: Some(rows(first, expert * 2 * wide, [wide, width])),
                up: rows(first, (expert * 2 + 1) * wide, [wide, width]),
                down: rows(second, expert * width, [width, wide]),
                activation: self.activation,
            })
            .collect()
    }
}

pub(super) fn mixtral(keys: Keys<'_>) -> Result<Config, ConfigError> {
    keys.only_class("MixtralForCausalLM")?;
    let base = Base::read(keys, "mixtral", 131_072, false)?;
    let heads = base.heads(keys, Some(8))?;
    let rotary = RopeKeys::find(keys, base.context, 1_000_000.0)?.rotary(heads.head_dim)?;
    let window = keys.optional_size("sliding_window", CONTEXT_MAX)?;
    let model = Dense::new(base, heads, NormKind::rms(keys.epsilon("rms_norm_eps", 1e-5)?), rotary);
    let mut mixture = Mixture {
        experts: keys.size_or("num_local_experts", EXPERTS_MAX, 8)?,
        wide: keys.size("intermediate_size", WIDTH_MAX)?,
        activation: keys.activation("hidden_act", Activation::Silu)?,
        ..Mixture::new(base.hidden, Names::Separate(["w1", "w3", "w2"]))
    };
    mixture.rule.top = keys.size_or("num_experts_per_tok", EXPERTS_MAX, 2)?;
    mixture.check(keys, &base)?;
    let layer = Layer {
        window,
        ..Layer::default()
    };
    model.build_with(
        |_| layer,
        |_, part| Ok(Mixer::Experts(mixture.experts(part, "block_sparse_moe"))),
    )
}
