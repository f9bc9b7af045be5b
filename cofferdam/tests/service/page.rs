//! The page: its headers, and what a browser makes of it.

use serde_json::json;

use crate::browser::Browser;
use crate::campaigns::{campaign, text};
use crate::common::place::{Place, finish};
use crate::over_tcp::{DO, LOOK, OverTcp};
use crate::scripted::{HOSTILE, script};

#[test]
fn the_page_may_load_and_ask_nothing_but_its_own_service() {
    let place = Place::new();
    let over = OverTcp::start(&place, "");
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/plot.js", "text/javascript"),
        ("/campaigns.js", "text/javascript"),
    ] {
        let answer = over.ask("GET", path, "").ok(200);
        for line in [
            &format!("content-type: {kind}; charset=utf-8"),
            "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; \
             connect-src 'self'; ",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
        ] {
            assert!(answer.head.contains(line), "{path}: {line}: {answer:?}");
        }
        assert!(!answer.head.contains("unsafe"), "{answer:?}");
        for bad in [
            "innerHTML",
            "http://",
            "https://",
            "style=",
            "onclick",
            "eval(",
        ] {
            let text = answer.text.replace("http://www.w3.org/2000/svg", "");
            assert!(!text.contains(bad), "{path} has {bad}");
        }
        // Over the unix socket it is the same.
        assert_eq!(over.service.get(path).ok(200).text, answer.text);
        let answer = over.ask("POST", path, "");
        answer.problem(401, "unauthorized", "");
    }
    over.service.end();
}

#[test]
fn a_browser_shows_guests_as_they_are_and_nothing_that_they_say_as_markup() {
    let name =
        "service::page::a_browser_shows_guests_as_they_are_and_nothing_that_they_say_as_markup";
    let Some(mut browser) = Browser::start(name) else {
        return;
    };
    let place = Place::new();
    let over = OverTcp::start(&place, "");
    let vm = place.idle("");
    let (dir, script) = script(&place);
    script.be_hostile();
    browser.open(&format!("https://{}/", over.address));
    browser.until("!document.getElementById('login').hidden");
    browser.log_in("wrong token");
    let refused = "document.getElementById('refused').textContent";
    browser.until(&format!("{refused}.includes('does not know')"));
    browser.log_in(LOOK);
    browser.until("document.querySelectorAll('.guest').length === 2");
    let shown = "document.getElementById('guests').textContent";
    for text in ["idle", "running", "resident", "Calls/s", HOSTILE] {
        browser.until(&format!("{shown}.includes({})", json!(text)));
    }
    browser.until("document.querySelectorAll('.guest svg polyline').length === 2");
    browser.until("document.getElementById('events').textContent.includes('2 guests')");
    script.fail(3);
    let events = "document.getElementById('events').textContent";
    browser.until(&format!("{events}.includes('3 calls of ')"));
    let told = "document.querySelector('#events pre')?.textContent";
    browser.until(&format!("{told} === {}", json!(HOSTILE)));
    // What it says is there as text, and has made nothing.
    assert_eq!(browser.value("document.images.length"), json!(0));
    assert_eq!(browser.value("document.scripts.length"), json!(1));
    assert_eq!(browser.value("typeof window.broken"), json!("undefined"));
    // The token is in the script's memory alone.
    let kept = "document.cookie + JSON.stringify([{...localStorage}, {...sessionStorage}]) \
        + location.href + document.documentElement.outerHTML + document.getElementById('token').value";
    let kept = browser.value(kept).to_string();
    assert!(!kept.contains(LOOK) && !kept.contains(DO));
    // A narrow window has nothing beside it.
    browser.size(360, 800);
    browser.until("document.documentElement.scrollWidth <= 360");
    browser.screenshot("narrow");
    browser.size(1200, 900);
    browser.screenshot("wide");
    over.service.delete("/v1/guests/idle?force=true").ok(200);
    finish(vm);
    browser.until(&format!("{events}.includes('idle is gone')"));
    over.service.end();
    drop(dir);
    browser.end();
}

