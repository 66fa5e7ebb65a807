//! `iperf3` between two namespaces, and what it says.

use std::io::{BufRead, BufReader, Read};
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use podtether_net::Netns;
use serde_json::Value;

const PORT: u16 = 5201;
const LISTENS: &str = "Server listening";
/// Beyond the time it is to send for.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// As fast as it goes, over so many connections.
    Tcp {
        /// How many.
        streams: u8,
    },
    /// Datagrams.
    Udp {
        /// Payload of each.
        bytes: u16,
        /// Payload bits offered a second; `None` for as many as can be made.
        bits_per_second: Option<f64>,
    },
}

/// What arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Flow {
    /// Payload bits a second.
    pub bits_per_second: f64,
    /// The same as the sender made them.
    pub offered_bits_per_second: f64,
    /// Payload bytes.
    pub bytes: f64,
    /// Part of the datagrams that did not arrive, 0 to 1; 0 for TCP.
    pub loss: f64,
    /// Segments that TCP sent again.
    pub retransmits: f64,
}

impl Flow {
    /// Payload in gigabits.
    #[must_use]
    pub fn gigabits(&self) -> f64 {
        self.bytes * 8.0 / 1e9
    }
}

/// The program.
#[derive(Debug, Clone)]
pub struct Iperf {
    program: PathBuf,
    /// Of TCP; the system's own when absent.
    congestion: Option<String>,
}

/// Ends with its owner.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Iperf {
    /// The one on PATH, whose TCP is to use this congestion control.
    ///
    /// # Errors
    /// When there is none, with what to install.
    pub fn find(congestion: Option<String>) -> Result<Self> {
        let program = on_path("iperf3").context("iperf3 is not on PATH: `apt-get install iperf3`")?;
        Ok(Self { program, congestion })
    }

    /// Sends from `from` to `to`, which has `target`, for `time`.
    ///
    /// # Errors
    /// In the program's own words.
    pub fn run(&self, from: &Netns, to: &Netns, target: IpAddr, load: Load, time: Duration) -> Result<Flow> {
        let _server = self.serve(to)?;
        let mut command = inside(&self.program, from);
        command.args(arguments(target, load, time));
        if let (Load::Tcp { .. }, Some(name)) = (load, &self.congestion) {
            command.args(["-C", name]);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut client = Server(command.spawn().context("start iperf3")?);
        let mut stdout = client.0.stdout.take().context("no output of iperf3")?;
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).map(|_| text)
        });
        let until = Instant::now() + time + PATIENCE;
        while client.0.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "iperf3 to {target} does not end");
            std::thread::sleep(POLL);
        }
        let text = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        parse(&text).with_context(|| format!("iperf3 to {target}"))
    }

    /// A server for one client that listens.
    fn serve(&self, to: &Netns) -> Result<Server> {
        let mut command = inside(&self.program, to);
        command.args(["-s", "-1", "-i", "0", "--forceflush", "-p"]).arg(PORT.to_string());
        let mut server = Server(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?);
        let mut lines = BufReader::new(server.0.stdout.take().context("no output of iperf3")?).lines();
        // What follows fits into the pipe, and its reader stays.
        for line in &mut lines {
            if line?.contains(LISTENS) {
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(server);
            }
        }
        bail!("the iperf3 server ends at once: does another one listen on port {PORT}?")
    }
}

/// A program of this name on PATH.
#[must_use]
pub fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn inside(program: &Path, ns: &Netns) -> Command {
    let mut command = Command::new(program);
    let ns = ns.clone();
    command.stdin(Stdio::null());
    // SAFETY: entering a namespace is one system call on a descriptor that is open before the fork.
    unsafe {
        command.pre_exec(move || {
            ns.enter().map_err(|e| std::io::Error::from_raw_os_error(e.errno().unwrap_or(libc::EPERM)))
        });
    }
    command
}

fn arguments(target: IpAddr, load: Load, time: Duration) -> Vec<String> {
    let mut words: Vec<String> = ["-J", "-i", "0", "-c"].map(str::to_owned).into();
    words.extend([target.to_string(), "-p".into(), PORT.to_string()]);
    words.extend(["-t".into(), time.as_secs().max(1).to_string()]);
    match load {
        Load::Tcp { streams } => words.extend(["-P".into(), streams.to_string()]),
        Load::Udp { bytes, bits_per_second } => {
            words.extend(["-u".into(), "-l".into(), bytes.to_string()]);
            words.extend(["-b".into(), format!("{:.0}", bits_per_second.unwrap_or(0.0))]);
        }
    }
    words
}

