SHELL := /bin/bash
REBAR ?= rebar3
CARGO ?= cargo
UNAME := $(shell uname -s)
LIBRARY := $(if $(filter Darwin,$(UNAME)),libmacula_peer_nif.dylib,libmacula_peer_nif.so)

.PHONY: nif
nif:
	@command -v $(CARGO) >/dev/null || { echo "cargo is not in the PATH: install Rust to build the NIF" >&2; exit 1; }
	$(CARGO) build --release --locked -p macula-peer-nif
	@mkdir -p priv
	@cmp -s target/release/$(LIBRARY) priv/macula_peer_nif.so || \
	  install -m 644 target/release/$(LIBRARY) priv/macula_peer_nif.so
