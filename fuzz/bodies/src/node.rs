//! What other programs on the node say: a container runtime, a tool, an engine that was broken into.

use podtether_proto::engine::{EngineRequest, EngineResponse};
use podtether_proto::node::{NodeRequest, NodeResponse};
use podtether_proto::transport::{Format as _, Json, Requests};
use serde::Deserialize;
use tarpc::Response;

/// The first byte chooses the verb, the rest is stdin.
pub fn cni(data: &[u8]) {
    const VERBS: [&str; 6] = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"];
    let Some((verb, mut stdin)) = data.split_first() else { return };
    let verb = VERBS[usize::from(*verb) % VERBS.len()];
    let lookup = |name: &str| {
        let value = match name {
            "CNI_COMMAND" => verb,
            "CNI_CONTAINERID" => "c1",
            "CNI_NETNS" => "/var/run/netns/c1",
            "CNI_IFNAME" => "eth0",
            "CNI_ARGS" => "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;K8S_POD_UID=u",
            _ => return None,
        };
        Some(value.to_owned())
    };
    if let Err(error) = podtether_cni::rehearse(&lookup, &mut stdin) {
        assert!(!error.msg.is_empty() && !error.details.is_empty(), "an error says what to do");
    }
}

/// A frame of either service, in either direction.
pub fn rpc(data: &[u8]) {
    request::<EngineRequest>(data);
    response::<EngineResponse>(data);
    request::<NodeRequest>(data);
    response::<NodeResponse>(data);
}

fn request<T: for<'de> Deserialize<'de>>(data: &[u8]) {
    let _ = Requests::<T>::read(data);
}

fn response<T: for<'de> Deserialize<'de>>(data: &[u8]) {
    let _ = Json::<Response<T>>::read(data);
}
