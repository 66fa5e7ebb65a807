//! How a static program looks host names up.

/// Call it before anything else runs. A static program's C library would load the node's modules for host names
/// (`resolve`, `myhostname`), which are made for the node's own C library. Files and DNS are built in.
pub fn without_modules() {
    #[cfg(all(target_os = "linux", target_env = "gnu", target_feature = "crt-static"))]
    {
        unsafe extern "C" {
            fn __nss_configure_lookup(
                database: *const libc::c_char,
                services: *const libc::c_char,
            ) -> libc::c_int;
        }
        // SAFETY: both are strings that live for ever, and nothing else runs yet.
        unsafe {
            __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr());
        }
    }
}
