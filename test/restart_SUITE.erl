%% The engine starts, stops and starts again under its callers, and a library that is not there says so.
-module(restart_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/3, send_message/4, send_message_and_wait/4, send_message_nat_aware/5]).
-import(macula_peer_test, [silent_port/0, endpoint/1, in_parallel/2, until/1, rpc/2]).

-define(APP, macula_peer_connector).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [calls_work_without_the_application, the_application_starts_and_stops_the_engine,
     the_application_stops_and_starts_under_its_callers, a_stop_answers_every_call_that_waits,
     a_start_that_fails_fails_for_every_caller, the_engine_outlives_the_application_that_called_first,
     killed_callers_leave_no_process_behind, functions_that_look_start_no_engine,
     handlers_that_are_set_at_once_replace_one_another, a_handler_ends_whatever_becomes_of_the_finisher,
     a_missing_library_is_an_error_of_every_function, a_library_of_another_version_is_refused,
     calls_go_on_after_the_module_is_loaded_again, calls_go_on_after_the_module_was_deleted_and_purged].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {endpoint, endpoint(Port)} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    Config.

end_per_testcase(_Case, _Config) ->
    _ = application:stop(?APP),
    macula_peer_node:stop().

calls_work_without_the_application(Config) ->
    ok = macula_peer_node:stop(),
    ?assertEqual(ok, send_message(?config(endpoint, Config), store, #{})),
    ok = macula_peer_node:stop(),
    ?assertMatch({ok, {pong, _}}, send_message_and_wait(?config(endpoint, Config), ping, #{timestamp => 1}, 5000)),
    ok = macula_peer_node:stop(),
    ?assertMatch({ok, {_, _}}, macula_peer_node:listen(#{})),
    ?assertNot(lists:keymember(?APP, 1, application:which_applications())),
    ?assertEqual(undefined, whereis(macula_peer_sup)).

the_application_starts_and_stops_the_engine(_Config) ->
    ok = macula_peer_node:stop(),
    Port = macula_peer_test:closed_port(),
    ok = application:set_env(?APP, port, Port),
    ok = application:start(?APP),
    ?assertMatch({error, eaddrinuse}, gen_udp:open(Port)),
    ok = application:stop(?APP),
    {ok, Socket} = gen_udp:open(Port),
    ok = gen_udp:close(Socket).

%% Every caller gets one result for each call, and no caller is left waiting.
the_application_stops_and_starts_under_its_callers(Config) ->
    {Socket, Silent} = silent_port(),
    Stop = atomics:new(2, []),
    {_, Restarts} = spawn_monitor(fun() ->
        [begin
             ok = application:start(?APP),
             Before = atomics:get(Stop, 2),
             until(fun() -> atomics:get(Stop, 2) > Before + 100 end),
             ok = application:stop(?APP)
         end || _ <- lists:seq(1, 5)],
        atomics:put(Stop, 1, 1)
    end),
    Calls = [fun() -> send_message(?config(endpoint, Config), store, #{}, 10000) end,
             fun() -> send_message_and_wait(?config(endpoint, Config), ping, #{timestamp => 1}, 10000) end,
             fun() -> send_message_and_wait(?config(endpoint, Config), rpc_request, rpc(<<"never">>, 0), 500) end,
             fun() -> send_message(endpoint(Silent), store, #{}, 500) end],
    Results = in_parallel(40, fun(I) -> calls_until(Stop, lists:nth(1 + I rem 4, Calls), []) end),
    receive {'DOWN', Restarts, process, _, Reason} -> ?assertEqual(normal, Reason) end,
    ?assertEqual([], lists:usort(lists:append(Results)) --
                     [ok, {error, timeout}, {error, connection_closed}, {error, {connect_failed, transport_down}},
                      {error, {send_failed, connection_shutdown}}, {error, {send_failed, connection_closed}}]),
    ?assertEqual(ok, send_message(?config(endpoint, Config), store, #{})),
    gen_udp:close(Socket).

calls_until(Stop, Call, Results) ->
    case atomics:get(Stop, 1) of
        1 ->
            Results;
        0 ->
            Result = case Call() of {ok, _} -> ok; Other -> Other end,
            atomics:add(Stop, 2, 1),
            calls_until(Stop, Call, lists:usort([Result | Results]))
    end.

a_stop_answers_every_call_that_waits(Config) ->
    {Socket, Port} = silent_port(),
    Silent = endpoint(Port),
    Live = ?config(endpoint, Config),
    ok = send_message(Live, store, #{}),
    Calls = [fun() -> send_message(Silent, store, #{}, Timeout) end || Timeout <- [30000, infinity]] ++
            [fun() -> send_message_and_wait(Endpoint, rpc_request, rpc(<<"never">>, 0), Timeout) end
             || Endpoint <- [Silent, Live], Timeout <- [30000, infinity]] ++
            [fun() ->
                 send_message_nat_aware(<<"a">>, <<"b">>, store, #{}, #{endpoint => Silent, timeout => 30000})
             end],
    Callers = [spawn_monitor(fun() -> exit({result, Call(), macula_peer_test:mailbox()}) end) || Call <- Calls],
    until(fun() -> held(Silent) >= 5 * 9 end),
    until(fun() -> held(Live) > 2 * 9 end),
    ok = macula_peer_node:stop(),
    [receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertMatch({result, {error, _}, []}, Reason) end
     || {Pid, Monitor} <- Callers],
    gen_udp:close(Socket).

held(Endpoint) ->
    case macula_peer_test:peer_stats(Endpoint) of
        #{unacknowledged_bytes := Bytes} -> Bytes;
        none -> 0
    end.

%% ---- the library ----

a_missing_library_is_an_error_of_every_function(Config) ->
    says_not_loaded(start_copy(Config, fun(_) -> ok end)).

a_library_of_another_version_is_refused(Config) ->
    says_not_loaded(start_copy(Config, fun(Copy) ->
        ok = filelib:ensure_dir(filename:join([Copy, "priv", "x"])),
        Library = "macula_peer_nif.so",
        {ok, _} = file:copy(filename:join(code:priv_dir(?APP), Library), filename:join([Copy, "priv", Library])),
        AppFile = filename:join([Copy, "ebin", "macula_peer_connector.app"]),
        {ok, [{application, ?APP, Keys}]} = file:consult(AppFile),
        Older = {application, ?APP, lists:keystore(vsn, 1, Keys, {vsn, "0.0.9"})},
        ok = file:write_file(AppFile, io_lib:format("~p.~n", [Older]))
    end)).

says_not_loaded(Node) ->
    Call = fun(Module, Function, Args) -> macula_peer_test:call(Node, Module, Function, Args) end,
    Endpoint = <<"127.0.0.1:9">>,
    Calls = [{?APP, send_message, [Endpoint, store, #{}]},
             {?APP, send_message, [Endpoint, store, #{}, 1000]},
             {?APP, send_message_and_wait, [Endpoint, store, #{}, 1000]},
             {?APP, send_message_nat_aware, [<<"a">>, <<"b">>, store, #{}]},
             {?APP, send_message_nat_aware, [<<"a">>, <<"b">>, store, #{}, #{endpoint => Endpoint}]},
             {macula_peer_node, start, []},
             {macula_peer_node, listen, [#{}]},
             {macula_peer_node, listen, [#{handler => {erlang, display, []}}]},
             {macula_peer_node, identity, []},
             {macula_peer_node, close, []},
             {macula_peer_node, local_address, []},
             {macula_peer_node, set_handler, [undefined]},
             {macula_peer_node, set_handler, [{erlang, display, []}]},
             {macula_peer_node, reply, [none, reply, #{}]},
             {macula_peer_node, stats, []},
             {macula_peer_wire, encode, [store, #{}]},
             {macula_peer_wire, decode, [<<>>]}],
    [begin
         {_, {error, {nif_not_loaded, Text}}} = {{M, F, A}, Call(M, F, A)},
         [?assertMatch({_, [_ | _]}, {Text, string:find(unicode:characters_to_list(Text), Remedy)})
          || Remedy <- ["rebar3 compile", "make nif", "cargo", "the same version"]]
     end || {M, F, A} <- Calls],
    ?assertEqual(ok, Call(macula_peer_node, stop, [])),
    ?assertMatch({error, {?APP, {{nif_not_loaded, _}, _}}},
                 Call(application, ensure_all_started, [?APP])),
    ?assertMatch({error, {nif_not_loaded, _}}, Call(macula_peer_node, start, [])),
    %% Nothing is left running for an engine that is not there.
    ?assertEqual([], Call(macula_peer_test, handlers, [])),
    macula_peer_test:stop_node(Node).

%% A start is all of it or nothing: a caller never finds an engine that another caller is still setting up.
a_start_that_fails_fails_for_every_caller(_Config) ->
    {ok, Taken} = gen_udp:open(0),
    {ok, Port} = inet:port(Taken),
    ok = macula_peer_node:stop(),
    ok = application:set_env(?APP, listen, #{port => Port}),
    Failed = {error, {listen_failed, eaddrinuse}},
    ?assertEqual(lists:duplicate(5, Failed), in_parallel(5, fun(_) -> macula_peer_node:start() end)),
    ?assertEqual({error, not_started}, macula_peer_node:local_address()),
    until(fun() -> macula_peer_test:handlers() =:= [] andalso macula_peer_test:finishers() =:= [] end),
    ok = gen_udp:close(Taken).

%% When an application stops, every process with its group leader ends, even one of another application.
the_engine_outlives_the_application_that_called_first(_Config) ->
    ok = macula_peer_node:stop(),
    ok = application:set_env(?APP, handler, {erlang, is_tuple, []}),
    Leader = spawn(fun Loop() -> receive {io_request, From, Tag, _} -> From ! {io_reply, Tag, ok}, Loop() end end),
    {Caller, Monitor} = spawn_monitor(fun() ->
        true = group_leader(Leader, self()),
        ok = macula_peer_node:start()
    end),
    receive {'DOWN', Monitor, process, Caller, normal} -> ok end,
    [Handler] = macula_peer_test:handlers(),
    [Finisher] = macula_peer_test:finishers(),
    ?assertEqual([], [Pid || Pid <- [Handler, Finisher], {group_leader, Leader} =:= process_info(Pid, group_leader)]),
    true = exit(Leader, kill).

%% Whichever step of a start, of a stop or of setting a handler the caller has come to.
killed_callers_leave_no_process_behind(_Config) ->
    Function = {erlang, is_tuple, []},
    ok = application:set_env(?APP, handler, Function),
    ok = macula_peer_node:stop(),
    Calls = [fun macula_peer_node:start/0, fun() -> macula_peer_node:set_handler(Function) end,
             fun macula_peer_node:start/0, fun macula_peer_node:stop/0],
    [begin
        Callers = [spawn(Call) || _ <- lists:seq(1, 5), Call <- Calls],
        timer:sleep(Round rem 8),
        [exit(Caller, kill) || Caller <- Callers],
        ok = macula_peer_node:stop()
     end || Round <- lists:seq(1, 40)],
    %% A call whose caller was killed may still start the engine.
    until(fun() ->
        ok = macula_peer_node:stop(),
        macula_peer_test:handlers() =:= [] andalso macula_peer_test:finishers() =:= []
    end).

functions_that_look_start_no_engine(_Config) ->
    ok = macula_peer_node:stop(),
    Look = fun() -> [macula_peer_node:stats(), macula_peer_node:nat_profile(), macula_peer_node:identity(),
                     macula_peer_node:local_address(), macula_peer_node:path(<<"127.0.0.1:9443">>),
                     macula_peer_node:path(<<"node">>), macula_peer_node:path({node, <<"node">>})]
           end,
    [?assertEqual({error, not_started}, Seen) || Seen <- Look(), _ <- Look()].

%% Also beside a stop. None of it raises, and in the end there is one handler, or none where there is no engine.
handlers_that_are_set_at_once_replace_one_another(_Config) ->
    Function = {erlang, is_tuple, []},
    Calls = [fun() -> macula_peer_node:set_handler(Function) end,
             fun() -> macula_peer_node:set_handler(self()) end,
             fun() -> macula_peer_node:set_handler(undefined) end,
             fun macula_peer_node:stop/0],
    Act = fun(N) -> [(lists:nth(1 + (N * Round) rem length(Calls), Calls))() || Round <- lists:seq(1, 20)] end,
    Results = in_parallel(20, Act),
    ?assertEqual([], [Result || Result <- lists:append(Results), Result =/= ok, not is_error(Result)]),
    ok = macula_peer_node:set_handler(Function),
    until(fun() -> length(macula_peer_test:handlers()) =:= 1 end),
    ok = macula_peer_node:stop(),
    until(fun() -> macula_peer_test:handlers() =:= [] end).

%% The finisher that was to send the handler its end could be told to stop before, and the handler stayed.
a_handler_ends_whatever_becomes_of_the_finisher(_Config) ->
    {Supervisor, _} = macula_peer_finisher_sup:start(),
    Finisher = macula_peer_finisher_sup:finisher(Supervisor),
    Function = {function, Handler} = macula_peer_handler:start({erlang, is_tuple, []}),
    Monitor = monitor(process, Handler),
    true = erlang:suspend_process(Finisher),
    ok = macula_peer_finisher:stop(Supervisor),
    ok = macula_peer_handler:stop(Handler, Supervisor),
    true = erlang:resume_process(Finisher),
    receive {'DOWN', Monitor, process, Handler, normal} -> ok after 10000 -> error({still_there, Function}) end.

is_error({error, _}) -> true;
is_error(_) -> false.

%% A node with a copy of the compiled application, without its library, changed by Change.
start_copy(Config, Change) ->
    Copy = filename:join(?config(priv_dir, Config), "macula_peer_connector"),
    Ebin = filename:join(Copy, "ebin"),
    ok = filelib:ensure_dir(filename:join(Ebin, "x")),
    Files = filelib:wildcard(filename:join(filename:dirname(code:which(?APP)), "*.{beam,app}")),
    [{ok, _} = file:copy(File, filename:join(Ebin, filename:basename(File))) || File <- Files],
    Change(Copy),
    macula_peer_test:start_node([Ebin, filename:dirname(code:which(?MODULE))]).

%% A library is not replaced while it runs. The attempt fails or changes nothing.
calls_go_on_after_the_module_is_loaded_again(Config) ->
    reloads(Config, fun() ->
        case code:load_file(macula_peer_nif) of
            {module, macula_peer_nif} -> ok;
            {error, on_load_failure} -> ok
        end
    end).

calls_go_on_after_the_module_was_deleted_and_purged(Config) ->
    reloads(Config, fun() ->
        true = code:delete(macula_peer_nif),
        _ = code:purge(macula_peer_nif),
        {module, macula_peer_nif} = code:load_file(macula_peer_nif)
    end).

%% In a node of its own, so that what goes wrong there stays there.
reloads(Config, Reload) ->
    Node = macula_peer_test:start_node(),
    ?assertEqual([], macula_peer_test:call(Node, ?MODULE, call_and_reload, [?config(endpoint, Config), Reload])),
    macula_peer_test:stop_node(Node).

call_and_reload(Endpoint, Reload) ->
    {Socket, Silent} = silent_port(),
    {_, Waiting} = spawn_monitor(fun() -> exit({result, send_message(endpoint(Silent), store, #{}, 2000)}) end),
    Failed = [{Round, What, Result}
              || Round <- lists:seq(1, 3),
                 _ <- [Round > 1 andalso Reload()],
                 {What, Call} <- [{send, fun() -> send_message(Endpoint, store, #{}, 5000) end},
                                  {ask, fun() -> send_message_and_wait(Endpoint, ping, #{timestamp => 1}, 5000) end},
                                  {stats, fun() -> {ok, macula_peer_node:stats()} end}],
                 Result <- [Call()],
                 Result =/= ok, not is_ok(Result)],
    receive {'DOWN', Waiting, process, _, {result, {error, _}}} -> ok end,
    ok = macula_peer_node:stop(),
    gen_udp:close(Socket),
    Failed.

is_ok({ok, {error, _}}) -> false;
is_ok({ok, _}) -> true;
is_ok(_) -> false.
