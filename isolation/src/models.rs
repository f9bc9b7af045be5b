//! What is known of Linux, as files that are part of the program (`models/`), and how they are
//! read.

use serde::{Deserialize, Deserializer};

/// Reads a file that is part of the program. It is read once and kept.
#[expect(
    clippy::expect_used,
    reason = "no guest and no user has a part in it, and each is read by a test"
)]
pub(crate) fn built_in<T: Deserialize<'static>>(text: &'static str) -> T {
    toml::from_str(text).expect("a file of the program's own")
}

/// Reads a list that is kept as long as the process runs.
pub(crate) fn kept<'de, D, T>(list: D) -> Result<&'static [T], D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Vec::leak(Vec::<T>::deserialize(list)?))
}

#[cfg(test)]
mod tests {
    use crate::analysis::facts;
    use crate::attach::kernel_functions;
    use crate::mutation::names;
    use crate::policy::handed_over;
    use crate::policy::reach::Rules;

    /// Arguments behind the fourth are not in the registers that trampolines look at.
    #[test]
    fn what_an_allocator_is_asked_for_is_among_its_first_four_arguments() {
        for allocator in &kernel_functions::LINUX.sized {
            let numbers = [Some(allocator.size), allocator.flags];
            assert!(
                numbers.into_iter().flatten().all(|number| number < 4),
                "{allocator:?}"
            );
        }
    }

    #[test]
    fn every_file_is_read_and_says_something_in_each_of_its_lists() {
        let rules = format!("{:?}", Rules::linux());
        let functions = format!("{:?}", *kernel_functions::LINUX);
        let facts = format!("{:?}", *facts::LINUX);
        let names = format!("{:?}", *names::LINUX);
        let handed_over = format!("{:?}", *handed_over::LINUX);
        for file in [rules, functions, facts, names, handed_over] {
            // `[]` for what a rule leaves out is behind `is`, `also` and `others` only.
            let empty = file.match_indices(": []").map(|(at, _)| &file[..at]);
            let named = empty.map(|before| before.rsplit([' ', '{']).next().unwrap_or_default());
            let lists: Vec<_> = named
                .filter(|name| !["is", "also", "others"].contains(name))
                .collect();
            assert!(lists.is_empty(), "{lists:?}");
        }
    }
}
