//! Frames on the byte stream, and how to find their beginning again.
//!
//! A frame is a length (`u32`, little endian, at most [`MAX_FRAME`]) and that many bytes of JSON.
//!
//! A stream outlives its users: a client dies in the middle of a frame, a guest reboots while the
//! host goes on. So there is a mark which says "a frame begins here, forget what was before": four
//! or more bytes `0xFF`, closed by a byte `0x00`. It cannot occur inside a frame: a length has at
//! most three such bytes, and JSON text is UTF-8, which has none.
//!
//! ```text
//!            length complete                       FF FF FF FF anywhere
//!  Header ──────────────────► Payload          any ──────────────────► Mark ── 00 ──► Header
//!     ▲  └─ too long ─► Lost     │              Lost: drop bytes until a mark
//!     └───── payload complete ───┘
//! ```

use std::io::{self, Write};

/// Largest payload of a frame in bytes. A larger result is sent in parts.
pub const MAX_FRAME: usize = 16 << 20;

/// What [`send_mark`] writes.
pub const MARK: [u8; 9] = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x00];

/// This many `0xFF` in a row are a mark.
const MARK_RUN: u32 = 4;

/// What the decoder found in the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// A whole payload.
    Frame(Vec<u8>),
    /// The other side began anew: nothing sent before has to do with what follows.
    Mark,
    /// A length over [`MAX_FRAME`]. Everything is dropped until the next mark.
    TooLong(u32),
}

enum State {
    Header { bytes: [u8; 4], filled: usize },
    Payload { wanted: usize, bytes: Vec<u8> },
    Mark,
    Lost,
}

const EMPTY_HEADER: State = State::Header {
    bytes: [0; 4],
    filled: 0,
};

