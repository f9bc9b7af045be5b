//! Bad input to `cofferdam run`: a clear error or a clean end, and nothing left behind.

#![allow(
    clippy::unwrap_used,
    reason = "a test ends where something unexpected happens"
)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

mod common;

use common::place::{LIMIT, Place, end, finish, signal};
use common::{EM_AARCH64, EM_X86_64, elf};

#[test]
fn a_kernel_that_is_none_is_refused() {
    let place = Place::new();
    place.refused("--kernel /nonexistent/vmlinux", &["/nonexistent/vmlinux"]);
    let text = place.file("text", b"#!/bin/sh\necho no kernel\n");
    place.refused(
        &format!("--kernel {text}"),
        &["not a Linux kernel", "vmlinux"],
    );
    let empty = place.file("empty", b"");
    place.refused(&format!("--kernel {empty}"), &["empty"]);
    let folder = place.folder.path().display().to_string();
    place.refused(&format!("--kernel {folder}"), &[&folder]);
    place.refused("--kernel /dev/zero", &["/dev/zero"]);
}

#[test]
fn a_fifo_is_no_file_and_nobody_waits_for_it() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    let fifo = place.path("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let fifo = fifo.display().to_string();
    place.refused(&format!("--kernel {fifo}"), &["FIFO", &fifo]);
    place.refused(
        &format!("--kernel {kernel} --initrd {fifo}"),
        &["FIFO", &fifo],
    );
    place.refused(&format!("--kernel {kernel} --disk {fifo}"), &[&fifo]);
    place.refused(&format!("--kernel {kernel} --serial file={fifo}"), &[&fifo]);
}

#[test]
fn a_kernel_that_is_cut_short_is_refused() {
    let place = Place::new();
    let whole = elf(EM_X86_64, &[0xf4; 1000]);
    for length in [20, 64, 100, whole.len() - 1] {
        let cut = place.file("kernel", &whole[..length]);
        place.refused(&format!("--kernel {cut}"), &["cut short"]);
    }
}

#[test]
fn a_kernel_for_another_machine_is_refused() {
    let place = Place::new();
    let arm = place.file("arm", &elf(EM_AARCH64, &[0; 16]));
    place.refused(
        &format!("--kernel {arm}"),
        &["for another machine", "x86-64"],
    );
}

#[test]
fn an_initramfs_larger_than_memory_is_refused() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    let initrd = place.path("initrd");
    fs::File::create(&initrd)
        .unwrap()
        .set_len(300 << 20)
        .unwrap();
    let initrd = initrd.display();
    place.refused(
        &format!("--kernel {kernel} --initrd {initrd} --memory 256M"),
        &["initramfs", "give it more"],
    );
    place.refused(
        &format!("--kernel {kernel} --initrd /nonexistent"),
        &["/nonexistent"],
    );
}

#[test]
fn memory_that_no_guest_or_host_can_have_is_refused() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    for memory in ["0", "1M", "-1", "lots"] {
        place.refused(
            &format!("--kernel {kernel} --memory={memory}"),
            &["--memory"],
        );
    }
    place.refused(
        &format!("--kernel {kernel} --memory 8000G"),
        &["this host has", "less"],
    );
}

#[test]
fn unknown_options_are_refused() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    place.refused("--kernell x", &["--kernell", "--help"]);
    for (words, says) in [
        ("--nic ne2k --net user", ["ne2k", "e1000"]),
        ("--net vde", ["user", "tap=NAME"]),
        ("--vcpus 9", ["9", "8"]),
        ("--name ../x", ["../x", "letters"]),
        ("--mac 01:00:00:00:00:00 --net user", ["multicast", "even"]),
        ("--mac 02:00:00:00:00:01", ["--net", "--help"]),
    ] {
        place.refused(&format!("--kernel {kernel} {words}"), &says);
    }
}

#[test]
fn a_tap_that_does_not_exist_is_refused() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    place.refused(
        &format!("--kernel {kernel} --net tap=nosuchtap0"),
        &["nosuchtap0", "ip tuntap"],
    );
    place.refused(&format!("--kernel {kernel} --net tap=lo"), &["lo"]);
}

