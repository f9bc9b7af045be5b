//! The files of campaigns: whatever is in the folder may be of another program, cut, or huge.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use recovery::campaign::record::{FileError, Header, Lines, Record};
use recovery::campaign::summary::Summary;
use serde::Serialize;
use utoipa::ToSchema;

use crate::campaign::stream::Figures;
use crate::options::VmName;
use crate::report::campaign::plots;
use crate::serve::problem::{Code, Problem};

/// How a file of a campaign ends.
const ENDING: &str = ".jsonl";

/// Longest file that is looked at, in bytes: some hundred thousand trials.
const MAX_BYTES: u64 = 256 << 20;

/// Most campaigns in a list.
const MAX_LISTED: usize = 1000;

/// The folder of them.
#[derive(Debug, Clone)]
pub struct Files(PathBuf);

/// What a campaign is.
#[derive(Debug, Serialize, ToSchema)]
pub struct CampaignFacts {
    /// The driver's module.
    driver: String,
    /// Release of the guest's kernel.
    kernel: String,
    /// What decides its trials.
    seed: u64,
    /// Its kinds of faults.
    kinds: Vec<String>,
    /// Which stores of isolated calls are checked.
    #[schema(value_type = String)]
    contain: isolation::attach::request::Contain,
    /// What the guest does in a trial.
    #[schema(value_type = String)]
    steps: recovery::campaign::workload::Steps,
}

/// A campaign in a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct CampaignListed {
    /// Its name.
    name: String,
    /// How long its file is.
    bytes: u64,
    /// The job that is at it, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
    /// What it is; nothing while its first guest boots.
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<CampaignFacts>,
    /// Why its file cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<String>,
}

/// All campaigns.
#[derive(Debug, Serialize, ToSchema)]
pub struct CampaignList {
    /// By name, at most 1000.
    campaigns: Vec<CampaignListed>,
    /// How many are left out.
    left_out: usize,
}

/// A campaign with its figures.
#[derive(Debug, Serialize, ToSchema)]
pub struct CampaignView {
    /// Its name.
    name: String,
    /// How long its file is.
    bytes: u64,
    /// The job that is at it, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
    /// What it is; nothing while its first guest boots.
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<CampaignFacts>,
    /// Its figures, as `cofferdam campaign show --json`.
    #[schema(value_type = Object)]
    summary: Summary,
    /// The plots that there are of it.
    plots: Vec<String>,
}

impl From<Header> for CampaignFacts {
    fn from(header: Header) -> Self {
        Self {
            driver: header.workload.driver,
            kernel: header.kernel,
            seed: header.seed,
            kinds: header.kinds,
            contain: header.contain,
            steps: header.steps,
        }
    }
}

impl Files {
    /// Those in this folder.
    pub fn of(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// The file of the campaign `name`, which is no path.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}{ENDING}"))
    }

