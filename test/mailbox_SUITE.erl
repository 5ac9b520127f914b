%% A caller gets its result as the return value and nothing else, and a caller that dies takes its call along.
-module(mailbox_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/4, send_message_and_wait/4, send_message_nat_aware/5]).
-import(macula_peer_test, [closed_port/0, silent_port/0, endpoint/1, in_parallel/2, until/1, peer_stats/1, rpc/2]).

-define(PROCESSES, 8).
-define(CALLS, 1250).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [ten_thousand_mixed_calls_leave_the_mailbox_empty, late_replies_go_nowhere,
     a_dead_callers_message_is_not_sent, a_dead_callers_request_is_not_sent].

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

%% `in_parallel' looks into the mailboxes.
ten_thousand_mixed_calls_leave_the_mailbox_empty(Config) ->
    Live = ?config(endpoint, Config),
    Silent = ?config(silent, Config),
    Closed = endpoint(closed_port()),
    in_parallel(?PROCESSES, fun(_) ->
        [mixed(I, Live, Silent, Closed) || I <- lists:seq(1, ?CALLS)],
        until(fun() -> held(Live) =:= 0 andalso held(Silent) =:= 0 andalso held(Closed) =:= 0 end)
    end).

mixed(I, Live, _, _) when I rem 100 =:= 0 ->
    {error, timeout} = send_message_and_wait(Live, rpc_request, rpc(<<"never">>, 0), 1);
mixed(I, _, Silent, _) when I rem 100 =:= 20 ->
    {error, _} = send_message(Silent, store, #{}, 1);
mixed(I, _, Silent, _) when I rem 100 =:= 40 ->
    {error, _} = send_message_and_wait(Silent, store, #{}, 1);
mixed(I, _, _, Closed) when I rem 100 =:= 60 ->
    {error, _} = send_message(Closed, store, #{}, 1000);
mixed(I, _, _, Closed) when I rem 100 =:= 80 ->
    {error, _} = send_message_nat_aware(<<"a">>, <<"b">>, store, #{}, #{endpoint => Closed, timeout => 100});
mixed(I, Live, _, _) when I rem 10 =:= 1 ->
    {ok, {pong, #{<<"timestamp">> := I}}} = send_message_and_wait(Live, ping, #{timestamp => I}, 10000);
mixed(I, Live, _, _) when I rem 10 =:= 2 ->
    {error, {invalid_message, _}} = send_message(Live, ping, #{}, 10000);
mixed(I, _, _, _) when I rem 10 =:= 3 ->
    {error, {invalid_endpoint, _}} = send_message_and_wait(<<"host">>, store, #{}, 10000);
mixed(_, Live, _, _) ->
    ok = send_message(Live, cast, #{}, 10000).

late_replies_go_nowhere(Config) ->
    Live = ?config(endpoint, Config),
    %% On a busy machine making the link may take longer than the first timeout.
    {ok, _} = send_message_and_wait(Live, ping, #{timestamp => 1}, 10000),
    in_parallel(20, fun(_) ->
        {error, timeout} = send_message_and_wait(Live, rpc_request, rpc(<<"late">>, 300), 100),
        %% A later request on the same link is answered after the late reply came.
        {ok, _} = send_message_and_wait(Live, rpc_request, rpc(<<"late">>, 600), 10000)
    end),
    until(fun() -> held(Live) =:= 0 end).

a_dead_callers_message_is_not_sent(Config) ->
    dies_waiting(Config, fun(Endpoint, Message) -> send_message(Endpoint, store, Message, 30000) end).

a_dead_callers_request_is_not_sent(Config) ->
    dies_waiting(Config, fun(Endpoint, Message) -> send_message_and_wait(Endpoint, store, Message, 30000) end).

dies_waiting(Config, Call) ->
    Endpoint = ?config(silent, Config),
    Callers = [spawn(fun() -> Call(Endpoint, #{id => Id}) end) || Id <- lists:seq(1, 10)],
    until(fun() -> held(Endpoint) >= 10 * 10 end),
    [exit(Caller, kill) || Caller <- Callers],
    until(fun() -> held(Endpoint) =:= 0 end),
    ok = gen_udp:close(?config(socket, Config)),
    {Node, _} = macula_peer_test:start_listener(?config(silent_port, Config)),
    until(fun() -> send_message(Endpoint, store, #{id => 11}, 5000) =:= ok end),
    until(fun() -> macula_peer_test:ids(Node) =/= [] end),
    ?assertEqual([11], macula_peer_test:ids(Node)),
    until(fun() -> held(Endpoint) =:= 0 end),
    macula_peer_test:stop_node(Node).

held(Endpoint) ->
    case peer_stats(Endpoint) of
        #{unacknowledged_bytes := Bytes} -> Bytes;
        none -> 0
    end.
