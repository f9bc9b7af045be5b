#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use proptest::prelude::*;
use serde_json::json;

use super::manifest::Files;
use super::*;

const PAGES: u64 = 600;
const PAGE: usize = PAGE_BYTES as usize;
const FILES: [&str; 5] = [
    MANIFEST_FILE,
    MACHINE_FILE,
    DEVICES_FILE,
    MAP_FILE,
    IMAGE_FILE,
];

/// Pages by their number; `0` is a zero page.
type Content = BTreeMap<u64, u8>;

fn page(value: u8) -> [u8; PAGE] {
    std::array::from_fn(|index| match value {
        0 => 0,
        _ => value ^ (index % 251) as u8,
    })
}

fn write(dir: &Path, content: &Content, parent: Option<&Snapshot>) -> Result<(), SnapshotError> {
    write_as(FORMAT_VERSION, dir, content, parent)
}

/// As programs of that version wrote it.
fn write_as(
    version: u32,
    dir: &Path,
    content: &Content,
    parent: Option<&Snapshot>,
) -> Result<(), SnapshotError> {
    let writer = DirectoryWriter::begin(dir)?;
    let sums = match version {
        1 => PageSums::Crc32,
        _ => PageSums::Xxh64,
    };
    let mut image = ImageWriter::new(writer.create(IMAGE_FILE)?, PAGES * PAGE_BYTES, sums).unwrap();
    for (number, value) in content {
        image.put(*number, &page(*value)).unwrap();
    }
    let (image, map) = image.finish(parent.is_some()).unwrap();
    let files = Files {
        machine: writer.store(MACHINE_FILE, b"the machine")?,
        devices: writer.store(DEVICES_FILE, b"its devices")?,
        map: writer.store(MAP_FILE, &map.to_bytes().unwrap())?,
        image: StoredFile {
            bytes: image.metadata().unwrap().len(),
            crc32: None,
        },
    };
    writer.finish(&Manifest {
        version,
        id: SnapshotId::random().unwrap(),
        parent: parent.map(|parent| ParentSnapshot {
            id: parent.manifest().id,
            path: parent.dir().to_str().unwrap().to_owned(),
        }),
        created_unix_s: 1,
        program: "test".to_owned(),
        cpu: CpuModel {
            vendor: "GenuineTest".to_owned(),
            brand: "Test".to_owned(),
        },
        memory_bytes: PAGES * PAGE_BYTES,
        vcpus: 1,
        files,
        vm: json!({"name": "web", "disks": ["a", "b"]}),
    })
}

/// All of memory as the snapshot in `dir` has it, with its states looked at.
fn read(dir: &Path) -> Result<Vec<u8>, SnapshotError> {
    let chain = Chain::open(dir)?;
    assert_eq!(chain.top().machine_state()?, b"the machine");
    assert_eq!(chain.top().device_states()?, b"its devices");
    load(&chain, false)
}

fn load(chain: &Chain, above_base: bool) -> Result<Vec<u8>, SnapshotError> {
    let memory = Mutex::new(vec![0xee; PAGES as usize * PAGE]);
    if !above_base {
        memory.lock().unwrap().fill(0);
    }
    chain.load(above_base, &mut |_| true, |offset, content| {
        let offset = usize::try_from(offset).unwrap();
        memory.lock().unwrap()[offset..offset + content.len()].copy_from_slice(content);
        Ok(())
    })?;
    Ok(memory.into_inner().unwrap())
}

fn flat(content: &Content) -> Vec<u8> {
    let mut all = vec![0; PAGES as usize * PAGE];
    for (number, value) in content {
        let at = *number as usize * PAGE;
        all[at..at + PAGE].copy_from_slice(&page(*value));
    }
    all
}

