//! An error as a person sees it: one line.

/// An error and its causes, each once: many messages quote their cause already.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

/// An error and what it comes from, on one line, as a process answers it to another.
pub fn chain(error: anyhow::Error) -> String {
    format!("{error:#}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let cause = std::io::Error::other("no such thing");
        let error = anyhow::Error::new(cause).context("cannot read x: no such thing");
        assert_eq!(one_line(&error), "cannot read x: no such thing");
        let error = anyhow::anyhow!("b").context("a");
        assert_eq!(one_line(&error), "a: b");
    }
}
