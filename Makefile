# The two targets of a newcomer are `demo` and `test`; both install what is missing where they may.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
REBAR ?= rebar3
CARGO ?= cargo
export PATH := $(PATH):$(HOME)/.cargo/bin

EBIN := _build/default/lib/macula_peer_connector/ebin

# Seconds per fuzz target, and messages per row of the benchmark.
FUZZ_SECONDS ?= 5
FUZZ_TARGETS ?= decode reassembly session control circuit signal certificate endpoint probe
BENCH_MESSAGES ?= 200000
BENCH_ROUNDS ?= 5

# Of the laboratory of NATs: meetings of each pair, kinds of sites (all), and for each cable the milliseconds that a packet
# takes and how many of a thousand are lost.
NATLAB_RUNS ?= 1
NATLAB_KINDS ?=
NATLAB_DELAY ?= 0
NATLAB_LOSS ?= 0

# Runs of the simulation of whole nodes, and how many seconds each of them is long.
SIMULATE_RUNS ?= 100000
SIMULATE_SECONDS ?= 120

# Seconds under load.
SOAK_SECONDS ?= 600

.PHONY: test demo bench soak natlab simulate check setup nif nif-package compile testkit test-rust test-erlang test-original test-otp27 fuzz clean

test: check test-rust test-erlang fuzz

demo: compile
	@mkdir -p _build/demo
	@erlc -o _build/demo demo/macula_peer_demo.erl test/support/*.erl
	@erl -noshell -pa $(EBIN) _build/demo -s macula_peer_demo main

bench: compile testkit
	@mkdir -p _build/bench
	@erlc -o _build/bench bench/*.erl
	@erl -noshell -pa $(EBIN) _build/bench -s macula_peer_bench main $(BENCH_MESSAGES) $(BENCH_ROUNDS)

soak: compile testkit
	@mkdir -p _build/soak
	@erlc -o _build/soak soak/*.erl test/support/*.erl
	@erl -noshell -pa $(EBIN) _build/soak -s macula_peer_soak main $(SOAK_SECONDS)

# Whole nodes in virtual time, longer than in the tests: SIMULATE_RUNS runs of SIMULATE_SECONDS each. SEED=n plays one, with
# a trace.
simulate:
	RUNS=$(SIMULATE_RUNS) SECONDS=$(SIMULATE_SECONDS) $(CARGO) test -p macula-peer-core --lib \
	  nodes_keep_their_promises -- --nocapture

# Linux, as root.
natlab: compile
	@mkdir -p _build/natlab
	@erlc -o _build/natlab test/support/*.erl
	@erl -noshell -pa $(EBIN) _build/natlab -s macula_peer_natlab_matrix main $(NATLAB_RUNS) $(NATLAB_DELAY) \
	  $(NATLAB_LOSS) $(NATLAB_KINDS)

check: setup nif
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --document-private-items
	@.ci/rust-version
	@.ci/versions
	@.ci/dependencies
	@.ci/structure
	$(REBAR) as strict compile
	$(REBAR) xref
	$(REBAR) dialyzer
	$(REBAR) edoc

test-rust: setup
	$(CARGO) test --workspace --exclude macula-peer-nif --locked

test-erlang: setup testkit
	$(REBAR) eunit
	@.ci/leaves-nothing $(REBAR) ct

# On the OTP of a newer Debian, in a folder: 27. Linux, as root; says when it was left out.
test-otp27:
	@.ci/otp trixie

# macula's own tests of the module, from a checkout of it.
test-original: compile
	@test -n "$(MACULA)" || { echo "say where macula is: make test-original MACULA=dir" >&2; exit 1; }
	@tests=$$(find $(MACULA)/test -name macula_peer_connector_tests.erl); \
	  test -n "$$tests" || { echo "no macula_peer_connector_tests.erl in $(MACULA)/test" >&2; exit 1; }; \
	  mkdir -p _build/original; \
	  erlc -o _build/original $$tests; \
	  erl -noshell -pa $(EBIN) _build/original \
	    -eval 'halt(case eunit:test(macula_peer_connector_tests, [verbose]) of ok -> 0; error -> 1 end)'

# libFuzzer by rustc's own coverage instrumentation, on the stable toolchain. A new finding is left in
# native/fuzz/artifacts.
fuzz: setup
	@cd native/fuzz; for target in $(FUZZ_TARGETS); do \
	  mkdir -p corpus/$$target artifacts; \
	  RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	    -Cllvm-args=-sanitizer-coverage-trace-compares" \
	  $(CARGO) run --release --locked --target $$(rustc --print host-tuple) --bin $$target -- corpus/$$target seeds/$$target \
	    -artifact_prefix=artifacts/ -max_len=4096 -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 2>&1 | tail -n 8; \
	done

compile: setup
	$(REBAR) compile

# What rebar3 calls itself, without make.
nif:
	@sh native/nif.sh

# A precompiled NIF for this machine (or CARGO_BUILD_TARGET), and its checksum: docs/packaging.md.
nif-package:
	@sh native/nif.sh package

testkit: setup
	$(CARGO) build --release --locked -p macula-peer-testkit

setup:
	@.ci/setup

clean:
	rm -rf _build doc priv target native/fuzz/target
