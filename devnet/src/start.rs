//! Binding everything and setting it going.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use podtether_core::key::{MachinePrivate, NodePrivate};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::ca::Authority;
use crate::config::{DevnetConfig, RegionConfig};
use crate::control::{crowd, wire};
use crate::derp::{self, Relay};
use crate::devnet::{Devnet, Inner};
use crate::distance;
use crate::http_server;
use crate::listen;
use crate::random;
use crate::shared::Shared;
use crate::stun;

const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a devnet did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address that cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// A certificate could not be made.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS settings do not fit together.
    #[error("tls: {0}")]
    Tls(#[from] rustls::Error),
    /// A setting makes no sense.
    #[error("{0}")]
    Config(String),
    /// A thread or its preparation failed.
    #[error("thread: {0}")]
    Thread(io::Error),
    /// No randomness for keys.
    #[error(transparent)]
    Random(#[from] podtether_core::key::RandomError),
}

impl Devnet {
    /// Starts a devnet on the current tokio runtime.
    ///
    /// # Errors
    /// When an address cannot be bound or the settings make no sense.
    pub async fn start(config: DevnetConfig) -> Result<Self, StartError> {
        let mut config = config;
        check(&config)?;
        for secret in [&mut config.oauth.client_id, &mut config.oauth.client_secret] {
            if secret.is_empty() {
                *secret = random::token(16);
            }
        }
        if let Some(headscale) = config.headscale.as_mut().filter(|api| api.api_key.is_empty()) {
            headscale.api_key = format!("hskey-api-{}-{}", random::hex(6), random::hex(32));
        }
        let authority = Authority::new(certificate_names(&config))?;
        let http = bind(&config.http_listen).await?;
        let https = bind(&config.https_listen).await?;
        let shared = Arc::new(Shared::new(config, MachinePrivate::generate()?));
        let stop = CancellationToken::new();
        let mut tasks = tokio::task::JoinSet::new();
        let mut http_addresses = Vec::new();
        for (listener, address) in http {
            http_addresses.push(address);
            let (shared, gate) = (shared.clone(), shared.gate.subscribe());
            tasks.spawn(listen::accept(listener, gate, move |stream, token| {
                http_server::serve(shared.clone(), stream, token)
            }));
        }
        let mut https_addresses = Vec::new();
        for (listener, address) in https {
            https_addresses.push(address);
            let gate = shared.gate.subscribe();
            let (shared, acceptor) = (shared.clone(), authority.acceptor.clone());
            tasks.spawn(listen::accept(listener, gate, move |stream, token| {
                let (shared, acceptor) = (shared.clone(), acceptor.clone());
                async move {
                    if let Some(stream) = secure(&acceptor, stream).await {
                        http_server::serve(shared, stream, token).await;
                    }
                }
            }));
        }
        shared.set_server_url(match (http_addresses.first(), https_addresses.first()) {
            (Some(address), _) => format!("http://{address}"),
            (None, Some(address)) => format!("https://{address}"),
            (None, None) => String::new(),
        });
        let mut relays = Vec::new();
        let mut bound = Vec::new();
        let mut regions = BTreeMap::new();
        for region in &shared.config.regions {
            let relay =
                Arc::new(Relay::new(region.id, region.distance, shared.clone(), NodePrivate::generate()?));
            let region = start_region(region, &relay, &authority, &mut tasks).await?;
            regions.insert(region.id, region_json(&region, &shared.config.base_domain));
            bound.push(region);
            relays.push(relay);
        }
        let map = wire::DerpMap { regions, omit_default_regions: true };
        shared.with_state(|state| state.set_derp_map(map));
        tasks.spawn(pass_time(shared.clone()));
        tasks.spawn(crowd::churn(shared.clone()));
        let (finished, stopped) = watch::channel(false);
        let stopping = stop.clone();
        tokio::spawn(async move {
            stopping.cancelled().await;
            tasks.shutdown().await;
            finished.send_replace(true);
        });
        Ok(Self {
            inner: Arc::new(Inner {
                shared,
                root_pem: authority.root_pem,
                http: http_addresses,
                https: https_addresses,
                relays,
                regions: bound,
                stop_on_drop: stop.clone().drop_guard(),
                stop,
                stopped,
            }),
        })
    }

    /// Starts a devnet on a thread of its own, which runs `enter` before anything else: there it can
    /// step into the network namespace whose addresses the configuration names.
    ///
    /// # Errors
    /// As [`Devnet::start`], and when `enter` fails.
    pub fn spawn_thread(
        config: DevnetConfig,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, StartError> {
        let (started, result) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("devnet".into())
            .spawn(move || {
                let runtime = enter()
                    .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_all().build())
                    .map_err(StartError::Thread);
                let runtime = match runtime {
                    Ok(runtime) => runtime,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return;
                    }
                };
                runtime.block_on(async move {
                    let devnet = Self::start(config).await;
                    let stopped = devnet.as_ref().ok().map(|devnet| devnet.inner.stopped.clone());
                    let _ = started.send(devnet);
                    if let Some(mut stopped) = stopped {
                        let _ = stopped.wait_for(|stopped| *stopped).await;
                    }
                });
            })
            .map_err(StartError::Thread)?;
        result.recv().map_err(|error| StartError::Thread(io::Error::other(error)))?
    }
}

