//! A whole tailnet on one machine: control server, DERP, STUN, admin API and a network lab.
