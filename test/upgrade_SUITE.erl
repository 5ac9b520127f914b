%% Code is loaded again, the application restarted, another version installed, all under callers. The nodes in which that
%% happens are operating system processes of their own, so a crash of the BEAM is a failed case.
-module(upgrade_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, endpoint/1, root/0, start_node/0, stop_node/1, until/1, until/2]).

-define(APP, macula_peer_connector).
-define(CALLERS, 8).

%% The NIF of another version is compiled, if not its dependencies.
suite() -> [{timetrap, {minutes, 15}}].

all() ->
    [every_module_is_loaded_again_under_its_callers, the_library_is_loaded_again_under_its_callers,
     the_library_is_deleted_and_loaded, another_library_at_the_path_of_the_loaded_one, the_application_is_unloaded_and_loaded,
     a_retired_library_starts_no_engine, the_appup_is_beside_the_application, a_release_is_upgraded_and_downgraded].

init_per_testcase(_Case, Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{listener, Node}, {endpoint, endpoint(Port)} | Config].

end_per_testcase(_Case, Config) ->
    stop_node(?config(listener, Config)).

%% ---- the Erlang modules ----

%% Twice, so that the old code is purged: at both ends, unnoticed by callers.
every_module_is_loaded_again_under_its_callers(Config) ->
    Receiver = start_node(),
    Node = start_node(),
    [{ok, _} = call(Each, application, ensure_all_started, [?APP]) || Each <- [Receiver, Node]],
    {Port, Handler} = call(Receiver, ?MODULE, listen_with_function, []),
    ok = call(Node, ?MODULE, start_callers, [endpoint(Port)]),
    Modules = erlang_modules(),
    ?assert(lists:member(macula_peer_call, Modules)),
    [begin
         ?assertEqual([], call(Each, ?MODULE, load_again, [Module])),
         ok = call(Node, ?MODULE, progress, [])
     end || _ <- [1, 2, 3], Module <- Modules, Each <- [Receiver, Node]],
    {Results, Sent} = call(Node, ?MODULE, stop_callers, []),
    ?assertEqual([ok], Results),
    until(fun() -> call(Receiver, ?MODULE, handled, []) =:= Sent end, 60000),
    ?assertEqual([Handler], call(Receiver, macula_peer_test, handlers, [])),
    ?assertEqual([], [Each || Each <- [Receiver, Node], not running(Each)]),
    [stop_node(Each) || Each <- [Receiver, Node]],
    ?assertEqual(0, macula_peer_test:count(?config(listener, Config))).

erlang_modules() ->
    _ = application:load(?APP),
    {ok, Modules} = application:get_key(?APP, modules),
    Modules -- [macula_peer_nif].

%% As the shell's l/1 does it. No process waits inside these modules, so none is killed.
load_again(Module) ->
    Killed = code:purge(Module),
    {module, Module} = code:load_file(Module),
    [Module || Killed].

running(Node) ->
    lists:keymember(?APP, 1, call(Node, application, which_applications, []))
        andalso is_pid(call(Node, erlang, whereis, [macula_peer_engine])).

%% ---- the library ----

%% It cannot take the place of itself while it runs, and says so; its callers do not notice.
the_library_is_loaded_again_under_its_callers(Config) ->
    Node = start_node(),
    ok = call(Node, ?MODULE, start_callers, [?config(endpoint, Config)]),
    [begin
         ok = call(Node, ?MODULE, progress, []),
         ?assertEqual({error, on_load_failure}, call(Node, ?MODULE, reload, [macula_peer_nif]))
     end || _ <- lists:seq(1, 20)],
    {Results, Sent} = call(Node, ?MODULE, stop_callers, []),
    ?assertEqual([ok], Results),
    until(fun() -> macula_peer_test:count(?config(listener, Config)) =:= Sent end, 60000),
    stop_node(Node).

