//! Kernel messages: `/dev/kmsg`, one record a read (kernel's `Documentation/ABI/testing/dev-kmsg`).

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use agent_protocol::message::{Body, Done, KmsgRecord};

use crate::fail::{Context, Result};

/// Records in one message.
const BATCH: usize = 200;

/// Longest record the kernel gives.
const RECORD: usize = 8192;

/// Sends the records from `since` on, in parts.
pub fn records(since: u64, part: &mut dyn FnMut(Body) -> Result<()>) -> Result<Done> {
    let path = "/dev/kmsg";
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let mut file = open.context(|| format!("open {path}"))?;
    let mut next = since;
    let mut batch = Vec::new();
    let mut buffer = vec![0; RECORD];
    loop {
        let n = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // The record was overwritten before it was read: the next one follows.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context(|| format!("read {path}")),
        };
        let Some(record) = parse(&String::from_utf8_lossy(&buffer[..n])) else {
            continue;
        };
        if record.seq < since {
            continue;
        }
        next = record.seq.saturating_add(1);
        batch.push(record);
        if batch.len() == BATCH {
            part(Body::Kmsg(std::mem::take(&mut batch)))?;
        }
    }
    if !batch.is_empty() {
        part(Body::Kmsg(batch))?;
    }
    Ok(Done::Kmsg { next })
}

/// `6,339,5140900,-;text`, and perhaps lines ` KEY=value` after it, which are left out.
fn parse(record: &str) -> Option<KmsgRecord> {
    let (head, rest) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority = fields.next()?.parse().ok()?;
    let seq = fields.next()?.parse().ok()?;
    let time_us = fields.next()?.parse().ok()?;
    let text = rest.lines().next().unwrap_or("").into();
    Some(KmsgRecord {
        seq,
        priority,
        time_us,
        text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_without_their_dictionary() {
        let record =
            parse("7,160,424069,-,caller=T1;pci_root PNP0A03:00: a;b\n SUBSYSTEM=acpi\n").unwrap();
        let wanted = KmsgRecord {
            seq: 160,
            priority: 7,
            time_us: 424_069,
            text: "pci_root PNP0A03:00: a;b".into(),
        };
        assert_eq!(record, wanted);
        assert_eq!(parse("no record"), None);
    }
}
