//! The TUN queue: packets as the kernel hands them, which for a busy connection are super-packets of up to
//! 64 KiB, and as it takes them.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::uio::{readv, writev};
use podtether_core::batch::Batch;
use podtether_core::offload::{Coalescer, MAX_PIECES, VNET_HEADER_LEN, VnetHeader};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::drops::{Drop, Drops};

/// Packets and super-packets per wake-up.
const READS: usize = 64;
/// No further super-packet is read after so many bytes: what comes of them should still be in the
/// processor's cache when it is sent.
const BYTES: usize = 64 << 10;
/// Longest packet that the kernel hands over.
const LONGEST: usize = 65_535;

/// From `linux/if_tun.h`: what the reader of a TUN can take.
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;
const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;
const TCP_OFFLOADS: libc::c_uint = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
/// Since Linux 6.2.
const UDP_OFFLOADS: libc::c_uint = TUN_F_USO4 | TUN_F_USO6;

mod ioctl {
    nix::ioctl_write_int_bad!(
        /// Which offloads the reader can take.
        set_offload,
        libc::TUNSETOFFLOAD
    );
}

/// The kernel side of the link is gone; the supervisor has to rebuild it.
#[derive(Debug, thiserror::Error)]
#[error("the TUN device is gone ({0}): its network namespace was deleted, or the device was")]
pub(crate) struct Gone(&'static str);

/// The non-blocking TUN descriptor.
#[derive(Debug)]
pub(crate) struct Tun {
    fd: AsyncFd<OwnedFd>,
    coalescer: Coalescer,
    /// Whether the kernel takes and gives UDP super-packets.
    udp_offload: bool,
}

impl Tun {
    pub(crate) fn new(fd: OwnedFd) -> std::io::Result<Self> {
        // Without ERROR a device that vanishes would never wake us.
        let fd = pollable(fd, Interest::READABLE.add(Interest::ERROR))?;
        Ok(Self { fd, coalescer: Coalescer::new(), udp_offload: false })
    }

    /// This process reads it from now on: says what it can take. What an older kernel refuses comes packet
    /// by packet.
    pub(crate) fn begin(&mut self) {
        self.udp_offload = self.offload(TCP_OFFLOADS | UDP_OFFLOADS).is_ok();
        if !self.udp_offload
            && let Err(error) = self.offload(TCP_OFFLOADS)
        {
            tracing::warn!(%error, "the TUN takes no offloads: throughput will be lower");
        }
    }

    fn offload(&self, flags: libc::c_uint) -> nix::Result<()> {
        let flags = libc::c_int::try_from(flags).map_err(|_| Errno::EINVAL)?;
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe { ioctl::set_offload(self.fd.as_raw_fd(), flags) }.map(|_| ())
    }

    /// Gives back the memory that a burst took.
    pub(crate) fn release(&mut self) {
        self.coalescer.shrink();
    }

    /// Whether there may be packets.
    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        self.fd.poll_read_ready(cx).map_ok(|mut ready| ready.retain_ready())
    }

    /// Waits until the device is gone. It is not readable then.
    pub(crate) async fn gone(&self) -> Gone {
        match self.fd.ready(Interest::ERROR).await {
            Ok(_) => Gone("poll error"),
            Err(_) => Gone("not pollable"),
        }
    }

    /// Adds the packets that are there to `batch`.
    pub(crate) fn read(&self, batch: &mut Batch<VnetHeader>, drops: &mut Drops) -> Result<(), Gone> {
        let mut gone = None;
        let _ = self.fd.try_io(Interest::READABLE, |fd| {
            for _ in 0..READS {
                match read_one(fd, batch, drops) {
                    Ok(()) | Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => return Err(std::io::ErrorKind::WouldBlock.into()),
                    Err(Errno::ENOBUFS | Errno::ENOMEM) => drops.count(Drop::TunReadNoMemory),
                    Err(error) => {
                        gone = Some(Gone(error.desc()));
                        break;
                    }
                }
                if batch.bytes() >= BYTES {
                    break;
                }
            }
            Ok(())
        });
        gone.map_or(Ok(()), Err)
    }

    /// Hands packets to the pod, those of one flow as super-packets. What the kernel does not take is
    /// dropped and counted: EIO while the link is down, EAGAIN when its queue is full.
    pub(crate) fn write(&mut self, batch: &mut Batch<()>, drops: &mut Drops) {
        if batch.is_empty() {
            return;
        }
        self.coalescer.group(batch, self.udp_offload);
        if batch.len() == 1 {
            // Room for one piece alone: an array for many is memory that has to be fetched first.
            self.write_grouped::<2>(batch, drops);
        } else {
            self.write_grouped::<{ MAX_PIECES + 1 }>(batch, drops);
        }
    }

    /// `N`: most pieces of a packet, its header included.
    fn write_grouped<const N: usize>(&mut self, batch: &mut Batch<()>, drops: &mut Drops) {
        for write in self.coalescer.writes(batch) {
            let header = write.header.to_bytes();
            let mut pieces = [IoSlice::new(&[]); N];
            let mut count = 0;
            for (slot, piece) in pieces.iter_mut().zip(std::iter::once(header.as_slice()).chain(write.pieces))
            {
                *slot = IoSlice::new(piece);
                count += 1;
            }
            let packets = u64::try_from(count - 1).unwrap_or(u64::MAX);
            loop {
                match writev(&self.fd, pieces.get(..count).unwrap_or_default()) {
                    Ok(_) => break,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EIO) => break drops.add(Drop::TunDown, packets),
                    Err(Errno::EAGAIN | Errno::ENOBUFS) => break drops.add(Drop::TunFull, packets),
                    Err(_) => break drops.add(Drop::TunWrite, packets),
                }
            }
        }
    }
}

fn read_one(fd: &OwnedFd, batch: &mut Batch<VnetHeader>, drops: &mut Drops) -> nix::Result<()> {
    let mut outcome = Ok(());
    batch.fill(LONGEST, |packet| {
        let mut header = [0; VNET_HEADER_LEN];
        match readv(fd, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(packet)]) {
            Ok(length) => {
                let length = length.checked_sub(VNET_HEADER_LEN).filter(|length| *length > 0)?;
                match VnetHeader::read(&header) {
                    Ok(header) => Some((header, length)),
                    Err(_) => {
                        drops.count(Drop::TunReadOffload);
                        None
                    }
                }
            }
            Err(error) => {
                outcome = Err(error);
                None
            }
        }
    });
    outcome
}

/// Registers `fd` with the poller.
pub(super) fn pollable(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // The supervisor made it so already; a blocking descriptor would stop the whole engine.
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: an OwnedFd is one open descriptor for as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(|error| std::io::Error::other(error.to_string()))
}
