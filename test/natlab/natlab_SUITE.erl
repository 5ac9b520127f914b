%% The NAT laboratory: each NAT behaves as configured, as far as plain UDP sockets on both sides can tell, and its
%% cables have the configured delay and loss. Then nodes meet in it: `make natlab' has all pairs, here are the most
%% telling ones.
-module(natlab_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4]).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [{group, Group} || {Group, _, _} <- groups()].

groups() ->
    [{kinds, [],
      [none, full_cone, address_restricted, port_restricted, symmetric, symmetric_sequential, carrier_grade,
       ipv6_firewall, udp_blocked, udp_is_blocked_but_to_relays, neighbours_reach_each_other_inside,
       isolated_neighbours_do_not, neighbours_reach_each_other_outside_where_there_is_a_hairpin,
       neighbours_do_not_reach_each_other_outside_without_a_hairpin]},
     {cables, [],
      [a_packet_takes_its_time_over_every_cable, as_many_packets_are_lost_as_asked_for,
       nodes_send_much_over_long_cables]},
     {pairs, [],
      [a_public_node_and_a_port_restricted_one, a_full_cone_and_an_address_restricted_one, two_port_restricted_ones,
       a_port_restricted_and_a_carrier_grade_one, a_symmetric_and_an_address_restricted_one,
       a_symmetric_and_a_port_restricted_one, a_port_restricted_and_a_symmetric_one,
       a_sequential_and_a_port_restricted_one, two_symmetric_ones_say_that_they_need_a_relay, two_ipv6_firewalls,
       a_port_restricted_and_a_blocked_one, neighbours, symmetric_neighbours, neighbours_that_need_a_hairpin]}].

init_per_suite(Config) ->
    case macula_peer_net:available() of
        ok ->
            Config;
        {skip, _} = Skip ->
            Cases = lists:append([Cases || {_, _, Cases} <- groups()]),
            io:format(user, "SKIPPED: ~b cases of the NAT laboratory~n", [length(Cases)]),
            Skip
    end.

end_per_suite(_Config) ->
    ok.

init_per_group(kinds, Config) ->
    Hairpins = [{{hairpin, Kind}, Kind, #{hosts => 2, hairpin => true, isolated => true}} || Kind <- cones()],
    Sites = [{Kind, Kind, #{hosts => 2}} || Kind <- macula_peer_natlab:kinds()],
    [{lab, macula_peer_natlab:start(Sites ++ Hairpins)} | Config];
init_per_group(cables, Config) ->
    [{lab, macula_peer_natlab:start([{public, none}, {home, port_restricted}, {firewall, ipv6_firewall}])} | Config];
init_per_group(pairs, Config) ->
    Lab = macula_peer_natlab:start(macula_peer_natlab_pairs:sites(macula_peer_natlab_pairs:kinds())),
    [{pairs, macula_peer_natlab_pairs:start(Lab)} | Config].

end_per_group(_Group, _Config) ->
    macula_peer_natlab:stop().

%% ---- kinds ----

none(Config) -> is_what_it_says(none, Config).

full_cone(Config) -> is_what_it_says(full_cone, Config).

address_restricted(Config) -> is_what_it_says(address_restricted, Config).

port_restricted(Config) -> is_what_it_says(port_restricted, Config).

symmetric(Config) -> is_what_it_says(symmetric, Config).

symmetric_sequential(Config) -> is_what_it_says(symmetric_sequential, Config).

carrier_grade(Config) -> is_what_it_says(carrier_grade, Config).

ipv6_firewall(Config) -> is_what_it_says(ipv6_firewall, Config).

udp_blocked(Config) -> is_what_it_says(udp_blocked, Config).

is_what_it_says(Kind, Config) ->
    Lab = ?config(lab, Config),
    [Host | _] = macula_peer_natlab:hosts(Lab, Kind),
    Observer = observer(Lab, Kind),
    #{mapping := Mapping, allocation := Allocation} = Is = macula_peer_nat:is(Kind),
    ?assertEqual(Is, macula_peer_nat_probe:profile(Host, Observer)),
    Public = macula_peer_natlab:public(Lab, Kind),
    ?assertEqual(Public, macula_peer_nat_probe:address_outside(Host, Observer)),
    ?assertEqual(lists:member(Kind, [none, ipv6_firewall]), Public =:= macula_peer_net:address(Host)),
    %% Nor does it change if another host sends there too early.
    {Port, Arrived, Seen} = macula_peer_nat_probe:after_early_packet(Host, Observer, Public),
    ?assertEqual(Kind =/= none, Arrived =:= []),
    ?assertEqual(Mapping =:= ei, length(lists:usort(Seen)) =:= 1),
    ?assertEqual(Allocation =:= pp, lists:member(Port, Seen)).

udp_is_blocked_but_to_relays(Config) ->
    Lab = ?config(lab, Config),
    [Public | _] = macula_peer_natlab:hosts(Lab, none),
    [Blocked, Free] = [hd(macula_peer_natlab:hosts(Lab, Kind)) || Kind <- [udp_blocked, port_restricted]],
    Relays = [Host || {Host, _} <- macula_peer_natlab:relays(Lab)],
    ?assertEqual([true, true, true], [macula_peer_nat_probe:reaches(Free, Host) || Host <- [Public | Relays]]),
    ?assertEqual([false, true, true], [macula_peer_nat_probe:reaches(Blocked, Host) || Host <- [Public | Relays]]).

%% ---- neighbours ----

neighbours_reach_each_other_inside(Config) ->
    Lab = ?config(lab, Config),
    Sites = macula_peer_natlab:kinds() -- [none],
    ?assertEqual([{Site, true, true} || Site <- Sites], [inside(Lab, Site) || Site <- Sites]).

isolated_neighbours_do_not(Config) ->
    Lab = ?config(lab, Config),
    Sites = [{hairpin, Kind} || Kind <- cones()],
    ?assertEqual([{Site, false, false} || Site <- Sites], [inside(Lab, Site) || Site <- Sites]).

inside(Lab, Site) ->
    [One, Other] = macula_peer_natlab:hosts(Lab, Site),
    {Site, macula_peer_nat_probe:reaches(One, Other), macula_peer_nat_probe:reaches(Other, One)}.

neighbours_reach_each_other_outside_where_there_is_a_hairpin(Config) ->
    Sites = [{hairpin, Kind} || Kind <- cones()],
    ?assertEqual([{Site, true} || Site <- Sites], [hairpin(?config(lab, Config), Site) || Site <- Sites]).

neighbours_do_not_reach_each_other_outside_without_a_hairpin(Config) ->
    Sites = macula_peer_natlab:kinds() -- [none, ipv6_firewall],
    ?assertEqual([{Site, false} || Site <- Sites], [hairpin(?config(lab, Config), Site) || Site <- Sites]).

hairpin(Lab, Site) ->
    [One, Other] = macula_peer_natlab:hosts(Lab, Site),
    {Site, macula_peer_nat_probe:hairpins(One, Other, observer(Lab, Site))}.

cones() ->
    [full_cone, address_restricted, port_restricted].

%% ---- cables ----

a_packet_takes_its_time_over_every_cable(Config) ->
    Lab = ?config(lab, Config),
    Paths = [{home, relay}, {home, public}, {firewall, relay}, {public, relay}],
    Undelayed = [round_trip(Lab, From, To) || {From, To} <- Paths],
    ok = macula_peer_natlab:lengthen(Lab, 20),
    Delayed = [round_trip(Lab, From, To) || {From, To} <- Paths],
    ct:pal("microseconds there and back: ~p, then ~p", [Undelayed, Delayed]),
    ?assert(lists:max(Undelayed) < 40000),
    [?assert(Us >= 80000 andalso Us < 120000) || Us <- Delayed].

%% The fastest: for the first one the hosts look for each other, and on a busy machine others take longer too.
round_trip(Lab, From, To) ->
    [Here, There] = Sockets = [socket(Lab, Where, From) || Where <- [From, To]],
    Times = [element(1, timer:tc(fun() -> there_and_back(Here, There) end)) || _ <- lists:seq(1, 10)],
    lists:foreach(fun gen_udp:close/1, Sockets),
    lists:min(Times).

there_and_back(Here, There) ->
    {ok, Address} = inet:sockname(There),
    ok = gen_udp:send(Here, Address, <<"there">>),
    {ok, {Ip, Port, <<"there">>}} = gen_udp:recv(There, 0, 5000),
    ok = gen_udp:send(There, Ip, Port, <<"back">>),
    {ok, {_, _, <<"back">>}} = gen_udp:recv(Here, 0, 5000),
    ok.

%% One in ten over each of two cables. With 2,000 packets a share outside of these bounds is one in millions.
as_many_packets_are_lost_as_asked_for(Config) ->
    Lab = ?config(lab, Config),
    Sockets = [Here, There] = [socket(Lab, Where, home) || Where <- [home, relay]],
    ok = there_and_back(Here, There),
    ?assertEqual(2000, arriving(2000, Here, There)),
    ok = macula_peer_natlab:loss(Lab, 100),
    Arrived = arriving(2000, Here, There),
    ct:pal("~p of 2000 arrived", [Arrived]),
    ?assert(abs(Arrived - 1620) < 90),
    ok = macula_peer_natlab:loss(Lab, 0),
    ?assertEqual(500, arriving(500, Here, There)),
    lists:foreach(fun gen_udp:close/1, Sockets).

%% A few at a time, so that nothing is lost for another reason. The last, which says that no more will come, is sent
%% until it arrives.
arriving(Count, Here, There) ->
    {ok, Address} = inet:sockname(There),
    lists:sum([begin
                   Numbers = lists:seq(N, min(N + 99, Count)),
                   _ = [ok = gen_udp:send(Here, Address, <<Number:32>>) || Number <- Numbers],
                   arrived(There, fun() -> ok = gen_udp:send(Here, Address, <<"last">>) end)
               end || N <- lists:seq(1, Count, 100)]).

arrived(There, Last) ->
    Last(),
    arrived(There, Last, 0).

arrived(There, Last, Count) ->
    case gen_udp:recv(There, 0, 100) of
        {ok, {_, _, <<"last">>}} -> Count;
        {ok, {_, _, <<_:32>>}} -> arrived(There, Last, Count + 1);
        {error, timeout} -> Last(), arrived(There, Last, Count)
    end.

%% The kernel hands over packets that are still to be cut and summed.
nodes_send_much_over_long_cables(Config) ->
    Lab = ?config(lab, Config),
    [{Host, [Ip | _]} | _] = macula_peer_natlab:relays(Lab, home),
    Listener = macula_peer_net:start_node(Host),
    {ok, {_, Port}} = call(Listener, macula_peer_test, listen, [#{}]),
    Sender = macula_peer_net:start_node(hd(macula_peer_natlab:hosts(Lab, home))),
    ?assertMatch({ok, {rpc_reply, #{<<"result">> := <<_:1000000/binary>>}}},
                 call(Sender, macula_peer_connector, send_message_and_wait,
                      [macula_peer_net:endpoint(Ip, Port), rpc_request, macula_peer_test:rpc(<<"bytes">>, 1000000),
                       20000])),
    _ = [macula_peer_test:stop_node(Node) || Node <- [Sender, Listener]],
    ok.

%% ---- pairs ----

a_public_node_and_a_port_restricted_one(Config) -> meet(none, port_restricted, Config).

a_full_cone_and_an_address_restricted_one(Config) -> meet(full_cone, address_restricted, Config).

two_port_restricted_ones(Config) -> meet(port_restricted, port_restricted, Config).

a_port_restricted_and_a_carrier_grade_one(Config) -> meet(port_restricted, carrier_grade, Config).

a_symmetric_and_an_address_restricted_one(Config) -> meet(symmetric, address_restricted, Config).

a_symmetric_and_a_port_restricted_one(Config) -> meet(symmetric, port_restricted, Config).

a_port_restricted_and_a_symmetric_one(Config) -> meet(port_restricted, symmetric, Config).

a_sequential_and_a_port_restricted_one(Config) -> meet(symmetric_sequential, port_restricted, Config).

two_symmetric_ones_say_that_they_need_a_relay(Config) -> meet(symmetric, symmetric, Config).

two_ipv6_firewalls(Config) -> meet(ipv6_firewall, ipv6_firewall, Config).

a_port_restricted_and_a_blocked_one(Config) -> meet(port_restricted, udp_blocked, Config).

neighbours(Config) -> meet(port_restricted, neighbour, Config).

symmetric_neighbours(Config) -> meet(symmetric, neighbour, Config).

neighbours_that_need_a_hairpin(Config) -> meet(hairpin, neighbour, Config).

meet(Kind, Other, Config) ->
    {_, Meetings} = Result = macula_peer_natlab_pairs:meet_as_expected(?config(pairs, Config), Kind, Other, 1),
    ct:pal("~p", [Meetings]),
    ?assertMatch({ok, _}, Result).

%% ---- common ----

%% The relay that has two addresses.
observer(Lab, Site) ->
    hd(macula_peer_natlab:relays(Lab, Site)).

%% At the relay with an address of the family of the host that asks.
socket(Lab, relay, Asking) ->
    {Host, [Ip | _]} = observer(Lab, Asking),
    buffered(macula_peer_net:socket(Host, Ip, 0));
socket(Lab, Site, _Asking) ->
    buffered(macula_peer_net:socket(hd(macula_peer_natlab:hosts(Lab, Site)), 0)).

buffered(Socket) ->
    ok = inet:setopts(Socket, [{recbuf, 1 bsl 20}]),
    Socket.
