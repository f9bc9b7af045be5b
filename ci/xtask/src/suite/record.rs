//! What came of one test.

use serde::Serialize;

use crate::place::Place;

/// A test that ran.
#[derive(Clone, Debug, Serialize)]
pub struct TestRecord {
    /// Program and test.
    pub name: String,
    /// Where it ran.
    pub place: Place,
    /// Whether it passed.
    pub passed: bool,
    /// Whether it failed at first, and this is what came of its second try.
    pub second_try: bool,
    /// How long it took: to its end from that of the one before it.
    pub seconds: f64,
    /// What the lab's emulator took of this host's processors meanwhile, in seconds, where it is
    /// known: not behind a lab that hung amid tests of one process.
    pub processor_seconds: Option<f64>,
}
