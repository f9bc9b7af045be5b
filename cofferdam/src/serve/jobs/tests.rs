use std::io::{self, Read, Write};

use super::*;

fn name() -> VmName {
    "web".parse().unwrap()
}

async fn end(job: &Job) {
    let mut state = job.state.subscribe();
    let ended = state.wait_for(|state| state.result.is_some());
    ended.await.unwrap();
}

#[tokio::test]
async fn jobs_are_bounded_and_the_oldest_that_ended_goes_first() {
    let jobs = Jobs::default();
    let mut first = None;
    for _ in 0..=MAX_ENDED {
        let job = jobs
            .start(&name(), "a test", GivingUp::Never, |job| {
                job.tell("word");
                Ok(Value::Null)
            })
            .unwrap();
        end(&job).await;
        first.get_or_insert(job);
    }
    assert_eq!(jobs.all().len(), MAX_ENDED);
    assert_eq!(
        jobs.find(&first.unwrap().id).unwrap_err(),
        jobs.find("").unwrap_err()
    );
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let begin = |guest: &str| {
        let held = Arc::clone(&held);
        jobs.start(
            &guest.parse::<VmName>().unwrap(),
            "a test",
            GivingUp::Never,
            move |_| {
                let _ = held.lock().unwrap().recv();
                Ok(Value::Null)
            },
        )
    };
    for _ in 0..MAX_OF_ONE {
        begin("one").unwrap();
    }
    begin("one").unwrap_err();
    for _ in MAX_OF_ONE..MAX_RUNNING {
        begin("other").unwrap();
    }
    begin("third").unwrap_err();
    drop(hold);
}

#[tokio::test]
async fn a_job_keeps_its_last_words_and_why_it_failed() {
    let jobs = Jobs::default();
    let work = |job: &Job| {
        for number in 0..100 {
            job.tell(&number.to_string());
        }
        panic!("for a test")
    };
    let job = jobs
        .start(&name(), "a test", GivingUp::Never, work)
        .unwrap();
    end(&job).await;
    let view = job.view();
    assert_eq!(view.progress.len(), MAX_PROGRESS);
    assert_eq!(view.progress[MAX_PROGRESS - 1], "99");
    assert_eq!(view.stage, JobStage::Failed);
    assert!(view.problem.is_some());
}

#[tokio::test]
async fn a_job_that_has_only_just_begun_is_given_up_before_it_asks_for_anything() {
    let jobs = Jobs::default();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    let closing = GivingUp::Closing(None);
    let work = move |job: &Job| {
        let _ = may_go.recv();
        job.is_done_over(ours.try_clone().unwrap());
        let broken = |error: io::Error| Problem::new(Code::BrokenOff, error.to_string());
        (&ours).write_all(b"do it").map_err(broken)?;
        Ok(Value::Null)
    };
    let job = jobs.start(&name(), "a test", closing, work).unwrap();
    assert!(job.give_up());
    assert_eq!(job.view().stage, JobStage::Running);
    go.send(()).unwrap();
    end(&job).await;
    let view = job.view();
    let given_up = Problem::new(Code::Cancelled, "the job was given up");
    assert_eq!(view.problem, Some(given_up));
    let mut asked = Vec::new();
    theirs.read_to_end(&mut asked).unwrap();
    assert!(asked.is_empty(), "{asked:?}");
    // It has ended, and one without a connection is never given up.
    assert!(!job.give_up());
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    let work = move |_: &Job| {
        let _ = may_go.recv();
        Ok(Value::Null)
    };
    let job = jobs
        .start(&name(), "a test", GivingUp::Never, work)
        .unwrap();
    assert!(!job.give_up());
    drop(go);
    end(&job).await;
    assert_eq!(job.view().stage, JobStage::Done);
}

#[tokio::test]
async fn a_campaign_is_under_way_once_and_few_are_at_a_time() {
    let jobs = Jobs::default();
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let begin = |name: &str, trials: &str| {
        let held = Arc::clone(&held);
        let of = Subject::Campaign(name.to_owned(), vec![trials.to_owned()]);
        jobs.start(of, "a test", GivingUp::Never, move |job| {
            job.counts(serde_json::json!({"trials": 3}));
            let _ = held.lock().unwrap().recv();
            Ok(Value::Null)
        })
    };
    let first = begin("a", "30").unwrap();
    assert!(Arc::ptr_eq(&first, &begin("a", "30").unwrap()));
    let code = |problem: Problem| serde_json::json!(problem)["code"].clone();
    assert_eq!(code(begin("a", "31").unwrap_err()), "other_spec");
    begin("b", "30").unwrap();
    assert_eq!(code(begin("c", "30").unwrap_err()), "busy");
    assert_eq!(jobs.of_campaign("a").as_ref(), Some(&first.id));
    assert!(jobs.of_campaign("c").is_none());
    assert_eq!(jobs.campaigns(), ["a", "b"]);
    drop(hold);
    end(&first).await;
    let view = first.view();
    assert_eq!((view.guest, view.campaign.as_deref()), (None, Some("a")));
    assert_eq!(view.figures, Some(serde_json::json!({"trials": 3})));
    // One that has ended is begun anew.
    assert!(!Arc::ptr_eq(&first, &begin("a", "31").unwrap()));
}

#[tokio::test]
async fn a_campaign_that_is_being_given_up_is_begun_again_after_its_end() {
    let jobs = Jobs::default();
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    let may_go = Arc::new(Mutex::new(may_go));
    let begin = || {
        let may_go = Arc::clone(&may_go);
        let of = Subject::Campaign("a".to_owned(), Vec::new());
        jobs.start(of, "a test", GivingUp::Closing(None), move |_| {
            let _ = may_go.lock().unwrap().recv();
            Ok(Value::Null)
        })
    };
    let first = begin().unwrap();
    assert!(first.give_up());
    let problem = serde_json::json!(begin().unwrap_err());
    assert_eq!(problem["code"], "busy", "{problem}");
    go.send(()).unwrap();
    end(&first).await;
    assert!(!Arc::ptr_eq(&first, &begin().unwrap()));
}
