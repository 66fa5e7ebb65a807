//! Decides about the pods that a runtime asks for, and remembers what became of those that joined nothing.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use podtether_proto::engine::PodRef;
use podtether_proto::node::{self, AddRequest, CniError, PodSelector, code};

use super::{Annotations, Choice, Facts, Verdict, choose};
use crate::config::Config;

/// Pods that joined nothing, of which it is remembered why.
const REMEMBERED: usize = 256;

/// What the runtime's request comes to.
#[derive(Debug)]
pub enum Decision {
    /// The pod joins nothing, and starts.
    Nothing,
    /// It joins: the request as it is to be made, and as what.
    Join(Box<AddRequest>, Box<Choice>),
    /// It cannot start.
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
    /// The latest last.
    without: Mutex<VecDeque<(PodRef, node::Choice)>>,
}

impl Chooser {
    /// By this configuration.
    #[must_use]
    pub fn new(config: Config) -> Chooser {
        Chooser { inner: Arc::new(Inner { config, without: Mutex::default() }) }
    }

    /// Decides about one pod.
    pub fn decide(&self, mut request: AddRequest) -> Decision {
        let facts = Facts {
            namespace: &request.pod.namespace,
            pod: &request.pod.name,
            own: &request.annotations,
            defaults: &Annotations::new(),
            owner: None,
            tailnet: &request.tailnet,
        };
        match choose(&facts, &self.inner.config) {
            Verdict::Nothing(told) => {
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
                let details = "correct that and delete the pod; nothing was made".into();
                Decision::Refused(CniError {
                    code: code::BAD_CONFIG,
                    msg: format!("{name}: {sentence}"),
                    details,
                })
            }
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
