//! For tests: the golden training rules.

use serde_json::Value;

/// One rule by its name.
pub(super) fn rule(name: &str) -> Value {
    let rules: Value = serde_json::from_str(include_str!("../../tests/golden/training_rules.json")).unwrap();
    rules[name].clone()
}

pub(super) fn row(value: &Value) -> Vec<f32> {
    let list = value.as_array().unwrap();
    list.iter().map(|value| value.as_f64().unwrap() as f32).collect()
}

pub(super) fn number(rule: &Value, key: &str) -> f32 {
    rule[key].as_f64().unwrap() as f32
}

pub(super) fn whole(rule: &Value, key: &str) -> u64 {
    rule[key].as_u64().unwrap()
}
