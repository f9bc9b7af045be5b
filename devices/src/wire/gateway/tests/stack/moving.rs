//! Connections that go on with another gateway, which has what the first one was saved as.

use proptest::prelude::*;

use super::*;
use crate::state::tests::{Random, stored};
use crate::wire::gateway::connections::{ConnectionState, Phase};
use crate::wire::gateway::handshakes::{Handshake, Tuple};
use crate::wire::gateway::services::ServiceState;

impl Guest {
    /// Has another gateway, or this one, go on from what the gateway is now.
    fn move_on(&mut self, config: &GatewayConfig, to_another: bool) {
        let state = self.port.gateway.save().unwrap();
        let state = state.as_ref().map(stored);
        if to_another {
            let gateway = Gateway::new(config).unwrap();
            self.events = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
            self.events
                .add_subscriber(Arc::new(Mutex::new(gateway.timer())));
            self.port.gateway = gateway;
        }
        self.port.gateway.restore(&state).unwrap();
    }
}

/// What is sent as byte `n`.
fn byte(n: usize) -> u8 {
    (n ^ (n >> 8) ^ (n >> 16)) as u8
}

/// Sends `total` bytes to `port` and returns what comes back, while the gateway moves on now and
/// then.
fn exchange_moving(
    config: &GatewayConfig,
    port: u16,
    total: usize,
    random: &mut Random,
) -> Vec<u8> {
    let sent: Vec<u8> = (0..total).map(byte).collect();
    let mut guest = Guest::new(config);
    let handle = guest.connect(port);
    let (mut offset, mut back, mut closed, mut moves) = (0, Vec::new(), false, 0);
    let often = 1 + random.below(12);
    loop {
        guest.step();
        if random.below(often) == 0 {
            guest.move_on(config, random.below(4) != 0);
            moves += 1;
        }
        let piece = 1 + random.below(100_000) as usize;
        let socket = guest.socket(handle);
        if socket.can_send() && offset < total {
            let end = total.min(offset + piece);
            offset += socket.send_slice(&sent[offset..end]).unwrap();
        }
        if offset == total && !closed && socket.may_send() {
            socket.close();
            closed = true;
        }
        // A reader that is slow at times: windows close.
        while socket.can_recv() && random.below(3) != 0 {
            let most = 1 + random.below(20_000) as usize;
            socket
                .recv(|data| {
                    let taken = data.len().min(most);
                    back.extend_from_slice(&data[..taken]);
                    (taken, ())
                })
                .unwrap();
        }
        if closed && !socket.may_recv() {
            assert!(moves > 0 || total < 2000, "the gateway moved");
            return back;
        }
        let open = socket.state() != tcp::State::Closed;
        assert!(
            open || closed,
            "the connection is reset at {offset} of {total}"
        );
    }
}

#[test]
fn an_echo_goes_on_whenever_the_gateway_moves() {
    for seed in 1..=12u64 {
        let mut random = Random(seed << 32);
        let config = GatewayConfig {
            queue_frames: 8 << (seed % 4),
            ..GatewayConfig::default()
        };
        let total = 1 + random.below(1 << 20) as usize;
        let back = exchange_moving(&config, 7, total, &mut random);
        assert_eq!(back.len(), total, "seed {seed}");
        let wrong = back.iter().enumerate().find(|(n, b)| **b != byte(*n));
        assert_eq!(wrong, None, "seed {seed}");
    }
}

#[test]
fn a_checksum_is_right_whenever_the_gateway_moves() {
    let still = {
        let mut guest = Guest::new(&GatewayConfig::default());
        exchange(&mut guest, 9, 300_000)
    };
    for seed in 1..=6u64 {
        let mut random = Random(seed << 32);
        let answer = exchange_moving(&GatewayConfig::default(), 9, 300_000, &mut random);
        assert_eq!(answer, still, "seed {seed}");
    }
}

#[test]
fn a_source_goes_on_where_it_was_and_others_may_connect() {
    let config = GatewayConfig::default();
    let mut random = Random(7 << 32);
    let mut guest = Guest::new(&config);
    let handle = guest.connect(19);
    let mut back = Vec::new();
    while back.len() < 1 << 19 {
        guest.step();
        if random.below(8) == 0 {
            guest.move_on(&config, true);
        }
        let socket = guest.socket(handle);
        while socket.can_recv() {
            socket
                .recv(|data| (data.len(), back.extend_from_slice(data)))
                .unwrap();
        }
    }
    for (number, line) in back.chunks_exact(SOURCE_LINE_BYTES).enumerate() {
        assert_eq!(line, source_line(number as u64));
    }
    guest.socket(handle).abort();
    guest.step();
    assert_eq!(exchange(&mut guest, 7, 1000).len(), 1000);
}

/// Has the gateway echo `bytes` over a connection that is open, or opens.
fn echo(guest: &mut Guest, handle: SocketHandle, bytes: &[u8]) {
    let (mut sent, mut back) = (0, Vec::new());
    while back.len() < bytes.len() {
        guest.step();
        let socket = guest.socket(handle);
        assert_ne!(socket.state(), tcp::State::Closed);
        if socket.can_send() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        }
        while socket.can_recv() {
            socket
                .recv(|data| (data.len(), back.extend_from_slice(data)))
                .unwrap();
        }
    }
    assert!(back == bytes);
}