fn content() -> impl Strategy<Value = Content> {
    // Long runs, and pages on their own.
    let run = (0..PAGES, 1..300u64, 0..4u8);
    proptest::collection::vec(run, 0..6).prop_map(|runs| {
        let pages = |(first, count, value): (u64, u64, u8)| {
            (first..(first + count).min(PAGES)).map(move |page| (page, value))
        };
        runs.into_iter().flat_map(pages).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_chain_of_diffs_is_what_was_written_last(all in proptest::collection::vec(content(), 1..5)) {
        let folder = tempfile::tempdir().unwrap();
        let mut parent: Option<Snapshot> = None;
        let mut expected = Content::new();
        let mut diffs = Content::new();
        for (index, content) in all.iter().enumerate() {
            let dir = folder.path().join(index.to_string());
            write(&dir, content, parent.as_ref()).unwrap();
            expected.extend(content);
            if index > 0 {
                diffs.extend(content);
            }
            prop_assert!(read(&dir).unwrap() == flat(&expected));
            // What the diffs say, and nothing else.
            let above = load(&Chain::open(&dir).unwrap(), true).unwrap();
            for page_number in 0..PAGES {
                let at = page_number as usize * PAGE;
                let wanted = diffs.get(&page_number).map_or([0xee; PAGE], |value| page(*value));
                prop_assert!(above[at..at + PAGE] == wanted);
            }
            let chain = Chain::open(&dir).unwrap();
            chain.check(&mut |_| true).unwrap();
            let whole = folder.path().join(format!("whole {index}"));
            chain.merge(&whole, &mut |_| true).unwrap();
            prop_assert!(Chain::open(&whole).unwrap().snapshots().len() == 1);
            prop_assert!(read(&whole).unwrap() == flat(&expected));
            parent = Some(Snapshot::open(&dir).unwrap());
        }
    }

    #[test]
    fn a_page_that_comes_again_is_as_it_came_last(all in proptest::collection::vec(content(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(path);
        let mut image = ImageWriter::new(file.unwrap(), PAGES * PAGE_BYTES, PageSums::Xxh64).unwrap();
        let mut expected = Content::new();
        for content in &all {
            for (number, value) in content {
                image.put(*number, &page(*value)).unwrap();
            }
            expected.extend(content);
        }
        let (file, map) = image.finish(false).unwrap();
        let mut memory = vec![0; PAGES as usize * PAGE];
        for run in map.runs() {
            let at = usize::try_from(run.offset()).unwrap();
            let run_of = &mut memory[at..at + run.bytes()];
            super::image::verify_run(&file, run, PageSums::Xxh64, run_of).unwrap();
        }
        prop_assert!(memory == flat(&expected));
    }

    #[test]
    fn maps_and_manifests_of_any_bytes_are_an_error(bytes: Vec<u8>) {
        // Not one in 2^32 has a right checksum by chance.
        let text = String::from_utf8_lossy(&bytes);
        Manifest::from_text(Path::new("x"), &text).unwrap_err();
        if let Ok(map) = MemoryMap::from_bytes(&bytes, PAGES * PAGE_BYTES) {
            prop_assert!(map.runs().iter().all(|run| run.end() <= PAGES));
        }
    }
}

/// A snapshot of few pages, all kinds of them.
fn small(folder: &Path) -> (std::path::PathBuf, Vec<u8>) {
    small_as(FORMAT_VERSION, folder)
}

fn small_as(version: u32, folder: &Path) -> (std::path::PathBuf, Vec<u8>) {
    let dir = folder.join("small");
    let content = Content::from([(0, 1), (1, 2), (5, 0), (599, 3)]);
    write_as(version, &dir, &content, None).unwrap();
    (dir, flat(&content))
}

fn refused(dir: &Path) -> SnapshotError {
    match read(dir) {
        Err(error) => error,
        Ok(_) => panic!("it was read"),
    }
}

#[test]
fn a_snapshot_that_is_cut_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, _) = small(folder.path());
    for name in FILES {
        let path = dir.join(name);
        let whole = std::fs::read(&path).unwrap();
        let lengths: Vec<usize> = match name {
            IMAGE_FILE => vec![0, 1, PAGE, whole.len() - 1],
            _ => (0..whole.len()).collect(),
        };
        for length in lengths {
            // A manifest without its last line end says the same.
            if name == MANIFEST_FILE && length + 1 == whole.len() {
                continue;
            }
            std::fs::write(&path, &whole[..length]).unwrap();
            let error = refused(&dir).to_string();
            assert!(error.contains(name), "{name} of {length} bytes: {error}");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        let error = refused(&dir).to_string();
        assert!(error.contains(name), "{name} and a byte more: {error}");
        std::fs::remove_file(&path).unwrap();
        assert!(refused(&dir).to_string().contains(name));
        std::fs::write(&path, &whole).unwrap();
    }
    read(&dir).unwrap();
}

#[test]
fn a_flipped_bit_is_found_or_makes_no_difference() {
    flipped_bits_are_found(FORMAT_VERSION, 2000);
}

#[test]
fn a_flipped_bit_of_a_snapshot_of_version_1_is_found_too() {
    flipped_bits_are_found(1, 200);
}

/// Flips `flips` bits of each file, one after the other.
fn flipped_bits_are_found(version: u32, flips: usize) {
    let folder = tempfile::tempdir().unwrap();
    let (dir, expected) = small_as(version, folder.path());
    let manifest = Snapshot::open(&dir).unwrap().manifest().clone();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (random >> 33) as usize % below
    };
    for name in FILES {
        let path = dir.join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut changed = whole.clone();
        for _ in 0..flips {
            let (at, bit) = match name {
                // Holes hold nothing that could be wrong.
                IMAGE_FILE => ([0, 1, 599][next(3)] * PAGE + next(PAGE), next(8)),
                _ => (next(whole.len()), next(8)),
            };
            changed[at] ^= 1 << bit;
            std::fs::write(&path, &changed).unwrap();
            match read(&dir) {
                Err(_) => {}
                // White space of the manifest.
                Ok(memory) => {
                    assert_eq!(name, MANIFEST_FILE, "byte {at:#x}, bit {bit}");
                    assert!(memory == expected);
                    assert_eq!(Snapshot::open(&dir).unwrap().manifest(), &manifest);
                }
            }
            changed[at] ^= 1 << bit;
        }
        std::fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn another_version_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, _) = small(folder.path());
    let path = dir.join(MANIFEST_FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let newer = text.replace(
        "\"version\": 2",
        "\"version\": 3, \"what\": \"nobody knows\"",
    );
    std::fs::write(&path, newer).unwrap();
    let error = refused(&dir);
    assert!(
        matches!(error, SnapshotError::Version { found: 3, .. }),
        "{error}"
    );
}

#[test]
fn a_diff_on_a_snapshot_of_an_earlier_version_is_read_and_merged_to_one_of_this() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, _) = small_as(1, folder.path());
    let parent = Snapshot::open(&dir).unwrap();
    assert_eq!(parent.manifest().version, 1);
    let diff = folder.path().join("diff");
    write(&diff, &Content::from([(1, 9), (300, 4)]), Some(&parent)).unwrap();
    let all = Content::from([(0, 1), (1, 9), (300, 4), (599, 3)]);
    assert!(read(&diff).unwrap() == flat(&all));
    let merged = folder.path().join("merged");
    let chain = Chain::open(&diff).unwrap();
    chain.merge(&merged, &mut |_| true).unwrap();
    assert!(read(&merged).unwrap() == flat(&all));
    let merged = Snapshot::open(&merged).unwrap();
    assert_eq!(merged.manifest().version, FORMAT_VERSION);
}

#[test]
fn a_diff_without_its_parent_or_with_another_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (base, _) = small(folder.path());
    let diff = folder.path().join("diff");
    let parent = Snapshot::open(&base).unwrap();
    write(&diff, &Content::from([(3, 9)]), Some(&parent)).unwrap();
    let elsewhere = folder.path().join("elsewhere");
    std::fs::rename(&base, &elsewhere).unwrap();
    let error = Chain::open(&diff).unwrap_err().to_string();
    assert!(error.contains("nothing is there"), "{error}");
    write(&base, &Content::new(), None).unwrap();
    let error = Chain::open(&diff).unwrap_err().to_string();
    assert!(error.contains("not the parent"), "{error}");
    // A diff that is its own parent.
    std::fs::remove_dir_all(&base).unwrap();
    std::fs::rename(&elsewhere, &base).unwrap();
    std::fs::remove_dir_all(&base).unwrap();
    std::os::unix::fs::symlink(&diff, &base).unwrap();
    Chain::open(&diff).unwrap_err();
}