%% Deleted, purged and loaded, it finds its engine as it was: what waits goes on waiting, and what arrives is handled.
the_library_is_deleted_and_loaded(Config) ->
    Node = start_node(),
    ok = call(Node, ?MODULE, keep_a_token, []),
    ok = call(Node, macula_peer_node, close, []),
    {Port, _} = call(Node, ?MODULE, listen_with_function, []),
    {Silent, SilentPort} = macula_peer_test:silent_port(),
    Waiting = call(Node, ?MODULE, start_waiting, [endpoint(SilentPort)]),
    Sender = ?config(listener, Config),
    ok = call(Sender, ?MODULE, start_callers, [endpoint(Port)]),
    [begin
         ok = call(Sender, ?MODULE, progress, []),
         ok = call(Node, ?MODULE, delete_and_load, [])
     end || _ <- lists:seq(1, 20)],
    {Results, Sent} = call(Sender, ?MODULE, stop_callers, []),
    ?assertEqual([ok], Results),
    until(fun() -> call(Node, ?MODULE, handled, []) =:= Sent end, 60000),
    ?assertMatch({ok, {_, Port}}, call(Node, macula_peer_node, local_address, [])),
    ?assertEqual({error, invalid_token}, call(Node, ?MODULE, use_the_token, [])),
    ok = call(Node, macula_peer_node, stop, []),
    ?assertMatch({error, _}, call(Node, ?MODULE, waited, [Waiting])),
    gen_udp:close(Silent),
    stop_node(Node).

%% There must be no calls meanwhile: in OTP 25 a call that loads a module with an on_load function again, while that is
%% purged, leaves the code server waiting for ever.
delete_and_load() ->
    true = code:delete(macula_peer_nif),
    _ = code:purge(macula_peer_nif),
    {module, macula_peer_nif} = code:load_file(macula_peer_nif),
    ok.

reload(Module) ->
    _ = code:purge(Module),
    code:load_file(Module).

