//! `cargo xtask`: everything that is done with this workspace besides writing code.

mod bench;
mod fuzz;
mod images;
mod lab;
mod licences;
mod package;
mod place;
mod setup;
mod steps;
mod suite;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use guest_images::KernelSource;

use steps::Steps;
use workspace::Workspace;

/// Builds, tests, measures and shows Cofferdam
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what the other tasks need and the machine has not
    Setup,
    /// Builds guest kernels and initramfs images out of Debian packages, and the lab's
    Images(images::Args),
    /// Says what isolation lacks of a kernel to contain calls in it
    KernelFacts {
        /// The kernel, whose images are built if they are not there
        #[arg(value_name = "NAME", value_parser = images::by_name)]
        kernel: &'static KernelSource,
    },
    /// Builds the release program
    Build,
    Package(package::Args),
    Test(suite::Args),
    Demo(bench::demo::DemoArgs),
    Bench(bench::Args),
    Fuzz(fuzz::Args),
    Lab(lab::command::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = Workspace::find().and_then(|workspace| match &cli.task {
        Task::Setup => one_step("set up", setup::run),
        Task::Images(args) => one_step("images", || images::main(&workspace, args)),
        Task::KernelFacts { kernel } => images::facts(&workspace, kernel),
        Task::Build => one_step("build", || bench::build(&workspace)),
        Task::Package(args) => one_step("package", || package::run(&workspace, args)),
        Task::Test(args) => suite::main(&workspace, args),
        Task::Demo(args) => bench::demo::demo(&workspace, args),
        Task::Bench(args) => bench::main(&workspace, args),
        Task::Fuzz(args) => fuzz::main(&workspace, args),
        Task::Lab(args) => lab::command::run(&workspace, args),
    });
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn one_step(name: &str, work: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<ExitCode> {
    Steps::new(1).must(name, work)?;
    Ok(ExitCode::SUCCESS)
}
