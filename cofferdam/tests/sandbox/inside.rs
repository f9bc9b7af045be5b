//! A process that goes behind the walls of one of ours and then does what it is told: this test
//! program, run once more.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output};

use cofferdam::sandbox::{Guests, MachineSandbox, Namespaces, SandboxOptions};

use crate::common::place::Place;
use crate::tries;

/// Variable with what is to be tried: `KIND CALL [ARGUMENT...]`.
const TRY: &str = "COFFERDAM_TEST_TRY";

/// Variable with the options of the sandbox.
const OPTIONS: &str = "COFFERDAM_TEST_SANDBOX";

/// Whose walls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A VM's process or a device host.
    Machine,
    /// The thread of a vCPU in one.
    Vcpu,
    /// The service.
    Service,
    /// A jail and no other wall, with the folder that the options name.
    Jail,
}

/// How a try ended.
#[derive(Debug)]
pub struct Tried(pub Output);

impl Tried {
    /// The process was ended for the system call `name`, and said so in a line.
    #[track_caller]
    pub fn is_ended_for(&self, name: &str) {
        let error = String::from_utf8_lossy(&self.0.stderr);
        assert_eq!(self.0.status.signal(), Some(libc::SIGSYS), "{self:?}");
        let says = format!("({name})");
        let told = error.lines().filter(|line| line.contains("refused"));
        let told: Vec<_> = told.collect();
        assert!(
            told.len() == 1 && told[0].contains(&says),
            "{name}: {error}"
        );
        assert!(told[0].starts_with("cofferdam: the sandbox"), "{error}");
    }

    /// The call returned this `errno`, or 0.
    #[track_caller]
    pub fn returned(&self, errno: i32) {
        let text = String::from_utf8_lossy(&self.0.stdout);
        assert!(self.0.status.success(), "{self:?}");
        let line = format!("returned {errno} ");
        assert!(text.contains(&line), "{errno}: {text}");
    }
}

/// The command line of the sandbox.
#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    sandbox: MachineSandbox,
}

/// Has a process of `kind`, with `options` of the sandbox, try `words`.
pub fn attempt(place: &Place, kind: Kind, options: &str, words: &str) -> Tried {
    let mut command = Command::new(std::env::current_exe().unwrap());
    if kind == Kind::Jail {
        // SAFETY: it allocates a little between fork and exec, which the C library allows after its
        // own fork.
        unsafe {
            command.pre_exec(|| Namespaces::begin().map(drop).map_err(std::io::Error::other));
        }
    }
    let output = command
        .args([
            "--exact",
            "inside::what_is_tried_is_done_and_told",
            "--nocapture",
        ])
        .env("COFFERDAM_RUNTIME_DIR", place.path("run"))
        .env(TRY, format!("{kind:?} {words}"))
        .env(OPTIONS, options)
        .output()
        .unwrap();
    Tried(output)
}

/// Run by itself it has another process try what is allowed; run by another test it is that
/// process.
#[test]
fn what_is_tried_is_done_and_told() {
    let Ok(words) = std::env::var(TRY) else {
        let place = Place::new();
        attempt(&place, Kind::Machine, "", "open /dev/null").returned(0);
        attempt(&place, Kind::Machine, "", "open /nowhere").returned(libc::ENOENT);
        return;
    };
    let words: Vec<_> = words.split(' ').collect();
    let options = std::env::var(OPTIONS).unwrap();
    let elder = tries::Elder::start();
    match words[0] {
        "Jail" => Namespaces::made_before().close(&[options.into()]).unwrap(),
        "Service" => SandboxOptions::default()
            .enter_service(Guests::Free)
            .unwrap(),
        kind => {
            let line = std::iter::once("sandbox").chain(options.split_whitespace());
            let line: Line = clap::Parser::parse_from(line);
            let entered = line.sandbox.enter(Vec::new(), None).unwrap();
            if kind == "Vcpu" {
                entered.enter_vcpu().unwrap();
            }
        }
    }
    let errno = tries::make(words[1], &words[2..], &elder);
    println!("returned {errno} ");
}