#[test]
fn nothing_is_written_over_and_nothing_stays_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, expected) = small(folder.path());
    let again = write(&dir, &Content::new(), None).unwrap_err();
    assert!(matches!(again, SnapshotError::NotEmpty(_)), "{again}");
    assert!(read(&dir).unwrap() == expected);
    let file = folder.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    let error = write(&file, &Content::new(), None).unwrap_err();
    assert!(matches!(error, SnapshotError::NotADirectory(_)), "{error}");
    let nowhere = folder.path().join("not/there");
    let error = write(&nowhere, &Content::new(), None).unwrap_err();
    assert!(matches!(error, SnapshotError::Write { .. }), "{error}");
    // An empty directory is as good as none; one that is given up leaves nothing.
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    drop(DirectoryWriter::begin(&empty).unwrap());
    // Somebody else was quicker.
    let writer = DirectoryWriter::begin(&empty).unwrap();
    std::fs::write(empty.join("theirs"), b"x").unwrap();
    let manifest = Snapshot::open(&dir).unwrap().manifest().clone();
    let error = writer.finish(&manifest).unwrap_err();
    assert!(matches!(error, SnapshotError::NotEmpty(_)), "{error}");
    let mut left: Vec<_> = folder
        .path()
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["empty", "file", "small"]);
}

