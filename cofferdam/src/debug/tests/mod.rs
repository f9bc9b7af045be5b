//! Sessions with a peer that behaves, and with one that does not.

mod image;

use image::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::serve::{Place, talk};
use super::session::{PACKET_BYTES, checksum};
use super::words::{answer, json, summary};
use super::*;

fn packet(body: &[u8]) -> Vec<u8> {
    let mut packet = vec![b'$'];
    packet.extend(body);
    packet.extend(format!("#{:02x}", checksum(body)).bytes());
    packet
}

/// Bodies of the packets in what was answered, run-length encoding resolved; acknowledgements are
/// left out.
fn bodies(answer: &[u8]) -> Vec<String> {
    let text = String::from_utf8(answer.to_vec()).unwrap();
    let packets = text.split('$').skip(1);
    packets
        .map(|packet| {
            let (body, sum) = packet.split_once('#').unwrap();
            assert_eq!(sum[..2], format!("{:02x}", checksum(body.as_bytes())));
            let mut resolved = String::new();
            let mut chars = body.chars();
            while let Some(c) = chars.next() {
                match c {
                    '*' => {
                        let again = chars.next().unwrap() as usize - 29;
                        let last = resolved.chars().last().unwrap();
                        resolved.extend(std::iter::repeat_n(last, again));
                    }
                    c => resolved.push(c),
                }
            }
            resolved
        })
        .collect()
}

/// The one packet that answers.
fn ask(session: &mut Session<'_>, body: &str) -> String {
    let bodies = bodies(&session.take(&packet(body.as_bytes())));
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    bodies[0].clone()
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> String {
    let bytes = (0..digits.len() / 2).map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16));
    String::from_utf8(bytes.collect::<Result<_, _>>().unwrap()).unwrap()
}

/// What a `monitor` command prints.
fn monitor(session: &mut Session<'_>, command: &str) -> String {
    let answered = session.take(&packet(format!("qRcmd,{}", hex(command)).as_bytes()));
    let bodies = bodies(&answered);
    let (last, printed) = bodies.split_last().unwrap();
    assert_eq!(last, "OK");
    let texts = printed.iter().map(|body| unhex(&body[1..]));
    texts.collect()
}

#[test]
fn gdb_reads_registers_and_memory_as_the_call_had_them() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut session = Session::new(&image);
    let supported = ask(&mut session, "qSupported:multiprocess+;xmlRegisters=i386");
    assert!(supported.contains("PacketSize="), "{supported}");
    assert!(supported.contains("qXfer:features:read+"), "{supported}");
    let description = ask(&mut session, "qXfer:features:read:target.xml:0,fff");
    assert!(description.contains("i386:x86-64"), "{description}");
    assert!(ask(&mut session, "?").starts_with("T05"));
    let registers = ask(&mut session, "g");
    assert!(registers.starts_with("0807060504030201"), "{registers}");
    let at = |number: usize| registers[16 * number..16 * number + 16].to_owned();
    let digits = |value: u64| hex_of(&value.to_le_bytes());
    assert_eq!(at(7), digits(STACK + 0x100));
    assert_eq!(at(16), digits(CODE + 8));
    // 17 of 8 bytes, 7 of 4, then those that nobody knows, and at last the control registers.
    let unknown = &registers[2 * (17 * 8 + 7 * 4)..];
    assert_eq!(unknown.find(|c| c != 'x'), Some(2 * (8 * 10 + 8 * 4)));
    assert_eq!(registers.len(), 2 * (17 * 8 + 7 * 4 + 112 + 7 * 8));
    assert!(registers.ends_with(&digits(0xd01)));
    // The call's page, not the guest's.
    assert_eq!(ask(&mut session, &format!("m{DATA:x},4")), "77777777");
    assert_eq!(ask(&mut session, &format!("m{STACK:x},2")), "1111");
    // As far as there is something, and an error where there is nothing.
    let end = ask(&mut session, &format!("m{:x},10", NOWHERE - 4));
    assert_eq!(end, "77777777");
    for nothing in [NOWHERE, 0, 1 << 63, u64::MAX] {
        assert_eq!(ask(&mut session, &format!("m{nothing:x},8")), "E0e");
    }
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn nothing_is_written_and_nothing_runs_and_the_session_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut session = Session::new(&image);
    assert_eq!(ask(&mut session, &format!("M{DATA:x},1:00")), "E1e");
    let zeros = "0".repeat(2 * (17 * 8 + 7 * 4 + 112 + 7 * 8));
    assert_eq!(ask(&mut session, &format!("G{zeros}")), "E1e");
    for go_on in ["c", "s", "vCont;c:p1.-1", "vCont;s:p1.1;c:p1.-1"] {
        let bodies = bodies(&session.take(&packet(go_on.as_bytes())));
        let [said, stopped] = bodies.as_slice() else {
            panic!("{bodies:?}")
        };
        assert!(unhex(&said[1..]).contains("does not run"), "{said}");
        assert!(stopped.starts_with("T05") || stopped.starts_with("S05"));
    }
    assert_eq!(ask(&mut session, &format!("m{DATA:x},1")), "77");
    assert!(!session.is_over());
    assert_eq!(ask(&mut session, "D;1"), "OK");
    assert!(session.is_over());
    assert!(session.take(&packet(b"?")).is_empty());
}

