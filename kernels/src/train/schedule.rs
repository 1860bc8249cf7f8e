//! The learning rate over a run.

use polder_protocol::run::{Inner, Schedule};

/// The learning rate of inner step `step` (from 0) of a run of `steps_total`, by its schedule.
pub fn learning_rate(inner: &Inner, steps_total: u64, step: u64) -> f32 {
    (f64::from(inner.learning_rate) * rate_share(inner, steps_total, step)) as f32
}

/// The share of the peak at inner step `step` (from 0) of a run of `steps_total`: linear warm-up, then the peak and, over
/// the last `decay_ppm` of the run, 1 − √; or half a cosine from the warm-up to the end. Both end at `final_ppm`.
pub(super) fn rate_share(inner: &Inner, steps_total: u64, step: u64) -> f64 {
    let step = step.saturating_add(1);
    let warmup = u64::from(inner.warmup_steps);
    if step <= warmup {
        return step as f64 / warmup as f64;
    }
    let floor = f64::from(inner.final_ppm.min(1_000_000)) / 1e6;
    let left = match inner.schedule {
        Schedule::WarmupStableDecay => {
            let decay = (u128::from(steps_total) * u128::from(inner.decay_ppm.min(1_000_000)) / 1_000_000) as u64;
            let stable = steps_total.saturating_sub(decay);
            if step <= stable || decay == 0 {
                return 1.0;
            }
            1.0 - ((step - stable) as f64 / decay as f64).min(1.0).sqrt()
        }
        Schedule::Cosine => {
            let falling = steps_total.saturating_sub(warmup).max(1);
            let gone = ((step - warmup) as f64 / falling as f64).min(1.0);
            0.5 * (1.0 + (core::f64::consts::PI * gone).cos())
        }
    };
    floor + (1.0 - floor) * left
}

#[cfg(test)]
mod tests {
    use super::super::rules::{row, rule};
    use super::*;

    #[test]
    fn the_rate_rises_holds_and_falls_to_its_floor() {
        let rule = rule("wsd");
        let (peak, low) = (rule["lr"].as_f64().unwrap(), rule["min_lr"].as_f64().unwrap());
        let mut inner = crate::train::tests::inner(peak as f32, 5, 333_334);
        inner.final_ppm = (low / peak * 1e6).round() as u32;
        for (step, right) in row(&rule["lr_at_step_1_to_total"]).into_iter().enumerate() {
            let ours = learning_rate(&inner, 30, step as u64);
            assert!((ours - right).abs() < peak as f32 * 1e-5, "{step}: {ours} {right}");
        }
    }

    #[test]
    fn a_cosine_passes_its_middle_half_way_between_peak_and_floor() {
        let inner = Inner {
            schedule: Schedule::Cosine,
            final_ppm: 100_000,
            ..crate::train::tests::inner(1.0, 10, 0)
        };
        let rate = |step| learning_rate(&inner, 110, step);
        assert_eq!((rate(4), rate(9)), (0.5, 1.0));
        assert!((rate(59) - 0.55).abs() < 1e-6 && (rate(109) - 0.1).abs() < 1e-6);
        assert!((10..109).all(|step| rate(step) > rate(step + 1)));
        assert_eq!(rate(109), rate(500));
    }
}
