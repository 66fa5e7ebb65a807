//! prevResult: passed through with our part added, and read back in CHECK.
//!
//! It stays JSON all the way, so that what another plugin put there comes out again, known or not.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use podtether_proto::node::{Attached, CniError, code};
use serde_json::{Map, Value, json};

use crate::config::{SpecVersion, invalid};

/// Versions whose results have today's lists; before them a result had `ip4` and `ip6`.
const READABLE: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const LISTS: [&str; 3] = ["interfaces", "ips", "routes"];

/// A result in the shape of one specification version.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PrevResult {
    version: SpecVersion,
    object: Map<String, Value>,
}

/// What CHECK finds of ours in a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ours {
    pub(crate) addresses: Vec<IpNet>,
    /// Routes into the tailnet.
    pub(crate) routes: Vec<IpNet>,
}

impl PrevResult {
    /// Takes `value` and brings it into the shape of `version`.
    pub(crate) fn read(value: &Value, version: SpecVersion) -> Result<Self, CniError> {
        let wrong =
            |msg: String| invalid(&msg, "prevResult must be the result of the plugin before this one");
        let Value::Object(object) = value else {
            return Err(wrong("prevResult is not an object".into()));
        };
        let mut object = object.clone();
        if let Some(from) = object.get("cniVersion").filter(|v| !v.is_null())
            && !from.as_str().is_some_and(|from| READABLE.contains(&from))
        {
            return Err(CniError {
                code: code::INCOMPATIBLE_VERSION,
                msg: format!("prevResult has cniVersion {from}"),
                details: format!("supported versions are {}", READABLE.join(", ")),
            });
        }
        object.insert("cniVersion".into(), version.text().into());
        for list in LISTS {
            match object.get(list) {
                None => {}
                Some(Value::Null) => {
                    object.remove(list);
                }
                Some(Value::Array(elements)) if elements.iter().all(Value::is_object) => {}
                Some(_) => return Err(wrong(format!("prevResult's {list} are not a list of objects"))),
            }
        }
        if let Some(Value::Array(ips)) = object.get_mut("ips") {
            for ip in ips {
                let address: Option<IpNet> =
                    ip.get("address").and_then(Value::as_str).and_then(|a| a.parse().ok());
                let (Some(address), Some(ip)) = (address, ip.as_object_mut()) else {
                    return Err(wrong("prevResult has an IP without a CIDR address".into()));
                };
                if version <= SpecVersion::V0_4_0 {
                    ip.insert("version".into(), family(address).into());
                } else {
                    ip.remove("version");
                }
            }
        }
        Ok(Self { version, object })
    }

    /// True when the pod has an interface of this name already.
    pub(crate) fn has_interface(&self, ifname: &str) -> bool {
        self.interface(ifname).is_some()
    }

    /// The result as it came.
    pub(crate) fn unchanged(self) -> Value {
        Value::Object(self.object)
    }

    /// The result with what ADD made after everything else, so that the pod's primary address stays the
    /// first.
    pub(crate) fn with(mut self, attached: &Attached, netns: &str) -> Value {
        let mut link = json!({"name": attached.ifname, "sandbox": netns});
        if !attached.mac.is_empty() {
            link["mac"] = attached.mac.as_str().into();
        }
        if self.version >= SpecVersion::V1_1_0 && attached.mtu > 0 {
            link["mtu"] = attached.mtu.into();
        }
        let index = self.object.get("interfaces").and_then(Value::as_array).map_or(0, Vec::len);
        let version = self.version;
        let ips = attached.addresses.iter().map(|address| {
            let mut ip = json!({"address": address.to_string(), "interface": index});
            if version <= SpecVersion::V0_4_0 {
                ip["version"] = family(*address).into();
            }
            ip
        });
        // Versions without tables would take a route of another one for the main table's.
        let routes = attached.routes.iter().filter(|r| r.table.is_none() || version >= SpecVersion::V1_1_0);
        let routes = routes.map(|route| {
            let mut value = json!({"dst": route.dst.to_string()});
            if let Some(gw) = route.gw {
                value["gw"] = gw.to_string().into();
            }
            if let Some(table) = route.table {
                value["table"] = table.into();
            }
            value
        });
        self.append("interfaces", [link]);
        self.append("ips", ips);
        self.append("routes", routes);
        self.unchanged()
    }

