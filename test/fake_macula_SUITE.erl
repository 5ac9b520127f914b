%% The fake of macula (test_apps/macula) behaves as macula is known to, so that results with it hold for macula.
-module(fake_macula_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1]).

-define(TIMEOUT, 5000).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [the_gateway_answers_on_the_stream, a_chunk_is_one_frame, without_a_stream_answers_go_nowhere,
     the_gateway_has_variants, servers_answer_as_macula, servers_are_slow, servers_answer_strangely,
     servers_crash_and_come_again, servers_are_absent].

init_per_suite(Config) ->
    [{ebin, macula_peer_macula:build()} | Config].

end_per_suite(_Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    ok = macula_peer_test:engine(#{}),
    Port = macula_peer_test:free_port(),
    Node = macula_peer_macula:start_node(?config(ebin, Config), #{macula => #{port => Port, node_id => <<"one">>}}),
    [{node, Node}, {endpoint, macula_peer_test:endpoint(Port)} | Config].

end_per_testcase(_Case, Config) ->
    ok = macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

%% ---- the gateway ----

the_gateway_answers_on_the_stream(Config) ->
    Node = ?config(node, Config),
    ok = call(Node, macula_gateway, handle, [<<"double">>, fun ?MODULE:double/1]),
    {ok, {_, Port}} = macula_peer_node:local_address(),
    ?assertMatch({ok, {pong, #{<<"timestamp">> := 7, <<"server_time">> := _}}}, ask(Config, ping, #{timestamp => 7})),
    ?assertMatch({ok, {nat_probe_reply, #{<<"reflexive_ip">> := <<"127.0.0.1">>, <<"reflexive_port">> := Port}}},
                 ask(Config, nat_probe, #{node_id => <<"me">>, local_port => 1})),
    ?assertMatch({ok, {find_value_reply, #{<<"nodes">> := []}}}, ask(Config, find_value, #{key => <<"k">>})),
    ?assertMatch({ok, {reply, #{<<"stored">> := <<"k">>}}}, ask(Config, store, #{key => <<"k">>, value => <<"v">>})),
    ?assertMatch({ok, {find_value_reply, #{<<"value">> := [<<"v">>]}}}, ask(Config, find_value, #{key => <<"k">>})),
    ?assertMatch({ok, {find_node_reply, #{<<"nodes">> := []}}}, ask(Config, find_node, #{target => <<"k">>})),
    ?assertMatch({ok, {rpc_reply, #{<<"request_id">> := <<"r">>, <<"from_node">> := <<"one">>, <<"result">> := 42}}},
                 ask(Config, rpc_request, rpc_request(<<"double">>, 21))),
    ?assertMatch([{ping, _, {{127, 0, 0, 1}, Port}, ok} | _], call(Node, macula_gateway, received, [])).

%% Runs in the node.
double(N) -> 2 * N.

a_chunk_is_one_frame(Config) ->
    Node = ?config(node, Config),
    {ok, One} = macula_peer_wire:encode(cast, #{n => 1}),
    {ok, Two} = macula_peer_wire:encode(cast, #{n => 2}),
    %% The listener's own line for a chunk, which is the same for every sender.
    ok = call(Node, ?MODULE, chunk, [<<One/binary, Two/binary>>]),
    ok = call(Node, ?MODULE, chunk, [binary:part(One, 0, 9)]),
    ok = call(Node, ?MODULE, chunk, [Two]),
    until(fun() -> length(call(Node, macula_gateway, received, [])) =:= 2 end),
    ?assertMatch([{cast, #{<<"n">> := 1}, _, _}, {cast, #{<<"n">> := 2}, _, _}],
                 call(Node, macula_gateway, received, [])).

%% Runs in the node.
chunk(Bytes) ->
    #{port := Port} = sys:get_state(macula_gateway_listener),
    Line = "received 999 127.0.0.1:1 " ++ binary_to_list(binary:encode_hex(Bytes)),
    macula_gateway_listener ! {Port, {data, {eol, Line}}},
    ok.

without_a_stream_answers_go_nowhere(Config) ->
    Node = ?config(node, Config),
    Routed = {route_message, ping, #{<<"timestamp">> => 1}, make_ref(), {ok, {{127, 0, 0, 1}, 1}}},
    ok = call(Node, gen_server, cast, [macula_gateway, Routed]),
    until(fun() -> call(Node, macula_gateway, received, []) =/= [] end),
    ?assertMatch([{ping, _, _, {error, badarg}}], call(Node, macula_gateway, received, [])).

the_gateway_has_variants(Config) ->
    Node = ?config(node, Config),
    Ping = fun(Timeout) ->
        macula_peer_connector:send_message_and_wait(?config(endpoint, Config), ping, #{timestamp => 7}, Timeout)
    end,
    ok = call(Node, macula_variant, set, [macula_gateway, wrong]),
    ?assertMatch({ok, {disconnect, _}}, Ping(?TIMEOUT)),
    ok = call(Node, macula_variant, set, [macula_gateway, crashing]),
    ?assertEqual({error, timeout}, Ping(500)),
    ok = call(Node, macula_variant, set, [macula_gateway, absent]),
    ?assertEqual({error, timeout}, Ping(500)),
    ok = call(Node, macula_variant, set, [macula_gateway, slow]),
    ?assertEqual({error, timeout}, Ping(500)),
    ok = call(Node, macula_variant, set, [macula_gateway_listener, absent]),
    ?assertMatch({error, _}, Ping(500)),
    ok = call(Node, macula_variant, set, [macula_gateway, absent]),
    ok = call(Node, macula_variant, set, [macula_gateway, normal]),
    ok = call(Node, macula_variant, set, [macula_gateway_listener, normal]),
    ?assertMatch({ok, {pong, _}}, Ping(?TIMEOUT)).

%% ---- the other servers ----

servers_answer_as_macula(Config) ->
    Node = ?config(node, Config),
    Key = call(Node, macula_routing_server, peer_endpoint_key, [<<"two">>]),
    Where = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => 9443},
    ?assertEqual({nodes, []}, find_value(Node, Key)),
    ok = call(Node, macula_routing_server, store_local, [Key, Where]),
    ?assertEqual({ok, [Where]}, find_value(Node, Key)),
    ?assertEqual(not_found, call(Node, macula_nat_cache, get_from_dht, [<<"two">>])),
    ok = call(Node, macula_nat_cache, put, [<<"two">>, #{mapping_policy => ei}]),
    ?assertEqual({ok, #{mapping_policy => ei}}, call(Node, macula_nat_cache, get_from_dht, [<<"two">>])),
    ?assertEqual({error, no_relays_available}, call(Node, macula_relay_registry, find_relay, [<<>>])),
    ok = call(Node, macula_relay_registry, set, [[{<<"relay">>, 1}]]),
    ?assertMatch({ok, #{endpoint := {<<"relay">>, 1}}}, call(Node, macula_relay_registry, find_relay, [<<>>])),
    {ok, relay, Session} = call(Node, macula_nat_coordinator, request_connection, [<<"one">>, <<"two">>]),
    ok = call(Node, macula_nat_coordinator, report_result, [Session, <<"one">>, success]),
    ?assertEqual([{<<"one">>, <<"two">>, Session, [{<<"one">>, success}]}],
                 call(Node, macula_nat_coordinator, results, [])).

servers_are_slow(Config) ->
    Node = ?config(node, Config),
    ok = call(Node, macula_variant, set, [slow]),
    Took = macula_peer_test:in_parallel(4, fun(N) ->
        {Ms, _} = macula_peer_test:elapsed(fun() -> ask_server(Node, N) end),
        Ms
    end),
    ?assert(lists:min(Took) >= 5000).

servers_answer_strangely(Config) ->
    Node = ?config(node, Config),
    ok = call(Node, macula_variant, set, [wrong]),
    %% An exit would fail the case.
    [ask_server(Node, N) || N <- lists:seq(1, 4)],
    ok.

servers_crash_and_come_again(Config) ->
    Node = ?config(node, Config),
    ok = call(Node, macula_variant, set, [crashing]),
    _ = [?assertExit(_, ask_server(Node, N)) || N <- lists:seq(1, 4), _ <- [1, 2]],
    ok = call(Node, macula_variant, set, [normal]),
    ?assertEqual(not_found, ask_server(Node, 2)).

servers_are_absent(Config) ->
    Node = ?config(node, Config),
    ok = call(Node, macula_variant, set, [absent]),
    _ = [?assertExit(_, ask_server(Node, N)) || N <- lists:seq(1, 4)],
    ok = call(Node, macula_variant, set, [normal]),
    ?assertEqual(not_found, ask_server(Node, 2)).

ask_server(Node, 1) -> find_value(Node, <<"k">>);
ask_server(Node, 2) -> call(Node, macula_nat_cache, get_from_dht, [<<"two">>]);
ask_server(Node, 3) -> call(Node, macula_nat_coordinator, request_connection, [<<"one">>, <<"two">>]);
ask_server(Node, 4) -> call(Node, macula_relay_registry, find_relay, [<<>>]).

find_value(Node, Key) ->
    call(Node, macula_routing_server, find_value, [macula_routing_server, Key, 20]).

%% ---- common ----

ask(Config, Type, Message) ->
    macula_peer_connector:send_message_and_wait(?config(endpoint, Config), Type, Message, ?TIMEOUT).

rpc_request(Procedure, Args) ->
    #{request_id => <<"r">>, procedure => Procedure, args => Args, from_node => <<"me">>}.
