//! The live picture of the demonstration, drawn in place below the terminal's last line.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Gauge, Paragraph, Sparkline};

use super::view::{LanguageLine, View, bytes};

/// Lines that the picture takes.
pub(crate) const HEIGHT: u16 = 22;

/// Columns without which its panels cut off what they show.
pub(crate) const WIDTH_MIN: u16 = 74;

const ACCENT: Color = Color::Rgb(64, 156, 255);
const QUIET: Color = Color::DarkGray;
const GOOD: Color = Color::Rgb(80, 200, 120);

/// Draws the whole picture.
pub(crate) fn draw(frame: &mut Frame<'_>, view: &View) {
    let [head, gauge, middle, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(8),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let clock = format!("{:>3} s", view.elapsed.as_secs());
    frame.render_widget(
        Line::from(vec![
            Span::styled("Polder ", Style::new().fg(ACCENT).add_modifier(Modifier::BOLD)),
            Span::raw(view.headline.clone()),
            Span::styled(format!("   {clock}"), Style::new().fg(QUIET)),
        ]),
        head,
    );
    let (done, planned) = view.rounds;
    let ratio = if planned == 0 {
        0.0
    } else {
        (done as f64 / planned as f64).clamp(0.0, 1.0)
    };
    frame.render_widget(
        Gauge::default()
            .ratio(ratio)
            .label(format!("round {done} of {planned}"))
            .gauge_style(Style::new().fg(ACCENT).bg(Color::Black)),
        gauge,
    );
    let [left, right] = Layout::horizontal([Constraint::Length(44), Constraint::Min(30)]).areas(middle);
    let [nodes, curve] = Layout::vertical([
        Constraint::Length(u16::try_from(view.nodes.len()).unwrap_or(4).saturating_add(2)),
        Constraint::Min(4),
    ])
    .areas(left);
    draw_nodes(frame, nodes, view);
    draw_curve(frame, curve, view);
    draw_languages(frame, right, view);
    frame.render_widget(traffic(view), foot);
}

fn panel(title: &str) -> Block<'_> {
    Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(Style::new().fg(QUIET))
        .title(Span::styled(format!(" {title} "), Style::new().fg(ACCENT)))
}

fn draw_nodes(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let lines: Vec<Line<'_>> = view
        .nodes
        .iter()
        .map(|node| {
            Line::from(vec![
                Span::styled(format!("{:<11}", node.name), Style::new().add_modifier(Modifier::BOLD)),
                Span::raw(format!("{:<12}", node.role)),
                Span::styled(format!("{:<9}", node.state), Style::new().fg(QUIET)),
                Span::styled(node.state_hash.clone(), Style::new().fg(GOOD)),
            ])
        })
        .collect();
    frame.render_widget(Paragraph::new(lines).block(panel("nodes")), area);
}

fn draw_curve(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let loss = view.loss().map_or_else(|| "-".into(), |loss| format!("{loss:.3}"));
    let title = format!("loss {loss} · {:.0} tokens/s", view.tokens_per_second);
    let lowest = view.losses.iter().copied().fold(f64::INFINITY, f64::min);
    // Thousandths of a nat above a floor just below the lowest, so that the curve fills its panel.
    let data: Vec<u64> = view
        .losses
        .iter()
        .map(|loss| ((loss - lowest) * 1_000.0) as u64 + 100)
        .collect();
    let width = usize::from(area.width.saturating_sub(2));
    let shown = data.get(data.len().saturating_sub(width)..).unwrap_or_default();
    frame.render_widget(
        Sparkline::default()
            .block(panel(&title))
            .style(Style::new().fg(ACCENT))
            .data(shown),
        area,
    );
}

fn draw_languages(frame: &mut Frame<'_>, area: Rect, view: &View) {
    let block = panel("held-out bits per byte: model / primed compressor / order 0");
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let rows = usize::from(inner.height).max(1);
    let columns = view.languages.len().div_ceil(rows).clamp(1, 3);
    let per_column = view.languages.len().div_ceil(columns);
    let areas =
        Layout::horizontal(vec![Constraint::Ratio(1, u32::try_from(columns).unwrap_or(1)); columns]).split(inner);
    let all: Vec<(&String, &LanguageLine)> = view.languages.iter().collect();
    for (chunk, area) in all.chunks(per_column.max(1)).zip(areas.iter()) {
        let lines: Vec<Line<'_>> = chunk
            .iter()
            .map(|(code, line)| {
                let color = if line.now < line.compressor {
                    GOOD
                } else if line.now < line.order_0 {
                    ACCENT
                } else {
                    Color::Reset
                };
                Line::from(vec![
                    Span::styled(format!("{code:<3}"), Style::new().add_modifier(Modifier::BOLD)),
                    Span::styled(format!("{:5.2}", line.now), Style::new().fg(color)),
                    Span::styled(
                        format!(" {:4.2} {:4.2}", line.compressor, line.order_0),
                        Style::new().fg(QUIET),
                    ),
                ])
            })
            .collect();
        frame.render_widget(Paragraph::new(lines), *area);
    }
}

fn traffic(view: &View) -> Line<'static> {
    let saving = view
        .saving()
        .map_or_else(|| "-".into(), |saving| format!("{saving:.0} times less"));
    let agreed = if view.rounds_agreed == view.rounds.0 {
        GOOD
    } else {
        Color::Red
    };
    Line::from(vec![
        Span::raw(format!(
            "sent {} · dense f32 would have sent {} · ",
            bytes(view.sent_bytes),
            bytes(view.dense_bytes)
        )),
        Span::styled(saving, Style::new().fg(GOOD)),
        Span::raw(" · "),
        Span::styled(
            format!("equal hashes after {} of {} rounds", view.rounds_agreed, view.rounds.0),
            Style::new().fg(agreed),
        ),
    ])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::command::demo::view::NodeLine;

    #[test]
    fn the_picture_names_every_node_and_language() {
        let view = example();
        let mut terminal = Terminal::new(TestBackend::new(110, HEIGHT)).expect("a buffer");
        terminal.draw(|frame| draw(frame, &view)).expect("drawn");
        let text = terminal.backend().to_string();
        for word in [
            "leiden-1",
            "uppsala-2",
            "de",
            "el",
            "round 3 of 12",
            "equal hashes after 3 of 3 rounds",
        ] {
            assert!(text.contains(word), "{word} is missing from:\n{text}");
        }
    }

    #[test]
    fn a_small_terminal_is_no_reason_to_fail() {
        for (width, height) in [(1, 1), (20, 4), (60, 10)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a buffer");
            terminal.draw(|frame| draw(frame, &example())).expect("drawn");
        }
    }

    fn example() -> View {
        let node = |name: &str| NodeLine {
            name: name.into(),
            role: "whole model".into(),
            state: "training".into(),
            state_hash: "0badcafe".into(),
        };
        let line = LanguageLine {
            order_0: 4.2,
            compressor: 2.9,
            now: 2.7,
        };
        View {
            headline: "two institutions train one model".into(),
            elapsed: Duration::from_secs(42),
            rounds: (3, 12),
            losses: vec![3.2, 2.5, 2.2],
            tokens_per_second: 31_000.0,
            nodes: ["leiden-1", "leiden-2", "uppsala-1", "uppsala-2"].map(node).into(),
            languages: ["de", "el", "en", "fr"].map(|code| (code.to_owned(), line)).into(),
            sent_bytes: 1 << 20,
            dense_bytes: 1 << 30,
            rounds_agreed: 3,
        }
    }
}
