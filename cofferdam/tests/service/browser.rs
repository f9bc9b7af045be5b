//! Chromium without a screen, told what to do over a pipe (the DevTools protocol: JSON with a zero
//! byte behind it).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a browser may take for one thing.
const LIMIT: Duration = Duration::from_secs(60);

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    session: Option<String>,
    last: u64,
    _folder: TempDir,
}

impl Browser {
    /// Starts one. `None`, which is said, where this machine has none.
    pub fn start(test: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        if let Err(error) = Command::new("chromium").arg("--version").output() {
            skipped::skip(test, &format!("chromium cannot be run: {error}"));
            return None;
        }
        // It takes orders at descriptor 3 and answers at 4.
        let redirected = "exec chromium \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut child = Command::new("sh")
            .args(["-c", redirected, "sh"])
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                "--ignore-certificate-errors",
                "--remote-debugging-pipe",
            ])
            .arg(format!("--user-data-dir={}", folder.path().display()))
            .env("HOME", folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let from = messages(child.stdout.take().unwrap());
        let mut browser = Self {
            child,
            to,
            from,
            session: None,
            last: 0,
            _folder: folder,
        };
        let target = browser.tell("Target.createTarget", &json!({"url": "about:blank"}));
        let target = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.tell("Target.attachToTarget", &target);
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        assert!(browser.session.is_some(), "{session}");
        Some(browser)
    }

    /// Has it do something and waits for the answer.
    #[track_caller]
    fn tell(&mut self, method: &str, params: &Value) -> Value {
        self.last += 1;
        let mut message = json!({"id": self.last, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        self.to
            .write_all(format!("{message}\0").as_bytes())
            .unwrap();
        let deadline = Instant::now() + LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = self.from.recv_timeout(left).unwrap();
            if answer["id"] == self.last {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
        }
    }

    pub fn open(&mut self, url: &str) {
        let answer = self.tell("Page.navigate", &json!({"url": url}));
        assert!(answer["errorText"].is_null(), "{answer}");
    }

    /// What an expression is in the page.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "returnByValue": true});
        let answer = self.tell("Runtime.evaluate", &params);
        assert!(answer["exceptionDetails"].is_null(), "{answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true in the page.
    #[track_caller]
    pub fn until(&mut self, expression: &str) {
        let deadline = Instant::now() + LIMIT;
        // The page may be on its way.
        let safe =
            format!("(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()");
        while self.value(&safe) != json!(true) {
            if Instant::now() > deadline {
                let text = self.value("document.body.innerText");
                panic!("never so: {expression}: {text}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Gives the page a token, as a person would.
    pub fn log_in(&mut self, token: &str) {
        let token = json!(token);
        self.value(&format!(
            "document.getElementById('token').value = {token}; \
             document.querySelector('#login button').click()"
        ));
    }

    /// How large the window is.
    pub fn size(&mut self, width: u32, height: u32) {
        let size =
            json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": false});
        self.tell("Emulation.setDeviceMetricsOverride", &size);
    }

    /// Writes what is seen to a file in the folder that `COFFERDAM_SCREENSHOTS` names, if it names
    /// one.
    pub fn screenshot(&mut self, name: &str) {
        let Some(folder) = std::env::var_os("COFFERDAM_SCREENSHOTS") else {
            return;
        };
        use base64::Engine;
        let answer = self.tell(
            "Page.captureScreenshot",
            &json!({"captureBeyondViewport": true}),
        );
        let data = answer["data"].as_str().unwrap();
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(data)
            .unwrap();
        let path = std::path::Path::new(&folder).join(format!("{name}.png"));
        std::fs::write(path, bytes).unwrap();
    }

    pub fn end(mut self) {
        self.session = None;
        self.tell("Browser.close", &json!({}));
        self.child.wait().unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Of one that has ended already there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the browser says, as it comes.
fn messages(out: ChildStdout) -> Receiver<Value> {
    let (to, from) = channel();
    std::thread::spawn(move || {
        let mut out = BufReader::new(out);
        let mut bytes = Vec::new();
        while out.read_until(0, &mut bytes).is_ok_and(|length| length > 0) {
            let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
            let Ok(message) = serde_json::from_slice(text) else {
                return;
            };
            if to.send(message).is_err() {
                return;
            }
            bytes.clear();
        }
    });
    from
}
