//! What the runtime says in the environment.

use podtether_proto::engine::PodRef;
use podtether_proto::node::{CniError, code};

/// Reads one environment variable.
pub(crate) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    const ALL: [(&'static str, Self); 6] = [
        ("ADD", Self::Add),
        ("DEL", Self::Del),
        ("CHECK", Self::Check),
        ("GC", Self::Gc),
        ("STATUS", Self::Status),
        ("VERSION", Self::Version),
    ];

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, verb)| *verb == self).map_or("", |(name, _)| name)
    }

    /// The variables that must be there and not empty. `CNI_PATH` is never used, so never missed.
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &[CONTAINER_ID, NETNS, IFNAME],
            Self::Del => &[CONTAINER_ID, IFNAME],
            Self::Gc | Self::Status | Self::Version => &[],
        }
    }
}

const COMMAND: &str = "CNI_COMMAND";
const CONTAINER_ID: &str = "CNI_CONTAINERID";
const NETNS: &str = "CNI_NETNS";
const IFNAME: &str = "CNI_IFNAME";
const ARGS: &str = "CNI_ARGS";

/// Namespace of a pod whose runtime names none.
const NO_NAMESPACE: &str = "default";

/// The environment, checked as far as the verb needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Params {
    pub(crate) verb: Verb,
    pub(crate) container_id: String,
    /// Empty where the verb does without.
    pub(crate) netns: String,
    /// The pod's primary interface: the runtime's, never ours.
    pub(crate) ifname: String,
    args: String,
}

impl Params {
    pub(crate) fn read(lookup: Lookup<'_>) -> Result<Self, CniError> {
        let get = |name: &str| lookup(name).unwrap_or_default();
        let command = get(COMMAND);
        if command.is_empty() {
            return Err(bad(
                format!("{COMMAND} is not set"),
                "this program is called by a container runtime, see the CNI specification",
            ));
        }
        let Some((_, verb)) = Verb::ALL.into_iter().find(|(name, _)| *name == command) else {
            return Err(bad(
                format!("{COMMAND} is {command:?}"),
                "it must be ADD, DEL, CHECK, GC, STATUS or VERSION",
            ));
        };
        let missing: Vec<&str> =
            verb.required().iter().copied().filter(|name| get(name).is_empty()).collect();
        if !missing.is_empty() {
            return Err(bad(format!("{} not set", missing.join(", ")), &format!("{command} needs it")));
        }
        let params = Self {
            verb,
            container_id: get(CONTAINER_ID),
            netns: get(NETNS),
            ifname: get(IFNAME),
            args: get(ARGS),
        };
        if !verb.required().is_empty() {
            if !is_identifier(&params.container_id, 256) {
                return Err(bad(
                    format!("{CONTAINER_ID} is {:?}", params.container_id),
                    "it must be letters, digits, '_', '.' and '-', beginning with a letter or digit",
                ));
            }
            if !is_interface_name(&params.ifname) {
                return Err(bad(
                    format!("{IFNAME} is {:?}", params.ifname),
                    "an interface name has 1 to 15 bytes, no '/', ':' or white space, and is not '.' or '..'",
                ));
            }
        }
        Ok(params)
    }

    /// The pod, from `CNI_ARGS`; a runtime that names no pod gets one named after the container.
    pub(crate) fn pod(&self) -> Result<PodRef, CniError> {
        let (mut uid, mut namespace, mut name) = (None, None, None);
        let mut ignore_unknown = false;
        let mut unknown = Vec::new();
        for pair in self.args.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(bad(format!("{ARGS} has {pair:?}"), "it must be KEY=VALUE pairs between ';'"));
            };
            let slot = match key {
                "K8S_POD_UID" => &mut uid,
                "K8S_POD_NAMESPACE" => &mut namespace,
                "K8S_POD_NAME" => &mut name,
                "K8S_POD_INFRA_CONTAINER_ID" => continue,
                "IgnoreUnknown" => {
                    ignore_unknown = matches!(value.to_ascii_lowercase().as_str(), "1" | "true");
                    continue;
                }
                _ => {
                    unknown.push(key);
                    continue;
                }
            };
            if !value.is_empty() && !is_identifier(value, 253) {
                return Err(bad(
                    format!("{ARGS} has {key}={value:?}"),
                    "it must be letters, digits, '_', '.' and '-', at most 253",
                ));
            }
            *slot = Some(value.to_owned()).filter(|v| !v.is_empty());
        }
        if !unknown.is_empty() && !ignore_unknown {
            return Err(bad(
                format!("{ARGS} has unknown keys: {}", unknown.join(", ")),
                "leave them out or add IgnoreUnknown=1",
            ));
        }
        Ok(PodRef {
            uid: uid.unwrap_or_else(|| self.container_id.clone()),
            namespace: namespace.unwrap_or_else(|| NO_NAMESPACE.into()),
            name: name.unwrap_or_else(|| self.container_id.clone()),
        })
    }
}

