//! Polder's machines under virtual time: thousands of nodes' worth of faults, each repeatable from its seed.

mod engine;
mod invariants;
mod oracle;
mod worlds;

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};

use engine::{Engine, Tally};
use worlds::{Flaw, World};

/// Polder's machines under virtual time.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Training rounds under loss, delay, partitions, crashes and restarts.
    Rounds {
        /// How many seeds, from --first on.
        #[arg(long, default_value_t = 100)]
        seeds: u64,
        /// The first seed.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// One seed only; prints the hash of its trace.
        #[arg(long)]
        seed: Option<u64>,
        /// Tell the story on standard error: entries, jobs and faults.
        #[arg(long)]
        tell: bool,
        /// Nodes of a world, at least 3.
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(3..=64))]
        nodes: u8,
    },
}

fn main() -> ExitCode {
    let What::Rounds {
        seeds,
        first,
        seed,
        tell,
        nodes,
    } = Arguments::parse().what;
    let range = match seed {
        Some(seed) => seed..seed.saturating_add(1),
        None => first..first.saturating_add(seeds),
    };
    let began = Instant::now();
    let count = range.end - range.start;
    let mut total = Tally::default();
    for number in range {
        let ended = Engine::new(World::of_seed(number, nodes, Flaw::None))
            .telling(tell)
            .run();
        total.add(&ended.tally);
        if let Some(violation) = ended.violation {
            eprintln!("error: seed {number} violates `{}`", violation.invariant);
            eprintln!("  after {:.3} s of virtual time: {}", ended.seconds, violation.what);
            eprintln!("  repeat: cargo run --release -p polder-simulations -- rounds --seed {number} --nodes {nodes}");
            return ExitCode::FAILURE;
        }
        if seed.is_some() {
            println!("seed {number}: trace {}", ended.trace);
        }
    }
    println!(
        "{count} seeds of {nodes} nodes in {:.1} s: no invariant violated",
        began.elapsed().as_secs_f64()
    );
    println!("{total}");
    ExitCode::SUCCESS
}
