//! Whatever is asked of the service over HTTP, it answers with a status that fits: never a failure
//! of its own, and a problem where it refuses. An input is a path of the document, with values put
//! in, a method, and a body; or, by its first byte, whatever is on the wire.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use arbitrary::Unstructured;
use cofferdam::runtime_dir::RuntimeRoot;
use cofferdam::sandbox::{Mode, SandboxOptions};
use cofferdam::serve::{ServeConfig, document, serve};

/// How long an answer may take. None of them waits for a guest, as there is none.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// Most bytes of an answer that are looked at: streams have no end.
const ANSWER_BYTES: u64 = 256 << 10;

struct Service {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    /// Method and path of each request that the document has.
    paths: Vec<(String, String)>,
}

static SERVICE: LazyLock<Service> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let socket = folder.path().join("s");
    let config = ServeConfig {
        root: RuntimeRoot::new(folder.path()),
        socket: Some(socket.clone()),
        look_group: None,
        network: None,
        client_time: Duration::from_secs(1),
        sandbox: SandboxOptions {
            sandbox: Some(Mode::Off),
        },
        jail: false,
        cgroup: None,
        campaigns: None,
    };
    std::thread::spawn(|| serve(config).expect("it serves"));
    let begun = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(begun.elapsed() < ANSWER_TIME, "the service does not come");
        std::thread::sleep(Duration::from_millis(10));
    }
    let document = document().expect("it has one");
    let document: serde_json::Value = serde_json::from_str(&document).expect("it is JSON");
    let paths = document["paths"].as_object().expect("it has paths").iter();
    let paths = paths.flat_map(|(path, methods)| {
        let methods = methods.as_object().into_iter().flatten();
        methods.map(|(method, _)| (method.to_uppercase(), path.clone()))
    });
    Service {
        _folder: folder,
        socket,
        paths: paths.collect(),
    }
});

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else {
        return;
    };
    match which % 8 {
        0 => {
            exchange(bytes, true);
        }
        _ => by_the_document(bytes),
    }
}

fn by_the_document(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok((method, path)) = input.choose(&SERVICE.paths) else {
        return;
    };
    let mut path = path.clone();
    while let (Some(from), Some(to)) = (path.find('{'), path.find('}')) {
        let value = match input.arbitrary::<u8>().unwrap_or_default() % 4 {
            0 => "web".to_owned(),
            1 => "..%2f..%2fetc".to_owned(),
            2 => input.arbitrary::<u64>().unwrap_or_default().to_string(),
            _ => word(&mut input),
        };
        path.replace_range(from..=to, &value);
    }
    if input.ratio(1, 4).unwrap_or_default() {
        path = format!("{path}?{}={}", word(&mut input), word(&mut input));
    }
    let kind = input
        .choose(&["application/json", "text/plain", ""])
        .unwrap_or(&"");
    let body = input.take_rest();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    // Events and the console are streams, which end only when who listens goes.
    if path.starts_with("/v1/events") {
        return;
    }
    let answer = exchange(&[head.as_bytes(), body].concat(), false);
    let status: u16 = answer
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|rest| std::str::from_utf8(rest.get(..3)?).ok()?.parse().ok())
        .unwrap_or_else(|| panic!("{head}: {}", String::from_utf8_lossy(&answer)));
    let text = String::from_utf8_lossy(&answer);
    assert_ne!(status, 500, "{head}: {text}");
    if status >= 400 {
        assert!(text.contains("application/problem+json"), "{head}: {text}");
    }
}

/// Letters that may stand in a path.
fn word(input: &mut Unstructured<'_>) -> String {
    let bytes: [u8; 6] = input.arbitrary().unwrap_or_default();
    bytes
        .map(|byte| char::from(b"abcdefghijklmnopqrstuvwxyz0123456789-._~"[usize::from(byte) % 40]))
        .iter()
        .collect()
}

/// What is answered to `request`, behind which nothing can come if it `ends`: the service gives up
/// what is asked by who has gone.
fn exchange(request: &[u8], ends: bool) -> Vec<u8> {
    let mut stream = UnixStream::connect(&SERVICE.socket).expect("it listens");
    stream
        .set_read_timeout(Some(ANSWER_TIME))
        .expect("it can have a limit");
    // It may have closed the connection at the first bytes.
    let _ = stream.write_all(request);
    if ends {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    if let Err(error) = stream.take(ANSWER_BYTES).read_to_end(&mut answer) {
        let timed_out = error.kind() == std::io::ErrorKind::WouldBlock;
        assert!(
            !timed_out,
            "no answer to {}",
            String::from_utf8_lossy(request)
        );
    }
    answer
}
