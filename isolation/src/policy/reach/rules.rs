//! What the kernel's types do not say about what a driver may write.

use crate::guest::btf::{Btf, TypeId};

/// Private data of the driver right behind a structure of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivateArea {
    /// The structure.
    pub behind: &'static str,
    /// Alignment of the private data, a power of two in bytes.
    pub align: u64,
    /// Where its size is noted that was asked for, a path from the structure.
    pub size: Option<&'static str>,
    /// What the private data is where nothing in it tells: the first of these structures that the module defines.
    pub is: &'static [&'static str],
}

/// Private data of the driver in the middle of a structure of the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InsideArea {
    /// What it is come to by: the first member of the structure.
    pub of: &'static str,
    /// The structure.
    pub holder: &'static str,
    /// The member that is the driver's.
    pub member: &'static str,
    /// What is in it: the first of these structures that the module defines. Only pointers are of interest.
    pub is: &'static [&'static str],
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

/// A pointer in a structure of the kernel's that leads to what a driver may write: its own data, or what inline functions
/// of the kernel that became part of the driver write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Followed {
    /// The structure.
    pub of: &'static str,
    /// The pointer; `a->b` for member `b` of what `a` points at, which is not to be written for that.
    pub member: &'static str,
    /// Member with the number of elements, if it is an array.
    pub count: Option<&'static str>,
    /// What a `void *` is: the first of these structures that the module defines. Where none is, it is the module's structure
    /// that points back.
    pub is: &'static [&'static str],
    /// Followed also where the structure itself is only to be read.
    pub from_const: bool,
    /// Not followed where it is none of the module's structures.
    pub own_only: bool,
}

impl Followed {
    const PLAIN: Self = Self {
        of: "",
        member: "",
        count: None,
        is: &[],
        from_const: false,
        own_only: false,
    };
}

/// A list in a structure of the module's (`struct list_head`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// The structure.
    pub of: &'static str,
    /// The list's head in it.
    pub member: &'static str,
    /// What is in the list, a structure of the module's.
    pub element: &'static str,
    /// The link in there.
    pub link: &'static str,
}

/// A pointer in a structure of the kernel's to another one, of which inline functions write parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// The structure.
    pub of: &'static str,
    /// The pointer.
    pub member: &'static str,
    /// Member with the number of elements, if it points at an array of pointers.
    pub count: Option<&'static str>,
    /// What is written there besides the counts of references.
    pub also: &'static [&'static str],
}

/// A pointer in a structure of the kernel's to data of the current processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerCpuPointer {
    /// The structure.
    pub of: &'static str,
    /// The pointer, a path ([`Path::find`](super::Path::find)). Only that of the kernel's version at hand exists; members of a
    /// union are all named, the largest counts.
    pub members: &'static [&'static str],
    /// Also where the structure itself is only to be read.
    pub from_const: bool,
}

/// What a module keeps in each network namespace (`net_generic`), by a number in a structure of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InNamespace {
    /// The structure.
    pub of: &'static str,
    /// Path from there to the namespace's `struct net_generic`.
    pub generic: &'static str,
    /// The member with the number.
    pub number: &'static str,
    /// What is kept.
    pub is: &'static str,
}

/// Structures that belong to modules although the kernel knows them, too: something that is built in has their header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModulesOwn {
    /// The modules.
    pub modules: &'static [&'static str],
    /// The structure behind which each keeps its own ([`PrivateArea`]).
    pub behind: &'static str,
    /// What each keeps there.
    pub private: &'static str,
    /// What else is their own.
    pub others: &'static [&'static str],
}

/// What of the kernel's structures is a driver's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnTypes {
    /// What it keeps behind the structure of this name.
    pub private: Option<(&'static str, TypeId)>,
    /// All.
    pub all: Vec<TypeId>,
}

