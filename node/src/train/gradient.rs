//! From the parameters after a replica's inner steps to the blobs of its update.

use std::path::PathBuf;
use std::sync::Arc;

use polder_protocol::aggregate::PartState;
use polder_protocol::codec::{Header, codec_of_round, encode};
use polder_protocol::hash::BlobId;
use polder_protocol::layout::{Part, PartLayout};
use polder_protocol::run::{Codec, state_hash};

use super::feedback::Buffers;
use super::jobs::{JobError, Jobs, Training, blocking, layout_of, read};

/// Where the worker writes the parameters of each part after the inner steps.
pub(super) fn end_files(jobs: &Jobs, training: &Training) -> Vec<PathBuf> {
    let folder = jobs.folder(training.run).join("work");
    let file = |(part, _): &(Part, BlobId)| folder.join(format!("{}.f32", part.0));
    training.base.iter().map(file).collect()
}

/// Encodes `θ(start) − θ(end)` of every part, keeps the frames as blobs, and then moves the error buffers on.
pub(super) async fn keep(
    jobs: &Jobs,
    training: &Training,
    ends: Vec<PathBuf>,
    tokens: u64,
) -> Result<Vec<(Part, BlobId)>, JobError> {
    let buffers = Buffers::new(jobs.folder(training.run).join("feedback"));
    let codec = codec_of_round(&training.spec.outer, training.round.0);
    // Of the parts that this stage has; a whole replica's is the state's.
    let base = state_hash(&training.base.iter().map(|(_, blob)| *blob).collect::<Vec<_>>());
    let mut kept = Vec::with_capacity(training.base.len());
    for ((part, blob), end) in training.base.iter().zip(ends) {
        let part = *part;
        let start = jobs.file(*blob)?;
        let header = Header {
            run: training.run,
            round: training.round.0,
            replica: training.replica.0,
            base,
            part,
            form: codec.into(),
            tokens,
        };
        let (spec, buffers) = (Arc::clone(&training.spec), buffers.clone());
        let frame = blocking(move || {
            let layout = layout_of(&spec, part)?;
            let delta = difference(layout, &read(&start)?, &read(&end)?)?;
            let failed = |error: &dyn std::fmt::Display| JobError::Failed(format!("part {}: {error}", part.0));
            let Codec::TopkQ2 { error_decay, .. } = codec else {
                return encode(&header, layout, &delta).map_err(|error| failed(&error));
            };
            let mut feedback = buffers.load(part, header.round, error_decay, layout);
            let frame = feedback
                .encode(&header, layout, &delta)
                .map_err(|error| failed(&error))?;
            buffers.stage(part, &feedback).map_err(|error| failed(&error))?;
            Ok(frame)
        })
        .await?;
        kept.push((
            part,
            jobs.blobs.put(training.run, frame).await.map_err(JobError::Failed)?,
        ));
    }
    if matches!(codec, Codec::TopkQ2 { .. }) {
        let parts: Vec<Part> = kept.iter().map(|(part, _)| *part).collect();
        let round = training.round.0;
        blocking(move || {
            buffers
                .commit(&parts, round)
                .map_err(|error| JobError::Failed(error.to_string()))
        })
        .await?;
    }
    Ok(kept)
}

fn difference(layout: &PartLayout, start: &[u8], end: &[u8]) -> Result<Vec<f32>, JobError> {
    let parse = |bytes| PartState::from_bytes(layout, bytes).map_err(|error| JobError::Failed(error.to_string()));
    let (start, end) = (parse(start)?.parameters, parse(end)?.parameters);
    Ok(start.iter().zip(&end).map(|(start, end)| start - end).collect())
}
