//! Stock Linux drivers on the virtio devices: disk, network card, and the console that carries the
//! agent.

use cofferdam::bench::guest::Guest;

use super::{boot, options, ping, shell};

const DISK_BYTES: usize = 8 << 20;
const MIB: usize = 1 << 20;

/// Bytes without a pattern that an error could keep, the same in every run.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        // Knuth's MMIX generator; the high bits are the good ones.
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    })
    .take(length)
    .collect()
}

fn set_network_up(guest: &mut Guest) {
    shell(
        guest,
        "ip link set eth0 up && ip addr add 10.0.2.15/24 dev eth0",
    );
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn disks_hold_what_is_written_and_read_only_ones_stay() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, fixed) = (folder.path().join("disk"), folder.path().join("fixed"));
    let mut content = noise(DISK_BYTES, 1);
    std::fs::write(&disk, &content).unwrap();
    std::fs::write(&fixed, &content[..MIB]).unwrap();
    let arguments = format!("--disk {} --disk {},ro", disk.display(), fixed.display());
    let mut guest = boot(&options().with(&arguments));
    shell(&mut guest, "modprobe virtio_blk");

    shell(
        &mut guest,
        "cat /dev/vda > /tmp/all && cp /dev/vdb /tmp/fixed",
    );
    assert!(guest.agent().read_file("/tmp/all").unwrap() == content);
    assert!(guest.agent().read_file("/tmp/fixed").unwrap() == content[..MIB]);

    let written = noise(MIB, 2);
    guest
        .agent()
        .write_file("/tmp/new", &written, 0o600)
        .unwrap();
    shell(
        &mut guest,
        "dd if=/tmp/new of=/dev/vda bs=64k seek=32 conv=notrunc,fsync",
    );
    shell(&mut guest, "blkdiscard -o 6291456 -l 65536 /dev/vda");
    content[2 * MIB..3 * MIB].copy_from_slice(&written);
    let host = std::fs::read(&disk).unwrap();
    assert!(host[..6 * MIB] == content[..6 * MIB]);
    assert!(host[6 * MIB..6 * MIB + 65536].iter().all(|byte| *byte == 0));
    assert!(host[6 * MIB + 65536..] == content[6 * MIB + 65536..]);

    assert_eq!(shell(&mut guest, "cat /sys/block/vdb/ro").trim(), "1");
    assert!(
        guest
            .shell("dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync")
            .is_err()
    );
    assert!(std::fs::read(&fixed).unwrap() == content[..MIB]);

    shell(
        &mut guest,
        "rmmod virtio_blk && modprobe virtio_blk && echo 3 > /proc/sys/vm/drop_caches",
    );
    shell(
        &mut guest,
        "dd if=/dev/vda of=/tmp/again bs=1M skip=2 count=1",
    );
    assert!(guest.agent().read_file("/tmp/again").unwrap() == written);
}

#[test]
#[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
fn network_card_reaches_the_gateway_and_can_be_restarted() {
    let mut guest = boot(&options().with("--net user --nic virtio"));
    shell(&mut guest, "modprobe virtio_net");
    set_network_up(&mut guest);
    for size in [56, 1472, 9000] {
        ping(&mut guest, "10.0.2.2", size);
    }
    let sent = noise(2 * MIB, 3);
    guest.agent().write_file("/tmp/sent", &sent, 0o600).unwrap();
    shell(&mut guest, "nc 10.0.2.2 7 < /tmp/sent > /tmp/back");
    assert!(guest.agent().read_file("/tmp/back").unwrap() == sent);
    guest
        .shell(
            "modprobe 8021q && ip link add link eth0 name v5 type vlan id 5 && ip link set v5 up \
             && ip addr add 10.64.5.15/24 dev v5",
        )
        .unwrap();
    ping(&mut guest, "10.64.5.2", 56);
    for _ in 0..5 {
        shell(&mut guest, "rmmod virtio_net && modprobe virtio_net");
        set_network_up(&mut guest);
        ping(&mut guest, "10.0.2.2", 56);
    }
}

/// Run in the full form of the suite, or by name.
mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn devices_work_by_the_interrupt_pin_too() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        let content = noise(MIB, 4);
        std::fs::write(&disk, &content).unwrap();
        let arguments = format!(
            "--net user --nic virtio --append pci=nomsi --disk {}",
            disk.display()
        );
        let mut guest = boot(&options().with(&arguments));
        shell(&mut guest, "modprobe virtio_net && modprobe virtio_blk");
        set_network_up(&mut guest);
        ping(&mut guest, "10.0.2.2", 56);
        shell(&mut guest, "cp /dev/vda /tmp/all");
        assert!(guest.agent().read_file("/tmp/all").unwrap() == content);
        let interrupts = shell(&mut guest, "grep virtio /proc/interrupts");
        assert!(
            interrupts.contains("IO-APIC") && !interrupts.contains("MSI"),
            "{interrupts}"
        );
    }
}
