//! A real Prometheus that scrapes a lab from its router, and promtool.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use podtether_net::Netns;
use serde_json::Value;

use crate::wait_for;

const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);
/// Between two scrapes, and between two evaluations of the rules.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// Where a program is that Debian's package `prometheus` brings.
pub(super) fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not on PATH: install the package `prometheus` (.ci/run does), it brings prometheus and promtool")
    })
}

/// Whether promtool is content, and what it said. `input` is its stdin.
pub(super) fn promtool(arguments: &[&str], input: &str) -> (bool, String) {
    let mut command = Command::new(program("promtool"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    (output.status.success(), said)
}

/// Ends when dropped.
pub(super) struct Prometheus {
    child: Child,
    netns: Netns,
    log: PathBuf,
}

impl Prometheus {
    /// Scrapes `targets`, each an instance and its address, and evaluates the rules of `rules` every second.
    pub(super) fn start(netns: &Netns, dir: &Path, targets: &[(String, String)], rules: &str) -> Self {
        let dir = dir.join("prometheus");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("rules.yaml"), rules).unwrap();
        let every = format!("{}s", INTERVAL.as_secs());
        let mut config = format!(
            "global: {{ scrape_interval: {every}, scrape_timeout: {every}, evaluation_interval: {every} }}\n\
             rule_files: [rules.yaml]\n\
             scrape_configs:\n  - job_name: podtether\n    honor_labels: true\n    static_configs:\n"
        );
        for (instance, address) in targets {
            config +=
                &format!("      - {{ targets: [\"{address}\"], labels: {{ instance: \"{instance}\" }} }}\n");
        }
        let file = dir.join("prometheus.yaml");
        fs::write(&file, config).unwrap();
        let log = dir.join("log");
        let output = File::create(&log).unwrap();
        let mut command = Command::new(program("prometheus"));
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .arg(format!("--web.listen-address={LISTEN}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let child = netns.run_blocking(move || command.spawn()).unwrap().unwrap();
        let prometheus = Self { child, netns: netns.clone(), log };
        wait_for("Prometheus to be ready", || prometheus.get("/-/ready", &[]).ok());
        prometheus
    }

    /// One request; the body of a 200.
    pub(super) fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<String, String> {
        let limit = Duration::from_secs(20);
        let connected = self.netns.run_blocking(move || TcpStream::connect_timeout(&LISTEN, limit));
        let mut stream = connected.unwrap().map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(limit)).unwrap();
        let query: Vec<String> =
            query.iter().map(|(key, value)| format!("{key}={}", escaped(value))).collect();
        let request = format!("GET {path}?{} HTTP/1.0\r\nhost: prometheus\r\n\r\n", query.join("&"));
        stream.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(|e| e.to_string())?;
        let (head, body) = text.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
        let first = head.lines().next().unwrap_or_default();
        if first.contains(" 200 ") { Ok(body.to_owned()) } else { Err(format!("{first}: {body}")) }
    }

    /// `data` of an answer of the API.
    pub(super) fn api(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, String> {
        let body = self.get(path, query)?;
        let answer: Value = serde_json::from_str(&body).map_err(|e| format!("{e}: {body}"))?;
        Ok(answer["data"].clone())
    }

    /// Series that `query` gives now, with their values.
    pub(super) fn now(&self, query: &str) -> Vec<(Value, f64)> {
        let data = self.api("/api/v1/query", &[("query", query)]).unwrap_or_else(|e| panic!("{query}: {e}"));
        let number = |sample: &Value| sample["value"][1].as_str().unwrap().parse::<f64>().unwrap();
        let series = data["result"].as_array().unwrap().iter();
        series.map(|s| (s["metric"].clone(), number(s))).filter(|(_, value)| !value.is_nan()).collect()
    }

    /// Series that `query` gives between two times (seconds since the epoch), each with its highest value.
    pub(super) fn over(&self, query: &str, from: u64, to: u64) -> Vec<(Value, f64)> {
        let (from, to) = (from.to_string(), to.to_string());
        let asked = [("query", query), ("start", &from), ("end", &to), ("step", "1")];
        let data = self.api("/api/v1/query_range", &asked).unwrap_or_else(|e| panic!("{query}: {e}"));
        let highest = |series: &Value| {
            let values = series["values"].as_array()?.iter();
            let numbers = values.filter_map(|v| v[1].as_str()?.parse::<f64>().ok());
            numbers.filter(|value| !value.is_nan()).max_by(f64::total_cmp)
        };
        let series = data["result"].as_array().unwrap().iter();
        series.filter_map(|s| Some((s["metric"].clone(), highest(s)?))).collect()
    }

    /// What it wrote.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// For a URL's query.
fn escaped(text: &str) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_.~".contains(b);
    text.bytes().map(|b| if plain(&b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