    /// The networks of the addresses, and the routes that are no default routes.
    pub(crate) fn networks(&self) -> Vec<IpNet> {
        let nets = |list: &str, key: &'static str| {
            let items = self.object.get(list).and_then(Value::as_array).into_iter().flatten();
            items
                .filter_map(move |item| item.get(key)?.as_str()?.parse::<IpNet>().ok())
                .map(|net| net.trunc())
        };
        let beyond_itself = |net: &IpNet| net.prefix_len() < net.max_prefix_len();
        let routes = nets("routes", "dst").filter(|net| net.prefix_len() > 0);
        nets("ips", "address").filter(beyond_itself).chain(routes).collect()
    }

    /// Our interface's addresses and the routes into the tailnet; `None` when ADD made no interface.
    pub(crate) fn ours(&self, ifname: &str) -> Option<Ours> {
        let index = self.interface(ifname)?;
        let items = |list: &str| self.object.get(list).and_then(Value::as_array).into_iter().flatten();
        let net = |value: &Value, key: &str| value.get(key)?.as_str()?.parse::<IpNet>().ok();
        let on_ours = |ip: &&Value| ip.get("interface").and_then(Value::as_u64) == u64::try_from(index).ok();
        Some(Ours {
            addresses: items("ips").filter(on_ours).filter_map(|ip| net(ip, "address")).collect(),
            routes: items("routes").filter_map(|r| net(r, "dst")).filter(is_tailnet).collect(),
        })
    }

    /// Index of the interface inside the pod; one of that name on the host is another.
    fn interface(&self, ifname: &str) -> Option<usize> {
        let interfaces = self.object.get("interfaces")?.as_array()?;
        let text =
            |interface: &Value, key: &str| interface.get(key).and_then(Value::as_str).map(str::to_owned);
        interfaces.iter().position(|interface| {
            text(interface, "name").as_deref() == Some(ifname)
                && text(interface, "sandbox").is_some_and(|sandbox| !sandbox.is_empty())
        })
    }

    fn append(&mut self, key: &str, items: impl IntoIterator<Item = Value>) {
        if let Value::Array(list) = self.object.entry(key).or_insert_with(|| Value::Array(Vec::new())) {
            list.extend(items);
        }
    }
}

fn family(address: IpNet) -> &'static str {
    match address.addr() {
        IpAddr::V4(_) => "4",
        IpAddr::V6(_) => "6",
    }
}

fn is_tailnet(net: &IpNet) -> bool {
    const CGNAT: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(100, 64, 0, 0), 10);
    const ULA: Ipv6Net =
        Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);
    match net {
        IpNet::V4(net) => CGNAT.contains(net),
        IpNet::V6(net) => ULA.contains(net),
    }
}

#[cfg(test)]
mod tests {
    use podtether_proto::node::AttachedRoute;

    use super::*;

    const NETNS: &str = "/var/run/netns/cni-1";

    fn attached() -> Attached {
        Attached {
            ifname: "ts0".into(),
            mac: "02:00:00:00:00:01".into(),
            mtu: 1280,
            addresses: vec!["100.64.0.1/32".parse().unwrap(), "fd7a:115c:a1e0::1/128".parse().unwrap()],
            routes: vec![
                AttachedRoute {
                    dst: "100.64.0.0/10".parse().unwrap(),
                    gw: Some("169.254.1.1".parse().unwrap()),
                    table: None,
                },
                AttachedRoute { dst: "fd7a:115c:a1e0::/48".parse().unwrap(), gw: None, table: None },
            ],
        }
    }

    /// As containerd 1.6 passes it on from the bridge plugin.
    fn bridge() -> Value {
        json!({
            "cniVersion": "0.4.0", "dns": {},
            "interfaces": [
                {"mac": "82:68:5d:db:fd:b0", "name": "cni0"},
                {"mac": "46:10:34:89:39:48", "name": "eth0", "sandbox": NETNS},
            ],
            "ips": [{"address": "10.244.0.2/24", "gateway": "10.244.0.1", "interface": 1, "version": "4"}],
            "routes": [{"dst": "0.0.0.0/0"}],
        })
    }

