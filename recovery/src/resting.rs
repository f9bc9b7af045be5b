//! Devices that were suspended, until they are wanted again.

/// Devices that rest.
#[derive(Debug, Clone)]
pub(crate) struct Resting<D> {
    /// Which instance of the module has them.
    pub instance: String,
    /// Their folders in sysfs.
    pub folders: Vec<String>,
    /// Their state when they came to rest.
    pub state: Option<D>,
    /// They were put into D3hot.
    pub asleep: bool,
}
