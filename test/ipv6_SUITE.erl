%% IPv6 addresses work as peers, with and without brackets.
-module(ipv6_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/3, send_message/4, send_message_and_wait/4]).
-import(macula_peer_test, [endpoint/2, until/1]).

-define(LOOPBACK, {0, 0, 0, 0, 0, 0, 0, 1}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [every_spelling_is_one_peer, a_closed_port_is_down, a_bad_bracket_is_refused, the_sender_is_seen_with_its_address,
     a_listener_at_one_address_reports_that_address, answers_come_back, the_other_family_is_refused_at_once,
     a_node_at_one_address_reaches_the_gateway].

init_per_suite(Config) ->
    case gen_udp:open(0, [inet6, {ip, ?LOOPBACK}]) of
        {ok, Socket} ->
            ok = gen_udp:close(Socket),
            {Node, Port} = macula_peer_test:start_listener(),
            [{node, Node}, {port, Port} | Config];
        {error, Reason} ->
            {skip, {"this host has no IPv6 loopback: IPv6 is not tested", Reason}}
    end.

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    Config.

every_spelling_is_one_peer(Config) ->
    Hosts = ["::1", "[::1]", "https://[::1]", "https://::1", "http://[::1]", "[0:0:0:0:0:0:0:1]", "0:0::1"],
    [ok = send_message(Endpoint, store, #{})
     || Host <- Hosts, Binary <- [endpoint(Host, ?config(port, Config))], Endpoint <- [Binary, binary_to_list(Binary)]],
    Known = endpoint("[::1]", ?config(port, Config)),
    ?assertMatch(#{peers := [#{endpoint := Known, dials := 1, address := {?LOOPBACK, _}}]},
                 macula_peer_node:stats()),
    until(fun() -> maps:get(acknowledged, macula_peer_test:peer_stats(Known)) =:= 2 * length(Hosts) end).

a_closed_port_is_down(_Config) ->
    Port = macula_peer_test:closed_port(),
    Elapsed = [element(1, macula_peer_test:elapsed(fun() ->
                   {error, {connect_failed, transport_down}} = send_message(endpoint(Host, Port), store, #{}, 5000)
               end)) || Host <- ["::1", "[::1]", "https://[::1]", "::1"]],
    ?assert(lists:min(Elapsed) < 100).

a_bad_bracket_is_refused(_Config) ->
    [?assertMatch({error, {invalid_endpoint, _}}, send_message(Endpoint, store, #{}))
     || Endpoint <- [<<"[::1:9443">>, <<"::1]:9443">>, <<"[]:9443">>, <<"[host]:9443">>, <<"[::1]">>, <<"[::1]:">>]].

the_sender_is_seen_with_its_address(Config) ->
    {ok, {_, Own}} = macula_peer_node:local_address(),
    [begin
         Id = erlang:unique_integer([positive]),
         ok = send_message(endpoint(Host, ?config(port, Config)), store, #{id => Id}),
         until(fun() -> from(Config, Id) =/= [] end),
         ?assertEqual([{Ip, Own}], from(Config, Id))
     end || {Host, Ip} <- [{"[::1]", ?LOOPBACK}, {"127.0.0.1", {127, 0, 0, 1}}]].

from(Config, Id) ->
    Received = macula_peer_test:received(?config(node, Config)),
    [From || #{from := From, message := #{<<"id">> := I}} <- Received, I =:= Id].

a_listener_at_one_address_reports_that_address(_Config) ->
    ?assertMatch({ok, {?LOOPBACK, _}}, macula_peer_node:listen(#{ip => ?LOOPBACK, handler => self()})),
    {ok, {?LOOPBACK, Port}} = macula_peer_node:local_address(),
    ok = send_message(endpoint("::1", Port), store, #{}),
    receive {macula_peer_message, #{from := From}} -> ?assertEqual({?LOOPBACK, Port}, From) end.

answers_come_back(Config) ->
    ?assertMatch({ok, {pong, _}},
                 send_message_and_wait(endpoint("[::1]", ?config(port, Config)), ping, #{timestamp => 1}, 5000)).

%% A socket bound to one address cannot send from another.
the_other_family_is_refused_at_once(Config) ->
    Port = ?config(port, Config),
    NotSupported = {error, {connect_failed, address_family_not_supported}},
    [begin
         macula_peer_test:engine(#{ip => Ip}),
         {Elapsed, Results} = macula_peer_test:elapsed(fun() ->
             [send_message(endpoint(Other, Port), store, #{}, 5000),
              send_message_and_wait(endpoint(Other, Port), ping, #{timestamp => 1}, 5000)]
         end),
         ?assertEqual([NotSupported, NotSupported], Results),
         ?assert(Elapsed < 1000),
         %% Of a name's addresses the reachable ones are used.
         ?assertEqual(ok, send_message(endpoint("localhost", Port), store, #{}))
     end || {Ip, Other} <- [{?LOOPBACK, "127.0.0.1"}, {{127, 0, 0, 1}, "[::1]"}]].

%% It is on this host, at any address of this node.
a_node_at_one_address_reaches_the_gateway(Config) ->
    Sender = ?config(node, Config),
    Ask = fun(Host, Bound) ->
        macula_peer_test:call(Sender, macula_peer_connector, send_message_and_wait,
                              [endpoint(Host, Bound), find_value, #{key => <<"k">>}, 5000])
    end,
    [begin
         Gateway = macula_peer_fake_gateway:start(["--bind", Bind ++ ":0"]),
         At = endpoint(Bind, macula_peer_fake_gateway:port(Gateway)),
         [begin
              macula_peer_test:engine(#{ip => Ip, gateway => To}),
              {ok, {_, Bound}} = macula_peer_node:listen(#{}),
              ?assertMatch({Ip, To, {ok, {find_value_reply, _}}}, {Ip, To, Ask(Host, Bound)}),
              ?assertMatch(#{gateway := #{handed_over := 1, answered := 1}}, macula_peer_node:stats())
          end || {Ip, Host} <- [{?LOOPBACK, "[::1]"}, {{127, 0, 0, 1}, "127.0.0.1"}], To <- [At | Names(Gateway)]],
         macula_peer_fake_gateway:stop(Gateway)
     end || {Bind, Names} <- [{"127.0.0.1", fun(G) -> [endpoint("localhost", macula_peer_fake_gateway:port(G))] end},
                              {"[::1]", fun(_) -> [] end}]].
