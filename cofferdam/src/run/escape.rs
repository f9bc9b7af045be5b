//! What a person types in an interactive run: most of it is the guest's, some of it is ours.
//!
//! Ctrl-C and everything else goes to the guest. Ctrl-A starts an escape, as in QEMU and `screen`.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What to print for Ctrl-A h.
pub const HELP: &str = "
Ctrl-A x    end the guest at once
Ctrl-A r    reset the guest
Ctrl-A a    send Ctrl-A to the guest
Ctrl-A h    this help
";

/// What a person asked of us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// End the guest.
    Quit,
    /// Reset the guest.
    Reset,
    /// Say what there is.
    Help,
}

/// Takes the escapes out of what was typed.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Splits `typed` into what the guest gets (appended to `guest`) and commands, in order.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for &byte in typed {
            if !std::mem::take(&mut self.escaped) {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    guest.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => commands.push(Command::Quit),
                b'r' | b'R' => commands.push(Command::Reset),
                b'h' | b'H' | b'?' => commands.push(Command::Help),
                b'a' | b'A' | ESCAPE => guest.push(ESCAPE),
                // Not an escape of ours: a slip of the finger is not worth a byte to the guest.
                _ => {}
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_c_is_the_guests() {
        let mut guest = Vec::new();
        let commands = EscapeFilter::default().filter(b"ls\x03\r\x1b[A", &mut guest);
        assert_eq!((commands, guest), (vec![], b"ls\x03\r\x1b[A".to_vec()));
    }

    #[test]
    fn an_escape_may_come_in_two_parts() {
        let mut filter = EscapeFilter::default();
        let mut guest = Vec::new();
        assert_eq!(filter.filter(b"a\x01", &mut guest), vec![]);
        assert_eq!(filter.filter(b"xb", &mut guest), vec![Command::Quit]);
        assert_eq!(guest, b"ab");
    }

    #[test]
    fn the_escape_itself_can_be_sent() {
        let mut filter = EscapeFilter::default();
        let mut guest = Vec::new();
        let commands = filter.filter(b"\x01a\x01\x01\x01h\x01r\x01qz", &mut guest);
        assert_eq!(commands, vec![Command::Help, Command::Reset]);
        assert_eq!(guest, b"\x01\x01z");
    }
}
