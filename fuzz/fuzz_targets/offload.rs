#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| podtether_fuzz_bodies::offload(data));
