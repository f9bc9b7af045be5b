//! Clients that listen to events while guests are paused and go on: who reads gets each event, in
//! order; who does not read in time is dropped, and told so.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufReader, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use serde::Serialize;
use serde_json::Value;

use super::client::{Client, line_of};
use super::place::{Memory, Place};

/// Clients that read a little now and then, and as many that read nothing, besides the others.
const SLOW: usize = 8;

/// What a slow one reads at a time, in bytes: less than is sent.
const SIP: usize = 256;

/// Between two of its reads.
const SIP_PAUSE: Duration = Duration::from_secs(1);

/// How long nothing may come, at the end, of what a slow one has not read yet.
const QUIET: Duration = Duration::from_secs(60);

/// Most that a slow one reads at a time at the end, in bytes.
const CHUNK: usize = 4096;

/// At its end the last event is looked for, in bytes: longer than an event and a sign of life.
const TAIL: usize = CHUNK + 512;

/// Stack of a listener's thread, in bytes.
const STACK: usize = 256 << 10;

/// Between two rounds of changes: longer than between two looks of the service.
const ROUND: Duration = Duration::from_secs(1);

/// What became of the listeners.
#[derive(Debug, Serialize)]
pub struct Listened {
    /// How many read all the time.
    pub listeners: u16,
    /// For how long, in seconds.
    pub seconds: f64,
    /// Events that there were.
    pub events: u64,
    /// Of the listeners that read, those that had each of them once and in order.
    pub had_all: usize,
    /// What the others said, at most a few.
    pub failed: Vec<String>,
    /// How those ended that read a little now and then.
    pub slow: Vec<Ended>,
    /// How those ended that read nothing.
    pub silent: Vec<Ended>,
}

/// How a slow client's stream ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// It was told this.
    Dropped(String),
    /// It ended without a word, after so many events.
    Cut(u64),
    /// It had not fallen behind far enough when the others had ended.
    Goes(u64),
}

impl fmt::Display for Ended {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dropped(reason) => write!(to, "dropped: {reason}"),
            Self::Cut(events) => write!(to, "ended without a word after {events} events"),
            Self::Goes(events) => write!(to, "not dropped yet after {events} events"),
        }
    }
}

impl Listened {
    /// In lines for a person.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} of {} listeners had each of {} events in {:.0} s\n",
            self.had_all, self.listeners, self.events, self.seconds
        );
        for (name, all) in [("slow", &self.slow), ("silent", &self.silent)] {
            let mut told: Vec<String> = all.iter().map(Ended::to_string).collect();
            told.sort();
            told.dedup();
            for how in told {
                text += &format!("{name}: {how}\n");
            }
        }
        text
    }

    /// # Errors
    /// Somebody has lost an event, or was cut off that read.
    pub fn judge(&self) -> anyhow::Result<()> {
        let first = self.failed.first().map_or("", String::as_str);
        ensure!(
            self.had_all == usize::from(self.listeners),
            "{} of {} listeners had all events: {first}",
            self.had_all,
            self.listeners
        );
        let cut = |ended: &&Ended| matches!(ended, Ended::Cut(_));
        let cut = self.slow.iter().filter(cut).count();
        ensure!(
            cut == 0,
            "{cut} slow listeners were not told why they were dropped"
        );
        Ok(())
    }
}

/// Has `count` clients listen for `time`, while guests are paused and go on by turns. The last
/// guest does not, and ends at the end: by this everybody knows it.
///
/// # Errors
/// The service does not let them, or changes are not seen.
pub fn listen(
    place: &mut Place,
    guests: &[String],
    count: u16,
    time: Duration,
    memory: &mut Vec<Memory>,
) -> anyhow::Result<Listened> {
    let (last, guests) = guests.split_last().context("there are no guests")?;
    let over = Arc::new(AtomicBool::new(false));
    let socket = place.socket();
    let stream = || Client::connect(&socket)?.listen();
    let mut first = Stream::begin(stream()?, last)?;
    let mut threads = Vec::new();
    for _ in 0..count {
        let mut stream = Stream::begin(stream()?, last)?;
        threads.push(spawn(move || stream.read_to_its_end())?);
    }
    let slow_ones = |sip: Option<usize>| -> anyhow::Result<Vec<_>> {
        let one = |_| {
            let (stream, over) = (stream()?, Arc::clone(&over));
            spawn(move || slow(stream, sip, &over))
        };
        (0..SLOW).map(one).collect()
    };
    let (slow, silent) = (slow_ones(Some(SIP))?, slow_ones(None)?);
    memory.push(place.memory("listeners listen")?);
    let begun = Instant::now();
    change(&socket, guests, time, &mut first)?;
    let seconds = begun.elapsed().as_secs_f64();
    memory.push(place.memory("listeners have listened")?);
    over.store(true, Ordering::Relaxed);
    place.end_guest(last)?;
    let all = first.read_to_its_end()?;
    let seen: Vec<_> = threads.into_iter().map(joined).collect();
    let failed = seen.iter().filter_map(|seen| match seen {
        Ok(seen) if *seen == all => None,
        Ok(seen) => Some(format!(
            "{} events, or others, of {}",
            seen.events, all.events
        )),
        Err(error) => Some(format!("{error:#}")),
    });
    let failed: Vec<String> = failed.collect();
    let ended = |all: Vec<JoinHandle<_>>| -> anyhow::Result<Vec<Ended>> {
        all.into_iter().map(joined).collect()
    };
    Ok(Listened {
        listeners: count,
        seconds,
        events: all.events,
        had_all: seen.len().saturating_sub(failed.len()),
        failed: failed.into_iter().take(5).collect(),
        slow: ended(slow)?,
        silent: ended(silent)?,
    })
}

