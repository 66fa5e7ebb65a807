//! Compiles `seccomp/calls.toml` for the target into BPF, so that the engine carries bytes and no compiler.
#![allow(clippy::unwrap_used)] // A failed build script is how a build fails.

use std::path::Path;

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use serde::Deserialize;
use serde_json::{Value, json};

const CALLS: &str = "seccomp/calls.toml";
/// Stands for the process's own id until the filter is loaded; no process can have it (PID_MAX_LIMIT is 2^22).
const SELF: u32 = 0x7e1f_5e1f;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Calls {
    allow: Vec<Allow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allow {
    call: String,
    why: String,
    #[serde(default)]
    args: Vec<String>,
    arch: Option<Vec<String>>,
}

fn main() {
    println!("cargo::rerun-if-changed={CALLS}");
    println!("cargo::rerun-if-changed=build.rs");
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap();
    let target = TargetArch::try_from(arch.as_str()).expect("seccomp filters for this architecture");
    let calls: Calls = toml::from_str(&std::fs::read_to_string(CALLS).unwrap()).unwrap();
    let rules: Vec<Value> = calls
        .allow
        .iter()
        .filter(|allow| allow.arch.as_ref().is_none_or(|list| list.contains(&arch)))
        .map(rule)
        .collect();
    let filter = json!({
        "engine": { "mismatch_action": "kill_process", "match_action": "allow", "filter": rules }
    });
    let compiled = compile_from_json(filter.to_string().as_bytes(), target).unwrap();
    let program: &BpfProgram = &compiled["engine"];
    let placeholders = program.iter().filter(|step| step.k == SELF).count();
    assert_eq!(placeholders, 2, "each `self` is one comparison with the placeholder");
    let mut bytes = Vec::new();
    for step in program {
        bytes.extend_from_slice(&step.code.to_ne_bytes());
        bytes.extend_from_slice(&[step.jt, step.jf]);
        bytes.extend_from_slice(&step.k.to_ne_bytes());
    }
    let out = std::env::var_os("OUT_DIR").unwrap();
    std::fs::write(Path::new(&out).join("seccomp.bpf"), bytes).unwrap();
    println!("cargo::rustc-env=SECCOMP_SELF={SELF}");
}

fn rule(allow: &Allow) -> Value {
    assert!(!allow.why.is_empty(), "{} is allowed without a reason", allow.call);
    let args: Vec<Value> = allow.args.iter().map(|text| condition(text)).collect();
    if args.is_empty() {
        return json!({ "syscall": allow.call });
    }
    json!({ "syscall": allow.call, "args": args })
}

/// `ARGUMENT = VALUE` or `ARGUMENT & MASK = VALUE`.
fn condition(text: &str) -> Value {
    let (left, value) = text.split_once('=').unwrap();
    let value = match value.trim() {
        "self" => SELF,
        number => parse(number),
    };
    match left.split_once('&') {
        Some((index, mask)) => json!({
            "index": parse(index), "type": "dword", "op": { "masked_eq": parse(mask) }, "val": value,
        }),
        None => json!({ "index": parse(left), "type": "dword", "op": "eq", "val": value }),
    }
}

fn parse(number: &str) -> u32 {
    let number = number.trim();
    match number.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => number.parse(),
    }
    .unwrap()
}
