//! The network configuration on stdin.
//!
//! ADD takes it strictly, down to unknown keys: a typing error must not silently give a pod other
//! networking than its operator wrote. DEL takes what it can and falls back to the defaults, because
//! an attachment must be removable whatever has become of the file.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use podtether_proto::node::{CniError, code};
use serde_json::{Map, Value};

use crate::env::{Verb, is_identifier, is_interface_name};

/// Largest configuration taken; a pod's annotations are the bulk of it.
const MAX_BYTES: u64 = 1 << 20;
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";
/// Keys that runtimes and the specification put beside ours.
const COMMON_KEYS: [&str; 10] = [
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "args",
    "capabilities",
    "dns",
    "ipMasq",
    "prevResult",
    "runtimeConfig",
];
/// Where the supervisor is unless the configuration says otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/run/podtether/supervisor.sock";
const OUR_KEYS: [&str; 5] = ["socket", "tailnet", "timeoutSeconds", "failurePolicy", "ifName"];

/// A version of the specification that this plugin speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SpecVersion {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl SpecVersion {
    pub(crate) const ALL: [Self; 5] = [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub(crate) const NEWEST: Self = Self::V1_1_0;

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.text() == text)
    }
}

/// The configuration of one call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    pub(crate) version: SpecVersion,
    pub(crate) network: String,
    pub(crate) socket: PathBuf,
    /// Our interface in the pod.
    pub(crate) ifname: String,
    pub(crate) tailnet: String,
    pub(crate) timeout: Duration,
    /// A pod that cannot join starts without a tailnet.
    pub(crate) fail_open: bool,
    pub(crate) annotations: BTreeMap<String, String>,
    /// What the pod's resolv.conf names, when the runtime tells.
    pub(crate) name_servers: Vec<IpAddr>,
    pub(crate) prev_result: Option<Value>,
    valid_attachments: Option<Value>,
}

