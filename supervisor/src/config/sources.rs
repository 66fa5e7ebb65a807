//! Where values come from: the file, then the environment, then flags.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;

use super::keys::{self, ENV_ONLY, KEYS, Kind, LEGACY_ENV, Section};
use super::{ConfigError, DEFAULT_PATH, parse_duration};

/// What the program was given, injected so that tests need neither environment nor files. It may hold
/// secrets, so it does not print.
#[derive(Clone, Default)]
pub struct Inputs {
    /// The file's path, for messages.
    pub path: PathBuf,
    /// Its text; `None` when there is no file and none was asked for.
    pub file: Option<String>,
    /// Environment variables.
    pub env: Vec<(String, String)>,
    /// Flags: `node.state_dir` or `tailnet.NAME.key` and its value.
    pub flags: Vec<(String, String)>,
}

/// The program's arguments.
#[must_use]
pub fn arguments() -> clap::Command {
    let mut command = clap::Command::new("podtether-supervisor")
        .about("Gives the pods of a node their own tailnet identities")
        .version(env!("CARGO_PKG_VERSION"))
        .arg(
            clap::Arg::new("config")
                .long("config")
                .value_name("FILE")
                .env("PODTETHER_CONFIG")
                .help(format!("configuration file [default: {DEFAULT_PATH}]")),
        )
        .arg(
            clap::Arg::new("set")
                .long("set")
                .value_name("KEY=VALUE")
                .action(clap::ArgAction::Append)
                .help("any key by its full name, for example tailnet.prod.control_url=https://…"),
        )
        .arg(
            clap::Arg::new("log-format")
                .long("log-format")
                .value_name("FORM")
                .value_parser(["json", "human"])
                .env("PODTETHER_LOG_FORMAT")
                .help("lines of the log [default: human on a terminal, else json]"),
        )
        .arg(
            clap::Arg::new("check-config")
                .long("check-config")
                .action(clap::ArgAction::SetTrue)
                .help("check the configuration, print it without secrets, and exit"),
        );
    for key in KEYS {
        let (path, section) = match key.section {
            Section::Node => (format!("node.{}", key.name), "NODE"),
            Section::Tailnet => (format!("tailnet.default.{}", key.name), "TAILNET_DEFAULT"),
            Section::Credentials => {
                (format!("tailnet.default.credentials.{}", key.name), "TAILNET_DEFAULT_CREDENTIALS")
            }
            // There is none that a flag without a name could mean.
            Section::Namespace => continue,
        };
        let env = format!("PODTETHER_{section}_{}", key.name.to_uppercase());
        command = command.arg(
            clap::Arg::new(path.clone())
                .long(path.replace(['.', '_'], "-"))
                .value_name(match key.kind {
                    Kind::Text => "TEXT",
                    Kind::Bool => "BOOL",
                    Kind::Number => "NUMBER",
                    Kind::List => "A,B",
                })
                .help(format!("{} [env: {env}]", key.help)),
        );
    }
    command
}

/// Gathers the real inputs of a parsed command line.
///
/// # Errors
/// The file cannot be read, or `--set` holds no `=`.
pub fn inputs_from(matches: &clap::ArgMatches) -> Result<Inputs, ConfigError> {
    let asked = matches.get_one::<String>("config");
    let path = PathBuf::from(asked.map_or(DEFAULT_PATH, String::as_str));
    let file = match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && asked.is_none() => None,
        Err(e) => return Err(ConfigError(format!("cannot read {}: {e}", path.display()))),
    };
    let mut flags = Vec::new();
    for id in matches.ids() {
        if id.as_str().contains('.')
            && let Some(value) = matches.get_one::<String>(id.as_str())
        {
            flags.push((id.as_str().to_owned(), value.clone()));
        }
    }
    for set in matches.get_many::<String>("set").into_iter().flatten() {
        let (key, value) =
            set.split_once('=').ok_or_else(|| ConfigError(format!("--set {set}: write KEY=VALUE")))?;
        flags.push((key.trim().to_owned(), value.to_owned()));
    }
    let env = std::env::vars_os()
        .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
        .collect();
    Ok(Inputs { path, file, env, flags })
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// 0 node, 1 tailnet, 2 credentials, 3 namespace.
    section: u8,
    /// Or the namespace.
    tailnet: String,
    key: String,
}

