#!/bin/sh
# Puts the appup beside the application's file. rebar3, which calls this when it has compiled, knows of none; the file is in
# the directory of a dependency or a checkout, and in the build directory for the project itself.
set -eu
cd "$(dirname "$0")/.."
appup=erlang_src/macula_peer_connector.appup
for lib in . "${REBAR_BUILD_DIR:-.}"/lib/macula_peer_connector "${REBAR_BUILD_DIR:-.}"/checkouts/macula_peer_connector; do
  [ -f "$lib/ebin/macula_peer_connector.app" ] || continue
  # If it already exists, nothing has to be writable.
  cmp -s "$appup" "$lib/ebin/macula_peer_connector.appup" || cp "$appup" "$lib/ebin/"
done
