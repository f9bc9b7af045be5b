//! `run --config FILE`: options out of a file, in TOML.
//!
//! ```text
//!   memory = "1G"            --memory=1G
//!   net = ["user", ...]      --net=user --net=...
//!   no-reboot = true         --no-reboot
//! ```
//!
//! Keys are the options' own names, so that there is one list of them. What is wrong with a value
//! is found by giving it to the command line's parser alone, and said with its line and column.
//! Options of the command line take the place of the file's.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, CommandFactory, Parser};
use toml::de::{DeTable, DeValue};

use super::errors::usage_error;

/// The option that names the file; not one that can be in it.
const CONFIG: &str = "config";

/// Longest file, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// The options of a command by themselves.
#[derive(Debug, Parser)]
#[command(name = "run", no_binary_name = true)]
struct Alone<O: Args> {
    #[command(flatten)]
    options: O,
}

/// The options in `file`, and those of this process's own command line in place of them.
///
/// # Errors
/// A line with the place of what is wrong in the file.
pub fn with_file<O: Args>(file: &Path) -> anyhow::Result<O> {
    let text = read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let typed = super::Cli::command().try_get_matches()?;
    let typed = typed
        .subcommand_matches("run")
        .context("options in a file are those of `run`")?;
    merged(&text, typed).map_err(|why| anyhow!("{}: {why:#}", file.display()))
}

fn read(file: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    // A FIFO that nobody writes to would hold us up for ever.
    let open = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(file)?;
    open.take(MAX_FILE + 1).read_to_string(&mut text)?;
    ensure!(
        text.len() as u64 <= MAX_FILE,
        "it has more than {MAX_FILE} bytes"
    );
    Ok(text)
}

/// Options of a file's text, and of the command line in place of them.
fn merged<O: Args>(text: &str, typed: &ArgMatches) -> anyhow::Result<O> {
    let command = Alone::<O>::command();
    let is_typed = |arg: &Arg| {
        let id = arg.get_id().as_str();
        typed.value_source(id) == Some(ValueSource::CommandLine)
    };
    let mut words: Vec<OsString> = Vec::new();
    for (arg, more) in words_of::<O>(text, &command)? {
        if !is_typed(arg) {
            words.extend(more.into_iter().map(OsString::from));
        }
    }
    for arg in command.get_arguments() {
        let Some(option) = arg.get_long().filter(|option| *option != CONFIG) else {
            continue;
        };
        if !is_typed(arg) {
            continue;
        }
        if !arg.get_action().takes_values() {
            words.push(format!("--{option}").into());
            continue;
        }
        for value in typed.get_raw(arg.get_id().as_str()).into_iter().flatten() {
            let mut word = OsString::from(format!("--{option}="));
            word.push(value);
            words.push(word);
        }
    }
    match Alone::<O>::try_parse_from(words) {
        Ok(alone) => Ok(alone.options),
        Err(error) => bail!(in_a_line(&error)),
    }
}

/// The words that say what the file's keys do, each looked at.
fn words_of<'a, O: Args>(
    text: &str,
    command: &'a Command,
) -> anyhow::Result<Vec<(&'a Arg, Vec<String>)>> {
    let (table, errors) = DeTable::parse_recoverable(text);
    // They come in no order, and what follows the first is often of its making.
    let spans = errors.iter().map(|error| error.span().unwrap_or(0..0));
    if let Some((error, span)) = errors.iter().zip(spans).min_by_key(|(_, span)| span.start) {
        bail!("{}: {}", place(text, &span), error.message());
    }
    let mut all = Vec::new();
    let mut entries: Vec<_> = table.get_ref().iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let option = key.get_ref().replace('_', "-");
        let mut arguments = command.get_arguments();
        let arg = arguments.find(|arg| arg.get_long() == Some(option.as_str()) && option != CONFIG);
        let Some(arg) = arg.filter(|arg| !matches!(arg.get_action(), ArgAction::Help)) else {
            bail!(
                "{}: there is no option {:?}; `cofferdam run --help` names those that there are",
                place(text, &key.span()),
                key.get_ref()
            );
        };
        let words = match (value.get_ref(), arg.get_action()) {
            (DeValue::Array(values), ArgAction::Append) => values
                .iter()
                .map(|value| word::<O>(text, arg, &option, value.get_ref(), &value.span()))
                .collect::<anyhow::Result<Vec<_>>>()?,
            (one, _) => vec![word::<O>(text, arg, &option, one, &value.span())?],
        };
        all.push((arg, words.into_iter().flatten().collect()));
    }
    Ok(all)
}

