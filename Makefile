.PHONY: build test demo bench lint fuzz
build: ; cargo build --workspace --bins
test: build ; cargo test --workspace
demo: build ; target/debug/podtether-devnet demo $(if $(KEEP),--keep)
bench: ; cargo bench -p podtether-core
lint: ; cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings
fuzz: ; PROPTEST_CASES=$(or $(CASES),20000) cargo test -p podtether-core -p podtether-devnet -- fuzz_ && fuzz/run $(or $(SECONDS_EACH),30)
