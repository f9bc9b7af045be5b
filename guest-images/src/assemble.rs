//! One initramfs out of the stages.

use std::collections::BTreeSet;
use std::path::Path;

use agent_protocol::init_config;

use crate::Error;
use crate::initramfs::Initramfs;
use crate::manifest::read;
use crate::modules::{Module, modules_dep, normal_name};
use crate::spec::ImageSpec;
use crate::stages::{KernelStage, StagedFile, UserlandStage, wanted_modules};

/// Where programs lie.
const PROGRAM_DIRECTORIES: [&str; 4] = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"];

/// The content of one image; `programs` are its programs and libraries.
pub fn assemble(
    image: &ImageSpec,
    kernel: &KernelStage,
    userland: &UserlandStage,
    programs: &[StagedFile],
    agent: &Path,
) -> Result<Initramfs, Error> {
    let mut archive = Initramfs::new();
    archive.char_device("/dev/console", 0o600, 5, 1);
    for directory in ["/proc", "/sys", "/run", "/tmp", "/root", "/etc"] {
        archive.directory(directory);
    }
    for program in programs {
        match &program.link {
            Some(target) => archive.symlink(&program.path, target),
            None => {
                let mode = if program.runs { 0o755 } else { 0o644 };
                archive.file(&program.path, mode, userland.content(program)?);
            }
        }
    }
    // After the packages: whatever one holds, the agent is what runs.
    archive.file("/init", 0o755, read(agent)?);
    if image.busybox {
        for applet in &userland.applets {
            // A real program goes before busybox's of the same name, wherever it lies.
            if !PROGRAM_DIRECTORIES
                .iter()
                .any(|d| archive.contains(&format!("{d}/{applet}")))
            {
                archive.symlink(&format!("/bin/{applet}"), "busybox");
            }
        }
    }
    let modules = image_modules(image, kernel);
    if !modules.is_empty() {
        let directory = format!("/lib/modules/{}", kernel.release);
        for module in &modules {
            archive.file(
                &format!("{directory}/{}", module.path),
                0o644,
                kernel.module_content(module)?,
            );
        }
        archive.file(
            &format!("{directory}/modules.dep"),
            0o644,
            modules_dep(&modules).into(),
        );
    }
    let init = serde_json::to_vec(&image.init).map_err(|error| Error::Spec {
        image: image.file.clone(),
        reason: format!("what its init does cannot be written: {error}"),
    })?;
    archive.file(init_config::PATH, 0o644, init);
    for file in &image.files {
        archive.file(&file.path, file.mode, file.content.clone());
    }
    Ok(archive)
}

/// The image's modules with what they need, in an order in which they can be loaded.
fn image_modules(image: &ImageSpec, kernel: &KernelStage) -> Vec<Module> {
    let roots: BTreeSet<String> = wanted_modules(image).map(normal_name).collect();
    let mut keep: BTreeSet<&str> = BTreeSet::new();
    for module in kernel.modules.iter().filter(|m| roots.contains(&m.name)) {
        keep.insert(&module.name);
        keep.extend(module.needs.iter().map(String::as_str));
    }
    kernel
        .modules
        .iter()
        .filter(|m| keep.contains(m.name.as_str()))
        .cloned()
        .collect()
}
