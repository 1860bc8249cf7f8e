//! A run's newest state as an epoch: part files and facts, ready to be signed, served and fetched.

use polder_protocol::epoch::Epoch;
use polder_protocol::hash::EpochId;
use serde_json::Value;

use super::export::write_safetensors;
use super::{TrainError, TrainHandle, read};

impl TrainHandle {
    /// Writes the newest state of a run as part files, keeps them as blobs and names them in an epoch. The caller
    /// keeps the epoch and tells others of it.
    ///
    /// # Errors
    ///
    /// [`TrainError`] where the state cannot be had or the disk is full.
    pub async fn publish(&self, run_name: &str, name: &str, parent: Option<EpochId>) -> Result<Epoch, TrainError> {
        let run = self.find(run_name)?;
        let status = self.status_of(run_name)?;
        let (spec, states) = self.newest_state(run).await?;
        self.jobs.tokenizer(run, &spec).await.map_err(super::blob_error)?;
        let work = self.jobs.folder(run).join("work");
        let (mut parts, mut part_bytes) = (Vec::new(), Vec::new());
        for (index, state) in states.into_iter().enumerate() {
            let path = work.join(format!("{index}.safetensors"));
            let layout = spec.layout.parts.get(index).cloned().unwrap_or_default();
            let written = tokio::task::spawn_blocking(move || {
                write_safetensors(&path, &[(&layout, state.as_path())])?;
                let bytes = read(&path);
                // The blob store has its own copy from here on.
                let _ = std::fs::remove_file(&path);
                bytes
            });
            let bytes = written.await.map_err(|_| TrainError::Stopped)??;
            part_bytes.push(bytes.len() as u64);
            // Kept for the epoch's name, so that the run's housekeeping leaves it alone.
            parts.push(self.put(polder_protocol::hash::RunId::default(), bytes).await?);
        }
        let config: Value = serde_json::from_str(&spec.config_json).unwrap_or_default();
        let languages = status.languages.iter();
        let evaluation = languages.filter_map(|(language, line)| {
            let bits = super::jobs::millionths(line.now?);
            Some((format!("bits_per_byte.{language}"), bits))
        });
        let evaluation = evaluation.collect();
        Ok(Epoch {
            version: 1,
            name: name.to_owned(),
            tokenizer: spec.tokenizer,
            chat_template: None,
            end_tokens: ids(&config["eos_token_id"]),
            begin_token: ids(&config["bos_token_id"]).first().copied(),
            parts,
            part_bytes,
            context_tokens_max: id(&config["max_position_embeddings"]).unwrap_or(spec.inner.seq),
            config_json: spec.config_json,
            parent,
            trained: status.rounds_done.checked_sub(1).map(|last| (run, 0, last)),
            evaluation,
        })
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// One token id or a list of them, as Hugging Face writes either.
fn ids(value: &Value) -> Vec<u32> {
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}
