//! `mouse`: what happens to a guest's mouse.

use anyhow::bail;
use devices::i8042::{Button, MouseEvent};

use super::isolation::ask;
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{Reply, Request};
use crate::options::VmName;

/// `mouse`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A VM has a mouse if it was started with `cofferdam run --mouse`. What happens to it waits until the
guest takes it; a guest whose driver has not switched the mouse on is not told, which is an error.

Examples:
  cofferdam mouse web move 10 -5      # right and up
  cofferdam mouse web click           # the left button
  cofferdam mouse web press right
  cofferdam mouse web wheel -3        # towards the user
  cofferdam mouse web status --json")]
pub struct MouseOptions {
    /// Name of the VM
    vm: VmName,
    #[command(subcommand)]
    event: Event,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

/// What happens.
#[derive(Debug, clap::Subcommand)]
enum Event {
    /// It moves, in counts
    #[command(allow_negative_numbers = true)]
    Move {
        /// To the right
        dx: i32,
        /// Down
        dy: i32,
    },
    /// A button is pressed and let go
    Click {
        /// Which
        #[arg(default_value = "left")]
        button: Which,
    },
    /// A button is pressed
    Press {
        /// Which
        button: Which,
    },
    /// A button is let go
    Release {
        /// Which
        button: Which,
    },
    /// The wheel turns, in notches
    #[command(allow_negative_numbers = true)]
    Wheel {
        /// Away from the user
        notches: i32,
    },
    /// Nothing: what became of what happened before
    Status,
}

/// A button, on the command line.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Which {
    Left,
    Right,
    Middle,
}

impl From<Which> for Button {
    fn from(which: Which) -> Self {
        match which {
            Which::Left => Self::Left,
            Which::Right => Self::Right,
            Which::Middle => Self::Middle,
        }
    }
}

impl MouseOptions {
    /// `mouse`
    pub fn run(self) -> anyhow::Result<Ending> {
        let event = match self.event {
            Event::Move { dx, dy } => Some(MouseEvent::Move { x: dx, y: dy }),
            Event::Click { button } => Some(MouseEvent::Click(button.into())),
            Event::Press { button } => Some(MouseEvent::Press(button.into())),
            Event::Release { button } => Some(MouseEvent::Release(button.into())),
            Event::Wheel { notches } => Some(MouseEvent::Wheel(notches)),
            Event::Status => None,
        };
        let is_status = event.is_none();
        let Reply::Mouse(counts) = ask(&self.vm, &Request::Mouse { event })? else {
            bail!("the VM answered something else");
        };
        if self.json {
            print_json(&counts)?;
        } else if is_status {
            let text = format!(
                "steps {}, packets {}, waiting {}, forgotten {}\n",
                counts.steps, counts.packets, counts.waiting, counts.forgotten
            );
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }
}
