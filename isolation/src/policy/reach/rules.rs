//! What the kernel's types do not say about what a driver may write.

/// Private data of the driver right behind a structure of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivateArea {
    /// The structure.
    pub behind: &'static str,
    /// Alignment of the private data, a power of two in bytes.
    pub align: u64,
}

/// A buffer described by two members of a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketData {
    /// The structure.
    pub of: &'static str,
    /// Member that points at the first byte.
    pub base: &'static str,
    /// Member that has the offset of the end.
    pub end: &'static str,
    /// Structure that lies at the end and belongs to the buffer.
    pub trailer: &'static str,
}

/// A structure of the kernel's that drivers embed in their own, and get back as an argument.
pub type Embedded = &'static str;

/// All rules.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Private data behind a structure.
    pub private_areas: &'static [PrivateArea],
    /// Buffers.
    pub packet_data: &'static [PacketData],
    /// Structures whose whole allocation is the driver's (`container_of`).
    pub embedded: &'static [Embedded],
    /// Structures that a driver's pointer does not make the driver's: shared by the whole kernel.
    pub closed: &'static [&'static str],
}

impl Rules {
    /// For Linux 5.10 to 6.12.
    pub const LINUX: Self = Self {
        private_areas: &[
            // `netdev_priv`, `NETDEV_ALIGN` (include/linux/netdevice.h).
            PrivateArea {
                behind: "net_device",
                align: 32,
            },
            // `blk_mq_rq_to_pdu` (include/linux/blk-mq.h).
            PrivateArea {
                behind: "request",
                align: 1,
            },
        ],
        // `skb_end_pointer`, `skb_shinfo` (include/linux/skbuff.h), 64-bit.
        packet_data: &[PacketData {
            of: "sk_buff",
            base: "head",
            end: "end",
            trailer: "skb_shared_info",
        }],
        embedded: &[
            "napi_struct",
            "work_struct",
            "delayed_work",
            "timer_list",
            "hrtimer",
            "tasklet_struct",
            "notifier_block",
            "config_item",
        ],
        closed: &[
            "module",
            "net",
            "task_struct",
            "mm_struct",
            "file",
            "inode",
            "super_block",
            "dentry",
            "page",
            "folio",
            "class",
            "bus_type",
            "device_driver",
            "pci_driver",
            "pci_bus",
            "workqueue_struct",
            "kmem_cache",
            "cred",
            "user_namespace",
            "pid",
            "cpumask",
        ],
    };
}