/// All values with their origins.
#[derive(Debug, Default)]
pub(super) struct Values {
    values: BTreeMap<Place, (Value, String)>,
    tailnets: BTreeSet<String>,
    namespaces: BTreeSet<String>,
}

fn place(section: Section, tailnet: &str, key: &str) -> Place {
    let number = match section {
        Section::Node => 0,
        Section::Tailnet => 1,
        Section::Credentials => 2,
        Section::Namespace => 3,
    };
    Place { section: number, tailnet: tailnet.to_owned(), key: key.to_owned() }
}

fn full_name(section: Section, tailnet: &str, key: &str) -> String {
    match section {
        Section::Node => format!("node.{key}"),
        Section::Tailnet => format!("tailnet.{tailnet}.{key}"),
        Section::Credentials => format!("tailnet.{tailnet}.credentials.{key}"),
        Section::Namespace => format!("namespace.{tailnet}.{key}"),
    }
}

impl Values {
    pub(super) fn collect(inputs: &Inputs) -> Result<Self, ConfigError> {
        let mut values = Values::default();
        if let Some(text) = &inputs.file {
            values.file(&inputs.path.display().to_string(), text)?;
        }
        values.environment(&inputs.env)?;
        for (name, text) in &inputs.flags {
            values.flag(name, text)?;
        }
        Ok(values)
    }

    pub(super) fn tailnet_names(&self) -> Vec<String> {
        self.tailnets.iter().cloned().collect()
    }

    pub(super) fn namespace_names(&self) -> Vec<String> {
        self.namespaces.iter().cloned().collect()
    }

    pub(super) fn at<'a>(&'a self, section: Section, tailnet: &'a str) -> At<'a> {
        At { values: self, section, tailnet }
    }

    fn file(&mut self, origin: &str, text: &str) -> Result<(), ConfigError> {
        let table: toml::Table = text
            .parse()
            .map_err(|e: toml::de::Error| ConfigError(format!("{origin} is not TOML: {}", one_line(&e))))?;
        for (name, value) in table {
            match (name.as_str(), value) {
                ("node", Value::Table(node)) => {
                    for (key, value) in node {
                        self.put(Section::Node, "", &key, value, origin)?;
                    }
                }
                ("tailnet", Value::Table(tailnets)) => {
                    for (tailnet, value) in tailnets {
                        let Value::Table(keys) = value else {
                            return Err(ConfigError(format!(
                                "tailnet.{tailnet} in {origin}: expected a table, [tailnet.{tailnet}]"
                            )));
                        };
                        self.tailnet(origin, &tailnet, keys)?;
                    }
                }
                ("namespace", Value::Table(namespaces)) => {
                    for (namespace, value) in namespaces {
                        let Value::Table(keys) = value else {
                            return Err(ConfigError(format!(
                                "namespace.{namespace} in {origin}: expected a table, [namespace.{namespace}]"
                            )));
                        };
                        self.namespace(&namespace, origin)?;
                        for (key, value) in keys {
                            self.put(Section::Namespace, &namespace, &key, value, origin)?;
                        }
                    }
                }
                ("node" | "tailnet" | "namespace", _) => {
                    return Err(ConfigError(format!("{name} in {origin}: expected a table")));
                }
                _ => {
                    return Err(ConfigError(format!(
                        "unknown key {name} in {origin}: the tables are [tailnet.NAME], [namespace.NAME] and [node]"
                    )));
                }
            }
        }
        Ok(())
    }

    fn tailnet(&mut self, origin: &str, tailnet: &str, keys: toml::Table) -> Result<(), ConfigError> {
        self.name(tailnet, origin)?;
        for (key, value) in keys {
            match (key.as_str(), value) {
                ("credentials", Value::Table(credentials)) => {
                    for (key, value) in credentials {
                        self.put(Section::Credentials, tailnet, &key, value, origin)?;
                    }
                }
                ("credentials", _) => {
                    return Err(ConfigError(format!(
                        "tailnet.{tailnet}.credentials in {origin}: expected a table"
                    )));
                }
                (_, value) => self.put(Section::Tailnet, tailnet, &key, value, origin)?,
            }
        }
        Ok(())
    }

