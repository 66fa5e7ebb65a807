//! The steps that wait for something: each runs as its own task on copies and reports an [`Outcome`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use podtether_net::link::{self, Configured, LinkSpec, PodConfig};
use podtether_net::sockets::{self, Family, PortChoice};
use podtether_proto::calls::KnownEngine;
use podtether_proto::engine::{EngineStatus, Routing};
use podtether_proto::exit::EngineExit;

use super::pod::{Fds, Taken, Underlay};
use crate::adopt::{self, Adopted, NotAdopted};
use crate::context::Context;
use crate::credentials::{CredentialError, Key, Wish};
use crate::engine::{ANSWER_WITHIN, Home, within};
use crate::record::{Attachment, Identity};
use crate::restart::Ended;
use crate::spawn::Process;

/// How a step ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The engine of an earlier supervisor, or why there is none.
    Adopted(Result<Box<Adopted>, NotAdopted>),
    /// The versions that are on disk now.
    Saved(Result<(u64, u64), String>),
    Built(Result<Arc<Fds>, podtether_net::Error>),
    Minted(Result<Key, CredentialError>),
    RoutingTold(Routing, Result<Box<EngineStatus>, String>),
    Configured(PodConfig, Result<Configured, podtether_net::Error>),
    LoggedOut(Result<(), String>),
    LinkRemoved(Result<(), podtether_net::Error>),
    DeviceDeleted(Result<(), CredentialError>),
    KeyDeleted(Result<(), CredentialError>),
    Forgotten(Result<(), String>),
    /// The task panicked.
    Lost(String),
}

/// Runs blocking file work off the table's thread.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(e.to_string()))
}

pub(super) async fn save(
    context: Arc<Context>,
    attachment: Option<(Attachment, u64)>,
    identity: Option<(Identity, u64)>,
    had: (u64, u64),
) -> Outcome {
    Outcome::Saved(
        on_disk(move || {
            let mut saved = had;
            // The identity first: an attachment never names one that is not there.
            if let Some((record, version)) = identity {
                context.store.save(&record).map_err(|e| e.to_string())?;
                saved.1 = version;
            }
            if let Some((record, version)) = attachment {
                context.store.save(&record).map_err(|e| e.to_string())?;
                saved.0 = version;
            }
            Ok(saved)
        })
        .await,
    )
}

/// Looks for the engine that an earlier supervisor left.
pub(super) async fn adopt(context: Arc<Context>, record: Attachment) -> Outcome {
    let pin = context.link_spec(&record).pin();
    let home = Home::make(&context.config.node.run_dir, &record.id);
    let home = home.map_err(|e| NotAdopted::None(format!("its directory cannot be used: {e}")));
    let uid = context.uid(record.slot);
    Outcome::Adopted(match home {
        Ok(home) => adopt::adopt(&home, &record, uid, &pin).await.map(Box::new),
        Err(e) => Err(e),
    })
}

/// Makes or takes over the link and opens what an engine needs; `taken` is what a living engine holds.
pub(super) async fn build(
    context: Arc<Context>,
    record: Attachment,
    kept: Underlay,
    taken: Option<Taken>,
) -> Outcome {
    let _place = context.link_places.acquire().await;
    Outcome::Built(build_link(&context, &record, kept, taken).await.map(Arc::new))
}

async fn build_link(
    context: &Context,
    record: &Attachment,
    kept: Underlay,
    taken: Option<Taken>,
) -> Result<Fds, podtether_net::Error> {
    let spec = context.link_spec(record);
    let mut link = link::ensure_link(&spec).await?;
    if let Some(Taken { tun, dns }) = taken {
        if link.made_tun() {
            return Err(podtether_net::Error::Broken { what: "the engine's TUN is gone".into() });
        }
        return Ok(Fds { link, tun, dns, underlay: kept });
    }
    let tun = open_tun(&mut link).await?;
    let dns = link.open_dns().await?;
    let range = context.config.node.udp_port_range.clone();
    let port = |recorded: u16| Some(recorded).filter(|p| *p != 0);
    let udp4 = match kept.udp4 {
        Some(socket) => Some(socket),
        None => {
            let choice = PortChoice { preferred: port(record.udp4_port), range: range.clone() };
            sockets::underlay(Family::V4, &choice)?.map(Arc::new)
        }
    };
    let udp6 = match kept.udp6 {
        Some(socket) => Some(socket),
        None => {
            let same = udp4.as_ref().and_then(|s| s.local_addr().ok()).map(|a| a.port());
            let choice = PortChoice { preferred: port(record.udp6_port).or(same), range };
            sockets::underlay(Family::V6, &choice)?.map(Arc::new)
        }
    };
    Ok(Fds { link, tun, dns, underlay: Underlay { udp4, udp6 } })
}

