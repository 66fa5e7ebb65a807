//! Network namespaces as owned handles.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Error, Result, Step};

/// The calling thread's own namespace; `/proc/self` would name the main thread's.
const OWN_NS: &str = "/proc/thread-self/ns/net";

/// A network namespace, kept alive by this handle. Two handles are equal when they lead to the same
/// namespace, whatever paths they were opened by.
#[derive(Debug, Clone)]
pub struct Netns {
    file: Arc<File>,
    id: NetnsId,
}

/// Device and inode: what a namespace is known by while it lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of nsfs.
    pub device: u64,
    /// Inode there.
    pub inode: u64,
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Netns {}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Netns {
    /// The calling thread's namespace.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn current() -> Result<Self> {
        Self::open(Path::new(OWN_NS))
    }

    /// Opens the namespace at `path`: a pin, a runtime's `/var/run/netns/…`, or `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// [`Error::NamespaceGone`] when nothing is there, or when it is an ordinary file: a pin that was
    /// unmounted leaves one.
    pub fn open(path: &Path) -> Result<Self> {
        let gone = || Error::NamespaceGone { path: path.to_owned() };
        let file = OpenOptions::new()
            .read(true)
            // A path from outside may be a FIFO; opening one must not wait for a writer.
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(|e| match e.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH | libc::ENXIO) => gone(),
                _ => Error::Kernel { step: format!("open {}", path.display()), source: e },
            })?;
        // SAFETY: NS_GET_NSTYPE takes no argument and only reads from the open descriptor.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(gone());
        }
        let meta = file.metadata().step(|| format!("stat {}", path.display()))?;
        let id = NetnsId { device: meta.dev(), inode: meta.ino() };
        Ok(Self { file: Arc::new(file), id })
    }

    /// The namespace that a socket belongs to.
    ///
    /// # Errors
    /// It is not a socket, or belongs to a namespace that this process may not look at.
    pub fn of_socket(socket: &impl AsRawFd) -> Result<Self> {
        /// `SIOCGSKNS` of `linux/sockios.h`.
        const SIOCGSKNS: libc::Ioctl = 0x894c;
        // SAFETY: takes no argument; gives a new descriptor or -1.
        Self::given(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) }, "socket")
    }

    /// The namespace that a TUN's device is in.
    ///
    /// # Errors
    /// It is not a TUN, has lost its device, or belongs to a namespace that this process may not look at.
    pub fn of_tun(tun: &impl AsRawFd) -> Result<Self> {
        /// `TUNGETDEVNETNS` of `linux/if_tun.h`.
        const TUNGETDEVNETNS: libc::Ioctl = 0x54e3;
        // SAFETY: takes no argument; gives a new descriptor or -1.
        Self::given(unsafe { libc::ioctl(tun.as_raw_fd(), TUNGETDEVNETNS) }, "TUN")
    }

    /// What one of the calls above gave.
    fn given(fd: libc::c_int, of: &str) -> Result<Self> {
        let step = || format!("ask a {of} for its network namespace");
        if fd < 0 {
            return Err(io::Error::last_os_error()).step(step);
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        let file = unsafe { File::from_raw_fd(fd) };
        let meta = file.metadata().step(step)?;
        let id = NetnsId { device: meta.dev(), inode: meta.ino() };
        Ok(Self { file: Arc::new(file), id })
    }

    /// Makes a namespace that lives as long as its handles.
    ///
    /// # Errors
    /// Without the privilege to make one.
    pub async fn create() -> Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).step(|| "make a network namespace".into())?;
            Self::current()
        })
        .await?
    }

    /// The namespace pinned at `path`, made when there is none yet. The directory has to exist; see
    /// [`prepare_dir`].
    ///
    /// # Errors
    /// Without the privilege to make or mount one.
    pub async fn ensure_pinned(path: &Path) -> Result<Self> {
        match Self::open(path) {
            Err(Error::NamespaceGone { .. }) => {}
            found => return found,
        }
        let path = path.to_owned();
        on_thread(move || {
            unshare(CloneFlags::CLONE_NEWNET).step(|| "make a network namespace".into())?;
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(&path)
                .step(|| format!("create {}", path.display()))?;
            mount(Some(OWN_NS), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .step(|| format!("mount a network namespace at {}", path.display()))?;
            Self::open(&path)
        })
        .await?
    }

    /// Identity of the namespace.
    #[must_use]
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `work` on a thread of its own inside the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered; `work`'s own result is the inner value.
    pub async fn run<T, F>(&self, work: F) -> Result<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let ns = self.clone();
        on_thread(move || {
            ns.enter()?;
            Ok(work())
        })
        .await?
    }

    /// As [`Netns::run`], for callers outside a runtime: blocks until `work` has returned.
    ///
    /// # Errors
    /// As [`Netns::run`].
    pub fn run_blocking<T, F>(&self, work: F) -> Result<T>
    where
        F: FnOnce() -> T + Send,
        T: Send,
    {
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, || {
                    self.enter()?;
                    Ok(work())
                })
                .step(|| "start a thread".into())?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace: only for a thread or a child process that will
    /// never do anything else.
    ///
    /// # Errors
    /// Without the privilege.
    pub fn enter(&self) -> Result<()> {
        setns(self.as_fd(), CloneFlags::CLONE_NEWNET).step(|| "enter a network namespace".into())
    }
}

