%% The functions of macula's connection pool, over the engine's peers.
-module(connection_pool_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/4]).
-import(macula_peer_test, [until/1]).

-define(POOL, macula_peer_connection_pool).
-define(ZEROS, #{hits => 0, misses => 0, evictions => 0, total => 0, hit_rate => 0.0, pool_size => 0}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [the_pool_has_the_functions_of_macula, the_pool_is_a_supervisors_child, without_an_engine_there_is_nothing, the_pool_counts_as_macula_does,
     connected_peers_are_endpoints_with_a_live_link, an_invalidated_link_is_closed_and_loses_nothing,
     a_gateway_gets_messages_in_flight_once, nonsense_is_not_invalidated, there_is_no_connection_to_get,
     the_pool_counts_the_connections_it_is_given, the_pool_returns_live_connections].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {endpoint, macula_peer_test:endpoint(Port)} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)).

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    macula_peer_test:forget(?config(node, Config)),
    Config.

end_per_testcase(_Case, _Config) ->
    macula_peer_node:stop().

the_pool_has_the_functions_of_macula(_Config) ->
    Wanted = [{start_link, 0}, {start_link, 1}, {get_connection, 1}, {return_connection, 2}, {invalidate, 1}, {stats, 0},
              {put, 2}, {get_connected_peers, 0}],
    ?assertEqual([], Wanted -- ?POOL:module_info(exports)).

