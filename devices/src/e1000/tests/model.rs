//! The rings against a model that is nothing but queues: what was sent arrives at the far end, what
//! was delivered arrives in memory, each once, whole and in order, over any number of turns of the
//! rings and any back-pressure.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::driver::*;
use crate::e1000::regs::*;

#[derive(Debug, Clone)]
enum Step {
    /// The driver sends a frame in pieces of this size.
    Send { bytes: usize, piece: usize },
    /// A frame is put on the wire.
    Deliver { bytes: usize },
    /// The driver takes up to so many packets from the ring.
    Receive { packets: usize },
    /// The wire takes so many frames more.
    Room { frames: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (14usize..3000, 1usize..1500).prop_map(|(bytes, piece)| Step::Send { bytes, piece }),
        (14usize..9000).prop_map(|bytes| Step::Deliver { bytes }),
        (0usize..6).prop_map(|packets| Step::Receive { packets }),
        (0usize..4).prop_map(|frames| Step::Room { frames }),
    ]
}

fn numbered(number: u32, bytes: usize) -> Vec<u8> {
    let mut frame = broadcast(bytes);
    let number = number.to_be_bytes();
    let body = bytes.min(18) - 14;
    frame[14..14 + body].copy_from_slice(&number[..body]);
    frame
}

fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    frame.resize(frame.len().max(60), 0);
    frame
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn rings_are_queues(
        rx_count in 1u32..4, tx_count in 1u32..4,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut driver = Driver::with_rings(rx_count * 8, tx_count * 8);
        driver.bench.write(RCTL, rctl::EN | rctl::BAM | rctl::LPE | rctl::SECRC);
        let mut on_the_way = VecDeque::new();
        let mut delivered = VecDeque::new();
        let mut used = 0u32;
        let mut ends = Vec::new();
        driver.bench.far_end().room = Some(2);
        for (number, step) in (0..).zip(steps) {
            match step {
                Step::Send { bytes, piece } => {
                    let head = driver.bench.read(TDH);
                    let pieces = bytes.div_ceil(piece) as u32;
                    let free = driver.tx_count - 1 - (used + driver.tx_count - head) % driver.tx_count;
                    if pieces > free {
                        continue;
                    }
                    let frame = numbered(number, bytes);
                    let start = TX_BUFFERS + u64::from(used) * 0x8000;
                    for (i, part) in frame.chunks(piece).enumerate() {
                        let end = if i as u32 + 1 == pieces { EOP | RS } else { 0 };
                        driver.queue_data(start + (i * piece) as u64, part, end, 0);
                    }
                    ends.push((used + pieces - 1) % driver.tx_count);
                    used = (used + pieces) % driver.tx_count;
                    driver.ring();
                    on_the_way.push_back(padded(frame));
                }
                Step::Deliver { bytes } => {
                    let frame = numbered(number, bytes);
                    driver.bench.deliver(&frame);
                    // A frame that needs the whole ring or more can never be stored.
                    if frame.len().div_ceil(2048) < driver.rx_count as usize {
                        delivered.push_back(padded(frame));
                    }
                }
                Step::Receive { packets } => {
                    for _ in 0..packets {
                        let Some(received) = driver.receive() else { break };
                        let expected = delivered.pop_front();
                        prop_assert_eq!(Some(received.data), expected);
                        prop_assert_eq!(received.errors, 0);
                    }
                }
                Step::Room { frames } => {
                    driver.bench.far_end().room = Some(frames);
                    driver.bench.serve();
                }
            }
            for frame in driver.sent() {
                prop_assert_eq!(Some(frame), on_the_way.pop_front());
            }
        }
        driver.bench.far_end().room = None;
        driver.bench.serve();
        for frame in driver.sent() {
            prop_assert_eq!(Some(frame), on_the_way.pop_front());
        }
        while let Some(received) = driver.receive() {
            prop_assert_eq!(Some(received.data), delivered.pop_front());
        }
        prop_assert!(on_the_way.is_empty() && delivered.is_empty());
        prop_assert_eq!(driver.bench.read(TDH), used);
        for end in ends.into_iter().rev().take(1) {
            prop_assert_eq!(driver.tx_status(end), 1);
        }
    }
}
