//! The `cofferdam` command as a library, so that its tests and tools can use its parts.

mod asked_to_end;
pub mod bench;
pub mod campaign;
pub mod cli;
pub mod code_fault;
pub mod control;
pub mod debug;
pub mod device;
pub mod doctor;
pub mod ending;
pub mod error_text;
pub mod json_lines;
mod long_work;
mod module_file;
pub mod options;
pub mod process;
pub mod report;
pub mod run;
pub mod runtime_dir;
pub mod sandbox;
pub mod serve;
pub mod signals;
pub mod sweep;
mod table;
pub mod top;
pub mod trial;
pub mod words;
