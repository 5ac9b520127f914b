%% The laboratory of macula_peer_net: hosts that reach each other, firewalls that drop unsolicited packets, paths with
%% the configured delay, and nothing left of it afterwards.
-module(net_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, await/2, ids/1]).

%% What a deadline may be late by on a busy machine, in milliseconds. A dial that is not answered takes longer.
-define(LATE, 2000).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [every_host_reaches_every_other, a_firewall_drops_unsolicited_packets, a_firewall_passes_answers,
     an_opened_firewall_passes_all, a_forwarder_takes_its_time_in_both_directions, a_capture_has_the_packets_that_pass,
     nodes_send_to_each_other, a_firewalled_node_cannot_be_reached, a_firewalled_node_reaches_others,
     nothing_is_left_after_the_end, nothing_is_left_of_a_run_that_died].

init_per_suite(Config) ->
    macula_peer_net:init_suite(Config).

end_per_suite(_Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    [{hosts, macula_peer_net:start(3)} | Config].

end_per_testcase(_Case, _Config) ->
    macula_peer_net:stop().

%% ---- packets ----

every_host_reaches_every_other(Config) ->
    Sockets = [{Host, macula_peer_net:socket(Host, 4000)} || Host <- ?config(hosts, Config)],
    [reaches(From, To) || From <- Sockets, To <- Sockets, From =/= To].

%% What is not to arrive is waited for until the firewall has counted it.
a_firewall_drops_unsolicited_packets(Config) ->
    [Inside, Outside, Other] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(Inside),
    {_, Socket} = Protected = {Inside, macula_peer_net:socket(Inside, 4000)},
    Asked = {Outside, macula_peer_net:socket(Outside, 4000)},
    Others = [{Outside, macula_peer_net:socket(Outside, 4001)}, {Other, macula_peer_net:socket(Other, 4000)}],
    [send(From, Protected, <<"unasked">>) || From <- [Asked | Others]],
    until(fun() -> macula_peer_net:dropped(Inside) =:= 3 end),
    %% Having asked one does not let others in.
    reaches(Protected, Asked),
    [send(From, Protected, <<"unasked">>) || From <- Others],
    until(fun() -> macula_peer_net:dropped(Inside) =:= 5 end),
    ?assertEqual({error, timeout}, gen_udp:recv(Socket, 0, 0)).

a_firewall_passes_answers(Config) ->
    [Inside, Outside, _] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(Inside),
    Asking = {Inside, macula_peer_net:socket(Inside, 4000)},
    Answering = {Outside, macula_peer_net:socket(Outside, 4000)},
    reaches(Asking, Answering),
    [reaches(Answering, Asking) || _ <- lists:seq(1, 10)],
    ?assertEqual(0, macula_peer_net:dropped(Inside)).

an_opened_firewall_passes_all(Config) ->
    [Inside, Outside, _] = ?config(hosts, Config),
    %% A second one is the same as one.
    ok = macula_peer_net:firewall(Inside),
    ok = macula_peer_net:firewall(Inside),
    Protected = {Inside, macula_peer_net:socket(Inside, 4000)},
    From = {Outside, macula_peer_net:socket(Outside, 4000)},
    send(From, Protected, <<"dropped">>),
    until(fun() -> macula_peer_net:dropped(Inside) =:= 1 end),
    ok = macula_peer_net:open(Inside),
    ok = macula_peer_net:open(Inside),
    reaches(From, Protected).

a_forwarder_takes_its_time_in_both_directions(Config) ->
    [Client, Middle, Server] = ?config(hosts, Config),
    {_, Echo} = {Server, macula_peer_net:socket(Server, 4000)},
    Forwarder = macula_peer_forwarder:start(Middle, macula_peer_net:endpoint(Server, 4000), #{delay => 25}),
    Socket = macula_peer_net:socket(Client, 0),
    To = address(macula_peer_forwarder:endpoint(Forwarder)),
    {Delayed, From} = fastest(Socket, To, Echo),
    ct:pal("round trip: ~p us", [Delayed]),
    ?assert(Delayed >= 50000 andalso Delayed < 100000),
    %% The server sees the forwarder.
    ?assertEqual(macula_peer_net:address(Middle), element(1, From)),
    ok = macula_peer_forwarder:delay(Forwarder, 0),
    {Undelayed, _} = fastest(Socket, To, Echo),
    ?assert(Undelayed < 50000),
    ok = macula_peer_forwarder:swallow(Forwarder),
    ok = gen_udp:send(Socket, To, <<"swallowed">>),
    until(fun() -> maps:get(swallowed, macula_peer_forwarder:stats(Forwarder)) =:= 1 end),
    ok = macula_peer_forwarder:pass(Forwarder),
    {_, _} = round_trip(Socket, To, Echo),
    ok = macula_peer_forwarder:loss(Forwarder, 1000),
    ok = gen_udp:send(Socket, To, <<"lost">>),
    until(fun() -> maps:get(lost, macula_peer_forwarder:stats(Forwarder)) =:= 1 end),
    ok = macula_peer_forwarder:stop(Forwarder),
    ?assertEqual({error, timeout}, gen_udp:recv(Echo, 0, 0)).

%% On a busy machine some take longer.
fastest(Socket, To, Echo) ->
    lists:min([round_trip(Socket, To, Echo) || _ <- lists:seq(1, 10)]).

round_trip(Socket, To, Echo) ->
    Sent = erlang:monotonic_time(microsecond),
    ok = gen_udp:send(Socket, To, <<"there">>),
    {ok, {Ip, Port, <<"there">>}} = gen_udp:recv(Echo, 0, 5000),
    ok = gen_udp:send(Echo, Ip, Port, <<"back">>),
    {ok, {_, _, <<"back">>}} = gen_udp:recv(Socket, 0, 5000),
    {erlang:monotonic_time(microsecond) - Sent, {Ip, Port}}.

%% In both directions, and nothing that passes elsewhere.
a_capture_has_the_packets_that_pass(Config) ->
    [Host, Other, Third] = ?config(hosts, Config),
    File = filename:join(?config(priv_dir, Config), "frames"),
    Capture = macula_peer_program:start(Host, "capture", ["--file", File]),
    [Here, There, Elsewhere] = [{H, macula_peer_net:socket(H, 4000)} || H <- [Host, Other, Third]],
    send(There, Elsewhere, <<"elsewhere">>),
    send(Here, There, <<"outwards">>),
    send(There, Here, <<"inwards">>),
    Has = fun(What) -> {ok, Frames} = file:read_file(File), binary:match(Frames, What) =/= nomatch end,
    until(fun() -> Has(<<"inwards">>) end),
    ?assert(Has(<<"outwards">>)),
    ?assertNot(Has(<<"elsewhere">>)),
    #{frames := Frames, bytes := Bytes} = macula_peer_program:command(Capture, "stats"),
    ?assert(Frames >= 2),
    ?assertEqual(Bytes, filelib:file_size(File)),
    ok = macula_peer_program:stop(Capture).

%% ---- nodes ----

nodes_send_to_each_other(Config) ->
    [A, B, _] = ?config(hosts, Config),
    {Listener, Endpoint} = listener(B),
    Sender = macula_peer_net:start_node(A),
    ?assertEqual(ok, send_message(Sender, Endpoint, 1, 5000)),
    until(fun() -> ids(Listener) =:= [1] end),
    [#{from := {From, _}}] = macula_peer_test:received(Listener),
    ?assertEqual(macula_peer_net:address(A), From),
    stop([Listener, Sender]).

a_firewalled_node_cannot_be_reached(Config) ->
    [A, B, _] = ?config(hosts, Config),
    {Listener, Endpoint} = listener(B),
    Sender = macula_peer_net:start_node(A),
    ok = macula_peer_net:firewall(B),
    {Took, Result} = macula_peer_test:elapsed(fun() -> send_message(Sender, Endpoint, 1, 1000) end),
    ?assertEqual({error, {connect_failed, transport_down}}, Result),
    ?assert(Took < 1000 + ?LATE),
    ?assert(macula_peer_net:dropped(B) > 0),
    ok = macula_peer_net:open(B),
    ?assertEqual(ok, send_message(Sender, Endpoint, 2, 5000)),
    until(fun() -> lists:member(2, ids(Listener)) end),
    stop([Listener, Sender]).

a_firewalled_node_reaches_others(Config) ->
    [A, B, _] = ?config(hosts, Config),
    {Listener, Endpoint} = listener(B),
    Sender = macula_peer_net:start_node(A),
    ok = macula_peer_net:firewall(A),
    ?assertMatch({ok, {pong, _}}, call(Sender, macula_peer_connector, send_message_and_wait,
                                       [Endpoint, ping, #{timestamp => 1}, 5000])),
    stop([Listener, Sender]).

%% ---- the end ----

nothing_is_left_after_the_end(Config) ->
    [Host | _] = ?config(hosts, Config),
    Node = macula_peer_net:start_node(Host),
    Ended = monitor(process, Node),
    Process = call(Node, os, getpid, []),
    ok = macula_peer_net:stop(),
    receive {'DOWN', Ended, process, Node, _} -> ok end,
    ?assertNot(filelib:is_dir("/proc/" ++ Process)),
    ?assertEqual([], macula_peer_net:namespaces(os:getpid())),
    %% The next is like the first.
    [A, B] = [{H, macula_peer_net:socket(H, 4000)} || H <- macula_peer_net:start(2)],
    reaches(A, B).

nothing_is_left_of_a_run_that_died(_Config) ->
    [Dead, Alive] = Runs = [macula_peer_test:start_node() || _ <- [dead, alive]],
    [DeadPid, AlivePid] = [call(Run, os, getpid, []) || Run <- Runs],
    [[_, _] = call(Run, macula_peer_net, start, [2]) || Run <- Runs],
    [?assertMatch([_, _, _], macula_peer_net:namespaces(Pid)) || Pid <- [DeadPid, AlivePid]],
    ok = macula_peer_test:kill_node(Dead),
    until(fun() -> not filelib:is_dir("/proc/" ++ DeadPid) end),
    ?assertMatch([_, _, _], macula_peer_net:namespaces(DeadPid)),
    _ = macula_peer_net:start(1),
    ?assertEqual([], macula_peer_net:namespaces(DeadPid)),
    ?assertMatch([_, _, _], macula_peer_net:namespaces(AlivePid)),
    ok = call(Alive, macula_peer_net, stop, []),
    ?assertEqual([], macula_peer_net:namespaces(AlivePid)),
    macula_peer_test:stop_node(Alive).

%% ---- common ----

listener(Host) ->
    Node = macula_peer_net:start_node(Host),
    {ok, {_, Port}} = call(Node, macula_peer_test, listen, [#{}]),
    {Node, macula_peer_net:endpoint(Host, Port)}.

send_message(Node, Endpoint, Id, Timeout) ->
    call(Node, macula_peer_connector, send_message, [Endpoint, store, #{id => Id}, Timeout]).

stop(Nodes) ->
    [macula_peer_test:stop_node(Node) || Node <- Nodes].

reaches(From, {_, Socket} = To) ->
    send(From, To, <<"packet">>),
    {Ip, Port} = at(From),
    ?assertEqual({ok, {Ip, Port, <<"packet">>}}, gen_udp:recv(Socket, 0, 5000)).

send({_, Socket}, To, Packet) ->
    ok = gen_udp:send(Socket, at(To), Packet).

at({Host, Socket}) ->
    {ok, Port} = inet:port(Socket),
    {macula_peer_net:address(Host), Port}.

address(Endpoint) ->
    [Host, Port] = string:split(binary_to_list(Endpoint), ":"),
    {ok, Ip} = inet:parse_address(Host),
    {Ip, list_to_integer(Port)}.
