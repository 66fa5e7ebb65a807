//! Carries a plan out.

use std::net::IpAddr;

use super::plan::{Action, Observed, POLICY_PRIORITIES, Wanted, plan};
use crate::error::{Error, Result};
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::sysctl;

/// Makes `wanted` true in `ns`.
pub(super) async fn settle(ns: &Netns, netlink: &Netlink, wanted: &Wanted) -> Result<()> {
    let observed = observe(ns, netlink, wanted).await?;
    let steps = plan(wanted, &observed);
    let (mut settings, mut rest) = (Vec::new(), Vec::new());
    for step in steps {
        if let Action::Sysctl { key, value } = step.action {
            settings.push((key, value));
        } else {
            rest.push(step);
        }
    }
    if !settings.is_empty() {
        ns.run(move || settings.iter().try_for_each(|(key, value)| sysctl::write(key, value).map(drop)))
            .await??;
    }
    let new: Vec<IpAddr> = rest
        .iter()
        .filter_map(|step| if let Action::AddAddress(net) = step.action { Some(net.addr()) } else { None })
        .filter(IpAddr::is_ipv6)
        .collect();
    for step in rest {
        let index = step.index;
        match &step.action {
            Action::Sysctl { .. } => {}
            Action::Absent => return Err(Error::Broken { what: step.to_string() }),
            Action::Mtu(mtu) => netlink.set_mtu(index, *mtu).await?,
            Action::Mac(mac) => netlink.set_mac(index, *mac).await?,
            Action::Alias(alias) => netlink.set_alias(index, alias).await?,
            Action::Multicast(on) => netlink.set_multicast(index, *on).await?,
            Action::AddAddress(net) => netlink.add_address(index, *net).await?,
            Action::Up => netlink.set_up(index).await?,
            Action::AddNeighbour(neighbour) => netlink.set_neighbour(*neighbour).await?,
            Action::AddRoute(route) => netlink.add_route(*route).await?,
            Action::DropRoute(route) => netlink.delete_route(*route).await?,
            Action::DropNeighbour(n) => netlink.delete_neighbour(n.link, n.address).await?,
            Action::DropAddress(net) => netlink.delete_address(index, *net).await?,
            Action::AddTableRoute(route) => netlink.add_table_route(*route).await?,
            Action::AddRule(rule) => netlink.add_policy_rule(*rule).await?,
            Action::DropRule(rule) => netlink.delete_policy_rule(*rule).await?,
            Action::DropTableRoute(route) => netlink.delete_table_route(*route).await?,
        }
    }
    if new.is_empty() { Ok(()) } else { netlink.wait_local(&new).await }
}

/// What `wanted` is compared with.
pub(super) async fn observe(ns: &Netns, netlink: &Netlink, wanted: &Wanted) -> Result<Observed> {
    let keys: Vec<String> = wanted.sysctls.iter().map(|(key, _)| key.clone()).collect();
    let sysctls = ns
        .run(move || {
            keys.into_iter()
                .filter_map(|key| sysctl::read(&key).map(|value| Some((key, value?))).transpose())
                .collect::<Result<_>>()
        })
        .await??;
    if wanted.devices.is_empty() && wanted.policy.is_none() {
        return Ok(Observed { sysctls, ..Observed::default() });
    }
    let (rules, table) = match &wanted.policy {
        Some(policy) => {
            let rules = netlink.policy_rules(policy.base..policy.base + POLICY_PRIORITIES).await?;
            (rules, netlink.table_routes(policy.base..policy.base + 1).await?)
        }
        None => (Vec::new(), Vec::new()),
    };
    Ok(Observed {
        rules,
        table,
        sysctls,
        links: netlink.links().await?,
        addresses: netlink.addresses().await?,
        routes: netlink.routes().await?,
        neighbours: netlink.neighbours().await?,
    })
}
