//! Errors as a person sees them: one line that says what to do.

use clap::error::ErrorKind;

/// What is wrong with a command line; `None` where help or the version was asked for.
pub fn usage_error(error: &clap::Error) -> Option<String> {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => return None,
        _ => {}
    }
    let text = error.render().to_string();
    let what: Vec<&str> = text
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .flat_map(str::split_whitespace)
        .collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let usage = text.lines().find_map(|line| line.strip_prefix("Usage: "));
    Some(match usage {
        Some(usage) => format!("{what}; usage: {usage}, more by --help"),
        None => format!("{what}; more by --help"),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn complaint(words: &str) -> Option<String> {
        let error = Cli::try_parse_from(words.split(' ')).unwrap_err();
        usage_error(&error)
    }

    #[test]
    fn what_is_wrong_with_a_command_line_is_one_line() {
        for (words, says) in [
            ("cofferdam run --bogus", "--bogus"),
            ("cofferdam run", "--kernel"),
            (
                "cofferdam run --kernel x --nic foo --net user",
                "e1000, virtio",
            ),
            ("cofferdam run --kernel x --memory 1M", "at least 16M"),
            ("cofferdam run --kernel x --vcpus 9", "1..=8"),
            ("cofferdam fly", "fly"),
        ] {
            let line = complaint(words).unwrap();
            assert!(line.contains(says), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
        assert_eq!(complaint("cofferdam --help"), None);
        assert_eq!(complaint("cofferdam"), None);
    }
}
