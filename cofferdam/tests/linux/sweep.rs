//! A sweep of a few stock modules.
//!
//! In the full form only: it takes minutes, and what it shows of isolation other tests show for the
//! most part, too.

mod long {
    use cofferdam::sweep::{self, SweepOptions};
    use recovery::campaign::workload::checks;
    use recovery::sweep::cases;
    use recovery::sweep::record::{FaultEnd, Verdict};

    use super::super::options;

    /// What is swept here: quick ones, and one whose guest was lost by a fault in the first of its
    /// functions (`__snd_pcm_lib_xfer`).
    const MODULES: [&str; 3] = ["interface/dummy", "interface/ifb", "sound/snd_pcm"];

    #[test]
    #[ignore = "needs a KVM that boots Linux: cargo xtask test runs it in the lab"]
    fn stock_modules_work_with_all_of_their_functions_isolated_and_recover_from_a_fault_in_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut chosen = cases().unwrap();
        chosen.retain(|case| MODULES.contains(&case.name().as_str()));
        let guest = options().initrd("initrd-sweep.cpio");
        let sweep = SweepOptions {
            guest: guest.with("--memory 512M").with(&checks()),
            cases: chosen,
            faults: 1,
            file: folder.path().join("sweep.jsonl"),
        };
        let mut tell = |what: &str| eprintln!("{what}");
        let mut each = |record: &_| eprintln!("{record:?}");
        let done = sweep::run(&sweep, &mut tell, &mut each).unwrap();
        assert_eq!(done.records.len(), MODULES.len());
        for record in &done.records {
            assert_eq!(record.verdict(), Verdict::Right, "{record:?}");
            let (called, inside) = record.inside();
            assert_eq!(called, inside, "{record:?}");
            let recovered = record.faults_that(FaultEnd::Recovered);
            assert_eq!(recovered, 1, "{record:?}");
        }
        // A sweep that is begun again with its file has nothing left to do.
        let mut again = |record: &_| panic!("{record:?}");
        let same = sweep::run(&sweep, &mut tell, &mut again).unwrap();
        assert_eq!(same.records, done.records);
    }
}