fn bad(msg: String, details: &str) -> CniError {
    CniError { code: code::BAD_ENV, msg, details: details.into() }
}

/// What the specification takes for container ids and network names.
pub(crate) fn is_identifier(text: &str, max_bytes: usize) -> bool {
    text.len() <= max_bytes
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// What the kernel takes for an interface name.
pub(crate) fn is_interface_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && !text.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: [(&str, &str); 5] = [
        (COMMAND, "ADD"),
        (CONTAINER_ID, "0cff"),
        (NETNS, "/var/run/netns/x"),
        (IFNAME, "eth0"),
        (ARGS, "K8S_POD_NAME=t;K8S_POD_UID=u-1;IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;OTHER=1"),
    ];

    fn read(changes: &[(&str, &str)]) -> Result<Params, CniError> {
        Params::read(&|name| {
            let given = changes.iter().chain(&FULL).find(|(key, _)| *key == name);
            given.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_verb_needs_its_variables() {
        let all = [CONTAINER_ID, NETNS, IFNAME];
        for (command, verb) in Verb::ALL {
            assert_eq!(verb.name(), command);
            assert_eq!(read(&[(COMMAND, command)]).unwrap().verb, verb);
            for name in all {
                let needed = match verb {
                    Verb::Add | Verb::Check => true,
                    Verb::Del => name != NETNS,
                    Verb::Gc | Verb::Status | Verb::Version => false,
                };
                let got = read(&[(COMMAND, command), (name, "")]);
                assert_eq!(got.is_err(), needed, "{command} without {name}");
                if let Err(error) = got {
                    assert_eq!(error.code, code::BAD_ENV);
                    assert!(error.msg.contains(name), "{}", error.msg);
                }
            }
        }
        let error = read(&[(CONTAINER_ID, ""), (NETNS, ""), (IFNAME, "")]).unwrap_err();
        assert!(all.iter().all(|name| error.msg.contains(name)), "all at once: {}", error.msg);
        for command in ["", "add", "PING"] {
            let error = read(&[(COMMAND, command)]).unwrap_err();
            assert_eq!(error.code, code::BAD_ENV);
            assert!(error.msg.contains(COMMAND));
        }
    }

    #[test]
    fn what_cannot_be_an_id_or_an_interface_is_refused() {
        for id in ["-a", "a b", "../x", "a/b", &"x".repeat(257)] {
            assert!(read(&[(CONTAINER_ID, id)]).unwrap_err().msg.contains(CONTAINER_ID), "{id}");
        }
        for name in ["a/b", "a:b", "a b", ".", "..", "sixteen-bytes-xx", "a\u{7}"] {
            assert!(read(&[(IFNAME, name)]).unwrap_err().msg.contains(IFNAME), "{name}");
        }
        assert!(read(&[(CONTAINER_ID, "a_b.c-D9"), (IFNAME, "fifteen-bytes-x")]).is_ok());
    }

    #[test]
    fn the_pod_comes_from_the_arguments() {
        let pod = |args: &str| read(&[(ARGS, args)]).unwrap().pod();
        let is = |uid: &str, namespace: &str, name: &str| {
            Ok(PodRef { uid: uid.into(), namespace: namespace.into(), name: name.into() })
        };
        assert_eq!(read(&[]).unwrap().pod(), is("u-1", "ns", "t"));
        assert_eq!(pod(""), is("0cff", "default", "0cff"));
        assert_eq!(pod("K8S_POD_NAME=t;"), is("0cff", "default", "t"));
        assert_eq!(pod("K8S_POD_UID=;K8S_POD_INFRA_CONTAINER_ID=x"), is("0cff", "default", "0cff"));
        assert_eq!(pod("IgnoreUnknown=true;A=1"), is("0cff", "default", "0cff"));
        for odd in ["A=1", "IgnoreUnknown=0;A=1", "nonsense", "K8S_POD_NAME=../etc", "K8S_POD_UID=a b"] {
            let error = pod(odd).unwrap_err();
            assert_eq!(error.code, code::BAD_ENV, "{odd}");
            assert!(error.msg.contains(ARGS), "{odd}");
        }
    }
}