    fn name(&mut self, tailnet: &str, origin: &str) -> Result<(), ConfigError> {
        let fits = (1..=32).contains(&tailnet.len())
            && tailnet.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !fits {
            return Err(ConfigError(format!(
                "tailnet.{tailnet} in {origin}: a tailnet's name is 1 to 32 of a-z, 0-9 and -"
            )));
        }
        self.tailnets.insert(tailnet.to_owned());
        Ok(())
    }

    fn namespace(&mut self, namespace: &str, origin: &str) -> Result<(), ConfigError> {
        let label = (1..=63).contains(&namespace.len())
            && namespace.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !label && namespace != "*" {
            return Err(ConfigError(format!(
                "namespace.{namespace} in {origin}: no namespace is called so (write its name, or \"*\" for all)"
            )));
        }
        self.namespaces.insert(namespace.to_owned());
        Ok(())
    }

    fn put(
        &mut self,
        section: Section,
        tailnet: &str,
        key: &str,
        value: Value,
        origin: &str,
    ) -> Result<(), ConfigError> {
        let name = full_name(section, tailnet, key);
        let Some(known) = keys::find(section, key) else {
            let hint = keys::nearest(section, key).map(|n| format!(", did you mean {n}?"));
            return Err(ConfigError(format!("unknown key {name} in {origin}{}", hint.unwrap_or_default())));
        };
        let fits = match known.kind {
            Kind::Text => value.is_str(),
            Kind::Bool => value.is_bool(),
            Kind::Number => value.is_integer(),
            Kind::List => value.as_array().is_some_and(|a| a.iter().all(Value::is_str)),
        };
        if !fits {
            return Err(ConfigError(format!("{name} in {origin}: expected {}", known.kind.expected())));
        }
        self.values.insert(place(section, tailnet, key), (value, origin.to_owned()));
        Ok(())
    }

    fn put_text(
        &mut self,
        section: Section,
        tailnet: &str,
        key: &str,
        text: &str,
        origin: &str,
    ) -> Result<(), ConfigError> {
        let text = text.trim();
        let name = full_name(section, tailnet, key);
        let bad =
            |kind: Kind| ConfigError(format!("{name} from {origin}: `{text}` is not {}", kind.expected()));
        let value = match keys::find(section, key).map(|k| k.kind) {
            None | Some(Kind::Text) => Value::String(text.to_owned()),
            Some(Kind::Bool) => Value::Boolean(text.parse().map_err(|_| bad(Kind::Bool))?),
            Some(Kind::Number) => Value::Integer(text.parse().map_err(|_| bad(Kind::Number))?),
            Some(Kind::List) => Value::Array(
                text.split(',')
                    .map(str::trim)
                    .filter(|s| !s.is_empty())
                    .map(|s| Value::String(s.to_owned()))
                    .collect(),
            ),
        };
        match section {
            Section::Node => {}
            Section::Tailnet | Section::Credentials => self.name(tailnet, origin)?,
            Section::Namespace => self.namespace(tailnet, origin)?,
        }
        if ENV_ONLY.contains(&key) {
            self.values.insert(place(section, tailnet, key), (value, origin.to_owned()));
            return Ok(());
        }
        self.put(section, tailnet, key, value, origin)
    }

    fn environment(&mut self, env: &[(String, String)]) -> Result<(), ConfigError> {
        let legacy = LEGACY_ENV.iter().filter_map(|(name, section, key)| {
            env.iter().find(|(n, _)| n == name).map(|(_, value)| (name, section, key, value))
        });
        for (name, section, key, value) in legacy {
            let tailnet = if *section == Section::Node { "" } else { "default" };
            if !value.trim().is_empty() {
                self.put_text(*section, tailnet, key, value, name)?;
            }
        }
        for (name, value) in env {
            if let Some(key) = name.strip_prefix("PODTETHER_NODE_") {
                self.put_text(Section::Node, "", &key.to_lowercase(), value, name)?;
            } else if let Some(rest) = name.strip_prefix("PODTETHER_TAILNET_") {
                let (section, tailnet, key) = split_env(rest)
                    .ok_or_else(|| ConfigError(format!("unknown key in the environment variable {name}")))?;
                self.put_text(section, &tailnet, key, value, name)?;
            } else if let Some(rest) = name.strip_prefix("PODTETHER_NAMESPACE_") {
                let (namespace, key) = split_namespace_env(rest)
                    .ok_or_else(|| ConfigError(format!("unknown key in the environment variable {name}")))?;
                self.put_text(Section::Namespace, &namespace, key, value, name)?;
            }
        }
        Ok(())
    }

