//! The agent of the double.

use std::time::Duration;

use agent_protocol::ClientError;
use agent_protocol::message::{Interface, Module};

use super::{ADDRESS, DEVICE, DRIVER, Double, INSTALLED, module_file, refused};
use crate::by_turns::{FIND, FORGET, LOOK};
use crate::guest::{Agent, Ran};

/// The agent of the double.
pub(crate) struct DoubleAgent(pub(super) Double);

impl Drop for DoubleAgent {
    fn drop(&mut self) {
        self.0.world().agents -= 1;
    }
}

impl Agent for DoubleAgent {
    fn set_limit(&mut self, _limit: Duration) {}

    fn wait_until_it_answers(&mut self, _limit: Duration) -> Result<(), ClientError> {
        self.0.step("boot")
    }

    fn kernel_release(&self) -> Option<String> {
        Some("6.1".to_owned())
    }

    fn modules(&mut self, name: Option<&str>) -> Result<Vec<Module>, ClientError> {
        let loaded = self.0.world().loaded.is_some();
        let module = Module {
            name: DRIVER.to_owned(),
            size: 4096,
            refcnt: Some(0),
            state: "live".to_owned(),
            holders: Vec::new(),
            sections: Vec::new(),
        };
        match (loaded, name) {
            (true, _) => Ok(vec![module]),
            (false, None) => Ok(Vec::new()),
            (false, Some(name)) => Err(refused(name)),
        }
    }

    fn insert_installed(&mut self, _name: &str) -> Result<(), ClientError> {
        self.0.insert(INSTALLED)
    }

    fn insert_file(&mut self, path: &str) -> Result<(), ClientError> {
        self.0.insert(path)
    }

    fn remove_module(&mut self, _name: &str) -> Result<(), ClientError> {
        self.0.step("remove")?;
        let mut world = self.0.world();
        world.loaded = None;
        world.device += 1;
        Ok(())
    }

    fn run(&mut self, argv: &[&str]) -> Result<Ran, ClientError> {
        let there = self.0.world().loaded.is_some();
        let said = |text: String| Ran {
            success: true,
            stdout: text,
            stderr: String::new(),
        };
        Ok(match argv {
            ["sh", _, LOOK, _, ADDRESS] => {
                let world = self.0.world();
                let truth = format!("module {DRIVER} {}", world.instance);
                said(match (world.known, world.says, world.bound) {
                    (false, ..) => String::new(),
                    (true, Some(says), _) => format!("there\n{says}\n"),
                    (true, None, true) => format!("there\n{truth}\n"),
                    (true, None, false) => "there\n".to_owned(),
                })
            }
            ["sh", _, FORGET, _, ADDRESS] => {
                let success = self.0.step("forget").is_ok();
                self.0.world().known &= !success;
                Ran {
                    success,
                    ..Ran::default()
                }
            }
            ["sh", _, FIND, _, ADDRESS, mac] => {
                let success = self.0.step(&format!("find {mac}")).is_ok();
                let mut world = self.0.world();
                world.known |= success;
                world.bound |= success;
                Ran {
                    success,
                    ..Ran::default()
                }
            }
            ["sh", _, list, ..] if list.contains("/sys/bus/pci") => {
                let world = self.0.world();
                let folder = if there { DEVICE } else { "" };
                said(format!("instance {}\n{folder}\n", world.instance))
            }
            ["sh", ..] => said("eth0\n".repeat(usize::from(there))),
            ["test", ..] => Ran {
                success: there && self.0.step("look for eth0").is_ok(),
                ..Ran::default()
            },
            ["ip", "-j", "-d", ..] => {
                let world = self.0.world();
                let up = if world.up { "\"UP\"" } else { "" };
                said(format!(
                    r#"[{{"ifname":"eth0","flags":[{up}],"mtu":{},"address":"52:54:00:00:00:01"}}]"#,
                    world.mtu
                ))
            }
            ["ip", "-j", ..] => said("[]".to_owned()),
            ["ip", "link", "set", "dev", "eth0", words @ ..] => {
                let ran = self.0.step(&words.join(" "));
                let mut world = self.0.world();
                match words {
                    ["mtu", mtu] if ran.is_ok() => world.mtu = mtu.parse().unwrap(),
                    ["up"] => world.up = true,
                    _ => {}
                }
                Ran {
                    success: ran.is_ok(),
                    ..Ran::default()
                }
            }
            ["rm", "-f", path] => {
                self.0.world().files.remove(*path);
                said(String::new())
            }
            _ => Ran::default(),
        })
    }

    fn read_file(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        let world = self.0.world();
        let own = format!("/sys/module/{DRIVER}/notes/.note.gnu.build-id");
        match &world.loaded {
            // The build's number is all that tells them apart.
            Some(file) if path == own => {
                let id = crate::module_file::ModuleFile::parse(file)
                    .unwrap()
                    .build_id;
                Ok(module_file::note(&id.unwrap()))
            }
            _ => world.files.get(path).cloned().ok_or_else(|| refused(path)),
        }
    }

    fn write_file(&mut self, path: &str, data: &[u8], _mode: u32) -> Result<(), ClientError> {
        self.0.step(&format!("write {path}"))?;
        self.0.world().files.insert(path.to_owned(), data.to_vec());
        Ok(())
    }

    fn interfaces(&mut self) -> Result<Vec<Interface>, ClientError> {
        let world = self.0.world();
        let Some(file) = &world.loaded else {
            return Ok(Vec::new());
        };
        Ok(vec![Interface {
            name: "eth0".to_owned(),
            index: 2,
            flags: 0,
            carrier: Some(!world.no_link.contains(file)),
            operstate: "up".to_owned(),
            mtu: world.mtu,
            mac: String::new(),
            driver: Some(DRIVER.to_owned()),
            ipv4: Vec::new(),
            ipv6: Vec::new(),
            statistics: Vec::new(),
        }])
    }
}
