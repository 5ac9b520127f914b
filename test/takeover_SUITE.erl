%% Which macula_peer_connector is in force: the application says so, and puts its own in the place of macula's where it is told
%% to, and only there. Each case has a node of its own, with the fake of macula first in its code path.
-module(takeover_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1]).

-define(APP, macula_peer_connector).
-define(CONNECTOR, macula_peer_connector).
-define(POOL, macula_peer_connection_pool).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [{group, interactive}, {group, embedded}, our_module_is_recognized_however_it_was_compiled, our_module_is_recognized_before_it_is_loaded,
     code_that_is_in_use_is_not_taken_over, callers_in_the_module_before_are_let_finish,
     the_running_pool_of_macula_goes_on, each_has_its_own_switch, a_wrong_switch_stops_the_start,
     a_module_left_out_cannot_take_over, a_mock_stays_and_our_module_follows_it, meck_leaves_ours_in_force,
     a_module_loaded_by_a_tool_is_replaced, one_switch_guards_one_module].

groups() ->
    Both = [nothing_is_replaced_unasked, our_module_takes_over, the_start_says_which_is_in_force],
    [{interactive, Both}, {embedded, Both}].

init_per_suite(Config) ->
    Ebin = filename:join(?config(priv_dir, Config), "macula/ebin"),
    ok = filelib:ensure_dir(filename:join(Ebin, "x")),
    Sources = filename:join(macula_peer_test:root(), "test_apps/macula/src"),
    Options = [{outdir, Ebin}, debug_info],
    [{ok, _} = compile:file(Source, Options) || Source <- filelib:wildcard(Sources ++ "/*.erl")],
    {ok, _} = file:copy(Sources ++ "/macula.app.src", Ebin ++ "/macula.app"),
    [{macula, Ebin} | Config].

end_per_suite(_Config) -> ok.

init_per_group(embedded, Config) -> [{args, ["-mode", "embedded"]} | Config];
init_per_group(_, Config) -> Config.

end_per_group(_, _Config) -> ok.

init_per_testcase(Case, Config) ->
    Paths = case Case of
        our_module_is_recognized_however_it_was_compiled -> [];
        _ -> [?config(macula, Config)]
    end,
    Args = proplists:get_value(args, Config, []),
    Libraries = [ebin(Application) || Application <- [crypto, tools, compiler]],
    {ok, Node, _} = peer:start(#{connection => standard_io,
                                 args => Args ++ ["-kernel", "logger_level", "critical" |
                                                  path(Libraries ++ macula_peer_test:node_paths() ++ Paths)]}),
    [load_all(Node) || Args =/= []],
    [{node, Node} | Config].

%% In embedded mode nothing is loaded by being called.
load_all(Node) ->
    Modules = lists:append([beams(Path) || Path <- [ebin(crypto) | macula_peer_test:node_paths()]]),
    [{module, Module} = call(Node, code, load_file, [Module]) || Module <- lists:usort(Modules) -- [?CONNECTOR, ?POOL]].

ebin(Application) ->
    filename:join(code:lib_dir(Application), "ebin").

beams(Path) ->
    [list_to_atom(filename:basename(File, ".beam")) || File <- filelib:wildcard(Path ++ "/*.beam")].

end_per_testcase(_Case, Config) ->
    %% Some cases end it themselves.
    try peer:stop(?config(node, Config)) catch exit:_ -> ok end.

nothing_is_replaced_unasked(Config) ->
    Node = with_macula(Config),
    {ok, _} = start(Node, []),
    ?assertMatch(#{?CONNECTOR := #{module := other, loaded := true}, ?POOL := #{module := other, loaded := true}},
                 which(Node)),
    ?assertEqual({error, original}, send(Node)).

