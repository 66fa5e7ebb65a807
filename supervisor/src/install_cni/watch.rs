//! Waiting for a change of directories, and for a supervisor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Between bind and listen a socket's file is there and nobody answers; no event ends that.
const LISTENS_WITHIN: Duration = Duration::from_millis(200);

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Directories that are watched.
pub(super) struct Watch {
    inotify: AsyncFd<Descriptor>,
    dirs: Vec<PathBuf>,
}

impl Watch {
    /// Watches `dirs`, and the directories of links on the way to them: a runtime's plugins may be behind a link
    /// that an upgrade of it turns. What is not there yet is watched from its nearest parent on.
    ///
    /// # Errors
    /// The kernel gives no inotify.
    pub(super) fn new(dirs: &[PathBuf]) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: it owns the descriptor, which stays open and the same until it is dropped.
        let inotify = unsafe { AsyncFd::register(Descriptor(inotify)) }?;
        let watch = Self { inotify, dirs: dirs.to_vec() };
        watch.add()?;
        Ok(watch)
    }

    /// Adding what is watched already changes nothing.
    fn add(&self) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        for dir in self.dirs.iter().flat_map(|dir| places(dir)) {
            match self.inotify.get_ref().0.add_watch(&dir, flags) {
                Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Waits for a change since the last one that was told of, or since this was made.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut any = false;
            loop {
                match ready.get_inner().0.read_events() {
                    Ok(events) => any |= !events.is_empty(),
                    Err(Errno::EAGAIN) => break,
                    Err(e) => return Err(e.into()),
                }
            }
            ready.clear_ready();
            if any {
                self.add()?;
                return Ok(());
            }
        }
    }
}

/// The directory or its nearest parent, and the directories in which links on the way to it stand.
fn places(dir: &Path) -> Vec<PathBuf> {
    let mut places = Vec::new();
    let mut way = PathBuf::new();
    let mut nearest = PathBuf::from("/");
    for part in dir.components() {
        let parent = way.clone();
        way.push(part);
        if matches!(part, Component::Normal(_)) {
            match way.symlink_metadata() {
                Ok(meta) if meta.is_symlink() => places.push(parent),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        if way.is_dir() {
            nearest.clone_from(&way);
        }
    }
    places.push(nearest);
    places
}

/// Waits until somebody answers at `socket`.
///
/// # Errors
/// The kernel's.
pub(super) async fn answers(socket: &Path) -> io::Result<()> {
    let dir = socket.parent().unwrap_or(Path::new("/")).to_path_buf();
    let watch = Watch::new(&[dir])?;
    loop {
        match UnixStream::connect(socket).await {
            Ok(_) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                // Either a supervisor that is about to listen, or the file of one that ended.
                let _ = tokio::time::timeout(LISTENS_WITHIN, watch.changed()).await;
            }
            Err(_) => watch.changed().await?,
        }
    }
}
