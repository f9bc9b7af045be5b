//! What isolation lacks of a kernel to contain calls in it: `kernel_facts VMLINUX`, the kernel's
//! ELF file.
//!
//! Says nothing of its modules, nor of what calls leave behind that go on in the guest
//! (`recovery/models`). The exit status is 1 if something lacks.

use std::process::ExitCode;

use isolation::attach::kernel_functions::lacking;
use isolation::guest::btf::Btf;
use isolation::guest::symbols::image::names_in_image;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("which kernel? kernel_facts VMLINUX");
        return ExitCode::from(2);
    };
    let facts = std::fs::read(&path)
        .map_err(|error| error.to_string())
        .and_then(|image| facts(&image));
    match facts {
        Ok(lacking) if lacking.is_empty() => {
            println!("nothing lacks: calls can be contained");
            ExitCode::SUCCESS
        }
        Ok(lacking) => {
            println!("lacks:");
            lacking.iter().for_each(|name| println!("  {name}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{}: {error}", path.display());
            ExitCode::from(2)
        }
    }
}

fn facts(image: &[u8]) -> Result<Vec<String>, String> {
    let types = Btf::from_elf(image, None).map_err(|error| error.to_string())?;
    let names = names_in_image(image)?;
    let names: std::collections::HashSet<String> = names.into_iter().collect();
    Ok(lacking(&types, &|name| names.contains(name)))
}