%% What `make nif' does under a running node. The library in memory is used until the node is restarted.
another_library_at_the_path_of_the_loaded_one(Config) ->
    Dir = installed(?config(priv_dir, Config), version(), filename:join(code:lib_dir(?APP), "priv/macula_peer_nif.so")),
    Ebin = filename:join(Dir, "ebin"),
    Node = macula_peer_test:start_node([Ebin, test_dir()]),
    Send = fun() -> call(Node, ?APP, send_message, [?config(endpoint, Config), store, #{}]) end,
    ?assertEqual(ok, Send()),
    New = filename:join(Dir, "new"),
    ok = file:write_file(New, "no library"),
    ok = file:rename(New, filename:join(Dir, "priv/macula_peer_nif.so")),
    ?assertEqual({error, on_load_failure}, call(Node, code, load_file, [macula_peer_nif])),
    ?assertEqual(ok, Send()),
    ok = call(Node, ?MODULE, delete_and_load, []),
    ?assert(lists:member(Send(), [ok, refused(Node)])),
    stop_node(Node),
    Next = macula_peer_test:start_node([Ebin, test_dir()]),
    ?assertMatch({error, {nif_not_loaded, _}}, refused(Next)),
    stop_node(Next).

refused(Node) ->
    call(Node, macula_peer_node, local_address, []).

the_application_is_unloaded_and_loaded(Config) ->
    Node = start_node(),
    Send = fun() -> call(Node, ?APP, send_message, [?config(endpoint, Config), store, #{}]) end,
    [begin
         {ok, _} = call(Node, application, ensure_all_started, [?APP]),
         ?assertEqual(ok, Send()),
         ok = call(Node, application, stop, [?APP]),
         ok = call(Node, application, unload, [?APP]),
         ?assertEqual(ok, Send()),
         ok = call(Node, ?MODULE, delete_and_load, []),
         ?assertEqual(ok, Send()),
         ok = call(Node, macula_peer_node, stop, [])
     end || _ <- [1, 2, 3]],
    stop_node(Node).

a_retired_library_starts_no_engine(Config) ->
    Node = start_node(),
    Endpoint = ?config(endpoint, Config),
    Send = fun() -> call(Node, ?APP, send_message, [Endpoint, store, #{}]) end,
    ok = call(Node, ?MODULE, start_callers, [Endpoint]),
    ok = call(Node, ?MODULE, progress, []),
    ok = call(Node, macula_peer_engine, retire, []),
    Refused = {error, {start_failed, upgrading}},
    ?assertEqual(Refused, Send()),
    ?assertEqual(Refused, call(Node, ?APP, send_message_and_wait, [Endpoint, ping, #{timestamp => 1}, 1000])),
    ?assertEqual(Refused, call(Node, macula_peer_node, start, [])),
    ?assertEqual(Refused, call(Node, macula_peer_node, listen, [#{}])),
    ok = call(Node, ?MODULE, progress, []),
    {Results, _} = call(Node, ?MODULE, stop_callers, []),
    ok = call(Node, ?MODULE, delete_and_load, []),
    ?assertEqual(ok, Send()),
    ?assertEqual([], Results -- [ok, Refused, {error, {send_failed, connection_shutdown}},
                                 {error, {send_failed, connection_closed}}]),
    stop_node(Node).

%% ---- releases ----

the_appup_is_beside_the_application(_Config) ->
    {ok, [{Version, [_ | _], [_ | _]}]} = file:consult(filename:join(code:lib_dir(?APP), "ebin/macula_peer_connector.appup")),
    ?assertEqual(version(), Version).

%% By the release handler, with the appup that ships and a library that was compiled as another version, up and down and up.
a_release_is_upgraded_and_downgraded(Config) ->
    case os:find_executable("cargo", os:getenv("PATH") ++ ":" ++ os:getenv("HOME") ++ "/.cargo/bin") of
        false -> {skip, "the library of another version is compiled, and there is no cargo"};
        _ -> upgraded_and_downgraded(Config)
    end.

upgraded_and_downgraded(Config) ->
    Dir = ?config(priv_dir, Config),
    {Old, New} = {version(), next_version()},
    Lib = filename:join(Dir, "lib"),
    _ = installed(Lib, Old, filename:join(code:lib_dir(?APP), "priv/macula_peer_nif.so")),
    _ = installed(Lib, New, build(New)),
    Port = macula_peer_test:closed_port(),
    [release(Dir, Version, Port) || Version <- [Old, New]],
    [relup(Dir, From, To) || {From, To} <- [{Old, New}]],
    Node = start_release(Dir, Old),
    in_force(Node, Lib, Old),
    Endpoint = ?config(endpoint, Config),
    {Silent, SilentPort} = macula_peer_test:silent_port(),
    ok = call(Node, ?MODULE, keep_a_token, []),
    {ok, _} = call(Node, release_handler, set_unpacked, [release_file(Dir, New) ++ ".rel", [{?APP, New, Lib}]]),
    [begin
         Waiting = call(Node, ?MODULE, start_waiting, [endpoint(SilentPort)]),
         ok = call(Node, ?MODULE, start_callers, [Endpoint]),
         ok = call(Node, ?MODULE, progress, []),
         ?assertMatch({ok, _, _}, call(Node, release_handler, install_release, [Version])),
         in_force(Node, Lib, Version),
         ok = call(Node, ?MODULE, progress, []),
         {Results, Sent} = call(Node, ?MODULE, stop_callers, []),
         ct:log("to ~s: ~p", [Version, Results]),
         ?assertEqual(ok, call(Node, ?APP, send_message, [Endpoint, store, #{id => <<"last">>}])),
         until(fun() -> macula_peer_test:count(?config(listener, Config)) =:= Sent + 1 end, 60000),
         ok = macula_peer_test:forget(?config(listener, Config)),
         %% What a call may say meanwhile; `undef' where the modules are being exchanged.
         ?assertEqual([], Results -- [ok, killed, undef, {error, {start_failed, upgrading}},
                                      {error, {send_failed, connection_shutdown}}, {error, {send_failed, connection_closed}},
                                      {error, {connect_failed, transport_down}}]),
         ?assertMatch({error, _}, call(Node, ?MODULE, waited, [Waiting]))
     end || Version <- [New, Old, New]],
    %% Tokens are of the library that made them.
    ?assertEqual({error, invalid_token}, call(Node, ?MODULE, use_the_token, [])),
    gen_udp:close(Silent),
    stop_node(Node).

