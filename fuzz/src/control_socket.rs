//! Whatever comes over a control socket: each line is answered by one line, and whatever answers a
//! client of it, that has an answer or an error within its time. The first byte says which side it
//! is.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::thread;

use cofferdam::control::client::ControlClient;
use cofferdam::control::protocol::{Reply, Request};
use cofferdam::control::server::{Handler, serve};
use recovery::asker::Asker;

/// Does nothing, and says so.
struct Nobody;

impl Handler for Nobody {
    fn handle(&self, request: Request, _asker: &dyn Asker) -> Result<Reply, String> {
        Err(format!("{request:?}"))
    }
}

/// Where the server and the lying one listen; the folder stays while the process lives.
struct Sockets {
    _folder: tempfile::TempDir,
    server: PathBuf,
    liar: PathBuf,
    listener: UnixListener,
}

static SOCKETS: LazyLock<Sockets> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let [server, liar] = ["server", "liar"].map(|name| folder.path().join(name));
    serve(&server, Arc::new(Nobody)).expect("it can listen");
    let listener = UnixListener::bind(&liar).expect("it can listen");
    Sockets {
        _folder: folder,
        server,
        liar,
        listener,
    }
});

/// One input.
pub fn run(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else {
        return;
    };
    match which % 2 {
        0 => ask(bytes),
        _ => be_answered(bytes),
    }
}

fn ask(bytes: &[u8]) {
    let mut stream = UnixStream::connect(&SOCKETS.server).expect("it listens");
    // It may have closed the connection at the first bytes.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answers = 0;
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let answer: serde_json::Value = serde_json::from_str(&line).expect("an answer is JSON");
        assert!(answer.is_object(), "{answer}");
        answers += 1;
    }
    assert!(
        answers <= bytes.split(|byte| *byte == b'\n').count(),
        "more answers than requests"
    );
}

fn be_answered(bytes: &[u8]) {
    let mut client = ControlClient::connect(&SOCKETS.liar).expect("it listens");
    thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let (mut stream, _) = SOCKETS.listener.accept().expect("somebody connects");
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let _either = client.ask(&Request::Status {});
        drop(client);
        answering.join().expect("it does not panic");
    });
}
