//! What keeps an engine from holding anything of the supervisor's mount namespace: its program in memory,
//! and an empty mount namespace to go to. With both, the root file system and the volumes of the container
//! that the supervisor runs in can be unmounted while engines live.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// `MFD_EXEC` of Linux 6.3.
const MFD_EXEC: libc::c_uint = 0x10;

/// The engine's program in a sealed memory file: nobody changes it, and running it opens no file.
#[derive(Debug)]
pub struct Image {
    file: OwnedFd,
}

impl Image {
    /// Copies the program.
    ///
    /// # Errors
    /// It cannot be read, or the kernel allows no executable memory files (`vm.memfd_noexec`).
    pub fn load(program: &Path) -> io::Result<Self> {
        crate::spawn::keep_low_numbers_free()?;
        let file = memfd(c"podtether-engine")?;
        let mut copy = File::from(file);
        let mut source = File::open(program)?;
        let mut beginning = [0; 2];
        if source.read_at(&mut beginning, 0)? == 2 && beginning == *b"#!" {
            return Err(io::Error::other("a script is run by its path alone"));
        }
        // By the kernel: the program does not pass through this one's memory.
        io::copy(&mut source, &mut copy)?;
        let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
        // SAFETY: fcntl with integers only.
        if unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // A descriptor open for writing cannot be executed (ETXTBSY).
        let file = File::open(own_fd(copy.as_raw_fd()))?.into();
        Ok(Self { file })
    }

    /// What to execute.
    #[must_use]
    pub fn program(&self) -> PathBuf {
        own_fd(self.file.as_raw_fd())
    }
}

fn own_fd(number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{number}"))
}

fn memfd(name: &CStr) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // Older kernels know no MFD_EXEC, and need none.
    for flags in [flags | MFD_EXEC, flags] {
        // SAFETY: the name ends with a zero byte and outlives the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd >= 0 {
            // SAFETY: the kernel just gave us this descriptor and nobody else has it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
    }
    Err(io::Error::last_os_error())
}

/// A mount namespace that holds one empty, read-only directory.
#[derive(Debug)]
pub struct Nowhere {
    namespace: OwnedFd,
}

impl Nowhere {
    /// Makes it, and tries it: a thread of this process goes there. `place` is any directory.
    ///
    /// # Errors
    /// Which step the kernel refuses.
    pub fn make(place: &Path) -> Result<Self, String> {
        let place = place.to_owned();
        let namespace = on_thread(move || {
            step("unshare(CLONE_NEWNS)", unshare(CloneFlags::CLONE_NEWNS))?;
            let namespace = File::open("/proc/thread-self/ns/mnt").map_err(|e| format!("open it: {e}"))?;
            empty(&place)?;
            Ok(OwnedFd::from(namespace))
        })?;
        let tried = namespace.try_clone().map_err(|e| e.to_string())?;
        on_thread(move || {
            step("unshare(CLONE_FS)", unshare(CloneFlags::CLONE_FS))?;
            step("setns", setns(&tried, CloneFlags::CLONE_NEWNS))?;
            match std::fs::read_dir("/").map_err(|e| e.to_string())?.next() {
                None => Ok(()),
                Some(_) => Err("it is not empty".to_owned()),
            }
        })?;
        Ok(Self { namespace })
    }
}

impl AsFd for Nowhere {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }
}

/// Leaves the calling thread's mount namespace with one empty tmpfs.
fn empty(place: &Path) -> Result<(), String> {
    let (none, nothing) = (None::<&str>, None::<&str>);
    // So that no unmount below reaches another namespace.
    step("mount / private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    step("mount a tmpfs", mount(Some("podtether"), place, Some("tmpfs"), flags, Some("size=0,mode=0555")))?;
    step("chdir", nix::unistd::chdir(place))?;
    step("pivot_root", nix::unistd::pivot_root(".", "."))?;
    step("unmount the rest", umount2(".", MntFlags::MNT_DETACH))?;
    step("chdir /", nix::unistd::chdir("/"))?;
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    step("remount read-only", mount(none, "/", none, read_only, nothing))
}

fn step<T, E: std::fmt::Display>(step: &str, result: Result<T, E>) -> Result<T, String> {
    result.map_err(|e| format!("{step}: {e}"))
}

/// Never a thread of the runtime's: it is somewhere else afterwards.
fn on_thread<T: Send + 'static>(
    body: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let thread = std::thread::Builder::new().name("nowhere".into()).spawn(body).map_err(|e| e.to_string())?;
    thread.join().unwrap_or_else(|_| Err("its thread panicked".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use podtether_net::testing::in_namespaces;
    use std::io::Write as _;

    #[test]
    fn nowhere_is_empty_and_the_caller_stays() {
        in_namespaces("detach::tests::nowhere_is_empty_and_the_caller_stays", |dir| {
            let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            let nowhere = Nowhere::make(dir).unwrap();
            assert_eq!(std::fs::read_to_string("/proc/self/mountinfo").unwrap(), before);
            let fd = nowhere.as_fd().try_clone_to_owned().unwrap();
            on_thread(move || {
                unshare(CloneFlags::CLONE_FS).unwrap();
                let proc_self = File::open("/proc").unwrap();
                setns(&fd, CloneFlags::CLONE_NEWNS).unwrap();
                assert!(std::fs::write("/x", "x").is_err(), "read-only");
                let name = c"thread-self/mountinfo";
                // SAFETY: the name ends with a zero byte; the descriptor is open.
                let info = unsafe { libc::openat(proc_self.as_raw_fd(), name.as_ptr(), libc::O_RDONLY) };
                // SAFETY: just opened, nobody else has it.
                let info = io::read_to_string(unsafe { File::from_raw_fd(info) }).unwrap();
                assert_eq!(info.lines().count(), 1, "{info}");
                Ok(())
            })
            .unwrap();
        });
    }

    #[test]
    fn the_program_runs_from_memory_and_cannot_be_changed() {
        let image = Image::load(Path::new("/bin/true")).unwrap();
        assert!(std::process::Command::new(image.program()).status().unwrap().success());
        assert!(
            File::options().write(true).open(image.program()).and_then(|mut f| f.write_all(b"x")).is_err()
        );
        assert!(Image::load(Path::new("/no/such/program")).is_err());
    }
}
