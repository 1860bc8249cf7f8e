//! A model's weights as parameters: f32, per part, in layout order.

use std::path::Path;

use polder_protocol::layout::{Layout, PartLayout};

use super::source::read_text;
use super::{Tensors, WeightsError, open_folder};
use crate::model::{Config, layout};

/// A Hugging Face folder's configuration, its layout and its parameters per part, widened to f32.
///
/// # Errors
///
/// [`WeightsError`] names the file, key or tensor at fault.
pub fn folder_parameters(folder: &Path) -> Result<(String, Layout, Vec<Vec<f32>>), WeightsError> {
    let path = folder.join("config.json");
    let config_json = read_text(&path)?;
    let config = Config::from_json(&config_json).map_err(|source| WeightsError::Config { path, source })?;
    let layout = layout(&config);
    let parameters = parameters(&layout, &*open_folder(folder, &config_json)?)?;
    Ok((config_json, layout, parameters))
}

/// Parameters per part as state blobs hold them.
pub(crate) fn parameters(layout: &Layout, tensors: &dyn Tensors) -> Result<Vec<Vec<f32>>, WeightsError> {
    let part = |part: &PartLayout| {
        let mut values = Vec::new();
        for tensor in &part.tensors {
            let source = tensors.tensor(&tensor.name)?;
            let expected: Vec<usize> = tensor.shape.iter().map(|size| *size as usize).collect();
            if source.shape != expected {
                return Err(WeightsError::Shape {
                    path: tensors.place().to_owned(),
                    tensor: tensor.name.clone(),
                    expected,
                    found: source.shape,
                });
            }
            let own = source.to_f32();
            values.extend(own.map_err(WeightsError::quant(tensors.place(), &tensor.name))?);
        }
        Ok(values)
    };
    layout.parts.iter().map(part).collect()
}
