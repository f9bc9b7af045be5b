//! What a model of kernel functions says, and what is none.

use super::*;

fn with(functions: &str) -> Result<Model, ModelError> {
    Model::parse(&format!(
        "schema = 1\nkernel = \"x\"\ndata = [\"jiffies\"]\ntransient = [\"memcpy\"]\n[function]\n{functions}\n"
    ))
}

#[test]
fn the_guests_kernel_chooses_the_model() {
    for release in ["6.1", "6.1.0-44-amd64", "6.1.158+", "6.1-rc3"] {
        let model = Model::for_release(release).unwrap().unwrap();
        assert_eq!(model.kernel(), "6.1", "{release}");
        assert_eq!(model.for_isolation().kernel, "6.1");
    }
    let newer = Model::for_release("6.12.117+deb13-amd64").unwrap().unwrap();
    assert_eq!(newer.kernel(), "6.12");
    let others = "6.13.1 6.10.0 16.1.0 7.2.13 6 6. 6-1 .6.1 x 6.é 6.1é";
    for other in others.split(' ').chain([""]) {
        let series = if other == "6.1é" { 1 } else { 0 };
        assert_eq!(
            usize::from(Model::for_release(other).is_some()),
            series,
            "{other}"
        );
    }
    // Each is what it is filed under.
    for (kernel, text) in MODELS {
        assert_eq!(Model::parse(text).unwrap().kernel(), kernel);
    }
}

#[test]
fn what_undoes_a_function_says_what_it_is_called_with() {
    let model = Model::for_release("6.1.0").unwrap().unwrap();
    let Some(Known::Lasting(effect)) = model.get("dma_alloc_attrs") else {
        panic!("dma_alloc_attrs has no entry")
    };
    let undo = effect.undo.as_ref().unwrap();
    assert_eq!(undo.function, "dma_free_attrs");
    use Argument::{Behind, Own, Result};
    assert_eq!(undo.arguments, [Own(0), Own(1), Result, Behind(2), Own(4)]);
    assert!(effect.sleeps && effect.allocates == Some(Resource::Dma));
    assert_eq!(model.get("memcpy"), Some(Known::Transient));
    assert_eq!(model.get("jiffies"), Some(Known::Data));
    assert_eq!(model.get("no_such_function"), None);
}

#[test]
fn what_a_function_keeps_says_what_that_has_to_be() {
    for release in ["6.1.0", "6.12.1"] {
        let model = Model::for_release(release).unwrap().unwrap();
        let Some(Known::Lasting(effect)) = model.get("queue_delayed_work_on") else {
            panic!("queue_delayed_work_on has no entry")
        };
        let listed = ["workqueues", "workqueue_struct", "list"].map(str::to_owned);
        let [head, structure, links] = listed;
        let queue = Keeps {
            argument: 1,
            member: None,
            is: Required::Listed(head, structure, links),
        };
        let work = Keeps {
            argument: 2,
            member: Some("work.func".to_owned()),
            is: Required::Function,
        };
        assert_eq!(effect.keeps, [queue, work]);
        let isolation = model.for_isolation().lasting;
        let named = isolation
            .iter()
            .find(|one| one.name == "queue_delayed_work_on");
        assert_eq!(named.unwrap().keeps.len(), 2);
    }
    let kept = |text: &str| with(&format!("f = {{ deferrable = true, keeps = [{text:?}] }}"));
    assert!(kept("0 is function").is_ok());
    for wrong in [
        "",
        "0",
        "6 is function",
        "0 is 1",
        "0 in list",
        "0 in list by links",
        "0 in 1list by s.links",
        "0 in list by s.links too",
        "0.1a is function",
    ] {
        let is_refused = matches!(kept(wrong), Err(ModelError::Contradiction(..)));
        assert!(is_refused, "{wrong:?}");
    }
    let idle = with("f = { keeps = [\"0 is function\"] }");
    assert!(matches!(idle, Err(ModelError::Contradiction(..))));
}

#[test]
fn a_model_says_what_differs_from_the_one_that_it_is_based_on() {
    let model = Model::for_release("6.12.1").unwrap().unwrap();
    // The base's, its own in place of what is gone, and neither twice.
    assert!(matches!(model.get("consume_skb"), Some(Known::Lasting(_))));
    assert!(matches!(
        model.get("vzalloc_noprof"),
        Some(Known::Lasting(_))
    ));
    assert_eq!(model.get("vzalloc"), None);
    assert_eq!(model.get("pcpu_hot"), Some(Known::Data));
    assert_eq!(model.get("current_task"), None);
    let parse = |more: &str| {
        Model::parse(&format!(
            "schema = 1\nkernel = \"x\"\n{more}\ndata = [\"kfree\"]\ntransient = []\n[function]\nmemcpy = {{}}"
        ))
    };
    let other = parse("base = \"6.1\"\ngone = [\"vfree\"]").unwrap();
    assert_eq!(other.get("kfree"), Some(Known::Data));
    assert!(other.lasting().all(|(name, _)| name != "kfree"));
    assert!(
        other
            .for_isolation()
            .interrupts_off
            .iter()
            .all(|name| name != "kfree")
    );
    assert!(matches!(other.get("memcpy"), Some(Known::Lasting(_))));
    assert_eq!(other.get("vfree"), None);
    let not_gone = ModelError::NotGone("vfree".into());
    assert_eq!(parse("gone = [\"vfree\"]").unwrap_err(), not_gone);
    for base in ["6.2", "x", "", "6.12"] {
        let wrong = parse(&format!("base = \"{base}\"")).unwrap_err();
        assert_eq!(wrong, ModelError::Base(base.into()));
    }
}

