//! The system calls that are left: the filter compiled from `seccomp/calls.toml`, and the one call that loads it.

use std::io;

const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/seccomp.bpf"));
/// Where the filter has the process's own id to come; see `build.rs`.
const SELF: &str = env!("SECCOMP_SELF");
const STEP_BYTES: usize = 8;

/// Kills the process at any call that is not on the list, from here on.
///
/// The kernel logs the call. The mitigation that older kernels couple to seccomp (speculative store bypass off)
/// is left out: it keeps foreign code in a process from its secrets, and this process runs none.
pub(crate) fn load() -> io::Result<()> {
    let own: u32 = std::process::id();
    let mut steps: Vec<libc::sock_filter> = PROGRAM.chunks_exact(STEP_BYTES).filter_map(step).collect();
    let placeholder: u32 = SELF.parse().map_err(io::Error::other)?;
    for step in &mut steps {
        if step.k == placeholder {
            step.k = own;
        }
    }
    let len = u16::try_from(steps.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: steps.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    // SAFETY: `program` points to `len` steps that outlive the call; the kernel copies them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn step(bytes: &[u8]) -> Option<libc::sock_filter> {
    let [c0, c1, jt, jf, k @ ..] = bytes else { return None };
    let k = u32::from_ne_bytes(k.try_into().ok()?);
    Some(libc::sock_filter { code: u16::from_ne_bytes([*c0, *c1]), jt: *jt, jf: *jf, k })
}