/// All of stdin, up to a bound.
pub(crate) fn read_bytes(stdin: &mut dyn Read) -> Result<Vec<u8>, CniError> {
    let mut bytes = Vec::new();
    stdin.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| CniError {
        code: code::IO,
        msg: format!("cannot read the network configuration: {error}"),
        details: "the runtime must write it to stdin and close that".into(),
    })?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > MAX_BYTES) {
        return Err(undecodable(format!("the network configuration is longer than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// A JSON object.
pub(crate) fn parse_object(bytes: &[u8]) -> Result<Map<String, Value>, CniError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(undecodable("the network configuration is not a JSON object".into())),
        Err(error) => Err(undecodable(format!("the network configuration is not JSON: {error}"))),
    }
}

/// `cniVersion`, when it is one of ours.
pub(crate) fn version_of(object: &Map<String, Value>) -> Result<SpecVersion, CniError> {
    let supported = SpecVersion::ALL.map(SpecVersion::text).join(", ");
    let wrong = |what: String| CniError {
        code: code::INCOMPATIBLE_VERSION,
        msg: what,
        details: format!("supported versions are {supported}"),
    };
    match object.get("cniVersion") {
        None | Some(Value::Null) => Err(wrong("the network configuration has no cniVersion".into())),
        Some(Value::String(text)) => {
            SpecVersion::parse(text).ok_or_else(|| wrong(format!("cniVersion {text:?} is not supported")))
        }
        Some(_) => Err(undecodable("cniVersion is not a string".into())),
    }
}

impl Config {
    /// Reads `object` for `verb`.
    pub(crate) fn read(
        verb: Verb,
        version: SpecVersion,
        object: Map<String, Value>,
    ) -> Result<Self, CniError> {
        let needs = match verb {
            Verb::Gc | Verb::Status => SpecVersion::V1_1_0,
            Verb::Check => SpecVersion::V0_4_0,
            Verb::Add | Verb::Del | Verb::Version => SpecVersion::V0_3_0,
        };
        if version < needs {
            return Err(CniError {
                code: code::INCOMPATIBLE_VERSION,
                msg: format!("cniVersion {} has no {}", version.text(), verb.name()),
                details: format!("{} exists from {} on", verb.name(), needs.text()),
            });
        }
        if verb == Verb::Add
            && let Some((key, value)) = object.iter().find(|(key, _)| !is_known(key))
        {
            return Err(CniError {
                code: code::UNSUPPORTED_FIELD,
                msg: format!("unsupported field {key:?}: {value}"),
                details: format!("fields of this plugin are {}", OUR_KEYS.join(", ")),
            });
        }
        let fields = Fields { object: &object, lenient: verb == Verb::Del };
        let network =
            fields.text("name", "", "a network name of letters, digits, '_', '.' and '-'", |name| {
                is_identifier(name, 256)
            })?;
        if network.is_empty() {
            return Err(invalid("the network configuration has no name", "give the network a name"));
        }
        let socket =
            fields.text("socket", DEFAULT_SOCKET, "an absolute path of at most 107 bytes", is_socket)?;
        let timeout_s = fields.get("timeoutSeconds", 60, "a number from 1 to 600", |value| {
            value.as_u64().filter(|seconds| (1..=600).contains(seconds))
        })?;
        let policy = fields.text("failurePolicy", "closed", "\"closed\" or \"open\"", |policy| {
            matches!(policy, "closed" | "open")
        })?;
        Ok(Self {
            version,
            network,
            socket: socket.into(),
            ifname: fields.text("ifName", "ts0", "an interface name", is_interface_name)?,
            tailnet: fields.text("tailnet", "default", "the name of a [tailnet.NAME] table", |name| {
                is_identifier(name, 64)
            })?,
            timeout: Duration::from_secs(timeout_s),
            fail_open: policy == "open",
            annotations: fields.annotations()?,
            name_servers: name_servers(&object),
            valid_attachments: object.get(VALID_ATTACHMENTS).cloned(),
            prev_result: object.get("prevResult").filter(|value| !value.is_null()).cloned(),
        })
    }

    /// `cni.dev/valid-attachments`. A list that is not there is an error and not an empty one, which
    /// would remove every pod of the network.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<(String, String)>, CniError> {
        let wrong = |msg: &str| {
            invalid(
                &format!("{VALID_ATTACHMENTS} {msg}"),
                "GC needs the list of the attachments that stay, each with containerID and ifname",
            )
        };
        let list = match &self.valid_attachments {
            None => return Err(wrong("is missing")),
            // How an empty list of Go's looks.
            Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(wrong("is not a list")),
        };
        let attachment = |value: &Value| {
            let text = |key| value.get(key).and_then(Value::as_str).map(str::to_owned);
            text("containerID").zip(text("ifname"))
        };
        list.iter().map(|value| attachment(value).ok_or_else(|| wrong("has an odd element"))).collect()
    }
}

/// `runtimeConfig.dns.servers`. What is no address there is no name server that anybody could ask.
/// Where the supervisor is, in a configuration that may be wrong otherwise.
pub(crate) fn socket_of(object: &Map<String, Value>) -> Option<PathBuf> {
    object.get("socket")?.as_str().filter(|path| is_socket(path)).map(PathBuf::from)
}

fn is_socket(path: &str) -> bool {
    path.starts_with('/') && path.len() <= 107
}

fn name_servers(object: &Map<String, Value>) -> Vec<IpAddr> {
    let servers = || object.get("runtimeConfig")?.get("dns")?.get("servers")?.as_array();
    servers().into_iter().flatten().filter_map(|server| server.as_str()?.parse().ok()).collect()
}

fn is_known(key: &str) -> bool {
    COMMON_KEYS.contains(&key) || OUR_KEYS.contains(&key) || key.starts_with("cni.dev/")
}

struct Fields<'a> {
    object: &'a Map<String, Value>,
    lenient: bool,
}

