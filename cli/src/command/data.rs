//! `polder data`: texts of this institution that training runs may use here. They never leave this node.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;
use polder_node::train::DataSet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::client::{Client, segment};
use crate::context::Context;

/// Name texts of this machine for training; they never leave it
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Register a text file, or a folder of .txt files
    Add {
        /// The name that run files use
        name: String,
        /// The file or folder; nothing is copied
        path: PathBuf,
        /// The language's code, such as `de`
        #[arg(long)]
        language: Option<String>,
    },
    /// Show what is registered
    List,
    /// Forget a data set; its files stay
    Remove {
        /// Its name
        name: String,
    },
}

/// Does what was asked.
pub(crate) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<()> {
    let client = Client::open(context.home())?;
    match arguments.verb {
        Verb::Add { name, path, language } => {
            let path = std::path::absolute(&path).with_context(|| format!("cannot use {}", path.display()))?;
            let body = json!({ "name": name, "path": path, "language": language });
            client.post::<Value>("/train/data", &body)?;
            context.show(&Done { name, done: "added" })
        }
        Verb::List => context.show(&client.get::<Listed>("/train/data")?),
        Verb::Remove { name } => {
            client.post::<Value>(&format!("/train/data/{}/remove", segment(&name)), &json!({}))?;
            context.show(&Done { name, done: "removed" })
        }
    }
}

#[derive(Debug, Serialize)]
struct Done {
    name: String,
    done: &'static str,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.done, self.name)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    data: BTreeMap<String, DataSet>,
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.data.is_empty() {
            return write!(f, "no data");
        }
        for (name, set) in &self.data {
            let language = set.language.as_deref().unwrap_or("-");
            writeln!(f, "{name:20} {language:5} {}", set.path.display())?;
        }
        Ok(())
    }
}
