//! Whether a module's drivers can suspend and resume their devices.

use serde::Serialize;

use super::facts::{self, DRIVER_SUFFIX};
use super::image::Ko;
use super::operations::{Operations, PointsAt};

/// A driver that the module registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Driver {
    /// Its structure: `pci_driver`.
    pub structure: String,
    /// The object.
    pub object: String,
    /// Its suspend function, with the member that it is in.
    pub suspend: Option<String>,
    /// Its resume function.
    pub resume: Option<String>,
}

/// The drivers among a module's operations.
pub fn drivers(ko: &Ko<'_>, operations: &[Operations]) -> Vec<Driver> {
    let name_of = |to: PointsAt| match to {
        PointsAt::Function(index) => ko
            .functions
            .get(index)
            .map(|function| function.name.to_owned()),
        PointsAt::Import(index) => ko.imports.get(index).map(|name| (*name).to_owned()),
        PointsAt::Data(..) => None,
    };
    let drivers = operations.iter().filter_map(|driver| {
        let layout = driver
            .layout
            .as_ref()
            .filter(|layout| layout.name.ends_with(DRIVER_SUFFIX))?;
        // `dev_pm_ops` that the driver points at, wherever the pointer is.
        let pm = driver.pointers.iter().filter_map(|(offset, to)| {
            let slot = driver.slot(*offset)?;
            let is_pm = slot.path == "pm" || slot.path.ends_with(".pm");
            let PointsAt::Data(section, target) = to else {
                return None;
            };
            let object = ko.object_around(*section, *target).filter(|_| is_pm)?;
            operations.iter().find(|other| other.object == object)
        });
        let tables: Vec<&Operations> = std::iter::once(driver).chain(pm).collect();
        // Of the kernel's or another module's, which has both (`snd_soc_pm_ops`).
        let of_others = driver.pointers.iter().find_map(|(offset, to)| {
            let path = &driver.slot(*offset)?.path;
            let is_pm = path == "pm" || path.ends_with(".pm");
            matches!(to, PointsAt::Import(_))
                .then(|| name_of(*to))
                .flatten()
                .filter(|_| is_pm)
        });
        let find = |members: &[&str]| {
            let of = |member: &&str| {
                tables
                    .iter()
                    .find_map(|table| Some((table, table.member(member)?)))
            };
            let (member, (table, to)) = members
                .iter()
                .find_map(|member| Some((member, of(member)?)))?;
            let structure = table
                .layout
                .as_ref()
                .map_or("", |layout| layout.name.as_str());
            Some(format!("{} ({structure}.{member})", name_of(to)?))
        };
        Some(Driver {
            structure: layout.name.clone(),
            object: ko
                .objects
                .get(driver.object)
                .map_or("", |object| object.name)
                .to_owned(),
            suspend: find(&facts::LINUX.suspends).or_else(|| of_others.clone()),
            resume: find(&facts::LINUX.resumes).or(of_others),
        })
    });
    drivers.collect()
}