#[test]
fn every_function_that_hands_something_out_says_how_it_is_given_back() {
    let all = MODELS.iter().map(|(_, text)| Model::parse(text).unwrap());
    let all: Vec<_> = all.collect();
    for (name, effect) in all.iter().flat_map(Model::lasting) {
        if effect.allocates.is_some() && !effect.irrevocable && name != "napi_get_frags" {
            assert!(effect.undo.is_some(), "{name}");
        }
        // What is freed can only be undone by not doing it yet.
        if effect.frees.is_some() {
            assert!(effect.deferrable || effect.irrevocable, "{name}");
        }
    }
}

#[test]
fn isolation_gets_what_has_to_be_seen_and_what_has_not() {
    let model = Model::for_release("6.1.0")
        .unwrap()
        .unwrap()
        .for_isolation();
    let of = |name: &str| model.lasting.iter().find(|function| function.name == name);
    // Given back only at the end of the call, because nothing brings it back.
    assert!(of("kfree").is_some_and(|f| f.deferred && f.undo.is_none()));
    assert!(of("queue_work_on").is_some_and(|f| !f.deferred && f.undo.is_some()));
    assert!(of("free_irq").is_some_and(|f| !f.deferred && f.undo.is_none()));
    let carrier = of("netif_carrier_off").unwrap().changes.clone().unwrap();
    assert_eq!((carrier.argument, carrier.member.as_str()), (0, "state"));
    for harmless in ["memcpy", "jiffies", "msleep", "ioread32", "iowrite32"] {
        assert!(
            model.harmless.iter().any(|name| name == harmless),
            "{harmless}"
        );
        assert!(of(harmless).is_none(), "{harmless}");
    }
}

/// Locks and waits that a call begins, which nobody else ends.
#[test]
fn isolation_is_told_what_is_over_before_a_call_is() {
    use isolation::domain::effects::Pair;
    for release in ["6.1.0", "6.12.1"] {
        let model = Model::for_release(release).unwrap().unwrap();
        let model = model.for_isolation();
        let pair = |name: &str| {
            let mut all = model.lasting.iter();
            all.find(|function| function.name == name).unwrap().pair
        };
        for begins in ["mutex_lock", "rtnl_lock", "down_read", "add_wait_queue"] {
            assert_eq!(pair(begins), Some(Pair::Begins), "{begins}");
        }
        assert_eq!(pair("prepare_to_wait_event"), Some(Pair::GoesOn));
        assert_eq!(pair("finish_wait"), Some(Pair::Ends));
        for other in ["mutex_unlock", "remove_wait_queue", "kfree"] {
            assert_eq!(pair(other), None, "{other}");
        }
    }
}

#[test]
fn a_model_that_contradicts_itself_is_refused() {
    assert!(with("f = {}").is_ok());
    for wrong in [
        "f = { undo = \"g(0)\", irrevocable = true }",
        "f = { undo = \"g\" }",
        "f = { undo = \"g(6)\" }",
        "f = { undo = \"g(-1)\" }",
        "f = { undo = \"g(**0)\" }",
        "f = { undo = \"g(0.)\" }",
        "f = { undo = \"g(6.x)\" }",
        "f = { undo = \"g(=-1)\" }",
        "f = { changes = \"state\" }",
        "f = { changes = \"0.a.b.c.d.e.f.g.h.i\" }",
        "f = { undo = \"g(0,1,2,3,4,5,0)\" }",
        "f = { undo = \"(0)\" }",
        "f = { pair = \"begins\" }",
        "f = { pair = \"goes_on\", irrevocable = true }",
        "f = { pair = \"ends\", undo = \"g()\" }",
        "f = { pair = \"ends\", deferrable = true }",
        "f = { pair = \"holds\", undo = \"g()\" }",
        "f = { owned = [6] }",
        "f = { owned = [-1] }",
        "f = { frees = \"everything\" }",
        "f = { sleep = true }",
        "memcpy = {}",
        "\"a b\" = {}",
        "\"\" = {}",
        "\"9\" = {}",
        "f = {}\nf = {}",
    ] {
        assert!(with(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn nonsense_and_other_versions_are_refused() {
    for text in ["", "schema = 1", "[[[", "schema = \"1\"", "\u{0}"] {
        assert!(Model::parse(text).is_err(), "{text:?}");
    }
    let text = "schema = 2\nkernel = \"\"\ndata = []\ntransient = []\n[function]\n";
    assert_eq!(Model::parse(text).unwrap_err(), ModelError::Schema(2));
    let long = format!("# {}", "x".repeat(MAX_BYTES));
    assert!(matches!(Model::parse(&long), Err(ModelError::TooLong(_))));
    let deep = format!("a = {}", "[".repeat(100_000));
    assert!(Model::parse(&deep).is_err());
}