impl Fields<'_> {
    fn get<T>(
        &self,
        key: &str,
        default: T,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, CniError> {
        let value = match self.object.get(key) {
            None | Some(Value::Null) => return Ok(default),
            Some(value) => value,
        };
        match read(value) {
            Some(read) => Ok(read),
            None if self.lenient => Ok(default),
            None => Err(invalid(&format!("{key} is {value}"), &format!("it must be {expected}"))),
        }
    }

    fn text(
        &self,
        key: &str,
        default: &str,
        expected: &str,
        valid: impl Fn(&str) -> bool,
    ) -> Result<String, CniError> {
        self.get(key, default.to_owned(), expected, |value| {
            value.as_str().filter(|text| valid(text)).map(str::to_owned)
        })
    }

    fn annotations(&self) -> Result<BTreeMap<String, String>, CniError> {
        let expected = "an object of strings as containerd passes it";
        let given = self.get("runtimeConfig", BTreeMap::new(), "an object", |value| {
            let object = value.as_object()?;
            Some(
                object
                    .get(ANNOTATIONS)
                    .map(|value| (ANNOTATIONS.to_owned(), value.clone()))
                    .into_iter()
                    .collect(),
            )
        })?;
        match given.get(ANNOTATIONS) {
            None | Some(Value::Null) => Ok(BTreeMap::new()),
            Some(value) => match serde_json::from_value(value.clone()) {
                Ok(annotations) => Ok(annotations),
                Err(_) if self.lenient => Ok(BTreeMap::new()),
                Err(error) => Err(invalid(
                    &format!("runtimeConfig has odd {ANNOTATIONS}: {error}"),
                    &format!("it must be {expected}"),
                )),
            },
        }
    }
}

/// An invalid network configuration.
pub(crate) fn invalid(msg: &str, details: &str) -> CniError {
    CniError { code: code::BAD_CONFIG, msg: msg.into(), details: details.into() }
}

