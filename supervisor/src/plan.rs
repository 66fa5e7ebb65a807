//! What a pod needs next: a pure function of what is wanted and what is there.
//!
//! Create, restart, recover after a reboot, and leave all run this one function. It names every step
//! still missing, in order; the table runs the first, sees what changed, and asks again. So a step
//! that was cut off anywhere is simply found missing, and two causes that want the same step cannot
//! run it twice.

/// What should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A working ts0.
    Attached,
    /// Nothing left.
    Gone {
        /// The identity leaves the tailnet too.
        logout: bool,
    },
}

/// The attachment's and identity's records on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Records {
    /// Not written yet.
    Missing,
    /// Written, but memory knows more.
    Stale,
    /// As memory has them.
    Saved,
}

/// The link: namespace, veth, TUN, routes, and the descriptors the supervisor keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// An earlier supervisor may have left all or some of it, and nobody has looked yet.
    Unknown,
    /// Nothing.
    Absent,
    /// Everything is there.
    Up,
    /// An engine or the kernel said that a part is gone.
    Broken,
}

/// The engine process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Nobody has looked yet whether an earlier supervisor left one.
    Unknown,
    /// None.
    None,
    /// None, and none may start before a time, or before somebody acts.
    Held,
    /// Spawned; it has not said that it runs.
    Starting,
    /// A netmap is in force.
    Running,
}

/// The key that lets a device in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// Control knows the device already.
    NotNeeded,
    /// One has to be got.
    Needed,
    /// Got, not known to be used.
    InHand,
}

/// What is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// On disk.
    pub records: Records,
    /// No other attachment's engine holds the identity.
    pub identity_free: bool,
    /// Kernel objects.
    pub link: Link,
    /// Process.
    pub engine: Engine,
    /// Another process of this engine's lives: one that will replace it, or one that it has replaced.
    pub others: bool,
    /// Auth key.
    pub key: Key,
    /// The node key has expired.
    pub rotate: bool,
    /// It expired, and control does not renew it for an auth key: only another device can join.
    pub device_spent: bool,
    /// ts0 carries exactly the addresses and routes that it should.
    pub configured: bool,
    /// What ts0 should carry is known, whatever the engine does now.
    pub configurable: bool,
    /// The engine uses the routes of other nodes that the record names.
    pub routing_told: bool,
    /// Control may know the device.
    pub device: bool,
    /// The engine was asked to log out, whatever came of it. A server may keep a device that logged out,
    /// expired; then `device` stays true.
    pub logout_tried: bool,
    /// The API was asked to delete the device or the unused key and did not.
    pub delete_failed: bool,
}

/// One step. Each can be run again after it was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Take up the engine that an earlier supervisor left, if there is one.
    Adopt,
    /// Write the records.
    Save,
    /// Make, repair or take over the link and the descriptors.
    BuildLink,
    /// New node key, which names the old one.
    RotateKey,
    /// Get an auth key.
    MintKey,
    /// Spawn the engine and tell it who it is.
    StartEngine,
    /// Tell the engine which routes of other nodes the pod uses.
    TellRouting,
    /// Put the addresses and routes on ts0.
    Configure,
    /// Ask the engine to log out.
    Logout,
    /// End the engine process.
    StopEngine,
    /// End the engine's other processes.
    EndOthers,
    /// Remove every kernel object.
    RemoveLink,
    /// Delete the device through the API.
    DeleteDevice,
    /// Delete the unused key through the API.
    DeleteKey,
    /// Remove the attachment's record, and the identity's when the device is gone.
    Forget,
}

impl Step {
    /// One word for metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Adopt => "adopt",
            Self::Save => "save",
            Self::BuildLink => "build_link",
            Self::RotateKey => "rotate_key",
            Self::MintKey => "mint_key",
            Self::StartEngine => "start_engine",
            Self::TellRouting => "tell_routing",
            Self::Configure => "configure",
            Self::Logout => "logout",
            Self::StopEngine => "stop_engine",
            Self::EndOthers => "end_others",
            Self::RemoveLink => "remove_link",
            Self::DeleteDevice => "delete_device",
            Self::DeleteKey => "delete_key",
            Self::Forget => "forget",
        }
    }
}

