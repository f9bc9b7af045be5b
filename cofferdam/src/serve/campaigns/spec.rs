//! What a campaign is made of, as it is asked for, and as `cofferdam campaign` takes it.

use std::path::Path;

use clap::Parser;
use serde::Deserialize;
use utoipa::ToSchema;

use super::files::Files;
use crate::cli::{Cli, usage_error};
use crate::options::VmName;
use crate::serve::problem::{Code, Problem};
use crate::serve::spec::is_absolute;

/// Most VMs of one campaign at a time.
const MAX_VMS: u32 = 16;

/// What a campaign is made of: options of `cofferdam campaign`, of the same names and in the same
/// words. Paths are absolute.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CampaignSpec {
    /// Its name, of which its file is called: `NAME.jsonl` in the service's folder for campaigns.
    #[schema(required)]
    name: String,
    /// The driver's module, one for which there is a workload: `e1000` (when not given),
    /// `null_blk`, `dummy`.
    driver: Option<String>,
    /// A file with the workload for another driver, in place of `driver`.
    workload: Option<String>,
    /// Kinds of faults, or `code` or `edge`; all when not given.
    kinds: Vec<String>,
    /// Functions that are isolated and get faults; those of the workload when not given.
    functions: Vec<String>,
    /// In which ways each fault is tried: `native`, `once`, `stays`; in all when not given.
    ways: Vec<String>,
    /// What the guest does in a trial: `called` (when not given) or `all`.
    steps: Option<String>,
    /// Which stores of isolated calls are checked: `page` (when not given) or `exact`.
    stores: Option<String>,
    /// How many faults, 1 to 100000; 30 when not given.
    #[schema(minimum = 1, maximum = 100_000)]
    trials: Option<u32>,
    /// In how many VMs at a time, 1 to 16; 1 when not given.
    #[schema(minimum = 1, maximum = 16)]
    jobs: Option<u32>,
    /// What decides which faults; 1 when not given.
    seed: Option<u64>,
    /// Folder with the images of its guests; the service's when not given.
    images: Option<String>,
}

/// How a trial is made once more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReplaySpec {
    /// Folder with the images of its guest; the service's when not given.
    images: Option<String>,
}

impl CampaignSpec {
    /// Its name, and words for `cofferdam`, the same for the same spec.
    pub fn words(&self, files: &Files, images: &Path) -> Result<(VmName, Vec<String>), Problem> {
        let name: VmName = self
            .name
            .parse()
            .map_err(|error| wrong(format!("name: {error}")))?;
        is_absolute("workload", self.workload.as_deref())?;
        if self.jobs.is_some_and(|jobs| jobs > MAX_VMS) {
            return Err(wrong(format!("jobs: there are 1 to {MAX_VMS}")));
        }
        let mut words = ["campaign", "--stream"].map(str::to_owned).to_vec();
        let mut add = |option: &str, value: &str| words.push(format!("--{option}={value}"));
        add("file", &path(files.path(name.as_str()))?);
        add("images", &images_of(self.images.as_deref(), images)?);
        let numbers = [
            ("trials", self.trials.map(u64::from)),
            ("jobs", self.jobs.map(u64::from)),
            ("seed", self.seed),
        ];
        for (option, number) in numbers {
            if let Some(number) = number {
                add(option, &number.to_string());
            }
        }
        for (option, text) in [
            ("driver", &self.driver),
            ("workload", &self.workload),
            ("steps", &self.steps),
            ("stores", &self.stores),
        ] {
            if let Some(text) = text {
                add(option, text);
            }
        }
        for (option, list) in [
            ("kinds", &self.kinds),
            ("functions", &self.functions),
            ("ways", &self.ways),
        ] {
            if !list.is_empty() {
                add(option, &list.join(","));
            }
        }
        check(&words)?;
        Ok((name, words))
    }
}

impl ReplaySpec {
    /// Words for `cofferdam`.
    pub fn words(
        &self,
        name: &VmName,
        number: u32,
        files: &Files,
        images: &Path,
    ) -> Result<Vec<String>, Problem> {
        let images = images_of(self.images.as_deref(), images)?;
        let mut words = ["campaign", "replay", "--stream"]
            .map(str::to_owned)
            .to_vec();
        words.push(format!("--images={images}"));
        words.push(path(files.path(name.as_str()))?);
        words.push(number.to_string());
        check(&words)?;
        Ok(words)
    }
}

fn wrong(detail: String) -> Problem {
    Problem::new(Code::WrongValues, detail)
}

