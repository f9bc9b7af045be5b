//! Functions of the kernel by what a fault makes of a call of them (Linux 6.1 and 6.12).

use iced_x86::Register;

/// Copies and fills, and the register of their length in bytes (or, of `io` ones, in words).
const COPIES: &[(&str, Register)] = &[
    ("memcpy", Register::RDX),
    ("__memcpy", Register::RDX),
    ("memmove", Register::RDX),
    ("__memmove", Register::RDX),
    ("memset", Register::RDX),
    ("__memset", Register::RDX),
    ("memset_io", Register::RDX),
    ("memcpy_toio", Register::RDX),
    ("memcpy_fromio", Register::RDX),
    ("__iowrite32_copy", Register::RDX),
    ("__ioread32_copy", Register::RDX),
    ("__iowrite64_copy", Register::RDX),
    ("_copy_to_user", Register::RDX),
    ("_copy_from_user", Register::RDX),
    ("copy_user_generic", Register::RDX),
    ("copy_user_generic_unrolled", Register::RDX),
    ("copy_user_generic_string", Register::RDX),
    ("copy_user_enhanced_fast_string", Register::RDX),
    ("rep_movs_alternative", Register::RCX),
    ("clear_user", Register::RSI),
    ("__clear_user", Register::RSI),
    ("strncpy", Register::RDX),
    ("strlcpy", Register::RDX),
    ("strscpy", Register::RDX),
    ("sized_strscpy", Register::RDX),
    ("kmemdup", Register::RSI),
    ("memdup_user", Register::RSI),
    ("skb_copy_bits", Register::RCX),
    ("skb_store_bits", Register::RCX),
    ("skb_copy_datagram_iter", Register::RCX),
    ("skb_put", Register::RSI),
    ("skb_push", Register::RSI),
    ("_copy_to_iter", Register::RSI),
    ("_copy_from_iter", Register::RSI),
];

/// Allocators that return a pointer, and NULL if there is no memory.
const ALLOCATORS: &[&str] = &[
    "__alloc_pages",
    "__alloc_percpu",
    "__alloc_percpu_gfp",
    "__alloc_skb",
    "__get_free_pages",
    "__kmalloc",
    "__kmalloc_cache",
    "__kmalloc_cache_node",
    "__kmalloc_large",
    "__kmalloc_large_node",
    "__kmalloc_node",
    "__kmalloc_node_track_caller",
    "__kvmalloc_node",
    "__napi_alloc_frag_align",
    "__napi_alloc_skb",
    "__netdev_alloc_frag_align",
    "__netdev_alloc_skb",
    "__vmalloc",
    "alloc_etherdev_mqs",
    "alloc_netdev_mqs",
    "alloc_pages",
    "alloc_skb_with_frags",
    "alloc_workqueue",
    "bio_alloc_bioset",
    "bitmap_alloc",
    "bitmap_zalloc",
    "build_skb",
    "devm_ioremap",
    "devm_kasprintf",
    "devm_kmalloc",
    "devm_kmemdup",
    "devm_kstrdup",
    "dma_alloc_attrs",
    "dma_pool_alloc",
    "dma_pool_create",
    "dmam_alloc_attrs",
    "get_zeroed_page",
    "ioremap",
    "ioremap_cache",
    "ioremap_wc",
    "kasprintf",
    "kmalloc_large",
    "kmalloc_large_node",
    "kmalloc_node_trace",
    "kmalloc_node_track_caller",
    "kmalloc_trace",
    "kmem_cache_alloc",
    "kmem_cache_alloc_lru",
    "kmem_cache_alloc_node",
    "kmem_cache_alloc_trace",
    "kmem_cache_create",
    "kmem_cache_create_usercopy",
    "kmemdup",
    "krealloc",
    "kstrdup",
    "kvasprintf",
    "kvmalloc_node",
    "mempool_alloc",
    "napi_alloc_skb",
    "napi_build_skb",
    "napi_get_frags",
    "page_frag_alloc_align",
    "page_pool_alloc_pages",
    "pci_iomap",
    "pci_ioremap_bar",
    "pcim_iomap",
    "pskb_copy",
    "skb_clone",
    "skb_copy",
    "skb_copy_expand",
    "skb_realloc_headroom",
    "usb_alloc_coherent",
    "usb_alloc_urb",
    "vmalloc",
    "vmalloc_32",
    "vmalloc_node",
    "vzalloc",
    "vzalloc_node",
];

