//! Requests and answers as they travel.

use devices::edge::{EdgeKind, When};

use devices::edge::EdgeStatus;

use super::*;

#[test]
fn requests_travel_as_one_short_line() {
    let request = Request::ProbeStart { interval_us: 1000 };
    let line = request.line();
    assert_eq!(line, "{\"request\":\"probe_start\",\"interval_us\":1000}\n");
    assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
}

#[test]
fn a_disturbance_travels_with_what_was_given_and_no_more() {
    let order = EdgeOrder::new(EdgeKind::LoadOnes).offsets(8..12);
    let request = Request::Disturb {
        nic: Some("1".to_owned()),
        order: order.when(When::Nth(3)).seed(7),
    };
    let line = request.line();
    assert_eq!(
        line,
        "{\"request\":\"disturb\",\"nic\":\"1\",\"order\":{\"kind\":\"load_ones\",\
         \"offsets\":{\"start\":8,\"end\":12},\"when\":{\"nth\":3},\"seed\":7}}\n"
    );
    assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    let short = "{\"request\":\"disturb\",\"order\":{\"kind\":\"removed\"}}";
    let removed = EdgeOrder::new(EdgeKind::Removed);
    assert_eq!(
        serde_json::from_str::<Request>(short).unwrap(),
        Request::Disturb {
            nic: None,
            order: removed.clone()
        }
    );
    let unknown = short.replace("kind", "kinds");
    assert!(serde_json::from_str::<Request>(&unknown).is_err());
    let answer = Answer::Ok(Reply::Disturbed(Disturbance {
        nic: "0000:00:02.0".to_owned(),
        status: EdgeStatus {
            number: 1,
            order: removed,
            matched: 5,
            struck: 5,
        },
    }));
    let line = answer.line();
    assert!(line.contains("\"number\":1") && line.contains("\"struck\":5"));
    assert_eq!(serde_json::from_str::<Answer>(&line).unwrap(), answer);
}

#[test]
fn lists_travel_in_answers() {
    let line = Answer::Ok(Reply::Instructions {
        instructions: Vec::new(),
    })
    .line();
    assert_eq!(
        line,
        "{\"ok\":{\"reply\":\"instructions\",\"instructions\":[]}}\n"
    );
}

#[test]
fn answers_say_what_they_are() {
    assert_eq!(
        Answer::Ok(Reply::Done {}).line(),
        "{\"ok\":{\"reply\":\"done\"}}\n"
    );
    assert_eq!(
        Answer::<Reply>::Error("no\nway".to_owned()).line(),
        "{\"error\":\"no\\nway\"}\n"
    );
}