/// Pauses all guests and has them go on by turns, for `time`; each change is waited for, so that
/// none is taken back before the service has seen it.
fn change(
    socket: &std::path::Path,
    guests: &[String],
    time: Duration,
    first: &mut Stream,
) -> anyhow::Result<()> {
    let mut client = Client::connect(socket)?;
    let begun = Instant::now();
    for (how, state) in [("pause", "paused"), ("resume", "running")]
        .into_iter()
        .cycle()
    {
        let round = Instant::now();
        for guest in guests {
            client.ask("POST", &format!("/v1/guests/{guest}/{how}"))?;
        }
        while !first.all_are(guests, state) {
            ensure!(first.next()?, "the stream of events has ended");
        }
        if state == "running" && begun.elapsed() >= time {
            return Ok(());
        }
        std::thread::sleep(ROUND.saturating_sub(round.elapsed()));
    }
    Ok(())
}

/// What a listener has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    events: u64,
    /// Of all events in their order.
    hash: u64,
}

/// A listener that reads.
struct Stream {
    from: BufReader<UnixStream>,
    /// Whose end is the end.
    last: String,
    /// Of each guest, as it was told last.
    states: BTreeMap<String, String>,
    events: u64,
    hash: DefaultHasher,
}

impl Stream {
    /// Reads what there is at first.
    fn begin(from: BufReader<UnixStream>, last: &str) -> anyhow::Result<Self> {
        let mut stream = Self {
            from,
            last: last.to_owned(),
            states: BTreeMap::new(),
            events: 0,
            hash: DefaultHasher::new(),
        };
        let now = stream.event()?;
        ensure!(now["event"] == "now", "the first event is {now}");
        let guests = now["guests"].as_object().context("the first event")?;
        let state = |state: &Value| state.as_str().unwrap_or_default().to_owned();
        stream.states = guests
            .iter()
            .map(|(name, now)| (name.clone(), state(now)))
            .collect();
        ensure!(
            stream.states.contains_key(last),
            "there is no {last}: {now}"
        );
        Ok(stream)
    }

    /// Takes the next event; `false` after the last one.
    fn next(&mut self) -> anyhow::Result<bool> {
        let event = self.event()?;
        let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let (name, guest) = (text("event"), text("guest"));
        if name == "guest_gone" && guest == self.last {
            return Ok(false);
        }
        ensure!(name == "guest_state", "{event}");
        self.events += 1;
        event.to_string().hash(&mut self.hash);
        let before = self.states.insert(guest, text("state"));
        ensure!(before == Some(text("before")), "it was {before:?}: {event}");
        Ok(true)
    }

    /// Whether all of these were told to be in this state.
    fn all_are(&self, guests: &[String], state: &str) -> bool {
        let is_so = |guest: &String| self.states.get(guest).is_some_and(|now| now == state);
        guests.iter().all(is_so)
    }

    fn read_to_its_end(&mut self) -> anyhow::Result<Seen> {
        while self.next()? {}
        Ok(Seen {
            events: self.events,
            hash: self.hash.finish(),
        })
    }

    fn event(&mut self) -> anyhow::Result<Value> {
        loop {
            let line = line_of(&mut self.from)?.context("the stream of events has ended")?;
            if let Some(data) = line.strip_prefix("data: ") {
                return serde_json::from_str(data).context("an event");
            }
        }
    }
}

