//! What is wrong with a node, for people.

use crate::tailcfg::DisplayMessage;

/// Longest title and text kept, characters.
const MAX_TITLE: usize = 200;
const MAX_TEXT: usize = 1000;

/// How bad it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing.
    Low,
    /// Something does not work, or will not for long.
    #[default]
    Medium,
    /// The node does not do what it is there for.
    High,
}

impl Severity {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HealthMessage {
    /// One line.
    pub title: String,
    /// More, may be empty.
    pub text: String,
    /// How bad.
    pub severity: Severity,
    /// It keeps traffic from flowing.
    pub impacts_connectivity: bool,
}

impl HealthMessage {
    /// With a title alone.
    #[must_use]
    pub fn new(severity: Severity, title: impl AsRef<str>) -> Self {
        Self { title: printable(title.as_ref(), MAX_TITLE), severity, ..Self::default() }
    }

    /// With an explanation.
    #[must_use]
    pub fn with_text(mut self, text: impl AsRef<str>) -> Self {
        self.text = printable(text.as_ref(), MAX_TEXT);
        self
    }
}

impl From<&DisplayMessage> for HealthMessage {
    fn from(message: &DisplayMessage) -> Self {
        let severity = match message.severity.as_str() {
            "high" => Severity::High,
            "low" => Severity::Low,
            _ => Severity::Medium,
        };
        Self {
            impacts_connectivity: message.impacts_connectivity,
            ..Self::new(severity, &message.title).with_text(&message.text)
        }
    }
}

/// As it may be shown: servers' texts are input.
fn printable(text: &str, longest: usize) -> String {
    text.chars().map(|c| if c == '\n' { ' ' } else { c }).filter(|c| !c.is_control()).take(longest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_printable() {
        let message = DisplayMessage {
            title: "a\u{1b}[31mb".into(),
            text: format!("x\ny{}", "z".repeat(5000)),
            severity: "high".into(),
            impacts_connectivity: true,
        };
        let health = HealthMessage::from(&message);
        assert_eq!(health.title, "a[31mb");
        assert!(health.text.starts_with("x yz") && health.text.len() == MAX_TEXT);
        assert_eq!((health.severity, health.impacts_connectivity), (Severity::High, true));
        for (severity, expected) in [("low", "low"), ("medium", "medium"), ("", "medium"), ("dire", "medium")]
        {
            let message = DisplayMessage { severity: severity.into(), ..DisplayMessage::default() };
            assert_eq!(HealthMessage::from(&message).severity.name(), expected, "{severity:?}");
        }
    }
}
