//! The pages that a guest touches first when it goes on lazily.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Child;

use crate::common::place::{Place, end, finish};
use crate::filled::{self, wait_until};
use crate::go_on;

const FETCHED: &str = "what is touched first is there";

/// A VM that goes on lazily from the snapshot `s`.
fn lazily(place: &Place) -> Child {
    let words = format!(
        "-vv --log-file {} --snapshot {} --lazy --name lazy --serial file={}",
        place.path("log").display(),
        place.path("s").display(),
        place.path("console").display()
    );
    let _ = std::fs::remove_file(place.path("log"));
    let vm = go_on(place, &words);
    place.wait_for("lazy");
    vm
}

fn log(place: &Place) -> String {
    std::fs::read_to_string(place.path("log")).unwrap_or_default()
}

fn is_recorded(file: &Path) -> bool {
    file.metadata().is_ok_and(|file| file.len() > 16)
}

#[test]
fn what_a_guest_touches_first_is_recorded_once_and_fetched_from_then_on() {
    let place = Place::new();
    let vm = filled::start_touching(&place, "one");
    let dir = place.path("s");
    place.ask(&format!("snapshot one {}", dir.display()));
    end(&place, vm, &[]);
    let file = dir.join("working.set");
    assert!(!file.exists());
    let vm = lazily(&place);
    wait_until("it is recorded", || is_recorded(&file));
    end(&place, vm, &[]);
    assert!(!log(&place).contains(FETCHED));
    let recorded = std::fs::read(&file).unwrap();
    let vm = lazily(&place);
    wait_until("it is fetched", || log(&place).contains(FETCHED));
    end(&place, vm, &[]);
    assert!(
        std::fs::read(&file).unwrap() == recorded,
        "it was recorded again"
    );
    place.ask(&format!("snapshot check {}", dir.display()));

    // What is wrong is not used, and recorded anew.
    let mut damaged = recorded.clone();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&file, &damaged).unwrap();
    let vm = lazily(&place);
    assert!(
        log(&place).contains("is not used: its checksum is wrong"),
        "{}",
        log(&place)
    );
    wait_until("it is recorded anew", || {
        std::fs::read(&file).is_ok_and(|now| now != damaged && is_recorded(&file))
    });
    end(&place, vm, &[]);
    assert!(!log(&place).contains(FETCHED));

    // A later program's is its own.
    let mut later = recorded;
    later[8] = 9;
    std::fs::write(&file, &later).unwrap();
    let vm = lazily(&place);
    assert!(log(&place).contains("it has version 9"), "{}", log(&place));
    end(&place, vm, &[]);
    assert!(std::fs::read(&file).unwrap() == later);
}

#[test]
fn whatever_is_in_the_place_of_a_working_set_a_guest_goes_on() {
    let place = Place::new();
    let vm = filled::start(&place, "one");
    let dir = place.path("s");
    place.ask(&format!("snapshot one {}", dir.display()));
    end(&place, vm, &[]);
    let file = dir.join("working.set");
    let elsewhere = place.path("elsewhere");
    std::fs::write(&elsewhere, b"").unwrap();
    for what in ["folder", "fifo", "link", "long"] {
        match what {
            "folder" => std::fs::create_dir(&file).unwrap(),
            "fifo" => {
                let made = std::process::Command::new("mkfifo").arg(&file).spawn();
                assert!(finish(made.unwrap()).status.success());
                assert!(file.metadata().unwrap().file_type().is_fifo());
            }
            "link" => std::os::unix::fs::symlink(&elsewhere, &file).unwrap(),
            _ => std::fs::File::create(&file)
                .unwrap()
                .set_len(1 << 40)
                .unwrap(),
        }
        let vm = lazily(&place);
        assert!(
            log(&place).contains("no pages are fetched ahead"),
            "{what}: {}",
            log(&place)
        );
        assert_eq!(place.status_of("lazy")["state"], "running");
        end(&place, vm, &[]);
        match what {
            "folder" => std::fs::remove_dir(&file).unwrap(),
            _ => std::fs::remove_file(&file).unwrap(),
        }
    }
    assert_eq!(
        elsewhere.metadata().unwrap().len(),
        0,
        "a link was followed"
    );
}
