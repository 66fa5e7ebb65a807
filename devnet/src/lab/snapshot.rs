//! What a node looks like from outside its pods, to compare before and after.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use podtether_net::Netns;
use podtether_net::netlink::{Link, Netlink};

use super::block_on;

/// Facts by kind, each as a line of text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostState {
    facts: BTreeMap<&'static str, BTreeSet<String>>,
}

impl HostState {
    /// What differs, a line each: `+` only in `after`, `-` only here (but for mounts).
    #[must_use]
    pub fn diff(&self, after: &Self) -> Vec<String> {
        let empty = BTreeSet::new();
        let kinds: BTreeSet<&str> = self.facts.keys().chain(after.facts.keys()).copied().collect();
        let mut lines = Vec::new();
        for kind in kinds {
            let old = self.facts.get(kind).unwrap_or(&empty);
            let new = after.facts.get(kind).unwrap_or(&empty);
            // A mount of the machine's goes away in here too when the machine removes its mount point.
            if kind != "mount" {
                lines.extend(old.difference(new).map(|fact| format!("- {kind}: {fact}")));
            }
            lines.extend(new.difference(old).map(|fact| format!("+ {kind}: {fact}")));
        }
        lines
    }

    fn add(&mut self, kind: &'static str, facts: impl IntoIterator<Item = String>) {
        self.facts.entry(kind).or_default().extend(facts);
    }
}

/// Links, addresses, routes, neighbours, rules and nft objects of `ns`; mounts and processes of the caller's
/// namespaces; names of files below `dirs`.
///
/// # Errors
/// As the kernel says.
pub fn host_state(ns: &Netns, dirs: &[&Path]) -> Result<HostState> {
    let mut state = HostState::default();
    block_on(async {
        let netlink = Netlink::open(ns).await?;
        // The kernel says in its own time that a link is up whose other end is.
        let links = netlink.links().await?.into_iter().map(|link| Link { running: false, ..link });
        state.add("link", links.map(|link| format!("{link:?}")));
        state.add("address", netlink.addresses().await?.iter().map(|a| format!("{a:?}")));
        state.add("route", netlink.routes().await?.iter().map(|r| format!("{r:?}")));
        state.add("neighbour", netlink.neighbours().await?.iter().map(|n| format!("{n:?}")));
        state.add("rule", netlink.rules().await?);
        Ok(())
    })?;
    state.add("nft", ns.run_blocking(nft_objects)??);
    state.add("mount", mounts()?);
    state.add("process", processes()?);
    for dir in dirs {
        let mut files = Vec::new();
        walk(dir, &mut files)?;
        state.add("file", files);
    }
    Ok(state)
}

/// Mount point, type and source of every mount.
fn mounts() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let lines = table.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        Some(format!("{} {right}", left.split(' ').nth(4)?))
    });
    Ok(lines.collect())
}

/// Id and name of every process; without orphans that ended, whom the first process here, a test or the
/// demo, does not wait for as an init would.
fn processes() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|n| n.parse::<u32>().is_ok())
            && let Ok(name) = fs::read_to_string(entry.path().join("comm"))
            && let Ok(stat) = fs::read_to_string(entry.path().join("stat"))
            && !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with("Z 1 "))
        {
            found.push(format!("{} {}", entry.file_name().display(), name.trim()));
        }
    }
    Ok(found)
}

fn walk(dir: &Path, found: &mut Vec<String>) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // Files come and go while this looks.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("list {}", dir.display())),
    };
    for entry in entries {
        let entry = entry?;
        found.push(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), found)?;
        }
    }
    Ok(())
}

/// `NFT_MSG_GETTABLE`, `NFT_MSG_GETCHAIN`, `NFT_MSG_GETRULE`, `NFT_MSG_GETSET`.
const NFT_LISTS: [(&str, u8); 4] = [("table", 1), ("chain", 4), ("rule", 7), ("set", 10)];
/// `NFNL_SUBSYS_NFTABLES`.
const NFT_SUBSYSTEM: u8 = 10;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const NETLINK_HEADER: usize = 16;
const NFT_HEADER: usize = 4;

/// Every nft object of the calling thread's namespace, as kind and hex; none on a kernel without nf_tables.
fn nft_objects() -> Result<Vec<String>> {
    let Ok(fd) =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
    else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for (name, message) in NFT_LISTS {
        dump(&fd, message, |object| found.push(format!("{name} {}", hex::encode(object))))?;
    }
    Ok(found)
}

fn dump(fd: &OwnedFd, message: u8, mut object: impl FnMut(&[u8])) -> Result<()> {
    let length = u32::try_from(NETLINK_HEADER + NFT_HEADER)?;
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP)?;
    let mut request = length.to_ne_bytes().to_vec();
    request.extend([message, NFT_SUBSYSTEM]);
    request.extend(flags.to_ne_bytes());
    // Sequence number, port, then family, version and resource id: all zero for "everything".
    request.extend([0; 8 + NFT_HEADER]);
    sendto(fd.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..read];
        while let Some((head, _)) = rest.split_first_chunk::<NETLINK_HEADER>() {
            let size = usize::try_from(u32::from_ne_bytes([head[0], head[1], head[2], head[3]]))?;
            let kind = i32::from(u16::from_ne_bytes([head[4], head[5]]));
            if size < NETLINK_HEADER || size > rest.len() {
                bail!("a netlink message of {size} bytes in {}", rest.len());
            }
            match kind {
                // An error means that this kernel has no such lists.
                libc::NLMSG_DONE | libc::NLMSG_ERROR => return Ok(()),
                _ => object(rest.get(NETLINK_HEADER + NFT_HEADER..size).unwrap_or_default()),
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
