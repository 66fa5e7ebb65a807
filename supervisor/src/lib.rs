//! The node's supervisor: pods' links, records and engines.
