//! The `cofferdam` command as a library, so that its tests and tools can use its parts.

pub mod doctor;
