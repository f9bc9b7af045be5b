//! `image`: a person's own guest images, out of Debian's packages.

use std::path::PathBuf;

use anyhow::{Context, bail};
use guest_images::agent::find_agent;
use guest_images::kernels::DEFAULT;
use guest_images::user::{Additions, user_image};
use guest_images::{BuildOptions, BuiltImage, KernelSource, images_in};
use serde::Serialize;

use super::images::UserImages;
use super::{Ending, print_bytes, print_json};
use crate::options::VmName;
use crate::table::{number, table};
use crate::words::counted;

/// Where packages are kept in the folder of images.
const PACKAGES: &str = "packages";

/// `image`
#[derive(Debug, clap::Subcommand)]
pub enum ImageCommand {
    /// Build an image: a kernel of Debian's, its modules, an initramfs with the agent
    Build(BuildArgs),
    /// List the images that are there
    List(ListArgs),
}

impl ImageCommand {
    /// `image`
    pub fn run(self) -> anyhow::Result<Ending> {
        match self {
            Self::Build(options) => options.run(),
            Self::List(options) => options.run(),
        }
    }
}

/// `image build`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Packages come from Debian's archive by the apt of this machine, and are kept: building again
asks it for what is new only with --refresh. Nothing is installed. Kernels are 6.1, 6.12 and 7,
the first two as -cloud and -rt too, or a release such as 6.1.0-48-amd64. An image has busybox,
ip, ethtool, the agent and the modules that guests need; of a package it has all but its
documentation, and the libraries that its programs need.

Examples:
  cofferdam image build --kernel debian:6.1
  cofferdam image build --kernel debian:6.12 --module snd_dummy --package fio
  cofferdam image build --kernel 6.1.0-48-amd64 --name old")]
pub struct BuildArgs {
    /// Which kernel
    #[arg(long, value_name = "KERNEL", default_value = "debian:6.1", value_parser = KernelSource::wanted)]
    kernel: (&'static KernelSource, Option<String>),
    /// A module of that kernel that is to be in the image too, with what it needs (may be given
    /// again)
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// A package that is to be in the image too (may be given again)
    #[arg(long, value_name = "NAME")]
    package: Vec<String>,
    /// Name of the image, and of its folder; the kernel's when not given
    #[arg(long, value_name = "NAME")]
    name: Option<VmName>,
    /// Ask the archive for newer packages
    #[arg(long)]
    refresh: bool,
    #[command(flatten)]
    images: UserImages,
    /// Folder where packages are kept [default: packages in the folder of images]
    #[arg(long, value_name = "DIR")]
    packages: Option<PathBuf>,
    /// The guest agent's program, where it is not beside this one
    #[arg(long, value_name = "FILE", env = "COFFERDAM_AGENT")]
    agent: Option<PathBuf>,
    /// What was built as JSON
    #[arg(long)]
    json: bool,
}

/// An image, for a person or a program.
#[derive(Debug, Serialize)]
struct Listed {
    name: String,
    kernel: String,
    directory: PathBuf,
    modules: Vec<String>,
    packages: Vec<Package>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Package {
    name: String,
    version: String,
}

impl Listed {
    fn of(image: &BuiltImage) -> Self {
        let packages = image.manifest.packages.iter().map(|package| Package {
            name: package.name.clone(),
            version: package.version.clone(),
        });
        Self {
            name: image.name.clone(),
            kernel: image.release().to_owned(),
            directory: image.directory.clone(),
            modules: image.modules().map(str::to_owned).collect(),
            packages: packages.collect(),
            bytes: image.size(),
        }
    }

    fn mib(&self) -> u64 {
        self.bytes >> 20
    }
}

impl BuildArgs {
    /// `image build`
    fn run(self) -> anyhow::Result<Ending> {
        let folder = self.images.folder()?;
        let (kernel, release) = self.kernel;
        let name = match (&self.name, &release) {
            (Some(name), _) => name.to_string(),
            (None, Some(release)) => release.clone(),
            (None, None) => kernel.name.to_owned(),
        };
        if name == PACKAGES {
            bail!(
                "an image cannot be called {PACKAGES}: packages are kept in a folder of that name"
            );
        }
        let agent = match self.agent {
            Some(agent) => agent,
            None => std::env::current_exe()
                .ok()
                .and_then(|program| find_agent(&program))
                .context(
                    "the guest agent's program is not where it belongs: install Cofferdam's package, or build it with \
                     `cargo xtask images`, or name it with --agent",
                )?,
        };
        let set = user_image(
            kernel,
            release,
            Additions {
                modules: self.module,
                packages: self.package,
            },
        )?;
        let options = BuildOptions {
            out: folder.join(&name),
            packages: self.packages.unwrap_or_else(|| folder.join(PACKAGES)),
            agent,
            refresh: self.refresh,
            progress: &|line| eprintln!("{line}"),
        };
        let manifest = guest_images::build(&set, &options)
            .with_context(|| format!("cannot build the image {name}"))?;
        let built = Listed::of(&BuiltImage {
            name,
            directory: options.out,
            manifest,
        });
        if self.json {
            print_json(&built)?;
        } else {
            let text = format!(
                "{}: Linux {}, {}, {} MiB in {}\n",
                built.name,
                built.kernel,
                counted(built.modules.len() as u64, "module", "modules"),
                built.mib(),
                built.directory.display()
            );
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}

/// `image list`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  cofferdam image list
  cofferdam image list --json | jq -r '.[].kernel'")]
pub struct ListArgs {
    #[command(flatten)]
    images: UserImages,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl ListArgs {
    /// `image list`
    fn run(&self) -> anyhow::Result<Ending> {
        let folder = self.images.folder()?;
        let images = images_in(&folder)?;
        let listed: Vec<Listed> = images.iter().map(Listed::of).collect();
        if self.json {
            print_json(&listed)?;
            return Ok(Ending::SUCCESS);
        }
        if listed.is_empty() {
            eprintln!(
                "there are no images in {}: `cofferdam image build --kernel debian:{}` makes one",
                folder.display(),
                DEFAULT.name.trim_end_matches("-amd64")
            );
            return Ok(Ending::SUCCESS);
        }
        let mut rows = table(&["image", "kernel", "modules", "packages", "MiB", "folder"]);
        for image in listed {
            rows.add_row(vec![
                image.name.clone().into(),
                image.kernel.clone().into(),
                number(image.modules.len()),
                number(image.packages.len()),
                number(image.mib()),
                image.directory.display().into(),
            ]);
        }
        print_bytes(format!("{rows}\n").as_bytes())?;
        Ok(Ending::SUCCESS)
    }
}