/// The steps still missing, in order.
#[must_use]
pub fn plan(wanted: Wanted, at: &Observed) -> Vec<Step> {
    match wanted {
        Wanted::Attached => attach(at),
        Wanted::Gone { logout } => leave(at, logout),
    }
}

fn attach(at: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    if at.engine == Engine::Unknown {
        // It holds the link, or there is none: everything after depends on that.
        return vec![Step::Adopt];
    }
    // Before any kernel object exists, so that nothing made can be forgotten.
    if at.records == Records::Missing {
        steps.push(Step::Save);
    }
    let engine_alive = matches!(at.engine, Engine::Starting | Engine::Running);
    if at.link == Link::Broken && engine_alive {
        // It holds descriptors of the old objects.
        steps.push(Step::StopEngine);
    }
    if !engine_alive && at.others {
        // It may hold the link, or begin to read.
        steps.push(Step::EndOthers);
    }
    if at.link != Link::Up {
        steps.push(Step::BuildLink);
    }
    if !engine_alive || at.link == Link::Broken {
        if !at.identity_free || at.engine == Engine::Held {
            // Nobody may start, but what was asked of the pod's interface still counts.
            if at.link == Link::Up && at.configurable && !at.configured {
                steps.push(Step::Configure);
            }
            if at.records == Records::Stale {
                steps.push(Step::Save);
            }
            return steps;
        }
        if at.device_spent {
            steps.push(Step::DeleteDevice);
        }
        if at.rotate {
            steps.push(Step::RotateKey);
        }
        if at.key == Key::Needed {
            steps.push(Step::MintKey);
        }
        steps.push(Step::StartEngine);
        return steps;
    }
    if !at.routing_told {
        steps.push(Step::TellRouting);
    }
    if (at.engine == Engine::Running || at.configurable) && !at.configured {
        steps.push(Step::Configure);
    }
    if at.engine == Engine::Running {
        // Last, and once: then the ADD is answered.
        if at.records == Records::Stale {
            steps.push(Step::Save);
        }
    }
    steps
}

