//! Packets, interfaces, and what network drivers keep.

use super::*;

/// `act_gact`, to which the action is only to be read.
#[test]
fn what_an_action_counts_on_each_processor_is_its_modules() {
    let mut guest = guest(1);
    guest.put(Gva(SOCKET + 8), &STATISTICS.to_le_bytes(), DATA);
    let found = call(&guest, "my_act", SOCKET);
    assert!(
        found.contains(&(PER_CPU_BASE + STATISTICS, 16)),
        "{found:x?}"
    );
    assert!(found.iter().all(|(at, _)| *at != SOCKET));
    let found = call_with(&[(SOCKET, 128)], "", &guest, "my_act", SOCKET);
    assert!(found.contains(&(SOCKET, 128)), "what it is part of");
}

/// `htb_dequeue`, from a queue that is the discipline's own structure's, and `gred_dequeue`.
#[test]
fn first_and_last_packet_of_a_queue_are_found_by_a_path_through_members() {
    let mut guest = guest(1);
    guest.put(
        Gva(QDISC + 40),
        &[SOCKET, PAGE].map(u64::to_le_bytes).concat(),
        DATA,
    );
    let found = call(&guest, "my_enqueue", QDISC);
    for packet in [SOCKET, PAGE] {
        assert!(found.contains(&(packet, 64)), "{found:x?}");
    }
}

/// `rx_handler`s get one.
#[test]
fn a_packet_may_be_an_argument_by_a_pointer_to_its_pointer() {
    let mut guest = guest(1);
    guest.put(Gva(SOCKET), &QDISC.to_le_bytes(), DATA);
    let found = call(&guest, "my_handle", SOCKET);
    let wanted = [(QDISC, 64), (SOCKET, 8)];
    assert!(wanted.iter().all(|one| found.contains(one)), "{found:x?}");
}

/// `fl_hw_update_stats`, for each filter of each mask.
#[test]
fn what_is_noted_in_an_action_is_found_through_lists_of_lists() {
    let mut guest = guest(1);
    let (head, mask, filter, actions, action) = (SOCKET, QDISC, QDISC_OPS, KEPT, BIO);
    for (at, word) in [
        (head, mask + 16),
        (mask + 16, head),
        (mask, filter + 16),
        (filter + 16, mask),
        (filter, actions),
        (filter + 8, 1),
        (actions, action),
    ] {
        guest.put(Gva(at), &u64::to_le_bytes(word), DATA);
    }
    let sizes = [(head, 16), (mask, 32), (filter, 32)];
    let found = call_with(&sizes, "", &guest, "my_walk", head);
    for noted in [(action + 40, 1), (action + 41, 1)] {
        assert!(found.contains(&noted), "{found:x?}");
    }
    assert!(found.iter().all(|(at, _)| *at != action), "{found:x?}");
}

#[test]
fn what_is_in_a_list_of_the_drivers_is_reached_as_what_it_is() {
    let mut guest = guest(1);
    let (team, port) = (SOCKET, QDISC);
    let links = [(team + 8, port + 16), (port + 16, team + 8), (port, RING)];
    for (at, word) in links {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }
    let sizes = [(team, 64), (port, 64)];
    assert!(ring(&guest, &sizes, "my_join", team));
    guest.put(Gva(port + 16), &(port + 16).to_le_bytes(), DATA);
    assert!(ring(&guest, &sizes, "my_join", team), "one without an end");
    guest.put(Gva(team + 8), &(team + 8).to_le_bytes(), DATA);
    assert!(!ring(&guest, &sizes, "my_join", team), "an empty one");
}

/// `team`, whose port is behind the interface that is a member.
#[test]
fn what_an_interface_has_for_who_receives_from_it_is_that_modules() {
    let mut guest = guest(1);
    guest.put(Gva(DEVICE + 48), &QDISC.to_le_bytes(), DATA);
    guest.put(Gva(QDISC), &SOCKET.to_le_bytes(), DATA);
    let sizes = [(DEVICE, 64), (QDISC, 64), (SOCKET, 64)];
    let found = call_with(&sizes, "", &guest, "my_init", DEVICE);
    let wanted = [(QDISC, 64), (SOCKET, 64)];
    assert!(wanted.iter().all(|one| found.contains(one)), "{found:x?}");
}

/// `ipvlan`, whose work takes packets from a queue.
#[test]
fn packets_in_a_queue_of_the_drivers_are_found() {
    let mut guest = guest(1);
    let (head, packets) = (SOCKET + 48, [QDISC, REQUEST, DEVICE]);
    let links = [
        (head, packets[0]),
        (packets[0], packets[1]),
        (packets[1], packets[2]),
        (packets[2], head),
    ];
    for (at, word) in links {
        guest.put(Gva(at), &word.to_le_bytes(), DATA);
    }
    let queued = |guest: &TestGuest, known: &[u64]| {
        let sizes = known.iter().map(|at| (*at, 64)).chain([(SOCKET, 128)]);
        let (types, known) = (types(), Known(sizes.collect()));
        let reach = super::super::reach(&types, guest, &known);
        let function = types.find_function("my_work").unwrap();
        let found = reach.objects(&function, &[SOCKET + 8, 0, 0, 0, 0, 0], &[]);
        assert_eq!(found.queues, [Gva(head)]);
        let found = reach.queued_in(&found.queues);
        found.iter().map(|packet| packet.at.0).collect::<Vec<_>>()
    };
    assert_eq!(queued(&guest, &packets), packets);
    assert_eq!(
        queued(&guest, &packets[..2]),
        packets[..2],
        "no object of its own"
    );
    guest.put(Gva(packets[2]), &packets[0].to_le_bytes(), DATA);
    assert_eq!(
        queued(&guest, &packets).len(),
        256,
        "a ring without its head"
    );
    guest.put(Gva(head), &head.to_le_bytes(), DATA);
    assert_eq!(queued(&guest, &packets), [0; 0], "an empty one");
}

#[test]
fn the_buckets_of_a_hash_table_are_reached_to_their_end() {
    let mut guest = guest(1);
    guest.put(Gva(MINE), &[0; 24], DATA);
    guest.put(Gva(MINE + 16), &RING.to_le_bytes(), DATA);
    let found = call(&guest, "my_forget", MINE);
    assert!(found.contains(&(RING, 128)), "{found:x?}");
}

#[test]
fn of_what_an_interface_has_of_a_protocol_references_and_settings_are_the_drivers_to_write() {
    let mut guest = guest(1);
    let reached = |guest: &TestGuest| {
        let found = call(guest, "my_init", DEVICE).into_iter();
        let beside = found.filter(|(at, _)| (QUEUE..QUEUE + 64).contains(at));
        beside.collect::<Vec<_>>()
    };
    assert_eq!(reached(&guest), []);
    guest.put(Gva(DEVICE + 40), &QUEUE.to_le_bytes(), DATA);
    assert_eq!(reached(&guest), [(QUEUE + 8, 4), (QUEUE + 24, 8)]);
}
