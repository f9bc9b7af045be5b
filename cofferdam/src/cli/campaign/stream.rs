//! Whom a campaign tells what it does: people, or a program that has started it.

use recovery::campaign::record::Record;

use super::line;
use crate::campaign::Progress;
use crate::campaign::stream::{Figures, Line};
use crate::campaign::worker::Setup;
use crate::cli::print_bytes;
use crate::json_lines::Elsewhere;

/// Whom it tells, and how its VMs are.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Told {
    /// Tell what is done in lines of JSON on standard output, for a program; the end of standard
    /// input ends it, with its VMs
    #[arg(long)]
    pub stream: bool,
    /// Put its VMs into jails (see `cofferdam run --jail`)
    #[arg(long)]
    jail: bool,
}

impl Told {
    /// With the VMs in jails, if they are to be.
    pub fn jailed(self, mut setup: Setup) -> Setup {
        if self.jail {
            setup.guest = setup.guest.with("--jail");
        }
        setup
    }

    /// What becomes of a campaign's file that is no file: the service, which is who has a stream,
    /// chooses names in a folder in which others may write.
    pub fn elsewhere(self) -> Elsewhere {
        match self.stream {
            true => Elsewhere::Refused,
            false => Elsewhere::Followed,
        }
    }

    /// What is done.
    pub fn says(self, what: &str) {
        match self.stream {
            true => print(&Line::Says {
                text: what.to_owned(),
            }),
            false => eprintln!("campaign: {what}"),
        }
    }

    /// A trial was made.
    pub fn made(self, progress: &Progress<'_>) {
        self.says(&line(progress));
        if self.stream {
            print(&Line::Made(Figures::from(progress)));
        }
    }

    /// A trial was made once more.
    pub fn replayed(self, then: Record, now: Record) {
        print(&Line::Replayed {
            then: Box::new(then),
            now: Box::new(now),
        });
    }
}

/// Whoever does not listen any more ends this process by its standard input, in order.
fn print(line: &Line) {
    if let Ok(mut text) = serde_json::to_string(line) {
        text.push('\n');
        let _ = print_bytes(text.as_bytes());
    }
}
