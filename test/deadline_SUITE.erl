%% Every function keeps its timeout, and a silent peer delays only its own callers.
-module(deadline_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/4, send_message_and_wait/4, send_message_nat_aware/5]).
-import(macula_peer_test, [closed_port/0, silent_port/0, endpoint/1, elapsed/1, in_parallel/2, until/1, rpc/2]).

%% How late a result may be on a busy machine: the least of several tries counts.
-define(SLACK, 100).
-define(TRIES, 5).
%% Deadlines are rounded to milliseconds.
-define(GRAIN, 2).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [a_silent_peer_costs_the_timeout, no_reply_costs_the_timeout, timeout_zero_costs_no_time,
     infinity_waits_for_a_peer_that_comes_late, a_closed_port_answers_before_the_timeout,
     a_silent_peer_delays_no_other, callers_of_a_silent_peer_have_each_their_own_deadline].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {endpoint, endpoint(Port)} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    {Socket, Port} = silent_port(),
    [{socket, Socket}, {silent_port, Port}, {silent, endpoint(Port)} | Config].

end_per_testcase(_Case, Config) ->
    gen_udp:close(?config(socket, Config)).

a_silent_peer_costs_the_timeout(Config) ->
    [takes(Timeout, fun() -> {error, {connect_failed, transport_down}} = Call(?config(silent, Config), Timeout) end)
     || Timeout <- [20, 300], Call <- [fun sends/2, fun asks/2]],
    Down = {error, {nat_connection_failed, {no_relay_available, no_bootstrap_peers}}},
    takes(300, fun() -> Down = sends_nat_aware(?config(silent, Config), 300) end),
    %% Two silent paths share the one timeout.
    RelayDown = {error, {nat_connection_failed, {relay_connect_failed, transport_down}}},
    Opts = #{endpoint => ?config(silent, Config), relay_endpoint => ?config(silent, Config), timeout => 300},
    takes(300, fun() -> RelayDown = send_message_nat_aware(<<"a">>, <<"b">>, store, #{}, Opts) end).

no_reply_costs_the_timeout(Config) ->
    Endpoint = ?config(endpoint, Config),
    Ask = fun(Timeout) -> send_message_and_wait(Endpoint, rpc_request, rpc(<<"never">>, 0), Timeout) end,
    {error, timeout} = Ask(1000),
    [takes(Timeout, fun() -> {error, timeout} = Ask(Timeout) end) || Timeout <- [20, 300]].

timeout_zero_costs_no_time(Config) ->
    [takes(0, fun() -> {error, _} = Call(?config(silent, Config), 0) end)
     || Call <- [fun sends/2, fun asks/2, fun sends_nat_aware/2]].

infinity_waits_for_a_peer_that_comes_late(Config) ->
    Endpoint = ?config(silent, Config),
    Calls = [fun sends/2, fun sends_nat_aware/2, fun pings/2],
    Callers = [spawn_monitor(fun() -> exit({result, Call(Endpoint, infinity)}) end) || Call <- Calls],
    until(fun() -> is_map(macula_peer_test:peer_stats(Endpoint)) end),
    %% Next to no time in which the port is closed, which would be an answer.
    Node = macula_peer_test:start_node(),
    ok = macula_peer_test:call(Node, macula_peer_node, start, []),
    ok = gen_udp:close(?config(socket, Config)),
    {ok, _} = macula_peer_test:call(Node, macula_peer_test, listen, [#{port => ?config(silent_port, Config)}]),
    [receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual({result, ok}, Reason) end
     || {Pid, Monitor} <- Callers],
    macula_peer_test:stop_node(Node).

a_closed_port_answers_before_the_timeout(_Config) ->
    [takes(0, fun() -> {error, {connect_failed, transport_down}} = Call(endpoint(closed_port()), Timeout) end)
     || Timeout <- [5000, infinity], Call <- [fun sends/2, fun asks/2]].

a_silent_peer_delays_no_other(Config) ->
    Self = self(),
    Waiters = [spawn_monitor(fun() ->
                   Self ! waiting,
                   exit({result, sends(?config(silent, Config), 30000)})
               end) || _ <- lists:seq(1, 50)],
    [receive waiting -> ok end || _ <- Waiters],
    until(fun() -> maps:get(unacknowledged_bytes, macula_peer_test:peer_stats(?config(silent, Config))) >= 50 * 9 end),
    {Ms, _} = elapsed(fun() -> [ok = sends(?config(endpoint, Config), 5000) || _ <- lists:seq(1, 100)] end),
    ?assert(Ms < 5000),
    %% None of them was let go meanwhile.
    ?assertEqual(50, length([Pid || {Pid, _} <- Waiters, is_process_alive(Pid)])),
    [exit(Pid, kill) || {Pid, _} <- Waiters].

callers_of_a_silent_peer_have_each_their_own_deadline(Config) ->
    Elapsed = in_parallel(20, fun(I) ->
        {Ms, {error, {connect_failed, transport_down}}} = elapsed(fun() -> sends(?config(silent, Config), I * 50) end),
        Ms - I * 50
    end),
    ?assertEqual([], [Late || Late <- Elapsed, Late < -?GRAIN]),
    ?assert(lists:min(Elapsed) < ?SLACK).

%% Not before the timeout, and not long after it.
takes(Timeout, Fun) ->
    All = [element(1, elapsed(Fun)) || _ <- lists:seq(1, ?TRIES)],
    ?assertEqual([], [Early || Early <- All, Early < Timeout - ?GRAIN]),
    ?assert(lists:min(All) < Timeout + ?SLACK, {All, Timeout}).

sends(Endpoint, Timeout) -> send_message(Endpoint, store, #{}, Timeout).

asks(Endpoint, Timeout) -> send_message_and_wait(Endpoint, store, #{}, Timeout).

pings(Endpoint, Timeout) ->
    {ok, {pong, _}} = send_message_and_wait(Endpoint, ping, #{timestamp => 1}, Timeout),
    ok.

sends_nat_aware(Endpoint, Timeout) ->
    send_message_nat_aware(<<"a">>, <<"b">>, store, #{}, #{endpoint => Endpoint, timeout => Timeout}).
