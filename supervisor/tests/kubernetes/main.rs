//! A real Kubernetes of one node, with the DaemonSet of `deploy/kustomize/base`, which chains the plugin
//! behind Debian's: rollouts, a node that restarts, pods that lose their sandbox, and a supervisor that is deleted
//! under traffic.
//!
//! Besides what the containerd tests need this takes kubelet, kube-apiserver, kube-controller-manager,
//! kube-scheduler, kubectl, etcd and openssl on PATH; elsewhere it says that it skips. Everything runs in namespaces
//! and cgroups of its own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::print_stdout, reason = "what was measured is for people to judge, too")]

mod cluster;
mod deleted;
mod installed;
mod life;
mod node;
#[path = "../rig/mod.rs"]
mod rig;
#[path = "../containerd/runtime.rs"]
#[allow(dead_code, reason = "the containerd tests use the rest")]
mod runtime;
mod traffic;