/// The word for one value, if it takes any, after the parser has looked at it.
fn word<O: Args>(
    text: &str,
    arg: &Arg,
    option: &str,
    value: &DeValue<'_>,
    span: &Range<usize>,
) -> anyhow::Result<Option<String>> {
    let at = || place(text, span);
    let word = match (value, arg.get_action().takes_values()) {
        (DeValue::Boolean(false), false) => return Ok(None),
        (DeValue::Boolean(true), false) => format!("--{option}"),
        (_, false) => bail!("{}: {option} is true or false", at()),
        (DeValue::String(value), true) => format!("--{option}={value}"),
        (DeValue::Integer(value), true) if value.radix() == 10 => {
            format!("--{option}={}", value.as_str())
        }
        (other, true) => {
            let once = match arg.get_action() {
                ArgAction::Append => "a text or an array of texts",
                _ => "a text or a number",
            };
            bail!("{}: {option} is {once}, not {}", at(), other.type_str());
        }
    };
    match Alone::<O>::try_parse_from([&word]) {
        // Alone it may lack what others give.
        Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
            bail!("{}: {}", at(), in_a_line(&error))
        }
        _ => Ok(Some(word)),
    }
}

fn in_a_line(error: &clap::Error) -> String {
    let line = usage_error(error).unwrap_or_else(|| "this is no option for a file".to_owned());
    let line = line.split("; usage:").next().unwrap_or_default();
    line.trim_end_matches("; more by --help").to_owned()
}

/// Where in the text something is, for a person.
fn place(text: &str, span: &Range<usize>) -> String {
    let before = text.get(..span.start).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before
        .rsplit('\n')
        .next()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    format!("line {line}, column {column}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::run::RunOptions;

    fn options(text: &str, typed: &str) -> Result<RunOptions, String> {
        let words = ["cofferdam", "run", "--config=x"].into_iter();
        let words = words.chain(typed.split_whitespace());
        let matches = crate::cli::Cli::command()
            .try_get_matches_from(words)
            .unwrap();
        let run = matches.subcommand_matches("run").unwrap();
        merged(text, run).map_err(|error| format!("{error:#}"))
    }

    const GUEST: &str = "kernel = \"/boot/vmlinux\"\nmemory = \"1G\"\nvcpus = 2\n\
                         net = [\"user\", \"tap=t0\"]\nno_reboot = true\nlazy = false\n";

    fn shown(options: &RunOptions) -> String {
        format!("{options:?}")
    }

    #[test]
    fn a_file_says_what_the_command_line_says() {
        let of_file = options(GUEST, "").unwrap();
        let words =
            "--kernel=/boot/vmlinux --memory=1G --vcpus=2 --net=user --net=tap=t0 --no-reboot";
        let of_words = Alone::<RunOptions>::try_parse_from(words.split(' '))
            .unwrap()
            .options;
        assert_eq!(shown(&of_file), shown(&of_words));
    }

    #[test]
    fn the_command_line_has_the_last_word() {
        let both = options(GUEST, "--memory=64M --net=user --name=web").unwrap();
        let words =
            "--kernel=/boot/vmlinux --memory=64M --vcpus=2 --net=user --no-reboot --name=web";
        let of_words = Alone::<RunOptions>::try_parse_from(words.split(' '))
            .unwrap()
            .options;
        assert_eq!(shown(&both), shown(&of_words));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_said_with_its_place() {
        for (text, at, says) in [
            (
                "kernel = \"x\"\nmemory = \"1M\"\n",
                "line 2, column 10",
                "at least 16M",
            ),
            ("kernel = \"x\"\nvcpus = 9\n", "line 2, column 9", "1..=8"),
            ("kernel = \"x\"\n  bogus = 1\n", "line 2, column 3", "bogus"),
            (
                "kernel = \"x\"\nconfig = \"y\"\n",
                "line 2, column 1",
                "config",
            ),
            ("help = true\n", "line 1, column 1", "help"),
            (
                "net = [\"user\",\n  \"fly\"]\n",
                "line 2, column 3",
                "tap=NAME",
            ),
            ("lazy = \"yes\"\n", "line 1, column 8", "true or false"),
            ("memory = [\"1G\"]\n", "line 1, column 10", "not array"),
            ("memory = 1.5\n", "line 1, column 10", "not float"),
            ("kernel = \"x\nmemory", "line 1", ""),
            ("kernel = \"x\"\nkernel = \"y\"\n", "line 2", ""),
            ("[guest]\nkernel = \"x\"\n", "line 1", "guest"),
        ] {
            let said = options(text, "").unwrap_err();
            assert!(said.contains(at) && said.contains(says), "{text:?}: {said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }

    #[test]
    fn what_a_file_lacks_is_said() {
        let said = options("memory = \"1G\"\n", "").unwrap_err();
        assert!(said.contains("--kernel"), "{said}");
        let said = options("snapshot = \"/x\"\nmemory = \"1G\"\n", "").unwrap_err();
        assert!(said.contains("cannot be used with"), "{said}");
        options("memory = \"1G\"\n", "--kernel=x").unwrap();
    }
}
