//! The images that the project uses itself.

use crate::full::full_image;
use crate::hardware::hardware_image;
use crate::kernels::KernelSource;
use crate::lab::lab_image;
use crate::spec::{ImageSet, ImageSpec, strings};
use crate::swept::sweep_image;

/// The images of a kernel that the project uses; the lab's is the default kernel's.
pub fn images_of(kernel: &'static KernelSource) -> ImageSet {
    let lab = kernel.is_default().then(lab_image);
    ImageSet {
        kernel,
        release: None,
        images: [small_image(), full_image(), hardware_image(), sweep_image()]
            .into_iter()
            .chain(lab)
            .collect(),
        // Drivers whose imports the model of kernel functions covers.
        host_modules: strings(&["8139too", "r8169"]),
    }
}

/// `initrd-small.cpio`: nothing but `/init`, to time a boot.
pub fn small_image() -> ImageSpec {
    ImageSpec {
        file: "initrd-small.cpio".into(),
        ..ImageSpec::default()
    }
}
