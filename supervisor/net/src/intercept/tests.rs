use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::*;
use crate::netlink::{Netlink, VethEnd};
use crate::sockets;
use crate::testing::{block_on, in_namespaces};

const SERVERS: [&str; 2] = ["10.9.0.2", "fd09::2"];

/// A pod's namespace, joined to one that has a name server on each of [`SERVERS`].
fn pod_with_servers() -> Netns {
    let (pod, far) = block_on(async {
        let (pod, far) = (Netns::create().await.unwrap(), Netns::create().await.unwrap());
        let in_pod = Netlink::open(&pod).await.unwrap();
        let near = VethEnd { namespace: None, name: "eth0", mac: None, mtu: 1500 };
        in_pod
            .add_veth(near, VethEnd { namespace: Some(&far), name: "eth0", mac: None, mtu: 1500 })
            .await
            .unwrap();
        let in_far = Netlink::open(&far).await.unwrap();
        for (netlink, addresses) in
            [(&in_pod, ["10.9.0.1/24", "fd09::1/64"]), (&in_far, ["10.9.0.2/24", "fd09::2/64"])]
        {
            for name in ["lo", "eth0"] {
                let index = netlink.link(name).await.unwrap().unwrap().index;
                if name == "eth0" {
                    for address in addresses {
                        netlink.add_address(index, address.parse().unwrap()).await.unwrap();
                    }
                }
                netlink.set_up(index).await.unwrap();
            }
        }
        in_pod.wait_running("eth0").await.unwrap();
        in_pod.wait_local(&["fd09::1".parse().unwrap()]).await.unwrap();
        in_far.wait_local(&["fd09::2".parse().unwrap()]).await.unwrap();
        (pod, far)
    });
    for server in SERVERS {
        let at = SocketAddr::new(server.parse().unwrap(), 53);
        let (udp, tcp) =
            far.run_blocking(|| (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap())).unwrap();
        serve("server", udp, tcp);
    }
    pod
}

/// Answers everything with `who`, and by UDP with the question before it.
fn serve(who: &'static str, udp: UdpSocket, tcp: TcpListener) {
    udp.set_nonblocking(false).unwrap();
    tcp.set_nonblocking(false).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(&[&buffer[..length], who.as_bytes()].concat(), from).unwrap();
        }
    });
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let mut buffer = [0; 64];
            if stream.read(&mut buffer).is_ok() {
                let _ = stream.write_all(who.as_bytes());
            }
        }
    });
}

fn ask_udp(socket: &UdpSocket) -> String {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let mut buffer = [0; 64];
    for _ in 0..5 {
        // What a vanished listener's port answers is an error of the next call.
        let question = ASKED.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        if socket.send(&question).is_err() {
            continue;
        }
        while let Ok(length) = socket.recv(&mut buffer) {
            // A first question may be answered late, after it was asked again: a new neighbour is looked for.
            if let Some(who) = buffer[..length].strip_prefix(&question) {
                return String::from_utf8_lossy(who).into_owned();
            }
        }
    }
    "nobody".into()
}

fn ask_tcp(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut text = String::new();
    stream.write_all(b"?").unwrap();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn disconnect(socket: &UdpSocket) {
    let nobody =
        libc::sockaddr { sa_family: libc::sa_family_t::try_from(libc::AF_UNSPEC).unwrap(), sa_data: [0; 14] };
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).unwrap();
    // SAFETY: one sockaddr of this length that outlives the call.
    assert_eq!(unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, length) }, 0);
}

fn udp_to(pod: &Netns, server: SocketAddr) -> UdpSocket {
    pod.run_blocking(|| {
        let any: IpAddr =
            if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.connect(server).unwrap();
        socket
    })
    .unwrap()
}

#[test]
fn questions_go_to_the_stand_in_until_the_owner_is_gone() {
    in_namespaces("intercept::tests::questions_go_to_the_stand_in_until_the_owner_is_gone", |_| {
        let pod = pod_with_servers();
        let servers = SERVERS.map(|s| s.parse::<IpAddr>().unwrap());
        let at = |n: usize| SocketAddr::new(servers[n], 53);
        // Old flows, from before to after the interception.
        let old = [udp_to(&pod, at(0)), udp_to(&pod, at(1))];
        let mut everyone = vec![];
        for stand_in in stand_ins(&pod, &servers).unwrap() {
            everyone.push((
                stand_in.server,
                stand_in.udp.local_addr().unwrap(),
                stand_in.tcp.local_addr().unwrap(),
            ));
            serve(
                if stand_in.server.is_ipv4() { "stand-in 4" } else { "stand-in 6" },
                stand_in.udp,
                stand_in.tcp,
            );
        }
        let mut askers = sockets::askers(&pod).unwrap();
        let mut expect = |want: [&str; 2]| {
            for (n, want) in want.into_iter().enumerate() {
                assert_eq!(ask_udp(&old[n]), want, "an old flow");
                assert_eq!(ask_udp(&udp_to(&pod, at(n))), want, "a new flow");
                let mut stream = pod.run_blocking(|| TcpStream::connect(at(n)).unwrap()).unwrap();
                assert_eq!(ask_tcp(&mut stream), want, "TCP");
                // The engine's own questions reach the server at all times, through a socket used again
                // and again.
                let marked = if n == 0 { &askers.udp4[0] } else { &askers.udp6[0] };
                let marked = UdpSocket::from(marked.try_clone().unwrap());
                marked.set_nonblocking(false).unwrap();
                marked.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                marked.connect(at(n)).unwrap();
                assert_eq!(ask_udp(&marked), "server", "the engine's own");
                let port = marked.local_addr().unwrap().port();
                disconnect(&marked);
                assert_ne!(marked.local_addr().unwrap().port(), port, "the port is forgotten");
                let tcp = if n == 0 { askers.tcp4.pop() } else { askers.tcp6.pop() };
                let tcp = Socket::from(tcp.unwrap());
                tcp.set_nonblocking(false).unwrap();
                tcp.connect(&at(n).into()).unwrap();
                assert_eq!(ask_tcp(&mut tcp.into()), "server", "the engine's own TCP");
            }
        };
        expect(["server"; 2]);
        let owner = Owner::open(&pod).unwrap();
        owner.arm("podtether-ts0", &everyone).unwrap();
        expect(["stand-in 4", "stand-in 6"]);
        let held_elsewhere = owner.descriptor().try_clone().unwrap();
        drop(owner);
        expect(["stand-in 4", "stand-in 6"]);
        // As when a new engine starts right after the old one's death.
        let next = Owner::open(&pod).unwrap();
        assert_eq!(next.arm("podtether-ts0", &everyone).unwrap_err().errno(), Some(libc::EPERM));
        drop(held_elsewhere);
        next.arm("podtether-ts0", &everyone).unwrap();
        drop(next);
        expect(["server"; 2]);
    });
}

#[test]
fn too_many_servers_are_refused() {
    let servers = vec![IpAddr::from(Ipv4Addr::LOCALHOST); MAX_SERVERS + 1];
    let own = Netns::current().unwrap();
    assert!(matches!(stand_ins(&own, &servers), Err(Error::Invalid { .. })));
}
