#!/bin/sh
# Puts the NIF into priv/: built by cargo, or taken precompiled from MACULA_PEER_NIF_DIR (docs/packaging.md). With the
# word `package` it makes such a precompiled file instead. rebar3 calls this before it compiles, in the directory where
# it keeps the application; plain sh, because small images have no more.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:${HOME:-}/.cargo/bin"
cargo="${CARGO:-cargo}"
installed=priv/macula_peer_nif.so
# cargo knows what has changed, but only in our own target directory: in a shared one it takes the library of another
# clone or version, which has the same name, for this one.
target_dir="${CARGO_TARGET_DIR:+$CARGO_TARGET_DIR/macula_peer_connector-$(pwd | cksum | cut -d ' ' -f 1)}"
target_dir="${target_dir:-target}"

main() {
  case "${1:-install}" in
    install)
      if [ -n "${MACULA_PEER_NIF_DIR:-}" ]; then
        take
      elif can_build; then
        build && put "$built"
      else
        is_current || fail "$(pwd)/$installed is missing or older than its sources, and $target_dir cannot be written"
      fi
      ;;
    package) build && package ;;
    *) fail "native/nif.sh takes no argument or the word 'package', not '$1'" ;;
  esac
}

take() {
  case "$MACULA_PEER_NIF_DIR" in
    # Relative to what? This runs in the directory of a dependency.
    [!/]*) fail "MACULA_PEER_NIF_DIR is '$MACULA_PEER_NIF_DIR': an absolute path is needed" ;;
  esac
  expected=$(printf %s "${MACULA_PEER_NIF_SHA256:-}" | tr A-F a-f)
  case "$expected" in
    '') fail "MACULA_PEER_NIF_DIR is set and MACULA_PEER_NIF_SHA256 is not: a precompiled NIF is only taken with its checksum" ;;
  esac
  target="${MACULA_PEER_NIF_TARGET:-$(target_of_erlang)}"
  [ -n "$target" ] ||
    fail "no Rust target is known for this Erlang ($(architecture)): name it in MACULA_PEER_NIF_TARGET"
  file="$MACULA_PEER_NIF_DIR/$(file_name "$target")"
  [ -f "$file" ] || fail "there is no $file (MACULA_PEER_NIF_DIR; MACULA_PEER_NIF_TARGET names another target than $target)"
  put "$file" "$expected"
}

can_build() {
  mkdir -p "$target_dir" 2>/dev/null && [ -w "$target_dir" ]
}

# In a read-only directory, as in an image, the earlier build is used.
is_current() {
  [ -f "$installed" ] && [ -z "$(find Cargo.toml Cargo.lock native/nif native/peer/Cargo.toml native/peer/src \
    native/core/Cargo.toml native/core/src native/wire/Cargo.toml native/wire/src -type f -newer "$installed")" ]
}

# Leaves the path of the library in $built.
build() {
  command -v "$cargo" >/dev/null ||
    fail "cargo is not in the PATH: install Rust $(rust_version) or newer to build the NIF, or take a precompiled one" \
      "(MACULA_PEER_NIF_DIR)"
  use_default_toolchain
  found=$("$cargo" --version 2>/dev/null | sed -n 's/^cargo \([0-9]*\.[0-9]*\).*/\1/p')
  [ -z "$found" ] || is_at_least "$found" "$(rust_version)" ||
    fail "the NIF needs Rust $(rust_version) or newer, and this is $("$cargo" --version). \`rustup update\` gets a newer one;" \
      "RUSTUP_TOOLCHAIN names another that is installed"
  link_dynamically
  # A panic must unwind, even if a configuration file sets another profile: rustler refuses to be compiled otherwise.
  artifacts=$("$cargo" build --release --locked -p macula-peer-nif --message-format json-render-diagnostics \
    --target-dir "$target_dir" --config 'profile.release.panic="unwind"' \
    --config "target.'cfg(target_env=\"musl\")'.rustflags=['-Ctarget-feature=-crt-static']") ||
    fail "cargo could not build the NIF, for the reason that it gives above. It needs Rust $(rust_version) or newer" \
      "($("$cargo" --version) is in use) and a C compiler.$(also_decides)"
  built=$(printf '%s\n' "$artifacts" | sed -n 's/.*"filenames":\["\([^"]*macula_peer_nif\.[a-z]*\)".*/\1/p')
  [ -n "$built" ] || fail "cargo made no shared library for this target.$(also_decides)"
}

# rustup obeys a rust-toolchain.toml in any directory above, and a dependency lies in the project that uses it. That
# file is meant for the project's own Rust.
use_default_toolchain() {
  [ -z "${RUSTUP_TOOLCHAIN:-}" ] && command -v rustup >/dev/null || return 0
  # Without a default toolchain, the one in the file is used.
  default=$(cd / && rustup show active-toolchain 2>/dev/null) || return 0
  export RUSTUP_TOOLCHAIN="${default%% *}"
}

