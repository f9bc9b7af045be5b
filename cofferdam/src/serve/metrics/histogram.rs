//! Histograms that other processes have kept, as OpenMetrics shows them.

use std::fmt::Error;
use std::sync::{Mutex, PoisonError};

use isolation::status::histogram::{BOUNDS_NS, Histogram};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

const NS_PER_SECOND: f64 = 1e9;

/// One histogram of a family, in seconds.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Histogram>);

impl Kept {
    /// Shows what another process has counted, beside what is there.
    pub fn join(&self, other: &Histogram) {
        let mut own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        own.join(other);
    }
}

impl TypedMetric for Kept {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Kept {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), Error> {
        let own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = |ns: u64| ns as f64 / NS_PER_SECOND;
        let bounds = BOUNDS_NS.iter().copied().map(seconds);
        let counts = own.counts();
        // The encoder makes sums of them.
        let bounds = bounds.chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        encoder.encode_histogram::<NoLabelSet>(seconds(own.sum_ns()), own.count(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

/// The lowest bound as Go and the OpenMetrics specification (1.0, *Canonical Numbers*) write it:
/// the encoder does otherwise for this one.
pub fn canonical(text: &str) -> String {
    // A quotation mark in a label's value is escaped: this is a label, and no value's part.
    text.replace("{le=\"0.00001\"", "{le=\"1e-05\"")
}
