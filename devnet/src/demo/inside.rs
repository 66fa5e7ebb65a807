//! The order of events, inside the namespaces.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use podtether_net::isolate;

use super::display::{Display, Row, duration};
use super::world::{Place, World};
use super::{reach, trouble};

/// Exit code after an interrupt, as shells have it.
const INTERRUPTED: i32 = 130;
/// Far more than every step's own limit: the last resort against a hang.
const LONGEST: Duration = Duration::from_secs(300);

/// Runs the demo here.
///
/// # Errors
/// When it cannot even start.
pub(super) fn run(keep: bool) -> Result<ExitCode> {
    // Interrupts from the terminal go to the process outside, not to supervisors and engines.
    nix::unistd::setsid().context("start a session")?;
    let mut display = Display::new();
    let (pid, lifeline) = lifeline(display.clearer(), LONGEST)?;
    super::orphans::reap_engines()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let dir = runtime.block_on(isolate::settle())?;
    drop(runtime);

    let started = Instant::now();
    display.line("podtether demo: two nodes, four pods, one tailnet, in namespaces of their own");
    let mut world = None;
    let result = steps(&mut display, &mut world, &dir, keep);
    let took = duration(started.elapsed());
    if let Err(error) = &result {
        display.finish();
        display.line(&format!("\nFAILED after {took}: {error:#}\n"));
        if let Some(world) = &world {
            display.line(&world.logs());
        }
    } else {
        display.row(Row::passed("all of it", took));
        display.finish();
    }
    if keep && let Some(world) = &world {
        display.line(&hints(world, &pid));
        lifeline.end();
    }
    Ok(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn steps(display: &mut Display, slot: &mut Option<World>, dir: &std::path::Path, keep: bool) -> Result<()> {
    display.step("kernel objects this needs", |_| requirements())?;
    display.step("router, devnet, two nodes with a supervisor each", |_| {
        let world = slot.insert(World::start(dir)?);
        Ok(vec![Row::passed(
            "control, admin API and DERP over TLS",
            format!("{}, own root certificate", world.devnet.https_url()),
        )])
    })?;
    let world = slot.as_mut().context("no world")?;
    display.step("four pods, CNI ADD behind another plugin", |progress| reach::join(world, progress))?;
    display.step("first packets between all pods", |progress| reach::first_contact(world, progress))?;
    display.step("100 pings for each pair, IPv4 and IPv6", |progress| reach::pings(world, progress))?;
    display.step("MagicDNS", |progress| reach::names(world, progress))?;
    display.step("access rules", |_| reach::access(world))?;
    display.step("kill -9 of an engine under a TCP transfer", |progress| trouble::kill(world, progress))?;
    display.step("UDP between the nodes blocked", |progress| trouble::relay(world, progress))?;
    if !keep {
        display.step("four pods leave, CNI DEL", |progress| trouble::leave(world, progress))?;
    }
    Ok(())
}

/// Says what to do where TUNs cannot be made.
pub(crate) fn require_tun() -> Result<()> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        let advice = if error.kind() == ErrorKind::NotFound {
            "as root: `modprobe tun`"
        } else {
            "run the demo as root, or, as root, let everybody open it as most systems do: \
             `chmod 0666 /dev/net/tun`"
        };
        bail!("/dev/net/tun cannot be opened: {error}; {advice}");
    }
    Ok(())
}

fn requirements() -> Result<Vec<Row>> {
    require_tun()?;
    let map = std::fs::read_to_string("/proc/self/uid_map").context("read the id map")?;
    let ids: u64 = map.lines().filter_map(|l| l.split_whitespace().nth(2)?.parse::<u64>().ok()).sum();
    let (what, measured) = if ids > 65_536 {
        ("engines run under", "a uid each, without capabilities")
    } else {
        ("engines run under", "the user's one uid: no others are mapped here")
    };
    Ok(vec![Row::passed(what, measured)])
}

/// The end of stdin ends this process, and with it everything here: the process outside was interrupted,
/// or is gone.
pub(crate) struct Lifeline {
    kept: mpsc::Sender<()>,
    ended: Receiver<()>,
}

impl Lifeline {
    /// Waits for it.
    fn end(self) {
        let Self { kept, ended } = self;
        let _ = kept.send(());
        let _ = ended.recv();
    }
}

/// Starts watching, for `longest` at most; also returns this process's id as the process outside sees it.
pub(crate) fn lifeline(clear: impl Fn() + Send + 'static, longest: Duration) -> Result<(String, Lifeline)> {
    let mut stdin = BufReader::new(std::io::stdin());
    let mut pid = String::new();
    stdin.read_line(&mut pid).context("read the own pid")?;
    let (kept, is_kept) = mpsc::channel();
    let (end, ended) = mpsc::channel();
    let (gone, is_gone) = mpsc::channel();
    std::thread::Builder::new().name("lifeline".into()).spawn(move || {
        let _ = stdin.read_to_end(&mut Vec::new());
        let _ = gone.send(());
    })?;
    std::thread::Builder::new().name("watchdog".into()).spawn(move || {
        let timed_out = is_gone.recv_timeout(longest).is_err();
        if is_kept.try_recv().is_ok() {
            if timed_out {
                let _ = is_gone.recv();
            }
            let _ = end.send(());
            return;
        }
        clear();
        say(if timed_out { "FAILED: hangs" } else { "interrupted" });
        std::process::exit(if timed_out { 1 } else { INTERRUPTED });
    })?;
    Ok((pid.trim().to_owned(), Lifeline { kept, ended }))
}

#[expect(clippy::print_stdout, reason = "a command line tool prints its answers")]
fn say(text: &str) {
    println!("{text}");
}

/// What a person can try while it is kept.
fn hints(world: &World, pid: &str) -> String {
    let lab = world.lab.dir().display();
    let mut text = format!(
        "\nStill running, until Ctrl-C. In another terminal, as the same user, step in:\n\n  \
         nsenter -t {pid} -U --preserve-credentials -m -p -n sh\n\n\
         In there, for example:\n\n  cd {lab}\n"
    );
    let mut examples: Vec<(String, String)> = Vec::new();
    if let Some(site) = world.sites.first() {
        let node = &site.node.name;
        let inside = format!("nsenter --net=netns/{node}");
        let url = "http://127.0.0.1:9465";
        examples.push((format!("{inside} curl -s {url}/v1/pods"), format!("what {node} knows of its pods")));
        examples.push((format!("{inside} curl -s {url}/metrics"), String::new()));
        examples.push((format!("tail -f {node}/supervisor.log"), "engines' lines included".into()));
    }
    let places = world.places();
    if let [one, .., other] = &places[..]
        && let Ok(target) = other.pod.v4()
    {
        let net = one.pod.netns_path.strip_prefix(world.lab.dir()).unwrap_or(&one.pod.netns_path);
        let inside = format!("nsenter --net={}", net.display());
        let (one, other) = (&one.pod.name, &other.pod.name);
        examples.push((format!("{inside} ping {target}"), format!("{one} pings {other}")));
    }
    for place in places {
        if let (Ok(engine), Ok(address)) = (place.field::<u32>("enginePid"), place.pod.v4()) {
            let Place { node, pod } = place;
            let note = format!("the engine of {} ({address}) on {}", pod.name, node.name);
            examples.push((format!("kill -9 {engine}"), note));
        }
    }
    for (command, note) in examples {
        let note = if note.is_empty() { note } else { format!("# {note}") };
        text += format!("  {command:<58}  {note}").trim_end();
        text.push('\n');
    }
    text
}
