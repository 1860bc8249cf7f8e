//! Rows of weights in the orders of either form. Whole packed rows move; nothing is rounded.

use super::places::Up;

/// Undoes the order of rows that GGUF gives to query and key projections of the llama architecture: there the two
/// halves of a head, which rotate together, are interleaved. Whole packed rows move.
///
/// `None` where the rows are not `heads` heads of an even width.
pub(super) fn halves_apart(bytes: &[u8], rows: usize, heads: usize) -> Option<Vec<u8>> {
    moved(bytes, rows, heads, |half| {
        Box::new((0..2).flat_map(move |side| (0..half).map(move |i| 2 * i + side)))
    })
}

/// The inverse of [`halves_apart`].
pub(super) fn halves_together(bytes: &[u8], rows: usize, heads: usize) -> Option<Vec<u8>> {
    moved(bytes, rows, heads, |half| {
        Box::new((0..half).flat_map(move |i| [i, half + i]))
    })
}

/// Rows of each head in the order that `order` gives for heads of twice so many rows.
fn moved(
    bytes: &[u8],
    rows: usize,
    heads: usize,
    order: impl Fn(usize) -> Box<dyn Iterator<Item = usize>>,
) -> Option<Vec<u8>> {
    let half = rows.checked_div(heads)? / 2;
    if half == 0 || half * 2 * heads != rows {
        return None;
    }
    let row_bytes = bytes.len() / rows;
    let mut moved = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for row in order(half) {
            moved.extend_from_slice(bytes.get((head * 2 * half + row) * row_bytes..)?.get(..row_bytes)?);
        }
    }
    Some(moved)
}

/// Joins the ways up to keys, `[heads, rank, nope]`, and to values, `[heads, value, rank]`, of elements of `width` bytes
/// to `[heads · (nope + value), rank]`. `None` where lengths disagree.
pub(super) fn up_joined(keys: &[u8], values: &[u8], up: Up, width: usize) -> Option<Vec<u8>> {
    let Up {
        heads,
        nope,
        value,
        rank,
    } = up;
    let (of_keys, of_values) = (rank * nope * width, value * rank * width);
    if keys.len() != heads * of_keys || values.len() != heads * of_values {
        return None;
    }
    let mut joined = Vec::with_capacity(keys.len() + values.len());
    for head in 0..heads {
        turned(
            keys.get(head * of_keys..)?.get(..of_keys)?,
            [rank, nope],
            width,
            &mut joined,
        )?;
        joined.extend_from_slice(values.get(head * of_values..)?.get(..of_values)?);
    }
    Some(joined)
}

/// The inverse of [`up_joined`]: keys, and values.
pub(super) fn up_apart(joined: &[u8], up: Up, width: usize) -> Option<[Vec<u8>; 2]> {
    let Up {
        heads,
        nope,
        value,
        rank,
    } = up;
    let (of_keys, of_values) = (rank * nope * width, value * rank * width);
    if joined.len() != heads * (of_keys + of_values) {
        return None;
    }
    let mut keys = Vec::with_capacity(heads * of_keys);
    let mut values = Vec::with_capacity(heads * of_values);
    for head in 0..heads {
        let (of_head, from) = (of_keys + of_values, head * (of_keys + of_values));
        let (first, second) = joined.get(from..from + of_head)?.split_at(of_keys);
        turned(first, [nope, rank], width, &mut keys)?;
        values.extend_from_slice(second);
    }
    Some([keys, values])
}

/// Appends the transpose of a matrix of elements of `width` bytes.
fn turned(bytes: &[u8], [rows, cols]: [usize; 2], width: usize, out: &mut Vec<u8>) -> Option<()> {
    for col in 0..cols {
        for row in 0..rows {
            out.extend_from_slice(bytes.get((row * cols + col) * width..)?.get(..width)?);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_head_go_back_to_halves() {
        // Two heads of four rows, one byte each; in GGUF, rows 0 and 2 of a head are neighbours.
        let gguf = [0, 2, 1, 3, 10, 12, 11, 13];
        assert_eq!(halves_apart(&gguf, 8, 2).unwrap(), [0, 1, 2, 3, 10, 11, 12, 13]);
        assert_eq!(halves_together(&[0, 1, 2, 3, 10, 11, 12, 13], 8, 2).unwrap(), gguf);
        assert_eq!(halves_apart(&gguf, 8, 3), None);
        assert_eq!(halves_apart(&gguf, 8, 8), None);
        assert_eq!(halves_apart(&gguf, 8, 0), None);
    }

    #[test]
    fn ways_up_are_turned_and_joined_head_by_head() {
        let up = Up {
            heads: 2,
            nope: 2,
            value: 1,
            rank: 3,
        };
        // A head's keys: rows of latents, columns of keys.
        let keys = [0, 10, 1, 11, 2, 12, 100, 110, 101, 111, 102, 112];
        let values = [20, 21, 22, 120, 121, 122];
        let joined = [
            0, 1, 2, 10, 11, 12, 20, 21, 22, 100, 101, 102, 110, 111, 112, 120, 121, 122,
        ];
        assert_eq!(up_joined(&keys, &values, up, 1).unwrap(), joined);
        assert_eq!(up_apart(&joined, up, 1).unwrap(), [keys.to_vec(), values.to_vec()]);
        assert_eq!(up_joined(&keys[1..], &values, up, 1), None);
        assert_eq!(up_apart(&joined[1..], up, 1), None);
    }
}
