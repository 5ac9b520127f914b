#!/bin/sh
# Puts the documentation for `h(macula_peer_node)` in the shell beside ebin/, where the code server looks for it: doc/chunks, made
# by EDoc. rebar3 calls this when it has compiled. Nothing else needs the documentation, so no build fails without it.
set -eu
cd "$(dirname "$0")/.."

main() {
  # As for the appup: a dependency or a checkout, and the project itself.
  for lib in . "${REBAR_BUILD_DIR:-.}"/lib/macula_peer_connector "${REBAR_BUILD_DIR:-.}"/checkouts/macula_peer_connector; do
    [ -f "$lib/ebin/macula_peer_connector.app" ] || continue
    is_current "$lib" || make "$lib/doc" || echo "macula_peer_connector: no documentation for the shell" >&2
  done
}

is_current() {
  chunk="$1/doc/chunks/macula_peer_connector.chunk"
  [ -f "$chunk" ] && [ -z "$(find erlang_src -name '*.erl' -newer "$chunk")" ]
}

# Debian cuts OTP into packages, and a small image may be without EDoc.
make() {
  ERL_FLAGS='' ERL_AFLAGS='' ERL_ZFLAGS='' erl -noinput -boot start_clean -eval '
    case code:ensure_loaded(edoc) of
        {module, edoc} ->
            [Dir] = init:get_plain_arguments(),
            ok = edoc:files(filelib:wildcard("erlang_src/*.erl"),
                            [{dir, Dir}, {preprocess, true}, {doclet, edoc_doclet_chunks}, {layout, edoc_layout_chunks}]);
        {error, _} ->
            ok
    end,
    halt().' -extra "$1"
}

main