#[test]
fn what_is_damaged_is_asked_for_again_and_noise_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut session = Session::new(&image);
    assert!(
        session
            .take(b"GET / HTTP/1.1\r\n\r\n\x03\x00\xff#00+")
            .is_empty()
    );
    let read = format!("m{DATA:x},2");
    let mut damaged = packet(read.as_bytes());
    damaged[3] ^= 1;
    assert_eq!(session.take(&damaged), b"-");
    for wrong in [&b"$?#zz"[..], b"$?#40", b"$#ff", b"$?#+f", b"$?#\xff\xff"] {
        assert_eq!(session.take(wrong), b"-", "{wrong:x?}");
    }
    // The end of one is lost, and the next is whole.
    let mut lost = b"$m1234".to_vec();
    lost.extend(packet(read.as_bytes()));
    assert_eq!(bodies(&session.take(&lost)), ["7777"]);
    // The answer is lost.
    assert_eq!(bodies(&session.take(b"-")), ["7777"]);
    // One byte after the other.
    let mut answer = Vec::new();
    for byte in packet(read.as_bytes()) {
        answer.extend(session.take(&[byte]));
    }
    assert_eq!(bodies(&answer), ["7777"]);
}

#[test]
fn what_is_too_long_or_asks_for_too_much_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut session = Session::new(&image);
    let long = packet(&vec![b'q'; 4 * PACKET_BYTES]);
    assert_eq!(session.take(&long), b"-");
    for much in ["m0,ffffffffffffffff", "m0,2001", "m0", "m,", "m0,-1", "m"] {
        assert_eq!(ask(&mut session, much), "E16", "{much}");
    }
    let most = ask(&mut session, &format!("m{CODE:x},1000"));
    assert_eq!(most.len(), 2 * 0x1000);
    assert!(ask(&mut session, "?").starts_with("T05"));
}

#[test]
fn whatever_whole_packets_say_the_session_goes_on_or_ends_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut session = Session::new(&image);
    let words = [
        "qSupported",
        "qRcmd,",
        "m",
        "M",
        "X",
        "g",
        "G",
        "p",
        "P",
        "?",
        "c",
        "s",
        "vCont",
        "H",
        "T",
        "qXfer:features:read:target.xml:",
        "Z0,",
        "z1,",
        "qfThreadInfo",
        "vFile:",
        "QStartNoAckMode",
        ":",
        ",",
        ";",
        "#",
        "}",
        "*",
        "ffffffffffffffff",
        "0",
        "-1",
        "p1.1",
        "\u{fffd}",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut body = Vec::new();
        for _ in 0..next() % 6 {
            match next() % 8 {
                0 => body.extend(next().to_le_bytes()),
                choice => {
                    let word = words[(next() as usize + choice as usize) % words.len()];
                    body.extend(word.bytes());
                }
            }
        }
        // Those two would end it where they come.
        body.retain(|byte| !matches!(byte, b'$' | b'#'));
        let answered = session.take(&packet(&body));
        assert!(answered.len() < 8 * PACKET_BYTES, "{body:x?}");
        if session.is_over() {
            session = Session::new(&image);
        }
    }
    assert_eq!(ask(&mut session, &format!("m{DATA:x},1")), "77");
}

