//! Device names: a template filled in, made safe for DNS, at most 63 bytes.

/// Longest DNS label.
const MAX_LABEL: usize = 63;
const FIELDS: [&str; 3] = ["cluster", "namespace", "pod"];

/// Checks a `hostname_template`.
///
/// # Errors
/// One sentence about what it may hold.
pub fn check_template(template: &str) -> Result<(), String> {
    let mut rest = template;
    while let Some((_, tail)) = rest.split_once('{') {
        let (field, tail) = tail.split_once('}').ok_or_else(|| "an opening { has no closing }".to_owned())?;
        if !FIELDS.contains(&field) {
            return Err(format!("{{{field}}} is none of {{cluster}} {{namespace}} {{pod}}"));
        }
        rest = tail;
    }
    if template.is_empty() || template.len() > 256 {
        return Err("is empty or longer than 256 bytes".into());
    }
    Ok(())
}

/// Fills in `template`. Whatever the names hold, the result is one DNS label: a name that is too long
/// keeps its start and ends in a hash of the whole, so that two long names stay apart.
#[must_use]
pub fn render(template: &str, cluster: &str, namespace: &str, pod: &str) -> String {
    let full = template.replace("{cluster}", cluster).replace("{namespace}", namespace).replace("{pod}", pod);
    let mut label = String::with_capacity(full.len());
    for c in full.chars() {
        let c = c.to_ascii_lowercase();
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            label.push(c);
        } else if !label.ends_with('-') && !label.is_empty() {
            label.push('-');
        }
    }
    let label = label.trim_end_matches('-');
    if label.is_empty() {
        return format!("pod-{:08x}", hash(&full));
    }
    if label.len() <= MAX_LABEL {
        return label.to_owned();
    }
    let start = label[..MAX_LABEL - 9].trim_end_matches('-');
    format!("{start}-{:08x}", hash(&full))
}

fn hash(text: &str) -> u32 {
    let h = crate::record::fnv64(text.as_bytes());
    u32::try_from(h >> 32).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        let t = "{cluster}-{namespace}-{pod}";
        let table = [
            (t, "k8s", "default", "web-0", "k8s-default-web-0"),
            (t, "", "default", "web", "default-web"),
            ("{pod}.{namespace}", "", "a_b", "X.Y", "x-y-a-b"),
            ("{pod}", "", "", "--a--", "a"),
            ("fixed", "", "", "", "fixed"),
            ("{pod}", "", "", "{namespace}", "namespace"),
        ];
        for (template, c, n, p, want) in table {
            assert_eq!(render(template, c, n, p), want);
        }
        assert!(render("{pod}", "", "", "ü").starts_with("pod-"));
        let long = |tail: &str| render(t, "k8s", &"n".repeat(60), &format!("{}{tail}", "p".repeat(60)));
        assert_eq!(long("a").len(), 63);
        assert_ne!(long("a"), long("b"));
    }

    #[test]
    fn templates() {
        assert!(check_template("{cluster}-{pod}").is_ok());
        assert!(check_template("{node}").unwrap_err().contains("{node}"));
        assert!(check_template("{pod").is_err());
        assert!(check_template("").is_err());
    }

    proptest! {
        #[test]
        fn fuzz_always_one_label(c in ".{0,40}", n in ".{0,90}", p in ".{0,260}") {
            let name = render("{cluster}-{namespace}-{pod}", &c, &n, &p);
            prop_assert!((1..=63).contains(&name.len()));
            prop_assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            prop_assert!(!name.starts_with('-') && !name.ends_with('-'));
        }
    }
}
