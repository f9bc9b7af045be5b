//! Functions whose callers have no use for an error. Most take something down, and are not asked
//! again: if one failed, what it should have let go would be freed all the same. Others are given
//! something that comes once, such as a byte of a port: such a call is run again.
//!
//! Which function of a driver it is, is read where the kernel reads it, in the table of operations
//! of the very object. What is read is the guest's and hostile: what does not lead to the function
//! is another one.

use super::abort_value::REGISTER_ARGUMENTS;
use super::reach::Path;
use crate::guest::addr::Gva;
use crate::guest::btf::Btf;
use crate::guest::paging::VirtMemory;
use crate::guest::phys::GuestPhys;

/// Objects that are an argument, and where their table has the function.
const UNHEARD: &[(&str, &str)] = &[
    // `__dev_close_many` (net/core/dev.c).
    ("net_device", "netdev_ops->ndo_stop"),
    // `__fput` (fs/file_table.c).
    ("file", "f_op->release"),
    // `__sock_release` (net/socket.c).
    ("socket", "ops->release"),
    // `rtmsg_ifinfo_build_skb` takes a failure for one of the kernel's own, and warns
    // (net/core/rtnetlink.c).
    ("net_device", "rtnl_link_ops->fill_info"),
    // `snd_pcm_release_substream` (sound/core/pcm_native.c).
    ("snd_pcm_substream", "ops->close"),
    // `serio_interrupt` (drivers/input/serio/serio.c): what a device behind a serial line has sent
    // comes once.
    ("serio", "drv->interrupt"),
];

/// From an object to its table's pointer to such a function, in a guest with certain types.
#[derive(Debug, Clone, Default)]
pub struct Unheard(Vec<Path>);

impl Unheard {
    /// Of a guest with these types; what it does not have has no such functions.
    pub fn new(types: &Btf) -> Self {
        let path = |(of, path): &(&str, &str)| Path::find(types, types.find_struct(of)?, path);
        Self(UNHEARD.iter().filter_map(path).collect())
    }

    /// Whether the function with its gate at `gate`, called with these arguments, is one.
    pub fn is<M: GuestPhys>(
        &self,
        virt: VirtMemory<'_, M>,
        gate: u64,
        arguments: &[u64; REGISTER_ARGUMENTS],
    ) -> bool {
        // `release` gets the inode first, `fill_info` the message.
        let mut objects = arguments.iter().take(2).copied().map(Gva);
        objects.any(|object| self.0.iter().any(|path| path.leads_to(virt, object, gate)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::btf::encode::Encoder;
    use crate::guest::paging::testing::TestGuest;
    use crate::guest::paging::{Entry, Levels};

    const DATA: u64 = Entry::WRITE | Entry::NO_EXECUTE;
    const BASE: u64 = 0xffff_8880_0000_0000;
    const DEVICE: u64 = BASE;
    const FILE: u64 = BASE + 0x100;
    const OPS: u64 = BASE + 0x200;
    const STOP: u64 = 0xffff_ffff_c000_0000;
    const RELEASE: u64 = 0xffff_ffff_c000_0100;

    fn is(gate: u64, arguments: [u64; 2]) -> bool {
        let mut e = Encoder::new(None);
        let word = e.int("u64", 8, 0);
        let ops = e.structure(
            "net_device_ops",
            64,
            &[("ndo_open", word, 0), ("ndo_stop", word, 8)],
        );
        let ops = e.pointer(ops);
        e.structure("net_device", 64, &[("netdev_ops", ops, 8)]);
        let ops = e.structure("file_operations", 64, &[("release", word, 24)]);
        let ops = e.pointer(ops);
        e.structure("file", 64, &[("f_op", ops, 16)]);
        let driver = e.structure(
            "serio_driver",
            64,
            &[("write_wakeup", word, 0), ("interrupt", word, 24)],
        );
        let driver = e.pointer(driver);
        e.structure("serio", 64, &[("drv", driver, 16)]);
        let types = Btf::parse(&e.bytes(), None).unwrap();
        let mut guest = TestGuest::new(Levels::Four);
        guest.put(Gva(BASE), &[0; 4096], DATA);
        let words = [
            (DEVICE + 8, OPS),
            (FILE + 16, OPS),
            (OPS, STOP + 0x40),
            (OPS + 8, STOP),
            (OPS + 24, RELEASE),
        ];
        for (at, word) in words {
            guest.put(Gva(at), &word.to_le_bytes(), DATA);
        }
        let [first, second] = arguments;
        Unheard::new(&types).is(guest.virt(), gate, &[first, second, 0, 0, 0, 0])
    }

    #[test]
    fn what_takes_an_object_down_is_told_by_its_table() {
        assert!(is(STOP, [DEVICE, 0]));
        assert!(is(STOP + 4, [DEVICE, 0]), "a gate behind `endbr64`");
        assert!(is(RELEASE, [BASE + 0x400, FILE]));
        assert!(!is(STOP + 0x40, [DEVICE, 0]), "what opens it");
        assert!(!is(STOP, [FILE, 0]));
        // A port of a serial line, at the same place: what it has sent comes once.
        assert!(is(RELEASE, [FILE, 0x5a]));
        assert!(!is(STOP + 0x40, [FILE, 0x5a]), "what it writes to");
        for nonsense in [0, 7, u64::MAX - 3] {
            assert!(!is(STOP, [nonsense, nonsense]));
        }
    }
}