/// As many runs as pages, each of which is read on its own.
fn scattered(folder: &Path) -> std::path::PathBuf {
    let dir = folder.join("scattered");
    let content = (0..PAGES).step_by(2).map(|number| (number, 7)).collect();
    write(&dir, &content, None).unwrap();
    dir
}

#[test]
fn long_work_says_how_far_it_is_and_can_be_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let dir = scattered(folder.path());
    let chain = Chain::open(&dir).unwrap();
    let into = folder.path().join("into");
    let load = |tell: Tell<'_>| chain.load(false, tell, |_, _| Ok(())).map(drop);
    let check = |tell: Tell<'_>| chain.check(tell);
    let merge = |tell: Tell<'_>| {
        let merged = chain.merge(&into, tell);
        let _ = std::fs::remove_dir_all(&into);
        merged
    };
    type Work<'a> = &'a dyn Fn(Tell<'_>) -> Result<(), SnapshotError>;
    let works: [Work<'_>; 3] = [&load, &check, &merge];
    for work in works {
        let mut words = Vec::new();
        work(&mut |what| {
            words.push(what.to_owned());
            true
        })
        .unwrap();
        let reading = |word: &&String| word.starts_with("reading ") && word.ends_with(" of 1 MiB");
        assert!(words.iter().any(|word| reading(&word)), "{words:?}");
        // Given up at any of them.
        for at in 0..words.len() {
            let mut heard = 0;
            let given_up = work(&mut |_| {
                heard += 1;
                heard <= at
            });
            // Other threads may have been faster this time.
            if heard > at {
                assert!(
                    matches!(given_up, Err(SnapshotError::GivenUp)),
                    "{given_up:?}"
                );
            }
            let left = folder.path().read_dir().unwrap().count();
            assert_eq!(left, 1, "something is left");
        }
    }
}

#[test]
fn what_a_killed_process_of_the_same_number_left_is_in_nobodys_way() {
    let folder = tempfile::tempdir().unwrap();
    let left = format!("small.partial-{}", std::process::id());
    let left = folder.path().join(left);
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join(IMAGE_FILE), b"half").unwrap();
    let (dir, expected) = small(folder.path());
    assert!(read(&dir).unwrap() == expected);
    assert_eq!(std::fs::read(left.join(IMAGE_FILE)).unwrap(), b"half");
    assert_eq!(folder.path().read_dir().unwrap().count(), 2);
}

#[test]
fn an_image_that_was_changed_since_it_was_opened_is_noticed() {
    use std::os::unix::fs::FileExt;

    let folder = tempfile::tempdir().unwrap();
    let changes: [fn(&std::fs::File); 3] = [
        |image| image.set_len(PAGE_BYTES).unwrap(),
        |image| image.set_len((PAGES + 1) * PAGE_BYTES).unwrap(),
        |image| image.write_all_at(b"x", 5).unwrap(),
    ];
    for change in changes {
        let (dir, _) = small(folder.path());
        let path = dir.join(IMAGE_FILE);
        let snapshot = Snapshot::open(&dir).unwrap();
        snapshot.image_is_as_opened().unwrap();
        // Clocks of file systems go in steps.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        change(&file);
        let error = snapshot.image_is_as_opened().unwrap_err().to_string();
        assert!(
            error.contains(path.to_str().unwrap()) && error.contains("was changed"),
            "{error}"
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