/// Takes the stream's bytes as they come and gives frames.
///
/// It holds at most one frame: memory grows with the bytes that really arrived, not with the length
/// that was announced.
pub struct Decoder {
    state: State,
    /// `0xFF` in a row at the end of what was seen.
    run: u32,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            state: EMPTY_HEADER,
            run: 0,
        }
    }
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` until an item is complete or the input used up.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Item> {
        while let Some((&byte, rest)) = input.split_first() {
            // The body of a payload is copied in one piece up to the next 0xFF.
            if self.run == 0
                && let State::Payload { wanted, bytes } = &mut self.state
            {
                let room = (*wanted - bytes.len()).min(input.len());
                let plain = input[..room]
                    .iter()
                    .position(|&b| b == 0xFF)
                    .unwrap_or(room);
                if plain > 0 {
                    bytes.extend_from_slice(&input[..plain]);
                    *input = &input[plain..];
                    if let Some(item) = self.finish_payload() {
                        return Some(item);
                    }
                    continue;
                }
            }
            *input = rest;
            if let Some(item) = self.byte(byte) {
                return Some(item);
            }
        }
        None
    }

    fn byte(&mut self, byte: u8) -> Option<Item> {
        if byte == 0xFF {
            self.run = self.run.saturating_add(1);
            if self.run >= MARK_RUN {
                self.state = State::Mark;
                return None;
            }
        } else {
            self.run = 0;
        }
        match &mut self.state {
            State::Header { bytes, filled } => {
                bytes[*filled] = byte;
                *filled += 1;
                if *filled < bytes.len() {
                    return None;
                }
                let length = u32::from_le_bytes(*bytes);
                if length as usize > MAX_FRAME {
                    self.state = State::Lost;
                    return Some(Item::TooLong(length));
                }
                self.state = State::Payload {
                    wanted: length as usize,
                    bytes: Vec::new(),
                };
                self.finish_payload()
            }
            State::Payload { bytes, .. } => {
                bytes.push(byte);
                self.finish_payload()
            }
            State::Mark => {
                if byte != 0 {
                    self.state = State::Lost;
                    return None;
                }
                self.state = EMPTY_HEADER;
                Some(Item::Mark)
            }
            State::Lost => None,
        }
    }

    fn finish_payload(&mut self) -> Option<Item> {
        let State::Payload { wanted, bytes } = &mut self.state else {
            return None;
        };
        if bytes.len() < *wanted {
            return None;
        }
        let payload = std::mem::take(bytes);
        self.state = EMPTY_HEADER;
        self.run = 0;
        Some(Item::Frame(payload))
    }
}

/// Puts a length before `payload`.
///
/// # Errors
/// `InvalidInput` when it is longer than [`MAX_FRAME`].
pub fn encode(payload: &[u8]) -> io::Result<Vec<u8>> {
    if payload.len() > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "a message of {} bytes is over the limit of {MAX_FRAME}: send it in parts",
                payload.len()
            ),
        ));
    }
    let mut frame = Vec::with_capacity(payload.len() + 4);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Writes one frame.
///
/// # Errors
/// As [`encode`], or what the stream reports.
pub fn send(stream: &mut impl Write, payload: &[u8]) -> io::Result<()> {
    stream.write_all(&encode(payload)?)?;
    stream.flush()
}

/// Writes a mark: the next byte begins a frame.
///
/// # Errors
/// What the stream reports.
pub fn send_mark(stream: &mut impl Write) -> io::Result<()> {
    stream.write_all(&MARK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn items(decoder: &mut Decoder, mut input: &[u8]) -> Vec<Item> {
        let mut found = Vec::new();
        while let Some(item) = decoder.next(&mut input) {
            found.push(item);
        }
        found
    }

    #[test]
    fn announced_length_reserves_no_memory() {
        let mut decoder = Decoder::new();
        assert_eq!(items(&mut decoder, &(MAX_FRAME as u32).to_le_bytes()), []);
        let State::Payload { bytes, .. } = &decoder.state else {
            panic!("not in a payload")
        };
        assert_eq!(bytes.capacity(), 0);
    }

    #[test]
    fn length_over_the_limit_is_reported_and_the_next_mark_recovers() {
        let mut decoder = Decoder::new();
        let mut stream = (MAX_FRAME as u32 + 1).to_le_bytes().to_vec();
        stream.extend_from_slice(b"rubbish that is not a frame");
        stream.extend_from_slice(&MARK);
        stream.extend_from_slice(&encode(b"{}").unwrap());
        assert_eq!(
            items(&mut decoder, &stream),
            [
                Item::TooLong(MAX_FRAME as u32 + 1),
                Item::Mark,
                Item::Frame(b"{}".to_vec())
            ]
        );
    }

    #[test]
    fn empty_frame_is_a_frame() {
        assert_eq!(items(&mut Decoder::new(), &[0; 4]), [Item::Frame(vec![])]);
    }

    #[test]
    fn longest_frame_passes_and_one_byte_more_is_refused() {
        let payload = vec![b' '; MAX_FRAME];
        let frame = encode(&payload).unwrap();
        assert_eq!(items(&mut Decoder::new(), &frame), [Item::Frame(payload)]);
        assert!(encode(&vec![b' '; MAX_FRAME + 1]).is_err());
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(payloads in prop::collection::vec(".{0,300}", 0..8), cut in 1usize..40) {
            let mut stream = Vec::new();
            for payload in &payloads {
                stream.extend(encode(payload.as_bytes()).unwrap());
            }
            let mut decoder = Decoder::new();
            let found: Vec<Item> = stream.chunks(cut).flat_map(|c| items(&mut decoder, c)).collect();
            let wanted: Vec<Item> = payloads.into_iter().map(|p| Item::Frame(p.into_bytes())).collect();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn mark_recovers_after_any_bytes(
            rubbish in prop::collection::vec(any::<u8>(), 0..400),
            payload in ".{0,100}",
            cut in 1usize..40,
        ) {
            let mut stream = rubbish;
            stream.extend_from_slice(&MARK);
            stream.extend(encode(payload.as_bytes()).unwrap());
            let mut decoder = Decoder::new();
            let found: Vec<Item> = stream.chunks(cut).flat_map(|c| items(&mut decoder, c)).collect();
            prop_assert!(found.len() >= 2);
            prop_assert_eq!(&found[found.len() - 2], &Item::Mark);
            prop_assert_eq!(&found[found.len() - 1], &Item::Frame(payload.into_bytes()));
        }

        #[test]
        fn same_items_however_the_stream_is_cut(
            stream in prop::collection::vec(prop_oneof![Just(0xFFu8), Just(0u8), Just(2u8), any::<u8>()], 0..600),
            cut in 1usize..40,
        ) {
            let whole = items(&mut Decoder::new(), &stream);
            let mut decoder = Decoder::new();
            let parts: Vec<Item> = stream.chunks(cut).flat_map(|c| items(&mut decoder, c)).collect();
            prop_assert_eq!(whole, parts);
        }
    }
}
