//! Weights on disk: part files, Hugging Face folders, GGUF files, and the way from one to the other.
//!
//! Every file here may come from a stranger: each count and length is checked against the file's own size before
//! memory is taken, and each error names the file, the tensor or field, and what is wrong with it.

mod error;
mod export;
mod fp8;
mod gguf;
mod hugging_face;
mod import;
mod inspect;
mod parameters;
mod part_file;
mod part_writer;
mod quantise;
mod source;

pub use error::WeightsError;
pub use export::{Exported, Vectors, export};
pub use gguf::{Gguf, GgufError, export_gguf};
pub(crate) use hugging_face::open_folder;
pub use import::{ImportedModel, Progress, import};
pub(crate) use import::{Tensors, open};
pub use inspect::{Summary, TypeTotal, inspect};
pub use parameters::folder_parameters;
pub(crate) use parameters::parameters;
pub use part_file::{PartFile, TensorSource};
pub use part_writer::{PartWriter, write_state_part};
pub use quantise::{Packed, Quantised, quantise};