/// A listener that reads `sip` bytes now and then, or nothing, until the others' end, and then what
/// there is.
fn slow(
    from: BufReader<UnixStream>,
    sip: Option<usize>,
    over: &AtomicBool,
) -> anyhow::Result<Ended> {
    let mut text = from.buffer().to_vec();
    let mut stream = from.into_inner();
    while !over.load(Ordering::Relaxed) {
        if let Some(sip) = sip {
            let mut bytes = vec![0; sip];
            let read = stream.read(&mut bytes)?;
            if read == 0 {
                break;
            }
            text.extend(bytes.into_iter().take(read));
        }
        std::thread::sleep(SIP_PAUSE);
    }
    stream.set_read_timeout(Some(QUIET))?;
    // Signs of life go on coming behind the last event.
    while !ends_with_the_last(&text) {
        let mut bytes = [0; CHUNK];
        let read = match stream.read(&mut bytes) {
            // It was closed while there was more for it.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            read => read.context("a slow listener")?,
        };
        if read == 0 {
            break;
        }
        text.extend(bytes.into_iter().take(read));
    }
    Ok(how_it_ended(&String::from_utf8_lossy(&text)))
}

/// Whether the last event has come, or the one that says that there are no more.
fn ends_with_the_last(text: &[u8]) -> bool {
    let tail = text.get(text.len().saturating_sub(TAIL)..).unwrap_or(text);
    let tail = String::from_utf8_lossy(tail);
    let whole = tail.rsplit_once("\n\n").map_or("", |(whole, _)| whole);
    ["guest_gone", "dropped"]
        .iter()
        .any(|name| whole.contains(&format!("\"event\":\"{name}\"")))
}

fn how_it_ended(text: &str) -> Ended {
    let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
    let events: Vec<&str> = events.collect();
    let last: Option<Value> = events
        .last()
        .and_then(|last| serde_json::from_str(last).ok());
    let count = events.len() as u64;
    match last {
        Some(last) if last["event"] == "dropped" => {
            Ended::Dropped(last["reason"].as_str().unwrap_or_default().to_owned())
        }
        Some(last) if last["event"] == "guest_gone" => Ended::Goes(count),
        _ => Ended::Cut(count),
    }
}

fn spawn<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
    let thread = Builder::new().stack_size(STACK).spawn(work);
    thread.context("cannot start a thread")
}

fn joined<T>(thread: JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(anyhow!("a listener's thread has failed")))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// What a listener makes of these events.
    fn seen(events: &[&str]) -> anyhow::Result<Seen> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for event in events {
            theirs
                .write_all(format!("data: {event}\n\n").as_bytes())
                .unwrap();
        }
        drop(theirs);
        Stream::begin(BufReader::new(ours), "z")?.read_to_its_end()
    }

    #[test]
    fn an_event_that_is_missing_or_comes_twice_is_noticed() {
        let now = r#"{"event":"now","guests":{"a":"running","z":"running"}}"#;
        let paused = r#"{"event":"guest_state","guest":"a","state":"paused","before":"running"}"#;
        let goes = r#"{"event":"guest_state","guest":"a","state":"running","before":"paused"}"#;
        let gone = r#"{"event":"guest_gone","guest":"z"}"#;
        let all = seen(&[now, paused, goes, gone]).unwrap();
        assert_eq!(all.events, 2);
        assert!(seen(&[now, goes, gone]).is_err());
        assert!(seen(&[now, paused, paused, gone]).is_err());
        // A whole round that is missing is seen by comparing.
        assert_ne!(seen(&[now, gone]).unwrap(), all);
        assert!(seen(&[now, paused]).is_err());
        assert!(seen(&[paused, gone]).is_err());
    }

    #[test]
    fn how_a_slow_ones_stream_ended_is_told() {
        let event = "event: x\ndata: {\"event\":\"guest_state\"}\n\n";
        let dropped = r#"data: {"event":"dropped","reason":"too slow"}"#;
        let gone = r#"data: {"event":"guest_gone","guest":"z"}"#;
        assert_eq!(
            how_it_ended(&format!("{event}{gone}\n\n: \n\n")),
            Ended::Goes(2)
        );
        assert_eq!(how_it_ended(&event.repeat(2)), Ended::Cut(2));
        assert!(!ends_with_the_last(event.as_bytes()));
        assert!(ends_with_the_last(format!("{event}{gone}\n\n").as_bytes()));
        assert!(!ends_with_the_last(format!("{event}{gone}").as_bytes()));
        let told = how_it_ended(&format!("{event}{dropped}\n"));
        assert_eq!(told, Ended::Dropped("too slow".to_owned()));
    }
}
