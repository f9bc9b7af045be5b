//! Builds guest kernels and initramfs images out of Debian packages.
//!
//! ```text
//!  apt-get download        unpack (ar, tar, xz)           assemble
//!  linux-image-6.1.0-*  ─► kernel stage: vmlinuz,     ─┐
//!                          vmlinux, wanted modules     ├─► *.cpio, modules/, manifest.json
//!  busybox-static       ─► userland stage: programs   ─┤
//!  iproute2, ethtool       and their libraries         │
//!  this workspace       ─► guest-agent (cargo)        ─┘
//! ```
//!
//! A stage is a directory named by the hash of all that went into it; it appears whole or not at
//! all. The artefacts are put into place by rename and the manifest is written last, so an
//! interrupted build leaves nothing half-made that looks finished. Same packages and same agent
//! give the same bytes.
//!
//! What an image holds is data ([`spec::ImageSpec`]); [`project_images::images_of`] are the ones
//! the project uses. Packages are fetched by name with the system's own `apt-get` and kept:
//! building again needs no network.

pub mod agent;
pub mod apt;
mod assemble;
pub mod build;
pub mod deb;
mod elf;
mod error;
#[cfg(test)]
mod fixtures;
pub mod folder;
mod full;
mod hardware;
pub mod initramfs;
pub mod kernel;
pub mod kernels;
mod lab;
mod manifest;
pub mod modules;
pub mod project_images;
pub mod spec;
mod stage;
mod stages;
mod swept;
mod unzstd;
pub mod user;
mod userland;

pub use build::build;
pub use error::Error;
pub use folder::{BuiltImage, images_in};
pub use kernels::KernelSource;
pub use manifest::{Artefact, BuildOptions, Manifest, PackageUse};
pub use project_images::images_of;
pub use spec::{ImageSet, ImageSpec};