# musl's Rust links statically unless it is told not to, and makes no shared library then. Flags in these variables,
# empty ones too, are used instead of those of the command line. With both flags rustc links statically.
link_dynamically() {
  if [ -n "${CARGO_ENCODED_RUSTFLAGS+set}" ]; then
    CARGO_ENCODED_RUSTFLAGS="$(printf %s "$CARGO_ENCODED_RUSTFLAGS" | sed 's/+crt-static/-crt-static/g')"
    CARGO_ENCODED_RUSTFLAGS="${CARGO_ENCODED_RUSTFLAGS:+$CARGO_ENCODED_RUSTFLAGS$(printf '\037')}-Ctarget-feature=-crt-static"
  elif [ -n "${RUSTFLAGS+set}" ]; then
    RUSTFLAGS="$(printf %s "$RUSTFLAGS" | sed 's/+crt-static/-crt-static/g') -Ctarget-feature=-crt-static"
  fi
}

# Names what else affects a build: cargo reads the configuration of every directory above.
also_decides() {
  others=''
  dir=$(pwd)
  while :; do
    for file in "${dir%/}/.cargo/config.toml" "${dir%/}/.cargo/config"; do
      [ ! -f "$file" ] || others="$others $file"
    done
    [ "$dir" != / ] || break
    dir=$(dirname "$dir")
  done
  for file in "${CARGO_HOME:-${HOME:-}/.cargo}/config.toml" "${CARGO_HOME:-${HOME:-}/.cargo}/config"; do
    case "$others " in
      *" $file "*) ;;
      *) [ ! -f "$file" ] || others="$others $file" ;;
    esac
  done
  for name in CARGO_ENCODED_RUSTFLAGS RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_BUILD_TARGET RUSTC RUSTC_WRAPPER \
    RUSTC_WORKSPACE_WRAPPER CC CFLAGS; do
    eval "value=\${$name:-}"
    [ -z "$value" ] || others="$others $name"
  done
  [ -z "$others" ] || echo " These have a say in it too:$others."
}

is_at_least() {
  [ "$(printf '%s\n%s\n' "$1" "$2" | sort -t . -k 1,1n -k 2,2n | head -n 1)" = "$2" ]
}

# A running node has the old file mapped, so it is replaced by name and only when there is something new; the check is of
# the very bytes that are installed.
put() {
  if [ -f "$installed" ]; then
    if [ $# -gt 1 ]; then
      [ "$(sha256 "$installed")" != "$2" ] || return 0
    elif cmp -s "$1" "$installed"; then
      # Also newer than the sources, unless this directory is read-only.
      touch "$installed" 2>/dev/null || true
      return 0
    fi
  fi
  mkdir -p priv || fail "priv/ cannot be written in $(pwd)"
  new="priv/.macula_peer_nif.$$"
  trap 'rm -f "$new"' EXIT
  cp "$1" "$new" && chmod 644 "$new" || fail "priv/ cannot be written in $(pwd)"
  if [ $# -gt 1 ]; then
    actual=$(sha256 "$new")
    [ "$actual" = "$2" ] || fail "$1 has the SHA-256 $actual, and MACULA_PEER_NIF_SHA256 is $2: it is not installed"
  fi
  mv "$new" "$installed"
}

package() {
  dir="$(pwd)/target/package"
  host=$(rustc -vV | sed -n 's/^host: //p')
  file=$(file_name "${CARGO_BUILD_TARGET:-$host}")
  mkdir -p "$dir"
  cp "$built" "$dir/$file.$$"
  chmod 644 "$dir/$file.$$"
  mv "$dir/$file.$$" "$dir/$file"
  echo "$dir/$file"
  echo "MACULA_PEER_NIF_DIR=$dir"
  echo "MACULA_PEER_NIF_SHA256=$(sha256 "$dir/$file")"
}

file_name() {
  echo "macula_peer_nif-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)-$1.so"
}

rust_version() {
  sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml
}

# The NIF is for the BEAM that loads it, which need not be of the kernel's architecture, and no compiler need be there.
target_of_erlang() {
  architecture=$(architecture)
  case "$architecture" in
    x86_64-* | amd64-*) cpu=x86_64 ;;
    aarch64-* | arm64-*) cpu=aarch64 ;;
    riscv64-*) cpu=riscv64gc ;;
    *) return ;;
  esac
  case "$architecture" in
    *-linux-musl*) echo "$cpu-unknown-linux-musl" ;;
    *-linux | *-linux-gnu) echo "$cpu-unknown-linux-gnu" ;;
    *-apple-darwin*) echo "$cpu-apple-darwin" ;;
    *-freebsd*) echo "$cpu-unknown-freebsd" ;;
  esac
}

# Flags that are meant for the node that is built would give this one a name that is taken, for example.
architecture() {
  ERL_FLAGS='' ERL_AFLAGS='' ERL_ZFLAGS='' erl -noinput -boot start_clean \
    -eval 'io:put_chars(erlang:system_info(system_architecture)), halt().'
}

sha256() {
  { if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi; } | cut -d ' ' -f 1
}

fail() {
  echo "macula_peer_connector: $*" >&2
  exit 1
}

main "$@"
