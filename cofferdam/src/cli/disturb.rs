//! `disturb`: a NIC of a guest fails as hardware does, on purpose.

use std::ops::Range;

use anyhow::bail;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use devices::edge::{Direction, EdgeKind, EdgeOrder, When};

use super::isolation::ask;
use super::when::{parse_when, probability};
use super::{Ending, print_bytes, print_json};
use crate::control::protocol::{Disturbance, Reply, Request};
use crate::options::VmName;
use crate::words::{counted, number, ordinal};

/// `disturb`
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The device is not touched: what goes wrong stands between it and the guest, for models, NICs of device hosts and
passed-on functions alike. A reset of the guest leaves it; --undo ends it, and what it held up arrives. Faults of
interrupts are for models only: other NICs interrupt the guest by themselves. What a NIC reads and writes in memory
is not disturbed.

Examples:
  cofferdam disturb web --kind load_ones --range 0x8..0xc --when nth=100
  cofferdam disturb web 0 --kind load_flipped --when p=0.001 --seed 7
  cofferdam disturb web 0000:00:03.0 --kind removed
  cofferdam disturb web --kind interrupt_storm --when once --span 5000
  cofferdam disturb web --list
  cofferdam disturb web --undo")]
pub struct DisturbOptions {
    /// Name of the VM
    vm: VmName,
    /// Which NIC: its number from 0, or its PCI address in the guest, as `cofferdam status` shows
    /// it. May be left out where there is one
    nic: Option<String>,
    /// What goes wrong
    #[arg(
        long,
        value_parser = kinds(),
        required_unless_present_any = ["list", "undo"],
        conflicts_with_all = ["list", "undo"],
        hide_possible_values = false
    )]
    kind: Option<EdgeKind>,
    #[command(flatten)]
    place: PlaceOptions,
    /// At which of the accesses that match: once (the first), always, nth=N (every N-th),
    /// p=PROBABILITY
    #[arg(long, value_name = "WHEN", default_value = "always", value_parser = parse_when, conflicts_with_all = ["list", "undo"])]
    when: When,
    /// Not at the first so many of the accesses that match
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with_all = ["list", "undo"])]
    after: u64,
    /// What chance, and bits that --mask does not say, come from
    #[arg(long, value_name = "NUMBER", default_value_t = 0, conflicts_with_all = ["list", "undo"])]
    seed: u64,
    /// Which bits, for kinds that flip bits or have them stuck; otherwise one that the seed chooses
    #[arg(long, value_name = "BITS", value_parser = parse_number, conflicts_with_all = ["list", "undo"])]
    mask: Option<u64>,
    /// The value of load_value
    #[arg(long, value_name = "VALUE", value_parser = parse_number, conflicts_with_all = ["list", "undo"])]
    value: Option<u64>,
    /// Over how many later accesses, for kinds that are late, storm or flap
    #[arg(long, value_name = "ACCESSES", conflicts_with_all = ["list", "undo"])]
    span: Option<u32>,
    /// End all of it, or the disturbance of this number; of all NICs where none is named
    #[arg(long, value_name = "NUMBER", num_args = 0..=1, require_equals = true, conflicts_with = "list")]
    undo: Option<Option<u64>>,
    /// Show what goes wrong, and how often it has; of all NICs where none is named
    #[arg(long)]
    list: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Which accesses.
#[derive(Debug, clap::Args)]
struct PlaceOptions {
    /// Only accesses by this base address register, 0 to 5
    #[arg(long, value_name = "N", conflicts_with_all = ["list", "undo"])]
    bar: Option<u8>,
    /// Only accesses that touch these offsets, the last one excluded, such as 0x8..0xc
    #[arg(long, value_name = "FROM..TO", value_parser = parse_range, conflicts_with_all = ["list", "undo"])]
    range: Option<Range<u64>>,
    /// Only accesses of so many bytes
    #[arg(long, value_name = "BYTES", conflicts_with_all = ["list", "undo"])]
    width: Option<u8>,
    /// Only loads, or only stores
    #[arg(long, value_name = "load|store", value_parser = parse_direction, conflicts_with_all = ["list", "undo"])]
    access: Option<Direction>,
}

fn kinds() -> impl TypedValueParser<Value = EdgeKind> {
    let value = |kind: EdgeKind| PossibleValue::new(kind.name()).help(kind.sentence());
    PossibleValuesParser::new(EdgeKind::ALL.map(value))
        .try_map(|name| EdgeKind::from_name(&name).ok_or("there is no such kind"))
}

fn parse_number(text: &str) -> Result<u64, String> {
    number(text).ok_or_else(|| "give a number such as 12 or 0x1c".to_owned())
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let wrong = || "give two offsets such as 0x8..0xc".to_owned();
    let (from, to) = text.split_once("..").ok_or_else(wrong)?;
    let range = parse_number(from)?..parse_number(to)?;
    match range.is_empty() {
        true => Err("there is nothing in it: give the lower offset first".to_owned()),
        false => Ok(range),
    }
}

fn parse_direction(text: &str) -> Result<Direction, String> {
    match text {
        "load" => Ok(Direction::Load),
        "store" => Ok(Direction::Store),
        _ => Err("give load or store".to_owned()),
    }
}

