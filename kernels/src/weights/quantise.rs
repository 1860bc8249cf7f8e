//! A model's matrices in another type.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use polder_protocol::layout::PartLayout;
use rayon::prelude::*;

use super::part_file::OUTPUT;
use super::part_writer::TIED_NOTE;
use super::{PartFile, PartWriter, Progress, TensorSource, WeightsError};
use crate::model::{Config, layout};
use crate::quant::{PackedType, narrow, widen};

/// What became of a model's tensors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Quantised {
    /// The new part files.
    pub part_files: Vec<PathBuf>,
    /// What was packed, by type.
    pub packed: BTreeMap<String, Packed>,
    /// Tensors that stayed as they were.
    pub kept: u64,
}

/// The tensors that were packed into one type.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Packed {
    /// How many.
    pub tensors: u64,
    /// Their bytes now.
    pub bytes: u64,
    /// `√(Σ (packed − value)² / Σ value²)` over all their elements.
    pub relative_error: f64,
}

/// Elements that are packed at once, a multiple of every block.
const PIECE: usize = 64 << 10;

/// Writes the part files of a model anew into the new folder `out`, with its matrices in the type `to`.
///
/// Norms, biases, routers and other small things stay. Embedding and output projection take at least six bits, since
/// errors there meet every token; rows that the type's blocks do not divide take the next wider type that does. What is
/// packed already in as few bits stays as it is. A failure leaves nothing behind.
///
/// # Errors
///
/// [`WeightsError`] names the file and what is wrong with it.
pub fn quantise(
    config_json: &str,
    part_files: &[PathBuf],
    to: PackedType,
    out: &Path,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<Quantised, WeightsError> {
    if out.exists() {
        return Err(WeightsError::AlreadyThere { path: out.to_owned() });
    }
    let config = Config::from_json(config_json).map_err(|source| WeightsError::Config {
        path: out.to_owned(),
        source,
    })?;
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", process::id()));
    let partial = out.with_file_name(name);
    fs::create_dir_all(&partial).map_err(WeightsError::io("make", &partial))?;
    let written = write(&config, part_files, to, &partial, on_progress).and_then(|found| {
        fs::rename(&partial, out)
            .map_err(WeightsError::io("make", out))
            .map(|()| found)
    });
    match written {
        Ok(mut found) => {
            for path in &mut found.part_files {
                *path = out.join(path.file_name().unwrap_or_default());
            }
            Ok(found)
        }
        Err(error) => {
            let _ = fs::remove_dir_all(&partial); // The first error is the one to tell.
            Err(error)
        }
    }
}

fn write(
    config: &Config,
    part_files: &[PathBuf],
    to: PackedType,
    folder: &Path,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<Quantised, WeightsError> {
    let layouts = layout(config).parts;
    if layouts.len() != part_files.len() {
        return Err(WeightsError::MissingFile {
            path: folder.join(format!("part {}", part_files.len())),
            hint: "there must be one file per part: embedding, blocks, head",
        });
    }
    let parts = layouts.len();
    let mut found = Quantised::default();
    let mut errors = BTreeMap::<String, [f64; 2]>::new();
    for (index, (path, part)) in part_files.iter().zip(&layouts).enumerate() {
        on_progress(Progress {
            parts_done: index,
            parts,
        });
        let file = PartFile::open(path)?;
        file.check(part)?;
        let mut writer = PartWriter::new();
        for name in file.names() {
            let tensor = file.tensor(name)?;
            let is_end = index == 0 || index + 1 == parts;
            let Some(ty) = type_for(name, &tensor, to, is_end) else {
                found.kept += 1;
                writer.tensor(name, tensor.ty, &tensor.shape, tensor.bytes.to_vec());
                continue;
            };
            let (bytes, squares) = repack(&tensor, ty, path, name)?;
            let total = found.packed.entry(ty.name().to_owned()).or_default();
            total.tensors += 1;
            total.bytes += bytes.len() as u64;
            let sum = errors.entry(ty.name().to_owned()).or_default();
            sum[0] += squares[0];
            sum[1] += squares[1];
            total.relative_error = if sum[1] > 0.0 { (sum[0] / sum[1]).sqrt() } else { 0.0 };
            writer.tensor(name, ty, &tensor.shape, bytes);
        }
        if has_tied_copy(config, &file, part) {
            writer.note(TIED_NOTE.0, TIED_NOTE.1);
        }
        let written = folder.join(format!("part-{index:05}.safetensors"));
        writer.write(&written)?;
        found.part_files.push(written);
    }
    on_progress(Progress {
        parts_done: parts,
        parts,
    });
    Ok(found)
}

/// The type that a tensor is to have, where it is to have another than it has.
fn type_for(name: &str, tensor: &TensorSource, to: PackedType, is_end: bool) -> Option<PackedType> {
    let spared = [
        "norm",
        "router",
        "conv1d",
        ".gate.weight",
        "indexer",
        "weights_proj",
        "A_log",
        "bias",
    ];
    if tensor.shape.len() < 2 || spared.iter().any(|part| name.contains(part)) {
        return None;
    }
    let cols = tensor.shape.last().copied().unwrap_or(0);
    let to = match to {
        few if is_end && bits(few) < bits(PackedType::Q6K) => PackedType::Q6K,
        enough => enough,
    };
    let ty = narrowest_that_fits(to, cols)?;
    let is_nearer = ty.is_float() || tensor.ty.is_float() || bits(tensor.ty) > bits(ty);
    (ty != tensor.ty && is_nearer).then_some(ty)
}

/// `to`, or what is used in its place for rows that are no whole number of its blocks. `None` where nothing fits.
fn narrowest_that_fits(to: PackedType, cols: usize) -> Option<PackedType> {
    if cols.is_multiple_of(to.block_elements()) {
        return Some(to);
    }
    let smaller = match to {
        PackedType::Q2K | PackedType::Q3K => PackedType::Iq4Nl,
        PackedType::Q4K => PackedType::Q5_0,
        PackedType::Q5K => PackedType::Q5_1,
        _ => PackedType::Q8_0,
    };
    cols.is_multiple_of(smaller.block_elements()).then_some(smaller)
}

/// Bits of one element, in thousandths.
const fn bits(ty: PackedType) -> usize {
    8_000 * ty.block_bytes() / ty.block_elements()
}

/// The bytes in another type, and the squares of the differences and of the values.
fn repack(tensor: &TensorSource, ty: PackedType, path: &Path, name: &str) -> Result<(Vec<u8>, [f64; 2]), WeightsError> {
    let quant = || WeightsError::quant(path, name);
    let values = tensor.to_f32().map_err(quant())?;
    let cols = tensor.shape.last().copied().unwrap_or(1).max(1);
    // Whole rows, so that no block begins in one piece and ends in another.
    let piece = (PIECE / cols).max(1) * cols;
    let pieces = values
        .par_chunks(piece)
        .map(|values| {
            if !values.iter().all(|value| value.is_finite()) {
                return Err(WeightsError::NotFinite {
                    path: path.to_owned(),
                    tensor: name.to_owned(),
                });
            }
            let bytes = narrow(ty, values).map_err(quant())?;
            let mut back = vec![0.0; values.len()];
            widen(ty, &bytes, &mut back).map_err(quant())?;
            let mut squares = [0.0; 2];
            for (value, back) in values.iter().zip(&back) {
                squares[0] += f64::from(value - back).powi(2);
                squares[1] += f64::from(*value).powi(2);
            }
            Ok((bytes, squares))
        })
        .collect::<Result<Vec<_>, WeightsError>>()?;
    let mut all = Vec::with_capacity(ty.row_bytes(values.len()).unwrap_or(0));
    let mut squares = [0.0; 2];
    for (bytes, some) in pieces {
        all.extend(bytes);
        squares[0] += some[0];
        squares[1] += some[1];
    }
    if !squares[0].is_finite() {
        // Such as a value beyond the range of F16.
        return Err(WeightsError::NotFinite {
            path: path.to_owned(),
            tensor: name.to_owned(),
        });
    }
    Ok((all, squares))
}

fn has_tied_copy(config: &Config, file: &PartFile, part: &PartLayout) -> bool {
    let own = part.tensors.iter().any(|tensor| tensor.name == OUTPUT);
    config.tied && !own && file.names().any(|name| name == OUTPUT)
}
