//! A real containerd takes the image: its digest, and every file of it.
//!
//! As root with containerd on PATH; elsewhere this says that it skips.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "that it skips is for people to know")]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use podtether_image::oci::Image;

struct Containerd {
    dir: PathBuf,
    child: Child,
}

impl Containerd {
    fn start(dir: &Path) -> Self {
        let at = dir.display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{at}/sock\"\n"
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let child = Command::new("containerd")
            .arg("--config")
            .arg(dir.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("log")).unwrap())
            .spawn()
            .unwrap();
        let daemon = Self { dir: dir.to_owned(), child };
        let begun = Instant::now();
        while daemon.ctr(&["version"]).is_err() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{}",
                fs::read_to_string(dir.join("log")).unwrap()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        daemon
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String, String> {
        let output =
            Command::new("ctr").arg("-a").arg(self.dir.join("sock")).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if output.status.success() { Ok(text) } else { Err(text) }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn containerd_takes_the_image() {
    let on_path = |program: &str| {
        std::env::var("PATH").unwrap_or_default().split(':').any(|dir| Path::new(dir).join(program).exists())
    };
    let is_root = fs::read_to_string("/proc/self/status").unwrap().contains("\nUid:\t0\t0\t0\t0\n");
    if !is_root || !on_path("containerd") || !on_path("ctr") {
        println!("containerd_takes_the_image: skipped, it needs root, containerd and ctr");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let image = Image {
        name: "podtether:test".into(),
        architecture: "amd64".into(),
        files: [
            ("bin/podtether-supervisor".to_owned(), program.clone()),
            ("LICENSE".to_owned(), b"text".to_vec()),
        ]
        .into(),
        entrypoint: "/bin/podtether-supervisor".into(),
        labels: [("org.opencontainers.image.version".to_owned(), "1".to_owned())].into(),
    };
    let file = dir.path().join("image.tar");
    let digest = image.write(File::create(&file).unwrap()).unwrap();
    let daemon = Containerd::start(dir.path());
    let import = ["images", "import", "--snapshotter", "native", file.to_str().unwrap()];
    for _ in 0..2 {
        let said = daemon.ctr(&import).unwrap();
        assert!(said.contains("docker.io/library/podtether:test"), "{said}");
    }
    let listed = daemon.ctr(&["images", "ls"]).unwrap();
    assert!(listed.contains(&digest) && listed.lines().count() == 2, "{listed}");
    let snapshots =
        fs::read_dir(dir.path().join("root/io.containerd.snapshotter.v1.native/snapshots")).unwrap();
    let roots: Vec<PathBuf> = snapshots.map(|e| e.unwrap().path()).collect();
    let unpacked = roots[0].join("bin/podtether-supervisor");
    assert_eq!(fs::read(&unpacked).unwrap(), program);
    assert_eq!(fs::metadata(unpacked).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::read(roots[0].join("LICENSE")).unwrap(), b"text");
}
