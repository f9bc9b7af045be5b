//! What is known of functions of Linux by name, for the analysis. Names are those that modules
//! import: what is inline is not seen. Linux 5.10 to 6.12.

/// Functions that say themselves that whoever calls them may have to wait (`might_sleep`,
/// `cond_resched`, include/linux/kernel.h, include/linux/sched.h), and those that wait.
pub const SLEEPS: &[&str] = &[
    "__SCT__might_resched",
    "__SCT__cond_resched",
    "__might_sleep",
    "__might_resched",
    "__cond_resched",
    "schedule",
    "schedule_timeout",
    "io_schedule",
    "msleep",
    "usleep_range_state",
    "fsleep",
];

/// `__GFP_DIRECT_RECLAIM` (include/linux/gfp_types.h): an allocation that may wait.
pub const MAY_RECLAIM: u64 = 0x400;

/// Allocators that wait only if they are asked to, with the argument that says so, from 0
/// (include/linux/slab.h, skbuff.h, usb.h, dma-mapping.h).
pub const ALLOCATORS: &[(&str, usize)] = &[
    ("__kmalloc", 1),
    ("__kmalloc_node", 1),
    ("kmalloc_trace", 1),
    ("kmalloc_node_trace", 1),
    ("kmalloc_large", 1),
    ("kmem_cache_alloc", 1),
    ("kmem_cache_alloc_node", 1),
    ("krealloc", 2),
    ("kmemdup", 2),
    ("kstrdup", 1),
    ("__alloc_skb", 1),
    ("__netdev_alloc_skb", 2),
    ("__napi_alloc_skb", 2),
    ("skb_clone", 1),
    ("skb_copy", 1),
    ("skb_copy_expand", 3),
    ("pskb_expand_head", 3),
    ("__alloc_pages", 0),
    ("__get_free_pages", 0),
    ("get_zeroed_page", 0),
    ("dma_alloc_attrs", 3),
    ("dma_pool_alloc", 1),
    ("mempool_alloc", 1),
    ("usb_submit_urb", 1),
    ("usb_alloc_urb", 1),
    ("usb_alloc_coherent", 2),
];

/// Functions that return the address of a device's registers (include/linux/io.h,
/// asm-generic/pci_iomap.h, pci.h, device.h).
pub const MAPS_REGISTERS: &[&str] = &[
    "ioremap",
    "ioremap_wc",
    "ioremap_wt",
    "ioremap_uc",
    "ioremap_cache",
    "ioport_map",
    "pci_iomap",
    "pci_iomap_wc",
    "pci_iomap_range",
    "pci_ioremap_bar",
    "pci_ioremap_wc_bar",
    "pcim_iomap",
    "devm_ioremap",
    "devm_ioremap_wc",
    "devm_ioremap_uc",
    "devm_ioremap_resource",
    "devm_ioport_map",
    "devm_platform_ioremap_resource",
    "devm_platform_ioremap_resource_byname",
    "devm_platform_get_and_ioremap_resource",
];

/// Functions that return an array of such addresses.
pub const MAPS_ARRAYS: &[&str] = &["pcim_iomap_table"];

/// Functions that return memory that a device writes as well (include/linux/dma-mapping.h,
/// dmapool.h).
pub const SHARES_MEMORY: &[&str] = &["dma_alloc_attrs", "dmam_alloc_attrs", "dma_pool_alloc"];

/// Functions that return what a register of a device holds, and its bits
/// (include/asm-generic/iomap.h).
pub const READS_REGISTER: &[(&str, u8)] = &[
    ("ioread8", 8),
    ("ioread16", 16),
    ("ioread16be", 16),
    ("ioread32", 32),
    ("ioread32be", 32),
];

/// Functions that take a length of what is there already, with the argument, from 0
/// (include/linux/string.h, skbuff.h, io.h, uaccess.h).
pub const TAKES_LENGTH: &[(&str, usize)] = &[
    ("memcpy", 2),
    ("__memcpy", 2),
    ("memmove", 2),
    ("memset", 2),
    ("memcpy_fromio", 2),
    ("memcpy_toio", 2),
    ("skb_put", 1),
    ("skb_add_rx_frag", 4),
    ("_copy_to_user", 2),
    ("_copy_from_user", 2),
];

