//! The rules for Linux: what its types do not say about what a driver may write.

use super::rules::{
    Counted, Followed, InNamespace, InsideArea, Listed, ModulesOwn, PacketData, PerCpuPointer,
    Pool, PrivateArea, Rules,
};

impl Rules {
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
            // `qdisc_priv` (include/net/sch_generic.h): behind the structure, at the next line of
            // the cache.
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
            // `napi_get_frags`: the packet that NAPI keeps from poll to poll, into which a driver
            // puts pages (`skb_fill_page_desc`).
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
                is: &["nullb_queue", "nvme_queue"],
                ..Followed::PLAIN
            },
            Followed {
                of: "request_queue",
                member: "queuedata",
                is: &["nullb"],
                ..Followed::PLAIN
            },
            // What block drivers find their own data by: from what is submitted, from a request,
            // from the queue, from a device that is opened.
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
            // `rhashtable_insert_fast`, `rhashtable_remove_fast` (include/linux/rhashtable.h):
            // buckets, whose lowest bit is their lock.
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
        pools: &[Pool {
            of: "dma_pool",
            pages: "page_list",
            bytes: "allocation",
            page: "dma_page",
            link: "page_list",
            memory: "vaddr",
        }],
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
        // `queue_rqs` (include/linux/blk-mq.h).
        chained: &[("request", "rq_next")],
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
