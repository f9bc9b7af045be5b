//! Chains of requests.

use super::*;

/// `null_queue_rqs` of Linux 6.12: a file that is read by 32 requests of 1 MiB each.
#[test]
fn a_chain_of_large_requests_hides_neither_its_last_one_nor_the_drivers_own_data() {
    const REQUESTS: u64 = 32;
    // Every other quarter of a page, so that none follows another.
    const PIECES_OF_EACH: u64 = 250;
    let (chain, bios, pieces) = (AT + 0x1_0000, AT + 0x1_1000, AT + 0x2_0000);
    let mut guest = guest(0);
    let mut put = |at: u64, words: &[u64]| {
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.put(Gva(at), &words, DATA);
    };
    put(AT + 0x1_2000, &[chain]);
    for number in 0..REQUESTS {
        let (request, bio) = (chain + number * 32, bios + number * 64);
        let next = match number + 1 {
            REQUESTS => 0,
            next => chain + next * 32,
        };
        put(request, &[bio, QUEUE, next, 0]);
        let array = pieces + number * 0x1000;
        put(bio, &[0, BDEV, PIECES_OF_EACH << 32, array, 0, 0, 0, 0]);
        for piece in 0..PIECES_OF_EACH {
            let offset = (number * PIECES_OF_EACH + piece) * 2048;
            let described = [DESCRIPTION, 512 | offset << 32];
            put(array + piece * 16, &described);
        }
    }
    for page in 0..REQUESTS * PIECES_OF_EACH / 2 {
        guest.put(Gva(PAGE + page * 4096), &[0; 1], DATA);
    }
    let found = call(&guest, "my_complete_all", AT + 0x1_2000);
    let last = REQUESTS * PIECES_OF_EACH - 1;
    assert!(found.contains(&(PAGE + last * 2048, 512)));
    assert!(found.contains(&(chain + (REQUESTS - 1) * 32, 32)));
    assert!(found.contains(&(MINE, 96)), "the driver's own");
    // One behind the other they are one object.
    let described = |offset: u64| {
        [DESCRIPTION, 512 | offset << 32]
            .map(u64::to_le_bytes)
            .concat()
    };
    for piece in 0..PIECES_OF_EACH {
        let at = pieces + piece * 16;
        guest.put(Gva(at), &described(piece * 512), DATA);
    }
    let found = call(&guest, "my_complete", chain);
    assert!(found.contains(&(PAGE, PIECES_OF_EACH * 512)));
}
