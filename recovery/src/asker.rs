//! Who asked for something that takes long: is told what is done, and may have gone meanwhile.

/// Whoever asked has gone away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("whoever asked for this has gone away")]
pub struct Gone;

/// Who asked for something.
pub trait Asker {
    /// Tells in a few words what is done next.
    ///
    /// # Errors
    /// [`Gone`]: nobody listens any more. What has not been begun should not be; what has to be
    /// ended is ended.
    fn tell(&self, what: &str) -> Result<(), Gone>;
}

/// Nobody in particular: a rung of a ladder.
#[derive(Debug, Clone, Copy)]
pub struct Nobody;

impl Asker for Nobody {
    fn tell(&self, what: &str) -> Result<(), Gone> {
        tracing::debug!("{what}");
        Ok(())
    }
}
