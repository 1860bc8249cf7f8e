//! `polder model pull`: a published model from a hub, as [`super::import`] takes it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::context::Context;
use crate::failure::Hint;
use crate::hub::{self, Facts, Hub, Place};

/// Fetches what `text` names and imports it. Files stay in the home's folder `pulls` until the model is in.
pub(super) fn pull(context: &Context, text: &str, name: Option<String>) -> anyhow::Result<()> {
    let place: Place = text
        .parse::<Place>()
        .hint("name it as hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME/FILE.gguf")?;
    let hub = Hub::from_environment()?;
    let listing = hub.list(&place)?;
    let repository = context.home().join("pulls").join(&place.organisation).join(&place.name);
    let at_commit = repository.join(&listing.commit);
    // The last step is what the model will be called.
    let folder = at_commit.join(&place.name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;

    let download = Download {
        hub: &hub,
        place: &place,
        commit: &listing.commit,
        folder: &folder,
        bar: bytes_bar(context),
    };
    let model = match &place.file {
        Some(file) if !listing.files.contains(file) => {
            let there = listing.files.iter().filter(|file| file.ends_with(".gguf")).take(8);
            let there: Vec<&str> = there.map(String::as_str).collect();
            return Err(anyhow::anyhow!("`{file}` is not in the repository"))
                .hint(format!("its GGUF files are: {}", there.join(", ")));
        }
        Some(file) => {
            download.all(std::slice::from_ref(file))?;
            download.target(file)
        }
        None => {
            let first = hub::first_files(&listing.files)?;
            download.all(&first)?;
            if let Some(index) = first.iter().find(|file| file.ends_with(".index.json")) {
                let index = fs::read(download.target(index)).context("cannot read the index of weights")?;
                download.all(&hub::shards(&index, &listing.files)?)?;
            }
            folder.clone()
        }
    };
    download.bar.finish_and_clear();
    super::import(context, &model, name)?;
    fs::remove_dir_all(&at_commit).with_context(|| format!("cannot remove {}", at_commit.display()))?;
    // What other pulls use is not empty, and stays.
    for empty in repository.ancestors().take(3) {
        if fs::remove_dir(empty).is_err() {
            break;
        }
    }
    Ok(())
}

struct Download<'a> {
    hub: &'a Hub,
    place: &'a Place,
    commit: &'a str,
    folder: &'a Path,
    bar: ProgressBar,
}

impl Download<'_> {
    fn all(&self, files: &[String]) -> anyhow::Result<()> {
        let facts = files.iter().map(|file| self.hub.facts(self.place, self.commit, file));
        let facts = facts.collect::<anyhow::Result<Vec<Facts>>>()?;
        let total: u64 = facts.iter().map(|facts| facts.bytes).fold(0, u64::saturating_add);
        if i64::try_from(total).is_err() {
            bail!("the hub says that the model has {total} bytes");
        }
        self.bar.inc_length(total);
        for facts in &facts {
            self.bar.set_message(facts.file.clone());
            let target = self.target(&facts.file);
            hub::fetch(
                self.hub,
                self.place,
                self.commit,
                facts,
                &target,
                &mut |bytes| match bytes {
                    0.. => self.bar.inc(bytes.unsigned_abs()),
                    _ => self.bar.dec(bytes.unsigned_abs()),
                },
            )?;
        }
        Ok(())
    }

    /// Where a file of the repository lies here: those that are fetched have different names whatever their folders.
    fn target(&self, file: &str) -> PathBuf {
        self.folder.join(file.rsplit('/').next().unwrap_or(file))
    }
}

/// On standard error, hidden where nobody watches.
fn bytes_bar(context: &Context) -> ProgressBar {
    if context.json() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let template = "{wide_msg} {binary_bytes:>10}/{binary_total_bytes} {binary_bytes_per_sec:>12} {eta:>4}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
