//! What is asked and answered, as it travels.

use super::*;

fn round_trip<T: Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(value: T) {
    let text = serde_json::to_string(&value).unwrap();
    assert_eq!(serde_json::from_str::<T>(&text).unwrap(), value, "{text}");
}

#[test]
fn requests_survive_json() {
    let address: Ipv4 = "10.0.2.15/24".parse().unwrap();
    let calls = [
        Call::Hello { nonce: u64::MAX },
        Call::Ping,
        Call::Exec(Exec {
            argv: vec!["a\u{0}\n\"".into()],
            stdin: Bytes((0..=255).collect()),
            ..Exec::default()
        }),
        Call::LoadModule {
            source: ModuleSource::Image(Bytes(vec![0xFF; 9])),
            params: "a=1".into(),
        },
        Call::Symbols(SymbolFilter {
            names: Some(vec!["x".into()]),
            ..SymbolFilter::default()
        }),
        Call::SetAddress {
            interface: "eth0".into(),
            address,
            gateway: Some(Ipv4Addr::LOCALHOST),
        },
        Call::SetTime { real_ns: u64::MAX },
        Call::Readdress {
            interface: "eth0".into(),
            mac: Some([2, 0, 0, 0, 0, 255]),
            address: Some(address),
            gateway: None,
        },
        Call::PowerOff,
    ];
    for (id, call) in (1..).zip(calls) {
        round_trip(Request { id, call });
    }
}

#[test]
fn responses_survive_json() {
    let stamp = Stamp {
        mono_ns: 1,
        real_ns: u64::MAX,
    };
    let bodies = [
        Body::Stdout(Bytes(b"x".to_vec())),
        Body::Symbols(vec![Symbol {
            address: u64::MAX,
            kind: 't',
            name: "f".into(),
            module: None,
        }]),
        Body::Done(Done::Exec(ExecEnd::Signaled(9))),
        Body::Done(Done::Restart(vec![Step {
            step: StepName::Carrier,
            begin: stamp,
            end: stamp,
        }])),
        Body::Error(AgentError {
            message: "no".into(),
            errno: Some(2),
        }),
    ];
    for body in bodies {
        round_trip(Response {
            id: 7,
            received: stamp,
            sent: stamp,
            body,
        });
    }
}

#[test]
fn addresses_that_are_none_are_refused() {
    for text in [
        "",
        "10.0.2.15",
        "10.0.2.15/33",
        "10.0.2/8",
        "10.0.2.15/-1",
        "x/8",
        "10.0.2.15/8/8",
    ] {
        assert!(text.parse::<Ipv4>().is_err(), "{text}");
    }
}
