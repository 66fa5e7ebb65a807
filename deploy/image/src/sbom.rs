//! What programs were built from, as CycloneDX 1.5: from `cargo metadata` and `Cargo.lock`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The packages that `roots` (packages of the workspace) are linked from, the same text for the same lock file.
///
/// # Errors
/// `metadata` or `lock` is not what cargo writes.
pub fn cyclonedx(metadata: &str, lock: &str, roots: &[&str], version: &str) -> Result<String> {
    let metadata: Value = serde_json::from_str(metadata).context("cargo metadata")?;
    let checksums = checksums(lock)?;
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages: BTreeMap<String, Value> =
        array(&metadata["packages"]).into_iter().map(|p| (word(&p["id"]), p)).collect();
    let needs: BTreeMap<String, Vec<String>> = array(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|node| {
            let linked = |dep: &Value| array(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null());
            let needs =
                array(&node["deps"]).iter().filter(|dep| linked(dep)).map(|dep| word(&dep["pkg"])).collect();
            (word(&node["id"]), needs)
        })
        .collect();
    let is_root = |p: &Value| roots.iter().any(|root| p["name"] == *root) && p["source"].is_null();
    let mut open: Vec<String> =
        packages.iter().filter(|(_, p)| is_root(p)).map(|(id, _)| id.clone()).collect();
    anyhow::ensure!(open.len() == roots.len(), "not all of {roots:?} are packages of this workspace");
    let mut reached = BTreeSet::new();
    while let Some(id) = open.pop() {
        if reached.insert(id.clone()) {
            open.extend(needs.get(&id).into_iter().flatten().cloned());
        }
    }
    let reference = |p: &Value| format!("pkg:cargo/{}@{}", word(&p["name"]), word(&p["version"]));
    let chosen: BTreeMap<String, &Value> = reached
        .iter()
        .map(|id| packages.get(id).map(|p| (reference(p), p)).with_context(|| format!("no package {id}")))
        .collect::<Result<_>>()?;
    let components: Vec<Value> = chosen
        .iter()
        .map(|(reference, p)| {
            let mut component = json!({
                "type": "library", "bom-ref": reference, "purl": reference,
                "name": p["name"], "version": p["version"],
            });
            if let Some(licence) = p["license"].as_str() {
                // Old manifests separate with a slash what either may be chosen of.
                component["licenses"] = json!([{"expression": licence.replace('/', " OR ")}]);
            }
            let key = (word(&p["name"]), word(&p["version"]));
            if let Some(checksum) = checksums.get(&key) {
                component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
            }
            component
        })
        .collect();
    let dependencies: Vec<Value> = reached
        .iter()
        .filter_map(|id| {
            let on: BTreeSet<String> =
                needs.get(id)?.iter().filter_map(|need| packages.get(need)).map(reference).collect();
            Some(json!({"ref": reference(packages.get(id)?), "dependsOn": on}))
        })
        .collect();
    let bom = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": "podtether", "name": "podtether", "version": version}},
        "components": components,
        "dependencies": dependencies,
    });
    Ok(format!("{bom:#}\n"))
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn checksums(lock: &str) -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Table = lock.parse().context("Cargo.lock")?;
    let packages =
        lock.get("package").and_then(toml::Value::as_array).context("Cargo.lock has no packages")?;
    let text =
        |package: &toml::Value, key: &str| package.get(key).and_then(toml::Value::as_str).map(str::to_owned);
    let entry =
        |package| Some(((text(package, "name")?, text(package, "version")?), text(package, "checksum")?));
    Ok(packages.iter().filter_map(entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_is_listed_and_nothing_else() {
        let package = |name: &str, source: Value| json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "source": source});
        let dep = |name: &str, kind: Value| json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let node = |id: &str, deps: Vec<Value>| json!({"id": id, "deps": deps});
        let registry = json!("registry");
        let metadata = json!({
            "packages": [package("root", Value::Null), package("used", registry.clone()), package("deep", registry.clone()),
                package("test", registry.clone()), package("build", registry)],
            "resolve": {"nodes": [
                node("root", vec![dep("used", Value::Null), dep("test", json!("dev")), dep("build", json!("build"))]),
                node("used", vec![dep("deep", Value::Null)]),
            ]},
        });
        let lock = "[[package]]\nname = \"deep\"\nversion = \"1.0.0\"\nchecksum = \"abc\"\n";
        let bom: Value =
            serde_json::from_str(&cyclonedx(&metadata.to_string(), lock, &["root"], "1").unwrap()).unwrap();
        let names: Vec<_> = bom["components"].as_array().unwrap().iter().map(|c| word(&c["name"])).collect();
        assert_eq!(names, ["deep", "root", "used"]);
        assert_eq!(bom["components"][0]["hashes"][0]["content"], "abc");
        assert_eq!(bom["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(bom["dependencies"][0]["dependsOn"], json!(["pkg:cargo/used@1.0.0"]));
        assert!(cyclonedx(&metadata.to_string(), lock, &["other"], "1").is_err());
    }
}
