//! Entry point.

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Say what this host can do
    Doctor(cofferdam::doctor::Args),
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    match Cli::parse().command {
        Command::Doctor(args) => cofferdam::doctor::run(&args),
    }
}
