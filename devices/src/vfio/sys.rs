//! VFIO's system calls (Linux, include/uapi/linux/vfio.h). All of them are here, with their
//! `unsafe`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd};

use libc::{c_int, c_ulong};
use vfio_bindings::bindings::vfio as api;
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};

/// Requests, without the base (`VFIO_TYPE`, `VFIO_BASE`); all are of the form `_IO`.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Request {
    GetApiVersion = 0,
    CheckExtension = 1,
    SetIommu = 2,
    GroupGetStatus = 3,
    GroupSetContainer = 4,
    GroupGetDeviceFd = 6,
    DeviceGetInfo = 7,
    DeviceGetRegionInfo = 8,
    DeviceGetIrqInfo = 9,
    DeviceSetIrqs = 10,
    DeviceReset = 11,
    IommuMapDma = 13,
    IommuUnmapDma = 14,
}

impl Request {
    fn number(self) -> c_ulong {
        (c_ulong::from(api::VFIO_TYPE) << 8) | c_ulong::from(api::VFIO_BASE + self as u32)
    }
}

fn check(result: c_int) -> io::Result<c_int> {
    match result {
        negative if negative < 0 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Size of an argument, as its field `argsz` has it.
fn argsz<T>() -> u32 {
    // None of them is larger than some tens of bytes.
    size_of::<T>() as u32
}

/// Version of the interface that a container offers.
pub fn api_version(container: &File) -> io::Result<c_int> {
    // SAFETY: the request takes no argument.
    check(unsafe { ioctl(container, Request::GetApiVersion.number()) })
}

/// Whether a container offers an IOMMU of this type.
pub fn has_iommu(container: &File, kind: u32) -> bool {
    // SAFETY: the argument is a number.
    unsafe { ioctl_with_val(container, Request::CheckExtension.number(), kind.into()) == 1 }
}

/// Gives a container with a group its IOMMU.
pub fn set_iommu(container: &File, kind: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe { ioctl_with_val(container, Request::SetIommu.number(), kind.into()) }).map(drop)
}

/// Flags of a group.
pub fn group_flags(group: &File) -> io::Result<u32> {
    let mut status = api::vfio_group_status {
        argsz: argsz::<api::vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: the argument is the structure that the request fills, with its size.
    check(unsafe { ioctl_with_mut_ref(group, Request::GroupGetStatus.number(), &mut status) })?;
    Ok(status.flags)
}

/// Puts a group into a container.
pub fn set_container(group: &File, container: &File) -> io::Result<()> {
    let container = container.as_raw_fd();
    // SAFETY: the argument is a descriptor's number, which the request reads.
    check(unsafe { ioctl_with_ref(group, Request::GroupSetContainer.number(), &container) })
        .map(drop)
}

/// Opens a device of a group.
pub fn open_device(group: &File, name: &str) -> io::Result<File> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the argument is a string with an end.
    let result =
        unsafe { ioctl_with_ptr(group, Request::GroupGetDeviceFd.number(), name.as_ptr()) };
    let descriptor = check(result)?;
    // SAFETY: the kernel gave the descriptor just now; it is nobody else's.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// What a device is.
pub fn device_info(device: &File) -> io::Result<api::vfio_device_info> {
    let mut info = api::vfio_device_info {
        argsz: argsz::<api::vfio_device_info>(),
        flags: 0,
        num_regions: 0,
        num_irqs: 0,
        cap_offset: 0,
        pad: 0,
    };
    // SAFETY: the argument is the structure that the request fills, with its size.
    check(unsafe { ioctl_with_mut_ref(device, Request::DeviceGetInfo.number(), &mut info) })?;
    Ok(info)
}

/// Size, place and flags of a region, without its capabilities.
pub fn region_info(device: &File, index: u32) -> io::Result<api::vfio_region_info> {
    let mut info = api::vfio_region_info {
        argsz: argsz::<api::vfio_region_info>(),
        flags: 0,
        index,
        cap_offset: 0,
        size: 0,
        offset: 0,
    };
    // SAFETY: the argument is the structure that the request fills, with its size.
    check(unsafe { ioctl_with_mut_ref(device, Request::DeviceGetRegionInfo.number(), &mut info) })?;
    Ok(info)
}

/// The same with its capabilities: the bytes of a `vfio_region_info` and what is behind it.
pub fn region_with_capabilities(device: &File, index: u32) -> io::Result<Vec<u8>> {
    /// Longest answer: the kernel's have a few areas.
    const MAX_BYTES: u32 = 64 << 10;
    let bytes = region_info(device, index)?.argsz.min(MAX_BYTES);
    // As many whole words as it takes, aligned for the structure.
    let words = (bytes as usize).div_ceil(size_of::<u64>());
    let mut answer = vec![0_u64; words.max(size_of::<api::vfio_region_info>() / size_of::<u64>())];
    // `argsz`, then `flags`; `index`, then `cap_offset`.
    answer[0] = (answer.len() * size_of::<u64>()) as u64;
    answer[1] = u64::from(index);
    let number = Request::DeviceGetRegionInfo.number();
    // SAFETY: the argument is a `vfio_region_info` with room behind it, and says how much.
    check(unsafe { ioctl_with_mut_ptr(device, number, answer.as_mut_ptr()) })?;
    Ok(answer.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// How many interrupts of a kind a device has.
pub fn irq_count(device: &File, index: u32) -> io::Result<u32> {
    let mut info = api::vfio_irq_info {
        argsz: argsz::<api::vfio_irq_info>(),
        flags: 0,
        index,
        count: 0,
    };
    // SAFETY: the argument is the structure that the request fills, with its size.
    check(unsafe { ioctl_with_mut_ref(device, Request::DeviceGetIrqInfo.number(), &mut info) })?;
    Ok(info.count)
}

/// Changes interrupts of a kind, from `start` on: `flags` says what with them and what
/// `descriptors` are for. With `DATA_NONE` these stay empty.
pub fn set_irqs(
    device: &File,
    index: u32,
    flags: u32,
    start: u32,
    descriptors: &[i32],
) -> io::Result<()> {
    let too_many = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let count = u32::try_from(descriptors.len()).map_err(too_many)?;
    let header = argsz::<api::vfio_irq_set>();
    let bytes = count
        .checked_mul(4)
        .and_then(|data| data.checked_add(header));
    let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
    // The five fields of `vfio_irq_set`, then its data.
    let mut argument = vec![bytes, flags, index, start, count];
    argument.extend(descriptors.iter().map(|descriptor| *descriptor as u32));
    // SAFETY: the argument is a `vfio_irq_set` with `count` descriptors behind it and says its
    // size.
    let result =
        unsafe { ioctl_with_ptr(device, Request::DeviceSetIrqs.number(), argument.as_ptr()) };
    check(result).map(drop)
}

/// Resets a device.
pub fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the request takes no argument.
    check(unsafe { ioctl(device, Request::DeviceReset.number()) }).map(drop)
}

/// Lets the devices of a container reach `bytes` bytes from `address` on of this process at `iova`,
/// to read and write.
///
/// # Safety
/// The bytes are mapped in this process, and are memory that others may change at any time, until
/// they are taken away again.
pub unsafe fn map_dma(container: &File, iova: u64, address: u64, bytes: u64) -> io::Result<()> {
    let map = api::vfio_iommu_type1_dma_map {
        argsz: argsz::<api::vfio_iommu_type1_dma_map>(),
        flags: api::VFIO_DMA_MAP_FLAG_READ | api::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: address,
        iova,
        size: bytes,
    };
    // SAFETY: the argument is the structure that the request reads, with its size; of the memory
    // the caller knows.
    check(unsafe { ioctl_with_ref(container, Request::IommuMapDma.number(), &map) }).map(drop)
}

/// Takes that away again; gives how many bytes it were.
pub fn unmap_dma(container: &File, iova: u64, bytes: u64) -> io::Result<u64> {
    let mut unmap = api::vfio_iommu_type1_dma_unmap {
        argsz: argsz::<api::vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova,
        size: bytes,
        ..Default::default()
    };
    // SAFETY: the argument is the structure that the request reads and fills, with its size.
    check(unsafe { ioctl_with_mut_ref(container, Request::IommuUnmapDma.number(), &mut unmap) })?;
    Ok(unmap.size)
}
