//! Checks of the repository itself. `cargo run --release -p xtask -- walls`, or `… -- fuzz protocol 60`.

mod fuzz;
mod walls;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let outcome = match arguments.as_slice() {
        ["walls"] => walls::check(&root),
        ["fuzz", rest @ ..] => fuzz::Options::read(rest).and_then(|options| fuzz::run(&root, &options)),
        _ => Err(anyhow::anyhow!("usage: xtask walls | {}", fuzz::USAGE)),
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