our_module_takes_over(Config) ->
    Node = with_macula(Config),
    {ok, _} = start(Node, [{takeover, true}, {takeover_pool, true}]),
    #{?CONNECTOR := Connector, ?POOL := Pool} = which(Node),
    ?assertMatch(#{module := ours, loaded := true}, Connector),
    ?assertMatch(#{module := ours, loaded := true}, Pool),
    ?assertEqual(filename:dirname(maps:get(file, Connector)), own_ebin()),
    ?assertMatch({error, {invalid_endpoint, _}}, send(Node)),
    %% It is in force for good.
    ok = call(Node, application, stop, [?APP]),
    ?assertMatch({error, {invalid_endpoint, _}}, send(Node)),
    {ok, _} = start(Node, []),
    ?assertMatch(#{?CONNECTOR := #{module := ours}}, which(Node)).

the_start_says_which_is_in_force(Config) ->
    Node = with_macula(Config),
    ok = call(Node, logger, add_handler, [told, ?MODULE, #{config => self_on(Node)}]),
    ok = call(Node, logger, set_primary_config, [level, notice]),
    {ok, _} = start(Node, []),
    [{warning, Text}] = said(Node),
    ?assertMatch({match, _}, re:run(Text, "is NOT in force.*takeover, true.*docs/drop-in.md")),
    ok = call(Node, application, stop, [?APP]),
    {ok, _} = start(Node, [{takeover, true}]),
    [{warning, Text}, {notice, Now}] = said(Node),
    ?assertMatch({match, _}, re:run(Now, "is in force: .*ours \\(.*macula_peer_connector.beam\\).*other \\(")).

our_module_is_recognized_however_it_was_compiled(Config) ->
    Node = ?config(node, Config),
    ?assertMatch(#{?CONNECTOR := #{module := ours, loaded := false}}, which(Node)),
    {ok, ?CONNECTOR} = call(Node, cover, compile_beam, [filename:join(own_ebin(), "macula_peer_connector.beam")]),
    ?assertMatch(#{?CONNECTOR := #{module := ours, file := cover_compiled, loaded := true}}, which(Node)),
    {ok, macula_peer_takeover} = call(Node, cover, compile_beam, [filename:join(own_ebin(), "macula_peer_takeover.beam")]),
    ?assertMatch(#{?CONNECTOR := #{module := ours}}, which(Node)),
    {ok, _} = start(Node, [{takeover, true}, {takeover_pool, true}]),
    ?assertMatch(#{?CONNECTOR := #{module := ours, file := cover_compiled}, ?POOL := #{module := ours}}, which(Node)),
    %% Without attributes, as in a release.
    {Stripped, _} = stripped(Config),
    ok = call(Node, cover, stop, []),
    [{module, _} = call(Node, code, load_abs, [filename:join(Stripped, atom_to_list(Module))])
     || Module <- [macula_peer_takeover, ?CONNECTOR]],
    ?assertEqual(undefined, proplists:get_value(application, call(Node, ?CONNECTOR, module_info, [attributes]))),
    ?assertMatch(#{?CONNECTOR := #{module := ours, loaded := true}}, which(Node)).

our_module_is_recognized_before_it_is_loaded(Config) ->
    Node = ?config(node, Config),
    ?assertMatch(#{?CONNECTOR := #{module := other, loaded := false}}, which(Node)),
    {Stripped, Macula} = stripped(Config),
    %% Neither has attributes now.
    true = call(Node, code, del_path, [?config(macula, Config)]),
    [true = call(Node, code, del_path, [Path]) || Path <- macula_peer_test:node_paths(), Path =:= own_ebin()],
    true = call(Node, code, add_patha, [Stripped]),
    ?assertMatch(#{?CONNECTOR := #{module := ours, loaded := false}}, which(Node)),
    true = call(Node, code, add_patha, [Macula]),
    ?assertMatch(#{?CONNECTOR := #{module := other, loaded := false}}, which(Node)).

%% Code is kept twice: what is new, and what was current before. A process that runs neither is ended by the VM when a third
%% one comes.
code_that_is_in_use_is_not_taken_over(Config) ->
    Node = with_macula(Config),
    Busy = in_the_module(Node, ?config(macula, Config)),
    true = call(Node, code, soft_purge, [?CONNECTOR]),
    {module, _} = call(Node, code, load_file, [?CONNECTOR]),
    {error, Reason} = start(Node, [{takeover, true}]),
    ?assertMatch({match, _}, re:run(io_lib:format("~0p", [Reason]), "takeover_failed.*macula_peer_connector.*old_code_in_use")),
    ?assert(call(Node, erlang, is_process_alive, [Busy])),
    ?assertMatch(#{?CONNECTOR := #{module := other}}, which(Node)),
    true = call(Node, erlang, exit, [Busy, kill]),
    {ok, _} = start(Node, [{takeover, true}]),
    ?assertMatch(#{?CONNECTOR := #{module := ours}}, which(Node)).

callers_in_the_module_before_are_let_finish(Config) ->
    Node = with_macula(Config),
    Busy = in_the_module(Node, ?config(macula, Config)),
    {ok, _} = start(Node, [{takeover, true}]),
    ?assertMatch(#{?CONNECTOR := #{module := ours}}, which(Node)),
    ?assert(call(Node, erlang, is_process_alive, [Busy])).

the_running_pool_of_macula_goes_on(Config) ->
    Node = with_macula(Config),
    {ok, _} = call(Node, application, ensure_all_started, [macula]),
    Pool = call(Node, erlang, whereis, [?POOL]),
    {ok, _} = start(Node, [{takeover_pool, true}]),
    ?assertMatch(#{pool_size := 0, hit_rate := +0.0}, call(Node, ?POOL, stats, [])),
    ?assertEqual({error, no_quicer_connection}, call(Node, ?POOL, get_connection, [<<"127.0.0.1:9">>])),
    ?assertEqual(call(Node, ?POOL, stats, []), call(Node, gen_server, call, [?POOL, stats])),
    call(Node, erlang, send, [?POOL, cleanup_idle_connections]),
    ok = call(Node, gen_server, cast, [?POOL, {return_connection, <<"127.0.0.1:9">>, c}]),
    ?assertEqual({error, unknown_request}, call(Node, gen_server, call, [?POOL, whatever])),
    ?assertEqual(Pool, call(Node, erlang, whereis, [?POOL])),
    %% A new one is of ours.
    ok = call(Node, application, stop, [macula]),
    {ok, _} = call(Node, application, ensure_all_started, [macula]),
    ?assertMatch(#{pool_size := 0}, call(Node, gen_server, call, [?POOL, stats])).

each_has_its_own_switch(Config) ->
    Node = with_macula(Config),
    {ok, _} = start(Node, [{takeover, true}]),
    ?assertMatch(#{?CONNECTOR := #{module := ours}, ?POOL := #{module := other}}, which(Node)),
    ?assertEqual({error, original}, call(Node, ?POOL, get_connection, [<<"127.0.0.1:9">>])).

a_wrong_switch_stops_the_start(Config) ->
    Node = with_macula(Config),
    {error, Reason} = start(Node, [{takeover, yes}]),
    ?assertMatch({match, _}, re:run(io_lib:format("~0p", [Reason]), "invalid_option,{takeover,yes}")),
    ?assertMatch(#{?CONNECTOR := #{module := other}}, which(Node)).

%% Ours, and not macula's, was left out.
a_module_left_out_cannot_take_over(Config) ->
    Node = with_macula(Config),
    {Stripped, _} = stripped(Config),
    ok = file:delete(filename:join(Stripped, "macula_peer_connector.beam")),
    {module, _} = call(Node, code, load_abs, [filename:join(Stripped, "macula_peer_takeover")]),
    {error, Reason} = start(Node, [{takeover, true}]),
    ?assertMatch({match, _}, re:run(io_lib:format("~0p", [Reason]), "takeover_failed.*macula_peer_connector.*not_found")),
    ?assertEqual({error, original}, send(Node)).

%% ---- mocks, and tools that load code ----

%% Before the start or after it. Unloading loads the next one in the code path.
a_mock_stays_and_our_module_follows_it(Config) ->
    Node = with_macula(Config),
    [begin
         mock(Node, Module),
         {ok, _} = start(Node, [{takeover, true}, {takeover_pool, true}]),
         ?assertMatch(#{Module := #{module := mock, loaded := true}}, which(Node)),
         ?assertEqual(mocked, call(Node, Module, mocked, [])),
         unload(Node, Module),
         ?assertMatch(#{Module := #{module := ours}}, which(Node)),
         mock(Node, Module),
         ?assertEqual([], call(Node, macula_peer_takeover, restore, [])),
         ?assertEqual(mocked, call(Node, Module, mocked, [])),
         unload(Node, Module),
         ?assertMatch(#{Module := #{module := ours}}, which(Node)),
         ok = call(Node, application, stop, [?APP])
     end || Module <- [?CONNECTOR, ?POOL]],
    ?assertMatch({error, {invalid_endpoint, _}}, send(Node)).

meck_leaves_ours_in_force(Config) ->
    Node = with_macula(Config),
    case call(Node, code, ensure_loaded, [meck]) of
        {module, meck} ->
            ok = call(Node, meck, new, [?CONNECTOR, [no_link]]),
            ok = call(Node, meck, expect, [?CONNECTOR, send_message, 3, mocked]),
            {ok, _} = start(Node, [{takeover, true}, {takeover_pool, true}]),
            ?assertEqual(mocked, send(Node)),
            ok = call(Node, meck, unload, [?CONNECTOR]),
            [begin
                 ?assertMatch(#{Module := #{module := ours}}, which(Node)),
                 ok = call(Node, meck, new, [Module, [passthrough, no_link]]),
                 ?assertMatch(#{Module := #{module := mock}}, which(Node)),
                 ?assertMatch({error, {invalid_endpoint, _}}, send(Node)),
                 ok = call(Node, meck, unload, [Module]),
                 ?assertMatch(#{Module := #{module := ours}}, which(Node))
             end || Module <- [?CONNECTOR, ?POOL]];
        {error, _} ->
            {skip, "this host has no meck"}
    end.

a_module_loaded_by_a_tool_is_replaced(Config) ->
    Node = with_macula(Config),
    {ok, _} = start(Node, [{takeover, true}, {takeover_pool, true}]),
    ok = call(Node, logger, add_handler, [told, ?MODULE, #{config => self_on(Node)}]),
    ok = call(Node, logger, set_primary_config, [level, warning]),
    load_macula_s(Node, Config),
    until(fun() -> lists:all(fun(#{module := Whose}) -> Whose =:= ours end, maps:values(which(Node))) end),
    ?assertMatch({error, {invalid_endpoint, _}}, send(Node)),
    until(fun() -> length(said(Node)) =:= 2 end),
    [?assertMatch({warning, {match, _}}, {Level, re:run(Text, "another macula_peer_.* was loaded")}) || {Level, Text} <- said(Node)],
    %% The code path is right again too.
    unload(Node, ?CONNECTOR),
    ?assertMatch(#{?CONNECTOR := #{module := ours}}, which(Node)).

one_switch_guards_one_module(Config) ->
    Node = with_macula(Config),
    {ok, _} = start(Node, [{takeover, true}]),
    load_macula_s(Node, Config),
    until(fun() -> maps:get(module, maps:get(?CONNECTOR, which(Node))) =:= ours end),
    ?assertMatch(#{?POOL := #{module := other}}, which(Node)),
    unload(Node, ?POOL),
    ?assertMatch(#{?POOL := #{module := other}}, which(Node)).

%% As rebar3 does: macula's directory comes first again, and what differs from the files there is loaded.
load_macula_s(Node, Config) ->
    true = call(Node, code, add_patha, [?config(macula, Config)]),
    [begin
         _ = call(Node, code, purge, [Module]),
         {module, Module} = call(Node, code, load_file, [Module])
     end || Module <- [?CONNECTOR, ?POOL]].

%% As meck does it: made in memory, without a file.
mock(Node, Module) ->
    Forms = [{attribute, 1, module, Module}, {attribute, 1, export, [{mocked, 0}]},
             {function, 1, mocked, 0, [{clause, 1, [], [], [{atom, 1, mocked}]}]}],
    {ok, Module, Binary} = compile:forms(Forms),
    _ = call(Node, code, purge, [Module]),
    {module, Module} = call(Node, code, load_binary, [Module, "", Binary]).

unload(Node, Module) ->
    _ = call(Node, code, purge, [Module]),
    true = call(Node, code, delete, [Module]),
    _ = call(Node, code, purge, [Module]).

%% ---- a node ----

%% Macula's modules are loaded.
with_macula(Config) ->
    Node = ?config(node, Config),
    [{module, Module} = call(Node, code, load_file, [Module]) || Module <- [?CONNECTOR, ?POOL]],
    Node.

start(Node, Settings) ->
    _ = call(Node, application, load, [?APP]),
    [ok = call(Node, application, unset_env, [?APP, Key]) || Key <- [takeover, takeover_pool]],
    [ok = call(Node, application, set_env, [?APP, Key, Value]) || {Key, Value} <- Settings],
    call(Node, application, ensure_all_started, [?APP]).

which(Node) ->
    call(Node, macula_peer_node, which, []).

%% No port: ours says so without a packet.
send(Node) ->
    call(Node, ?CONNECTOR, send_message, [<<"127.0.0.1">>, ping, #{timestamp => 1}]).

path(Paths) ->
    lists:append([["-pa", Path] || Path <- Paths]).

own_ebin() ->
    filename:dirname(code:which(macula_peer_nif)).

%% A process that is inside the module: macula's, with a function that waits. It stays where it is.
in_the_module(Node, Macula) ->
    {ok, {_, [{abstract_code, {_, Forms}}]}} =
        beam_lib:chunks(filename:join(Macula, "macula_peer_connector.beam"), [abstract_code]),
    {ok, ?CONNECTOR, Binary} = compile:forms(waiting(Forms), [export_all]),
    {module, _} = call(Node, code, load_binary, [?CONNECTOR, filename:join(Macula, "macula_peer_connector.beam"), Binary]),
    call(Node, erlang, spawn, [?CONNECTOR, wait, []]).

waiting(Forms) ->
    {ok, Tokens, _} = erl_scan:string("wait() -> receive never -> wait() end."),
    {ok, Wait} = erl_parse:parse_form(Tokens),
    {Before, [{eof, _} = Eof]} = lists:splitwith(fun(Form) -> element(1, Form) =/= eof end, Forms),
    Before ++ [Wait, Eof].

%% Copies of our modules and of macula's without anything but code.
stripped(Config) ->
    {strip(own_ebin(), filename:join(?config(priv_dir, Config), "ours")),
     strip(?config(macula, Config), filename:join(?config(priv_dir, Config), "macula"))}.

strip(From, To) ->
    ok = filelib:ensure_dir(filename:join(To, "x")),
    [begin
         {ok, Whole} = file:read_file(File),
         %% Given a name, it would strip that very file.
         {ok, {_, Binary}} = beam_lib:strip(Whole),
         ok = file:write_file(filename:join(To, filename:basename(File)), Binary)
     end || File <- filelib:wildcard(From ++ "/*.beam")],
    To.

%% ---- a logger handler, in the node ----

self_on(Node) ->
    {ok, Pid} = call(Node, ?MODULE, keep, []),
    Pid.

keep() ->
    Pid = spawn(fun() -> register(?MODULE, self()), keeping([]) end),
    {ok, Pid}.

keeping(Said) ->
    receive
        {log, Level, Text} -> keeping([{Level, Text} | Said]);
        {said, From} -> From ! {said, lists:reverse(Said)}, keeping(Said)
    end.

said(Node) ->
    call(Node, ?MODULE, asked, []).

%% Of which module is in force; the rest is not the matter here.
asked() ->
    ?MODULE ! {said, self()},
    receive {said, Said} -> [Line || {_, Text} = Line <- Said, string:find(Text, "in force") =/= nomatch] end.

log(#{level := Level, msg := Msg}, #{config := Pid}) ->
    Text = case Msg of
        {string, String} -> String;
        {report, Report} -> io_lib:format("~p", [Report]);
        {Format, Args} -> io_lib:format(Format, Args)
    end,
    Pid ! {log, Level, unicode:characters_to_list(Text)}.