%% The application of this version runs, and so does its library and no other, on its port.
in_force(Node, Lib, Version) ->
    Dir = filename:join(Lib, "macula_peer_connector-" ++ Version),
    ?assertMatch({_, _, Version}, lists:keyfind(?APP, 1, call(Node, application, which_applications, []))),
    ?assertEqual(filename:join(Dir, "ebin/macula_peer_nif.beam"), call(Node, code, which, [macula_peer_nif])),
    ?assert(running(Node)),
    {ok, Port} = call(Node, application, get_env, [?APP, port]),
    ?assertMatch({ok, {_, Port}}, call(Node, macula_peer_node, local_address, [])),
    ?assertEqual(ok, call(Node, macula_peer_engine, ensure_started, [])).

next_version() ->
    [Major, Minor, Patch] = string:split(version(), ".", all),
    lists:flatten(lists:join(".", [Major, Minor, integer_to_list(list_to_integer(Patch) + 1)])).

version() ->
    _ = application:load(?APP),
    {ok, Version} = application:get_key(?APP, vsn),
    Version.

%% The library of another version. Always in the same place, so that cargo finds what it did the last time.
build(Version) ->
    Dir = filename:join(root(), "_build/upgrade"),
    [] = shell(["rm -rf ", Dir, "/native && mkdir -p ", Dir, "/native && cd ", root(), " && cp -p Cargo.toml Cargo.lock ", Dir, " && cp -Rp native/nif ",
                "native/nif.sh native/peer native/core native/wire native/testkit ", Dir, "/native"]),
    substitute(filename:join(Dir, "Cargo.toml"), ["^version = \"(", version(), ")\""], Version),
    substitute(filename:join(Dir, "Cargo.lock"), ["name = \"macula-peer[^\"]*\"\nversion = \"(", version(), ")\""], Version),
    Target = filename:join(Dir, "target"),
    [ok = macula_peer_test:warm_target(Target) || not filelib:is_dir(Target)],
    Said = shell(["cd ", Dir, " && CARGO_TARGET_DIR= MACULA_PEER_NIF_DIR= sh native/nif.sh 2>&1"]),
    ct:log("~ts", [Said]),
    filename:join(Dir, "priv/macula_peer_nif.so").

substitute(File, Pattern, Version) ->
    {ok, Text} = file:read_file(File),
    {match, Found} = re:run(Text, Pattern, [global, multiline, {capture, [1]}]),
    New = lists:foldr(fun([{At, Length}], Rest) ->
              <<Before:At/binary, _:Length/binary, After/binary>> = Rest,
              iolist_to_binary([Before, Version, After])
          end, Text, Found),
    ok = file:write_file(File, New).

%% The compiled application as this version, with this library.
installed(Lib, Version, Library) ->
    Dir = filename:join(Lib, "macula_peer_connector-" ++ Version),
    Ebin = filename:join(Dir, "ebin"),
    [ok = filelib:ensure_dir(filename:join([Dir, Sub, "x"])) || Sub <- ["ebin", "priv"]],
    Files = filelib:wildcard(filename:join(code:lib_dir(?APP), "ebin/*")),
    [{ok, _} = file:copy(File, filename:join(Ebin, filename:basename(File))) || File <- Files],
    {ok, _} = file:copy(Library, filename:join(Dir, "priv/macula_peer_nif.so")),
    {ok, [{application, ?APP, Keys}]} = file:consult(filename:join(Ebin, "macula_peer_connector.app")),
    write(filename:join(Ebin, "macula_peer_connector.app"),
          {application, ?APP, lists:keystore(vsn, 1, Keys, {vsn, Version})}),
    Appup = filename:join(Ebin, "macula_peer_connector.appup"),
    {ok, [{_, Up, Down}]} = file:consult(Appup),
    write(Appup, {Version, Up, Down}),
    Dir.

