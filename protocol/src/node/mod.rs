//! The composed machines of one node: every run that it follows, trains in or keeps the log of.
//!
//! A driver owns the clock, the network, the disk and the device. It hands in [`Input`]s with the time and carries out
//! the [`Effect`]s, **in order**: a [`Effect::Persist`] is durable before any effect after it is begun. That order is
//! all that crash safety rests on: what was persisted before it was said cannot be forgotten after it was heard. A crash
//! between two effects is as good as a crash before the step.

mod io;

pub use io::{Command, Effect, Input, Joining, Persist, Report, RestoredRun};
