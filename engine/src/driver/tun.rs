//! The TUN queue: batches of plain IP packets, the virtio header stripped and put back here.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::uio::{readv, writev};
use podtether_core::batch::Batch;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::drops::{Drop, Drops};

/// Packets per wake-up.
const READS: usize = 64;
/// `virtio_net_hdr` without `num_buffers`; all zero means: one whole packet, checksums done.
const HEADER: usize = 10;
const NO_OFFLOAD: [u8; HEADER] = [0; HEADER];
/// Where `gso_type` is in the header.
const GSO_TYPE: usize = 1;

/// The kernel side of the link is gone; the supervisor has to rebuild it.
#[derive(Debug, thiserror::Error)]
#[error("the TUN device is gone ({0}): its network namespace was deleted, or the device was")]
pub(crate) struct Gone(&'static str);

/// The non-blocking TUN descriptor.
#[derive(Debug)]
pub(crate) struct Tun {
    fd: AsyncFd<OwnedFd>,
    max_packet: usize,
}

impl Tun {
    pub(crate) fn new(fd: OwnedFd, mtu: u16) -> std::io::Result<Self> {
        // Without ERROR a device that vanishes would never wake us.
        let fd = pollable(fd, Interest::READABLE.add(Interest::ERROR))?;
        Ok(Self { fd, max_packet: usize::from(mtu) })
    }

    /// Waits for packets and adds them to `batch`.
    pub(crate) async fn read(&self, batch: &mut Batch<()>, drops: &mut Drops) -> Result<(), Gone> {
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
        }
        Ok(())
    }

    fn read_one(&self, batch: &mut Batch<()>, drops: &mut Drops) -> nix::Result<()> {
        let mut outcome = Ok(());
        batch.push_with((), self.max_packet, |packet| {
            let mut header = NO_OFFLOAD;
            let read = readv(&self.fd, &mut [IoSliceMut::new(&mut header), IoSliceMut::new(packet)]);
            match read {
                Ok(length) if header[GSO_TYPE] == 0 => length.checked_sub(HEADER).filter(|l| *l > 0),
                Ok(_) => {
                    // No offload was asked for, so there should be none.
                    drops.count(Drop::TunReadOffload);
                    None
                }
                Err(error) => {
                    outcome = Err(error);
                    None
                }
            }
        });
        outcome
    }

    /// Hands packets to the pod. What the kernel does not take is dropped and counted: EIO while the
    /// link is down, EAGAIN when its queue is full.
    pub(crate) fn write(&self, batch: &Batch<()>, drops: &mut Drops) {
        for ((), packet) in batch.iter() {
            let pieces = [IoSlice::new(&NO_OFFLOAD), IoSlice::new(packet)];
            loop {
                match writev(&self.fd, &pieces) {
                    Ok(_) => break,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EIO) => break drops.count(Drop::TunDown),
                    Err(Errno::EAGAIN | Errno::ENOBUFS) => break drops.count(Drop::TunFull),
                    Err(_) => break drops.count(Drop::TunWrite),
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