/// All rules.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Private data behind a structure.
    pub private_areas: &'static [PrivateArea],
    /// Private data in a structure.
    pub inside: &'static [InsideArea],
    /// Buffers.
    pub packet_data: &'static [PacketData],
    /// Structures whose whole allocation is the driver's (`container_of`).
    pub embedded: &'static [Embedded],
    /// Pointers that are followed though they are the kernel's.
    pub followed: &'static [Followed],
    /// Pointers to data of the current processor.
    pub per_cpu: &'static [PerCpuPointer],
    /// Structures of modules that the kernel knows, too.
    pub modules_own: &'static [ModulesOwn],
    /// Lists in the module's structures.
    pub listed: &'static [Listed],
    /// Pointers in the kernel's structures to others of which inline functions count the references.
    pub counted: &'static [Counted],
    /// Structures of the kernel's in which drivers keep things by number, with the member that is an xarray; none for what
    /// is one itself.
    pub arrays: &'static [(&'static str, Option<&'static str>)],
    /// Structures of the kernel's that are queues of packets, linked by their first member; in a driver's structure they hold
    /// packets of the driver's.
    pub queues: &'static [&'static str],
    /// Structures of the kernel's that are part of the driver's: what they are part of is the driver's, if only one of its
    /// structures can be.
    pub parts: &'static [&'static str],
    /// What a driver keeps in each network namespace by a number in a structure of its own.
    pub in_namespaces: &'static [InNamespace],
    /// Structures that a driver's pointer does not make the driver's: shared by the whole kernel.
    pub closed: &'static [&'static str],
    /// Structures that kernel functions keep, wherever they lie: what a call did to them is undone by calling
    /// other kernel functions, not by putting bytes back.
    pub kernels: &'static [&'static str],
    /// Of these, the links of lists that inline functions of the kernel change, too: a pointer to the next and one to the
    /// previous.
    pub links: &'static str,
    /// Members that kernel functions keep in structures that are otherwise the driver's to write.
    pub kernels_members: &'static [(&'static str, &'static str)],
}

impl Rules {
    /// What of the kernel's structures is the module's own.
    pub fn own_of(&self, module: &str, types: &Btf) -> OwnTypes {
        let mut rules = self.modules_own.iter();
        let Some(rule) = rules.find(|rule| rule.modules.contains(&module)) else {
            return OwnTypes::default();
        };
        let private = types.find_struct(rule.private);
        let others = rule
            .others
            .iter()
            .filter_map(|name| types.find_struct(name));
        OwnTypes {
            private: private.map(|id| (rule.behind, id)),
            all: private.into_iter().chain(others).collect(),
        }
    }

