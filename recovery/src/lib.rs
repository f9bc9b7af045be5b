//! What becomes of a driver's call that failed in its domain, and of the driver.
//!
//! | module | what it is |
//! | --- | --- |
//! | `fault` | faults that are put into calls on purpose, and where in a function |
//! | `interface` | a network interface's configuration, read and put back |
//! | `ladder` | what is tried, in which order, after a fault |
//! | `model` | what kernel functions do that outlasts a call |
//! | `module_file` | a module's file that is to take a running one's place |
//!
//! Knows nothing of a guest's agent or of the command line: who uses it carries out what it decides.

pub mod fault;
pub mod interface;
pub mod ladder;
pub mod model;
pub mod module_file;
