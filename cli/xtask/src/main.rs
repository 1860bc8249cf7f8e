//! Checks of the repository itself. `cargo run --release -p xtask -- walls`

mod walls;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let task = std::env::args().nth(1);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let outcome = match task.as_deref() {
        Some("walls") => walls::check(&root),
        _ => Err(anyhow::anyhow!("usage: xtask walls")),
    };
    match outcome {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
