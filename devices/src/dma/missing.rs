//! Pages that come into the file behind guest memory when somebody touches them.

use std::fmt;
use std::io::Result;
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Who brings them.
pub trait MissingPages: fmt::Debug + Send + Sync {
    /// Brings pages for a further mapping of the file, too, which is at the addresses `at` and
    /// begins at `file_offset` of the file, in bytes. Nobody has touched it yet. To be kept as long
    /// as the mapping.
    ///
    /// # Errors
    /// The host's kernel refuses it.
    fn view(&self, at: Range<u64>, file_offset: u64) -> Result<ViewToken>;

    /// Parts of the file, in bytes and whole pages, outside of which the memory is zero, in rising
    /// order, whether they have come or not.
    ///
    /// # Errors
    /// The file system cannot say.
    fn data(&self) -> Result<Vec<Range<u64>>>;
}

/// Says that a further mapping is there.
#[derive(Debug, Default)]
pub struct ViewToken(Arc<()>);

impl ViewToken {
    /// Gone when the token is.
    pub fn watch(&self) -> Weak<()> {
        Arc::downgrade(&self.0)
    }
}
