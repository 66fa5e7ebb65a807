//! The TUN queue: packets as the kernel hands them, which for a busy connection are super-packets of up to
//! 64 KiB, and as it takes them.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd as _, OwnedFd};

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

    /// Waits for packets and adds them to `batch`.
    pub(crate) async fn read(&self, batch: &mut Batch<VnetHeader>, drops: &mut Drops) -> Result<(), Gone> {
        let ready = self.fd.ready(Interest::READABLE.add(Interest::ERROR)).await;
        let mut ready = ready.map_err(|_| Gone("not pollable"))?;
        if ready.ready().is_error() || ready.ready().is_read_closed() {
            return Err(Gone("poll error"));
        }
        for _ in 0..READS {
            match self.read_one(batch, drops) {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    break;
                }
                Err(Errno::ENOBUFS | Errno::ENOMEM) => drops.count(Drop::TunReadNoMemory),
                Err(error) => return Err(Gone(error.desc())),
            }
            if batch.bytes() >= BYTES {
                break;
            }
        }
        Ok(())
    }

    fn read_one(&self, batch: &mut Batch<VnetHeader>, drops: &mut Drops) -> nix::Result<()> {
        let mut outcome = Ok(());
        batch.fill(LONGEST, |packet| {
            let mut header = [0; VNET_HEADER_LEN];
            match readv(&self.fd, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(packet)]) {
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

    /// Hands packets to the pod, those of one flow as super-packets. What the kernel does not take is
    /// dropped and counted: EIO while the link is down, EAGAIN when its queue is full.
    pub(crate) fn write(&mut self, batch: &mut Batch<()>, drops: &mut Drops) {
        if batch.is_empty() {
            return;
        }
        self.coalescer.group(batch, self.udp_offload);
        for write in self.coalescer.writes(batch) {
            let header = write.header.to_bytes();
            let mut pieces = [IoSlice::new(&[]); MAX_PIECES + 1];
            pieces[0] = IoSlice::new(&header);
            let mut count = 1;
            for (slot, piece) in pieces[1..].iter_mut().zip(write.pieces) {
                *slot = IoSlice::new(piece);
                count += 1;
            }
            let packets = u64::try_from(count - 1).unwrap_or(u64::MAX);
            loop {
                match writev(&self.fd, &pieces[..count]) {
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

/// Registers `fd` with the poller.
pub(super) fn pollable(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // The supervisor made it so already; a blocking descriptor would stop the whole engine.
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: an OwnedFd is one open descriptor for as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(|error| std::io::Error::other(error.to_string()))
}
