//! The runtime's network configuration: whether podtether is in it, behind the primary plugin.

use std::path::Path;

use serde_json::Value;

use super::Found;

const OURS: &str = "podtether-cni";
/// Largest file that is read.
const MAX_BYTES: u64 = 1 << 20;
const ADD_IT: &str = "append {\"type\": \"podtether-cni\"} to its plugins, behind the primary one";

pub(super) fn all(dir: &Path, bin: &Path, pre: bool) -> Vec<Found> {
    let files = match read(dir) {
        Ok(files) => files,
        Err(e) => {
            return vec![Found::skip(
                format!("{} cannot be read: {e}", dir.display()),
                "in a container it may not be mounted: run this on the node, or name the directory (--cni-conf-dir)",
            )];
        }
    };
    let mut found = order(&files, pre);
    found.push(plugin(bin, pre));
    found
}

/// Names and texts of the files that a runtime reads, in its order.
fn read(dir: &Path) -> std::io::Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_read = ["conf", "conflist", "json"].iter().any(|end| name.ends_with(&format!(".{end}")));
        if is_read {
            let small = entry.metadata().is_ok_and(|m| m.len() <= MAX_BYTES);
            let text =
                if small { std::fs::read_to_string(entry.path()).unwrap_or_default() } else { String::new() };
            files.push((name, text));
        }
    }
    files.sort();
    Ok(files)
}

/// The types of its plugins.
fn plugins(text: &str) -> Result<Vec<String>, String> {
    let json: Value = serde_json::from_str(text).map_err(|e| format!("is not JSON: {e}"))?;
    let kind = |plugin: &Value| plugin.get("type").and_then(Value::as_str).map(str::to_owned);
    match json.get("plugins") {
        Some(Value::Array(plugins)) if !plugins.is_empty() => {
            let kinds: Vec<String> = plugins.iter().filter_map(kind).collect();
            if kinds.len() == plugins.len() {
                Ok(kinds)
            } else {
                Err("has a plugin without a type".to_owned())
            }
        }
        Some(_) => Err("has no plugins".to_owned()),
        None => {
            kind(&json).map(|kind| vec![kind]).ok_or_else(|| "names neither plugins nor a type".to_owned())
        }
    }
}

/// Runtimes take the first file in the order of names that they can use.
fn order(files: &[(String, String)], pre: bool) -> Vec<Found> {
    let mut found = Vec::new();
    let Some(first) = files.first() else {
        return vec![Found::fail(
            "no network configuration",
            "install the primary CNI first: podtether joins it and replaces none",
        )];
    };
    for (name, text) in files {
        if let Err(why) = plugins(text) {
            let fix = "whoever wrote it has to write it again; a runtime passes it over or stops at it";
            found.push(if name == &first.0 {
                Found::fail(format!("{name} {why}"), fix)
            } else {
                Found::warn(format!("{name} {why}"), fix)
            });
        }
    }
    let has = |(name, text): &(String, String)| {
        let kinds = plugins(text).ok()?;
        let at = kinds.iter().position(|kind| kind == OURS)?;
        Some((name.clone(), kinds, at))
    };
    let Some((name, kinds, at)) = files.iter().find_map(has) else {
        let usable = files.iter().find_map(|(name, text)| Some((name, plugins(text).ok()?)));
        let Some((name, kinds)) = usable else { return found };
        let what = format!("{name}: {}", kinds.join(", "));
        found.push(if pre {
            Found::ok(format!("{what}; podtether will be chained behind it"))
        } else {
            Found::fail(format!("{what}: no podtether-cni in it"), ADD_IT)
        });
        return found;
    };
    let what = format!("{name}: {}", kinds.join(", "));
    found.push(if at == 0 {
        Found::fail(format!("{what}: podtether-cni is the first"), "it needs the primary plugin before it")
    } else if name != first.0 {
        Found::fail(
            format!("{what}; but the runtime takes {}, which comes first", first.0),
            format!("remove {name} and {}", ADD_IT.replace("its", &format!("{}'s", first.0))),
        )
    } else {
        Found::ok(what)
    });
    if !files.iter().any(|(file, text)| *file == name && text.contains("io.kubernetes.cri.pod-annotations")) {
        found.push(Found::warn(
            format!("{name}: the runtime is not asked for pods' annotations"),
            "add \"capabilities\": {\"io.kubernetes.cri.pod-annotations\": true, \"dns\": true} to podtether-cni there",
        ));
    }
    found
}