release(Dir, Version, Port) ->
    File = release_file(Dir, Version),
    ok = filelib:ensure_dir(File),
    Vsn = fun(App) -> _ = application:load(App), {ok, V} = application:get_key(App, vsn), V end,
    write(File ++ ".rel", {release, {"node", Version}, {erts, erlang:system_info(version)},
                           [{App, Vsn(App)} || App <- [kernel, stdlib, sasl, crypto]] ++ [{?APP, Version}]}),
    write(filename:join(filename:dirname(File), "sys.config"),
          [{?APP, [{port, Port}]}, {kernel, [{logger_level, critical}]}]),
    {ok, _, _} = systools:make_script(File, [silent, local, {path, paths(Dir)}, {outdir, filename:dirname(File)}]),
    {ok, _} = file:copy(File ++ ".boot", filename:join(filename:dirname(File), "start.boot")).

relup(Dir, From, To) ->
    {ok, _, _, _} = systools:make_relup(release_file(Dir, To), [release_file(Dir, From)], [release_file(Dir, From)],
                                        [silent, {path, paths(Dir)}, {outdir, filename:dirname(release_file(Dir, To))}]).

release_file(Dir, Version) ->
    filename:join([Dir, "releases", Version, "node"]).

paths(Dir) ->
    filelib:wildcard(filename:join(Dir, "lib/*/ebin")).