the_pool_is_a_supervisors_child(_Config) ->
    {ok, Supervisor} = supervisor:start_link(?MODULE, [#{id => pool, start => {?POOL, start_link, [#{max_connections => 3}]}}]),
    Pid = whereis(?POOL),
    ?assertMatch([{pool, Pid, worker, _}], supervisor:which_children(Supervisor)),
    ?assertMatch({error, {already_started, Pid}}, ?POOL:start_link()),
    ?assertEqual(?POOL:stats(), gen_server:call(?POOL, stats)),
    true = unlink(Supervisor),
    ok = gen_server:stop(Supervisor),
    ?assertEqual(undefined, whereis(?POOL)).

init(Children) -> {ok, {#{}, Children}}.

without_an_engine_there_is_nothing(Config) ->
    ok = macula_peer_node:stop(),
    ?assertEqual(?ZEROS, ?POOL:stats()),
    ?assertEqual([], ?POOL:get_connected_peers()),
    ?assertEqual(ok, ?POOL:invalidate(?config(endpoint, Config))),
    ?assertEqual(not_started, macula_peer_call:stats(), "asking does not start it").

the_pool_counts_as_macula_does(Config) ->
    ?assertEqual(?ZEROS, ?POOL:stats()),
    [ok = send_message(?config(endpoint, Config), store, #{}, 5000) || _ <- lists:seq(1, 4)],
    ?assertEqual(#{hits => 3, misses => 1, evictions => 0, total => 4, hit_rate => 75.0, pool_size => 1}, ?POOL:stats()).

connected_peers_are_endpoints_with_a_live_link(Config) ->
    Endpoint = ?config(endpoint, Config),
    Closed = macula_peer_test:endpoint(macula_peer_test:closed_port()),
    {error, _} = send_message(Closed, store, #{}, 1000),
    ?assertEqual([], ?POOL:get_connected_peers()),
    ok = send_message(<<"https://", Endpoint/binary>>, store, #{}, 5000),
    ?assertEqual([Endpoint], ?POOL:get_connected_peers()).

an_invalidated_link_is_closed_and_loses_nothing(Config) ->
    Endpoint = ?config(endpoint, Config),
    Node = ?config(node, Config),
    [begin
         ok = send_message(Endpoint, store, #{id => Id}, 5000),
         Id rem 100 =:= 0 andalso ?POOL:invalidate(Endpoint)
     end || Id <- lists:seq(1, 1000)],
    until(fun() -> macula_peer_test:count(Node) >= 1000 end),
    Ids = [Id || #{message := #{<<"id">> := Id}} <- macula_peer_test:received(Node)],
    ?assertEqual(lists:seq(1, 1000), Ids),
    until(fun() -> maps:get(unacknowledged_bytes, macula_peer_test:peer_stats(Endpoint)) =:= 0 end),
    ok = ?POOL:invalidate(binary_to_list(Endpoint)),
    ?assertEqual([], ?POOL:get_connected_peers()),
    until(fun() -> maps:get(accepted, macula_peer_test:stats(Node)) =:= [] end),
    #{dials := Dials} = macula_peer_test:peer_stats(Endpoint),
    ok = send_message(Endpoint, store, #{}, 5000),
    ?assertMatch(#{dials := Again} when Again =:= Dials + 1, macula_peer_test:peer_stats(Endpoint)),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()).

a_gateway_gets_messages_in_flight_once(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    [begin
         ok = send_message(Endpoint, store, #{n => N}, 5000),
         N rem 50 =:= 0 andalso ?POOL:invalidate(Endpoint)
     end || N <- lists:seq(1, 200)],
    until(fun() -> maps:get(received, macula_peer_fake_gateway:stats(Gateway)) >= 200 end),
    until(fun() -> maps:get(unacknowledged_bytes, macula_peer_test:peer_stats(Endpoint)) =:= 0 end),
    ?assertMatch(#{received := 200, distinct := 200}, macula_peer_fake_gateway:stats(Gateway)),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()),
    macula_peer_fake_gateway:stop(Gateway).

nonsense_is_not_invalidated(_Config) ->
    [?assertEqual(ok, ?POOL:invalidate(Nonsense)) || Nonsense <- [<<>>, <<"nowhere">>, 7, {a, b}, undefined, [300000]]].

there_is_no_connection_to_get(Config) ->
    Endpoint = ?config(endpoint, Config),
    ok = send_message(Endpoint, store, #{}, 5000),
    ?assertEqual({error, no_quicer_connection}, ?POOL:get_connection(Endpoint)),
    ?assertEqual(ok, ?POOL:return_connection(Endpoint, make_ref())),
    ?assertEqual(ok, ?POOL:put(Endpoint, make_ref())),
    ?assertMatch(#{pool_size := 1}, ?POOL:stats()).

%% The same steps as in macula's tests, with terms that are not connections.
the_pool_counts_the_connections_it_is_given(_Config) ->
    {ok, Pool} = ?POOL:start_link(#{max_connections => 3, idle_timeout_ms => 60000}),
    ?assertEqual(?ZEROS, ?POOL:stats()),
    ?assertEqual({error, no_quicer_connection}, ?POOL:get_connection(<<"127.0.0.1:9999">>)),
    ?assertMatch(#{misses := 1, total := 1, pool_size := 0}, ?POOL:stats()),
    [First | Others] = Endpoints = [<<"endpoint", N, ":1111">> || N <- "1234"],
    [begin
         ok = ?POOL:return_connection(Endpoint, {make_ref(), make_ref()}),
         %% Each is used after the one before.
         #{} = ?POOL:stats(),
         Used = erlang:monotonic_time(millisecond),
         until(fun() -> erlang:monotonic_time(millisecond) > Used end)
     end || Endpoint <- Endpoints],
    ?assertMatch(#{evictions := 1, pool_size := 3}, ?POOL:stats()),
    ?assertEqual(Others, ?POOL:get_connected_peers()),
    %% It is there already.
    ok = ?POOL:put(lists:last(Others), make_ref()),
    ?assertMatch(#{evictions := 1, pool_size := 3}, ?POOL:stats()),
    ok = ?POOL:invalidate(hd(Others)),
    ?assertMatch(#{pool_size := 2}, ?POOL:stats()),
    ok = ?POOL:put(First, make_ref()),
    ?assertMatch(#{evictions := 1, pool_size := 3}, ?POOL:stats()),
    %% A dead one is not handed out.
    ?assertEqual({error, no_quicer_connection}, ?POOL:get_connection(First)),
    ?assertMatch(#{misses := 2, pool_size := 2}, ?POOL:stats()),
    ok = gen_server:stop(Pool),
    ?assertEqual(?ZEROS, ?POOL:stats()).

%% With a quicer that says so.
the_pool_returns_live_connections(_Config) ->
    ok = quicer(),
    {ok, Pool} = ?POOL:start_link(#{idle_timeout_ms => 50}),
    Connections = [{Peer, make_ref()} || Peer <- [<<"a:1">>, <<"b:1">>]],
    [ok = ?POOL:return_connection(Peer, {Connection, self()}) || {Peer, Connection} <- Connections],
    [?assertEqual({ok, Connection, self()}, ?POOL:get_connection(Peer)) || {Peer, Connection} <- Connections],
    ?assertMatch(#{hits := 2, misses := 0, hit_rate := 100.0, pool_size := 2}, ?POOL:stats()),
    until(fun() ->
        Pool ! cleanup_idle_connections,
        #{pool_size := Size} = ?POOL:stats(),
        Size =:= 0
    end),
    [receive {closed, Connection} -> ok after 0 -> ct:fail(not_closed) end || {_, Connection} <- Connections],
    ok = gen_server:stop(Pool),
    true = code:delete(quicer),
    _ = code:purge(quicer).

%% A connection that is closed tells this process.
quicer() ->
    Source = ["-module(quicer).", "-export([getstat/2, async_shutdown_stream/3, async_shutdown_connection/3]).",
              "getstat(_, _) -> {ok, []}.", "async_shutdown_stream(_, _, _) -> ok.",
              "async_shutdown_connection(Connection, _, _) -> quicer_test ! {closed, Connection}, ok."],
    Forms = [begin {ok, Tokens, _} = erl_scan:string(Line), {ok, Form} = erl_parse:parse_form(Tokens), Form end || Line <- Source],
    {ok, quicer, Binary} = compile:forms(Forms),
    {module, quicer} = code:load_binary(quicer, "quicer", Binary),
    true = register(quicer_test, self()),
    ok.
