//! What Polder decides, as plain values: identity, membership, wire format, rounds, sessions, codecs.
//!
//! Nothing here opens a socket, reads a clock, starts a thread or knows a tensor library. Machines take an input and
//! the time and answer with effects; the daemon drives them on a real network, the simulator under virtual time.
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

// Foundations.
pub mod hash;
pub mod rng;
pub mod time;

// Who.
pub mod charter;
pub mod identity;
pub mod invite;
pub mod policy;

// What is said, and what is stored.
pub mod blob;
pub mod epoch;
pub mod layout;
pub mod window;
pub mod wire;
pub mod work;

// Serving.
pub mod directory;
pub mod placement;
pub mod route;
pub mod session;

// Training.
pub mod adapters;
pub mod aggregate;
pub mod codec;
pub mod log;
pub mod round;
pub mod run;

// All of it, composed.
pub mod node;

#[cfg(test)]
mod testing;
