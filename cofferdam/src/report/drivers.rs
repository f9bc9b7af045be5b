//! How much sooner a failed call of each driver is over than a restart of it, as data and as a
//! table.

use serde::{Deserialize, Serialize};

use super::{Phase, RecoveryRun, Stat};
use crate::table::{number, table};

/// How many times as long as taking a failed call back a restart is to take.
pub const AIM: f64 = 1000.0;

/// Why a restart does not take [`AIM`] times as long as taking a failed call back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// Its restart: had the caller run again as soon as all was put back, it would not either.
    Restart,
    /// The way back to the caller: what was put back was put back soon enough.
    WayBack,
}

/// How a driver is got back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DriverRecovery {
    /// Its module.
    pub driver: String,
    /// What it drives.
    pub what: String,
    /// From before it is removed until it works again, natively, in microseconds of the host's
    /// clock.
    pub restart_us: Stat,
    /// Each of these, in the order they were made.
    pub restarts_us: Vec<f64>,
    /// Functions of which calls failed.
    pub functions: Vec<FunctionRecovery>,
}

/// How failed calls of one function were taken back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FunctionRecovery {
    /// Its name.
    pub function: String,
    /// Where in it the faults were: offsets that calls come to, in bytes.
    pub offsets: Vec<u64>,
    /// Each call that failed and had not gone on in the guest before.
    pub atomic: Vec<RecoveryRun>,
    /// Each of the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spilled: Vec<RecoveryRun>,
    /// Calls in which the device had been reached by then.
    pub reached_device: u64,
    /// Calls of which something stays, or that lost the device: the driver begins anew.
    pub begun_anew: u64,
    /// Why no more were measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

impl FunctionRecovery {
    /// From the fault to the caller about to run again, of atomic calls, in microseconds.
    pub fn returned_us(&self) -> Vec<f64> {
        let ends = self.atomic.iter();
        ends.filter_map(|run| run.at_us.get(&Phase::Returned).copied())
            .collect()
    }

    /// From the fault to memory, kernel and device as they were before the call, of atomic calls,
    /// in microseconds.
    pub fn put_back_us(&self) -> Vec<f64> {
        let steps = [Phase::Memory, Phase::Compensate, Phase::Device];
        let last = |run: &RecoveryRun| {
            let steps = steps.iter().filter_map(|step| run.at_us.get(step));
            steps.copied().reduce(f64::max)
        };
        self.atomic.iter().filter_map(last).collect()
    }
}

impl DriverRecovery {
    /// The same of all of its functions.
    pub fn returned_us(&self) -> Option<Stat> {
        let all = self.functions.iter();
        let all: Vec<f64> = all.flat_map(FunctionRecovery::returned_us).collect();
        Stat::from_samples(&all)
    }

    /// [`FunctionRecovery::put_back_us`] of all of its functions.
    pub fn put_back_us(&self) -> Option<Stat> {
        let all = self.functions.iter();
        let all: Vec<f64> = all.flat_map(FunctionRecovery::put_back_us).collect();
        Stat::from_samples(&all)
    }

    /// Why the median is not [`AIM`], if it is not.
    pub fn short(&self) -> Option<Short> {
        self.times().filter(|times| *times < AIM)?;
        let put_back = self.put_back_us()?.p50;
        Some(match self.restart_us.p50 < AIM * put_back {
            true => Short::Restart,
            false => Short::WayBack,
        })
    }

    /// How many times as long a restart takes, by the medians.
    pub fn times(&self) -> Option<f64> {
        let returned = self.returned_us()?.p50;
        (returned > 0.0).then(|| self.restart_us.p50 / returned)
    }
}

/// A table with a line for each driver.
pub fn text(drivers: &[DriverRecovery]) -> String {
    if drivers.is_empty() {
        return String::new();
    }
    let mut rows = table(&[
        "driver",
        "what it drives",
        "faults",
        "put back, us: median",
        "returned, us: median",
        "smallest to largest",
        "restart, ms: median",
        "smallest to largest",
        "n",
        "times as long",
        "less than 1000 for",
        "began anew",
    ]);
    let us = |us: f64| format!("{us:.0}");
    let ms = |us: f64| format!("{:.0}", us / 1e3);
    for driver in drivers {
        let returned = driver.returned_us();
        let of = |text: fn(&Stat) -> String| returned.as_ref().map_or_else(String::new, text);
        let anew = driver.functions.iter().map(|one| one.begun_anew);
        let restart = &driver.restart_us;
        rows.add_row(vec![
            driver.driver.as_str().into(),
            driver.what.as_str().into(),
            number(of(|stat| stat.n.to_string())),
            number(
                driver
                    .put_back_us()
                    .map_or_else(String::new, |stat| us(stat.p50)),
            ),
            number(
                returned
                    .as_ref()
                    .map_or_else(String::new, |stat| us(stat.p50)),
            ),
            number(of(|stat| format!("{:.0} to {:.0}", stat.min, stat.max))),
            number(ms(restart.p50)),
            number(format!("{} to {}", ms(restart.min), ms(restart.max))),
            number(restart.n),
            number(
                driver
                    .times()
                    .map_or_else(String::new, |times| format!("{times:.0}")),
            ),
            match driver.short() {
                None => "",
                Some(Short::Restart) => "its short restart",
                Some(Short::WayBack) => "the way back",
            }
            .into(),
            number(anew.fold(0, u64::saturating_add)),
        ]);
    }
    format!("{rows}\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn run(returned: f64) -> RecoveryRun {
        let at_us = [
            (Phase::Detect, 1.0),
            (Phase::Memory, returned / 2.0),
            (Phase::Returned, returned),
        ];
        let at_us = at_us.into();
        RecoveryRun {
            at_us,
            ..RecoveryRun::default()
        }
    }

    fn function(atomic: &[f64], spilled: &[f64]) -> FunctionRecovery {
        let runs = |all: &[f64]| all.iter().map(|us| run(*us)).collect();
        FunctionRecovery {
            function: "f".into(),
            offsets: vec![5],
            atomic: runs(atomic),
            spilled: runs(spilled),
            reached_device: 0,
            begun_anew: 1,
            ended: None,
        }
    }

    #[test]
    fn the_ratio_is_of_the_medians_and_calls_that_went_on_in_the_guest_are_not_in_it() {
        let restarts_us = vec![1e6, 3e6, 2e6];
        let mut driver = DriverRecovery {
            driver: "d".into(),
            what: "software".into(),
            restart_us: Stat::from_samples(&restarts_us).unwrap(),
            restarts_us,
            functions: vec![function(&[500.0, 400.0], &[9e9]), function(&[1000.0], &[])],
        };
        assert_eq!(driver.returned_us().unwrap().n, 3);
        assert_eq!(driver.times(), Some(4000.0));
        let text = text(std::slice::from_ref(&driver));
        for part in ["500", "400 to 1000", "2000", "1000 to 3000", "4000"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(driver.put_back_us().unwrap().p50, 250.0);
        assert_eq!(driver.short(), None);
        // 300 times, and 600 if there were no way back.
        driver.restart_us.p50 = 150e3;
        assert_eq!(driver.short(), Some(Short::Restart));
        assert!(super::text(std::slice::from_ref(&driver)).contains("its short restart"));
        driver.restart_us.p50 = 400e3;
        assert_eq!(driver.short(), Some(Short::WayBack));
        driver.functions.clear();
        assert_eq!(driver.times(), None);
        assert!(super::text(&[driver]).contains("software"));
        assert!(super::text(&[]).is_empty());
    }
}
