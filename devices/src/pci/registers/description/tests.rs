use super::*;

const SMALL: &str = r#"
    schema = 1
    [device]
    name = "NIC"
    version = 1
    vendor = 1
    device = 2
    bar = 0
    bytes = 0x100
    [[config]]
    name = "COMMAND"
    offset = 4
    bytes = 2
    [[register]]
    name = "A"
    offset = 0
    count = 4
    [[untouched]]
    name = "B"
    offset = 0x10
    why = "read_clears"
    [[flush]]
    register = "A"
    offset = 0xc
    past = [0x14]
    [mdio]
    register = 0x20
    phy = 1
    saved = [{ name = "CONTROL", number = 0 }]
    "#;

#[test]
fn the_description_of_the_82540em_is_good() {
    let description = Description::intel_82540em().unwrap();
    assert_eq!(
        (description.device.vendor, description.device.device),
        (0x8086, 0x100e)
    );
    assert!(Description::parse(SMALL).is_ok());
}

#[test]
fn a_load_without_effect_overtakes_stores_that_do_not_matter_to_it() {
    let small = Description::parse(SMALL).unwrap();
    let may =
        |offset, bytes, waiting: &[u64]| small.may_overtake(offset, bytes, waiting.iter().copied());
    assert!(may(0xc, 4, &[]) && may(0xc, 4, &[0x14, 0x14]));
    assert!(!may(0xc, 4, &[0x14, 0x18]) && !may(0xc, 2, &[]) && !may(0x10, 4, &[]));
}

#[test]
fn packet_memory_of_an_82574l_is_withheld_and_the_way_around_it() {
    let description = Description::intel_82574l().unwrap();
    let withheld = |bar, offset, bytes| description.withholds(bar, offset, bytes);
    assert!(withheld(0, 0x1_0000, 4) && withheld(0, 0x1_fffc, 4) && withheld(0, 0x1_fffe, 8));
    assert!(withheld(0, 0xfffc, 8), "one that reaches into it");
    assert!(withheld(2, 0, 4) && withheld(2, 4, 4) && withheld(2, 31, 1));
    assert!(!withheld(0, 0xfffc, 4) && !withheld(0, 0x2_0000, 4) && !withheld(0, 0x1_0000, 0));
    assert!(!withheld(1, 0x1_0000, 4) && !withheld(3, 0, 4) && !withheld(0, u64::MAX, 8));
    let other = Description::intel_82540em().unwrap();
    assert!(!other.withholds(0, 0x1_0000, 4));
}

#[test]
fn what_contradicts_itself_is_refused() {
    for (from, to, why) in [
        ("schema = 1", "schema = 2", "schema 2"),
        ("schema = 1", "", "schema"),
        ("name = \"NIC\"", "nick = \"NIC\"", "unknown field"),
        ("bar = 0", "bar = 6", "0 to 5"),
        ("bytes = 2", "bytes = 3", "configuration space"),
        ("offset = 4", "offset = 5", "configuration space"),
        ("offset = 4", "offset = 256", "configuration space"),
        ("bytes = 2", "bytes = 2\nsettle_us = 100001", "settle"),
        ("count = 4", "count = 5", "another's too"),
        ("count = 4", "count = 0", "no aligned registers"),
        ("count = 4", "count = 65", "no aligned registers"),
        ("count = 4", "count = 0xffffffff", "no aligned registers"),
        ("offset = 0x10", "offset = 0x12", "no aligned registers"),
        ("read_clears", "dislike", "unknown variant"),
        ("offset = 0xc", "offset = 0xd", "no aligned register"),
        (
            "past = [0x14]",
            "past = [0x14, 0x100]",
            "no aligned register",
        ),
        ("past = [0x14]", "past = [0xc]", "changes what it shows"),
        ("number = 0", "number = 32", "0 to 31"),
        ("register = 0x20", "register = 0x100", "mdio"),
    ] {
        let text = SMALL.replacen(from, to, 1);
        let error = Description::parse(&text).unwrap_err().to_string();
        assert!(error.contains(why), "{to}: {error}");
    }
    for (offset, times, why) in [
        (0x10, 1, ""),
        (0x10, 2, "twice"),
        (0x0c, 1, "reading clears"),
        (0x14, 1, "reading clears"),
        (0x12, 1, "reading clears"),
    ] {
        let lost = format!("\n[[lost]]\nregister = \"L\"\noffset = {offset}").repeat(times);
        let parsed = Description::parse(&format!("{SMALL}{lost}"));
        let error = parsed.map_or_else(|error| error.to_string(), |_| String::new());
        assert!(
            error.contains(why) && error.is_empty() == why.is_empty(),
            "{error}"
        );
    }
    for (bar, offset, bytes, why) in [
        (0, 0x14, 4, ""),
        (1, 0x10, 0x200, ""),
        (0, 0x13, 2, "described"),
        (0, 0x0, 1, "described"),
        (0, 0xfc, 5, "no part"),
        (0, 0x14, 0, "no part"),
        (6, 0x14, 4, "no part"),
        (1, u32::MAX, 1, "no part"),
    ] {
        let part = format!("bar = {bar}\noffset = {offset}\nbytes = {bytes}");
        let parsed = Description::parse(&format!("{SMALL}\n[[withheld]]\nname = \"W\"\n{part}"));
        let error = parsed.map_or_else(|error| error.to_string(), |_| String::new());
        assert!(
            error.contains(why) && error.is_empty() == why.is_empty(),
            "{part}: {error}"
        );
    }
    let ring = format!(
        "{SMALL}\n[[ring]]\nname = \"R\"\nbase_low = 0x40\nbase_high = 0x44\nlength = 0x48\n\
         control = 0\nenable = 1\n"
    );
    let error = Description::parse(&ring).unwrap_err().to_string();
    assert!(error.contains("not saved"), "{error}");
    assert!(Description::parse(&" ".repeat(MAX_TEXT + 1)).is_err());
}
