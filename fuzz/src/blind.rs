//! Each target with its seeds, and with inputs that know nothing of where they lead: random bytes,
//! and seeds with something changed. The same ones in each run.

use std::path::Path;
use std::sync::Mutex;

use rand_core::{Rng, SeedableRng};
use rand_xorshift::XorShiftRng;

/// Most bytes of a random input.
const MAX_BYTES: u64 = 1024;
/// Bytes at which something begins or ends are more likely than others.
const EDGES: [u8; 8] = [0, 1, 2, 0x3f, 0x7f, 0x80, 0xfe, 0xff];
/// Most changes of a seed.
const MAX_CHANGES: u64 = 8;

struct Inputs {
    random: XorShiftRng,
    seeds: Vec<Vec<u8>>,
}

impl Inputs {
    fn below(&mut self, limit: u64) -> usize {
        (self.random.next_u64() % limit.max(1)) as usize
    }

    fn byte(&mut self) -> u8 {
        let random = self.random.next_u64().to_le_bytes();
        match random[0] % 4 {
            0 => EDGES[usize::from(random[1] % 8)],
            _ => random[2],
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        // Short ones are as likely as long ones.
        let most = MAX_BYTES >> self.below(8);
        let length = self.below(most + 1);
        (0..length).map(|_| self.byte()).collect()
    }

    fn next(&mut self) -> Vec<u8> {
        let which = self.below(2 * self.seeds.len() as u64);
        let Some(mut input) = self.seeds.get(which).cloned() else {
            return self.bytes();
        };
        for _ in 0..=self.below(MAX_CHANGES) {
            let at = self.below(input.len() as u64 + 1);
            match (self.below(4), input.get_mut(at)) {
                (0, _) => input.truncate(at),
                (1, _) => input.insert(at, self.byte()),
                (2, Some(byte)) => *byte ^= 1 << (self.random.next_u64() % 8),
                (_, Some(byte)) => *byte = EDGES[at % 8],
                (_, None) => {}
            }
        }
        input
    }
}

/// Ends the process where any of its threads panics, as libFuzzer does: the target's own thread may
/// not notice, or wait for the other one.
fn end_with_any_thread() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        let which = INPUT
            .lock()
            .map(|input| format!("input {} of {}", input.1, input.0));
        eprintln!("{}", which.unwrap_or_default());
        std::process::abort();
    }));
}

/// The target and the number of its input: which it was that panicked.
static INPUT: Mutex<(&str, usize)> = Mutex::new(("", 0));

/// So many inputs for a target.
fn run(name: &'static str, count: usize, target: fn(&[u8])) {
    end_with_any_thread();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("seeds")
        .join(name);
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("it can be listed").path())
        .collect();
    paths.sort();
    let read = |path| std::fs::read(path).expect("it can be read");
    let seeds: Vec<Vec<u8>> = paths.iter().map(read).collect();
    seeds.iter().for_each(|seed| target(seed));
    let mut inputs = Inputs {
        random: XorShiftRng::seed_from_u64(0x5eed),
        seeds,
    };
    for number in 0..count {
        let input = inputs.next();
        *INPUT.lock().expect("nobody panics with it") = (name, number);
        target(&input);
    }
}

/// A test for each target, with the number of its inputs: so many as take about a second.
macro_rules! targets {
    ($($name:ident: $count:literal),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name), $count, crate::$name::run);
            }
        )*

        #[test]
        fn every_target_is_tried() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets");
            for entry in std::fs::read_dir(folder).expect("it is there") {
                let path = entry.expect("it can be listed").path();
                let name = path.file_stem().expect("it has a name");
                let tried = [$(stringify!($name)),*];
                assert!(tried.iter().any(|tried| name == *tried), "{name:?}");
            }
        }
    };
}

targets! {
    agent_stream: 50000,
    btf: 50000,
    control_socket: 1000,
    e1000_registers: 2000,
    guest_symbols: 50000,
    http_requests: 1000,
    kernel_image: 3000,
    keyboard_controller: 20000,
    ko_reader: 3000,
    page_tables: 30000,
    parked_nic: 500,
    pci_bus: 5000,
    saved_state: 20000,
    vfio_user_client: 5000,
    vfio_user_server: 5000,
    virtio_queues: 5000,
}