/// The TUN, waiting for a killed holder's descriptor to be closed by the kernel.
async fn open_tun(link: &mut link::Link) -> Result<OwnedFd, podtether_net::Error> {
    let mut pause = Duration::from_millis(1);
    loop {
        match link.open_tun().await {
            Err(podtether_net::Error::TunBusy { .. }) if pause < Duration::from_millis(500) => {
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            done => return done,
        }
    }
}

pub(super) async fn mint(context: Arc<Context>, device: Identity, deadline: Instant) -> Outcome {
    let tailnet = &device.key.tailnet;
    let Some(credential) = context.credentials.get(tailnet) else {
        return Outcome::Minted(Err(CredentialError::Refused(format!(
            "tailnet {tailnet} is not configured any more"
        ))));
    };
    let tags = context.tags(&device);
    let wish = Wish { hostname: &device.hostname, tags: &tags, ephemeral: context.is_ephemeral(&device) };
    let minted = credential.mint(wish, deadline).await;
    Outcome::Minted(minted.map_err(|e| match e {
        CredentialError::Refused(text) => {
            CredentialError::Refused(format!("{text} (for {})", tags.join(", ")))
        }
        CredentialError::Temporary(_) => e,
    }))
}

pub(super) async fn configure(spec: LinkSpec, fds: Arc<Fds>, config: PodConfig) -> Outcome {
    let result = link::configure_pod(&spec, &fds.link, &config).await;
    Outcome::Configured(config, result)
}

pub(super) async fn tell_routing(client: KnownEngine, routing: Routing) -> Outcome {
    let result = client.set_routing(within(ANSWER_WITHIN), routing.clone()).await;
    Outcome::RoutingTold(routing, result.map(Box::new).map_err(|e| e.to_string()))
}

pub(super) async fn logout(client: KnownEngine, process: Arc<Process>, patience: Duration) -> Outcome {
    let failed = match client.logout(within(patience)).await {
        Ok(Ok(())) => return Outcome::LoggedOut(Ok(())),
        Ok(Err(e)) => e,
        Err(e) => e.to_string(),
    };
    // The news of its own expiry can end an engine before its answer is out.
    let gone = tokio::time::timeout(Duration::from_millis(100), process.ended()).await;
    Outcome::LoggedOut(match gone {
        Ok(Ended::Exit(EngineExit::Stopped | EngineExit::NodeKeyExpired | EngineExit::NodeUnknown)) => Ok(()),
        Ok(_) | Err(_) => Err(failed),
    })
}

pub(super) async fn remove_link(context: Arc<Context>, spec: LinkSpec) -> Outcome {
    let _place = context.link_places.acquire().await;
    Outcome::LinkRemoved(link::remove(&spec).await)
}

pub(super) async fn delete_device(
    context: Arc<Context>,
    tailnet: String,
    device: crate::credentials::Device,
    deadline: Instant,
) -> Outcome {
    Outcome::DeviceDeleted(match context.credentials.get(&tailnet) {
        Some(credential) => credential.delete_device(&device, deadline).await,
        None => Err(CredentialError::Refused(format!("tailnet {tailnet} is not configured any more"))),
    })
}

pub(super) async fn delete_key(
    context: Arc<Context>,
    tailnet: String,
    id: Option<String>,
    deadline: Instant,
) -> Outcome {
    Outcome::KeyDeleted(match (context.credentials.get(&tailnet), id) {
        (Some(credential), Some(id)) => credential.delete_key(&id, deadline).await,
        _ => Ok(()),
    })
}

/// What happens to the identity when its attachment is forgotten.
#[derive(Debug, Clone)]
pub(super) enum IdentityFate {
    /// Another attachment uses it.
    Keep,
    /// Its record changes: unused, or leaving.
    Save(Box<Identity>),
    /// There is no device behind it any more.
    Remove(String),
}

pub(super) async fn forget(context: Arc<Context>, id: String, fate: IdentityFate) -> Outcome {
    Outcome::Forgotten(
        on_disk(move || {
            match &fate {
                IdentityFate::Keep => {}
                IdentityFate::Save(record) => {
                    context.store.save(record.as_ref()).map_err(|e| e.to_string())?
                }
                IdentityFate::Remove(id) => {
                    context.store.remove::<Identity>(id).map_err(|e| e.to_string())?;
                }
            }
            context.cgroups.remove(&id).map_err(|e| e.to_string())?;
            Home::remove(&context.config.node.run_dir, &id)
                .map_err(|e| format!("cannot remove the engine's directory: {e}"))?;
            // Last: while the record is there, a new supervisor finishes what this one began.
            context.store.remove::<Attachment>(&id).map_err(|e| e.to_string())
        })
        .await,
    )
}