/// Functions that give back memory, or a reference to it.
const FREES: &[&str] = &[
    "__dev_kfree_skb_any",
    "__dev_kfree_skb_irq",
    "__folio_put",
    "__free_pages",
    "__kfree_skb",
    "__page_frag_cache_drain",
    "bio_put",
    "consume_skb",
    "destroy_workqueue",
    "dev_kfree_skb_any_reason",
    "dev_kfree_skb_irq_reason",
    "devm_kfree",
    "dma_free_attrs",
    "dma_pool_destroy",
    "dma_pool_free",
    "dma_unmap_page_attrs",
    "dma_unmap_sg_attrs",
    "free_netdev",
    "free_pages",
    "free_percpu",
    "fwnode_handle_put",
    "iounmap",
    "kfree",
    "kfree_const",
    "kfree_sensitive",
    "kfree_skb",
    "kfree_skb_list",
    "kfree_skb_list_reason",
    "kfree_skb_reason",
    "kmem_cache_destroy",
    "kmem_cache_free",
    "kobject_put",
    "kvfree",
    "mempool_destroy",
    "mempool_free",
    "module_put",
    "napi_consume_skb",
    "of_node_put",
    "page_frag_free",
    "pci_dev_put",
    "pci_iounmap",
    "put_device",
    "sk_skb_reason_drop",
    "usb_free_coherent",
    "usb_free_urb",
    "usb_put_dev",
    "usb_put_intf",
    "vfree",
    "vunmap",
];

/// Functions that take a reference to their argument, and return it.
const GETTERS: &[&str] = &[
    "fwnode_handle_get",
    "get_device",
    "kobject_get",
    "of_node_get",
    "pci_dev_get",
    "usb_get_dev",
    "usb_get_intf",
    "usb_get_urb",
];

/// What a call does to a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// Takes it and returns nothing.
    Take,
    /// Takes it, disables interrupts, and returns the flags of before.
    TakeSaving,
    /// Takes it, and returns 0, or an error if a signal came.
    TakeOrError,
    /// Takes it if it is free, and returns whether it did.
    Try,
    /// Gives it back.
    Give,
}

/// The register of a copy's length.
pub(super) fn length_register(name: &str) -> Option<Register> {
    let name = plain(name);
    COPIES
        .iter()
        .find(|(copy, _)| *copy == name)
        .map(|(_, register)| *register)
}

pub(super) fn is_allocator(name: &str) -> bool {
    ALLOCATORS.contains(&plain(name))
}

pub(super) fn is_free(name: &str) -> bool {
    FREES.contains(&plain(name))
}

pub(super) fn is_getter(name: &str) -> bool {
    GETTERS.contains(&name)
}

/// What a call of the function does to a lock, by the words of its name.
pub(super) fn lock(name: &str) -> Option<Lock> {
    let has = |word: &str| name.split('_').any(|part| part == word);
    match name {
        "down" | "down_read" | "down_write" => return Some(Lock::Take),
        "down_interruptible"
        | "down_killable"
        | "down_read_interruptible"
        | "down_read_killable"
        | "down_write_killable" => return Some(Lock::TakeOrError),
        "up" | "up_read" | "up_write" | "release_sock" => return Some(Lock::Give),
        // Of semaphores it returns 0 if it did.
        "down_trylock" => return Some(Lock::TakeOrError),
        _ => {}
    }
    if ["init", "class", "lockdep", "slowpath", "destroy"]
        .into_iter()
        .any(has)
    {
        return None;
    }
    if has("trylock") {
        return Some(Lock::Try);
    }
    if has("unlock") {
        return Some(Lock::Give);
    }
    if !has("lock") {
        return None;
    }
    Some(if has("interruptible") || has("killable") {
        Lock::TakeOrError
    } else if has("irqsave") {
        Lock::TakeSaving
    } else {
        Lock::Take
    })
}

/// Whether the function enables interrupts that another one disabled.
pub(super) fn enables_interrupts(name: &str) -> bool {
    let has = |word: &str| name.split('_').any(|part| part == word);
    has("irqrestore") || has("unlock") && has("irq")
}

/// The name without what newer kernels add to allocators that are profiled.
fn plain(name: &str) -> &str {
    name.strip_suffix("_noprof").unwrap_or(name)
}
