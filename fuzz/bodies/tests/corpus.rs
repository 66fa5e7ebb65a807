//! Every saved input runs through its target: the seeds, and whatever once broke something.

use std::fs;
use std::path::Path;

use podtether_fuzz_bodies::TARGETS;

#[test]
fn every_saved_input_is_survived() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus");
    for (name, target) in TARGETS {
        let dir = root.join(name);
        let files = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let mut count = 0;
        for file in files {
            let path = file.expect("an entry").path();
            println!("{}", path.display());
            target(&fs::read(&path).expect("a readable input"));
            count += 1;
        }
        assert!(count > 0, "{name} has no seeds");
    }
}

#[test]
fn every_target_has_its_program() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("the manifest of the targets");
    let programs = manifest.matches("[[bin]]").count();
    assert_eq!(programs, TARGETS.len(), "one program for each target");
    for (name, _) in TARGETS {
        let path = root.join(format!("fuzz_targets/{name}.rs"));
        let program = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(program.contains(&format!("podtether_fuzz_bodies::{name}(data)")), "{name} runs {name}");
    }
}
