//! Snapshots whose image is changed or cut under a guest that goes on from it lazily.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::Child;

use crate::common::place::{Place, end, finish};
use crate::filled::{self, wait_until};
use crate::{go_on, wires};

/// Has the VM called `name` read all of its memory: a snapshot does.
fn read_all(place: &Place, name: &str) -> String {
    let dir = place.path(&format!("all of {name}").replace(' ', "-"));
    let words = ["snapshot", name, &dir.display().to_string()];
    let asked = finish(place.command().args(words).spawn().unwrap());
    String::from_utf8(asked.stderr).unwrap()
}

/// A snapshot of the VM called `one`, which ends; what is asked of a VM called `lazy` that goes on
/// from it lazily.
struct Lazily<'a> {
    place: &'a Place,
    image: PathBuf,
    bytes: u64,
    vm: Child,
}

impl<'a> Lazily<'a> {
    fn new(place: &'a Place, vm: Child, more: &str) -> Self {
        let dir = place.path("s");
        let name = dir.display().to_string();
        place.ask(&format!("snapshot one {name}"));
        end(place, vm, &[]);
        let image = dir.join("memory.image");
        let log = place.path("lazy.log").display().to_string();
        let words = format!("--snapshot {name} --lazy --name lazy --serial file={log}{more}");
        let vm = go_on(place, &words);
        place.wait_for("lazy");
        Self {
            place,
            bytes: image.metadata().unwrap().len(),
            image,
            vm,
        }
    }

    fn cut(&self, bytes: u64) {
        let image = OpenOptions::new().write(true).open(&self.image);
        image.unwrap().set_len(bytes).unwrap();
    }

    /// It must end with a line that names the file and what to do.
    #[track_caller]
    fn ends(self, cut_to: u64) {
        let ended = finish(self.vm);
        let error = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "{error}");
        // On a busy host KVM may have had something to be warned of before.
        let says_so = error.lines().filter(|line| line.starts_with("cofferdam: "));
        assert_eq!(says_so.count(), 1, "{error}");
        for says in [
            "cofferdam: the guest's memory is lost",
            self.image.to_str().unwrap(),
            &format!("was cut to {cut_to} of {} bytes", self.bytes),
            "run it from the snapshot again",
        ] {
            assert!(error.contains(says), "no {says:?} in: {error}");
        }
        self.place.assert_empty();
    }
}

#[test]
fn who_reads_the_memory_of_a_guest_whose_image_was_cut_ends_it_with_a_line() {
    let place = Place::new();
    for asks in ["snapshot lazy new", "mark lazy"] {
        let _ = std::fs::remove_dir_all(place.path("s"));
        let lazy = Lazily::new(&place, filled::start(&place, "one"), "");
        lazy.cut(40 << 20);
        let new = place.path("new");
        let asks = asks.replace("new", new.to_str().unwrap());
        let words = asks.split(' ');
        let asked = finish(place.command().args(words).spawn().unwrap());
        assert!(!asked.status.success());
        assert!(!new.exists());
        let bytes = lazy.bytes;
        lazy.ends(40 << 20);
        // One that is cut before is refused, and one that had its bytes back is not whole.
        let dir = place.path("s").display().to_string();
        place.refused(
            &format!("--snapshot {dir} --lazy"),
            &["memory.image", "instead of"],
        );
        let image = place.path("s/memory.image");
        let image = OpenOptions::new().write(true).open(image).unwrap();
        image.set_len(bytes).unwrap();
        place.ask_refused(&format!("snapshot check {dir}"), "is damaged");
    }
}

#[test]
fn a_guest_that_touches_a_page_that_is_missing_ends_with_a_line() {
    let place = Place::new();
    let lazy = Lazily::new(&place, filled::start_touching(&place, "one"), "");
    // Below is what it runs from.
    lazy.cut(33 << 20);
    lazy.ends(33 << 20);
}

#[test]
fn a_device_that_touches_a_page_that_is_missing_ends_the_guest_with_a_line() {
    let place = Place::new();
    let cable = place.path("cable");
    let vm = wires::start(&place, "one", &format!("unix={},listen", cable.display()));
    wires::Peer::connect(&cable).number().unwrap();
    let other = place.path("other");
    let lazy = Lazily::new(
        &place,
        vm,
        &format!(" --net unix={},listen", other.display()),
    );
    place.ask("pause lazy");
    lazy.cut(0);
    // The card puts it into a buffer that nobody has touched since.
    let mut peer = wires::Peer::connect(&other);
    peer.send();
    lazy.ends(0);
}

#[test]
fn a_guest_that_has_its_own_memory_needs_the_image_no_more() {
    let place = Place::new();
    let vm = filled::start(&place, "one");
    let dir = place.path("s");
    let name = dir.display().to_string();
    place.ask(&format!("snapshot one {name}"));
    end(&place, vm, &[]);
    let log = place.path("log");
    let words = format!(
        "--snapshot {name} --name eager --serial file={}",
        log.display()
    );
    let eager = go_on(&place, &words);
    place.wait_for("eager");
    std::fs::write(dir.join("memory.image"), b"").unwrap();
    assert_eq!(read_all(&place, "eager"), "");
    // A reset gives a lazy one memory of its own as well: see the tests of the `vmm` crate.
    wait_until("it runs", || place.status_of("eager")["state"] == "running");
    end(&place, eager, &[]);
}