#[test]
fn a_browser_opens_campaigns_reports_and_jobs_and_nothing_in_them_is_markup() {
    let name =
        "service::page::a_browser_opens_campaigns_reports_and_jobs_and_nothing_in_them_is_markup";
    let Some(mut browser) = Browser::start(name) else {
        return;
    };
    let place = Place::new();
    campaign(&place, "mine", 3);
    place.file("campaigns/old.jsonl", b"{\"campaign\":1}\n");
    let folder = place.path("campaigns").display().to_string();
    let over = OverTcp::start(&place, &format!("--campaigns {folder}"));
    let (dir, script) = script(&place);
    script.be_hostile();
    script.fail(3);
    browser.open(&format!("https://{}/", over.address));
    browser.until("!document.getElementById('login').hidden");
    browser.log_in(LOOK);
    browser.until("document.querySelectorAll('.campaign').length === 2");
    let campaigns = "document.getElementById('campaigns').textContent";
    browser.until(&format!("{campaigns}.includes('format 1')"));
    browser.value("document.querySelector('.campaign details').open = true");
    // Two ways with kinds and functions each, and latencies; all of them drawn.
    let images = "[...document.querySelectorAll('.campaign img')]";
    browser.until(&format!("{images}.length === 5"));
    browser.until(&format!(
        "{images}.every((one) => one.complete && one.naturalWidth > 100)"
    ));
    for text in ["crash", "isolated, once", "Trial 2: escaped"] {
        browser.until(&format!("{campaigns}.includes({})", json!(text)));
    }
    browser.value("document.querySelector('.inside details').open = true");
    let told = "document.querySelector('.inside details pre')?.textContent";
    browser.until(&format!("{told} === {}", json!(HOSTILE)));
    // It stays open while all around it is made anew, and while its file grows.
    let more = text(4)[text(3).len()..].to_owned();
    let mut options = std::fs::OpenOptions::new();
    let file = options
        .append(true)
        .open(place.path("campaigns/mine.jsonl"));
    std::io::Write::write_all(&mut file.unwrap(), more.as_bytes()).unwrap();
    browser.until(&format!("{campaigns}.includes('Trial 4: escaped')"));
    let opened = "document.querySelectorAll('.inside details[open]').length";
    assert_eq!(browser.value(opened), json!(1));
    assert_eq!(browser.value(told), json!(HOSTILE));
    let looks = "performance.getEntriesByType('resource')\
                 .filter((one) => one.name.endsWith('/v1/campaigns')).length";
    let so_far = browser.value(looks).as_u64().unwrap();
    browser.until(&format!("{looks} >= {}", so_far + 2));
    assert_eq!(browser.value(&format!("{images}.length")), json!(5));
    // Campaigns that cannot be listed are nothing to guests and jobs.
    let folder = place.path("campaigns");
    std::fs::rename(&folder, place.path("elsewhere")).unwrap();
    browser.until(&format!("{campaigns}.includes('This cannot be shown')"));
    browser.until("document.getElementById('connection').textContent === 'Connected'");
    assert_eq!(
        browser.value("document.querySelectorAll('.guest').length"),
        json!(1)
    );
    std::fs::rename(place.path("elsewhere"), &folder).unwrap();
    browser.until("document.querySelectorAll('.campaign').length === 2");
    // What calls of a guest's module did wrong, as its process says it with names.
    browser.value("document.querySelector('.guest details').open = true");
    let report = "document.querySelector('.guest details pre')?.textContent";
    browser.until(&format!("{report} === {}", json!(HOSTILE)));
    let begun = over
        .service
        .post("/v1/guests/script/snapshot", r#"{"dir": "/nonexistent"}"#);
    let jobs = "document.getElementById('jobs').textContent";
    browser.until(&format!("{jobs}.includes('snapshot of script')"));
    browser.until(&format!("{jobs}.includes('writing')"));
    let id = begun.ok(202).json()["id"].as_str().unwrap().to_owned();
    over.service.delete(&format!("/v1/jobs/{id}")).ok(202);
    browser.until(&format!("{jobs}.includes('given up')"));
    assert_eq!(browser.value("document.scripts.length"), json!(1));
    assert_eq!(browser.value("typeof window.broken"), json!("undefined"));
    browser.size(360, 800);
    browser.until("document.documentElement.scrollWidth <= 360");
    browser.screenshot("campaigns-narrow");
    browser.size(1200, 900);
    browser.screenshot("campaigns");
    over.service.end();
    drop(dir);
    browser.end();
}

#[test]
fn a_browser_finds_its_service_again() {
    let name = "service::page::a_browser_finds_its_service_again";
    let Some(mut browser) = Browser::start(name) else {
        return;
    };
    let place = Place::new();
    let over = OverTcp::start(&place, "");
    let port = over.address.port();
    browser.open(&format!("https://{}/", over.address));
    browser.until("!document.getElementById('login').hidden");
    browser.log_in(LOOK);
    let connection = "document.getElementById('connection').textContent";
    browser.until(&format!("{connection} === 'Connected'"));
    over.service.end();
    browser.until(&format!("{connection}.includes('No connection')"));
    browser.until("document.getElementById('shown').classList.contains('stale')");
    let over = OverTcp::start_at(&place, port, "");
    browser.until(&format!("{connection} === 'Connected'"));
    browser.until("!document.getElementById('shown').classList.contains('stale')");
    over.service.end();
    browser.end();
}