#[test]
fn a_tap_that_is_busy_is_refused() {
    let name = format!("cofft{}", std::process::id() % 100_000);
    let ip = |word: &str| {
        let words = ["tuntap", word, "dev", &name, "mode", "tap"];
        Command::new("ip").args(words).output()
    };
    if !ip("add").is_ok_and(|output| output.status.success()) {
        let name = "bad_input::a_tap_that_is_busy_is_refused";
        skipped::skip(name, "this process may not make TAPs");
        return;
    }
    let place = Place::new();
    let vm = place.idle(&format!("--net tap={name}"));
    let kernel = place.idle_kernel();
    let output = place.run(&format!("--kernel {kernel} --net tap={name}"));
    end(&place, vm, &[]);
    assert!(ip("del").unwrap().status.success());
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("in use"), "{error}");
}

#[test]
fn a_disk_that_is_none_is_refused() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    let folder = place.folder.path().display().to_string();
    for disk in [&folder, "/nonexistent,ro", "/dev/null"] {
        let path = disk.trim_end_matches(",ro");
        place.refused(&format!("--kernel {kernel} --disk {disk}"), &[path]);
    }
}

#[test]
fn sockets_that_cannot_be_made_are_refused() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    let file = place.file("file", b"x");
    let taken = place.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    let taken = taken.display();
    for (words, says) in [
        (format!("--serial unix={file}"), "another path"),
        (format!("--net unix={file},listen"), "another path"),
        ("--serial file=/nonexistent/x".to_owned(), "/nonexistent/x"),
        (format!("--serial unix={taken}"), "another process"),
        (format!("--net unix={taken},listen"), "another process"),
    ] {
        place.refused(&format!("--kernel {kernel} {words}"), &[says]);
    }
    assert_eq!(fs::read(file).unwrap(), b"x");
}

#[test]
fn a_host_without_usable_kvm_is_told_what_to_do() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    // A mount of its own, so that only this one run sees another /dev/kvm.
    for (hide, says) in [
        ("mount --bind /dev/null /dev/kvm", "this host's KVM"),
        ("mount -t tmpfs none /dev", "no /dev/kvm"),
    ] {
        let run = format!("{hide} && exec \"$0\" run --kernel {kernel}");
        let mut command = Command::new("unshare");
        let cofferdam = env!("CARGO_BIN_EXE_cofferdam");
        let output = command
            .args(["--mount", "sh", "-c", &run, cofferdam])
            .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        if error.starts_with("unshare:") {
            let name = "bad_input::a_host_without_usable_kvm_is_told_what_to_do";
            skipped::skip(
                name,
                &format!("this process may not mount: {}", error.trim()),
            );
            return;
        }
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(says), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        place.assert_empty();
    }
}

#[test]
fn a_runtime_folder_that_cannot_be_made_is_refused() {
    let place = Place::new();
    let file = place.file("file", b"x");
    let output = place
        .command()
        .env("COFFERDAM_RUNTIME_DIR", format!("{file}/run"))
        .args(["run", "--kernel", &place.idle_kernel()])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("COFFERDAM_RUNTIME_DIR"), "{error}");
}

#[test]
fn a_second_vm_of_the_same_name_is_refused_and_the_first_goes_on() {
    let place = Place::new();
    let first = place.idle("");
    let kernel = place.idle_kernel();
    let output = place.run(&format!("--kernel {kernel} --name idle"));
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("--name"), "{error}");
    assert!(error.contains("cofferdam stop idle"), "{error}");
    assert!(error.contains(&first.id().to_string()), "{error}");
    assert_eq!(place.status()["pid"], first.id());
    end(&place, first, &[]);
}

#[test]
fn signals_end_a_vm_cleanly_and_by_the_signal() {
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let place = Place::new();
        let (console, cable) = (place.path("console"), place.path("cable"));
        let vm = place.idle(&format!(
            "--net unix={},listen --serial unix={}",
            cable.display(),
            console.display()
        ));
        assert!(console.exists() && cable.exists());
        signal(&vm, number);
        assert_eq!(finish(vm).status.signal(), Some(number));
        place.assert_empty();
        assert!(!console.exists() && !cable.exists());
    }
}

