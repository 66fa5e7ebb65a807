//! `podtether-image`: writes the image of programs that `make release` has built.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Parser;
use podtether_image::elf;
use podtether_image::oci::Image;
use podtether_image::sbom;

/// Programs in the image, and the packages that they are built from.
const PROGRAMS: [(&str, &str); 4] = [
    ("podtether", "podtether-supervisor"),
    ("podtether-supervisor", "podtether-supervisor"),
    ("podtether-engine", "podtether-engine"),
    ("podtether-cni", "podtether-cni"),
];
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Writes the container image as a tar file that `ctr images import`, `docker load` and `skopeo copy oci-archive:` take.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory of the static programs.
    #[arg(long)]
    programs: PathBuf,
    /// Rust's name of what they run on.
    #[arg(long)]
    target: String,
    /// The image's name.
    #[arg(long, default_value = concat!("podtether:", env!("CARGO_PKG_VERSION")))]
    name: String,
    /// The tar file; the list of what the programs were built from goes beside it.
    #[arg(long)]
    output: PathBuf,
    /// The workspace.
    #[arg(long, default_value = ".")]
    sources: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let bom = bom(&arguments)?;
    let beside = arguments.output.with_extension("cdx.json");
    fs::write(&beside, &bom).with_context(|| format!("cannot write {}", beside.display()))?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut files = BTreeMap::from([
        ("LICENSE".to_owned(), read(&arguments.sources.join("LICENSE"))?),
        ("podtether.cdx.json".to_owned(), bom.into_bytes()),
    ]);
    for (program, _) in PROGRAMS {
        let path = arguments.programs.join(program);
        let bytes = read(&path)?;
        anyhow::ensure!(
            !elf::asks_for_a_loader(&bytes),
            "{} is linked dynamically and would find no libraries in the image: `make release` builds static programs",
            path.display()
        );
        files.insert(format!("bin/{program}"), bytes);
    }
    let labels = [("title", "podtether"), ("version", VERSION), ("licenses", "Apache-2.0 OR MIT")];
    let image = Image {
        name: arguments.name.clone(),
        architecture: architecture(&arguments.target)?.to_owned(),
        files,
        entrypoint: "/bin/podtether-supervisor".to_owned(),
        labels: labels
            .map(|(key, value)| (format!("org.opencontainers.image.{key}"), value.to_owned()))
            .into(),
    };
    let whole = arguments.output.with_extension("partial");
    let out =
        BufWriter::new(File::create(&whole).with_context(|| format!("cannot write {}", whole.display()))?);
    let digest = image.write(out)?;
    fs::rename(&whole, &arguments.output)?;
    let size = fs::metadata(&arguments.output)?.len();
    writeln!(std::io::stdout(), "{}: {} {digest}, {size} bytes", arguments.output.display(), arguments.name)?;
    Ok(())
}

/// Go's name of a target's architecture.
fn architecture(target: &str) -> Result<&'static str> {
    match target.split('-').next() {
        Some("x86_64") => Ok("amd64"),
        Some("aarch64") => Ok("arm64"),
        _ => anyhow::bail!("no image is made for {target}"),
    }
}

fn bom(arguments: &Arguments) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--format-version=1", "--filter-platform", &arguments.target])
        .current_dir(&arguments.sources)
        .output()
        .context("cannot run cargo metadata")?;
    anyhow::ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let lock = fs::read_to_string(arguments.sources.join("Cargo.lock")).context("cannot read Cargo.lock")?;
    let mut packages: Vec<&str> = PROGRAMS.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    sbom::cyclonedx(&String::from_utf8_lossy(&output.stdout), &lock, &packages, VERSION)
}
