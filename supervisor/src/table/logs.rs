//! How much is logged of a pod: by this process, and by the pod's engine.

use std::time::{Duration, Instant};

use podtether_proto::calls::KnownEngine;
use podtether_proto::engine::PodRef;
use podtether_proto::node::{CniError, LogWish, PodLog, PodSelector, code};
use tokio::sync::oneshot;
use tracing::Span;

use super::asked::silent;
use super::attach::{error, pod_name};
use super::{Handle, Message, Table, ending};
use crate::engine::within;
use crate::log::levels;

/// How long an engine may take to change its level.
const ENGINE_WITHIN: Duration = Duration::from_secs(2);

/// Who is logged of.
pub(super) struct Logged {
    pod: PodRef,
    client: Option<KnownEngine>,
    span: Span,
}

pub(super) type Asker = oneshot::Sender<Result<Logged, CniError>>;

impl Table {
    pub(super) fn logged(&self, selector: &PodSelector) -> Result<Logged, CniError> {
        let id = self.select(selector)?;
        let pod = self.pods.get(&id).ok_or_else(|| error(code::UNKNOWN_CONTAINER, "no such pod", ""))?;
        let client = pod.engine.as_ref().and_then(|engine| engine.client.clone());
        Ok(Logged { pod: pod.record.pod.clone(), client, span: pod.span.clone() })
    }
}

impl Handle {
    /// How much is logged of a pod, changed for a while if so wished. An engine that starts meanwhile is told as well.
    ///
    /// # Errors
    /// No such pod, or an engine that does not answer: its successor will know.
    pub async fn log_level(&self, pod: PodSelector, wish: LogWish) -> Result<PodLog, CniError> {
        let found = self.ask(|to| Message::Logged(pod, to)).await.unwrap_or_else(|| Err(ending()))?;
        let PodRef { namespace, name, .. } = &found.pod;
        let wished = match wish {
            LogWish::Tell => {
                return Ok(PodLog { raised: levels::pods().get(namespace, name, Instant::now()) });
            }
            LogWish::Default => None,
            LogWish::For(wished) => Some(wished),
        };
        levels::pods().set(namespace, name, wished, Instant::now());
        let raised = levels::pods().get(namespace, name, Instant::now());
        match raised {
            Some(now) => found.span.in_scope(|| {
                tracing::info!(level = now.level.name(), for_ms = now.ms, "somebody changed the log's level");
            }),
            None => found.span.in_scope(|| tracing::info!("the log's level is the default again")),
        }
        if let Some(client) = found.client {
            client.set_log(within(ENGINE_WITHIN), raised).await.map_err(|e| {
                let CniError { code, msg, details } = silent(&pod_name(&found.pod), &e);
                let so_far = "the supervisor's own lines are changed, and the next engine's will be";
                error(code, msg, format!("{so_far}; {details}"))
            })?;
        }
        Ok(PodLog { raised })
    }
}
