//! What is tried from inside: each call is one that does no harm where it goes through.

use std::ffi::CString;
use std::io::Error;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A thread that was there before the walls.
pub struct Elder {
    ask: Sender<Vec<String>>,
    answer: Receiver<i32>,
}

impl Elder {
    pub fn start() -> Self {
        let (ask, asked) = channel::<Vec<String>>();
        let (send, answer) = channel();
        std::thread::spawn(move || {
            for words in asked {
                let words: Vec<_> = words.iter().map(String::as_str).collect();
                let done = own(words[0], &words[1..]);
                send.send(done).unwrap();
            }
        });
        Self { ask, answer }
    }
}

/// Makes the call `name`; what it returned, as an `errno` or 0. With `elder` before it, another
/// thread does.
pub fn make(name: &str, words: &[&str], elder: &Elder) -> i32 {
    if name != "elder" {
        return own(name, words);
    }
    elder
        .ask
        .send(words.iter().map(|word| (*word).to_owned()).collect())
        .unwrap();
    elder.answer.recv().unwrap()
}

fn own(name: &str, words: &[&str]) -> i32 {
    if let Some(number) = name.strip_prefix("number=") {
        return wild(number.parse().unwrap());
    }
    let answer = match name {
        "open" | "create" | "write" | "remove" | "mkdir" | "run" | "abstract" | "connect"
        | "node" => {
            return with_files(name, words).err().map_or(0, errno);
        }
        "bind" => {
            let listener = UnixListener::bind(words[0]);
            return listener.err().map_or(0, errno);
        }
        name => call(name),
    };
    match answer {
        -1 => errno(Error::last_os_error()),
        _ => 0,
    }
}

fn errno(error: Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

/// A system call by number, with arguments that mean nothing.
fn wild(number: i64) -> i32 {
    // SAFETY: no argument is a valid pointer, descriptor, process or user, so that nothing is done
    // where it goes through.
    match unsafe { libc::syscall(number, -1, -1, -1, -1, -1, -1) } {
        -1 => errno(Error::last_os_error()),
        _ => 0,
    }
}

/// Calls with arguments that matter.
fn call(name: &str) -> libc::c_long {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    let program = CString::new("/bin/true").unwrap();
    let no_words: [*const libc::c_char; 2] = [program.as_ptr(), std::ptr::null()];
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let limit = libc::rlimit {
        rlim_cur: 64,
        rlim_max: 64,
    };
    let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get();
    let fork = libc::SIGCHLD;
    let thread_in_namespace = libc::CLONE_THREAD | libc::CLONE_NEWUSER;
    // SAFETY: pointers are to what each call says, or null; a child ends at once; signal 0 does
    // nothing.
    unsafe {
        match name {
            "execve" => libc::execve(program.as_ptr(), no_words.as_ptr(), std::ptr::null()).into(),
            "fork" => end_child(libc::syscall(libc::SYS_fork)),
            "clone" => end_child(libc::syscall(libc::SYS_clone, fork, 0, 0, 0, 0)),
            "clone_namespace" => libc::syscall(libc::SYS_clone, thread_in_namespace, 0, 0, 0, 0),
            "clone_user" => end_child(libc::syscall(
                libc::SYS_clone,
                fork | libc::CLONE_NEWUSER,
                0,
                0,
                0,
                0,
            )),
            "clone3" => libc::syscall(libc::SYS_clone3, nothing, 0),
            "fsopen" => libc::syscall(libc::SYS_fsopen, nothing, 0),
            "socket_inet" => libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into(),
            "socket_inet6" => libc::socket(libc::AF_INET6, libc::SOCK_DGRAM, 0).into(),
            "socket_netlink" => libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into(),
            "socket_packet" => libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).into(),
            "socket_vsock" => libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0).into(),
            "socket_unix" => libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).into(),
            "socketpair" => {
                let mut pair = [0; 2];
                libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()).into()
            }
            "mmap_exec" => {
                let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                libc::mmap(nothing, 4096, rights, anonymous, -1, 0) as libc::c_long
            }
            "mprotect_exec" => {
                let page = libc::mmap(nothing, 4096, libc::PROT_READ, anonymous, -1, 0);
                libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC).into()
            }
            "kill_parent" => libc::kill(parent, 0).into(),
            "kill_self" => libc::kill(libc::getpid(), 0).into(),
            "tgkill_parent" => libc::syscall(libc::SYS_tgkill, parent, parent, 0),
            "ioctl_tiocsti" => libc::ioctl(-1, libc::TIOCSTI, nothing).into(),
            "ioctl_tunsetiff" => libc::ioctl(-1, libc::TUNSETIFF, nothing).into(),
            "ioctl_kvm" => libc::ioctl(-1, 0xae80, nothing).into(),
            "ioctl_userfault_copy" => libc::ioctl(-1, 0xc028_aa03, nothing).into(),
            "ioctl_userfault_api" => libc::ioctl(-1, 0xc018_aa3f, nothing).into(),
            "ioctl_userfault_protect" => libc::ioctl(-1, 0xc018_aa06, nothing).into(),
            "fcntl_setown" => libc::fcntl(0, libc::F_SETOWN, parent).into(),
            "prctl_dumpable" => libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0).into(),
            "prlimit_set" => libc::setrlimit(libc::RLIMIT_CORE, &raw const limit).into(),
            "flock" => libc::flock(-1, libc::LOCK_EX).into(),
            "x32" => libc::syscall(0x4000_0000 | libc::SYS_getpid),
            other => panic!("what is {other}?"),
        }
    }
}

/// Ends the process that `fork` made, in it.
fn end_child(result: libc::c_long) -> libc::c_long {
    if result == 0 {
        // SAFETY: it ends at once, and nothing of this process's is run before.
        unsafe { libc::_exit(0) };
    }
    result
}

/// Does something with the file `words[0]`.
fn with_files(name: &str, words: &[&str]) -> std::io::Result<()> {
    let path = Path::new(words[0]);
    match name {
        "open" => std::fs::File::open(path).map(drop),
        "create" => std::fs::write(path, "x"),
        "write" => std::fs::File::options().write(true).open(path).map(drop),
        "remove" => std::fs::remove_file(path),
        "mkdir" => std::fs::create_dir(path),
        "connect" => UnixStream::connect(path).map(drop),
        // The device `/dev/null`.
        "node" => {
            let (kind, mode) = (
                rustix::fs::FileType::CharacterDevice,
                rustix::fs::Mode::RUSR,
            );
            let device = rustix::fs::makedev(1, 3);
            Ok(rustix::fs::mknodat(
                rustix::fs::CWD,
                path,
                kind,
                mode,
                device,
            )?)
        }
        "run" => std::process::Command::new(path)
            .arg("--help")
            .stdout(std::process::Stdio::null())
            .status()
            .map(drop),
        "abstract" => {
            use std::os::linux::net::SocketAddrExt;
            let address = std::os::unix::net::SocketAddr::from_abstract_name(words[0])?;
            UnixStream::connect_addr(&address).map(drop)
        }
        other => panic!("what is {other}?"),
    }
}
