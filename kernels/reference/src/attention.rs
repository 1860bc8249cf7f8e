//! Causal attention with grouped queries.

/// Causal attention of the newest positions over all positions up to their own.
///
/// Query head `h` reads key-value head `h / (heads / kv_heads)`. The queries are the last `queries` of `positions`.
///
/// # Shapes
///
/// - `q`, `out`: `[queries, heads, head_dim]`
/// - `k`, `v`: `[positions, kv_heads, head_dim]`
pub fn attention(out: &mut [f32], q: &[f32], k: &[f32], v: &[f32], heads: usize, kv_heads: usize, head_dim: usize) {
    let queries = q.len() / (heads * head_dim);
    let positions = k.len() / (kv_heads * head_dim);
    assert_eq!(out.len(), q.len());
    assert_eq!(k.len(), v.len());
    assert!(queries <= positions);
    assert_eq!(heads % kv_heads, 0);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for query in 0..queries {
        let visible = positions - queries + query + 1;
        for head in 0..heads {
            let kv = head / (heads / kv_heads);
            let at = (query * heads + head) * head_dim;
            let row = &q[at..at + head_dim];
            let kv_row = |position: usize| (position * kv_heads + kv) * head_dim;
            let mut scores: Vec<f32> = (0..visible)
                .map(|position| {
                    let key = &k[kv_row(position)..][..head_dim];
                    row.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * scale
                })
                .collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for score in &mut scores {
                *score = (*score - max).exp();
            }
            let sum: f32 = scores.iter().sum();
            let out = &mut out[at..at + head_dim];
            out.fill(0.0);
            for (position, weight) in scores.iter().enumerate() {
                for (out, v) in out.iter_mut().zip(&v[kv_row(position)..][..head_dim]) {
                    *out += weight / sum * v;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_position_sees_itself_alone() {
        let mut out = [0.0; 4];
        let k = [5.0, -1.0, 0.0, 0.0];
        attention(&mut out, &[1.0, 2.0, 3.0, 4.0], &k, &[7.0, 8.0, 9.0, 10.0], 1, 1, 2);
        assert_eq!(out[..2], [7.0, 8.0]);
    }

    #[test]
    fn equal_keys_average_the_values() {
        let mut out = [0.0; 4];
        // Two query heads share one key-value head; two positions, one query.
        let (k, v) = ([1.0, 1.0, 1.0, 1.0], [2.0, 4.0, 6.0, 8.0]);
        attention(&mut out, &[1.0, 0.0, 0.0, 3.0], &k, &v, 2, 1, 2);
        assert_eq!(out, [4.0, 6.0, 4.0, 6.0]);
    }

    #[test]
    fn a_score_of_ln_three_weighs_three_to_one() {
        let mut out = [0.0];
        attention(&mut out, &[3f32.ln()], &[1.0, 0.0], &[4.0, 8.0], 1, 1, 1);
        assert!((out[0] - 5.0).abs() < 1e-6);
    }
}
