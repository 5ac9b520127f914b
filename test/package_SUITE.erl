%% How the library gets into other people's projects: the precompiled NIF, the package for Hex, a git dependency, a
%% checkout. What is committed is tested, not what lies about.
-module(package_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [root/0]).

-define(APP, macula_peer_connector).
-define(NIF, "priv/macula_peer_nif.so").

%% The Rust of the package is compiled, if not its dependencies.
suite() -> [{timetrap, {minutes, 15}}].

all() ->
    [{group, precompiled}].

groups() ->
    [{precompiled, [a_precompiled_nif_is_taken_without_rust, a_precompiled_nif_needs_its_checksum,
                    a_precompiled_nif_with_another_checksum_is_refused, what_is_not_there_is_named,
                    the_file_is_that_of_the_target, without_cargo_the_build_says_what_to_do]}].

init_per_suite(Config) ->
    {0, Said} = run(root(), [], "make --no-print-directory nif-package"),
    {match, [Dir]} = re:run(Said, "^MACULA_PEER_NIF_DIR=(.*)$", [multiline, {capture, [1], list}]),
    {match, [Sum]} = re:run(Said, "^MACULA_PEER_NIF_SHA256=(.*)$", [multiline, {capture, [1], list}]),
    Precompiled = [{"MACULA_PEER_NIF_DIR", Dir}, {"MACULA_PEER_NIF_SHA256", Sum}],
    [{precompiled, Precompiled}, {nif_dir, Dir}, {nif_sum, Sum} | Config].

end_per_suite(_Config) ->
    ok.

%% ---- the precompiled NIF ----

a_precompiled_nif_is_taken_without_rust(Config) ->
    Project = clone(Config),
    Env = without_rust(Config, ?config(precompiled, Config)),
    ?assertMatch({0, _}, run(Project, Env, "make --no-print-directory nif")),
    ?assertEqual(?config(nif_sum, Config), sha256(filename:join(Project, ?NIF))),
    %% The same through rebar3, whatever way the digits are written.
    ok = file:del_dir_r(filename:join(Project, "priv")),
    Upper = lists:keyreplace("MACULA_PEER_NIF_SHA256", 1, Env,
                             {"MACULA_PEER_NIF_SHA256", string:uppercase(?config(nif_sum, Config))}),
    ?assertMatch({0, _}, run(Project, Upper, "rebar3 compile")),
    ?assertEqual(?config(nif_sum, Config), sha256(filename:join(Project, ?NIF))),
    ?assertNot(rust_was_called(Config)),
    works([filename:join(Project, "_build/default/lib/macula_peer_connector/ebin")]).

a_precompiled_nif_needs_its_checksum(Config) ->
    refused(Config, [{"MACULA_PEER_NIF_DIR", ?config(nif_dir, Config)}], ["MACULA_PEER_NIF_SHA256"]).

a_precompiled_nif_with_another_checksum_is_refused(Config) ->
    Other = lists:duplicate(64, $0),
    refused(Config, [{"MACULA_PEER_NIF_DIR", ?config(nif_dir, Config)}, {"MACULA_PEER_NIF_SHA256", Other}],
            [Other, ?config(nif_sum, Config), "not installed"]).

what_is_not_there_is_named(Config) ->
    Sum = ?config(nif_sum, Config),
    Nowhere = filename:join([?config(priv_dir, Config)]),
    refused(Config, [{"MACULA_PEER_NIF_DIR", Nowhere}, {"MACULA_PEER_NIF_SHA256", Sum}],
            [filename:join(Nowhere, file_name(Config))]),
    refused(Config, [{"MACULA_PEER_NIF_DIR", "relative"}, {"MACULA_PEER_NIF_SHA256", Sum}], ["absolute"]).

%% What Erlang calls the machine it was built for, and what Rust calls it.
the_file_is_that_of_the_target(Config) ->
    Targets = [{"x86_64-pc-linux-gnu", "x86_64-unknown-linux-gnu"},
               {"x86_64-redhat-linux-gnu", "x86_64-unknown-linux-gnu"},
               {"aarch64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"},
               {"x86_64-pc-linux-musl", "x86_64-unknown-linux-musl"},
               {"x86_64-alpine-linux-musl", "x86_64-unknown-linux-musl"},
               {"aarch64-linux-musl", "aarch64-unknown-linux-musl"},
               {"x86_64-apple-darwin22.6.0", "x86_64-apple-darwin"},
               {"aarch64-apple-darwin23.1.0", "aarch64-apple-darwin"},
               {"x86_64-portbld-freebsd14.1", "x86_64-unknown-freebsd"},
               {"aarch64-unknown-linux-gnu_ilp32", none},
               {"sparc64-unknown-linux-gnu", none},
               {"win32", none}],
    Project = clone(Config),
    Bin = filename:join(?config(priv_dir, Config), "other_machine"),
    [begin
         program(Bin, "erl", ["printf '%s' '", Architecture, "'"]),
         Env = [path(Bin), {"MACULA_PEER_NIF_DIR", Bin}, {"MACULA_PEER_NIF_SHA256", ?config(nif_sum, Config)}],
         {Status, Said} = run(Project, Env, "sh native/nif.sh"),
         Wanted = case Target of
             none -> "MACULA_PEER_NIF_TARGET";
             _ -> "macula_peer_nif-" ++ version() ++ "-" ++ Target ++ ".so "
         end,
         ?assertMatch({1, [_ | _], _}, {Status, string:find(Said, Wanted), {Architecture, Wanted, Said}}),
         {1, Named} = run(Project, [{"MACULA_PEER_NIF_TARGET", "of-my-own"} | Env], "sh native/nif.sh"),
         ?assertMatch([_ | _], string:find(Named, "-of-my-own.so "))
     end || {Architecture, Target} <- Targets].

