//! The two slow steps, each kept as a stage: the kernel out of its package, and programs with their
//! libraries out of theirs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::apt::{KernelPackages, Packages};
use crate::kernels::KernelSource;
use crate::manifest::{BUILDER, BuildOptions, PackageUse, package_use, read, to_json};
use crate::modules::{Module, ModuleTree};
use crate::spec::{ImageSet, ImageSpec, Program};
use crate::stage::{Store, hash_file, hash_of};
use crate::userland::{Content, Userland};
use crate::{Error, deb, kernel};

/// File in a stage that says what it holds.
const LIST: &str = "list.json";

/// An unpacked kernel: `vmlinuz`, `vmlinux`, `config` and `modules/NAME.ko`.
pub struct KernelStage {
    pub directory: PathBuf,
    pub release: String,
    /// In an order in which they can be loaded.
    pub modules: Vec<Module>,
    pub packages: Vec<PackageUse>,
}

impl KernelStage {
    /// A module's file.
    pub fn module_content(&self, module: &Module) -> Result<Vec<u8>, Error> {
        read(
            &self
                .directory
                .join("modules")
                .join(format!("{}.ko", module.name)),
        )
    }
}

/// Names of the modules that an image asks for.
pub fn wanted_modules(image: &ImageSpec) -> impl Iterator<Item = &str> {
    image
        .init
        .modules
        .iter()
        .map(|m| m.name.as_str())
        .chain(image.modules.iter().map(String::as_str))
}

/// Fetches and unpacks the kernel.
pub fn kernel_stage(
    set: &ImageSet,
    packages: &Packages<'_>,
    store: &mut Store,
    options: &BuildOptions<'_>,
) -> Result<KernelStage, Error> {
    let found = packages.kernel(set.kernel, set.release.as_deref())?;
    let used: Vec<PackageUse> = found
        .files
        .iter()
        .map(|file| package_use(file))
        .collect::<Result<_, _>>()?;
    let names: BTreeSet<&str> = set
        .images
        .iter()
        .flat_map(wanted_modules)
        .chain(set.host_modules.iter().map(String::as_str))
        .filter(|name| !set.kernel.lacks.contains(name))
        .collect();
    let hashes: Vec<&str> = used.iter().map(|package| package.sha256.as_str()).collect();
    let directory = store.stage("kernel", &(BUILDER, hashes, &names), |stage| {
        make_kernel_stage(&found, set.kernel, &names, stage, options.progress)
    })?;
    let modules = read_list(&directory)?;
    Ok(KernelStage {
        directory,
        release: found.release,
        modules,
        packages: used,
    })
}

/// Unpacks a kernel's packages into what a stage holds.
fn make_kernel_stage(
    packages: &KernelPackages,
    kernel: &KernelSource,
    names: &BTreeSet<&str>,
    stage: &Path,
    progress: &dyn Fn(&str),
) -> Result<(), Error> {
    let tree = stage.join("tree");
    let wanted = |path: &str| path.starts_with("/boot/") || path.contains("/modules/");
    for package in &packages.files {
        let mut told = 0;
        deb::unpack(package, &tree, &wanted, &mut |done, all| {
            let quarter = done * 4 / all.max(1);
            if quarter > told {
                told = quarter;
                progress(&format!("unpacking the kernel package: {} %", quarter * 25));
            }
        })?;
    }
    let write = |path: &Path, content: &[u8]| fs::write(path, content).map_err(Error::io(path));

    let release = &packages.release;
    let under = ["lib/modules", "usr/lib/modules"].map(|d| tree.join(d).join(release));
    let under = under.iter().find(|d| d.is_dir()).unwrap_or(&under[0]);
    // Debian 13's newer packages have these beside the modules.
    let boot = |name: &str| {
        let beside = under.join(name);
        match beside.is_file() {
            true => beside,
            false => tree.join("boot").join(format!("{name}-{release}")),
        }
    };
    let image = read(&boot("vmlinuz"))?;
    let vmlinux = kernel::extract_vmlinux(&image).map_err(|reason| Error::BadKernel {
        path: boot("vmlinuz"),
        reason,
    })?;
    if vmlinux.btf_size == 0 {
        progress("this kernel has no types (BTF): drivers cannot be isolated in it");
    }
    write(&stage.join("vmlinuz"), &image)?;
    write(&stage.join("vmlinux"), &vmlinux.elf)?;
    write(&stage.join("config"), &read(&boot("config"))?)?;

    let directory = stage.join("modules");
    fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
    let tree_of_modules = ModuleTree::open(under)?;
    if let Some(there) = kernel.lacks.iter().find(|name| tree_of_modules.has(name)) {
        return Err(Error::Spec {
            image: kernel.name.into(),
            reason: format!("the kernel has the module {there}: take it from those it lacks"),
        });
    }
    let mut list = Vec::new();
    for (module, content) in tree_of_modules.closure(names.iter().copied())? {
        write(&directory.join(format!("{}.ko", module.name)), &content)?;
        list.push(module);
    }
    write(&stage.join(LIST), &to_json(&list)?)?;
    fs::remove_dir_all(&tree).map_err(Error::io(&tree))
}

