//! Whose line it is: a pod's work runs in a span that names the pod, and every line in it says so.

use std::fmt;

use podtether_proto::engine::PodRef;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Span, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::{LookupSpan, Scope as Spans};

/// Fields that say whose a line is, in their order.
pub const WHOSE: [&str; 4] = ["namespace", "pod", "container", "join"];

const NAME: &str = "pod";

/// The span of a pod's attachment. It has no parent: one pod's work may begin in another's.
#[must_use]
pub fn of(pod: &PodRef, container: &str, join: &str) -> Span {
    // As grave as can be, so that no filter takes it from the lines in it.
    tracing::error_span!(parent: None, NAME, namespace = pod.namespace, pod = pod.name, container, join)
}

/// Whether it is the span of [`of`].
pub(super) fn is_ours(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.name() == NAME && metadata.target() == module_path!()
}

/// What a span of [`of`] says, in the order of [`WHOSE`]; empty where it is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Whose(pub [String; 4]);

impl Whose {
    /// Namespace and name of the pod.
    #[must_use]
    pub fn pod(&self) -> (&str, &str) {
        let [namespace, pod, ..] = &self.0;
        (namespace, pod)
    }

    /// Id of the CNI ADD that made the attachment.
    #[must_use]
    pub fn join(&self) -> &str {
        &self.0[3]
    }

    /// Whose a line is that names some of it itself (`said`, in the order of [`WHOSE`]) in this span: what the
    /// span says of another pod than the line's own is not true of it.
    #[must_use]
    pub fn or(said: [Option<String>; 4], span: Option<&Whose>) -> Whose {
        let same = |span: &&Whose| {
            said.iter()
                .zip(&span.0)
                .take(2)
                .all(|(said, known)| said.as_ref().is_none_or(|said| said == known))
        };
        let mut whose = span.filter(same).cloned().unwrap_or_default();
        for (place, said) in whose.0.iter_mut().zip(said) {
            if let Some(said) = said {
                *place = said;
            }
        }
        whose
    }

    /// What is known, by name.
    pub fn fields(&self) -> impl Iterator<Item = (&'static str, &str)> {
        WHOSE.into_iter().zip(self.0.iter().map(String::as_str)).filter(|(_, value)| !value.is_empty())
    }
}

impl Visit for Whose {
    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}

    fn record_str(&mut self, field: &Field, value: &str) {
        if let Some(at) = WHOSE.iter().position(|name| *name == field.name()) {
            value.clone_into(&mut self.0[at]);
        }
    }
}

/// Remembers whose each span is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Remember;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Remember {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if is_ours(attributes.metadata())
            && let Some(span) = context.span(id)
        {
            let mut whose = Whose::default();
            attributes.record(&mut whose);
            span.extensions_mut().insert(whose);
        }
    }
}

/// Whose the innermost of these spans is that is anybody's.
pub fn innermost<'a, R: LookupSpan<'a>>(spans: Option<Spans<'a, R>>) -> Option<Whose> {
    spans?.find_map(|span| span.extensions().get::<Whose>().cloned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_about_another_pod_is_not_the_spans() {
        let whose = |parts: [&str; 4]| Whose(parts.map(str::to_owned));
        let said = |parts: [&str; 4]| parts.map(|part| Some(part.to_owned()).filter(|part| !part.is_empty()));
        let span = whose(["shop", "web", "c1", "j1"]);
        for (line, expected) in [
            (["", "", "", ""], ["shop", "web", "c1", "j1"]),
            (["shop", "web", "", ""], ["shop", "web", "c1", "j1"]),
            (["", "web", "c2", ""], ["shop", "web", "c2", "j1"]),
            (["shop", "other", "", ""], ["shop", "other", "", ""]),
            (["bar", "web", "", ""], ["bar", "web", "", ""]),
        ] {
            assert_eq!(Whose::or(said(line), Some(&span)), whose(expected), "{line:?}");
        }
        assert_eq!(Whose::or(said(["shop", "web", "", ""]), None), whose(["shop", "web", "", ""]));
    }
}