impl DisturbOptions {
    /// `disturb`
    pub fn run(self) -> anyhow::Result<Ending> {
        let (vm, json) = (self.vm.clone(), self.json);
        let (request, none) = match (self.undo, self.list) {
            (Some(number), _) => {
                let nic = self.nic;
                (Request::Undisturb { nic, number }, "nothing was disturbed")
            }
            (None, true) => {
                let nic = self.nic;
                (Request::Disturbances { nic }, "nothing is disturbed")
            }
            (None, false) => (self.request()?, ""),
        };
        let disturbances = match ask(&vm, &request)? {
            Reply::Disturbed(disturbance) if json => {
                print_json(&disturbance)?;
                return Ok(Ending::SUCCESS);
            }
            Reply::Disturbed(disturbance) => vec![disturbance],
            Reply::Disturbances { disturbances } => disturbances,
            _ => bail!("the VM answered something else"),
        };
        if json {
            print_json(&disturbances)?;
        } else if disturbances.is_empty() {
            print_bytes(format!("{none}\n").as_bytes())?;
        } else {
            let text: String = disturbances.iter().map(text).collect();
            print_bytes(text.as_bytes())?;
        }
        Ok(Ending::SUCCESS)
    }

    fn request(self) -> anyhow::Result<Request> {
        let Some(kind) = self.kind else {
            bail!("say what goes wrong: --kind");
        };
        let order = EdgeOrder {
            kind,
            direction: self.place.access,
            bar: self.place.bar,
            offsets: self.place.range,
            width: self.place.width,
            after: self.after,
            when: self.when,
            seed: self.seed,
            mask: self.mask,
            value: self.value,
            span: self.span,
        };
        // What is wrong with it is known without the VM.
        order.check()?;
        let nic = self.nic;
        Ok(Request::Disturb { nic, order })
    }
}

/// A disturbance for a person.
fn text(disturbance: &Disturbance) -> String {
    let Disturbance { nic, status } = disturbance;
    let order = &status.order;
    let when = match order.when {
        When::Once => "once".to_owned(),
        When::Always => "always".to_owned(),
        When::Nth(n) => format!("every {} time", ordinal(n)),
        When::Chance(parts) => {
            format!(
                "with probability {} by seed {}",
                probability(parts),
                order.seed
            )
        }
    };
    let mut place = String::new();
    if let Some(bar) = order.bar {
        place.push_str(&format!(" BAR {bar}"));
    }
    if let Some(range) = &order.offsets {
        place.push_str(&format!(" {:#x}..{:#x}", range.start, range.end));
    }
    if !place.is_empty() {
        place.insert_str(0, " at");
    }
    if order.after > 0 {
        place.push_str(&format!(" after the first {}", order.after));
    }
    format!(
        "{nic}: {}: {}{place} {when}; it has struck {}, {} matched\n",
        status.number,
        order.kind.name(),
        counted(status.struck, "time", "times"),
        status.matched
    )
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use devices::edge::EdgeStatus;

    use devices::edge::MILLION;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: DisturbOptions,
    }

    fn parse(words: &str) -> Result<DisturbOptions, clap::Error> {
        let words = std::iter::once("disturb").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
    }

    #[test]
    fn what_is_typed_is_what_is_asked_for() {
        let words = "web 1 --kind load_flipped --bar 0 --range 0x8..0xc --width 4 --access load \
                     --when p=0.25 --seed 7 --mask 0x10";
        let order = EdgeOrder::new(EdgeKind::LoadFlipped)
            .bar(0)
            .offsets(8..12)
            .width(4)
            .direction(Direction::Load)
            .when(When::Chance(MILLION / 4))
            .seed(7)
            .mask(0x10);
        assert_eq!(
            parse(words).unwrap().request().unwrap(),
            Request::Disturb {
                nic: Some("1".to_owned()),
                order
            }
        );
        assert_eq!(parse("web --undo").unwrap().undo, Some(None));
        assert_eq!(parse("web 0 --undo=3").unwrap().undo, Some(Some(3)));
        assert!(parse("web --list --json").unwrap().list);
    }

    #[test]
    fn nonsense_is_refused_before_the_vm_is_asked() {
        for words in [
            "web",
            "web --kind gremlin",
            "web --kind removed --undo",
            "web --kind removed --list",
            "web --list --bar 0",
            "web --kind load_ones --range 8..8",
            "web --kind load_ones --range 0x+8..9",
            "web --kind load_ones --range 8",
            "web --kind load_ones --when nth=0",
            "web --kind load_ones --when p=0",
            "web --kind load_ones --when p=1.5",
            "web --kind load_ones --when p=NaN",
            "web --kind load_ones --when sometimes",
            "web --kind load_ones --access both",
        ] {
            assert!(parse(words).is_err(), "{words}");
        }
        for words in [
            "web --kind load_ones --bar 6",
            "web --kind load_ones --mask 1",
            "web --kind load_value",
            "web --kind interrupt_lost --bar 0",
            "web --kind interrupt_storm --span 0",
        ] {
            assert!(parse(words).unwrap().request().is_err(), "{words}");
        }
    }

    #[test]
    fn what_goes_wrong_is_said_in_english() {
        let said = |order| {
            text(&Disturbance {
                nic: "0000:00:02.0".to_owned(),
                status: EdgeStatus {
                    number: 2,
                    order,
                    matched: 9,
                    struck: 3,
                },
            })
        };
        let order = EdgeOrder::new(EdgeKind::LoadOnes);
        assert_eq!(
            said(order.clone().bar(0).offsets(8..12).when(When::Nth(3))),
            "0000:00:02.0: 2: load_ones at BAR 0 0x8..0xc every 3rd time; it has struck 3 times, 9 matched\n"
        );
        assert!(said(order.clone().when(When::Once)).contains("load_ones once;"));
        assert!(said(order.clone().after(4)).contains("load_ones after the first 4 always;"));
        let chance = said(order.when(When::Chance(1000)).seed(4));
        assert!(chance.contains("with probability 0.001 by seed 4;"));
    }
}
