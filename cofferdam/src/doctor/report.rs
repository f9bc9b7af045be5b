//! What the doctor found: data for programs, a table for people.

use serde::Serialize;

use super::speed::Speed;

/// Version of the JSON document.
pub const SCHEMA: u32 = 1;

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where Linux guests can run.
    pub linux_guests: Where,
    /// `ept`, `npt` or `shadow`: the short name of what [`Speed::second_stage`] says, for reports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second_stage: Option<&'static str>,
    /// The processor's name.
    pub cpu: String,
    /// Processors this process may use.
    pub cpus: usize,
    /// Release of the host's kernel.
    pub kernel: String,
    /// What a guest's kernel mode costs; absent where no VM could be run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// One entry for each thing looked at.
    pub checks: Vec<Check>,
}

/// Where Linux guests can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Where {
    /// On this host's KVM.
    Host,
    /// In the lab, an emulated server on this host.
    Lab,
    /// Neither, until something that is missing is installed.
    Nowhere,
}

/// How something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Good,
    /// Usable, or only needed for some uses.
    Limited,
    /// Not there.
    Missing,
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// How it was found.
    pub state: State,
    /// What was found, in words.
    pub found: String,
    /// What to do; absent when nothing is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

impl Check {
    /// Nothing to be done.
    pub fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Good,
            found: found.into(),
            advice: None,
        }
    }

    /// Works in part; `advice` says how to get the rest.
    pub fn limited(
        name: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            name,
            state: State::Limited,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    /// Does not work; `advice` says what to do.
    pub fn missing(
        name: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            name,
            state: State::Missing,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }
}

impl Report {
    /// The findings as text: a line for each check, advice below, the verdict at the end.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}, {} CPUs, Linux {}\n\n",
            self.cpu, self.cpus, self.kernel
        );
        let width = self
            .checks
            .iter()
            .map(|check| check.name.chars().count())
            .max()
            .unwrap_or(0);
        for check in &self.checks {
            let mark = match check.state {
                State::Good => "ok     ",
                State::Limited => "limited",
                State::Missing => "MISSING",
            };
            text += &format!("{mark}  {:width$}  {}\n", check.name, check.found);
            if let Some(advice) = &check.advice {
                text += &format!("         {:width$}  -> {advice}\n", "");
            }
        }
        text += "\n";
        text += match self.linux_guests {
            Where::Host => {
                "Linux guests run on this host's KVM at full speed: use `cofferdam run`.\n"
            }
            Where::Lab => {
                "Linux guests do not run on this host's KVM: use the lab, `cargo xtask lab -- COMMAND`. \
                 Small hand-made guests and the tests of the KVM interface do run here where KVM is usable.\n"
            }
            Where::Nowhere => {
                "Linux guests run neither on this host's KVM nor in the lab: follow the advice above, \
                 `cargo xtask setup` installs the lab.\n"
            }
        };
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(linux_guests: Where, checks: Vec<Check>) -> Report {
        Report {
            schema: SCHEMA,
            linux_guests,
            second_stage: None,
            cpu: "cpu".into(),
            cpus: 2,
            kernel: "6.1".into(),
            speed: None,
            checks,
        }
    }

    #[test]
    fn advice_stands_below_what_it_is_about() {
        let checks = vec![
            Check::good("memory", "4 GiB"),
            Check::missing("TAP", "no /dev/net/tun", "load tun"),
        ];
        let table = report(Where::Host, checks).table();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[2], "ok       memory  4 GiB");
        assert_eq!(lines[3], "MISSING  TAP     no /dev/net/tun");
        assert_eq!(lines[4].trim(), "-> load tun");
    }

    #[test]
    fn verdict_names_the_place() {
        for (place, word) in [
            (Where::Host, "cofferdam run"),
            (Where::Lab, "xtask lab"),
            (Where::Nowhere, "xtask setup"),
        ] {
            assert!(report(place, vec![]).table().contains(word));
        }
    }
}