without_cargo_the_build_says_what_to_do(Config) ->
    refused(Config, [{"CARGO", "there-is-no-such-cargo"}], ["cargo", "install Rust", "MACULA_PEER_NIF_DIR"]).

%% The build fails, says this, and leaves nothing behind.
refused(Config, Env, Words) ->
    Project = clone(Config),
    [begin
         {Status, Said} = run(Project, without_rust(Config, Env), Command),
         ?assertNotEqual({0, Command}, {Status, Command}),
         [?assertMatch({_, [_ | _]}, {Said, string:find(Said, Word)}) || Word <- ["macula_peer_connector: " | Words]]
     end || Command <- ["make --no-print-directory nif", "rebar3 compile"]],
    ?assertEqual([], filelib:wildcard("priv/{*,.m*}", Project)),
    ?assertEqual([], filelib:wildcard("_build/**/*.beam", Project)),
    ?assertNot(rust_was_called(Config)).

file_name(Config) ->
    [File] = [File || File <- filelib:wildcard("macula_peer_nif-*.so", ?config(nif_dir, Config)),
                      sha256(filename:join(?config(nif_dir, Config), File)) =:= ?config(nif_sum, Config)],
    File.

version() ->
    _ = application:load(?APP),
    {ok, Version} = application:get_key(?APP, vsn),
    Version.

%% The first in the path are a cargo and a rustc that fail, and tell.
without_rust(Config, Env) ->
    Bin = filename:join(?config(priv_dir, Config), "no_rust"),
    [program(Bin, Name, ["touch ", called(Config), "; exit 1"]) || Name <- ["cargo", "rustc"]],
    [path(Bin) | Env].

rust_was_called(Config) ->
    filelib:is_file(called(Config)).

called(Config) ->
    filename:join(?config(priv_dir, Config), "rust_was_called").

program(Dir, Name, Script) ->
    File = filename:join(Dir, Name),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, ["#!/bin/sh\n", Script, "\n"]),
    ok = file:change_mode(File, 8#755).

path(Dir) ->
    {"PATH", Dir ++ ":" ++ os:getenv("PATH")}.

%% ---- projects ----

%% What is committed, in a directory of its own.
clone(Config) ->
    Dir = filename:join(?config(priv_dir, Config), "clone" ++ integer_to_list(erlang:unique_integer([positive]))),
    {0, _} = run(root(), [], ["git clone --quiet . ", Dir]),
    Dir.

%% A node of its own encodes with the library that was installed, and sends with it.
works(Paths) ->
    Node = macula_peer_test:start_node(Paths),
    {ok, Frame} = macula_peer_test:call(Node, macula_peer_wire, encode, [ping, #{timestamp => 1}]),
    ?assertMatch({ok, {ping, #{<<"timestamp">> := 1}}}, macula_peer_test:call(Node, macula_peer_wire, decode, [Frame])),
    Closed = macula_peer_test:endpoint(macula_peer_test:closed_port()),
    ?assertEqual({error, {connect_failed, transport_down}},
                 macula_peer_test:call(Node, ?APP, send_message, [Closed, store, #{}])),
    macula_peer_test:stop_node(Node).

sha256(File) ->
    {ok, Content} = file:read_file(File),
    string:lowercase(binary_to_list(binary:encode_hex(crypto:hash(sha256, Content)))).

%% Runs a command, and returns its status and what it said.
run(Dir, Env, Command) ->
    Port = open_port({spawn_executable, "/bin/sh"},
                     [{args, ["-c", lists:flatten(Command)]}, {cd, Dir}, {env, clean(Env)}, exit_status, stderr_to_stdout,
                      hide, binary]),
    {Status, Said} = output(Port, []),
    ct:log("~ts$ ~ts ~p~n~ts~n=> ~p", [Dir, Command, Env, Said, Status]),
    {Status, Said}.

%% What this run of rebar3 and its caller have set is not for another one.
clean(Env) ->
    Set = [{Name, false} || Name <- ["REBAR_PROFILE", "ERL_LIBS", "ERL_FLAGS", "MACULA_PEER_NIF_DIR", "MACULA_PEER_NIF_SHA256",
                                     "MACULA_PEER_NIF_TARGET", "CARGO_BUILD_TARGET", "MAKEFLAGS", "MAKELEVEL"]],
    lists:ukeymerge(1, lists:ukeysort(1, Env), lists:ukeysort(1, Set)).

output(Port, Said) ->
    receive
        {Port, {data, Data}} -> output(Port, [Said | Data]);
        {Port, {exit_status, Status}} -> {Status, unicode:characters_to_list(iolist_to_binary(Said))}
    end.
