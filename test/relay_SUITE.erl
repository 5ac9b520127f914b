%% A node that cannot be dialled is reached by its node id, through a relay that it registered with: soon, in spite of
%% faults of relays and paths, and the relay cannot read the messages.
-module(relay_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, until/2, elapsed/1, received/1, events/2]).
-import(macula_peer_relays, [start_relay/1, start_relay/2, endpoint/1, start_cold/2, start_member/2, settings/2, id/1,
                             await_registered/2, send/4, send/5, request/4, cold_send/4, delivered/2,
                             start_stream/4, streamed/1, await_count/2]).

%% Within which a first message is to arrive, in milliseconds.
-define(SOON, 1000).
%% What the work of all hosts may add.
-define(LATE, 150).
-define(NAMES, {sender, target}).
-define(STREAM, 100000).
%% More than the tests can send.
-define(WIDE, #{bandwidth => 1 bsl 30}).
-define(SERVICE, <<"10.77.0.100:4433">>).
-define(MARKER, "what no relay is to read").

suite() -> [{timetrap, {seconds, 120}}].

all() ->
    [{group, network},
     a_relay_that_does_not_know_the_target_says_so_at_once, the_next_relay_is_tried_where_one_does_not_know_the_target,
     bootstrap_peers_are_tried_side_by_side, an_empty_list_of_relays_is_named, a_relay_that_is_not_there_is_named,
     a_relay_of_the_original_gets_the_message_itself, every_form_of_relay_endpoint_works,
     a_pinned_key_is_the_only_one_accepted, a_request_refuses_another_key_than_the_pinned_one,
     a_key_seen_first_is_the_only_one_accepted, a_node_that_starts_its_engine_again_registers_again,
     a_node_that_listens_is_reached_through_relays_too, an_unregistered_node_is_not_reached].

groups() ->
    [{network, [],
      [a_firewalled_node_is_reached_through_a_bootstrap_peer, a_firewalled_node_is_reached_through_a_configured_relay,
       a_long_distance_to_the_relay_costs_four_round_trips, long_distances_on_both_sides_of_the_relay_cost_four_round_trips,
       firewalled_nodes_ask_each_other, all_arrive_once_and_in_order_whatever_happens_to_relay_and_path,
       another_relay_takes_over, a_dead_mapping_that_is_silent_cuts_no_node_off,
       a_dead_mapping_that_refuses_cuts_no_node_off, a_relay_sees_no_plaintext]}].

init_per_group(network, Config) ->
    case macula_peer_net:available() of
        ok -> [{hosts, macula_peer_net:start(5)} | Config];
        {skip, _} = Skip -> Skip
    end.

end_per_group(network, _Config) ->
    macula_peer_net:stop().

init_per_testcase(_Case, Config) ->
    [ok = macula_peer_net:open(Host) || Host <- proplists:get_value(hosts, Config, [])],
    Config.

end_per_testcase(_Case, _Config) ->
    ok.

%% ---- the first message ----

a_firewalled_node_is_reached_through_a_bootstrap_peer(Config) ->
    [RelayHost, SenderHost, TargetHost | _] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(TargetHost),
    Relay = start_relay(RelayHost),
    Target = target(TargetHost, [Relay]),
    Sender = start_cold(SenderHost, bootstrap_peers([Relay])),
    is_reached_soon(Sender, Target, Relay),
    %% There was no other path.
    {ok, {_, Port}} = call(Target, macula_peer_node, listen, [#{}]),
    ?assertEqual({error, {connect_failed, transport_down}},
                 call(Sender, macula_peer_connector, send_message,
                      [macula_peer_net:endpoint(TargetHost, Port), store, #{}, 500])),
    ?assert(macula_peer_net:dropped(TargetHost) > 0).

a_firewalled_node_is_reached_through_a_configured_relay(Config) ->
    [RelayHost, SenderHost, TargetHost | _] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(TargetHost),
    Relay = start_relay(RelayHost),
    Target = target(TargetHost, [Relay]),
    Sender = start_member(SenderHost, settings(sender, [Relay])),
    is_reached_soon(Sender, Target, Relay).

is_reached_soon(Sender, Target, Relay) ->
    Us = cold_send(Sender, ?NAMES, Target, 1),
    ct:pal("delivered after ~p us", [Us]),
    ?assert(Us < ?SOON * 1000),
    #{fingerprint := <<Key:32/binary>>} = call(Sender, macula_peer_node, identity, []),
    ?assertMatch([#{type := store, path := relay, dialect := 'macula-peer/1', key := Key}], received(Target)),
    Id = id(target),
    ?assertMatch([#{path := relay}], [Peer || #{node_id := I} = Peer <- peers(Sender), I =:= Id]),
    ?assertMatch(#{registrations := 2, circuits := 1, forwarded_packets := Packets, forwarded_bytes := Bytes}
                     when Packets > 2 andalso Bytes > 1200,
                 macula_peer_relays:relay_stats(Relay)).

%% The whole delay is on the leg that is used most often.
a_long_distance_to_the_relay_costs_four_round_trips(Config) ->
    [RelayHost, SenderHost, TargetHost, Leg | _] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(TargetHost),
    Relay = start_relay(RelayHost),
    Target = target(TargetHost, [Relay]),
    There = leg(Leg, Relay),
    costs_four_round_trips([start_cold(SenderHost, bootstrap_peers([There])) || _ <- lists:seq(1, 3)], Target, 50).

long_distances_on_both_sides_of_the_relay_cost_four_round_trips(Config) ->
    [RelayHost, SenderHost, TargetHost, Leg, OtherLeg] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(TargetHost),
    Relay = start_relay(RelayHost),
    [There, Onwards] = [leg(Host, Relay) || Host <- [Leg, OtherLeg]],
    Target = target(TargetHost, [Onwards]),
    costs_four_round_trips([start_cold(SenderHost, bootstrap_peers([There])) || _ <- lists:seq(1, 3)], Target, 100).

%% 50 ms there and back.
leg(Host, Relay) ->
    macula_peer_forwarder:endpoint(macula_peer_forwarder:start(Host, endpoint(Relay), #{delay => 25})).

%% On a busy machine some take longer.
costs_four_round_trips(Senders, Target, Delay) ->
    Delivered = lists:min([cold_send(Sender, ?NAMES, Target, Id) || {Id, Sender} <- lists:enumerate(Senders)]),
    RoundTrip = lists:min([round_trip(Sender) || Sender <- Senders, _ <- lists:seq(1, 5)]),
    ct:pal("delivered after ~p us, of which ~p are a round trip", [Delivered, RoundTrip]),
    ?assert(RoundTrip >= Delay * 1000),
    ?assert(Delivered < 4 * RoundTrip + ?LATE * 1000).

round_trip(Sender) ->
    {Us, {ok, {pong, _}}} = call(Sender, timer, tc, [macula_peer_node, request,
                                                     [id(target), ping, #{timestamp => 1}, 5000]]),
    Us.

%% ---- both directions ----

firewalled_nodes_ask_each_other(Config) ->
    [RelayHost | Hosts] = ?config(hosts, Config),
    [OneHost, OtherHost | _] = Hosts,
    [ok = macula_peer_net:firewall(Host) || Host <- [OneHost, OtherHost]],
    Relay = start_relay(RelayHost),
    [One, Other] = [start_member(Host, settings(Name, [Relay]))
                    || {Host, Name} <- [{OneHost, one}, {OtherHost, other}]],
    [await_registered(Node, [Relay]) || Node <- [One, Other]],
    [?assertMatch({ok, {pong, #{<<"timestamp">> := N}}}, request(From, To, ping, #{timestamp => N}))
     || N <- lists:seq(1, 10), {From, To} <- [{One, other}, {Other, one}]],
    %% Larger than a packet, and than what takes the other channel.
    Bytes = macula_peer_test:rpc(<<"bytes">>, 200000),
    [?assertMatch({ok, {rpc_reply, #{<<"result">> := <<_:200000/binary>>}}}, request(From, To, rpc_request, Bytes))
     || {From, To} <- [{One, other}, {Other, one}]],
    [?assertEqual([relay], lists:usort([Path || #{path := Path} <- received(Node)])) || Node <- [One, Other]].

%% ---- trouble ----

all_arrive_once_and_in_order_whatever_happens_to_relay_and_path(Config) ->
    [RelayHost, SenderHost, TargetHost | _] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(TargetHost),
    First = start_relay(RelayHost, ?WIDE),
    Target = target(TargetHost, [First]),
    {ok, {_, Port}} = call(Target, macula_peer_node, listen, [#{}]),
    Sender = start_member(SenderHost, paced(settings(sender, [First]))),
    ok = start_stream(Sender, ?NAMES, ?STREAM, #{timeout => 60000}),
    amid_the_stream(Sender, Target, 10000),
    Second = macula_peer_relays:restart_relay(First),
    amid_the_stream(Sender, Target, 40000),
    _Third = macula_peer_relays:restart_relay(Second),
    amid_the_stream(Sender, Target, 70000),
    ok = macula_peer_net:open(TargetHost),
    ok = macula_peer_relays:stream_with(Sender, #{endpoint => macula_peer_net:endpoint(TargetHost, Port),
                                                  timeout => 60000}),
    all_arrive_once_and_in_order(Sender, Target, ?STREAM),
    Paths = macula_peer_relays:paths(Target),
    ?assertEqual({relay, direct}, {hd(Paths), lists:last(Paths)}).

another_relay_takes_over(Config) ->
    [OneHost, OtherHost, SenderHost, TargetHost | _] = ?config(hosts, Config),
    ok = macula_peer_net:firewall(TargetHost),
    Relays = [start_relay(Host, ?WIDE) || Host <- [OneHost, OtherHost]],
    Target = target(TargetHost, Relays),
    Sender = start_member(SenderHost, paced(settings(sender, Relays))),
    await_registered(Sender, Relays),
    ok = start_stream(Sender, ?NAMES, ?STREAM, #{timeout => 60000}),
    amid_the_stream(Sender, Target, 10000),
    [{_, Spare}, {_, Used}] =
        lists:sort([{maps:get(forwarded_bytes, macula_peer_relays:relay_stats(Relay)), Relay} || Relay <- Relays]),
    ok = macula_peer_relays:kill_relay(Used),
    ?assertMatch({Sent, []} when Sent < ?STREAM, streamed(Sender)),
    all_arrive_once_and_in_order(Sender, Target, ?STREAM),
    ?assertMatch(#{forwarded_packets := Packets} when Packets > 1000, macula_peer_relays:relay_stats(Spare)),
    until(fun() -> [] =/= [lost || #{state := lost} <- events(Sender, registration)] end).

%% Its callers wait for acknowledgements, so that the stream lasts as long as the paths are worked on.
paced(Settings) ->
    Settings#{max_unacknowledged => 128 bsl 10}.

%% Returns when Count have arrived and others are still unsent.
amid_the_stream(Sender, Target, Count) ->
    await_count(Target, Count),
    ?assertMatch({Sent, []} when Sent < ?STREAM, streamed(Sender)).

all_arrive_once_and_in_order(Sender, Target, Count) ->
    await_count(Target, Count),
    until(fun() -> streamed(Sender) =:= {Count, []} end),
    until(fun() -> lists:sum([Bytes || #{unacknowledged_bytes := Bytes} <- peers(Sender)]) =:= 0 end),
    ?assertEqual({in_order, Count}, macula_peer_relays:sequence(Target)),
    ?assertEqual([], events(Sender, undelivered)),
    ?assertEqual([], events(Sender, session_restarted)).

%% A rule leads an address to one of two hosts, as for a service of Kubernetes. When it leads to the other one, the kernel keeps
%% the mapping of a port that still sends.
a_dead_mapping_that_is_silent_cuts_no_node_off(Config) ->
    a_dead_mapping_cuts_no_node_off(Config, fun(Host) -> macula_peer_net:ip(Host, "link set eth0 down") end).

a_dead_mapping_that_refuses_cuts_no_node_off(Config) ->
    a_dead_mapping_cuts_no_node_off(Config, fun(_StillAnswersIcmp) -> ok end).

a_dead_mapping_cuts_no_node_off(Config, Cut) ->
    [ClientHost, OneHost, OtherHost | _] = ?config(hosts, Config),
    File = filename:join(?config(priv_dir, Config), "service.pem"),
    lead_to(ClientHost, OneHost),
    [One, Other] = [service(Host, File) || Host <- [OneHost, OtherHost]],
    try
        Client = start_member(ClientHost, #{gateway => none, node_id => <<"client">>, relays => [?SERVICE],
                                            hole_punching => off}),
        until(fun() -> registered(One) =:= 1 end),
        Sends = [fun(Id) -> call(Client, macula_peer_connector, send_message, [?SERVICE, store, #{id => Id}]) end,
                fun(Id) -> send(Client, {<<"client">>, <<"service">>}, Id, #{endpoint => ?SERVICE}) end],
        [ok = Send(1) || Send <- Sends],
        until(fun() -> length(received(One)) =:= 2 end),
        lead_to(ClientHost, OtherHost),
        macula_peer_test:kill_node(One),
        _ = Cut(OneHost),
        {Ms, ok} = elapsed(fun() -> heals(Other, Sends) end),
        ct:pal("reached again after ~p ms", [Ms]),
        ?assert(Ms < 30000)
    after
        macula_peer_net:ip(OneHost, "link set eth0 up"),
        macula_peer_net:nft(ClientHost, "delete table ip service")
    end.

%% Calls return `ok' for messages over a link that is not known to be dead yet, so they count when they arrive.
heals(Node, Sends) ->
    [until(fun() -> _ = Send(Id), arrived(Node, Id) end, 45000) || {Id, Send} <- lists:zip([2, 3], Sends)],
    until(fun() -> registered(Node) =:= 1 end, 45000).

arrived(Node, Id) ->
    lists:any(fun(#{message := #{<<"id">> := I}}) -> I =:= Id end, received(Node)).

registered(Relay) ->
    maps:get(registrations, maps:get(relay, macula_peer_test:stats(Relay))).

service(Host, File) ->
    Node = start_member(Host, #{gateway => none, identity_file => File}),
    {ok, _} = call(Node, macula_peer_test, listen, [#{port => 4433, relay => #{}}]),
    Node.

lead_to(Client, Host) ->
    Target = inet:ntoa(macula_peer_net:address(Host)),
    macula_peer_net:nft(Client, lists:append(["add table ip service; delete table ip service\n"
                                              "table ip service {\nchain out {\n"
                                              "type nat hook output priority -100\n"
                                              "ip daddr 10.77.0.100 udp dport 4433 dnat to ", Target, ":4433\n}\n}\n"])).

%% ---- what a relay sees ----

a_relay_sees_no_plaintext(Config) ->
    [RelayHost, SenderHost, TargetHost | _] = ?config(hosts, Config),
    File = filename:join(?config(priv_dir, Config), "frames"),
    Capture = macula_peer_program:start(RelayHost, "capture", ["--file", File]),
    ok = macula_peer_net:firewall(TargetHost),
    Relay = start_relay(RelayHost),
    Target = target(TargetHost, [Relay]),
    Sender = start_member(SenderHost, settings(sender, [Relay])),
    Payload = binary:copy(<<?MARKER>>, 20),
    [ok = send(Sender, ?NAMES, store, #{id => Id, payload => Payload}, #{}) || Id <- lists:seq(1, 50)],
    _ = delivered(Target, 50),
    ok = call(Target, macula_peer_node, set_handler, [{?MODULE, answer, []}]),
    ?assertMatch({ok, {rpc_reply, #{<<"result">> := Payload}}},
                 request(Sender, target, rpc_request, macula_peer_test:rpc(Payload, Payload))),
    #{forwarded_bytes := Forwarded} = macula_peer_relays:relay_stats(Relay),
    ?assert(Forwarded > 50 * byte_size(Payload)),
    %% The control: what is not sealed is seen, and what came before it has been written down.
    [From, To] = [macula_peer_net:socket(Host, 4000) || Host <- [SenderHost, RelayHost]],
    Read = fun() -> {ok, Written} = file:read_file(File), Written end,
    ok = gen_udp:send(From, macula_peer_net:address(RelayHost), 4000, <<"control: " ?MARKER>>),
    {ok, _} = gen_udp:recv(To, 0, 5000),
    until(fun() -> binary:match(Read(), <<"control: " ?MARKER>>) =/= nomatch end),
    Frames = Read(),
    ?assert(byte_size(Frames) > 2 * Forwarded),
    ?assertMatch([_], binary:matches(Frames, <<?MARKER>>)),
    ok = macula_peer_program:stop(Capture).

%% Runs in the target; the answer has the marker as well.
answer({macula_peer_message, #{type := rpc_request, message := #{<<"args">> := Args}, reply_to := Token}}) ->
    macula_peer_node:reply(Token, rpc_reply, #{request_id => <<"r">>, from_node => <<"n">>, result => Args});
answer(_) ->
    ok.

%% ---- which relay ----

a_relay_that_does_not_know_the_target_says_so_at_once(_Config) ->
    Relay = start_relay(here),
    Sender = start_member(here, settings(sender, [Relay])),
    {Took, Result} = elapsed(fun() -> send(Sender, ?NAMES, 1, #{}) end),
    ?assertEqual(refused_by_relay(not_registered), Result),
    ?assert(Took < ?SOON),
    ?assertMatch(#{circuits := 0, refused := #{not_registered := N}} when N > 0, macula_peer_relays:relay_stats(Relay)).

the_next_relay_is_tried_where_one_does_not_know_the_target(_Config) ->
    [Ignorant, Knowing] = Relays = [start_relay(here) || _ <- [ignorant, knowing]],
    Target = target(here, [Knowing]),
    Sender = start_cold(here, bootstrap_peers(Relays)),
    Us = cold_send(Sender, ?NAMES, Target, 1),
    ?assert(Us < ?SOON * 1000),
    ?assertMatch(#{circuits := 0, forwarded_packets := 0}, macula_peer_relays:relay_stats(Ignorant)),
    ?assertMatch(#{circuits := 1}, macula_peer_relays:relay_stats(Knowing)).

bootstrap_peers_are_tried_side_by_side(_Config) ->
    {Socket, Silent} = macula_peer_test:silent_port(),
    Relay = start_relay(here),
    Target = target(here, [Relay]),
    Sender = start_cold(here, bootstrap_peers([macula_peer_test:endpoint(Silent), Relay])),
    Us = cold_send(Sender, ?NAMES, Target, 1),
    ct:pal("delivered after ~p us", [Us]),
    ?assert(Us < ?SOON * 1000),
    %% The silent one was asked too.
    ?assertMatch({ok, _}, gen_udp:recv(Socket, 0, 0)),
    gen_udp:close(Socket).

an_empty_list_of_relays_is_named(_Config) ->
    Sender = start_cold(here, []),
    ?assertEqual({error, {nat_connection_failed, {no_relay_available, no_bootstrap_peers}}},
                 send(Sender, ?NAMES, 1, #{})).

a_relay_that_is_not_there_is_named(_Config) ->
    Absent = macula_peer_test:endpoint(macula_peer_test:closed_port()),
    Sender = start_cold(here, bootstrap_peers([Absent])),
    [?assertEqual({error, {nat_connection_failed, {relay_connect_failed, transport_down}}},
                  send(Sender, ?NAMES, 1, Opts))
     || Opts <- [#{timeout => 2000}, #{timeout => 2000, relay_endpoint => Absent}]].

a_relay_of_the_original_gets_the_message_itself(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    Sender = start_cold(here, bootstrap_peers([Endpoint])),
    [?assertEqual(ok, send(Sender, ?NAMES, store, #{n => N, key => <<"k">>, value => <<"v">>}, Opts))
     || {N, Opts} <- [{1, #{}}, {2, #{relay_endpoint => Endpoint}}, {3, #{}}]],
    until(fun() -> maps:get(distinct, macula_peer_fake_gateway:stats(Gateway)) =:= 3 end),
    %% One to find out that it is no relay.
    ?assertMatch(#{connections := 2, received := 3, incomplete := 0, invalid := 0, types := #{store := 3}},
                 macula_peer_fake_gateway:stats(Gateway)).

%% Each by an engine that knows no relay yet.
every_form_of_relay_endpoint_works(_Config) ->
    Relay = start_relay(here),
    Target = target(here, [Relay]),
    Sender = start_member(here, #{}),
    [Host, Port] = string:split(binary_to_list(endpoint(Relay)), ":"),
    Number = list_to_integer(Port),
    Forms = [endpoint(Relay), binary_to_list(endpoint(Relay)), {Host, Number}, {list_to_binary(Host), Number},
             {ok, Host, Number}, {ok, list_to_binary(Host), Number}],
    [begin
         ok = call(Sender, macula_peer_relays, engine, [#{}]),
         From = list_to_atom("sender_" ++ integer_to_list(N)),
         ?assertEqual({Form, ok}, {Form, send(Sender, {From, target}, N, #{relay_endpoint => Form})}),
         ?assertMatch(#{path := relay}, delivered(Target, N))
     end || {N, Form} <- lists:zip(lists:seq(1, length(Forms)), Forms)].

%% ---- keys ----

a_pinned_key_is_the_only_one_accepted(_Config) ->
    Relay = start_relay(here),
    Target = target(here, [Relay]),
    Sender = start_member(here, settings(sender, [Relay])),
    ?assertEqual(untrusted(), send(Sender, ?NAMES, 1, #{fingerprint => wrong(fingerprint(Target))})),
    ?assertEqual(ok, send(Sender, ?NAMES, 2, #{fingerprint => fingerprint(Target)})),
    ?assertMatch(#{path := relay}, delivered(Target, 2)),
    %% The link that there is now does not change that.
    ?assertEqual(untrusted(), send(Sender, ?NAMES, 3, #{fingerprint => wrong(fingerprint(Target))})),
    ?assertEqual(ok, send(Sender, ?NAMES, 4, #{})),
    _ = delivered(Target, 4),
    ?assertEqual([2, 4], macula_peer_test:ids(Target)).

a_request_refuses_another_key_than_the_pinned_one(_Config) ->
    Relay = start_relay(here),
    Target = target(here, [Relay]),
    Sender = start_member(here, settings(sender, [Relay])),
    Ask = fun(Fingerprint) ->
        call(Sender, macula_peer_node, request, [id(target), ping, #{timestamp => 1}, 5000,
                                                 #{fingerprint => Fingerprint}])
    end,
    ?assertEqual(untrusted(), Ask(wrong(fingerprint(Target)))),
    ?assertEqual([], received(Target)),
    ?assertMatch({ok, {pong, _}}, Ask(fingerprint(Target))).

%% Another node gets the node id, from a relay that does not protect it.
a_key_seen_first_is_the_only_one_accepted(_Config) ->
    Relay = start_relay(here, #{grace => 0}),
    Target = target(here, [Relay]),
    Sender = start_member(here, settings(sender, [Relay])),
    ?assertEqual(ok, send(Sender, ?NAMES, 1, #{})),
    _ = delivered(Target, 1),
    Seen = fingerprint(Target),
    ok = call(Target, macula_peer_node, stop, []),
    until(fun() -> circuits(Sender) =:= [0] end),
    Usurper = start_member(here, #{}),
    macula_peer_relays:await_registration(Usurper, id(target), Relay, registered),
    ?assertNotEqual(Seen, fingerprint(Usurper)),
    ?assertEqual(untrusted(), send(Sender, ?NAMES, 2, #{})),
    ?assertEqual(untrusted(), request(Sender, target, ping, #{timestamp => 1})),
    ?assertEqual([], received(Usurper)).

untrusted() ->
    {error, {nat_connection_failed, {connect_failed, untrusted_peer}}}.

fingerprint(Node) ->
    #{fingerprint := <<Fingerprint:32/binary>>} = call(Node, macula_peer_node, identity, []),
    Fingerprint.

wrong(<<First, Rest/binary>>) ->
    <<(First bxor 1), Rest/binary>>.

%% ---- registering ----

%% With the same key, so the relay lets it have its id again.
a_node_that_starts_its_engine_again_registers_again(Config) ->
    Relay = start_relay(here),
    File = filename:join(?config(priv_dir, Config), "key.pem"),
    Target = start_member(here, (settings(target, [Relay]))#{identity_file => File}),
    await_registered(Target, [Relay]),
    Before = fingerprint(Target),
    ok = call(Target, macula_peer_node, stop, []),
    until(fun() -> maps:get(registrations, macula_peer_relays:relay_stats(Relay)) =:= 0 end),
    ok = call(Target, macula_peer_node, start, []),
    await_registered(Target, [Relay]),
    ?assertEqual(Before, fingerprint(Target)),
    Sender = start_member(here, settings(sender, [Relay])),
    ?assertEqual(ok, send(Sender, ?NAMES, 1, #{})),
    ?assertMatch(#{path := relay}, delivered(Target, 1)).

a_node_that_listens_is_reached_through_relays_too(_Config) ->
    Relay = start_relay(here),
    Target = start_member(here, #{}),
    {ok, _} = call(Target, macula_peer_node, listen, [#{}]),
    ok = call(Target, macula_peer_node, register, [id(target), [endpoint(Relay)]]),
    await_registered(Target, [Relay]),
    Endpoint = endpoint(Relay),
    until(fun() -> [At || #{relay := At, state := registered} <- events(Target, registration)] =:= [Endpoint] end),
    {ok, {_, Port}} = call(Target, macula_peer_node, local_address, []),
    SeenAt = {{127, 0, 0, 1}, Port},
    ?assertMatch(#{registrations := [#{relay := Endpoint, state := registered, address := SeenAt, circuits := 0}]},
                 macula_peer_test:stats(Target)),
    Sender = start_member(here, settings(sender, [Relay])),
    ?assertEqual(ok, send(Sender, ?NAMES, 1, #{})),
    ?assertMatch(#{path := relay}, delivered(Target, 1)),
    ?assertMatch(#{registrations := [#{circuits := 1}]}, macula_peer_test:stats(Target)).

an_unregistered_node_is_not_reached(_Config) ->
    Relay = start_relay(here),
    Target = target(here, [Relay]),
    Sender = start_member(here, settings(sender, [Relay])),
    ?assertEqual(ok, send(Sender, ?NAMES, 1, #{})),
    _ = delivered(Target, 1),
    ok = call(Target, macula_peer_node, unregister, []),
    ?assertMatch(#{registrations := []}, macula_peer_test:stats(Target)),
    until(fun() -> maps:get(circuits, macula_peer_relays:relay_stats(Relay)) =:= 0 end),
    Other = start_member(here, settings(other, [Relay])),
    ?assertEqual(refused_by_relay(not_registered), send(Other, {other, target}, 2, #{})),
    ?assertEqual([1], macula_peer_test:ids(Target)).

%% ---- common ----

target(Where, Relays) ->
    Target = start_member(Where, settings(target, Relays)),
    await_registered(Target, Relays),
    Target.

bootstrap_peers(Relays) ->
    [{"MACULA_BOOTSTRAP_PEERS", string:join([binary_to_list(endpoint(Relay)) || Relay <- Relays], ",")}].

refused_by_relay(Reason) ->
    {error, {nat_connection_failed, {relay_setup_failed, Reason}}}.

%% Of each registration.
circuits(Node) ->
    [Circuits || #{circuits := Circuits} <- maps:get(registrations, macula_peer_test:stats(Node))].

peers(Node) ->
    maps:get(peers, macula_peer_test:stats(Node)).
