//! The rules as the netmap carries them.

/// Who may reach what.
#[derive(Debug, Clone, Default)]
pub struct FilterRule {
    /// IP, CIDR, `first-last`, `*` or `cap:<name>`.
    pub src_ips: Vec<String>,
    /// Destinations.
    pub dst_ports: Vec<NetPortRange>,
    /// Protocol numbers; empty for TCP, UDP and ICMP.
    pub ip_proto: Vec<i64>,
}

/// Ports at a destination.
#[derive(Debug, Clone, Default)]
pub struct NetPortRange {
    /// IP, CIDR, `first-last` or `*`.
    pub ip: String,
    /// Inclusive.
    pub ports: PortRange,
}

/// An inclusive range of ports.
#[derive(Debug, Clone, Copy, Default)]
pub struct PortRange {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
}
