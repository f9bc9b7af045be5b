//! Reading and writing files for the host.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;

use agent_protocol::message::{Body, Bytes, CHUNK, Done};

use crate::fail::{Context, Result};

/// Sends a file in parts.
pub fn read(
    path: &str,
    offset: u64,
    limit: u64,
    part: &mut dyn FnMut(Body) -> Result<()>,
) -> Result<Done> {
    let mut file = File::open(path).context(|| format!("open {path}"))?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))
            .context(|| format!("seek in {path}"))?;
    }
    let mut left = limit;
    let mut buffer = vec![0; CHUNK];
    while left > 0 {
        let most = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        match file.read(&mut buffer[..most]) {
            Ok(0) => return Ok(Done::File { eof: true }),
            Ok(n) => {
                left -= n as u64;
                part(Body::File(Bytes(buffer[..n].to_vec())))?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context(|| format!("read {path}")),
        }
    }
    Ok(Done::File { eof: false })
}

/// Writes a file.
pub fn write(path: &str, data: &[u8], append: bool, mode: u32) -> Result<Done> {
    let mut options = OpenOptions::new();
    options.create(true).mode(mode);
    match append {
        true => options.append(true),
        false => options.write(true).truncate(true),
    };
    let mut file = options.open(path).context(|| format!("open {path}"))?;
    file.write_all(data).context(|| format!("write {path}"))?;
    Ok(Done::Ok)
}
