//! A run's newest state as an epoch: part files and facts, ready to be signed, served and fetched.

use polder_protocol::epoch::Epoch;
use polder_protocol::hash::EpochId;
use polder_protocol::layout::{Layout, PartLayout};
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
        let (spec, states) = self.newest_model(run).await?;
        self.jobs.tokenizer(run, &spec).await.map_err(super::blob_error)?;
        let work = self.jobs.folder(run).join("work");
        let (mut parts, mut part_bytes) = (Vec::new(), Vec::new());
        let config: Value = serde_json::from_str(&spec.config_json).unwrap_or_default();
        let head = states.len().saturating_sub(1);
        let mut copy = projection_of_tied(&config, spec.model()).zip(states.first().cloned());
        for (index, state) in states.into_iter().enumerate() {
            let path = work.join(format!("{index}.safetensors"));
            let layout = spec.model().parts.get(index).cloned().unwrap_or_default();
            let copy = if index == head { copy.take() } else { None };
            let written = tokio::task::spawn_blocking(move || {
                let mut sources = vec![(&layout, state.as_path())];
                sources.extend(copy.iter().map(|(layout, state)| (layout, state.as_path())));
                write_safetensors(&path, &sources)?;
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

/// The embedding under the name of the output projection, where a model uses one for both: the head's part carries a
/// copy, so that a stage with the head needs no part but its own.
fn projection_of_tied(config: &Value, layout: &Layout) -> Option<PartLayout> {
    let mut embedding = layout.parts.first()?.clone();
    let [tensor] = embedding.tensors.as_mut_slice() else {
        return None;
    };
    tensor.name = "lm_head.weight".to_owned();
    (config["tie_word_embeddings"] == true).then_some(embedding)
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

#[cfg(test)]
mod tests {
    use super::*;
    use polder_protocol::layout::TensorLayout;
    use serde_json::json;

    #[test]
    fn the_head_of_a_tied_model_gets_the_embedding_under_its_own_name() {
        let embedding = TensorLayout {
            name: "model.embed_tokens.weight".to_owned(),
            shape: vec![4, 2],
        };
        let part = PartLayout {
            tensors: vec![embedding],
        };
        let layout = Layout {
            parts: vec![part, PartLayout::default(), PartLayout::default()],
        };
        let tied = projection_of_tied(&json!({"tie_word_embeddings": true}), &layout).unwrap();
        assert_eq!(tied.tensors[0].name, "lm_head.weight");
        assert_eq!(tied.tensors[0].shape, [4, 2]);
        assert_eq!(
            projection_of_tied(&json!({"tie_word_embeddings": false}), &layout),
            None
        );
        assert_eq!(projection_of_tied(&json!({}), &layout), None);
    }
}
