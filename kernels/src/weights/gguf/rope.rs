//! Scaling of rotary frequencies: what metadata says of it as a configuration would, and back.

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use super::writer::GgufWriter;
use crate::model::{Rope, Rotary};
use crate::quant::PackedType;
use crate::weights::WeightsError;

/// One number per frequency that it is divided by.
pub(super) const DIVISORS: &str = "rope_freqs.weight";

impl Metadata<'_> {
    /// The `rope_scaling` of a configuration; `None` where frequencies are as trained.
    ///
    /// `rotated` is how many dimensions of a head turn, `theta` the base of the frequencies.
    pub(super) fn rope_scaling(&self, rotated: u64, theta: f64, context: u64) -> Result<Option<Value>, WeightsError> {
        if self.architecture.divisors && self.has_tensor(DIVISORS) {
            let values = self.file.tensor(DIVISORS)?.to_f32();
            let values = values.map_err(WeightsError::quant(&self.file.path, DIVISORS))?;
            if self.text("rope.scaling.type")?.is_some_and(|kind| kind != "none") {
                return Err(self.feature("rope.scaling.type"));
            }
            return llama3_scaling(&values, rotated, theta)
                .map(Some)
                .ok_or_else(|| self.file.feature(format!("`{DIVISORS}` that are not Llama 3.1's")));
        }
        let factor = self.number("rope.scaling.factor")?;
        self.must_be("rope.scaling.attn_factor", 1.0)?;
        let Some(kind) = self.text("rope.scaling.type")? else {
            // Without a type, llama.cpp takes a factor to be linear.
            let linear = factor.filter(|factor| *factor != 0.0 && *factor != 1.0);
            return Ok(linear.map(|factor| json!({"rope_type": "linear", "factor": factor})));
        };
        let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
        match kind {
            "none" => Ok(None),
            "linear" => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
            "yarn" => self.yarn(factor, context).map(Some),
            other => {
                let other: String = other.chars().take(32).collect();
                Err(self.file.feature(format!("rope scaling `{other}`")))
            }
        }
    }

    fn yarn(&self, factor: f64, context: u64) -> Result<Value, WeightsError> {
        self.must_be("rope.scaling.yarn_ext_factor", 1.0)?;
        let original = self.whole("rope.scaling.original_context_length")?.unwrap_or(context);
        let mut scaling = json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        });
        for (name, key) in [
            ("rope.scaling.yarn_beta_fast", "beta_fast"),
            ("rope.scaling.yarn_beta_slow", "beta_slow"),
        ] {
            if let Some(value) = self.number(name)? {
                scaling[key] = json!(value);
            }
        }
        // llama.cpp computes this factor from the rest and ignores what a file says of it.
        let usual = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
        self.must_be("rope.scaling.yarn_attn_factor", usual)?;
        Ok(scaling)
    }
}

/// Writes the scaling of a rotation. What the architecture has no word for is found out when the file is compared.
///
/// # Errors
///
/// The scaling that has no word in any architecture.
pub(super) fn describe(
    writer: &mut GgufWriter<'_>,
    key: &dyn Fn(&str) -> String,
    rotary: &Rotary,
    divisors: bool,
) -> Result<(), &'static str> {
    match rotary.rope {
        Rope::Default => {}
        Rope::Linear { factor } => {
            writer.text(&key("rope.scaling.type"), "linear");
            writer.number(&key("rope.scaling.factor"), factor as f32);
        }
        Rope::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            ..
        } => {
            writer.text(&key("rope.scaling.type"), "yarn");
            writer.number(&key("rope.scaling.factor"), factor as f32);
            writer.whole(&key("rope.scaling.original_context_length"), original as u32);
            writer.number(&key("rope.scaling.yarn_beta_fast"), beta_fast as f32);
            writer.number(&key("rope.scaling.yarn_beta_slow"), beta_slow as f32);
        }
        Rope::Llama3 { factor, .. } if divisors => {
            let divisors = llama3_divisors(factor, rotary.dimensions as u64, rotary.theta);
            let shape = vec![divisors.len()];
            let bytes: Vec<u8> = divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect();
            writer.tensor(DIVISORS.to_owned(), PackedType::F32, shape, bytes.into());
        }
        Rope::Llama3 { .. } => return Err("Llama 3.1's rotary scaling in this architecture"),
    }
    Ok(())
}

/// The constants that all models with Llama 3.1's rotary scaling share.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: f64 = 8192.0;

/// Llama 3.1's rotary scaling as GGUF has it: one divisor per frequency.
fn llama3_divisors(factor: f64, head_dim: u64, theta: f64) -> Vec<f32> {
    let divisor = |i: u64| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let share = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - share) / factor + share)
        }
    };
    (0..head_dim / 2).map(|i| divisor(i) as f32).collect()
}

/// The scaling that divisors come from. They follow from the largest; where these do not, it is another scaling.
fn llama3_scaling(divisors: &[f32], head_dim: u64, theta: f64) -> Option<Value> {
    let factor = divisors.iter().copied().fold(1f32, f32::max);
    if divisors.len() as u64 != head_dim / 2 || !factor.is_finite() {
        return None;
    }
    for (divisor, expected) in divisors.iter().zip(llama3_divisors(f64::from(factor), head_dim, theta)) {
        let near = (divisor - expected).abs() <= 1e-3 * expected;
        if !near {
            return None;
        }
    }
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), json!("llama3"));
    scaling.insert("factor".to_owned(), json!(factor));
    scaling.insert("low_freq_factor".to_owned(), json!(LOW));
    scaling.insert("high_freq_factor".to_owned(), json!(HIGH));
    scaling.insert("original_max_position_embeddings".to_owned(), json!(8192));
    Some(Value::Object(scaling))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_divisors_are_recognised() {
        let divisors: Vec<f32> = (0..32)
            .map(|i| {
                let wavelength = std::f64::consts::TAU * 500_000f64.powf(2.0 * f64::from(i) / 64.0);
                let share = ((8192.0 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0);
                (1.0 / ((1.0 - share) / 32.0 + share)) as f32
            })
            .collect();
        let scaling = llama3_scaling(&divisors, 64, 500_000.0).unwrap();
        assert_eq!(scaling["factor"], 32.0);
        assert_eq!(llama3_scaling(&[1.0, 2.0, 1.0], 6, 10_000.0), None);
    }
}
