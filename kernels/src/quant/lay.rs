//! Rows laid side by side: the way from a file's order to that of [`super::interleaved`].
//!
//! A model's first tokens wait for it, so whole groups are transposed in registers. What is left over, and processors
//! without them, take the plain loops, which are the definition.

use super::interleaved::{GROUP, Kind, Line};

/// Lays out the first rows of `bytes`, as many as a group takes.
pub(super) fn lay_group(kind: Kind, bytes: &[u8], row_bytes: usize, quants: &mut [Line], scales: &mut [u16]) {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    if let Some(whole) = bytes.get(..kind.group() * row_bytes) {
        return vectors::lay_group(kind, whole, row_bytes, quants, scales);
    }
    lay_rows(kind, bytes, row_bytes, quants, scales);
}

/// The definition.
fn lay_rows(kind: Kind, bytes: &[u8], row_bytes: usize, quants: &mut [Line], scales: &mut [u16]) {
    let rows = bytes.chunks_exact(row_bytes).take(kind.group());
    for (row, bytes) in rows.enumerate() {
        match kind {
            Kind::Bytes => lay_bytes(bytes, row, quants, scales),
            Kind::CentredNibbles => lay_nibbles::<18>(bytes, row, quants, scales),
            Kind::Nibbles => lay_nibbles::<20>(bytes, row, quants, scales),
            Kind::Half | Kind::Brain => lay_floats(bytes, row, quants, 0),
        }
    }
}

fn lay_bytes(bytes: &[u8], row: usize, quants: &mut [Line], scales: &mut [u16]) {
    let blocks = bytes.as_chunks::<34>().0.iter();
    let units = quants.as_chunks_mut::<8>().0.iter_mut();
    for ((block, lines), scales) in blocks.zip(units).zip(scales.as_chunks_mut::<GROUP>().0) {
        scales[row] = u16::from_le_bytes([block[0], block[1]]);
        for (line, four) in lines.iter_mut().zip(block[2..].as_chunks::<4>().0) {
            // 128 above a two's complement number is its sign bit turned.
            let four = u32::from_le_bytes(*four) ^ 0x8080_8080;
            line.0[4 * row..4 * row + 4].copy_from_slice(&four.to_le_bytes());
        }
    }
}

/// Blocks of `BYTES` bytes that end in 16 bytes of nibbles, elements 0 to 15 low and 16 to 31 high, as lines have them:
/// line `k` has columns `4k ..` low and `16 + 4k ..` high.
fn lay_nibbles<const BYTES: usize>(bytes: &[u8], row: usize, quants: &mut [Line], scales: &mut [u16]) {
    let per_unit = GROUP * (BYTES - 16) / 2;
    let blocks = bytes.as_chunks::<BYTES>().0.iter();
    let units = quants.as_chunks_mut::<4>().0.iter_mut();
    for ((block, lines), scales) in blocks.zip(units).zip(scales.chunks_exact_mut(per_unit)) {
        let (numbers, nibbles) = block.split_at(BYTES - 16);
        for (number, scales) in numbers.as_chunks::<2>().0.iter().zip(scales.as_chunks_mut::<GROUP>().0) {
            scales[row] = u16::from_le_bytes(*number);
        }
        for (line, four) in lines.iter_mut().zip(nibbles.as_chunks::<4>().0) {
            line.0[4 * row..4 * row + 4].copy_from_slice(four);
        }
    }
}

/// The columns of one row, from `first` on.
fn lay_floats(bytes: &[u8], row: usize, quants: &mut [Line], first: usize) {
    let columns = quants.iter_mut().zip(bytes.as_chunks::<2>().0);
    for (line, value) in columns.skip(first) {
        line.0[2 * row..2 * row + 2].copy_from_slice(value);
    }
}

