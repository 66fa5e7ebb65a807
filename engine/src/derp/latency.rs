//! How far a region is when UDP does not get through.

use std::io;
use std::time::{Duration, Instant};

use podtether_core::tailcfg::{DerpNode, DerpRegion};

use super::connection::{connect, trust};
use crate::dial::{self, Dialer};
use crate::http1;

/// One server's time to be connected and to answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The time from a request for `/derp/latency-check`, over a TLS connection that stands, to the first server's
/// answer. `None` when no server of the region answers.
pub(crate) async fn measure(dialer: &Dialer, region: &DerpRegion) -> Option<Duration> {
    for node in region.nodes.iter().filter(|node| !node.stun_only) {
        match tokio::time::timeout(TIMEOUT, ask(dialer, node)).await {
            Ok(Ok(latency)) => return Some(latency),
            Ok(Err(error)) => tracing::debug!(host = node.host_name, %error, "no HTTPS latency"),
            Err(_) => tracing::debug!(host = node.host_name, "no HTTPS latency in time"),
        }
    }
    None
}

async fn ask(dialer: &Dialer, node: &DerpNode) -> io::Result<Duration> {
    let port = node.relay_port().ok_or_else(|| io::Error::other("the DERP map gives no usable port"))?;
    let tcp = connect(dialer, node, port).await?;
    let mut stream = dialer.secure(tcp, &node.host_name, &trust(node)?).await?;
    let request = format!(
        "GET /derp/latency-check HTTP/1.1\r\nHost: {}\r\nUser-Agent: podtether\r\nConnection: close\r\n\r\n",
        dial::host_header(&node.host_name, port, 443)
    );
    let asked = Instant::now();
    let reply = http1::exchange(&mut stream, &request).await?;
    let took = asked.elapsed();
    // Any answer of a relay tells the distance; a proxy that refuses tells its own.
    if reply.status != 200 {
        return Err(io::Error::other(format!("HTTP {}", reply.status)));
    }
    Ok(took)
}
