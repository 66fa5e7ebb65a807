mod confine;
mod dial;
mod fds;
mod http1;
mod log;
mod reason;
mod resolve;
mod rpc;
mod snapshot_file;
mod status;
mod tls;
fn main() {}
