//! Whatever a guest's agent, or who asks it, sends: frames are found in it however it is cut into
//! pieces, the same ones each time, and each is a message or an error. The first byte says how it
//! is cut.

use agent_protocol::frame::{Decoder, Item, MAX_FRAME};
use agent_protocol::{Request, Response};

/// One input.
pub fn run(input: &[u8]) {
    let Some((cut, stream)) = input.split_first() else {
        return;
    };
    let whole = items([stream].into_iter());
    let pieces = items(stream.chunks(usize::from(*cut).max(1)));
    assert_eq!(whole, pieces, "what is found depends on how it came");
    for item in whole {
        match item {
            Item::Frame(frame) => {
                assert!(frame.len() <= stream.len());
                let _ = serde_json::from_slice::<Request>(&frame);
                let _ = serde_json::from_slice::<Response>(&frame);
            }
            Item::TooLong(length) => assert!(length as usize > MAX_FRAME),
            Item::Mark => {}
        }
    }
}

fn items<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Item> {
    let mut decoder = Decoder::new();
    let mut items = Vec::new();
    for mut piece in pieces {
        while !piece.is_empty() {
            items.extend(decoder.next(&mut piece));
        }
    }
    items
}
