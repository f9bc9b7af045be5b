//! The agent's channel from both ends: a driver and a client of the socket.

use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::pci::PciFunction;
use crate::virtio::testing::{Driver, EVENT_IDX};

const NAME: &str = "org.cofferdam.agent.0";

/// A console that nobody can reach.
pub(crate) fn console() -> Console {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("agent.sock")).unwrap();
    Console::new(NAME, listener).unwrap()
}

struct Channel {
    driver: Driver<Console>,
    directory: TempDir,
    /// Control messages that the driver has dealt with, and a test has not looked at.
    messages: Vec<(u16, u16)>,
}

impl Channel {
    /// A console with a driver that has seen nothing of the port yet.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("agent.sock")).unwrap();
        let mut driver = Driver::new(Console::new(NAME, listener).unwrap());
        driver.enable_msix();
        driver.start(F_MULTIPORT | EVENT_IDX);
        Self {
            driver,
            directory,
            messages: Vec::new(),
        }
    }

    /// As Linux does: hears of the port, learns its name and opens it.
    fn opened() -> Self {
        let mut channel = Self::new();
        channel.offer_control(8);
        channel.say(DEVICE_READY, 1);
        channel.say(PORT_READY, 1);
        channel.say(PORT_OPEN, 1);
        assert_eq!(channel.heard(), [(PORT_ADD, 1), (PORT_NAME, 1)]);
        channel
    }

    fn offer_control(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.driver.post(2, &[], &[64]);
            if self.driver.wants_kick(2) {
                self.driver.kick(2);
            }
        }
    }

    fn say(&mut self, event: u16, value: u16) {
        let message = [
            &1u32.to_le_bytes()[..],
            &event.to_le_bytes(),
            &value.to_le_bytes(),
        ];
        self.driver.post(3, &[&message.concat()], &[]);
        self.driver.kick(3);
        assert_eq!(self.driver.used(3).len(), 1);
    }

    fn heard(&mut self) -> Vec<(u16, u16)> {
        self.deal_with_control();
        std::mem::take(&mut self.messages)
    }

    /// As Linux does: looks at each control message and puts its buffer back, which may bring the
    /// next.
    fn deal_with_control(&mut self) {
        loop {
            let used = self.driver.used(2);
            if used.is_empty() {
                return;
            }
            self.messages.extend(used.iter().map(|used| {
                let data = &used.data;
                assert_eq!(data[..4], 1u32.to_le_bytes());
                let event = u16::from_le_bytes([data[4], data[5]]);
                if event == PORT_NAME {
                    assert_eq!(&data[8..], NAME.as_bytes());
                } else {
                    assert_eq!(data.len(), 8);
                }
                (event, u16::from_le_bytes([data[6], data[7]]))
            }));
            self.offer_control(used.len());
        }
    }

    fn connect(&mut self) -> UnixStream {
        let client = UnixStream::connect(self.directory.path().join("agent.sock")).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        self.driver.run_events();
        client
    }

    fn write_to_host(&mut self, data: &[u8]) {
        self.driver.post(5, &[data], &[]);
        self.driver.kick(5);
    }

    fn received_by_guest(&mut self) -> Vec<u8> {
        self.deal_with_control();
        self.driver
            .used(4)
            .into_iter()
            .flat_map(|used| used.data)
            .collect()
    }
}

fn is_closed(mut client: &UnixStream) -> bool {
    client.set_nonblocking(true).unwrap();
    let mut byte = [0];
    let closed = matches!(client.read(&mut byte), Ok(0))
        || client
            .write(&byte)
            .is_err_and(|error| error.kind() == ErrorKind::BrokenPipe);
    client.set_nonblocking(false).unwrap();
    closed
}

#[test]
fn the_port_is_announced_by_name_and_opens_when_a_client_comes() {
    let mut channel = Channel::opened();
    let client = channel.connect();
    assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
    drop(client);
    channel.driver.run_events();
    assert_eq!(channel.heard(), [(PORT_OPEN, 0)]);
    let _client = channel.connect();
    assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
}

#[test]
fn a_driver_that_was_suspended_says_that_it_has_the_port_and_hears_of_the_next_client() {
    for is_connected in [false, true] {
        let mut channel = Channel::opened();
        let before = is_connected.then(|| channel.connect());
        if before.is_some() {
            assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
        }
        // As Linux does: resets the device, and later begins anew without a word of being ready.
        channel.driver.write(0x14, 1, 0);
        channel.driver.run_events();
        assert!(before.as_ref().is_none_or(is_closed), "its session is over");
        channel.driver.enable_msix();
        channel.driver.start(F_MULTIPORT | EVENT_IDX);
        channel.offer_control(8);
        channel.say(PORT_READY, 1);
        channel.say(PORT_OPEN, 1);
        // The name may come again (virtio_console.c, `handle_control_message`).
        assert_eq!(channel.heard(), [(PORT_NAME, 1)]);
        let mut client = channel.connect();
        assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
        client.write_all(b"question").unwrap();
        channel.driver.post(4, &[], &[100]);
        channel.driver.kick(4);
        channel.driver.run_events();
        assert_eq!(channel.received_by_guest(), b"question");
        channel.write_to_host(b"answer");
        let mut answer = [0; 6];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
    }
}

