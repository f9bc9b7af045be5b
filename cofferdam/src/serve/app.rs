//! What all requests share.

use std::sync::Arc;

use super::ask::Asks;
use super::console::Readers;
use super::events::Watch;
use super::jobs::Jobs;
use super::look::Looks;
use crate::runtime_dir::RuntimeRoot;

/// What all requests share. Nothing of it outlives the service or has to.
#[derive(Debug)]
pub struct App {
    /// Where guests and devices are.
    pub root: RuntimeRoot,
    /// Guests that are made are in jails.
    pub jail: bool,
    /// Requests to them.
    pub asks: Asks,
    /// Looks at all of them.
    pub looks: Looks,
    /// Work that takes long.
    pub jobs: Jobs,
    /// Who reads consoles.
    pub consoles: Readers,
    /// What changes.
    pub watch: Watch,
}

impl App {
    /// For what runs in `root`; guests that are made are in jails with `jail`.
    pub fn new(root: RuntimeRoot, jail: bool) -> Arc<Self> {
        Arc::new(Self {
            root,
            jail,
            asks: Asks::default(),
            looks: Looks::default(),
            jobs: Jobs::default(),
            consoles: Readers::default(),
            watch: Watch::default(),
        })
    }
}
