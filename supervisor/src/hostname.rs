//! Device names: a template filled in, made safe for DNS, at most 63 bytes.

/// Longest DNS label.
const MAX_LABEL: usize = 63;
const FIELDS: [&str; 4] = ["cluster", "namespace", "pod", "workload"];
/// What Kubernetes makes its hashes of: no vowels, and nothing that looks like one.
const HASH_LETTERS: &str = "bcdfghjklmnpqrstvwxz2456789";
/// Letters of the last part of a pod's name.
const POD_HASH: usize = 5;
/// At most, of a ReplicaSet's.
const TEMPLATE_HASH: usize = 10;

/// Who a name is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whose<'a> {
    /// `{cluster}`
    pub cluster: &'a str,
    /// `{namespace}`
    pub namespace: &'a str,
    /// `{pod}`
    pub pod: &'a str,
    /// Kind of the pod's controller: `ReplicaSet`, `StatefulSet`, …; `None` where nobody says.
    pub owner: Option<&'a str>,
}

/// Names for one device, the best first; the last is unlikely to be anybody else's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// As asked for.
    pub wanted: String,
    /// When that is taken.
    others: Vec<String>,
}

impl Names {
    /// The first that is not taken.
    pub fn pick(&self, is_taken: impl Fn(&str) -> bool) -> &str {
        let mut all = std::iter::once(&self.wanted).chain(&self.others);
        let free = all.find(|name| !is_taken(name)).or(self.others.last());
        free.unwrap_or(&self.wanted)
    }

    /// Those that are left where `picked` cannot be had either.
    #[must_use]
    pub fn after(&self, picked: &str) -> Vec<String> {
        let at = self.others.iter().position(|name| name == picked).map_or(0, |at| at + 1);
        self.others[at..].to_vec()
    }

    /// All of them.
    pub fn all(self) -> impl Iterator<Item = String> {
        std::iter::once(self.wanted).chain(self.others)
    }
}

/// The names that `template` gives.
#[must_use]
pub fn names(template: &str, whose: Whose<'_>) -> Names {
    let wanted = render(template, whose);
    let mut others = vec![];
    if template.contains("{workload}") {
        others.push(render(&template.replace("{workload}", "{pod}"), whose));
    } else if !template.contains("{pod}") {
        // What tells a workload's pods apart.
        let part = whose.pod.rsplit('-').next().unwrap_or_default();
        others.push(render(&format!("{template}-{part}"), whose));
    }
    let all = format!("{}/{}/{}", whose.cluster, whose.namespace, whose.pod);
    let start = wanted.get(..MAX_LABEL - 9).unwrap_or(&wanted).trim_end_matches('-');
    others.push(format!("{start}-{:08x}", hash(&all)));
    others.retain(|name| *name != wanted);
    others.dedup();
    Names { wanted, others }
}

/// A pod's name without the hashes that its ReplicaSet, DaemonSet or Job put there.
#[must_use]
pub fn workload<'a>(pod: &'a str, owner: Option<&str>) -> &'a str {
    let is_hash = |part: &str| !part.is_empty() && part.chars().all(|c| HASH_LETTERS.contains(c));
    if !matches!(owner, None | Some("ReplicaSet" | "DaemonSet" | "Job" | "ReplicationController")) {
        return pod;
    }
    let Some((rest, last)) = pod.rsplit_once('-') else { return pod };
    if last.len() != POD_HASH || !is_hash(last) || rest.is_empty() {
        return pod;
    }
    if !matches!(owner, None | Some("ReplicaSet")) {
        return rest;
    }
    match rest.rsplit_once('-') {
        Some((name, hash)) if hash.len() <= TEMPLATE_HASH && is_hash(hash) && !name.is_empty() => name,
        Some(_) | None => rest,
    }
}

/// Whether a server that was asked for `wanted` gave `label`, which is that with a number behind it, because another
/// device has it. Any other difference is an administrator's wish.
#[must_use]
pub fn numbered(wanted: &str, label: &str) -> bool {
    let Some((start, number)) = label.rsplit_once('-') else { return false };
    let is_number = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    // One that is full is cut to make room.
    let room = MAX_LABEL.saturating_sub(number.len() + 1);
    is_number && !start.is_empty() && (start == wanted || (wanted.len() > room && wanted.starts_with(start)))
}

