//! `analyze`: what a driver's module does, read from its file.

mod all;
mod html;
mod kernel;
mod text;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use guest_images::modules::{ModuleTree, normal_name, read_module};
use isolation::analysis::coverage::family_of;
use isolation::analysis::{Report, analyze};

use super::{Ending, print_bytes, print_json};

/// Where `cargo xtask images` puts what it builds.
const IMAGES: &str = "target/images";

/// `analyze`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Nothing is run: the module's file is read, with the types and the text of the kernel that it is for. Files may be
packed (.ko.xz, .ko.zst). docs/analysis.md says what is found, what is not, and how far it is to be trusted.

Examples:
  cofferdam analyze e1000
  cofferdam analyze ./my.ko --kernel target/images/vmlinux --json
  cofferdam analyze e1000 8139too --html report.html
  cofferdam analyze --all --package target/images/packages/linux-image-6.1.0-48-amd64_6.1.172-1_amd64.deb")]
pub struct AnalyzeOptions {
    /// Files of modules, or names of modules of the kernel
    #[arg(required_unless_present = "all")]
    modules: Vec<String>,
    /// All network, block, sound, USB and input modules of the kernel: a table of what could be
    /// isolated
    #[arg(long, conflicts_with = "modules")]
    all: bool,
    /// Folder with the kernel's modules, such as lib/modules/RELEASE [default:
    /// target/images/modules]
    #[arg(long = "modules", value_name = "DIR", id = "dir")]
    directory: Option<PathBuf>,
    /// The kernel, vmlinux or vmlinuz [default: target/images/vmlinux]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Debian package of a kernel, to take kernel and modules from
    #[arg(long, value_name = "DEB", conflicts_with_all = ["dir", "kernel"])]
    package: Option<PathBuf>,
    /// Modules that are read at a time [default: as many as there are processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Write a page as well
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Where a kernel and its modules are.
struct Source {
    kernel: PathBuf,
    modules: PathBuf,
    /// Holds them, if they were unpacked.
    _unpacked: Option<tempfile::TempDir>,
}

impl AnalyzeOptions {
    /// `analyze`
    pub fn run(self) -> anyhow::Result<Ending> {
        let source = self.source()?;
        if self.all {
            return self.run_all(&source);
        }
        let files = self.modules.iter().map(|module| source.file_of(module));
        let files = files.collect::<anyhow::Result<Vec<_>>>()?;
        let first = read(files.first().context("which module?")?)?;
        let kernel = kernel::read(&source.kernel, &first)?;
        let mut reports: Vec<Report> = Vec::new();
        for file in &files {
            let report =
                analyze(&read(file)?, &kernel).with_context(|| file.display().to_string())?;
            reports.push(report);
        }
        if let Some(path) = &self.html {
            html::write_modules(&reports, path)?;
        }
        if self.json {
            print_json(&reports)?;
        } else {
            let text: Vec<String> = reports.iter().map(text::of).collect();
            print_bytes(text.join("\n").as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }

    fn run_all(&self, source: &Source) -> anyhow::Result<Ending> {
        let jobs = self.jobs.map_or_else(
            || std::thread::available_parallelism().map_or(1, usize::from),
            usize::from,
        );
        let table = all::run(&source.kernel, &source.modules, jobs)?;
        if let Some(path) = &self.html {
            html::write_table(&table, path)?;
        }
        if self.json {
            print_json(&table)?;
        } else {
            print_bytes(all::text(&table).as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }

    fn source(&self) -> anyhow::Result<Source> {
        if let Some(package) = &self.package {
            return unpack(package, self.all);
        }
        let of_images = |name: &str| Path::new(IMAGES).join(name);
        Ok(Source {
            kernel: self.kernel.clone().unwrap_or_else(|| of_images("vmlinux")),
            modules: self
                .directory
                .clone()
                .unwrap_or_else(|| of_images("modules")),
            _unpacked: None,
        })
    }
}

impl Source {
    /// The file of a module that is named by its path or its name.
    fn file_of(&self, module: &str) -> anyhow::Result<PathBuf> {
        let path = Path::new(module);
        if module.contains('/') || path.extension().is_some() {
            return Ok(path.to_owned());
        }
        let tree = ModuleTree::open(&self.modules)?;
        let name = normal_name(module);
        let found = tree.files().find(|(known, _)| *known == name);
        let Some((_, file)) = found else {
            bail!(
                "{} has no module {module}; give a file, or a folder with --modules",
                self.modules.display()
            );
        };
        Ok(file.to_owned())
    }
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    Ok(read_module(file)?)
}

/// Unpacks kernel and modules of a package; of these only the families that are tabled, if that
/// will do.
fn unpack(package: &Path, tabled: bool) -> anyhow::Result<Source> {
    let folder = tempfile::tempdir().context("cannot make a folder to unpack into")?;
    let wanted = |path: &str| match path.split_once("/kernel/") {
        Some((_, path)) => path.contains(".ko") && (!tabled || family_of(path).is_some()),
        None => path.starts_with("/boot/vmlinuz-"),
    };
    let files = guest_images::deb::unpack(package, folder.path(), &wanted, &mut |_, _| {})?;
    let is_kernel = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("vmlinuz-"))
    };
    let Some(kernel) = files.iter().find(is_kernel) else {
        bail!("{} holds no kernel (/boot/vmlinuz-...)", package.display());
    };
    // What is listed may be a path in the package or one on this host.
    let kernel = folder
        .path()
        .join(kernel.strip_prefix("/").unwrap_or(kernel));
    Ok(Source {
        kernel,
        modules: folder.path().to_owned(),
        _unpacked: Some(folder),
    })
}
