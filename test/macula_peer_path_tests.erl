%% The ways to a node, without a network: what is tried, in which order, with which share of the time.
-module(macula_peer_path_tests).

-include_lib("eunit/include/eunit.hrl").

-define(NODE, <<"node">>).

first(Opts, Results) ->
    Self = self(),
    Send = fun(Endpoint, Left) ->
        Self ! {tried, Endpoint, Left},
        maps:get(Endpoint, Results, {error, {connect_failed, transport_down}})
    end,
    Result = macula_peer_path:first(?NODE, Opts, 1000, Send),
    {Result, tried()}.

tried() ->
    receive {tried, Endpoint, Left} -> [{Endpoint, Left} | tried()] after 0 -> [] end.

endpoint_first_test() ->
    ?assertMatch({ok, [{<<"a:1">>, Left}]} when Left =< 500,
                 first(#{endpoint => <<"a:1">>, relay_endpoint => <<"r:1">>}, #{<<"a:1">> => ok})).

all_the_time_for_the_only_way_test() ->
    without_bootstrap_peers(fun() ->
        ?assertMatch({ok, [{<<"a:1">>, Left}]} when Left > 900, first(#{endpoint => <<"a:1">>}, #{<<"a:1">> => ok}))
    end).

relay_after_a_dead_endpoint_test() ->
    ?assertMatch({ok, [{<<"a:1">>, _}, {<<"r:1">>, _}]},
                 first(#{endpoint => <<"a:1">>, relay_endpoint => <<"r:1">>}, #{<<"r:1">> => ok})).

spellings_of_a_relay_test() ->
    [?assertMatch({ok, [{<<"r:1">>, _}]}, first(#{relay_endpoint => Relay}, #{<<"r:1">> => ok}))
     || Relay <- [<<"r:1">>, {<<"r">>, 1}, {"r", 1}, {ok, <<"r">>, 1}, {ok, "r", 1}]].

unreachable_relay_test() ->
    ?assertMatch({{error, {nat_connection_failed, {relay_connect_failed, transport_down}}}, _},
                 first(#{relay_endpoint => <<"r:1">>}, #{})).

no_way_test() ->
    without_bootstrap_peers(fun() ->
        ?assertEqual({{error, {nat_connection_failed, {no_relay_available, no_bootstrap_peers}}}, []}, first(#{}, #{}))
    end).

bootstrap_peers_test_() ->
    Cases = [{"https://b:1,c:2", {ok, [{"https://b:1", any}]}},
             {" b:1 ", {ok, [{"b:1", any}]}},
             {"b", {error, invalid_bootstrap_format}},
             {"b:x", {error, invalid_bootstrap_port}},
             {"b:0", {error, invalid_bootstrap_port}}],
    [{Value, fun() -> with_bootstrap_peers(Value, fun() -> bootstrap(Expected) end) end} || {Value, Expected} <- Cases].

bootstrap({ok, [{Peer, any}]}) ->
    ?assertMatch({ok, [{Peer, _}]}, first(#{}, #{Peer => ok}));
bootstrap({error, Reason}) ->
    ?assertEqual({{error, {nat_connection_failed, {no_relay_available, Reason}}}, []}, first(#{}, #{})).

%% A lookup that hangs, exits or answers nonsense costs its deadline at most.
lookup_test_() ->
    [fun() -> ?assertEqual({error, endpoint_not_found}, macula_peer_resolver:endpoint(?NODE, 100)) end,
     fun() -> ?assertEqual({error, endpoint_not_found}, macula_peer_resolver:endpoint(not_a_node_id, 100)) end].

without_bootstrap_peers(Fun) ->
    with_bootstrap_peers("", Fun).

with_bootstrap_peers(Value, Fun) ->
    Before = os:getenv("MACULA_BOOTSTRAP_PEERS", ""),
    true = os:putenv("MACULA_BOOTSTRAP_PEERS", Value),
    try Fun() after os:putenv("MACULA_BOOTSTRAP_PEERS", Before) end.