#[test]
fn bytes_go_both_ways_in_order() {
    let mut channel = Channel::opened();
    let mut client = channel.connect();
    client.write_all(b"question").unwrap();
    channel.driver.run_events();
    assert_eq!(
        channel.received_by_guest(),
        b"",
        "there was no buffer for it"
    );
    channel.driver.post(4, &[], &[3]);
    channel.driver.post(4, &[], &[100]);
    channel.driver.kick(4);
    assert_eq!(channel.received_by_guest(), b"question");
    channel.write_to_host(b"ans");
    channel.write_to_host(b"wer");
    assert_eq!(channel.driver.used(5).len(), 2);
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

#[test]
fn a_client_that_came_before_the_guest_is_served_once_the_port_is_open() {
    let mut channel = Channel::new();
    let mut client = channel.connect();
    client.write_all(b"early").unwrap();
    channel.driver.run_events();
    channel.driver.post(4, &[], &[100]);
    channel.driver.kick(4);
    channel.offer_control(4);
    channel.say(DEVICE_READY, 1);
    channel.say(PORT_READY, 1);
    assert_eq!(
        channel.heard(),
        [(PORT_ADD, 1), (PORT_NAME, 1), (PORT_OPEN, 1)]
    );
    assert_eq!(channel.received_by_guest(), b"");
    channel.say(PORT_OPEN, 1);
    assert_eq!(channel.received_by_guest(), b"early");
}

#[test]
fn a_second_client_waits_for_the_first_to_go() {
    let mut channel = Channel::opened();
    let first = channel.connect();
    let mut second = channel.connect();
    second.write_all(b"second").unwrap();
    channel.driver.post(4, &[], &[100]);
    channel.driver.kick(4);
    channel.driver.run_events();
    assert_eq!(channel.received_by_guest(), b"");
    assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
    drop(first);
    channel.driver.run_events();
    assert_eq!(channel.heard(), [(PORT_OPEN, 0), (PORT_OPEN, 1)]);
    assert_eq!(channel.received_by_guest(), b"second");
}

#[test]
fn a_request_of_a_client_that_left_at_once_still_arrives() {
    let mut channel = Channel::opened();
    channel.driver.post(4, &[], &[100]);
    let mut client = channel.connect();
    client.write_all(b"fire and forget").unwrap();
    drop(client);
    channel.driver.run_events();
    assert_eq!(channel.received_by_guest(), b"fire and forget");
    channel.driver.run_events();
    assert_eq!(channel.heard(), [(PORT_OPEN, 1), (PORT_OPEN, 0)]);
}

#[test]
fn a_client_that_left_before_the_driver_had_heard_of_it_makes_room() {
    let mut channel = Channel::opened();
    drop(channel.connect());
    channel.driver.run_events();
    // The next waits in line, and nothing comes from it that anybody could hear.
    let mut second = channel.connect();
    second.write_all(b"hello").unwrap();
    channel.driver.run_events();
    assert_eq!(channel.heard(), [(PORT_OPEN, 1), (PORT_OPEN, 0)]);
    channel.driver.run_events();
    channel.driver.post(4, &[], &[16]);
    channel.driver.kick(4);
    assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
    assert_eq!(channel.received_by_guest(), b"hello");
}

#[test]
fn what_the_guest_writes_without_a_client_is_lost() {
    let mut channel = Channel::opened();
    channel.write_to_host(b"for nobody");
    assert_eq!(channel.driver.used(5).len(), 1);
    let mut client = channel.connect();
    channel.write_to_host(b"for you");
    let mut answer = [0; 7];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"for you");
}

#[test]
fn what_a_client_says_does_not_overtake_the_end_of_the_session_before() {
    let mut channel = Channel::opened();
    drop(channel.connect());
    channel.heard();
    channel.driver.run_events();
    channel.heard();
    let mut second = channel.connect();
    second.write_all(b"early").unwrap();
    channel.driver.run_events();
    channel.driver.post(4, &[], &[16]);
    channel.driver.kick(4);
    // The driver was told that there is a client, and has not looked yet.
    assert!(channel.driver.used(4).is_empty());
    assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
    assert_eq!(channel.received_by_guest(), b"early");
}

#[test]
fn answers_to_a_client_that_left_do_not_reach_the_next() {
    let mut channel = Channel::new();
    channel.offer_control(3);
    channel.say(DEVICE_READY, 1);
    channel.say(PORT_READY, 1);
    channel.say(PORT_OPEN, 1);
    let first = channel.connect();
    // It puts no buffer back.
    assert_eq!(channel.driver.used(2).len(), 3);
    drop(first);
    channel.driver.run_events();
    let mut second = channel.connect();
    // The driver had no room to be told of the change: it answers the first client.
    channel.write_to_host(b"old");
    channel.offer_control(3);
    channel.driver.run_events();
    assert_eq!(channel.heard(), [(PORT_OPEN, 0), (PORT_OPEN, 1)]);
    channel.write_to_host(b"new");
    let mut answer = [0; 3];
    second.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"new");
}

