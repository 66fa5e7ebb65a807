//! Bad input, end to end: real programs and kernel objects, each test in namespaces of its own.
//!
//! For each case: the code is right, the sentence says what happened to which pod and what to do, the
//! node is afterwards as it was before, and no secret is in any output or log.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "what was said is for people to judge, too")]

mod calls;
mod check;
mod control;
mod credentials;
mod joining;
mod place;
mod records;
mod start;
mod unserved;
