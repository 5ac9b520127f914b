%% Calls wait for what stalls for a while: an interface of this host or of the peer's, or a peer that is stopped.
-module(outage_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, until/2, ids/1, count/1, elapsed/1]).

%% How long an interface is down, and how long calls have, in milliseconds.
-define(DOWN, 1500).
-define(TIMEOUT, 10000).
%% How long a call that fails at once may take on a busy machine.
-define(AT_ONCE, 1000).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [calls_wait_for_an_interface_of_this_host, calls_wait_for_an_address_of_this_host,
     calls_wait_for_an_interface_of_the_peer, an_answer_outlives_the_address_that_was_asked,
     a_stopped_peer_is_dialled_once_and_not_each_time].

init_per_suite(Config) ->
    macula_peer_net:init_suite(Config).

end_per_suite(_Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    [A, B] = Hosts = macula_peer_net:start(2),
    [Sender, Listener] = [macula_peer_relays:start_member(Host, #{gateway => none}) || Host <- Hosts],
    {ok, {_, Port}} = call(Listener, macula_peer_test, listen, [#{}]),
    Endpoint = macula_peer_net:endpoint(B, Port),
    ?assertEqual(ok, send(Sender, Endpoint, 0, ?TIMEOUT)),
    until(fun() -> ids(Listener) =:= [0] end),
    [{sender, Sender}, {listener, Listener}, {endpoint, Endpoint}, {a, A}, {b, B} | Config].

end_per_testcase(_Case, _Config) ->
    macula_peer_net:stop().

calls_wait_for_an_interface_of_this_host(Config) ->
    A = ?config(a, Config),
    calls_wait(Config, fun() -> macula_peer_net:ip(A, "link set eth0 down") end,
               fun() -> macula_peer_net:ip(A, "link set eth0 up") end),
    %% Calls do not wait for a destination that was never reached.
    macula_peer_net:ip(A, "link set eth0 down"),
    {Ms, Result} = elapsed(fun() -> send(?config(sender, Config), <<"10.77.0.77:9">>, 0, ?TIMEOUT) end),
    ?assertEqual({error, {connect_failed, transport_down}}, Result),
    ?assert(Ms < ?AT_ONCE).

calls_wait_for_an_address_of_this_host(Config) ->
    Addresses = [{macula_peer_net:address(?config(a, Config)), 24}],
    calls_wait(Config, fun() -> macula_peer_net:take(?config(a, Config), "eth0", Addresses) end,
               fun() -> macula_peer_net:give(?config(a, Config), "eth0", Addresses) end).

calls_wait_for_an_interface_of_the_peer(Config) ->
    B = ?config(b, Config),
    calls_wait(Config, fun() -> macula_peer_net:ip(B, "link set eth0 down") end,
               fun() -> macula_peer_net:ip(B, "link set eth0 up") end).

%% The answer leaves from the peer's other address, from which QUIC takes nothing on this connection (RFC 9000, section 9).
an_answer_outlives_the_address_that_was_asked(Config) ->
    [Sender, Listener, Endpoint, B] = [?config(Key, Config) || Key <- [sender, listener, endpoint, b]],
    Other = {10, 77, 0, 200},
    ok = macula_peer_net:give(B, "eth0", [{Other, 16}]),
    [_, Port] = string:split(Endpoint, ":"),
    OtherEndpoint = macula_peer_net:endpoint(Other, binary_to_integer(Port)),
    Asked = spawn_monitor(fun() ->
        exit(call(Sender, macula_peer_node, request,
                  [<<"b">>, rpc_request, macula_peer_test:rpc(<<"late">>, 1500), ?TIMEOUT, #{endpoint => Endpoint}]))
    end),
    until(fun() -> count(Listener) =:= 2 end),
    ok = call(Sender, macula_peer_connector, send_message_nat_aware,
              [<<"a">>, <<"b">>, store, #{id => 1}, #{endpoint => OtherEndpoint, timeout => ?TIMEOUT}]),
    until(fun() -> ids(Listener) =:= [0, 1] end),
    ok = macula_peer_net:take(B, "eth0", [{macula_peer_net:address(B), 24}]),
    {Asker, Monitor} = Asked,
    receive {'DOWN', Monitor, process, Asker, Answer} -> ?assertMatch({ok, {rpc_reply, #{<<"result">> := <<"late">>}}}, Answer) end,
    ?assertEqual(3, count(Listener)).

%% Messages and requests that start at different times of the outage.
calls_wait(Config, Down, Up) ->
    [Sender, Endpoint] = [?config(Key, Config) || Key <- [sender, endpoint]],
    _ = Down(),
    Calls = [fun() -> timer:sleep(Id * 60), send(Sender, Endpoint, Id, ?TIMEOUT) end || Id <- lists:seq(1, 20)] ++
            [fun() -> timer:sleep(At), ping(Sender, Endpoint) end || At <- [0, 700]],
    Callers = [spawn_monitor(fun() -> exit({result, Call()}) end) || Call <- Calls],
    timer:sleep(?DOWN),
    _ = Up(),
    Results = [receive {'DOWN', Monitor, process, Pid, Reason} -> Reason end || {Pid, Monitor} <- Callers],
    ?assertEqual([{result, ok}], lists:usort(Results)),
    Listener = ?config(listener, Config),
    until(fun() -> ids(Listener) =:= lists:seq(0, 20) end),
    ?assertEqual(21, count(Listener) - length([ping || #{type := ping} <- macula_peer_test:received(Listener)])).

%% Stopped nine tenths of the time, as a container at its processor limit.
a_stopped_peer_is_dialled_once_and_not_each_time(Config) ->
    [Sender, Listener, Endpoint] = [?config(Key, Config) || Key <- [sender, listener, endpoint]],
    Pid = call(Listener, os, getpid, []),
    Stopping = spawn_monitor(fun() ->
        [begin
             os:cmd("kill -STOP " ++ Pid), timer:sleep(900),
             os:cmd("kill -CONT " ++ Pid), timer:sleep(100)
         end || _ <- lists:seq(1, 10)]
    end),
    [?assertEqual(ok, send(Sender, Endpoint, Id, ?TIMEOUT)) || Id <- lists:seq(1, 90), ok =:= timer:sleep(100)],
    {Stopper, Monitor} = Stopping,
    receive {'DOWN', Monitor, process, Stopper, Reason} -> ?assertEqual(normal, Reason) end,
    until(fun() -> ids(Listener) =:= lists:seq(0, 90) end, 15000),
    ?assertEqual(91, count(Listener)),
    #{dials := Dials} = call(Sender, macula_peer_test, peer_stats, [Endpoint]),
    ct:pal("~b dials", [Dials]),
    ?assert(Dials =< 4).

send(Node, Endpoint, Id, Timeout) ->
    call(Node, macula_peer_connector, send_message, [Endpoint, store, #{id => Id}, Timeout]).

ping(Node, Endpoint) ->
    case call(Node, macula_peer_connector, send_message_and_wait, [Endpoint, ping, #{timestamp => 1}, ?TIMEOUT]) of
        {ok, {pong, _}} -> ok;
        Error -> Error
    end.
