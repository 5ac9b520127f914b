%% A destination that cannot be reached, or only in part, affects only the calls to it.
-module(route_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_net, [ip/2, nft/2]).
-import(macula_peer_test, [call/4, until/1, count/1]).

-define(DOWN, {error, {connect_failed, transport_down}}).
%% A dial that got no answer lasts five seconds. This is far less, and much for a busy machine.
-define(AT_ONCE, 1000).

suite() -> [{timetrap, {seconds, 90}}].

all() ->
    [routes_that_lead_nowhere_fail_at_once_and_cost_others_nothing, a_packet_from_port_0_changes_nothing,
     a_source_address_that_was_removed_costs_others_nothing, a_path_that_drops_ecn_marks_gives_a_connection,
     names_that_hang_delay_no_other].

init_per_suite(Config) ->
    macula_peer_net:init_suite(Config).

end_per_suite(_Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    [{hosts, macula_peer_net:start(2)} | Config].

end_per_testcase(_Case, _Config) ->
    macula_peer_net:stop().

routes_that_lead_nowhere_fail_at_once_and_cost_others_nothing(Config) ->
    [A, B] = ?config(hosts, Config),
    {_Listener, Endpoint} = listener(B),
    Sender = member(A),
    ok = watch(B),
    bulk(Sender, Endpoint),
    {Large, Marked} = seen(B),
    ?assert(Large > 0),
    ?assert(Marked > 0),
    [begin
         _ = ip(A, lists:concat(["route add ", Type, " 203.0.113.", N, "/32"])),
         Nowhere = macula_peer_net:endpoint({203, 0, 113, N}, 9443),
         {Ms, Result} = macula_peer_test:elapsed(fun() -> send(Sender, Nowhere, #{}) end),
         ?assertEqual({Type, ?DOWN}, {Type, Result}),
         ?assert(Ms < ?AT_ONCE, {Type, Ms})
     end || {N, Type} <- [{1, blackhole}, {2, prohibit}, {3, unreachable}, {4, throw}]],
    ok = watch(B),
    bulk(Sender, Endpoint),
    {LargeAfter, MarkedAfter} = seen(B),
    ?assert(LargeAfter > 0),
    ?assert(MarkedAfter > 0).

%% No answer can be sent there: `sendmsg' returns EINVAL.
a_packet_from_port_0_changes_nothing(Config) ->
    [A, B] = ?config(hosts, Config),
    {_Listener, Endpoint} = listener(B),
    Sender = member(A),
    {_, Port} = call(Sender, ?MODULE, bound, []),
    %% A long header with an unknown version, and one that begins a connection: each is answered, and so is a short header.
    Packets = [<<16#C0, Version:32, 8, 1:64, 8, 2:64, 0:(1200 * 8)>> || Version <- [16#BABABABA, 1]],
    stranger(B, macula_peer_net:address(A), Port, [<<16#40, 1:(100 * 8)>> | Packets]),
    ok = watch(B),
    bulk(Sender, Endpoint),
    {Large, Marked} = seen(B),
    ?assert(Large > 0),
    ?assert(Marked > 0).

%% As an IPv6 privacy address that expires. An answer is still due on the connection, which ends: a QUIC client takes nothing
%% from another address of its server's.
a_source_address_that_was_removed_costs_others_nothing(Config) ->
    [A, B] = ?config(hosts, Config),
    [V6A, V6B, Gone] = [{16#2001, 16#db8, 0, 0, 0, 0, 0, N} || N <- [1, 2, 3]],
    ok = macula_peer_net:give(A, "eth0", [{V6A, 64}]),
    ok = macula_peer_net:give(B, "eth0", [{V6B, 64}, {Gone, 64}]),
    {Listener, V4} = listener(B),
    {_, Port} = call(Listener, ?MODULE, bound, []),
    Asker = member(A),
    To = macula_peer_net:endpoint(Gone, Port),
    ?assertMatch({ok, _}, ask(Asker, To, <<"late">>, 1)),
    %% Its node may end first.
    spawn(fun() -> catch ask(Asker, To, <<"late">>, 1500) end),
    timer:sleep(500),
    ok = macula_peer_net:take(B, "eth0", [{Gone, 64}]),
    timer:sleep(2000),
    ok = watch(A),
    {Ms, Result} = macula_peer_test:elapsed(fun() -> ask(Asker, V4, <<"bytes">>, 2000000) end),
    ?assertMatch({ok, _}, Result),
    ?assert(Ms < 2000, Ms),
    {Large, Marked} = seen(A),
    ?assert(Large > 0),
    ?assert(Marked > 0).

%% First towards the listener alone, then in both directions. A node that registers with a relay dials as any other.
a_path_that_drops_ecn_marks_gives_a_connection(Config) ->
    [A, B] = ?config(hosts, Config),
    {Listener, Endpoint} = listener(B),
    [begin
         [ok = drop_marked(Host) || Host <- Hosts],
         Sender = member(A),
         {Ms, Result} = macula_peer_test:elapsed(fun() -> send(Sender, Endpoint, #{id => length(Hosts)}) end),
         ?assertEqual(ok, Result),
         ?assert(Ms < 5000, Ms),
         until(fun() -> lists:member(length(Hosts), macula_peer_test:ids(Listener)) end),
         ok = macula_peer_test:stop_node(Sender)
     end || Hosts <- [[B], [A, B]]],
    Relay = macula_peer_relays:start_relay(B),
    Member = macula_peer_relays:start_member(A, macula_peer_relays:settings(<<"member">>, [Relay])),
    macula_peer_relays:await_registered(Member, [Relay]).

names_that_hang_delay_no_other(Config) ->
    [{_, Name, _} = A, B] = ?config(hosts, Config),
    Files = filename:join("/etc/netns", Name),
    ok = filelib:ensure_path(Files),
    try
        ok = file:write_file(filename:join(Files, "resolv.conf"), "nameserver 10.77.0.2\n"),
        ok = file:write_file(filename:join(Files, "hosts"), "127.0.0.1 localhost\n10.77.0.2 known\n"),
        Silent = macula_peer_net:socket(B, 53),
        {Listener, Endpoint} = listener(B),
        [_, Port] = string:split(Endpoint, ":"),
        Sender = member(A),
        Pid = call(Sender, os, getpid, []),
        Before = descriptors(Pid),
        ok = call(Sender, ?MODULE, hang, [80]),
        %% Each lookup uses its own socket.
        until(fun() -> descriptors(Pid) >= Before + 60 end),
        {Ms, Result} = macula_peer_test:elapsed(fun() -> send(Sender, <<"known:", Port/binary>>, #{id => 1}) end),
        ?assertEqual(ok, Result),
        ?assert(Ms < ?AT_ONCE, Ms),
        until(fun() -> macula_peer_test:ids(Listener) =:= [1] end),
        gen_udp:close(Silent)
    after
        file:del_dir_r(Files)
    end.

%% Runs in the node: sends to Count names that give no answer.
hang(Count) ->
    _ = [spawn(macula_peer_connector, send_message,
               [iolist_to_binary(["h", integer_to_list(I), ".invalid.example:9443"]), store, #{}])
         || I <- lists:seq(1, Count)],
    ok.

descriptors(Pid) ->
    {ok, All} = file:list_dir("/proc/" ++ Pid ++ "/fd"),
    length(All).

%% ---- common ----

listener(Host) ->
    Node = member(Host),
    {ok, {_, Port}} = call(Node, macula_peer_test, listen, [#{}]),
    {Node, macula_peer_net:endpoint(Host, Port)}.

member(Host) ->
    macula_peer_relays:start_member(Host, #{gateway => none}).

%% Runs in the node.
bound() ->
    {ok, Address} = macula_peer_node:local_address(),
    Address.

send(Node, Endpoint, Message) ->
    call(Node, macula_peer_connector, send_message, [Endpoint, store, Message, 6000]).

ask(Node, Endpoint, Procedure, Args) ->
    call(Node, macula_peer_connector, send_message_and_wait,
         [Endpoint, rpc_request, macula_peer_test:rpc(Procedure, Args), 9000]).

%% Enough for many transmits of several segments.
bulk(Node, Endpoint) ->
    [?assertEqual(ok, send(Node, Endpoint, #{v => binary:copy(<<0>>, 500000)})) || _ <- lists:seq(1, 5)],
    until(fun() -> acknowledged(Node, Endpoint) end).

acknowledged(Node, Endpoint) ->
    #{unacknowledged_bytes := Left} = call(Node, macula_peer_test, peer_stats, [Endpoint]),
    Left =:= 0.

%% From now on the host counts packets that were segmented by the device, or not yet, and those with an ECN mark.
watch(Host) ->
    _ = nft(Host, "add table inet route; delete table inet route\n"
                  "table inet route {\nchain input {\ntype filter hook input priority 0;\n"
                  "meta l4proto udp meta length > 2000 counter\n"
                  "meta l4proto udp ip ecn ect0 counter\n}\n}"),
    ok.

%% From now on the host gets no UDP packet with an ECN mark.
drop_marked(Host) ->
    _ = nft(Host, "add table inet route; delete table inet route\n"
                  "table inet route {\nchain input {\ntype filter hook input priority 0;\n"
                  "ip ecn != not-ect meta l4proto udp drop\n}\n}"),
    ok.

seen(Host) ->
    {match, [[Large], [Marked]]} =
        re:run(nft(Host, "list table inet route"), "counter packets (\\d+)", [global, {capture, [1], list}]),
    {list_to_integer(Large), list_to_integer(Marked)}.

%% Sends packets from UDP port 0.
stranger({macula_peer_net, Name, _}, To, Port, Packets) ->
    {ok, Socket} = socket:open(inet, raw, udp, #{netns => "/run/netns/" ++ Name}),
    [ok = socket:sendto(Socket, <<0:16, Port:16, (8 + byte_size(Packet)):16, 0:16, Packet/binary>>,
                        #{family => inet, addr => To, port => 0}) || Packet <- Packets],
    ok = socket:close(Socket).