    /// For Linux 5.10 to 6.12.
    pub const LINUX: Self = Self {
        private_areas: &[
            // `netdev_priv`, `NETDEV_ALIGN` (include/linux/netdevice.h).
            PrivateArea {
                behind: "net_device",
                align: 32,
                size: Some("rtnl_link_ops->priv_size"),
                is: &["ifb_dev_private"],
            },
            // `qdisc_priv` (include/net/sch_generic.h): behind the structure, at the next line of the cache.
            PrivateArea {
                behind: "Qdisc",
                align: 64,
                size: Some("ops->priv_size"),
                is: &[],
            },
            // `blk_mq_rq_to_pdu` (include/linux/blk-mq.h).
            PrivateArea {
                behind: "request",
                align: 1,
                size: None,
                is: &[],
            },
        ],
        // `inet_csk_ca` (include/net/inet_connection_sock.h).
        inside: &[InsideArea {
            of: "sock",
            holder: "inet_connection_sock",
            member: "icsk_ca_priv",
            is: &["cdg"],
        }],
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
            "tc_action",
            "bucket_table",
            // `tcp_sk`, `inet_csk_ca`: what congestion control has of a connection.
            "sock",
        ],
        followed: &[
            // `netif_tx_stop_queue`, `__netif_tx_lock`.
            Followed {
                of: "net_device",
                member: "_tx",
                count: Some("num_tx_queues"),
                ..Followed::PLAIN
            },
            // `napi_get_frags`: the packet that NAPI keeps from poll to poll, into which a driver puts
            // pages (`skb_fill_page_desc`).
            Followed {
                of: "napi_struct",
                member: "skb",
                ..Followed::PLAIN
            },
            Followed {
                of: "blk_mq_queue_data",
                member: "rq",
                from_const: true,
                ..Followed::PLAIN
            },
            Followed {
                of: "blk_mq_hw_ctx",
                member: "driver_data",
                is: &["nullb_queue"],
                ..Followed::PLAIN
            },
            Followed {
                of: "request_queue",
                member: "queuedata",
                is: &["nullb"],
                ..Followed::PLAIN
            },
            // What block drivers find their own data by: from what is submitted, from a request, from the queue, from a
            // device that is opened.
            Followed {
                of: "bio",
                member: "bi_bdev->bd_disk->private_data",
                ..Followed::PLAIN
            },
            Followed {
                of: "request",
                member: "q->queuedata",
                ..Followed::PLAIN
            },
            Followed {
                of: "blk_mq_hw_ctx",
                member: "queue->queuedata",
                ..Followed::PLAIN
            },
            Followed {
                of: "block_device",
                member: "bd_disk->private_data",
                ..Followed::PLAIN
            },
            // `rhashtable_insert_fast`, `rhashtable_remove_fast` (include/linux/rhashtable.h): buckets, whose lowest bit is
            // their lock.
            Followed {
                of: "rhashtable",
                member: "tbl",
                ..Followed::PLAIN
            },
            // `mapping_set_gfp_mask`, of the file that a loop device is on.
            Followed {
                of: "loop_device",
                member: "lo_backing_file->f_mapping",
                ..Followed::PLAIN
            },
            // `__ptr_ring_produce`.
            Followed {
                of: "ptr_ring",
                member: "queue",
                ..Followed::PLAIN
            },
            // `qdisc_dequeue_head`, `__qdisc_enqueue_tail` (include/net/sch_generic.h).
            Followed {
                of: "Qdisc",
                member: "q.head",
                ..Followed::PLAIN
            },
            Followed {
                of: "Qdisc",
                member: "q.tail",
                ..Followed::PLAIN
            },
            Followed {
                of: "qdisc_skb_head",
                member: "head",
                ..Followed::PLAIN
            },
            Followed {
                of: "qdisc_skb_head",
                member: "tail",
                ..Followed::PLAIN
            },
            // What classifiers have of their filters (net/sched/cls_*.c).
            Followed {
                of: "tcf_proto",
                member: "root",
                is: &[
                    "basic_head",
                    "cls_bpf_head",
                    "cls_cgroup_head",
                    "cls_fl_head",
                    "cls_mall_head",
                    "flow_head",
                    "fw_head",
                    "route4_head",
                    "tc_u_hnode",
                ],
                from_const: true,
                own_only: true,
                ..Followed::PLAIN
            },
            // What file systems come to their part of a file by.
            Followed {
                of: "dentry",
                member: "d_inode",
                from_const: true,
                ..Followed::PLAIN
            },
            Followed {
                of: "file",
                member: "f_inode",
                from_const: true,
                ..Followed::PLAIN
            },
            Followed {
                of: "kiocb",
                member: "ki_filp->f_inode",
                from_const: true,
                ..Followed::PLAIN
            },
            Followed {
                of: "address_space",
                member: "host",
                from_const: true,
                ..Followed::PLAIN
            },
            Followed {
                of: "inode",
                member: "i_sb->s_fs_info",
                is: &["msdos_sb_info", "ext4_sb_info", "ovl_fs"],
                from_const: true,
                own_only: true,
                ..Followed::PLAIN
            },
            // `rx_handler`s: what is behind a member of a bridge, a bond, a team.
            Followed {
                of: "net_device",
                member: "rx_handler_data",
                is: &[
                    "net_bridge_port",
                    "slave",
                    "team_port",
                    "macvlan_port",
                    "ipvl_port",
                    "macsec_rxh_data",
                ],
                own_only: true,
                ..Followed::PLAIN
            },
            Followed {
                of: "gendisk",
                member: "private_data",
                is: &["nullb"],
                ..Followed::PLAIN
            },
        ],
        per_cpu: &[
            // `dev_lstats_add`, `dev_sw_netstats_rx_add`, `dev_hold`, `dev_core_stats_*`.
            PerCpuPointer {
                of: "net_device",
                members: &["lstats", "tstats", "dstats"],
                from_const: false,
            },
            PerCpuPointer {
                of: "net_device",
                members: &["pcpu_refcnt"],
                from_const: false,
            },
            PerCpuPointer {
                of: "net_device",
                members: &["core_stats"],
                from_const: false,
            },
            // `tcf_action_update_bstats`, `tcf_action_inc_drop_qstats` (include/net/act_api.h).
            PerCpuPointer {
                of: "tc_action",
                members: &["cpu_bstats"],
                from_const: true,
            },
            PerCpuPointer {
                of: "tc_action",
                members: &["cpu_qstats"],
                from_const: true,
            },
            // `file_start_write` (include/linux/fs.h), of the file that a loop device is on.
            PerCpuPointer {
                of: "loop_device",
                members: &["lo_backing_file->f_inode->i_sb->s_writers.rw_sem.read_count"],
                from_const: false,
            },
        ],
        modules_own: &[
            // include/linux/if_vlan.h, which the kernel's own part of VLANs uses.
            ModulesOwn {
                modules: &["8021q"],
                behind: "net_device",
                private: "vlan_dev_priv",
                others: &[],
            },
            // include/net/ip_tunnels.h, include/net/ip6_tunnel.h.
            ModulesOwn {
                modules: &["ip_gre", "ip_tunnel", "ip_vti", "ipip", "sit"],
                behind: "net_device",
                private: "ip_tunnel",
                others: &["ip_tunnel_net"],
            },
            // include/net/macsec.h, which drivers of cards that do it have, too.
            ModulesOwn {
                modules: &["macsec"],
                behind: "net_device",
                private: "macsec_dev",
                others: &[
                    "macsec_secy",
                    "macsec_tx_sc",
                    "macsec_tx_sa",
                    "macsec_rx_sc",
                    "macsec_rx_sa",
                ],
            },
            ModulesOwn {
                modules: &["ip6_gre", "ip6_tunnel", "ip6_vti"],
                behind: "net_device",
                private: "ip6_tnl",
                others: &[],
            },
            // net/bridge/br_private.h, which the kernel's part of switches in hardware uses.
            ModulesOwn {
                modules: &["bridge"],
                behind: "net_device",
                private: "net_bridge",
                others: &[
                    "net_bridge_port",
                    "net_bridge_vlan_group",
                    "net_bridge_vlan",
                    "net_bridge_fdb_entry",
                    "net_bridge_mdb_entry",
                    "net_bridge_port_group",
                ],
            },
        ],
        listed: &[
            Listed {
                of: "net_bridge",
                member: "port_list",
                element: "net_bridge_port",
                link: "list",
            },
            Listed {
                of: "basic_head",
                member: "flist",
                element: "basic_filter",
                link: "link",
            },
            Listed {
                of: "cls_bpf_head",
                member: "plist",
                element: "cls_bpf_prog",
                link: "link",
            },
            Listed {
                of: "flow_head",
                member: "filters",
                element: "flow_filter",
                link: "list",
            },
            Listed {
                of: "team",
                member: "port_list",
                element: "team_port",
                link: "list",
            },
        ],
        // `in_dev_get`, `IN_DEV_CONF_SET`, `in6_dev_get`, `sock_hold`.
        counted: &[
            Counted {
                of: "net_device",
                member: "ip_ptr",
                count: None,
                also: &["cnf"],
            },
            Counted {
                of: "net_device",
                member: "ip6_ptr",
                count: None,
                also: &["cnf"],
            },
            Counted {
                of: "sk_buff",
                member: "sk",
                count: None,
                also: &[],
            },
            // `tcf_exts_hw_stats_update` (include/net/pkt_cls.h).
            Counted {
                of: "tcf_exts",
                member: "actions",
                count: Some("nr_actions"),
                also: &["used_hw_stats", "used_hw_stats_valid"],
            },
        ],
        arrays: &[("xarray", None), ("idr", Some("idr_rt"))],
        queues: &["sk_buff_head"],
        // What file systems have around the kernel's part of a file (`container_of`).
        parts: &["inode"],
        // Set up by the modules that use it, each with its own number (net/ipv4/ip_tunnel.c).
        in_namespaces: &[InNamespace {
            of: "ip_tunnel",
            generic: "net->gen",
            number: "ip_tnl_net_id",
            is: "ip_tunnel_net",
        }],
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
        kernels: &[
            "list_head",
            "hlist_head",
            "hlist_node",
            "rb_node",
            "rb_root",
            "callback_head",
            "spinlock",
            "raw_spinlock",
            "qspinlock",
            "seqcount",
            "mutex",
            "rw_semaphore",
            "wait_queue_head",
            "swait_queue_head",
            "completion",
            "refcount_struct",
            "kref",
            "napi_struct",
            "work_struct",
            "delayed_work",
            "timer_list",
            "hrtimer",
            "tasklet_struct",
            "device",
            "kobject",
            "pci_dev",
            "pci_bus",
            "phy_device",
            "blk_mq_tag_set",
            "request_queue",
            "gendisk",
            "Qdisc",
        ],
        links: "list_head",
        kernels_members: &[
            // Carrier, presence and `running`, changed by functions that do more than that.
            ("net_device", "state"),
            ("net_device", "flags"),
            ("net_device", "reg_state"),
            ("netdev_queue", "xmit_lock_owner"),
        ],
    };
}
