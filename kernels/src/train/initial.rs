//! Parameters before the first step.

use polder_protocol::layout::Layout;
use polder_protocol::rng::Random;

use crate::model::{Config, ConfigError, layout};

/// The layout of a model and its first parameters per part: gains are one and biases zero, weights normal with the
/// configuration's `initializer_range`, and those that write to the residual stream smaller by √(2 · blocks), so that it
/// keeps its scale. Parameters of activations and recurrences begin where their authors let them begin.
///
/// The numbers follow from `seed`; they are shipped as data, since logarithm and cosine may differ between machines.
///
/// # Errors
///
/// [`ConfigError`] where the configuration is no model.
pub fn initial_parameters(config_json: &str, seed: u64) -> Result<(Layout, Vec<Vec<f32>>), ConfigError> {
    let config = Config::from_json(config_json)?;
    let layout = layout(&config);
    let narrowed = f64::from(config.initializer_range) / (2.0 * f64::from(config.blocks)).sqrt();
    let parts = layout.parts.iter().zip(0u64..).map(|(part, index)| {
        let mut values = Vec::with_capacity(part.elements().unwrap_or(0));
        for (tensor, place) in part.tensors.iter().zip(0u64..) {
            let elements = tensor.elements().unwrap_or(0);
            if tensor.shape.len() < 2 {
                values.extend((0..elements).map(|at| of_vector(&config, &tensor.name, at, elements)));
                continue;
            }
            let writes = WRITERS.iter().any(|writer| tensor.name.contains(writer));
            let deviation = if writes {
                narrowed
            } else {
                f64::from(config.initializer_range)
            };
            let mut random = Random::from_labels(&[seed, index, place]);
            values.extend((0..elements).map(|_| (normal(&mut random) * deviation) as f32));
        }
        values
    });
    let parts = parts.collect();
    Ok((layout, parts))
}

/// In the names of weights that write to the residual stream.
const WRITERS: [&str; 4] = [".o_proj.", ".down_proj", ".out_proj.", ".w2."];

/// Element `at` of `elements` of a vector.
fn of_vector(config: &Config, name: &str, at: usize, elements: usize) -> f32 {
    let last = name.rsplit('.').next().unwrap_or(name);
    let inverse_softplus = |x: f64| x.exp_m1().ln() as f32;
    match last {
        "bias" | "e_score_correction_bias" => 0.0,
        "alpha_p" => inverse_softplus(0.8),
        "alpha_n" => inverse_softplus(0.8 - 0.5),
        "beta" => 0.5,
        "eps" => -1e-6,
        "A_log" => ((at + 1) as f64).ln() as f32,
        // Time steps from a thousandth to a tenth.
        "dt_bias" => inverse_softplus(1e-3 * 100f64.powf(at as f64 / elements.max(2) as f64)),
        "weight" if config.head.norm.kind.plus_one => 0.0,
        _ => 1.0,
    }
}

/// A normal number by Box and Muller's rule.
fn normal(random: &mut Random) -> f64 {
    let radius = (-2.0 * (1.0 - f64::from(random.unit_f32())).ln()).sqrt();
    radius * (std::f64::consts::TAU * f64::from(random.unit_f32())).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_have_the_deviation_that_the_configuration_asks_for() {
        let config = include_str!("../../tests/golden/llama_rope_llama3/config.json");
        let (layout, parts) = initial_parameters(config, 3).unwrap();
        let deviation =
            |values: &[f32]| (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        assert!((deviation(&parts[0]) - 0.02).abs() < 5e-4);
        assert!(parts[1][..64].iter().all(|gain| *gain == 1.0));
        let down = layout.parts[1].tensors[8].elements().unwrap();
        let down = &parts[1][parts[1].len() - down..];
        assert!((deviation(down) - 0.02 / 6f64.sqrt()).abs() < 5e-4);
        assert_eq!(initial_parameters(config, 3).unwrap().1, parts);
        assert_ne!(initial_parameters(config, 4).unwrap().1, parts);
    }
}
