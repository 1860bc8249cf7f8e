//! Polder's machines under virtual time: thousands of nodes' worth of faults, each repeatable from its seed.

mod discovery;
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
    /// How nodes find each other by gossip, and what it costs each of them.
    Discovery {
        /// Nodes of each world, in turn.
        #[arg(long, value_delimiter = ',', default_value = "200,1000,10000", value_parser = clap::value_parser!(u32).range(2..=16_000))]
        nodes: Vec<u32>,
        /// The seed.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Nodes of a hundred that pass nothing on.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=50))]
        silent_percent: u64,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().what {
        What::Rounds {
            seeds,
            first,
            seed,
            tell,
            nodes,
        } => rounds((seeds, first, seed), tell, nodes),
        What::Discovery {
            nodes,
            seed,
            silent_percent,
        } => discover(seed, &nodes, silent_percent),
    }
}

fn discover(seed: u64, sizes: &[u32], silent_percent: u64) -> ExitCode {
    let mut all_found = true;
    for nodes in sizes {
        let report = discovery::run(seed, *nodes as usize, silent_percent);
        println!("{report}");
        all_found &= report.all_found();
    }
    if !all_found {
        eprintln!("error: somebody was not found");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn rounds((seeds, first, seed): (u64, u64, Option<u64>), tell: bool, nodes: u8) -> ExitCode {
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