#[test]
fn monitor_commands_know_symbols_types_and_the_way_across_the_crossing() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let mut session = Session::new(&image);
    let trace = monitor(&mut session, "bt");
    let lines: Vec<&str> = trace.lines().collect();
    assert!(
        lines[0].starts_with("#0") && lines[0].ends_with("_text+0x8"),
        "{trace}"
    );
    assert!(lines[1].contains("driver_entry+0x10 [driver]"), "{trace}");
    assert!(lines[1].contains("had called the kernel"), "{trace}");
    assert!(
        lines[2].contains("had called the isolated function"),
        "{trace}"
    );
    let why = monitor(&mut session, "why");
    assert!(
        why.contains(&format!("driver_entry(dev={DATA:#x})")),
        "{why}"
    );
    assert!(!why.contains('\u{1b}'), "{why:?}");
    let at = monitor(&mut session, &format!("sym {:#x}", CODE + 0x103));
    assert!(at.contains("driver_entry+0x3 [driver]"), "{at}");
    let named = monitor(&mut session, "sym driver_entry");
    assert!(
        named.starts_with(&format!("{:#x} t", CODE + 0x100)),
        "{named}"
    );
    let of_type = monitor(&mut session, "type struct thing");
    assert_eq!(
        of_type,
        "struct thing {  /* 4 bytes */\n  /* 0x0000 */ int count;\n};\n"
    );
    let function = monitor(&mut session, "type driver_entry");
    assert_eq!(function, "int driver_entry(struct thing *dev);\n");
    let shown = monitor(&mut session, "show");
    assert!(
        shown.contains("4096 bytes differ, the first at 0x000"),
        "{shown}"
    );
    let help = monitor(&mut session, "help");
    assert!(help.contains("monitor type NAME"), "{help}");
    for odd in ["", "bt 3", "sym", "dance", "sym \u{1b}[2J", "type \u{1b}x"] {
        let answered = answer(&image, odd);
        assert!(
            !answered.is_empty() && !answered.contains('\u{1b}'),
            "{odd:?}"
        );
    }
    let all = summary(&image);
    assert!(all.contains("rax    0102030405060708"), "{all}");
    assert!(all.contains("symbol-file -o 0x0 vmlinux"), "{all}");
    assert!(!all.contains('\u{1b}'));
    assert_eq!(json(&image)["trace"][1]["kind"], "crossing");
}

#[test]
fn sessions_go_over_a_socket_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        for last in [&packet(b"D")[..], b"noise and then nothing", b""] {
            let (mut ours, theirs) = tokio::net::UnixStream::pair().unwrap();
            let client = async {
                ours.write_all(&packet(format!("m{DATA:x},1").as_bytes()))
                    .await
                    .unwrap();
                let mut answer = [0; 7];
                ours.read_exact(&mut answer).await.unwrap();
                assert_eq!(bodies(&answer), ["77"]);
                ours.write_all(last).await.unwrap();
                ours.shutdown().await.unwrap();
                let mut rest = Vec::new();
                ours.read_to_end(&mut rest).await.unwrap();
            };
            tokio::join!(client, talk(&image, theirs));
        }
    });
}

#[test]
fn only_this_host_is_listened_at() {
    let tcp: Place = "127.0.0.1:1234".parse().unwrap();
    assert!(matches!(tcp, Place::Tcp(_)));
    assert_eq!("/tmp/s".parse(), Ok(Place::Unix("/tmp/s".into())));
    for wrong in ["0.0.0.0:1234", "192.0.2.1:1", "", &"x".repeat(1000)] {
        assert!(wrong.parse::<Place>().is_err(), "{wrong}");
    }
}
