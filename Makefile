.PHONY: build release image chart test demo chaos bench lint fuzz
build: ; cargo build --workspace --bins
# Static programs for any C library. --target keeps the flags from build scripts and proc macros, which cannot be
# static. getrandom would look its system call up by the dynamic loader, and then read a file that a sandbox has not.
# Each is run where there is nothing else; tests/names.rs with PODTETHER_TEST_SUPERVISOR looks up names with one.
TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
STATIC = -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs -C link-arg=-Wl,--icf=all --cfg getrandom_backend="linux_getrandom"
PROGRAMS = $(foreach p,podtether podtether-supervisor podtether-engine podtether-cni podtether-devnet,target/$(TARGET)/release/$(p))
release:
	RUSTFLAGS='$(STATIC)' cargo build --release --workspace --bins --target $(TARGET)
	! readelf -lW $(PROGRAMS) | grep INTERP
	for p in $(PROGRAMS); do d=$$(mktemp -d) && cp $$p $$d/p && unshare -r chroot $$d /p --version && rm -r $$d || exit 1; done
	test $$(stat -c %s $(filter %engine,$(PROGRAMS))) -le 6000000
# target/podtether-image.tar, the same bytes whenever it is made of the same programs, and what they are made of beside it.
IMAGE ?= podtether:$(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
image: release
	target/$(TARGET)/release/podtether-image --programs target/$(TARGET)/release --target $(TARGET) --name $(IMAGE) \
	  --output target/podtether-image.tar
# After a change of the chart; needs helm. tests/manifests.rs says when.
chart: ; PODTETHER_RENDER=1 cargo test -p podtether-supervisor --test manifests the_chart_is_what
# All that `cargo test --workspace` runs, several programs at a time (LANES=1: one after another).
test: build ; .ci/tests
demo: build ; target/debug/podtether-devnet demo $(if $(KEEP),--keep)
# SEED replays a schedule. Any count makes the run end when all is done; MINUTES ends it in any case.
CHAOS = $(foreach o,seed minutes pods kills stops bombs handovers supervisor-kills everything outages,$(call given,$(o)))
given = $(if $($(call upper,$(1))),--$(1)=$($(call upper,$(1))))
upper = $(shell echo $(1) | tr a-z- A-Z_)
chaos: ; cargo build --release --workspace --bins && target/release/podtether-devnet chaos $(CHAOS)
# CHECK=1 fails when a bar is missed; ONLY="tcp1 ping" measures what has such names; PODS="10 50" are the joins at once.
BENCH = $(foreach o,rounds seconds kills idle-seconds congestion json,$(call given,$(o))) $(ONLY:%=--only=%) $(PODS:%=--pods=%)
CORE = $(if $(ONLY),,cargo bench -p podtether-core)
bench: ; cargo build --release --workspace --bins && target/release/podtether-devnet bench $(BENCH) $(if $(CHECK),--check)
	$(CORE)
lint: ; cargo fmt --all --check && cargo clippy --workspace --all-targets -- -D warnings
fuzz: ; PROPTEST_CASES=$(or $(CASES),20000) cargo test -p podtether-core -p podtether-devnet -- fuzz_ && fuzz/run $(or $(SECONDS_EACH),30)
