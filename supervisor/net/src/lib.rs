//! The kernel objects of a pod's link: namespaces, veth pairs, TUN devices, sockets, routes.