start_release(Dir, Version) ->
    Releases = filename:join(Dir, "releases"),
    ok = release_handler:create_RELEASES(code:root_dir(), Releases, release_file(Dir, Version) ++ ".rel",
                                         [{?APP, Version, filename:join(Dir, "lib")}]),
    Args = ["-boot", release_file(Dir, Version), "-config", filename:join([Releases, Version, "sys"]), "-mode", "embedded",
            "-sasl", "releases_dir", io_lib:format("~p", [Releases])],
    {ok, Node, _} = peer:start(#{connection => standard_io, args => [lists:flatten(Arg) || Arg <- Args]}),
    [{module, Module} = call(Node, code, load_abs, [filename:join(test_dir(), atom_to_list(Module))])
     || Module <- [?MODULE, macula_peer_test]],
    Node.

test_dir() ->
    filename:dirname(code:which(?MODULE)).

write(File, Term) ->
    ok = file:write_file(File, io_lib:format("~tp.~n", [Term])).

shell(Command) ->
    os:cmd(lists:flatten(Command)).

%% ---- in the nodes ----

%% Messages one after the other from some processes, until they are told to stop.
start_callers(Endpoint) ->
    Owner = spawn(fun() -> callers(Endpoint) end),
    true = register(?MODULE, Owner),
    ok.

callers(Endpoint) ->
    Calls = counters:new(?CALLERS, []),
    Sent = counters:new(1, []),
    Stop = atomics:new(1, []),
    Start = fun(I) -> spawn_monitor(fun() -> exit({results, caller(Endpoint, I, Calls, Sent, Stop, [])}) end) end,
    callers(Start, maps:from_list([{Start(I), I} || I <- lists:seq(1, ?CALLERS)]), {Calls, Sent, Stop}, []).

callers(Start, Callers, {Calls, Sent, Stop} = Counters, Results) ->
    receive
        {From, Tag, counts} ->
            From ! {Tag, [counters:get(Calls, I) || I <- lists:seq(1, ?CALLERS)]},
            callers(Start, Callers, Counters, Results);
        {From, Tag, stop} ->
            ok = atomics:put(Stop, 1, 1),
            All = [receive {'DOWN', Monitor, process, Pid, Reason} -> result(Reason) end
                   || {Pid, Monitor} <- maps:keys(Callers)],
            From ! {Tag, {lists:usort(lists:append([Results | All])), counters:get(Sent, 1)}};
        {'DOWN', Monitor, process, Pid, Reason} ->
            {I, Others} = maps:take({Pid, Monitor}, Callers),
            callers(Start, Others#{Start(I) => I}, Counters, result(Reason) ++ Results)
    end.

result({results, Results}) -> Results;
result(Reason) -> [Reason].

caller(Endpoint, I, Calls, Sent, Stop, Results) ->
    case atomics:get(Stop, 1) of
        1 ->
            Results;
        0 ->
            Result = try macula_peer_connector:send_message(Endpoint, store, #{id => <<"x">>}) catch error:undef -> undef end,
            [ok = counters:add(Sent, 1, 1) || Result =:= ok],
            ok = counters:add(Calls, I, 1),
            %% The receiver is to keep up.
            receive after 2 -> ok end,
            caller(Endpoint, I, Calls, Sent, Stop, lists:usort([Result | Results]))
    end.

%% Every caller has come back from what it was doing, and has done it again.
progress() ->
    Before = ask(counts),
    until(fun() -> lists:all(fun({Was, Is}) -> Is >= Was + 2 end, lists:zip(Before, ask(counts))) end).

stop_callers() ->
    ask(stop).

ask(What) ->
    Tag = make_ref(),
    ?MODULE ! {self(), Tag, What},
    receive {Tag, Answer} -> Answer end.

%% A handler that is a function, and counts.
listen_with_function() ->
    ok = persistent_term:put(?MODULE, counters:new(1, [])),
    {ok, {_, Port}} = macula_peer_node:listen(#{handler => {?MODULE, count, []}}),
    [Handler] = macula_peer_test:handlers(),
    {Port, Handler}.

count({macula_peer_message, _}) -> counters:add(persistent_term:get(?MODULE), 1, 1);
count({macula_peer_event, _}) -> ok.

handled() ->
    counters:get(persistent_term:get(?MODULE), 1).

%% A call that the peer never answers.
start_waiting(Endpoint) ->
    Pid = spawn(fun() ->
        Result = macula_peer_connector:send_message(Endpoint, store, #{}, infinity),
        receive {From, Tag, result} -> From ! {Tag, Result} end
    end),
    until(fun() -> macula_peer_test:peer_stats(Endpoint) =/= none end),
    Pid.

waited(Pid) ->
    Monitor = monitor(process, Pid),
    Pid ! {self(), Monitor, result},
    receive
        {Monitor, Result} -> Result;
        {'DOWN', Monitor, process, Pid, Reason} -> {ended, Reason}
    end.

%% A message that this node sent to itself, unanswered.
keep_a_token() ->
    Owner = self(),
    Holder = spawn(fun() -> hold_token(Owner) end),
    {ok, {_, Port}} = macula_peer_node:listen(#{handler => Holder}),
    ok = macula_peer_connector:send_message(endpoint(Port), store, #{}),
    receive {Holder, has_token} -> ok end,
    true = register(token_holder, Holder),
    ok.

hold_token(Owner) ->
    Token = receive {macula_peer_message, #{reply_to := Kept}} -> Kept end,
    Owner ! {self(), has_token},
    receive
        {From, Tag, use} -> From ! {Tag, macula_peer_node:reply(Token, pong, #{timestamp => 1, server_time => 1})}
    end.

use_the_token() ->
    Tag = make_ref(),
    Holder = whereis(token_holder),
    Monitor = monitor(process, Holder),
    Holder ! {self(), Tag, use},
    Answer = receive {Tag, Reply} -> Reply end,
    receive {'DOWN', Monitor, process, Holder, normal} -> Answer end.