fn undecodable(msg: String) -> CniError {
    CniError { code: code::UNDECODABLE, msg, details: "stdin must hold one network configuration".into() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(verb: Verb, config: Value) -> Result<Config, CniError> {
        let object = parse_object(config.to_string().as_bytes())?;
        let version = version_of(&object)?;
        Config::read(verb, version, object)
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = json!({"cniVersion": "1.1.0", "name": "net", "type": "podtether-cni"});
        config[key] = value;
        config
    }

    #[test]
    fn the_defaults() {
        let config = read(Verb::Add, with("type", json!("podtether-cni"))).unwrap();
        assert_eq!(config.socket.to_str(), Some("/run/podtether/supervisor.sock"));
        assert_eq!((config.ifname.as_str(), config.tailnet.as_str()), ("ts0", "default"));
        assert_eq!((config.timeout, config.fail_open), (Duration::from_secs(60), false));
        assert!(config.annotations.is_empty() && config.prev_result.is_none());
        for key in OUR_KEYS {
            assert_eq!(read(Verb::Add, with(key, Value::Null)).unwrap(), config, "null {key}");
        }
    }

    #[test]
    fn what_is_written_is_taken() {
        let config = read(
            Verb::Add,
            json!({
                "cniVersion": "0.4.0", "name": "net", "type": "podtether-cni", "socket": "/x.sock",
                "tailnet": "prod", "timeoutSeconds": 5, "failurePolicy": "open", "ifName": "ts1",
                "capabilities": {ANNOTATIONS: true}, "cni.dev/anything": 1, "args": {},
                "runtimeConfig": {ANNOTATIONS: {"tailscale.com/tags": "tag:web"}, "portMappings": [],
                    "dns": {"servers": ["10.96.0.10", "odd", 7, "fd00::a"], "searches": ["svc"]}},
                "prevResult": {"cniVersion": "0.4.0"},
            }),
        )
        .unwrap();
        assert_eq!(config.version, SpecVersion::V0_4_0);
        assert_eq!((config.ifname.as_str(), config.tailnet.as_str()), ("ts1", "prod"));
        assert_eq!((config.timeout, config.fail_open), (Duration::from_secs(5), true));
        assert_eq!(config.annotations["tailscale.com/tags"], "tag:web");
        let servers: Vec<String> = config.name_servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.96.0.10", "fd00::a"]);
        assert!(config.prev_result.is_some());
    }

    #[test]
    fn bad_values_are_named_except_by_del() {
        let table = [
            ("name", json!("a/b")),
            ("name", json!(1)),
            ("socket", json!("relative.sock")),
            ("socket", json!(format!("/{}", "x".repeat(107)))),
            ("tailnet", json!("a b")),
            ("tailnet", json!("")),
            ("timeoutSeconds", json!(0)),
            ("timeoutSeconds", json!(601)),
            ("timeoutSeconds", json!(1.5)),
            ("timeoutSeconds", json!("60")),
            ("failurePolicy", json!("Open")),
            ("ifName", json!("way-too-long-name")),
            ("runtimeConfig", json!([])),
            ("runtimeConfig", json!({ANNOTATIONS: {"a": 1}})),
        ];
        for (key, value) in table {
            for verb in [Verb::Add, Verb::Check, Verb::Gc, Verb::Status] {
                let error = read(verb, with(key, value.clone())).unwrap_err();
                assert_eq!(error.code, code::BAD_CONFIG, "{key}");
                assert!(error.msg.contains(key), "{}", error.msg);
            }
            assert_eq!(read(Verb::Del, with(key, value)).is_err(), key == "name", "{key}");
        }
        assert_eq!(read(Verb::Del, json!({"cniVersion": "1.0.0"})).unwrap_err().code, code::BAD_CONFIG);
    }

    #[test]
    fn unknown_fields_stop_add_alone() {
        let error = read(Verb::Add, with("failurepolicy", json!("open"))).unwrap_err();
        assert_eq!(error.code, code::UNSUPPORTED_FIELD);
        assert!(error.msg.contains("failurepolicy") && error.msg.contains("open"), "{}", error.msg);
        for verb in [Verb::Del, Verb::Check, Verb::Gc, Verb::Status] {
            assert!(read(verb, with("failurepolicy", json!("open"))).is_ok());
        }
    }

    #[test]
    fn versions_and_the_verbs_they_have() {
        for (version, age) in [("0.3.0", 2), ("0.3.1", 2), ("0.4.0", 1), ("1.0.0", 1), ("1.1.0", 0)] {
            for verb in [Verb::Add, Verb::Del, Verb::Check, Verb::Gc, Verb::Status] {
                let got = read(verb, with("cniVersion", json!(version)));
                let lacks = match verb {
                    Verb::Gc | Verb::Status => age > 0,
                    Verb::Check => age > 1,
                    Verb::Add | Verb::Del | Verb::Version => false,
                };
                assert_eq!(got.err().map(|e| e.code), lacks.then_some(1), "{version} {verb:?}");
            }
        }
        for version in [json!("0.2.0"), json!("1.2.0"), json!(""), Value::Null] {
            let error = read(Verb::Add, with("cniVersion", version.clone())).unwrap_err();
            assert_eq!(error.code, code::INCOMPATIBLE_VERSION, "{version}");
            assert!(error.details.contains("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"));
        }
        assert_eq!(read(Verb::Add, with("cniVersion", json!(1))).unwrap_err().code, code::UNDECODABLE);
    }

    #[test]
    fn what_is_not_an_object_is_undecodable() {
        for text in ["", "{", "[]", "null", "{\"cniVersion\":\"1.0.0\"} x", "\u{feff}{}"] {
            assert_eq!(parse_object(text.as_bytes()).unwrap_err().code, code::UNDECODABLE, "{text}");
        }
        let deep = "[".repeat(100_000);
        assert_eq!(parse_object(deep.as_bytes()).unwrap_err().code, code::UNDECODABLE);
        let endless = read_bytes(&mut std::io::repeat(b' ')).unwrap_err();
        assert_eq!(endless.code, code::UNDECODABLE);
        assert!(endless.msg.contains("longer"));
    }

    #[test]
    fn gc_needs_its_list() {
        let valid =
            |value: Value| read(Verb::Gc, with(VALID_ATTACHMENTS, value)).unwrap().valid_attachments();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            valid(json!([{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "net1"}])),
            Ok(vec![pair("a", "eth0"), pair("b", "net1")])
        );
        assert_eq!(valid(json!([])), Ok(Vec::new()));
        assert_eq!(valid(Value::Null), Ok(Vec::new()));
        for odd in [json!({}), json!("x"), json!([1]), json!([{"containerID": "a"}]), json!([{"ifname": 1}])]
        {
            assert_eq!(valid(odd.clone()).unwrap_err().code, code::BAD_CONFIG, "{odd}");
        }
        let missing = read(Verb::Gc, with("args", json!({}))).unwrap().valid_attachments();
        assert_eq!(missing.unwrap_err().code, code::BAD_CONFIG);
    }
}
