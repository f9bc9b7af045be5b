//! A disk controller's driver, whose interrupt finds requests by number.

use super::*;

const QUEUE: u64 = 0xffff_8880_0002_0000;
const CONTROLLER: u64 = QUEUE + 0x400;
const TAGS: u64 = QUEUE + 0x800;
const POINTERS: u64 = QUEUE + 0xc00;
const REQUESTS: u64 = QUEUE + 0x1000;
/// A request, in [`BUFFER`], which is pages.
const REQUEST: u64 = BUFFER + 0x1230;
/// Where tags have their requests, and the controller its set.
const RQS: u64 = 48;
const SET: u64 = 32;

/// Types of a module whose interrupt handler is given one of `queue`.
fn types_with(queue: &'static str) -> Arc<Btf> {
    let mut e = Encoder::new(None);
    let int = e.int("int", 4, 1);
    let void = e.pointer(TypeId::VOID);
    let voids = e.pointer(void);
    let tags = [("nr_tags", int, 0), ("rqs", voids, RQS as u32)];
    e.structure("blk_mq_tags", 96, &tags);
    let set = [("nr_hw_queues", int, 8), ("tags", voids, 16)];
    e.structure("blk_mq_tag_set", 64, &set);
    let returned = e.typedef("irqreturn_t", int);
    let base = Arc::new(Btf::parse(&e.bytes(), None).unwrap());
    let mut e = Encoder::new(Some(&base));
    let set = base.find_struct("blk_mq_tag_set").unwrap();
    let controller = e.structure("my_controller", 128, &[("set", set, SET as u32)]);
    let controller = e.pointer(controller);
    e.structure(queue, 64, &[("dev", controller, 0)]);
    let void = e.pointer(TypeId::VOID);
    let parameters = [("irq", int), ("data", void)];
    e.function("my_irq", returned, &parameters);
    e.function("my_work", int, &parameters);
    Arc::new(Btf::parse(&e.bytes(), Some(base)).unwrap())
}

fn put(guest: &mut TestGuest, at: u64, words: &[u64]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    guest.put(Gva(at), &bytes, DATA);
}

/// A controller with two queues of which the second has requests.
fn guest_with_requests() -> (TestGuest, Known) {
    let mut guest = TestGuest::new(Levels::Four);
    put(&mut guest, QUEUE, &[CONTROLLER; 8]);
    put(&mut guest, CONTROLLER, &[0; 16]);
    put(&mut guest, CONTROLLER + SET, &[0, 2, POINTERS]);
    put(&mut guest, POINTERS, &[0, TAGS]);
    put(&mut guest, TAGS, &[0; 12]);
    put(&mut guest, TAGS, &[3]);
    put(&mut guest, TAGS + RQS, &[REQUESTS]);
    put(&mut guest, REQUESTS, &[0, 0x10, REQUEST]);
    put(&mut guest, BUFFER, &[0; 8]);
    let known = [(QUEUE, 64), (CONTROLLER, 128), (TAGS, 96), (BUFFER, 0x4000)];
    (guest, Known(known.into()))
}

/// Whether a call of `function` reaches the requests.
fn reaches(types: &Btf, (guest, known): &(TestGuest, Known), function: &str) -> bool {
    let function = types.find_function(function).unwrap();
    let found = reach(types, guest, known).objects(&function, &[7, QUEUE], &[]);
    assert!(found.objects.len() < 8, "{:?}", found.objects);
    let requests = GvaRange::new(Gva(BUFFER), 0x4000);
    let mut objects = found.objects.iter();
    objects.any(|object| Some(object.range) == requests)
}

/// `nvme_irq`, `nvme_find_rq`.
#[test]
fn requests_that_an_interrupt_finds_by_number_are_the_drivers() {
    let guest = guest_with_requests();
    assert!(reaches(&types_with("nvme_queue"), &guest, "my_irq"));
    // Only handlers of interrupts are given it, and not in every module.
    assert!(!reaches(&types_with("nvme_queue"), &guest, "my_work"));
    assert!(!reaches(&types_with("my_queue"), &guest, "my_irq"));
}

#[test]
fn of_a_set_that_is_damaged_nothing_is_reached_that_is_no_page_of_requests() {
    let types = types_with("nvme_queue");
    let whole = guest_with_requests();
    let damaged = |at: u64, word: u64| {
        let mut guest = whole.0.clone();
        put(&mut guest, at, &[word]);
        reaches(&types, &(guest, Known(whole.1.0.clone())), "my_irq")
    };
    assert!(damaged(TAGS + 8, 1), "what is beside it does not matter");
    assert!(damaged(REQUESTS, u64::MAX));
    for (at, word) in [
        (CONTROLLER + SET + 8, 0),
        (CONTROLLER + SET + 16, 0x10),
        (POINTERS + 8, 0),
        (POINTERS + 8, 0x10),
        (TAGS, 2),
        (TAGS + RQS, 0x10),
        (REQUESTS + 16, QUEUE),
        (REQUESTS + 16, u64::MAX),
    ] {
        assert!(!damaged(at, word), "{at:x} {word:x}");
    }
    // What is there is no page any more.
    let mut known = Known(whole.1.0.clone());
    known.0.remove(&BUFFER);
    assert!(!reaches(&types, &(whole.0.clone(), known), "my_irq"));
}