    #[test]
    fn our_part_comes_last_in_the_asked_shape() {
        for version in SpecVersion::ALL {
            let result = PrevResult::read(&bridge(), version).unwrap().with(&attached(), NETNS);
            let mut expected = bridge();
            let ip = |address: &str, interface: u32, family: &str| {
                let mut ip = json!({"address": address, "interface": interface});
                if version <= SpecVersion::V0_4_0 {
                    ip["version"] = family.into();
                }
                ip
            };
            expected["cniVersion"] = version.text().into();
            let mut link = json!({"name": "ts0", "mac": "02:00:00:00:00:01", "sandbox": NETNS});
            if version == SpecVersion::V1_1_0 {
                link["mtu"] = 1280.into();
            }
            expected["interfaces"].as_array_mut().unwrap().push(link);
            let mut primary = ip("10.244.0.2/24", 1, "4");
            primary["gateway"] = "10.244.0.1".into();
            expected["ips"] =
                json!([primary, ip("100.64.0.1/32", 2, "4"), ip("fd7a:115c:a1e0::1/128", 2, "6")]);
            expected["routes"] = json!([
                {"dst": "0.0.0.0/0"},
                {"dst": "100.64.0.0/10", "gw": "169.254.1.1"},
                {"dst": "fd7a:115c:a1e0::/48"},
            ]);
            assert_eq!(result, expected, "{}", version.text());

            // What came out is what CHECK gets.
            let ours = PrevResult::read(&result, version).unwrap().ours("ts0").unwrap();
            assert_eq!(ours.addresses, attached().addresses);
            assert_eq!(ours.routes, attached().routes.iter().map(|r| r.dst).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_others_put_there_stays() {
        let odd = json!({
            "cniVersion": "1.1.0", "x-vendor": {"a": [1, 2]}, "dns": {"nameservers": ["10.0.0.10"]},
            "interfaces": [{"name": "eth0", "sandbox": NETNS, "mtu": 1450, "pciID": "0000:00:1f.6"}],
            "ips": [{"address": "10.0.0.1/24"}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.254", "mtu": 1400, "table": 7}],
        });
        assert_eq!(PrevResult::read(&odd, SpecVersion::V1_1_0).unwrap().unchanged(), odd);
        let with = PrevResult::read(&odd, SpecVersion::V1_1_0).unwrap().with(&attached(), NETNS);
        assert_eq!(with["x-vendor"], odd["x-vendor"]);
        assert_eq!(with["routes"][0], odd["routes"][0]);
        assert_eq!(with["interfaces"][0], odd["interfaces"][0]);
    }

    #[test]
    fn lists_may_be_absent_or_null() {
        for empty in [json!({}), json!({"cniVersion": null, "interfaces": null, "ips": null, "routes": null})]
        {
            let prev = PrevResult::read(&empty, SpecVersion::V1_0_0).unwrap();
            assert_eq!(prev.clone().unchanged(), json!({"cniVersion": "1.0.0"}));
            let with = prev.with(&attached(), NETNS);
            assert_eq!(with["ips"][0], json!({"address": "100.64.0.1/32", "interface": 0}));
        }
    }

    #[test]
    fn what_is_no_result_is_refused() {
        let table = [
            (json!([]), code::BAD_CONFIG),
            (json!({"ips": {}}), code::BAD_CONFIG),
            (json!({"ips": [1]}), code::BAD_CONFIG),
            (json!({"ips": [{"address": "10.0.0.1"}]}), code::BAD_CONFIG),
            (json!({"ips": [{}]}), code::BAD_CONFIG),
            (json!({"interfaces": ["eth0"]}), code::BAD_CONFIG),
            (json!({"routes": "all"}), code::BAD_CONFIG),
            (json!({"cniVersion": "0.2.0", "ip4": {}}), code::INCOMPATIBLE_VERSION),
            (json!({"cniVersion": 1}), code::INCOMPATIBLE_VERSION),
        ];
        for (value, code) in table {
            assert_eq!(PrevResult::read(&value, SpecVersion::V1_0_0).unwrap_err().code, code, "{value}");
        }
    }

    #[test]
    fn an_interface_of_our_name_on_the_host_is_not_ours() {
        let mut value = bridge();
        value["interfaces"][0]["name"] = "ts0".into();
        let prev = PrevResult::read(&value, SpecVersion::V0_4_0).unwrap();
        assert!(!prev.has_interface("ts0") && prev.ours("ts0").is_none());
        value["interfaces"][0]["sandbox"] = NETNS.into();
        assert!(PrevResult::read(&value, SpecVersion::V0_4_0).unwrap().has_interface("ts0"));
    }

    #[test]
    fn networks_of_the_primary_and_routes_of_other_tables() {
        let prev = json!({
            "ips": [{"address": "10.244.1.2/24"}, {"address": "fd44::2/128"}],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.244.0.0/16", "gw": "10.244.1.1"}, {"dst": "odd"}],
        });
        let read = |version| PrevResult::read(&prev, version).unwrap();
        let networks: Vec<String> =
            read(SpecVersion::V1_0_0).networks().iter().map(ToString::to_string).collect();
        assert_eq!(networks, ["10.244.1.0/24", "10.244.0.0/16"]);

        let mut attached = attached();
        let gw = Some("169.254.1.1".parse().unwrap());
        attached.routes = vec![AttachedRoute { dst: "0.0.0.0/0".parse().unwrap(), gw, table: Some(20_004) }];
        let new = read(SpecVersion::V1_1_0).with(&attached, NETNS);
        assert_eq!(new["routes"][3], json!({"dst": "0.0.0.0/0", "gw": "169.254.1.1", "table": 20_004}));
        let old = read(SpecVersion::V1_0_0).with(&attached, NETNS);
        assert_eq!(old["routes"].as_array().unwrap().len(), 3, "it would be taken for the main table's");
    }

    #[test]
    fn only_routes_into_the_tailnet_are_checked() {
        let value = json!({
            "interfaces": [{"name": "ts0", "sandbox": NETNS}],
            "routes": [{"dst": "100.64.0.0/10"}, {"dst": "100.0.0.0/8"}, {"dst": "100.100.0.0/16"},
                       {"dst": "fd7a:115c:a1e0:1::/64"}, {"dst": "fd00::/8"}, {"dst": "::/0"}, {"dst": "odd"}],
        });
        let ours = PrevResult::read(&value, SpecVersion::V1_1_0).unwrap().ours("ts0").unwrap();
        let routes: Vec<String> = ours.routes.iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["100.64.0.0/10", "100.100.0.0/16", "fd7a:115c:a1e0:1::/64"]);
    }
}
