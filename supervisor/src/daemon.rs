//! The whole supervisor, put together: from a configuration to a clean stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, anyhow};
use podtether_net::netns;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::choose::Chooser;
use crate::config::Config;
use crate::context::Context;
use crate::http::{self, Web};
use crate::kube::{self, Cluster};
use crate::metrics::Counters;
use crate::record::{Store, lock, private_dir};
use crate::{ghosts, node, table, underlay};

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting, as a sentence.
pub async fn run(mut config: Config) -> Result<()> {
    tracing::info!("configuration: {config}");
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;

    let store = Store::open(&config.node.state_dir).context("node.state_dir")?;
    let run_dir = config.node.run_dir.clone();
    private_dir(&run_dir).context("node.run_dir")?;
    // Sockets and links there are a supervisor's own, and what it does not know it removes.
    let _running = lock(&run_dir, "run").context("node.run_dir")?;
    // Not with the first pod: what a pod brings has to go with it.
    private_dir(&run_dir.join("engines"))?;
    // Our own pods are what brings pods into the tailnet: they never wait for that.
    if config.node.name.is_some()
        && let Some(own) = kube::own_namespace(&config.node.service_account_dir)
    {
        config.node.exempt_namespaces.push(own);
    }
    let cluster = Cluster::start(&config.node).map_err(|e| anyhow!(e))?;
    let context = Arc::new(Context::new(config, store, cluster.clone()).map_err(|e| anyhow!(e))?);
    netns::prepare_dir(&context.netns_dir())?;
    report_confinement(&context)?;

    let http = bind(context.config.node.http_listen, "node.http_listen").await?;
    let metrics = bind(context.config.node.metrics_listen, "node.metrics_listen").await?;
    let socket = node::bind(&run_dir)
        .with_context(|| format!("cannot bind {}", run_dir.join("supervisor.sock").display()))?;

    // Pods that have joined need no credential, so one whose file is missing stops nothing.
    for e in context.config.unusable_files() {
        tracing::error!("{e}; until then no pod can join that tailnet");
    }
    let counters = Counters::new()?;
    if let Some(cluster) = &cluster {
        counters.register(Box::new(cluster.clone()))?;
    }
    let watch = underlay::Watch::open().await;
    let table =
        table::start(Arc::clone(&context), watch.now(), counters.clone()).await.map_err(|e| anyhow!(e))?;
    tokio::spawn(watch.follow(table.clone()));
    if let Some(cluster) = &cluster {
        cluster.tell_of(table.clone());
        tokio::spawn(ghosts::run(Arc::clone(&context), cluster.clone(), table.clone()));
    }

    let chooser = Chooser::new(context.config.clone(), cluster.clone());
    let refused = counters.refused.clone();
    let ready = Arc::new(AtomicBool::new(true));
    let web = Web { table: table.clone(), counters, ready, answers: Arc::default(), cluster };
    let ready = Arc::clone(&web.ready);
    if let Some(listener) = http {
        let routes = http::all_routes(web.clone());
        tokio::spawn(http::serve(listener, routes));
    }
    if let Some(listener) = metrics {
        let routes = http::metrics_routes(web);
        tokio::spawn(http::serve(listener, routes));
    }
    tracing::info!(socket = %run_dir.join("supervisor.sock").display(), "serving");

    let why = tokio::select! {
        () = node::serve(&socket, table.clone(), chooser, refused) => "the socket is gone",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!("stopping ({why}): engines, links and records stay");
    ready.store(false, Ordering::Relaxed);
    drop(socket);
    table.stop().await;
    Ok(())
}

async fn bind(address: Option<SocketAddr>, key: &str) -> Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("{key}: cannot listen on {address}"))?;
    Ok(Some(listener))
}

/// Says once what this node does not offer for the engines' sandbox, or refuses to start there.
fn report_confinement(context: &Context) -> Result<()> {
    if context.config.node.require_sandbox
        && let Some(why) = context.shortcomings.first()
    {
        return Err(anyhow!("node.require_sandbox: {why}"));
    }
    for why in &context.shortcomings {
        tracing::warn!("{why}");
    }
    for step in crate::sandbox::not_offered(context) {
        if context.config.node.require_sandbox && step.is_missed() {
            return Err(anyhow!(
                "node.require_sandbox: engines cannot take the step {}: {}",
                step.step,
                step.why
            ));
        }
        tracing::warn!(step = step.step, "engines run without this step of their sandbox: {}", step.why);
    }
    Ok(())
}