#[test]
fn a_slow_client_holds_the_guest_back_and_loses_nothing() {
    let mut channel = Channel::opened();
    let mut client = channel.connect();
    let block = vec![7; 100_000];
    let mut posted = 0;
    while posted < 12 {
        channel.write_to_host(&block);
        posted += 1;
    }
    let mut finished = channel.driver.used(5).len();
    assert!(finished < posted, "the socket was meant to fill up");
    let mut left = posted * block.len();
    let mut buffer = vec![0; 50_000];
    while left > 0 {
        let length = client.read(&mut buffer).unwrap();
        assert!(buffer[..length].iter().all(|byte| *byte == 7));
        left -= length;
        channel.driver.run_events();
        finished += channel.driver.used(5).len();
    }
    assert_eq!(finished, posted);
}

#[test]
fn a_guest_that_closes_the_port_or_resets_sends_the_client_away() {
    let mut channel = Channel::opened();
    let client = channel.connect();
    assert!(!is_closed(&client));
    channel.say(PORT_OPEN, 0);
    channel.driver.run_events();
    assert!(is_closed(&client));
    let client = channel.connect();
    assert!(!is_closed(&client));
    channel.driver.start(F_MULTIPORT);
    channel.driver.run_events();
    assert!(is_closed(&client));
    let _client = channel.connect();
    channel.offer_control(4);
    channel.say(DEVICE_READY, 1);
    channel.say(PORT_READY, 1);
    assert_eq!(
        channel.heard(),
        [(PORT_ADD, 1), (PORT_NAME, 1), (PORT_OPEN, 1)]
    );
}

#[test]
fn a_client_that_leaves_before_the_guest_is_there_makes_room() {
    let mut channel = Channel::new();
    let first = channel.connect();
    drop(first);
    channel.driver.run_events();
    let _second = channel.connect();
    channel.offer_control(4);
    channel.say(DEVICE_READY, 1);
    channel.say(PORT_READY, 1);
    assert_eq!(
        channel.heard(),
        [(PORT_ADD, 1), (PORT_NAME, 1), (PORT_OPEN, 1)]
    );
}

#[test]
fn hostile_control_messages_and_writes_do_no_harm() {
    let mut channel = Channel::opened();
    let _client = channel.connect();
    for message in [&b""[..], b"\x01", &[0xff; 8], &[0xff; 200]] {
        channel.driver.post(3, &[message], &[]);
    }
    channel.driver.post(3, &[], &[4]);
    channel.driver.kick(3);
    assert_eq!(channel.driver.used(3).len(), 5);
    for queue in [0, 1] {
        channel.driver.post(queue, &[b"x"], &[8]);
        channel.driver.kick(queue);
    }
    // A buffer for control messages that has no room for one, and one for input with none.
    channel.driver.post(4, &[], &[0]);
    channel.driver.kick(4);
    assert_eq!(channel.driver.status(), 15);
    channel.driver.descriptor(5, 0, (0, 2 << 20), 0, 0);
    channel.driver.offer(5, 0);
    channel.driver.kick(5);
    assert_eq!(channel.driver.status() & 64, 64, "a write of 2 MiB");
}

#[test]
fn configuration_tells_how_many_ports_there_can_be() {
    let channel = Channel::new();
    assert_eq!(channel.driver.read(0x2004, 4), 2);
    assert_eq!(channel.driver.read(0x2ffc, 4), 0);
}

#[test]
fn a_restored_console_has_the_guest_see_the_old_session_end_and_serves_the_next() {
    let mut channel = Channel::opened();
    let mut client = channel.connect();
    assert_eq!(channel.heard(), [(PORT_OPEN, 1)]);
    client.write_all(b"half a req").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("agent.sock")).unwrap();
    let driver = channel.driver.twin(Console::new(NAME, listener).unwrap());
    let mut twin = Channel {
        driver,
        directory,
        messages: Vec::new(),
    };
    twin.driver.run_events();
    assert_eq!(twin.heard(), [(PORT_OPEN, 0)]);
    let mut next = twin.connect();
    assert_eq!(twin.heard(), [(PORT_OPEN, 1)]);
    twin.driver.post(4, &[], &[64]);
    twin.driver.kick(4);
    next.write_all(b"request").unwrap();
    twin.driver.run_events();
    assert_eq!(twin.received_by_guest(), b"request");
    twin.write_to_host(b"answer");
    let mut answer = [0; 6];
    next.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    // A client of the machine that is put back learns at once that it is cut off.
    let state = twin.driver.function().save().unwrap();
    twin.driver.function().restore(&state).unwrap();
    assert!(is_closed(&next));
}
