//! The image: one layer, configuration, manifest and index, as the OCI image specification 1.1 has them, and
//! beside them `manifest.json`, by which older Docker engines load it.

use std::collections::BTreeMap;
use std::io::{self, Write};

use flate2::{Compression, GzBuilder};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::tar::Archive;

/// What an image is made of.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its full name with registry and tag; without a registry it is `docker.io/library`'s, as Kubernetes has it.
    pub name: String,
    /// `amd64`, `arm64`, … as Go calls them.
    pub architecture: String,
    /// Files by their paths, without a leading `/`; those below `bin/` can be run.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The program that a container runs unless it is told otherwise.
    pub entrypoint: String,
    /// `org.opencontainers.image.*` and others.
    pub labels: BTreeMap<String, String>,
}

impl Image {
    /// Writes it as a tar file, and gives the manifest's digest.
    ///
    /// # Errors
    /// Those of `out`, and names that do not fit.
    pub fn write(&self, out: impl Write) -> io::Result<String> {
        let layer = self.layer()?;
        let packed = gzip(&layer)?;
        let config = text(&json!({
            "architecture": self.architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {"Entrypoint": [self.entrypoint], "Env": ["PATH=/bin"], "WorkingDir": "/", "Labels": self.labels},
            "rootfs": {"type": "layers", "diff_ids": [hash(&layer)]},
        }));
        let manifest = text(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
            "annotations": self.labels,
        }));
        let name = self.full_name();
        let mut described = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        described["platform"] = json!({"architecture": self.architecture, "os": "linux"});
        described["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rsplit_once(':').map_or("latest", |(_, tag)| tag),
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [described],
        });
        let blob = |bytes: &[u8]| format!("blobs/sha256/{}", &hash(bytes)["sha256:".len()..]);
        let docker = json!([{"Config": blob(&config), "RepoTags": [self.name], "Layers": [blob(&packed)]}]);

        let mut archive = Archive::new(out);
        archive.directory("blobs/")?;
        archive.directory("blobs/sha256/")?;
        let blobs: BTreeMap<String, &[u8]> =
            [&config, &manifest, &packed].into_iter().map(|bytes| (blob(bytes), &bytes[..])).collect();
        for (path, bytes) in blobs {
            archive.file(&path, 0o644, bytes)?;
        }
        archive.file("index.json", 0o644, &text(&index))?;
        archive.file("manifest.json", 0o644, &text(&docker))?;
        archive.file("oci-layout", 0o644, &text(&json!({"imageLayoutVersion": "1.0.0"})))?;
        archive.finish()?.flush()?;
        Ok(hash(&manifest))
    }

    fn full_name(&self) -> String {
        let tagged = if self.name.rsplit('/').next().is_some_and(|last| last.contains(':')) {
            self.name.clone()
        } else {
            format!("{}:latest", self.name)
        };
        let is_registry = |first: &str| first == "localhost" || first.contains('.') || first.contains(':');
        match tagged.split_once('/') {
            Some((first, _)) if is_registry(first) => tagged,
            Some(_) => format!("docker.io/{tagged}"),
            None => format!("docker.io/library/{tagged}"),
        }
    }

    fn layer(&self) -> io::Result<Vec<u8>> {
        let mut archive = Archive::new(Vec::new());
        let mut made = Vec::new();
        for (path, content) in &self.files {
            for (end, _) in path.match_indices('/') {
                let directory = &path[..=end];
                if !made.iter().any(|known| known == directory) {
                    archive.directory(directory)?;
                    made.push(directory.to_owned());
                }
            }
            archive.file(path, if path.starts_with("bin/") { 0o755 } else { 0o644 }, content)?;
        }
        archive.finish()
    }
}

fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::new(6));
    encoder.write_all(bytes)?;
    encoder.finish()
}

fn text(json: &Value) -> Vec<u8> {
    json.to_string().into_bytes()
}

fn hash(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(digest(&SHA256, bytes)))
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": hash(bytes), "size": bytes.len()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str) -> Image {
        let files = [("bin/b", "program"), ("LICENSE", "text"), ("a/b/c", "deep"), ("bin/a", "another")];
        Image {
            name: name.into(),
            architecture: "amd64".into(),
            files: files.map(|(path, text)| (path.to_owned(), text.as_bytes().to_vec())).into(),
            entrypoint: "/bin/a".into(),
            labels: [("org.opencontainers.image.version".to_owned(), "1".to_owned())].into(),
        }
    }

    #[test]
    fn the_same_files_make_the_same_bytes() {
        let written = |image: &Image| {
            let mut bytes = Vec::new();
            let digest = image.write(&mut bytes).unwrap();
            (bytes, digest)
        };
        assert_eq!(written(&image("x:1")), written(&image("x:1")));
        let mut changed = image("x:1");
        changed.files.insert("bin/b".into(), b"programme".to_vec());
        assert_ne!(written(&image("x:1")).1, written(&changed).1);
        // A name is no part of the image.
        assert_eq!(written(&image("x:1")).1, written(&image("y:2")).1);
    }

    #[test]
    fn names_are_kubernetes_own() {
        let table = [
            ("podtether:0.1.0", "docker.io/library/podtether:0.1.0"),
            ("podtether", "docker.io/library/podtether:latest"),
            ("you/podtether:1", "docker.io/you/podtether:1"),
            ("ghcr.io/you/podtether:1", "ghcr.io/you/podtether:1"),
            ("localhost:5000/podtether", "localhost:5000/podtether:latest"),
        ];
        for (name, full) in table {
            assert_eq!(image(name).full_name(), full);
        }
    }

    #[test]
    fn every_blob_is_where_its_digest_says_and_tar_reads_the_layer() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        let digest_of_manifest = image("x:1").write(&mut bytes).unwrap();
        let tar = |arguments: &[&str], input: &[u8]| {
            let mut child = std::process::Command::new("tar")
                .args(arguments)
                .current_dir(dir.path())
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(input).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap()
        };
        tar(&["-x"], &bytes);
        let json = |path: &str| -> Value {
            serde_json::from_slice(&std::fs::read(dir.path().join(path)).unwrap()).unwrap()
        };
        let blob = |descriptor: &Value| {
            let path = format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"));
            let bytes = std::fs::read(dir.path().join(&path)).unwrap();
            assert_eq!(
                (hash(&bytes), bytes.len() as u64),
                (descriptor["digest"].as_str().unwrap().into(), descriptor["size"].as_u64().unwrap())
            );
            (path, bytes)
        };
        let index = json("index.json");
        assert_eq!(index["manifests"][0]["digest"], digest_of_manifest.as_str());
        let manifest = json(&blob(&index["manifests"][0]).0);
        let config = json(&blob(&manifest["config"]).0);
        let layer = blob(&manifest["layers"][0]).1;
        let listed = tar(&["-tvz", "--numeric-owner", "--utc", "-f", "-"], &layer);
        let lines: Vec<String> =
            listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "-rw-r--r-- 0/0 4 1970-01-01 00:00 LICENSE",
                "drwxr-xr-x 0/0 0 1970-01-01 00:00 a/",
                "drwxr-xr-x 0/0 0 1970-01-01 00:00 a/b/",
                "-rw-r--r-- 0/0 4 1970-01-01 00:00 a/b/c",
                "drwxr-xr-x 0/0 0 1970-01-01 00:00 bin/",
                "-rwxr-xr-x 0/0 7 1970-01-01 00:00 bin/a",
                "-rwxr-xr-x 0/0 7 1970-01-01 00:00 bin/b",
            ]
        );
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    }
}
