use super::places::{Seen, memberships};
use super::*;

const HYBRID_OWN: &str = "9:name=systemd:/\n5:cpu,cpuacct:/system.slice/a\n4:memory:/x/y\n0::/\n";
const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

fn roots(found: &[Hierarchy]) -> Vec<String> {
    found.iter().map(|h| format!("{} {} {}", h.names.join(","), h.mount.display(), h.root)).collect()
}

#[test]
fn a_host_with_both_versions() {
    let (found, unusable) = places(HYBRID_OWN, HYBRID, true);
    assert_eq!(
        roots(&found),
        [
            "name=systemd /sys/fs/cgroup/systemd /",
            "cpu,cpuacct /sys/fs/cgroup/cpu,cpuacct /",
            "memory /sys/fs/cgroup/memory /",
            " /sys/fs/cgroup/unified /",
        ]
    );
    assert_eq!(unusable, []);
    assert_eq!(found[2].path_of(Path::new("/sys/fs/cgroup/memory/podtether/1")), "/podtether/1");
}

#[test]
fn containers() {
    let own = "4:memory:/kubepods/pod1/c1\n";
    let line = |root: &str, at: &str, options: &str| {
        format!("700 31 0:32 {root} {at} {options},nosuid master:3 - cgroup cgroup rw,memory\n")
    };
    let part = line("/kubepods/pod1/c1", "/sys/fs/cgroup/memory", "rw");
    let all = line("/", "/host/cg\\040roup/memory", "rw");
    let frozen = line("/", "/host/memory", "ro");
    let pod = line("/kubepods/pod1", "/pod", "rw");
    let table = [
        // What is mounted, what is used or seen.
        (String::new(), Err(Seen::Nothing)),
        (part.clone(), Err(Seen::OwnPart)),
        (format!("{part}{frozen}"), Err(Seen::ReadOnly)),
        (format!("{part}{pod}"), Ok("/pod")),
        (format!("{part}{pod}{all}"), Ok("/host/cg roup/memory")),
        (line("/kubepods/pod1/c10", "/m", "rw"), Err(Seen::OwnPart)),
        (line("/kubepods/pod1/c1/below", "/m", "rw"), Err(Seen::OwnPart)),
    ];
    for (mounts, wanted) in table {
        let (found, unusable) = places(own, &mounts, true);
        match wanted {
            Ok(at) => assert_eq!(found[0].mount, Path::new(at), "{mounts}"),
            Err(seen) => assert_eq!((found.len(), &unusable[0].seen), (0, &seen), "{mounts}"),
        }
    }
    let (pods, _) = places(own, &pod, true);
    assert_eq!(pods[0].path_of(Path::new("/pod/podtether/1")), "/kubepods/pod1/podtether/1");
}

#[test]
fn a_cgroup_namespace_of_its_own() {
    let line = |root: &str| format!("31 23 0:28 {root} /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate\n");
    let table = [("/", false), ("/..", true), ("/../../..", true), ("/../other", false)];
    for (root, usable) in table {
        assert_eq!(places("0::/\n", &line(root), false).0.len(), usize::from(usable), "{root}");
    }
    assert_eq!(places("0::/\n", &line("/"), true).0.len(), 1, "the machine's own namespace");
    assert_eq!(places("0::/kubepods/c1\n", &line("/"), true).0.len(), 1);
}

#[test]
fn nonsense_is_nothing() {
    for text in ["", "x", "1:2", ":::", "a b c - d", " - ", "1 2 3 / /x rw - cgroup2"] {
        let (found, _) = places(text, text, true);
        assert_eq!(found, []);
    }
    assert_eq!(memberships("1:b,a:/x:y\n"), [(vec!["a".to_owned(), "b".to_owned()], "/x:y".to_owned())]);
}

#[test]
fn kills_of_both_versions() {
    assert_eq!(kills("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 1\n"), 3);
    assert_eq!(kills("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), 7);
    assert_eq!(kills(""), 0);
}

#[test]
fn what_holds_follows_from_where_a_process_is() {
    let hierarchy = |v2, names: &[&str], mount: &str| Hierarchy {
        v2,
        names: names.iter().map(|n| (*n).to_owned()).collect(),
        mount: mount.into(),
        root: "/".into(),
    };
    let place = |hierarchy: Hierarchy, limits: &[Hold]| {
        let dir = hierarchy.mount.join("podtether");
        Place { hierarchy, dir, limits: limits.to_vec() }
    };
    let mut cgroups = Cgroups {
        places: vec![
            place(hierarchy(false, &["pids"], "/c/pids"), &[Hold::Tasks]),
            place(hierarchy(false, &["memory"], "/c/memory"), &[Hold::Memory]),
            place(hierarchy(false, &["devices"], "/c/devices"), &[]),
        ],
        ..Cgroups::default()
    };
    let inside = "3:pids:/podtether/1\n2:memory:/podtether/1\n1:devices:/podtether\n";
    assert_eq!(cgroups.limits_of("1", inside), [Hold::OwnCgroup, Hold::Memory, Hold::Tasks]);
    assert_eq!(cgroups.limits_of("2", inside), [], "another engine's");
    let partly = inside.replace("devices:/podtether", "devices:/");
    assert_eq!(cgroups.limits_of("1", &partly), [Hold::Memory, Hold::Tasks]);
    cgroups.problems.push("cgroup cpu is not mounted here".into());
    assert_eq!(
        cgroups.limits_of("1", inside),
        [Hold::Memory, Hold::Tasks],
        "still in one of the supervisor's"
    );
}

#[test]
fn an_engine_is_placed_when_every_limit_there_is_holds() {
    let place = |names: &str, limits: &[Hold]| Place {
        hierarchy: Hierarchy {
            v2: false,
            names: vec![names.to_owned()],
            mount: "/m".into(),
            root: "/".into(),
        },
        dir: "/m/podtether".into(),
        limits: limits.to_vec(),
    };
    let of = |places, problems: &[&str]| Cgroups {
        places,
        max_bytes: 0,
        problems: problems.iter().map(ToString::to_string).collect(),
    };
    let both = || vec![place("memory", &[Hold::Memory]), place("freezer", &[])];
    let all = [Hold::OwnCgroup, Hold::Memory];
    let table: [(Cgroups, &[Hold], bool); 7] = [
        (of(Vec::new(), &[]), &[], true),
        (of(both(), &[]), &all, true),
        (of(both(), &[]), &[Hold::OwnCgroup], false),
        // Still in the supervisor's own in a hierarchy without limits.
        (of(both(), &[]), &[Hold::Memory], false),
        (of(both(), &[]), &[], false),
        // Where not every hierarchy can be left, it is where it can be.
        (of(both(), &["cpu is read-only"]), &[Hold::Memory], true),
        (of(both(), &["cpu is read-only"]), &[], false),
    ];
    for (cgroups, holds, placed) in table {
        assert_eq!(cgroups.placed(holds), placed, "{cgroups:?} {holds:?}");
    }
}