fn read_list<T: serde::de::DeserializeOwned>(directory: &Path) -> Result<T, Error> {
    let path = directory.join(LIST);
    serde_json::from_slice(&read(&path)?).map_err(|error| Error::io(&path)(error.into()))
}

/// A program, a library or another file of a package: its path in an image and its file's name in
/// the stage.
#[derive(Serialize, Deserialize)]
pub struct StagedFile {
    pub path: String,
    /// Where it leads, if it is a link; there is no file of it then.
    pub link: Option<String>,
    pub runs: bool,
    name: String,
}

/// What an image has of packages.
#[derive(Serialize)]
struct OfPackages<'a> {
    programs: Vec<Program>,
    whole: &'a [String],
}

/// Programs with their libraries.
#[derive(Serialize, Deserialize)]
pub struct UserlandStage {
    #[serde(skip)]
    directory: PathBuf,
    /// Busybox's commands.
    pub applets: Vec<String>,
    /// For each image of the set, in its order.
    pub images: Vec<Vec<StagedFile>>,
    pub packages: Vec<PackageUse>,
}

impl UserlandStage {
    /// A program's or library's content.
    pub fn content(&self, file: &StagedFile) -> Result<Vec<u8>, Error> {
        read(&self.directory.join(&file.name))
    }
}

/// In the package and in the image.
const BUSYBOX: &str = "/bin/busybox";

/// Fetches and unpacks programs and their libraries.
pub fn userland_stage(
    set: &ImageSet,
    packages: &Packages<'_>,
    store: &mut Store,
    options: &BuildOptions<'_>,
) -> Result<UserlandStage, Error> {
    let busybox = || Program::new("busybox-static", BUSYBOX);
    let wanted: Vec<OfPackages<'_>> = set
        .images
        .iter()
        .map(|i| OfPackages {
            programs: i
                .programs
                .iter()
                .cloned()
                .chain(i.busybox.then(busybox))
                .collect(),
            whole: &i.packages,
        })
        .collect();
    let names: BTreeSet<&str> = wanted
        .iter()
        .flat_map(|image| {
            let programs = image.programs.iter().map(|p| p.package.as_str());
            programs.chain(image.whole.iter().map(String::as_str))
        })
        .collect();
    let mut hashes = Vec::new();
    for file in packages.fetch(&names.into_iter().collect::<Vec<_>>())? {
        hashes.push(hash_file(&file)?);
    }
    let directory = store.stage("userland", &(BUILDER, &wanted, hashes), |stage| {
        (options.progress)("collecting programs and their libraries");
        make_userland_stage(&wanted, packages, stage)
    })?;
    let stage: UserlandStage = read_list(&directory)?;
    Ok(UserlandStage { directory, ..stage })
}

fn make_userland_stage(
    wanted: &[OfPackages<'_>],
    packages: &Packages<'_>,
    stage: &Path,
) -> Result<(), Error> {
    let tree = stage.join("tree");
    fs::create_dir_all(&tree).map_err(Error::io(&tree))?;
    let mut userland = Userland::new(packages, &tree);
    let mut list = UserlandStage {
        directory: stage.into(),
        applets: vec![],
        images: vec![],
        packages: vec![],
    };
    for image in wanted {
        let mut files = Vec::new();
        let whole = userland.packages(image.whole)?;
        for file in userland.programs(&image.programs)?.into_iter().chain(whole) {
            let name = match file.path.trim_start_matches('/').replace('/', "!") {
                // No file's name is longer than 255 bytes.
                long if long.len() > 200 => hash_of(&long),
                name => name,
            };
            let to = stage.join(&name);
            let link = match file.content {
                Content::Link(target) => Some(target),
                Content::File(content) => {
                    fs::write(&to, &content).map_err(Error::io(&to))?;
                    None
                }
            };
            if file.path == BUSYBOX {
                list.applets = applets(&to)?;
            }
            files.push(StagedFile {
                path: file.path,
                link,
                runs: file.runs,
                name,
            });
        }
        list.images.push(files);
    }
    for file in &userland.used {
        list.packages.push(package_use(file)?);
    }
    let path = stage.join(LIST);
    fs::write(&path, to_json(&list)?).map_err(Error::io(&path))?;
    fs::remove_dir_all(&tree).map_err(Error::io(&tree))
}

/// Asks busybox for its commands: it is static and runs anywhere.
fn applets(busybox: &Path) -> Result<Vec<String>, Error> {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    fs::set_permissions(busybox, fs::Permissions::from_mode(0o755)).map_err(Error::io(busybox))?;
    // It looks at its own name, which is another one in the stage.
    let mut command = std::process::Command::new(busybox);
    let output = command
        .arg0("busybox")
        .arg("--list")
        .output()
        .map_err(Error::io(busybox))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let names: Vec<String> = text
        .lines()
        .filter(|n| !matches!(*n, "" | "busybox"))
        .map(str::to_string)
        .collect();
    if !output.status.success() || !names.iter().any(|n| n == "sh") {
        return Err(Error::Command {
            command: "busybox --list".into(),
            reason: format!("{}, and it named {} commands", output.status, names.len()),
        });
    }
    Ok(names)
}
