//! Decides about the pods that a runtime asks for, and remembers what became of those that joined nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use podtether_proto::engine::PodRef;
use podtether_proto::node::{self, AddRequest, Attached, CniError, PodSelector, code};

use super::{Annotations, Choice, Facts, Join, Key, Verdict, choose};
use crate::config::Config;
use crate::kube::Cluster;

/// Pods that joined nothing, of which it is remembered why.
const REMEMBERED: usize = 256;

/// How long a pod of an opt-in cluster that says nothing waits for what its namespace says.
const OPTIONAL_NAMESPACE: Duration = Duration::from_secs(2);

fn not_known(pod: &PodRef, what: &str, cluster: &Cluster) -> CniError {
    CniError {
        code: code::TRY_AGAIN,
        msg: format!("pod {}/{}: {what} not known", pod.namespace, pod.name),
        details: format!("{}; the runtime tries again", cluster.complaint()),
    }
}

/// What the runtime's request comes to.
#[derive(Debug)]
pub enum Decision {
    /// The pod joins nothing, and starts.
    Nothing,
    /// It joins: the request as it is to be made, and as what.
    Join(Box<AddRequest>, Box<Choice>),
    /// It cannot start, or not yet.
    Refused(CniError),
}

/// Decides. Clones share what is remembered.
#[derive(Debug, Clone)]
pub struct Chooser {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    cluster: Option<Cluster>,
    /// The latest last.
    without: Mutex<VecDeque<(PodRef, node::Choice)>>,
}

impl Chooser {
    /// By this configuration, and by what `cluster` tells.
    #[must_use]
    pub fn new(config: Config, cluster: Option<Cluster>) -> Chooser {
        Chooser { inner: Arc::new(Inner { config, cluster, without: Mutex::default() }) }
    }

    /// Decides about one pod, when what has to be known of it is known. That is waited for, for half the
    /// runtime's patience.
    pub async fn decide(&self, mut request: AddRequest) -> Decision {
        let mut owner = None;
        let mut defaults = Annotations::new();
        let mut unknown = None;
        if let Some(cluster) = &self.inner.cluster
            && !self.inner.config.node.exempt_namespaces.contains(&request.pod.namespace)
        {
            let until = Instant::now() + Duration::from_millis(request.timeout_ms / 2);
            // Every runtime that passes any passes some: where the pod came from.
            if request.annotations.is_empty() {
                let Some(seen) = cluster.pod(&request.pod, until).await else {
                    return Decision::Refused(not_known(&request.pod, "its annotations are", cluster));
                };
                request.annotations = seen.annotations;
            }
            owner = cluster.owner(&request.pod);
            match self.defaults(cluster, &request, until).await {
                Ok(known) => defaults = known,
                Err(Some(refused)) => return Decision::Refused(refused),
                Err(None) => unknown = Some(cluster.complaint()),
            }
        }
        let facts = Facts {
            namespace: &request.pod.namespace,
            pod: &request.pod.name,
            own: &request.annotations,
            defaults: &defaults,
            owner: owner.as_deref(),
            tailnet: &request.tailnet,
        };
        match choose(&facts, &self.inner.config) {
            Verdict::Nothing(mut told) => {
                told.notes.extend(
                    unknown.map(|why| {
                        format!("what namespace {} says is not known: {why}", request.pod.namespace)
                    }),
                );
                self.remember(&request.pod, told);
                Decision::Nothing
            }
            Verdict::Join(choice) => {
                request.tailnet.clone_from(&choice.tailnet);
                Decision::Join(Box::new(request), choice)
            }
            Verdict::Refused(refused) => {
                let pod = &request.pod;
                let sentence = refused.told.refusals.join("; ");
                tracing::warn!(namespace = pod.namespace, pod = pod.name, "it cannot join: {sentence}");
                self.remember(pod, refused.told);
                if !refused.required {
                    return Decision::Nothing;
                }
                let name = format!("pod {}/{}", pod.namespace, pod.name);
                let details = "correct that, and the runtime's next try takes it; nothing was made".into();
                Decision::Refused(CniError {
                    code: code::BAD_CONFIG,
                    msg: format!("{name}: {sentence}"),
                    details,
                })
            }
        }
    }

    /// The namespace's annotations. `Err(None)` where they are not known and the pod need not wait for that:
    /// it joins only when somebody asks for it.
    async fn defaults(
        &self,
        cluster: &Cluster,
        request: &AddRequest,
        until: Instant,
    ) -> Result<Annotations, Option<CniError>> {
        let namespace = &request.pod.namespace;
        let enabled = request.annotations.get(&Key::Enabled.annotation()).map(|value| value.trim());
        let patience = match (enabled, self.inner.config.node.join) {
            (Some("false"), _) => return Ok(Annotations::new()),
            (Some(_), _) | (None, Join::OptOut) => until,
            (None, Join::OptIn) => until.min(Instant::now() + OPTIONAL_NAMESPACE),
        };
        match cluster.namespace(namespace, patience).await {
            Some(known) => Ok(known),
            None if enabled.is_none() && self.inner.config.node.join == Join::OptIn => Err(None),
            None => {
                let what = format!("the annotations of namespace {namespace} are");
                Err(Some(not_known(&request.pod, &what, cluster)))
            }
        }
    }

    /// What came of an ADD, for the cluster to be told.
    pub fn answered(&self, pod: &PodRef, answer: &Result<Attached, CniError>) {
        if let Some(cluster) = &self.inner.cluster {
            cluster.answered(pod, answer);
        }
    }

    /// What was decided about a pod that did not join.
    #[must_use]
    pub fn remembered(&self, selector: &PodSelector) -> Option<node::Choice> {
        let PodSelector::Pod { namespace, name } = selector else { return None };
        let without = self.inner.without.lock().unwrap_or_else(PoisonError::into_inner);
        let found = without.iter().rev().find(|(pod, _)| pod.namespace == *namespace && pod.name == *name);
        found.map(|(_, told)| told.clone())
    }

    fn remember(&self, pod: &PodRef, told: node::Choice) {
        let mut without = self.inner.without.lock().unwrap_or_else(PoisonError::into_inner);
        without.retain(|(other, _)| other.uid != pod.uid);
        without.push_back((pod.clone(), told));
        if without.len() > REMEMBERED {
            without.pop_front();
        }
    }
}
