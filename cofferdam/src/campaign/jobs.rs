//! Several VMs that make a campaign's trials, each its own; what came of them is written in the
//! trials' order.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use recovery::campaign::plan::Trial;
use recovery::campaign::record::Record;

use super::worker::Worker;
use super::{CampaignOptions, make};

/// Trials that are to be made.
pub struct Jobs<'a, I> {
    pub options: &'a CampaignOptions,
    /// How many VMs make them.
    pub vms: u32,
    /// Those that nobody has taken, in their order.
    pub left: Mutex<I>,
    /// No more are to be taken.
    pub stop: AtomicBool,
}

/// What those who make trials say.
enum Said {
    /// For people.
    Words(String),
    /// A trial was made.
    Made(Record),
    /// No further VM can be had.
    Failed(anyhow::Error),
}

impl<'a, I: Iterator<Item = &'a Trial> + Send> Jobs<'_, I> {
    /// Has all made that are left, the first in `first`; `before` of the campaign's were made
    /// earlier. `write` is given each in the order of their numbers, and gives `false` to stop.
    pub fn make_all(
        &self,
        first: Worker,
        before: usize,
        progress: &mut dyn FnMut(&str),
        write: &mut dyn FnMut(&Record) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let (say, said) = channel();
        std::thread::scope(|scope| {
            let mut first = Some(first);
            for number in 0..self.vms {
                let (worker, say) = (first.take(), say.clone());
                scope.spawn(move || {
                    let name = (self.vms > 1).then_some(number + 1);
                    if let Err(error) = self.work(worker, name, &say) {
                        // Nobody listens once it is over.
                        let _ = say.send(Said::Failed(error));
                    }
                });
            }
            drop(say);
            let ended = listen(&said, before, progress, write);
            self.stop.store(true, Ordering::Relaxed);
            if ended.is_err() && self.vms > 1 {
                progress("one VM is lost: waiting for the others to end their trials");
            }
            ended
        })
    }

    /// Makes one trial after the other.
    fn work(
        &self,
        worker: Option<Worker>,
        name: Option<u32>,
        say: &Sender<Said>,
    ) -> anyhow::Result<()> {
        let mut tell = |words: &str| {
            let words = match name {
                Some(name) => format!("VM {name}: {words}"),
                None => words.to_owned(),
            };
            let _ = say.send(Said::Words(words));
        };
        let mut worker = match worker {
            Some(worker) => worker,
            None => Worker::start(&self.options.setup, &self.options.kinds, &mut tell)?,
        };
        while let Some(trial) = self.next() {
            let record = make(trial, None, self.options, &mut worker, &mut tell)?;
            if say.send(Said::Made(record)).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn next(&self) -> Option<&'a Trial> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        self.left
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next()
    }
}

/// Hears of trials until all are made, one fails, or no more are wanted.
fn listen(
    said: &Receiver<Said>,
    before: usize,
    progress: &mut dyn FnMut(&str),
    write: &mut dyn FnMut(&Record) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let mut early = BTreeMap::new();
    let mut written = before;
    for said in said {
        match said {
            Said::Words(words) => progress(&words),
            Said::Failed(error) => return Err(error),
            Said::Made(record) => {
                early.insert(record.trial.number as usize, record);
                while let Some(record) = early.remove(&(written + 1)) {
                    if !write(&record)? {
                        return Ok(());
                    }
                    written += 1;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use isolation::mutation::Kind;
    use recovery::campaign::kind::TrialKind;

    fn made(number: u32) -> Said {
        Said::Made(Record {
            trial: Trial {
                number,
                kind: TrialKind::Code(Kind::Nop),
                function: "f".to_owned(),
                offset: 0,
                seed: 0,
            },
            says: String::new(),
            steps: Vec::new(),
            runs: BTreeMap::new(),
            took_ms: 0,
        })
    }

    /// What is written of what is said, with `most` of them wanted.
    fn written(said: Vec<Said>, before: usize, most: usize) -> (anyhow::Result<()>, Vec<u32>) {
        let (say, hear) = channel();
        said.into_iter().for_each(|said| say.send(said).unwrap());
        drop(say);
        let mut written = Vec::new();
        let mut write = |record: &Record| {
            written.push(record.trial.number);
            Ok(written.len() < most)
        };
        let ended = listen(&hear, before, &mut |_| {}, &mut write);
        (ended, written)
    }

    #[test]
    fn trials_are_written_in_their_order_whichever_vm_is_first() {
        let said = [3, 1, 2, 5, 4].map(made);
        let (ended, order) = written(said.into(), 0, 9);
        assert_eq!((ended.is_ok(), order), (true, vec![1, 2, 3, 4, 5]));
        // A campaign that is gone on with.
        let (_, order) = written([9, 8].map(made).into(), 7, 9);
        assert_eq!(order, [8, 9]);
    }

    #[test]
    fn a_hole_is_not_written_over_and_an_end_is_an_end() {
        let failed = Said::Failed(anyhow::anyhow!("no VM"));
        let (ended, order) = written(vec![made(1), made(3), failed, made(2)], 0, 9);
        assert_eq!((ended.is_err(), order), (true, vec![1]));
        let (ended, order) = written([1, 2, 3].map(made).into(), 0, 2);
        assert_eq!((ended.is_ok(), order), (true, vec![1, 2]));
    }
}