    /// All of them, with those that are `under_way` and have no file yet; `job` says which one is
    /// at one.
    pub fn list(
        &self,
        under_way: Vec<String>,
        job: impl Fn(&str) -> Option<String>,
    ) -> Result<CampaignList, Problem> {
        let cannot = |error: std::io::Error| {
            let detail = format!("cannot read {}: {error}", self.0.display());
            Problem::new(Code::Internal, detail)
        };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(cannot)? {
            let name = entry.map_err(cannot)?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(ENDING));
            // What cannot be named is not ours.
            names.extend(name.and_then(|name| name.parse::<VmName>().ok()));
        }
        let mut names: Vec<_> = names.iter().map(VmName::to_string).collect();
        names.extend(under_way);
        names.sort_unstable();
        names.dedup();
        let left_out = names.len().saturating_sub(MAX_LISTED);
        names.truncate(MAX_LISTED);
        let listed = |name: String| {
            let job = job(&name);
            self.listed(name, job)
        };
        Ok(CampaignList {
            campaigns: names.into_iter().filter_map(listed).collect(),
            left_out,
        })
    }

    /// One in the list; nothing if it has neither a file nor a job (any more).
    fn listed(&self, name: String, job: Option<String>) -> Option<CampaignListed> {
        let read = self.open(&name).and_then(|(mut lines, bytes)| {
            let what = match bytes {
                0 => None,
                _ => Some(header(&name, &mut lines)?.into()),
            };
            Ok((what, bytes))
        });
        let (what, bytes, unreadable) = match read {
            Ok((what, bytes)) => (what, bytes, None),
            Err(problem) if problem.is(Code::NoSuchCampaign) => {
                job.as_ref()?;
                (None, 0, None)
            }
            Err(problem) => (None, 0, Some(problem.detail().to_owned())),
        };
        Some(CampaignListed {
            name,
            bytes,
            job,
            what,
            unreadable,
        })
    }

    /// One of them. One that a `job` has only just begun has no file yet.
    pub fn view(&self, name: &str, job: Option<String>) -> Result<CampaignView, Problem> {
        let (mut lines, bytes) = match self.open(name) {
            Ok((lines, bytes)) => (Some(lines), bytes),
            Err(problem) if problem.is(Code::NoSuchCampaign) && job.is_some() => (None, 0),
            Err(problem) => return Err(problem),
        };
        let mut what = None;
        let mut summary = Summary::default();
        if let Some(lines) = lines.as_mut().filter(|_| bytes > 0) {
            what = Some(header(name, lines)?.into());
            summary = add_all(name, lines)?;
        }
        let drawn = plots(&summary).map_err(|error| Problem::new(Code::Internal, one(&error)))?;
        Ok(CampaignView {
            name: name.to_owned(),
            bytes,
            job,
            what,
            summary,
            plots: drawn.into_keys().collect(),
        })
    }

    /// The figures of one.
    pub fn summary(&self, name: &str) -> Result<Summary, Problem> {
        let (mut lines, _) = self.open(name)?;
        header(name, &mut lines)?;
        add_all(name, &mut lines)
    }

    /// What a job says of one that came to its end.
    pub fn figures(&self, name: &str) -> Result<Figures, Problem> {
        let summary = self.summary(name)?;
        Ok(Figures::new(&summary, summary.trials, 0))
    }

    /// One trial of one.
    pub fn trial(&self, name: &str, number: u32) -> Result<Record, Problem> {
        let (mut lines, _) = self.open(name)?;
        header(name, &mut lines)?;
        for record in lines {
            let record = record.map_err(|error| unreadable(name, &error))?;
            if record.trial.number == number {
                return Ok(record);
            }
        }
        let detail = format!("{name} has no trial {number}");
        Err(Problem::new(Code::NoSuchTrial, detail))
    }

    /// Its lines, and how many bytes they are.
    fn open(&self, name: &str) -> Result<(Lines<BufReader<File>>, u64), Problem> {
        let refused = |why: String| {
            let detail = format!("{name}{ENDING} cannot be read: {why}");
            Problem::new(Code::Refused, detail)
        };
        // A link would lead out of the folder, and a FIFO would be waited for.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.path(name))
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound => {
                    let detail = format!("there is no campaign {name}");
                    Problem::new(Code::NoSuchCampaign, detail)
                }
                _ => refused(error.to_string()),
            })?;
        let there = file
            .metadata()
            .map_err(|error| refused(error.to_string()))?;
        if !there.is_file() {
            return Err(refused("it is no file".to_owned()));
        }
        if there.len() > MAX_BYTES {
            let why = format!("it is longer than {MAX_BYTES} bytes; see `cofferdam campaign show`");
            return Err(refused(why));
        }
        Ok((Lines::new(BufReader::new(file)), there.len()))
    }
}

fn header(name: &str, lines: &mut Lines<BufReader<File>>) -> Result<Header, Problem> {
    lines.header().map_err(|error| unreadable(name, &error))
}

fn add_all(name: &str, lines: &mut Lines<BufReader<File>>) -> Result<Summary, Problem> {
    let mut summary = Summary::default();
    for record in lines {
        summary.add(&record.map_err(|error| unreadable(name, &error))?);
    }
    Ok(summary)
}

fn unreadable(name: &str, error: &FileError) -> Problem {
    let detail = format!("{name}{ENDING} is no campaign's file of this program: {error}");
    Problem::new(Code::Refused, detail.replace('\n', " "))
}

fn one(error: &anyhow::Error) -> String {
    crate::error_text::one_line(error)
}