    fn flag(&mut self, name: &str, text: &str) -> Result<(), ConfigError> {
        let parts: Vec<&str> = name.split('.').collect();
        let origin = "the command line";
        match parts[..] {
            ["node", key] => self.put_text(Section::Node, "", key, text, origin),
            ["tailnet", tailnet, key] => self.put_text(Section::Tailnet, tailnet, key, text, origin),
            ["tailnet", tailnet, "credentials", key] => {
                self.put_text(Section::Credentials, tailnet, key, text, origin)
            }
            ["namespace", namespace, key] => self.put_text(Section::Namespace, namespace, key, text, origin),
            _ => Err(ConfigError(format!(
                "unknown key {name} on the command line (node.KEY, tailnet.NAME.KEY or namespace.NAME.KEY)"
            ))),
        }
    }
}

/// `DEFAULT_CREDENTIALS_KIND` → (credentials, `default`, `kind`).
fn split_env(rest: &str) -> Option<(Section, String, &'static str)> {
    let lower = rest.to_lowercase();
    let tailnet_name = |n: &str| n.replace('_', "-");
    for key in KEYS {
        let (section, suffix) = match key.section {
            Section::Node | Section::Namespace => continue,
            Section::Tailnet => (Section::Tailnet, format!("_{}", key.name)),
            Section::Credentials => (Section::Credentials, format!("_credentials_{}", key.name)),
        };
        if let Some(tailnet) = lower.strip_suffix(&suffix).filter(|t| !t.is_empty()) {
            return Some((section, tailnet_name(tailnet), key.name));
        }
    }
    None
}

/// `SHOP_TAGS` → (`shop`, `tags`).
fn split_namespace_env(rest: &str) -> Option<(String, &'static str)> {
    let lower = rest.to_lowercase();
    KEYS.iter().filter(|key| key.section == Section::Namespace).find_map(|key| {
        let namespace = lower.strip_suffix(&format!("_{}", key.name)).filter(|n| !n.is_empty())?;
        Some((namespace.replace('_', "-"), key.name))
    })
}

fn one_line(e: &toml::de::Error) -> String {
    e.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Typed access to one section.
pub(super) struct At<'a> {
    values: &'a Values,
    section: Section,
    tailnet: &'a str,
}

impl At<'_> {
    pub(super) fn error(&self, key: &str, what: &str) -> ConfigError {
        let name = full_name(self.section, self.tailnet, key);
        let origin = self
            .values
            .values
            .get(&place(self.section, self.tailnet, key))
            .map(|(_, origin)| format!(" ({origin})"));
        ConfigError(format!("{name}{}: {what}", origin.unwrap_or_default()))
    }

    /// True when nothing is set here.
    pub(super) fn is_empty(&self) -> bool {
        let here = place(self.section, self.tailnet, "");
        !self.values.values.keys().any(|p| p.section == here.section && p.tailnet == here.tailnet)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.values.get(&place(self.section, self.tailnet, key)).map(|(v, _)| v)
    }

    /// The text as it stands, empty ones included.
    pub(super) fn raw_text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| self.error(key, Kind::Text.expected())),
        }
    }

    /// The text; an empty one means the default.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        Ok(self.raw_text(key)?.map(str::trim).filter(|t| !t.is_empty()))
    }

    pub(super) fn path(&self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        match self.text(key)? {
            None => Ok(None),
            Some(text) if text.starts_with('/') => Ok(Some(PathBuf::from(text))),
            Some(text) => Err(self.error(key, &format!("`{text}` is no absolute path"))),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        let wrong = || self.error(key, Kind::Bool.expected());
        self.get(key).map(|v| v.as_bool().ok_or_else(wrong)).transpose()
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<i64>, ConfigError> {
        let wrong = || self.error(key, Kind::Number.expected());
        self.get(key).map(|v| v.as_integer().ok_or_else(wrong)).transpose()
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<Vec<String>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.error(key, Kind::List.expected());
        let array = value.as_array().ok_or_else(wrong)?;
        array
            .iter()
            .map(|v| v.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    pub(super) fn duration(&self, key: &str) -> Result<Option<Duration>, ConfigError> {
        self.text(key)?.map(|t| parse_duration(t).map_err(|e| self.error(key, &e))).transpose()
    }
}