/// Checks a `hostname_template`.
///
/// # Errors
/// One sentence about what it may hold.
pub fn check_template(template: &str) -> Result<(), String> {
    let mut rest = template;
    while let Some((_, tail)) = rest.split_once('{') {
        let (field, tail) = tail.split_once('}').ok_or_else(|| "an opening { has no closing }".to_owned())?;
        if !FIELDS.contains(&field) {
            return Err(format!("{{{field}}} is none of {{cluster}} {{namespace}} {{pod}} {{workload}}"));
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
pub fn render(template: &str, whose: Whose<'_>) -> String {
    let full = template
        .replace("{cluster}", whose.cluster)
        .replace("{namespace}", whose.namespace)
        .replace("{workload}", workload(whose.pod, whose.owner))
        .replace("{pod}", whose.pod);
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

    fn render(template: &str, cluster: &str, namespace: &str, pod: &str) -> String {
        super::render(template, Whose { cluster, namespace, pod, owner: None })
    }

    #[test]
    fn hashes_are_known_by_their_letters_and_owners() {
        let table = [
            ("web-5d4f8c7b9-x2x4z", Some("ReplicaSet"), "web"),
            ("web-5d4f8c7b9-x2x4z", None, "web"),
            ("web-5d4f8c7b9-x2x4z", Some("StatefulSet"), "web-5d4f8c7b9-x2x4z"),
            ("agent-x2x4z", Some("DaemonSet"), "agent"),
            ("agent-x2x4z", None, "agent"),
            ("nightly-28394510-x2x4z", Some("Job"), "nightly-28394510"),
            ("my-db-x2x4z", Some("ReplicaSet"), "my"),
            ("my-data-x2x4z", Some("ReplicaSet"), "my-data"),
            ("web-0", Some("StatefulSet"), "web-0"),
            ("web-0", None, "web-0"),
            ("hello-world", None, "hello-world"),
            ("a-river", None, "a-river"),
            ("x2x4z", None, "x2x4z"),
            ("-x2x4z", None, "-x2x4z"),
            ("etcd-node-1", Some("Node"), "etcd-node-1"),
        ];
        for (pod, owner, want) in table {
            assert_eq!(workload(pod, owner), want, "{pod} {owner:?}");
        }
    }

    #[test]
    fn a_name_that_is_taken_gets_what_tells_the_pod_apart() {
        let whose = Whose { cluster: "k8s", namespace: "shop", pod: "web-5d4f8c7b9-x2x4z", owner: None };
        let picked = |template: &str, taken: &[&str]| {
            names(template, whose).pick(|name| taken.contains(&name)).to_owned()
        };
        assert_eq!(picked("{namespace}-{workload}", &[]), "shop-web");
        assert_eq!(picked("{namespace}-{workload}", &["shop-web"]), "shop-web-5d4f8c7b9-x2x4z");
        assert_eq!(picked("db", &[]), "db");
        assert_eq!(picked("db", &["db"]), "db-x2x4z");
        let last = picked("db", &["db", "db-x2x4z"]);
        assert!(last.starts_with("db-") && last.len() == 11, "{last}");
        assert_eq!(names("db", whose).pick(|_| true), last, "there is always one");
        let long = names("{pod}", Whose { pod: &"p".repeat(63), ..whose });
        let other = long.pick(|name| name == long.wanted);
        assert!(other.len() <= 63 && other != long.wanted, "{other}");
        assert_eq!(names("db", whose).all().collect::<Vec<_>>(), ["db", "db-x2x4z", &last]);
        assert_eq!(names("db", whose).after("db"), ["db-x2x4z", &last]);
        assert_eq!(names("db", whose).after("db-x2x4z"), [last.as_str()]);
        assert!(names("db", whose).after(&last).is_empty());
    }

    #[test]
    fn numbers_are_told_from_other_names() {
        let long = "n".repeat(63);
        let cut = format!("{}-12", &long[..60]);
        for (wanted, label, is) in [
            ("web", "web-1", true),
            ("web", "web-12", true),
            ("web", "web", false),
            ("web", "web-a", false),
            ("web", "web-", false),
            ("web", "we-1", false),
            ("web", "shop-1", false),
            ("web-1", "web-1", false),
            ("web-1", "web-1-1", true),
            (&long, &cut, true),
            (&long[..60], "nnn-1", false),
        ] {
            assert_eq!(numbered(wanted, label), is, "{wanted} {label}");
        }
    }

    #[test]
    fn names_are_rendered() {
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
