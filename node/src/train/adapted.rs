//! A run that trains adapters: the frozen model under them, the model that comes of both, and adapters as others read them.

use std::fs;
use std::path::{Path, PathBuf};

use polder_protocol::adapters::Adapters;
use polder_protocol::aggregate::PartState;
use polder_protocol::hash::RunId;
use polder_protocol::layout::{BlockRange, Layout, Part, PartLayout, TensorLayout};
use polder_protocol::run::RunSpec;
use polder_protocol::work::Frozen;
use serde_json::json;

use super::desk::utf8;
use super::durable;
use super::export::{ExportError, write_safetensors};
use super::jobs::{JobError, Jobs, blocking, layout_of, read};

/// What Hugging Face's PEFT puts before the names of a model's modules.
const PEFT_PREFIX: &str = "base_model.model.";

/// The frozen model of `range` as a worker is told of it; `None` for a run that trains the model itself.
pub(super) async fn frozen(
    jobs: &Jobs,
    run: RunId,
    spec: &RunSpec,
    range: BlockRange,
) -> Result<Option<Frozen>, JobError> {
    let Some(adapters) = &spec.adapters else {
        return Ok(None);
    };
    let files = base(jobs, run, spec, adapters, range).await?;
    Ok(Some(Frozen {
        adapters: adapters.clone(),
        part_files: files.iter().map(|file| utf8(file)).collect::<Result<_, _>>()?,
    }))
}

/// The model that a state of the run means: one file per part, whose parameters lie as [`RunSpec::model`] says.
pub(super) async fn merged(
    jobs: &Jobs,
    run: RunId,
    spec: &RunSpec,
    states: Vec<PathBuf>,
) -> Result<Vec<PathBuf>, JobError> {
    let Some(adapters) = &spec.adapters else {
        return Ok(states);
    };
    let whole = BlockRange::whole(spec.layout.blocks());
    let base = base(jobs, run, spec, adapters, whole).await?;
    let folder = jobs.folder(run).join("work");
    let mut files = Vec::with_capacity(states.len());
    for ((part, base), state) in (0..).map(Part).zip(base).zip(states) {
        let file = folder.join(format!("{}.merged", part.0));
        let (adapters, own, out) = (adapters.clone(), layout_of(spec, part)?.clone(), file.clone());
        let model = part_of(&adapters.model, part)?.clone();
        blocking(move || {
            let invalid = |error: &dyn std::fmt::Display| JobError::Invalid(format!("part {}: {error}", part.0));
            let parse = |layout: &PartLayout, path: &Path| {
                let bytes = read(path)?;
                PartState::from_bytes(layout, &bytes).map_err(|error| invalid(&error))
            };
            let mut values = parse(&model, &base)?.parameters;
            adapters.merge(&model, &mut values, &parse(&own, &state)?.parameters);
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            durable::write(&out, &bytes).map_err(|error| JobError::Failed(error.to_string()))
        })
        .await?;
        files.push(file);
    }
    Ok(files)
}

/// Writes adapters as PEFT reads them: `adapter_config.json` and `adapter_model.safetensors`, into a folder that is empty or
/// not there. `states` are one state file per part.
pub(super) fn write_adapter(
    folder: &Path,
    adapters: &Adapters,
    layout: &Layout,
    states: &[PathBuf],
) -> Result<(), ExportError> {
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(ExportError::NotEmpty {
            path: folder.to_owned(),
        });
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ExportError::File { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    let named = |part: &PartLayout| PartLayout {
        tensors: part.tensors.iter().map(peft_tensor).collect(),
    };
    let parts: Vec<PartLayout> = layout.parts.iter().map(named).collect();
    let parts: Vec<(&PartLayout, &Path)> = parts.iter().zip(states.iter().map(PathBuf::as_path)).collect();
    write_safetensors(&folder.join("adapter_model.safetensors"), &parts)?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "target_modules": adapters.targets,
    });
    let path = folder.join("adapter_config.json");
    durable::write(&path, format!("{config:#}\n").as_bytes()).map_err(failed(&path))
}

fn peft_tensor(tensor: &TensorLayout) -> TensorLayout {
    TensorLayout {
        name: format!("{PEFT_PREFIX}{}", tensor.name),
        shape: tensor.shape.clone(),
    }
}

/// Has the frozen model's parts of `range`.
async fn base(
    jobs: &Jobs,
    run: RunId,
    spec: &RunSpec,
    adapters: &Adapters,
    range: BlockRange,
) -> Result<Vec<PathBuf>, JobError> {
    let mut wanted = Vec::new();
    for part in range.parts(spec.layout.blocks()).map(Part) {
        let layout = part_of(&adapters.model, part)?;
        let bytes = layout
            .elements()
            .and_then(|elements| u64::try_from(elements).ok()?.checked_mul(4));
        let blob = usize::try_from(part.0).ok().and_then(|index| adapters.base.get(index));
        match (blob, bytes) {
            (Some(blob), Some(bytes)) => wanted.push((*blob, bytes)),
            _ => return Err(JobError::Invalid(format!("the frozen model has no part {}", part.0))),
        }
    }
    jobs.fetch_all(run, wanted, &jobs.sources(run, spec)).await
}

fn part_of(layout: &Layout, part: Part) -> Result<&PartLayout, JobError> {
    let found = usize::try_from(part.0).ok().and_then(|index| layout.parts.get(index));
    found.ok_or_else(|| JobError::Invalid(format!("the model has no part {}", part.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_written_with_the_names_that_peft_gives_them() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        fs::write(&state, [1.0f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat()).unwrap();
        let tensor = |name: &str, shape: [u32; 2]| TensorLayout {
            name: format!("model.layers.0.self_attn.q_proj{name}.weight"),
            shape: shape.to_vec(),
        };
        let adapters = Adapters {
            rank: 1,
            alpha: 2.0,
            targets: vec!["q_proj".into()],
            model: Layout {
                parts: vec![PartLayout {
                    tensors: vec![tensor("", [2, 2])],
                }],
            },
            base: vec![],
        };
        let out = folder.path().join("adapter");
        let states = [state];
        write_adapter(&out, &adapters, &adapters.layout().unwrap(), &states).unwrap();
        let bytes = fs::read(out.join("adapter_model.safetensors")).unwrap();
        let header = String::from_utf8_lossy(&bytes);
        for which in ["A", "B"] {
            assert!(header.contains(&format!(
                "base_model.model.model.layers.0.self_attn.q_proj.lora_{which}.weight"
            )));
        }
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(1), &json!(2.0)));
        let again = write_adapter(&out, &adapters, &adapters.layout().unwrap(), &states);
        assert!(matches!(again, Err(ExportError::NotEmpty { .. })));
    }
}