/// Transposition in registers.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vectors {
    use super::super::interleaved::{FLOAT_GROUP, GROUP, Kind, Line};
    use super::super::sixteen::{Sixteen, by_turns_16, by_turns_32, by_turns_64, load, store, turned};
    use super::lay_floats;

    /// As [`super::lay_rows`], for a group of which every row is there.
    pub(super) fn lay_group(kind: Kind, bytes: &[u8], row_bytes: usize, quants: &mut [Line], scales: &mut [u16]) {
        match kind {
            Kind::Bytes => lay_blocks::<34, 32, 8>(bytes, row_bytes, quants, scales, 128),
            Kind::CentredNibbles => lay_blocks::<18, 16, 4>(bytes, row_bytes, quants, scales, 0),
            Kind::Nibbles => lay_blocks::<20, 16, 4>(bytes, row_bytes, quants, scales, 0),
            Kind::Half | Kind::Brain => lay_float_group(bytes, row_bytes, quants),
        }
    }

    /// Blocks of `BYTES` bytes of which the last `QUANTS` are elements, four to a line's lane, their bits turned by `turn`.
    fn lay_blocks<const BYTES: usize, const QUANTS: usize, const LINES: usize>(
        bytes: &[u8],
        row_bytes: usize,
        quants: &mut [Line],
        scales: &mut [u16],
        turn: u8,
    ) {
        let numbers = (BYTES - QUANTS) / 2;
        let units = quants.as_chunks_mut::<LINES>().0.iter_mut();
        for (unit, (lines, scales)) in units.zip(scales.chunks_exact_mut(numbers * GROUP)).enumerate() {
            for four in 0..GROUP / 4 {
                let blocks: [&[u8; BYTES]; 4] = std::array::from_fn(|row| {
                    let start = (4 * four + row) * row_bytes + unit * BYTES;
                    bytes[start..start + BYTES]
                        .try_into()
                        .expect("the range has that length")
                });
                for (row, block) in blocks.iter().enumerate() {
                    for number in 0..numbers {
                        let value = [block[2 * number], block[2 * number + 1]];
                        scales[number * GROUP + 4 * four + row] = u16::from_le_bytes(value);
                    }
                }
                for (part, lines) in lines.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let rows = blocks.map(|block| sixteen(block, BYTES - QUANTS + 16 * part));
                    for (line, value) in lines.iter_mut().zip(transposed_by_four(rows)) {
                        put(line, 16 * four, turned(value, turn));
                    }
                }
            }
        }
    }

    fn lay_float_group(bytes: &[u8], row_bytes: usize, quants: &mut [Line]) {
        let whole = quants.len() / 8 * 8;
        for (part, lines) in quants.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            for eight in 0..FLOAT_GROUP / 8 {
                let rows = std::array::from_fn(|row| sixteen(bytes, (8 * eight + row) * row_bytes + 16 * part));
                for (line, value) in lines.iter_mut().zip(transposed_by_two(rows)) {
                    put(line, 16 * eight, value);
                }
            }
        }
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            lay_floats(bytes, row, quants, whole);
        }
    }

    fn sixteen(bytes: &[u8], start: usize) -> Sixteen {
        load(bytes[start..].first_chunk().expect("a row has the length of its type"))
    }

    fn put(line: &mut Line, start: usize, value: Sixteen) {
        store(value, line.0[start..].first_chunk_mut().expect("a line has 64 bytes"));
    }

    /// `out[i][j] = rows[j][i]` in 32-bit lanes.
    fn transposed_by_four(rows: [Sixteen; 4]) -> [Sixteen; 4] {
        let [a, b, c, d] = rows;
        let ([low, high], [further_low, further_high]) = (by_turns_32(a, b), by_turns_32(c, d));
        let ([zero, one], [two, three]) = (by_turns_64(low, further_low), by_turns_64(high, further_high));
        [zero, one, two, three]
    }

    /// `out[i][j] = rows[j][i]` in 16-bit lanes.
    fn transposed_by_two(rows: [Sixteen; 8]) -> [Sixteen; 8] {
        let [a, b, c, d, e, f, g, h] = rows;
        // Pairs of rows, columns 0 to 3 and 4 to 7; then four rows of two columns, one column after the other.
        let pairs = [
            by_turns_16(a, b),
            by_turns_16(c, d),
            by_turns_16(e, f),
            by_turns_16(g, h),
        ];
        let [zero, one, two, three] = transposed_by_four(pairs.map(|[low, _]| low));
        let [four, five, six, seven] = transposed_by_four(pairs.map(|[_, high]| high));
        [zero, one, two, three, four, five, six, seven]
    }
}

#[cfg(test)]
mod tests {
    use super::super::PackedType;
    use super::*;

    #[test]
    fn registers_and_loops_lay_out_the_same() {
        for (ty, cols) in [
            (PackedType::Q8_0, 96),
            (PackedType::Q4_0, 64),
            (PackedType::Q4_1, 160),
            (PackedType::F16, 75),
            (PackedType::BF16, 8),
            (PackedType::F16, 3),
        ] {
            let kind = Kind::of(ty).unwrap();
            let row_bytes = ty.row_bytes(cols).unwrap();
            let units = if kind.is_float() { cols } else { cols / 32 };
            let sizes = (units * kind.lines(), units * kind.scales());
            for rows in [kind.group(), kind.group() - 1, 1] {
                let bytes: Vec<u8> = (0..rows * row_bytes).map(|i| (i * 167 + i / 251) as u8).collect();
                let mut laid = (vec![Line([0; 64]); sizes.0], vec![0; sizes.1]);
                let mut defined = laid.clone();
                lay_group(kind, &bytes, row_bytes, &mut laid.0, &mut laid.1);
                lay_rows(kind, &bytes, row_bytes, &mut defined.0, &mut defined.1);
                let lines = laid.0.iter().zip(&defined.0);
                assert!(
                    lines.into_iter().all(|(laid, defined)| laid.0 == defined.0),
                    "{ty:?} {rows}"
                );
                assert_eq!(laid.1, defined.1, "{ty:?} {rows}");
            }
        }
    }
}