#[test]
fn a_connection_goes_on_when_what_is_counted_of_it_begins_anew() {
    let config = GatewayConfig::default();
    let mut guest = Guest::new(&config);
    let handle = guest.connect(7);
    echo(&mut guest, handle, b"first");
    {
        let now = smoltcp_now(monotonic_ns());
        let mut state = guest.port.gateway.shared.lock();
        let State {
            networks, outbox, ..
        } = &mut *state;
        // As if it had begun so long ago.
        let mut connections = networks[0].connections();
        for (_, state) in &mut connections {
            let ahead = |count: &mut u64, sequence: &mut u32| {
                let by = (u64::MAX - 1000).wrapping_sub(*count);
                *count = count.wrapping_add(by);
                *sequence = sequence.wrapping_sub(by as u32);
            };
            ahead(&mut state.taken_bytes, &mut state.handshake.guest_sequence);
            ahead(&mut state.written_bytes, &mut state.handshake.own_sequence);
        }
        let mut anew = networks[0].anew(&config, now);
        anew.set_hosts(&networks[0].hosts(), now);
        assert!(anew.go_on_with(&connections, outbox, now));
        assert_eq!(anew.connections().len(), 1);
        networks[0] = anew;
    }
    let bytes: Vec<u8> = (0..5000).map(byte).collect();
    echo(&mut guest, handle, &bytes);
    guest.move_on(&config, true);
    echo(&mut guest, handle, &bytes);
}

#[test]
fn a_probe_goes_on_and_no_number_comes_twice() {
    let config = GatewayConfig::default();
    let mut guest = Guest::new(&config);
    guest
        .port
        .gateway
        .control()
        .start_probe(Duration::from_millis(1));
    let replies = |guest: &Guest| {
        let events = guest.port.gateway.control().log().events_since(0);
        let sequences = events.into_iter().filter_map(|event| match event.kind {
            GatewayEventKind::ProbeReplied { sequence, .. } => Some(sequence),
            _ => None,
        });
        sequences.collect::<Vec<_>>()
    };
    while replies(&guest).len() < 5 {
        guest.step();
    }
    let before = replies(&guest);
    guest.move_on(&config, true);
    while replies(&guest).len() < 5 {
        guest.step();
    }
    assert!(replies(&guest)[0] > before[before.len() - 1]);
}

#[test]
fn a_wire_is_not_restored_into_one_of_another_kind() {
    let gateway = Gateway::new(&GatewayConfig::default()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wire.sock");
    let mut link = crate::wire::unix_link::UnixLink::listen(&path).unwrap();
    let error = link.restore(&gateway.save().unwrap()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("user-mode network"), "{text}");
    assert!(text.contains("unix"), "{text}");
}

fn any_connection() -> impl Strategy<Value = (ServiceState, ConnectionState)> {
    let service = prop_oneof![
        Just(ServiceState::Echo),
        Just(ServiceState::Source),
        (any::<u32>(), proptest::option::of(".{0,300}"))
            .prop_map(|(checksum, answer)| { ServiceState::Discard { checksum, answer } }),
    ];
    let phase = prop_oneof![
        Just(Phase::Opening),
        Just(Phase::Open),
        Just(Phase::GuestClosed),
        Just(Phase::Closing),
    ];
    let tuple = (
        any::<u32>(),
        any::<u16>(),
        prop::sample::select(vec![7u16, 9, 19, 0]),
    );
    let handshake = (
        any::<[u8; 6]>(),
        any::<u32>(),
        any::<u32>(),
        any::<Option<u16>>(),
        any::<Option<u8>>(),
    );
    let bytes = || prop_oneof![Just(0usize), 0usize..3000, Just(70_000)];
    // Many of them close to where they begin anew.
    let count = || prop_oneof![any::<u64>(), u64::MAX - 100..=u64::MAX];
    let rest = (count(), count(), bytes(), bytes());
    (service, phase, tuple, handshake, rest).prop_map(|(service, phase, tuple, begun, rest)| {
        let state = ConnectionState {
            tuple: Tuple {
                guest: tuple.0.into(),
                guest_port: tuple.1,
                port: tuple.2,
            },
            handshake: Handshake {
                guest_mac: begun.0,
                guest_sequence: begun.1,
                own_sequence: begun.2,
                max_segment_bytes: begun.3,
                window_scale: begun.4,
                selective: begun.1 % 2 == 0,
            },
            phase,
            taken_bytes: rest.0,
            written_bytes: rest.1,
            received: vec![1; rest.2],
            under_way: vec![2; rest.3],
        };
        (service, state)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a stored state says of connections: no panic, and a gateway that works.
    #[test]
    fn hostile_connections_do_no_harm(connections in prop::collection::vec(any_connection(), 0..20)) {
        let mut guest = Guest::new(&GatewayConfig::default());
        {
            let now = smoltcp_now(monotonic_ns());
            let mut state = guest.port.gateway.shared.lock();
            let State {
                networks, outbox, ..
            } = &mut *state;
            networks[0].go_on_with(&connections, outbox, now);
        }
        guest.step();
        guest.move_on(&GatewayConfig::default(), true);
        guest.step();
        guest.port.gateway.send(&arp_request(GATEWAY));
        let answers = std::iter::from_fn(|| received(&mut guest.port.gateway));
        prop_assert!(answers.into_iter().any(|frame| frame[12..14] == [8, 6]));
    }
}