#[test]
fn a_signal_at_any_moment_ends_a_vm_and_leaves_nothing() {
    let place = Place::new();
    let kernel = place.idle_kernel();
    for delay_us in (0..40).map(|step| step * 500) {
        let child = place
            .command()
            .args(["run", "--kernel", &kernel, "--net", "user"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(delay_us));
        signal(&child, libc::SIGTERM);
        let status = finish(child).status;
        assert_eq!(status.signal(), Some(libc::SIGTERM), "after {delay_us} us");
        place.assert_empty();
    }
}

#[test]
fn what_a_killed_vm_leaves_is_cleared_by_the_next_one() {
    let place = Place::new();
    let mut killed = place.idle("");
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(place.path("run/idle/control.sock").exists());
    let next = place.idle("");
    let list: serde_json::Value = serde_json::from_str(&place.ask("list --json")).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    end(&place, next, &[]);
}

#[test]
fn a_vm_is_paused_resumed_reset_and_ended_through_its_socket() {
    let place = Place::new();
    let vm = place.idle("");
    for _ in 0..2 {
        place.ask("pause idle");
        assert_eq!(place.status()["state"], "paused");
    }
    for _ in 0..2 {
        place.ask("resume idle");
        assert_eq!(place.status()["state"], "running");
    }
    place.ask("reset idle");
    let deadline = Instant::now() + LIMIT;
    while place.status()["resets"] != 1 {
        assert!(Instant::now() < deadline, "{}", place.status());
    }
    place.ask("stop --force");
    assert!(finish(vm).status.success());
    place.assert_empty();
}

#[test]
fn a_console_that_nobody_reads_does_not_keep_a_vm_from_ending() {
    let place = Place::new();
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the out: fills the pipe.
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd];
    let kernel = place.file("chatty", &elf(EM_X86_64, &code));
    let mut vm = place
        .command()
        .args(["run", "--kernel", &kernel])
        .spawn()
        .unwrap();
    let mut stdout = vm.stdout.take().unwrap();
    // Smaller than it is by itself, where the guest has not filled it to more already.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdout, 4096);
    let holds = rustix::pipe::fcntl_getpipe_size(&stdout).unwrap() as u64;
    stdout.read_exact(&mut [0]).unwrap();
    // The place of what was read first is free again with the rest of its page.
    let deadline = Instant::now() + LIMIT;
    while rustix::io::ioctl_fionread(&stdout).unwrap() < holds - 1 {
        assert!(Instant::now() < deadline, "the pipe does not fill");
        std::thread::sleep(Duration::from_millis(10));
    }
    end(&place, vm, &[]);
}

#[test]
fn nonsense_on_the_control_socket_does_not_disturb_a_vm() {
    let place = Place::new();
    let vm = place.idle("");
    for nonsense in [
        &b"\x00\xff\x00\n"[..],
        b"{\"request\":\"probe_start\",\"interval_us\":1}\n",
    ] {
        let mut stream = UnixStream::connect(place.path("run/idle/control.sock")).unwrap();
        stream.write_all(nonsense).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("{\"error\""), "{answer}");
    }
    assert_eq!(place.status()["state"], "running");
    end(&place, vm, &[]);
}

#[test]
fn commands_to_a_vm_that_does_not_run_say_so() {
    let place = Place::new();
    for words in ["status x", "pause x", "stop x", "exec x -- true", "status"] {
        let output = place.command().args(words.split(' ')).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        // A command in the guest may end with any status: what went wrong before has one of its
        // own.
        let status = if words.starts_with("exec") { 125 } else { 1 };
        assert_eq!(output.status.code(), Some(status), "{words}");
        assert!(error.contains("running"), "{words}: {error}");
        assert_eq!(error.lines().count(), 1, "{words}: {error}");
    }
}