fn check(config: &DevnetConfig) -> Result<(), StartError> {
    let domain = &config.base_domain;
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if !domain.split('.').all(label) || domain.len() > 180 {
        return Err(StartError::Config(format!("base domain {domain:?} is not a domain name")));
    }
    if config.keep_alive.is_zero() {
        return Err(StartError::Config("keep-alive interval is zero".into()));
    }
    let mut ids = BTreeSet::new();
    for region in &config.regions {
        if region.id == 0 || !ids.insert(region.id) {
            return Err(StartError::Config(format!("region id {} is zero or used twice", region.id)));
        }
        let families: BTreeSet<bool> = region.addresses.iter().map(IpAddr::is_ipv4).collect();
        if region.addresses.is_empty() || families.len() != region.addresses.len() {
            let id = region.id;
            return Err(StartError::Config(format!("region {id} needs one address per family at most")));
        }
    }
    Ok(())
}

fn certificate_names(config: &DevnetConfig) -> Vec<String> {
    let mut names = config.tls_names.clone();
    names.push("localhost".into());
    let listeners = config.http_listen.iter().chain(&config.https_listen).map(SocketAddr::ip);
    let regions = config.regions.iter().flat_map(|region| region.addresses.iter().copied());
    names.extend(listeners.chain(regions).map(|address| address.to_string()));
    names.extend(config.regions.iter().map(|region| region.host_name(&config.base_domain)));
    names.sort();
    names.dedup();
    names
}

async fn secure<S: AsyncRead + AsyncWrite + Unpin>(
    acceptor: &TlsAcceptor,
    stream: S,
) -> Option<TlsStream<S>> {
    match tokio::time::timeout(TLS_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%error, "TLS handshake failed");
            None
        }
        Err(_) => None,
    }
}

/// Listens on all addresses of a region, on the same ports, which are in the returned copy.
async fn start_region(
    region: &RegionConfig,
    relay: &Arc<Relay>,
    authority: &Authority,
    tasks: &mut tokio::task::JoinSet<()>,
) -> Result<RegionConfig, StartError> {
    let mut bound = region.clone();
    for &ip in &region.addresses {
        let (listener, address) = bind_one(SocketAddr::new(ip, bound.derp_port)).await?;
        bound.derp_port = address.port();
        let (own, acceptor) = (relay.clone(), authority.acceptor.clone());
        tasks.spawn(listen::accept(listener, relay.gate.subscribe(), move |stream, token| {
            let (relay, acceptor) = (own.clone(), acceptor.clone());
            async move {
                let stream = distance::far(stream, relay.distance.clone());
                if let Some(stream) = secure(&acceptor, stream).await {
                    derp::serve(relay, stream, token).await;
                }
            }
        }));
        let address = SocketAddr::new(ip, bound.stun_port);
        let listen_error = |error| StartError::Listen { address, error };
        let socket = UdpSocket::bind(address).await.map_err(listen_error)?;
        bound.stun_port = socket.local_addr().map_err(listen_error)?.port();
        tasks.spawn(stun::serve(socket, relay.clone()));
    }
    Ok(bound)
}

fn region_json(region: &RegionConfig, base_domain: &str) -> wire::DerpRegion {
    let address = |wanted: fn(&IpAddr) -> bool| {
        region.addresses.iter().find(|ip| wanted(ip)).map_or_else(|| "none".into(), ToString::to_string)
    };
    wire::DerpRegion {
        region_id: region.id,
        region_code: region.code.clone(),
        region_name: format!("Region {}", region.id),
        nodes: vec![wire::DerpNode {
            name: format!("{}a", region.id),
            region_id: region.id,
            host_name: region.host_name(base_domain),
            ipv4: address(IpAddr::is_ipv4),
            ipv6: address(IpAddr::is_ipv6),
            stun_port: region.stun_port,
            derp_port: region.derp_port,
        }],
    }
}

async fn bind_one(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let listen_error = |error| StartError::Listen { address, error };
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let actual = listener.local_addr().map_err(listen_error)?;
    Ok((listener, actual))
}

async fn bind(addresses: &[SocketAddr]) -> Result<Vec<(TcpListener, SocketAddr)>, StartError> {
    let mut bound = Vec::with_capacity(addresses.len());
    for &address in addresses {
        bound.push(bind_one(address).await?);
    }
    Ok(bound)
}

async fn pass_time(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(200));
    loop {
        ticks.tick().await;
        shared.with_state(|state| state.tick(&shared.config, Timestamp::now()));
    }
}