/// Runs `work` on a thread that ends with it, so that whatever it does to its own namespaces ends too.
async fn on_thread<T, F>(work: F) -> Result<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || {
            // The caller may have gone away; then nobody wants the result.
            let _ = done.send(work());
        })
        .step(|| "start a thread".into())?;
    result.await.map_err(|_| Error::Kernel {
        step: "work inside a network namespace".into(),
        source: io::Error::other("the thread panicked"),
    })
}

/// Takes the pin at `path` away, whatever state it is in. The namespace itself goes with its last handle.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn unpin(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // Once more: two starters may have mounted one over the other.
            Ok(()) => {}
            Err(nix::Error::ENOENT | nix::Error::EINVAL) => break,
            Err(e) => return Err(e).step(|| format!("unmount {}", path.display())),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).step(|| format!("remove {}", path.display())),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Makes `dir` fit for pins: it exists (0700) and its mount propagates, so that an unmount here also
/// happens in the mount namespaces of other processes; a copy left there would keep the namespace alive.
/// Returns whether it had to become a mount point of its own for that.
///
/// # Errors
/// Without the privilege to mount.
pub fn prepare_dir(dir: &Path) -> Result<bool> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .step(|| format!("create {}", dir.display()))?;
    let dir = dir.canonicalize().step(|| format!("resolve {}", dir.display()))?;
    let table = fs::read_to_string("/proc/thread-self/mountinfo").step(|| "read the mount table".into())?;
    if mount_of(&table, &dir).is_some_and(|m| m.shared) {
        return Ok(false);
    }
    let step = || format!("make {} a shared mount", dir.display());
    mount(Some(&dir), &dir, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>).step(step)?;
    mount(None::<&str>, &dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>).step(step)?;
    Ok(true)
}

/// A line of mountinfo, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    shared: bool,
}

/// The mount that `path` lies on: of the longest matching mount points, the one mounted last.
fn mount_of(table: &str, path: &Path) -> Option<Mount> {
    let mut best: Option<Mount> = None;
    for line in table.lines() {
        let mut fields = line.split(' ').skip(4);
        let (Some(point), Some(_options)) = (fields.next(), fields.next()) else { continue };
        let point = PathBuf::from(unescape(point));
        let shared = fields.take_while(|f| *f != "-").any(|f| f.starts_with("shared:"));
        let longer = best.as_ref().is_none_or(|b| point.as_os_str().len() >= b.point.as_os_str().len());
        if path.starts_with(&point) && longer {
            best = Some(Mount { point, shared });
        }
    }
    best
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{block_on, in_namespaces};

    #[test]
    fn the_longest_and_latest_mount_point_decides() {
        let table = "\
            22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            30 22 0:26 / /run rw,nosuid master:5 - tmpfs tmpfs rw\n\
            31 30 0:27 /x /run/a\\040b rw shared:7 master:2 - tmpfs tmpfs rw\n\
            32 22 0:28 / /runner rw shared:9 - tmpfs tmpfs rw\n\
            33 30 0:29 / /run rw - tmpfs tmpfs rw\n\
            broken line\n";
        let shared = |p: &str| mount_of(table, Path::new(p)).map(|m| (m.point, m.shared));
        assert_eq!(shared("/var/lib"), Some(("/".into(), true)));
        assert_eq!(shared("/run/podtether"), Some(("/run".into(), false)));
        assert_eq!(shared("/run/a b/netns"), Some(("/run/a b".into(), true)));
        assert_eq!(shared("/runner/x"), Some(("/runner".into(), true)));
    }

    #[test]
    fn a_pin_outlives_its_handles_and_goes_with_unpin() {
        in_namespaces("netns::tests::a_pin_outlives_its_handles_and_goes_with_unpin", |dir| {
            block_on(async {
                let pins = dir.join("netns");
                prepare_dir(&pins).unwrap();
                assert!(!prepare_dir(&pins).unwrap(), "prepared once is enough");
                let path = pins.join("a");
                let first = Netns::ensure_pinned(&path).await.unwrap();
                assert_ne!(first, Netns::current().unwrap());
                let id = first.id();
                drop(first);
                let again = Netns::ensure_pinned(&path).await.unwrap();
                assert_eq!(again.id(), id, "the pin is found, not made anew");
                assert_eq!(again.run(|| Netns::current().unwrap().id()).await.unwrap(), id);
                assert_eq!(again.run_blocking(|| Netns::current().unwrap()).unwrap(), again);
                unpin(&path).unwrap();
                unpin(&path).unwrap();
                assert!(!path.exists());
                assert!(matches!(Netns::open(&path), Err(Error::NamespaceGone { .. })));
            });
        });
    }

    #[test]
    fn what_is_no_namespace_is_named() {
        in_namespaces("netns::tests::what_is_no_namespace_is_named", |dir| {
            block_on(async {
                let file = dir.join("plain");
                fs::write(&file, "").unwrap();
                for path in [file.as_path(), &dir.join("none"), Path::new("/proc/self/ns/mnt"), dir] {
                    assert!(
                        matches!(Netns::open(path), Err(Error::NamespaceGone { .. })),
                        "{}",
                        path.display()
                    );
                }
                // A plain file where the pin belongs (an unmount that was interrupted) is taken over.
                assert!(Netns::ensure_pinned(&file).await.is_ok());
            });
        });
    }
}