fn leave(at: &Observed, logout: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    if at.engine == Engine::Unknown {
        return vec![Step::Adopt];
    }
    if at.others {
        steps.push(Step::EndOthers);
    }
    let engine_alive = matches!(at.engine, Engine::Starting | Engine::Running);
    let device_goes = logout && at.device;
    let engine_logs_out = device_goes && engine_alive && !at.logout_tried;
    if engine_logs_out {
        steps.push(Step::Logout);
    }
    if engine_alive {
        steps.push(Step::StopEngine);
    }
    if at.link != Link::Absent {
        steps.push(Step::RemoveLink);
    }
    if device_goes && !engine_logs_out && !at.delete_failed {
        steps.push(Step::DeleteDevice);
    }
    if at.key == Key::InHand && !at.delete_failed {
        steps.push(Step::DeleteKey);
    }
    steps.push(Step::Forget);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use Step::*;
    use proptest::prelude::*;

    const NEW: Observed = Observed {
        records: Records::Missing,
        identity_free: true,
        link: Link::Absent,
        engine: Engine::None,
        others: false,
        key: Key::Needed,
        rotate: false,
        device_spent: false,
        configured: false,
        configurable: false,
        routing_told: true,
        device: false,
        logout_tried: false,
        delete_failed: false,
    };
    const UP: Observed = Observed {
        records: Records::Saved,
        link: Link::Up,
        engine: Engine::Running,
        key: Key::NotNeeded,
        configured: true,
        configurable: true,
        device: true,
        ..NEW
    };

    #[test]
    fn attaching() {
        let saved = Observed { records: Records::Saved, ..NEW };
        let crashed = Observed { engine: Engine::None, ..UP };
        let table: &[(&str, Observed, &[Step])] = &[
            ("after another supervisor", Observed { engine: Engine::Unknown, ..UP }, &[Adopt]),
            ("an engine was taken up", Observed { link: Link::Unknown, ..UP }, &[BuildLink]),
            ("new pod", NEW, &[Save, BuildLink, MintKey, StartEngine]),
            ("known device", Observed { key: Key::NotNeeded, ..NEW }, &[Save, BuildLink, StartEngine]),
            ("old sandbox holds the identity", Observed { identity_free: false, ..NEW }, &[Save, BuildLink]),
            ("key in hand", Observed { link: Link::Up, key: Key::InHand, ..saved }, &[StartEngine]),
            (
                "waiting for control",
                Observed { engine: Engine::Starting, configured: false, configurable: false, ..UP },
                &[],
            ),
            (
                "first netmap",
                Observed { configured: false, records: Records::Stale, ..UP },
                &[Configure, Save],
            ),
            ("all well", UP, &[]),
            (
                "other routes are asked for",
                Observed { routing_told: false, configured: false, records: Records::Stale, ..UP },
                &[TellRouting, Configure, Save],
            ),
            (
                "other routes while the engine may not start",
                Observed { engine: Engine::Held, configured: false, records: Records::Stale, ..UP },
                &[Configure, Save],
            ),
            (
                "other routes while the engine starts again",
                Observed { engine: Engine::Starting, configured: false, ..UP },
                &[Configure],
            ),
            (
                "engine died: no disk in its way",
                Observed { records: Records::Stale, ..crashed },
                &[StartEngine],
            ),
            ("backing off", Observed { engine: Engine::Held, ..UP }, &[]),
            ("key rejected", Observed { key: Key::Needed, ..crashed }, &[MintKey, StartEngine]),
            (
                "node key expired",
                Observed { key: Key::Needed, rotate: true, ..crashed },
                &[RotateKey, MintKey, StartEngine],
            ),
            (
                "expired for good",
                Observed { key: Key::Needed, rotate: true, device_spent: true, ..crashed },
                &[DeleteDevice, RotateKey, MintKey, StartEngine],
            ),
            (
                "engine died, and one that it had replaced lingers",
                Observed { others: true, ..crashed },
                &[EndOthers, StartEngine],
            ),
            ("its successor is being brought up", Observed { others: true, ..UP }, &[]),
            ("link lost", Observed { link: Link::Broken, ..crashed }, &[BuildLink, StartEngine]),
            (
                "link lost, engine lives",
                Observed { link: Link::Broken, ..UP },
                &[StopEngine, BuildLink, StartEngine],
            ),
            ("after a reboot", Observed { link: Link::Absent, ..crashed }, &[BuildLink, StartEngine]),
        ];
        for (name, observed, want) in table {
            assert_eq!(plan(Wanted::Attached, observed), *want, "{name}");
        }
    }

    #[test]
    fn leaving() {
        let dead = Observed { engine: Engine::None, ..UP };
        let table: &[(&str, Observed, bool, &[Step])] = &[
            ("nobody has looked", Observed { engine: Engine::Unknown, ..UP }, true, &[Adopt]),
            ("running", UP, true, &[Logout, StopEngine, RemoveLink, Forget]),
            (
                "taken up and told to leave before its link was looked at",
                Observed { link: Link::Unknown, ..UP },
                false,
                &[StopEngine, RemoveLink, Forget],
            ),
            (
                "in the middle of a handover",
                Observed { others: true, ..UP },
                true,
                &[EndOthers, Logout, StopEngine, RemoveLink, Forget],
            ),
            ("identity stays", UP, false, &[StopEngine, RemoveLink, Forget]),
            (
                "logged out, but the server keeps the device",
                Observed { logout_tried: true, ..UP },
                true,
                &[StopEngine, RemoveLink, DeleteDevice, Forget],
            ),
            ("no engine", dead, true, &[RemoveLink, DeleteDevice, Forget]),
            (
                "API does not answer either",
                Observed { link: Link::Absent, delete_failed: true, ..dead },
                true,
                &[Forget],
            ),
            ("failed before anything", NEW, true, &[Forget]),
            (
                "failed with a key in hand",
                Observed { link: Link::Up, key: Key::InHand, ..NEW },
                true,
                &[RemoveLink, DeleteKey, Forget],
            ),
        ];
        for (name, observed, logout, want) in table {
            assert_eq!(plan(Wanted::Gone { logout: *logout }, observed), *want, "{name}");
        }
    }

    fn any_observed() -> impl Strategy<Value = Observed> {
        let records = prop_oneof![Just(Records::Missing), Just(Records::Stale), Just(Records::Saved)];
        let link = prop_oneof![Just(Link::Unknown), Just(Link::Absent), Just(Link::Up), Just(Link::Broken)];
        let engine = prop_oneof![
            Just(Engine::Unknown),
            Just(Engine::None),
            Just(Engine::Held),
            Just(Engine::Starting),
            Just(Engine::Running)
        ];
        let key = prop_oneof![Just(Key::NotNeeded), Just(Key::Needed), Just(Key::InHand)];
        let flags = proptest::array::uniform10(any::<bool>());
        (records, link, engine, key, flags).prop_map(|(records, link, engine, key, f)| Observed {
            records,
            link,
            engine,
            key,
            identity_free: f[0],
            rotate: f[1],
            configured: f[2],
            device: f[3],
            logout_tried: f[4],
            delete_failed: f[5],
            device_spent: f[6],
            configurable: f[7],
            routing_told: f[8],
            others: f[9],
        })
    }

    /// What a successful step changes.
    fn done(step: Step, at: &mut Observed) {
        match step {
            Adopt => at.engine = Engine::Running,
            Save => at.records = Records::Saved,
            BuildLink => at.link = Link::Up,
            RotateKey => at.rotate = false,
            MintKey => at.key = Key::InHand,
            StartEngine => at.engine = Engine::Running,
            TellRouting => at.routing_told = true,
            Configure => at.configured = true,
            Logout => at.device = false,
            DeleteDevice => (at.device, at.device_spent) = (false, false),
            StopEngine => at.engine = Engine::None,
            EndOthers => at.others = false,
            RemoveLink => at.link = Link::Absent,
            DeleteKey => at.key = Key::Needed,
            Forget => at.records = Records::Missing,
        }
    }

    proptest! {
        #[test]
        fn every_state_converges_and_no_step_repeats(start in any_observed(), logout in any::<bool>()) {
            for wanted in [Wanted::Attached, Wanted::Gone { logout }] {
                let mut at = start;
                let mut ran = Vec::new();
                while let Some(step) = plan(wanted, &at).first().copied() {
                    prop_assert!(!ran.contains(&step) || step == Save, "{step:?} twice from {start:?}");
                    ran.push(step);
                    done(step, &mut at);
                    if step == Forget { break; }
                }
                prop_assert!(ran.len() < 12);
                if let Wanted::Gone { .. } = wanted {
                    prop_assert_eq!(ran.last(), Some(&Forget));
                    prop_assert_eq!(at.link, Link::Absent);
                    prop_assert!(!matches!(at.engine, Engine::Starting | Engine::Running));
                    prop_assert!(!at.others);
                }
            }
        }

        #[test]
        fn records_come_before_kernel_objects(start in any_observed()) {
            let steps = plan(Wanted::Attached, &start);
            if start.records == Records::Missing && start.engine != Engine::Unknown {
                prop_assert_eq!(steps.first(), Some(&Save));
            }
        }

        #[test]
        fn a_dead_engine_never_waits_for_the_disk(start in any_observed()) {
            let steps = plan(Wanted::Attached, &start);
            if start.records != Records::Missing
                && let Some(at) = steps.iter().position(|s| *s == StartEngine)
            {
                prop_assert!(!steps[..at].contains(&Save));
            }
        }
    }
}
