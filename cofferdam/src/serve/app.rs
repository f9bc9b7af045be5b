//! What all requests share.

use std::sync::Arc;

use axum::extract::FromRef;

use super::ask::Asks;
use super::campaigns::Campaigns;
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
    /// The control group that theirs are in, if they are to have some.
    pub cgroup: Option<String>,
    /// Requests to them.
    pub asks: Asks,
    /// Looks at all of them.
    pub looks: Looks,
    /// Work that takes long.
    pub jobs: Jobs,
    /// Where campaigns are, if there are any.
    pub campaigns: Option<Campaigns>,
    /// Who reads consoles.
    pub consoles: Readers,
    /// What changes.
    pub watch: Watch,
}

impl App {
    /// For what runs in `root`; guests that are made are in jails with `jail`, and in control groups
    /// below `cgroup`.
    pub fn new(
        root: RuntimeRoot,
        jail: bool,
        cgroup: Option<String>,
        campaigns: Option<Campaigns>,
    ) -> Arc<Self> {
        Arc::new(Self {
            asks: Asks::new(root.clone()),
            looks: Looks::new(root.clone()),
            watch: Watch::new(root.clone()),
            root,
            jail,
            cgroup,
            campaigns,
            jobs: Jobs::default(),
            consoles: Readers::default(),
        })
    }
}

// What a request needs that is about one of these alone.

impl FromRef<Arc<App>> for Asks {
    fn from_ref(app: &Arc<App>) -> Self {
        app.asks.clone()
    }
}

impl FromRef<Arc<App>> for Jobs {
    fn from_ref(app: &Arc<App>) -> Self {
        app.jobs.clone()
    }
}

impl FromRef<Arc<App>> for Readers {
    fn from_ref(app: &Arc<App>) -> Self {
        app.consoles.clone()
    }
}

impl FromRef<Arc<App>> for Watch {
    fn from_ref(app: &Arc<App>) -> Self {
        app.watch.clone()
    }
}
