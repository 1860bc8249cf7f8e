//! Balancing experts without a loss: the correction of an overloaded expert falls, that of an idle one rises.

/// What DeepSeek-V3 moved corrections by after each step.
pub const BALANCE_RATE: f32 = 1e-3;

/// `correction[i] ← correction[i] + rate · sign(mean load − load[i])`. Lengths beyond the shorter are left alone.
pub fn balance(correction: &mut [f32], load: &[u64], rate: f32) {
    let total: u64 = load.iter().sum();
    let count = load.len() as u64;
    for (correction, load) in correction.iter_mut().zip(load) {
        // Compared as whole numbers, so that every machine decides alike.
        match total.cmp(&(load * count)) {
            std::cmp::Ordering::Greater => *correction += rate,
            std::cmp::Ordering::Less => *correction -= rate,
            std::cmp::Ordering::Equal => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::rules::{number, row, rule};
    use super::*;

    #[test]
    fn corrections_move_as_in_the_golden_case() {
        let rule = rule("balance_bias");
        let load: Vec<u64> = row(&rule["load"]).iter().map(|load| *load as u64).collect();
        let mut correction = row(&rule["bias_before"]);
        balance(&mut correction, &load, number(&rule, "gamma"));
        for (own, right) in correction.iter().zip(row(&rule["bias_after"])) {
            assert!((own - right).abs() < 1e-8, "{own} {right}");
        }
    }
}
