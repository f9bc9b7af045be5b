//! A campaign over HTTP, from its start over its being given up and gone on with to a trial that is
//! made again.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{options, wait_until};

struct Service {
    child: Child,
    socket: PathBuf,
}

impl Service {
    fn start(root: &Path, campaigns: &Path) -> Self {
        let socket = root.join("service.sock");
        let child = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
            .env("COFFERDAM_RUNTIME_DIR", root)
            .args(["serve", "--campaigns"])
            .arg(campaigns)
            .arg("--images")
            .arg(std::path::absolute(options().images).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the service", || UnixStream::connect(&socket).is_ok());
        Self { child, socket }
    }

    /// The status of the answer, and what it is.
    #[track_caller]
    fn ask(&self, request: &str, body: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let about = match body {
            "" => String::new(),
            _ => format!(
                "content-type: application/json\r\ncontent-length: {}\r\n",
                body.len()
            ),
        };
        let text =
            format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{about}\r\n{body}");
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    #[track_caller]
    fn begin(&self, path: &str, body: &str) -> String {
        let (status, job) = self.ask(&format!("POST {path}"), body);
        assert_eq!(status, 202, "{job}");
        job["id"].as_str().unwrap().to_owned()
    }

    fn job(&self, id: &str) -> Value {
        self.ask(&format!("GET /v1/jobs/{id}"), "").1
    }

    fn end_of(&self, id: &str) -> Value {
        let mut job = Value::Null;
        wait_until("the job", || {
            job = self.job(id);
            job["stage"] != "running"
        });
        job
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A disk that is full is a problem of the job with a line that says so.
#[track_caller]
fn a_full_disk_is_said(folder: &Path) {
    let (root, disk) = (folder.join("other"), FullDisk::in_folder(folder));
    std::fs::create_dir(&root).unwrap();
    let service = Service::start(&root, &disk.0);
    let full = r#"{"name": "full", "driver": "dummy", "trials": 1, "ways": ["native"]}"#;
    let full = service.end_of(&service.begin("/v1/campaigns", full));
    assert_eq!(full["problem"]["code"], "campaign_failed", "{full}");
    let detail = full["problem"]["detail"].as_str().unwrap();
    assert!(detail.contains("No space left on device"), "{full}");
}

/// A disk on which there is no room for a byte.
struct FullDisk(PathBuf);

impl FullDisk {
    fn in_folder(folder: &Path) -> Self {
        let disk = folder.join("disk");
        std::fs::create_dir(&disk).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16k", "tmpfs"]);
        assert!(mount.arg(&disk).status().unwrap().success());
        let full = std::fs::write(disk.join("filled"), [0; 64 << 10]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        Self(disk)
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

mod long {
    use super::*;

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn a_campaign_over_http_is_told_of_given_up_gone_on_with_and_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let (root, campaigns) = (folder.path().join("run"), folder.path().join("campaigns"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&campaigns).unwrap();
        let service = Service::start(&root, &campaigns);
        a_full_disk_is_said(folder.path());
        let spec = r#"{"name": "few", "driver": "dummy", "kinds": ["null_dereference", "nop"],
                       "functions": ["dummy_get_drvinfo", "dummy_xmit"], "trials": 4, "ways": ["native"]}"#;
        let first = service.begin("/v1/campaigns", spec);
        wait_until("a trial", || {
            service.job(&first)["figures"]["trials"].as_u64() >= Some(1)
        });
        let figures = service.job(&first)["figures"].clone();
        assert_eq!(figures["of"], 4, "{figures}");
        assert!(figures["ways"]["native"].is_object(), "{figures}");
        let (_, shown) = service.ask("GET /v1/campaigns/few", "");
        assert_eq!(shown["job"], *first, "{shown}");
        assert_eq!(service.ask(&format!("DELETE /v1/jobs/{first}"), "").0, 202);
        assert_eq!(service.end_of(&first)["problem"]["code"], "cancelled");
        let (_, shown) = service.ask("GET /v1/campaigns/few", "");
        let made = shown["summary"]["trials"].as_u64().unwrap();
        assert!((1..4).contains(&made), "{shown}");
        // Asked for again it goes on.
        let job = service.end_of(&service.begin("/v1/campaigns", spec));
        assert_eq!(
            (&job["stage"], &job["result"]["trials"]),
            (&"done".into(), &4.into()),
            "{job}"
        );
        let (status, shown) = service.ask("GET /v1/campaigns/few", "");
        assert_eq!(
            (status, shown["what"]["driver"].as_str()),
            (200, Some("dummy")),
            "{shown}"
        );
        let by_command = Command::new(env!("CARGO_BIN_EXE_cofferdam"))
            .args(["campaign", "show", "--json"])
            .arg(campaigns.join("few.jsonl"))
            .output()
            .unwrap();
        let by_command: Value = serde_json::from_slice(&by_command.stdout).unwrap();
        assert_eq!(shown["summary"], by_command);
        let (_, trial) = service.ask("GET /v1/campaigns/few/trials/1", "");
        let again = service.begin("/v1/campaigns/few/trials/1/replay", "{}");
        let again = service.end_of(&again);
        assert_eq!(again["stage"], "done", "{again}");
        assert_eq!(again["result"]["then"], trial);
        assert_eq!(again["result"]["now"]["says"], trial["says"]);
        assert!(
            again["result"]["now"]["runs"]["native"]["verdict"].is_string(),
            "{again}"
        );
        // Also of the one that was given up: where its process did not end in its time and was ended,
        // the next one has removed them.
        let left = std::fs::read_dir(root.join(".campaigns")).unwrap().count();
        assert_eq!(left, 0, "guests of campaigns that are over");
    }
}