fn path(path: std::path::PathBuf) -> Result<String, Problem> {
    path.into_os_string()
        .into_string()
        .map_err(|_| Problem::new(Code::Internal, "the folder of campaigns is no UTF-8"))
}

fn images_of(given: Option<&str>, otherwise: &Path) -> Result<String, Problem> {
    is_absolute("images", given)?;
    match given {
        Some(given) => Ok(given.to_owned()),
        None => path(otherwise.to_owned()),
    }
}

/// Looks whether the command takes these words.
fn check(words: &[String]) -> Result<(), Problem> {
    if words.iter().any(|word| word.contains('\0')) {
        return Err(wrong("no value can have a NUL in it".to_owned()));
    }
    let program = std::iter::once("cofferdam");
    match Cli::try_parse_from(program.chain(words.iter().map(String::as_str))) {
        Ok(_) => Ok(()),
        Err(error) => {
            let says = usage_error(&error).unwrap_or_default();
            let says = says.split("; usage:").next().unwrap_or_default();
            let says = says.strip_suffix("; more by --help").unwrap_or(says);
            Err(wrong(says.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(json: &str) -> Result<Vec<String>, String> {
        let spec: CampaignSpec = serde_json::from_str(json).unwrap();
        let files = Files::of("/srv/campaigns".into());
        let words = spec.words(&files, Path::new("/images"));
        words
            .map(|(_, words)| words)
            .map_err(|problem| problem.to_string())
    }

    #[test]
    fn what_is_asked_for_is_what_the_command_takes() {
        let whole = r#"{"name":"a.b","driver":"dummy","kinds":["nop","edge"],"functions":["f"],
            "ways":["native","once"],"steps":"all","stores":"exact","trials":100000,"jobs":16,
            "seed":18446744073709551615,"images":"/i"}"#;
        let words = words(whole).unwrap();
        for word in [
            "--file=/srv/campaigns/a.b.jsonl",
            "--images=/i",
            "--kinds=nop,edge",
            "--seed=18446744073709551615",
        ] {
            assert!(words.contains(&word.to_owned()), "{word}: {words:?}");
        }
        let short = self::words(r#"{"name":"a"}"#).unwrap();
        assert_eq!(
            short[2..],
            ["--file=/srv/campaigns/a.jsonl", "--images=/images"]
        );
    }

    #[test]
    fn what_no_campaign_can_be_is_refused() {
        for (json, says) in [
            (r#"{}"#, "name: "),
            (r#"{"name":"../x"}"#, "name: "),
            (r#"{"name":"a/b"}"#, "name: "),
            (r#"{"name":"-a"}"#, "name: "),
            (r#"{"name":"a","trials":0}"#, "--trials"),
            (r#"{"name":"a","trials":100001}"#, "100000"),
            (r#"{"name":"a","jobs":17}"#, "jobs: "),
            (r#"{"name":"a","jobs":0}"#, "--jobs"),
            (r#"{"name":"a","driver":"nosuch"}"#, "null_blk"),
            (
                r#"{"name":"a","driver":"dummy","workload":"/w"}"#,
                "cannot be used with",
            ),
            (
                r#"{"name":"a","workload":"w"}"#,
                "workload: give an absolute",
            ),
            (r#"{"name":"a","images":"i"}"#, "images: give an absolute"),
            (r#"{"name":"a","kinds":["gremlin"]}"#, "missing_call"),
            (r#"{"name":"a","ways":["sideways"]}"#, "native"),
            (r#"{"name":"a","steps":"some"}"#, "called"),
            (r#"{"name":"a","stores":"none"}"#, "exact"),
            (r#"{"name":"a","functions":["f\u0000"]}"#, "NUL"),
        ] {
            let refused = words(json).unwrap_err();
            assert!(refused.contains(says), "{json}: {refused}");
            assert!(
                !refused.contains('\n') && !refused.contains("usage"),
                "{refused}"
            );
        }
        serde_json::from_str::<CampaignSpec>(r#"{"name":"a","file":"/etc/passwd"}"#).unwrap_err();
    }

    #[test]
    fn a_replay_is_of_a_file_of_the_service() {
        let files = Files::of("/srv/campaigns".into());
        let name: VmName = "a".parse().unwrap();
        let words = ReplaySpec::default().words(&name, 7, &files, Path::new("/images"));
        let words = words.unwrap();
        let last = ["--images=/images", "/srv/campaigns/a.jsonl", "7"];
        assert_eq!(words[3..], last);
    }
}
