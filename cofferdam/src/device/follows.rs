//! Has a function of the host reach the memory that its VM has.

use std::sync::Arc;

use devices::dma::{DmaListener, DmaRegion};
use devices::vfio::dma::DmaMemory;
use devices::vfio::passed::PassedError;

/// The memory that there is, if there is any.
pub type Reached = Result<Option<Arc<DmaMemory>>, PassedError>;

/// Hears which regions have gone and come.
type Changed = Box<dyn Fn(&[DmaRegion], &[DmaRegion]) -> Reached + Send + Sync>;

/// Tells a function what of its VM's memory has gone and come.
pub struct Follows(Changed);

impl Follows {
    /// A listener for a function that is told by `changed`.
    pub fn by(
        changed: impl Fn(&[DmaRegion], &[DmaRegion]) -> Reached + Send + Sync + 'static,
    ) -> Arc<dyn DmaListener> {
        Arc::new(Self(Box::new(changed)))
    }
}

impl DmaListener for Follows {
    /// A thread allocates what there is, as long as the function has it, so that the device gets it
    /// sooner.
    fn changed(&self, removed: &[DmaRegion], added: &[DmaRegion]) {
        let memory = match (self.0)(removed, added) {
            Ok(Some(memory)) => memory,
            Ok(None) => return,
            Err(error) => {
                tracing::error!("the device does not reach a guest's memory: {error}");
                return;
            }
        };
        let thread = std::thread::Builder::new()
            .name("populate".to_owned())
            .spawn(move || memory.populate(|| Arc::strong_count(&memory) > 1));
        if let Err(error) = thread {
            tracing::debug!("guest memory is not allocated in advance: {error}");
        }
    }
}
