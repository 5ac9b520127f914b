%% Many callers of one cold peer share one dial.
-module(stampede_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [endpoint/1, in_parallel/2, until/1, peer_stats/1]).

-define(CALLERS, 1000).

suite() -> [{timetrap, {seconds, 60}}].

all() -> [a_thousand_senders_share_one_dial, a_thousand_requests_share_one_dial].

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    {Node, Port} = macula_peer_test:start_listener(),
    [{peer, {Node, endpoint(Port)}} | Config].

end_per_testcase(_Case, Config) ->
    {Node, _} = proplists:get_value(peer, Config),
    macula_peer_test:stop_node(Node),
    macula_peer_node:stop().

a_thousand_senders_share_one_dial(Config) ->
    {Node, Endpoint} = proplists:get_value(peer, Config),
    Results = in_parallel(?CALLERS, fun(I) ->
        macula_peer_connector:send_message(Endpoint, store, #{id => I}, 10000)
    end),
    ?assertEqual([ok], lists:usort(Results)),
    until(fun() -> macula_peer_test:ids(Node) =:= lists:seq(1, ?CALLERS) end),
    ?assertEqual(?CALLERS, length(macula_peer_test:received(Node))),
    one_link(Node, Endpoint),
    until(fun() -> maps:with([acknowledged, unacknowledged_bytes], peer_stats(Endpoint)) =:=
                       #{acknowledged => ?CALLERS, unacknowledged_bytes => 0} end).

a_thousand_requests_share_one_dial(Config) ->
    {Node, Endpoint} = proplists:get_value(peer, Config),
    Results = in_parallel(?CALLERS, fun(I) ->
        {ok, {pong, #{<<"timestamp">> := Time}}} =
            macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => I}, 20000),
        Time
    end),
    ?assertEqual(lists:seq(1, ?CALLERS), Results),
    one_link(Node, Endpoint).

one_link(Node, Endpoint) ->
    ?assertMatch(#{dials := 1, failed := 0, path := direct}, peer_stats(Endpoint)),
    ?assertMatch(#{accepted := [#{received := ?CALLERS}], refused := #{connections := 0}, malformed := 0}, macula_peer_test:stats(Node)).
