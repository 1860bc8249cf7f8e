//! Asks the nodes how they are doing, and shows it: as a live picture on a terminal, as lines elsewhere.

use std::io::{IsTerminal, Stdout};
use std::time::Instant;

use anyhow::Context as _;
use polder_node::train::RunStatus;
use ratatui::backend::CrosstermBackend;
use ratatui::{Terminal, TerminalOptions, Viewport};

use crate::client::Client;
use crate::context::Context;

use super::processes::Node;
use super::screen;
use super::view::{LanguageLine, NodeLine, View};

/// The nodes' own reports, joined.
pub(super) struct Watched {
    began: Instant,
    path: String,
    rounds: u64,
    nodes: Vec<(String, Client)>,
    last: Vec<Option<RunStatus>>,
}

impl Watched {
    pub(super) fn new(nodes: &[Node], run: &str, rounds: u64) -> anyhow::Result<Self> {
        let clients = nodes
            .iter()
            .map(|node| Ok((node.name.clone(), Client::open(&node.home)?)));
        Ok(Self {
            began: Instant::now(),
            path: format!("/train/runs/{run}"),
            rounds,
            last: vec![None; nodes.len()],
            nodes: clients.collect::<anyhow::Result<_>>()?,
        })
    }

    /// Asks every node. One that does not answer keeps what it said last.
    pub(super) fn look(&mut self) -> anyhow::Result<View> {
        for ((_, client), last) in self.nodes.iter().zip(&mut self.last) {
            if let Ok(status) = client.get::<RunStatus>(&self.path) {
                *last = Some(status);
            }
        }
        let steward = self.last.first().cloned().flatten().unwrap_or_default();
        let languages = steward.languages.iter().filter_map(|(code, line)| {
            let now = line.now?;
            let (order_0, compressor) = (line.order_0, line.compressor);
            Some((
                code.clone(),
                LanguageLine {
                    order_0,
                    compressor,
                    now,
                },
            ))
        });
        Ok(View {
            headline: "Leiden and Uppsala train one model; their texts stay at home".into(),
            elapsed: self.began.elapsed(),
            rounds: (steward.rounds_done, self.rounds),
            losses: steward.recent.iter().map(|round| round.loss).collect(),
            tokens_per_second: steward.tokens_per_second,
            nodes: self
                .nodes
                .iter()
                .zip(&self.last)
                .map(|((name, _), status)| line(name, status.as_ref()))
                .collect(),
            languages: languages.collect(),
            sent_bytes: self.sum(|status| status.sent_bytes),
            dense_bytes: self.sum(|status| status.dense_bytes),
            rounds_agreed: steward.rounds_done.saturating_sub(self.diverged()),
        })
    }

    /// Whether the run is over.
    pub(super) fn ended(&self) -> bool {
        let phase = |status: &RunStatus| status.phase == "finished" || status.phase == "stopped";
        self.last.first().and_then(Option::as_ref).is_some_and(phase)
    }

    /// What a node says went wrong, where one does.
    pub(super) fn trouble(&self) -> Option<String> {
        self.last.iter().flatten().find_map(|status| status.trouble.clone())
    }

    fn sum(&self, pick: fn(&RunStatus) -> u64) -> u64 {
        self.last.iter().flatten().map(pick).sum()
    }

    /// The most rounds after which some node had another hash than the log.
    fn diverged(&self) -> u64 {
        self.last
            .iter()
            .flatten()
            .map(|status| status.rounds_diverged)
            .max()
            .unwrap_or(0)
    }
}

fn line(name: &str, status: Option<&RunStatus>) -> NodeLine {
    let status = status.cloned().unwrap_or_default();
    NodeLine {
        name: name.to_owned(),
        role: status.role,
        state: status.activity,
        state_hash: status.state_hash.chars().take(8).collect(),
    }
}

/// Where progress goes.
pub(super) enum Display {
    /// Drawn in place.
    Picture(Box<(Terminal<CrosstermBackend<Stdout>>, View)>),
    /// One line for every round.
    Lines { rounds: u64, quiet: bool },
}

impl Display {
    pub(super) fn new(context: &Context) -> anyhow::Result<Self> {
        let out = std::io::stdout();
        let plain =
            std::env::var_os("NO_COLOR").is_some() || std::env::var_os("TERM").is_some_and(|name| name == "dumb");
        let narrow = ratatui::crossterm::terminal::size().is_ok_and(|(columns, _)| columns < screen::WIDTH_MIN);
        if context.json() || !out.is_terminal() || plain || narrow {
            return Ok(Self::Lines {
                rounds: 0,
                quiet: context.json(),
            });
        }
        let options = TerminalOptions {
            viewport: Viewport::Inline(screen::HEIGHT),
        };
        let terminal =
            Terminal::with_options(CrosstermBackend::new(out), options).context("cannot draw on this terminal")?;
        Ok(Self::Picture(Box::new((terminal, View::default()))))
    }

    /// Says what is going on before there is anything to watch.
    pub(super) fn headline(&mut self, text: &str) -> anyhow::Result<()> {
        match self {
            Self::Picture(picture) => {
                let view = View {
                    headline: text.to_owned(),
                    ..picture.1.clone()
                };
                self.show(&view)
            }
            Self::Lines { quiet: true, .. } => Ok(()),
            Self::Lines { .. } => crate::context::write_all(&format!("{text}\n")),
        }
    }

    /// Shows the state of things.
    pub(super) fn show(&mut self, view: &View) -> anyhow::Result<()> {
        match self {
            Self::Picture(picture) => {
                let (terminal, kept) = picture.as_mut();
                kept.clone_from(view);
                terminal
                    .draw(|frame| screen::draw(frame, view))
                    .context("cannot draw on this terminal")?;
            }
            Self::Lines { rounds, quiet } => {
                if view.rounds.0 > *rounds {
                    *rounds = view.rounds.0;
                    if !*quiet {
                        crate::context::write_all(&format!("{}\n", view.line()))?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for Display {
    /// Leaves the last picture where it is, and lets text go on below it.
    fn drop(&mut self) {
        let Self::Picture(picture) = self else { return };
        let terminal = &mut picture.0;
        let last = terminal.get_frame().area().bottom().saturating_sub(1);
        // A terminal that has gone away has no picture to leave.
        let _ = terminal.set_cursor_position((0, last));
        let _ = terminal.show_cursor();
        let _ = crate::context::write_all("\n");
    }
}
