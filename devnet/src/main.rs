//! `podtether-devnet serve`: a tailnet to develop and test against. `podtether-devnet demo`: see [`demo`].
//! `podtether-devnet chaos`: see [`podtether_devnet::chaos`]. `podtether-devnet joins`: see
//! [`podtether_devnet::bench::joins`]. `podtether-devnet bench`: see [`podtether_devnet::bench`].
#![expect(clippy::print_stdout, reason = "a command line tool prints its answers")]

mod demo;
mod gauge;
mod joins;
mod trial;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use podtether_devnet::{AuthKeyOptions, Devnet, DevnetConfig, RegionConfig};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a control server, admin API, DERP and STUN until interrupted.
    Serve(Serve),
    /// Show the main job: pods join a tailnet through CNI, survive kill -9, and leave.
    Demo(demo::Demo),
    /// Kill, stop and unplug things in a seeded order under traffic, and say what it cost.
    Chaos(trial::Chaos),
    /// Let pods join alone and all at once, and say how long they wait and what they cost.
    Joins(joins::Joins),
    /// Measure rates, latency, processor time and memory, beside the bare network and tailscaled.
    Bench(gauge::Bench),
}

#[derive(Args)]
struct Serve {
    /// Address of the plain listener for control and admin API; may be given more than once.
    #[arg(long, default_value = "127.0.0.1:8480")]
    http: Vec<SocketAddr>,
    /// Address of the TLS listener.
    #[arg(long, default_value = "127.0.0.1:8443")]
    https: Vec<SocketAddr>,
    /// A DERP region: an IPv4 address, an IPv6 address, or both with a comma; may be given more than once.
    #[arg(long = "region", default_value = "127.0.0.1", value_name = "IP[,IP]")]
    regions: Vec<Addresses>,
    /// File to write the root certificate to.
    #[arg(long, default_value = "devnet-ca.pem")]
    ca_out: PathBuf,
    /// MagicDNS suffix.
    #[arg(long, default_value = "tailnet.test")]
    domain: String,
    /// First IPv4 address to hand out.
    #[arg(long, default_value = "100.64.0.1")]
    ipv4_start: Ipv4Addr,
    /// Access rules, TOML or JSON; none allows everything. Read again on SIGHUP.
    #[arg(long)]
    policy: Option<PathBuf>,
    /// Tags of the printed auth key, and tags the OAuth client may use.
    #[arg(long, default_value = "tag:k8s-pod")]
    tag: Vec<String>,
    /// Seconds between keepalives on a silent map stream.
    #[arg(long, default_value_t = 50)]
    keep_alive: u64,
}

#[derive(Clone)]
struct Addresses(Vec<IpAddr>);

impl FromStr for Addresses {
    type Err = std::net::AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match Cli::parse().command {
        Command::Serve(arguments) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("tokio runtime")?
            .block_on(serve(arguments))
            .map(|()| ExitCode::SUCCESS),
        Command::Demo(arguments) => Ok(demo::run(&arguments)),
        Command::Chaos(arguments) => Ok(trial::run(&arguments)),
        Command::Joins(arguments) => Ok(joins::run(&arguments)),
        Command::Bench(arguments) => Ok(gauge::run(&arguments)),
    }
}

async fn serve(arguments: Serve) -> anyhow::Result<()> {
    let mut config = DevnetConfig {
        http_listen: arguments.http.clone(),
        https_listen: arguments.https.clone(),
        base_domain: arguments.domain.clone(),
        ipv4_start: arguments.ipv4_start,
        regions: (1..)
            .zip(&arguments.regions)
            .map(|(id, Addresses(addresses))| RegionConfig::new(id, addresses.clone()))
            .collect(),
        policy: load_policy(&arguments)?,
        keep_alive: Duration::from_secs(arguments.keep_alive),
        ..DevnetConfig::default()
    };
    config.oauth.tags.clone_from(&arguments.tag);
    let devnet = Devnet::start(config).await?;
    std::fs::write(&arguments.ca_out, devnet.ca_pem())
        .with_context(|| format!("write {}", arguments.ca_out.display()))?;
    let lifetime = Duration::from_secs(90 * 24 * 3600);
    let reusable = AuthKeyOptions { reusable: true, lifetime, ..AuthKeyOptions::default() };
    let key = devnet.create_auth_key(reusable.clone());
    let tagged = devnet.create_auth_key(AuthKeyOptions { tags: arguments.tag.clone(), ..reusable });
    let (client_id, client_secret) = devnet.oauth_client();
    println!("control and API   {}", devnet.http_url());
    println!("the same with TLS {}", devnet.https_url());
    println!("root certificate  {}", arguments.ca_out.display());
    println!("OAuth client      {client_id}");
    println!("OAuth secret      {client_secret}");
    println!("auth key          {}", key.secret);
    println!("tagged auth key   {}", tagged.secret);

    let mut hangups = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup())?;
    let mut terminations = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            _ = terminations.recv() => break,
            _ = hangups.recv() => match load_policy(&arguments) {
                Ok(policy) => devnet.set_policy(policy),
                Err(error) => tracing::error!("policy kept as it was: {error:#}"),
            },
        }
    }
    devnet.stop().await;
    Ok(())
}

fn load_policy(arguments: &Serve) -> anyhow::Result<Option<podtether_devnet::acl::Policy>> {
    let Some(path) = &arguments.policy else { return Ok(None) };
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.parse().map(Some).with_context(|| format!("policy {}", path.display()))
}