/// Functions that allocate a structure of the kernel's with private data behind it: which
/// structure, and the argument, from 0, that is the private data's size
/// (include/linux/etherdevice.h, netdevice.h).
pub const ALLOCATES_PRIVATE: &[(&str, &str, usize)] = &[
    ("alloc_etherdev_mqs", "net_device", 0),
    ("alloc_netdev_mqs", "net_device", 0),
    ("devm_alloc_etherdev_mqs", "net_device", 1),
];

/// Functions that return zeroed memory of a size that an argument, from 0, says.
pub const ALLOCATES: &[(&str, usize)] =
    &[("devm_kmalloc", 1), ("__kmalloc", 0), ("kmalloc_trace", 2)];

/// Functions that register another one to be called: the argument that is the function, the one
/// that is handed to it, and which parameter of it that becomes; all from 0
/// (include/linux/interrupt.h).
pub const REGISTERS: &[(&str, usize, usize, usize)] = &[("request_threaded_irq", 1, 5, 1)];

/// Functions whose errors say that something is not as the driver takes it to be from there on: a
/// device that is not enabled, a transfer that was not started, an interface that is not there. Not
/// among them is what is called to clean up, or to ask, nor `dma_set_coherent_mask`, which cannot
/// fail where `dma_set_mask` has not. (include/linux/pci.h, usb.h, interrupt.h, dma-mapping.h,
/// netdevice.h, clk.h, regulator/consumer.h, device.h, i2c.h, regmap.h, input.h)
pub const ERRORS_MATTER: &[&str] = &[
    "pci_enable_device",
    "pci_enable_device_mem",
    "pcim_enable_device",
    "pci_request_regions",
    "pci_request_selected_regions",
    "pci_enable_msi",
    "pci_alloc_irq_vectors_affinity",
    "pci_set_power_state",
    "pci_read_config_byte",
    "pci_read_config_word",
    "pci_read_config_dword",
    "dma_set_mask",
    "request_threaded_irq",
    "devm_request_threaded_irq",
    "register_netdev",
    "register_netdevice",
    "usb_submit_urb",
    "usb_control_msg",
    "usb_control_msg_send",
    "usb_control_msg_recv",
    "usb_bulk_msg",
    "usb_interrupt_msg",
    "usb_set_interface",
    "usb_clear_halt",
    "usbnet_read_cmd",
    "usbnet_write_cmd",
    "i2c_transfer",
    "i2c_transfer_buffer_flags",
    "i2c_smbus_read_byte_data",
    "i2c_smbus_write_byte_data",
    "i2c_smbus_read_i2c_block_data",
    "i2c_smbus_write_i2c_block_data",
    "spi_sync",
    "regmap_read",
    "regmap_write",
    "regmap_bulk_read",
    "regmap_bulk_write",
    "regmap_update_bits_base",
    "clk_prepare",
    "clk_enable",
    "regulator_enable",
    "snd_card_register",
    "snd_pcm_new",
    "snd_device_new",
    "input_register_device",
    "device_create_file",
    "device_add_disk",
    "sysfs_create_group",
    "sysfs_create_link",
    "netif_set_real_num_tx_queues",
    "netif_set_real_num_rx_queues",
    "mdiobus_write",
    "mdiobus_read",
    "phy_write_mmd",
    "request_firmware",
    "__register_chrdev",
];

/// Structures that drivers are registered with end so (`pci_driver`, `usb_driver`,
/// `platform_driver`).
pub const DRIVER_SUFFIX: &str = "_driver";

/// Members of `struct dev_pm_ops`, or of a driver, that are called before the device loses power,
/// and those called after.
pub const SUSPENDS: &[&str] = &[
    "suspend",
    "freeze",
    "poweroff",
    "suspend_late",
    "suspend_noirq",
];
/// As [`SUSPENDS`].
pub const RESUMES: &[&str] = &["resume", "thaw", "restore", "resume_early", "resume_noirq"];
