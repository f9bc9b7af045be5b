//! Where log lines go and which are written.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::Context;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// How much to log and where to.
#[derive(Debug, clap::Args)]
pub struct LogOptions {
    /// Log more: -v what happens, -vv details, -vvv everything (RUST_LOG chooses by module)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// Write the log to this file instead of standard error
    #[arg(long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
}

impl LogOptions {
    /// Starts to log.
    pub fn start(&self) -> anyhow::Result<()> {
        let level = match self.verbose {
            0 => LevelFilter::WARN,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        };
        let mut filter = EnvFilter::builder()
            .with_default_directive(level.into())
            .from_env_lossy();
        if self.verbose > 0 {
            filter = filter.add_directive(level.into());
        }
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_target(false);
        match &self.log_file {
            None => builder.with_writer(std::io::stderr).with_ansi(false).init(),
            Some(path) => {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(path)
                    .with_context(|| format!("cannot open the log file {}", path.display()))?;
                builder
                    .with_writer(Mutex::new(file))
                    .with_ansi(false)
                    .init();
            }
        }
        Ok(())
    }
}