/// Reads what `iperf3 -J` wrote.
///
/// # Errors
/// With its own error, or when it wrote something else.
pub fn parse(text: &str) -> Result<Flow> {
    let all: Value = serde_json::from_str(text).with_context(|| format!("no JSON: {text:.200}"))?;
    if let Some(error) = all["error"].as_str() {
        bail!("{error}");
    }
    let (sent, received) = (&all["end"]["sum_sent"], &all["end"]["sum_received"]);
    let number = |of: &Value, key: &str| of[key].as_f64();
    let need = |of: &Value, key: &str| number(of, key).with_context(|| format!("no {key} in its report"));
    let loss = if received["lost_packets"].is_null() {
        0.0
    } else {
        let (lost, packets) = (need(received, "lost_packets")?, need(received, "packets")?);
        // What was lost behind the last that arrived is known by the sender alone.
        let packets = packets.max(number(sent, "packets").unwrap_or(0.0));
        let arrived = need(received, "packets")? - lost;
        if packets > 0.0 { (1.0 - arrived / packets).max(0.0) } else { 1.0 }
    };
    let udp = !received["lost_packets"].is_null();
    let bytes = need(received, "bytes")?;
    // Of UDP, `bytes` counts what was sent before the last that arrived in some versions.
    let bytes = if udp { (need(sent, "bytes")? * (1.0 - loss)).min(bytes.max(0.0)) } else { bytes };
    let seconds = need(received, "seconds")?;
    ensure!(seconds > 0.0, "nothing arrived");
    Ok(Flow {
        bits_per_second: bytes * 8.0 / seconds,
        offered_bits_per_second: need(sent, "bits_per_second")?,
        bytes,
        loss,
        retransmits: number(sent, "retransmits").unwrap_or(0.0),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reports_are_read() {
        let tcp = json!({ "end": {
            "sum_sent": { "seconds": 1.0, "bytes": 1010, "bits_per_second": 8080.0, "retransmits": 8 },
            "sum_received": { "seconds": 2.0, "bytes": 1000, "bits_per_second": 4000.0 },
        } });
        let flow = parse(&tcp.to_string()).unwrap();
        let wanted = Flow {
            bits_per_second: 4000.0,
            offered_bits_per_second: 8080.0,
            bytes: 1000.0,
            loss: 0.0,
            retransmits: 8.0,
        };
        assert_eq!(flow, wanted);
        assert!((flow.gigabits() - 8e-6).abs() < 1e-12);
        // The sender's packets, how many of them the receiver knows of, and how many of those it missed.
        for (sent, known, lost, loss) in
            [(1000, 1000, 0, 0.0), (1000, 1000, 100, 0.1), (1000, 900, 0, 0.1), (1000, 0, 0, 1.0)]
        {
            let udp = json!({ "end": {
                "sum_sent": { "seconds": 1.0, "bytes": sent * 100, "bits_per_second": 8e5, "packets": sent },
                "sum_received": { "seconds": 1.0, "bytes": sent * 100, "packets": known, "lost_packets": lost },
            } });
            let flow = parse(&udp.to_string()).unwrap();
            assert!((flow.loss - loss).abs() < 1e-9, "{flow:?}");
            assert!((flow.bits_per_second - 8e5 * (1.0 - loss)).abs() < 1e-3, "{flow:?}");
        }
    }

    #[test]
    fn what_is_no_report_is_an_error() {
        for (text, words) in [
            (r#"{"end": {}, "error": "unable to connect to server"}"#, "unable to connect"),
            (r#"{"end": {}}"#, "no bytes"),
            ("iperf3: error", "no JSON"),
            (
                r#"{"end": {"sum_sent": {"bits_per_second": 0}, "sum_received": {"bytes": 0, "seconds": 0}}}"#,
                "nothing arrived",
            ),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn loads_become_words() {
        let words = |load| arguments([10, 0, 0, 1].into(), load, Duration::from_millis(2500)).join(" ");
        assert_eq!(words(Load::Tcp { streams: 8 }), "-J -i 0 -c 10.0.0.1 -p 5201 -t 2 -P 8");
        let udp = Load::Udp { bytes: 64, bits_per_second: Some(1.5e9) };
        assert_eq!(words(udp), "-J -i 0 -c 10.0.0.1 -p 5201 -t 2 -u -l 64 -b 1500000000");
        let most = Load::Udp { bytes: 64, bits_per_second: None };
        assert!(words(most).ends_with("-b 0"));
    }
}