fn plugin(dir: &Path, pre: bool) -> Found {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join(OURS);
    let runs = std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    let at = path.display();
    match (runs, pre) {
        (true, _) => Found::ok(format!("plugin {at}")),
        (false, true) => Found::ok(format!("{at} is not there yet")),
        (false, false) if !dir.is_dir() => Found::skip(
            format!("{} is not here", dir.display()),
            "in a container it may not be mounted: run this on the node, or name it (--cni-bin-dir)",
        ),
        (false, false) => {
            Found::fail(format!("{at} is missing or cannot be run"), "copy podtether-cni there, mode 0755")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Grade;
    use super::*;

    fn grades(files: &[(&str, &str)], pre: bool) -> Vec<(Grade, String)> {
        let files: Vec<_> = files.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect();
        order(&files, pre)
            .into_iter()
            .map(|Found(grade, what, fix)| (grade, format!("{what} | {fix}")))
            .collect()
    }

    const PRIMARY: &str = r#"{"name":"n","plugins":[{"type":"flannel"},{"type":"portmap"}]}"#;
    const WHOLE: &str = r#"{"name":"n","plugins":[{"type":"flannel"},{"type":"podtether-cni",
        "capabilities":{"io.kubernetes.cri.pod-annotations":true}}]}"#;
    const FIRST: &str = r#"{"name":"n","plugins":[{"type":"podtether-cni"},{"type":"flannel"}]}"#;

    #[test]
    fn conflists() {
        let worst = |files: &[(&str, &str)], pre| {
            let grades = grades(files, pre);
            let rank = |grade| match grade {
                Grade::Ok | Grade::Skip => 0,
                Grade::Warn => 1,
                Grade::Fail => 2,
            };
            grades.into_iter().max_by_key(|(grade, _)| rank(*grade)).unwrap()
        };
        assert_eq!(worst(&[("10-a.conflist", WHOLE)], false).0, Grade::Ok);
        assert_eq!(worst(&[("10-a.conflist", PRIMARY)], true).0, Grade::Ok);
        let table: [(&[(&str, &str)], &str); 6] = [
            (&[], "install the primary CNI first"),
            (&[("10-a.conflist", PRIMARY)], "append {\"type\""),
            (&[("10-a.conflist", FIRST)], "needs the primary plugin before it"),
            (
                &[("05-cilium.conflist", PRIMARY), ("10-a.conflist", WHOLE)],
                "takes 05-cilium.conflist, which comes first",
            ),
            (&[("10-a.conflist", "{")], "is not JSON"),
            (&[("10-a.conf", r#"{"plugins":[]}"#)], "has no plugins"),
        ];
        for (files, says) in table {
            let (grade, text) = worst(files, false);
            assert!(grade == Grade::Fail && text.contains(says), "{says}: {text}");
        }
        let (grade, text) = worst(&[("10-a.conflist", &WHOLE.replace("cri.pod-annotations", "x"))], false);
        assert!(grade == Grade::Warn && text.contains("annotations"), "{text}");
        assert_eq!(plugins(r#"{"type":"bridge"}"#), Ok(vec!["bridge".to_owned()]));
    }

    #[test]
    fn files_are_read_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["20-b.conf", "10-a.conflist", "README", "00-c.conflist.bak"] {
            std::fs::write(dir.path().join(name), PRIMARY).unwrap();
        }
        let names: Vec<_> = read(dir.path()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["10-a.conflist", "20-b.conf"]);
        let found = all(&dir.path().join("gone"), dir.path(), false);
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [Grade::Skip]);
        assert_eq!(plugin(dir.path(), false).0, Grade::Fail);
    }
}
