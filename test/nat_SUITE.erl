%% Nodes find out what the NAT is like that they are behind.
-module(nat_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, until/2, events/2, closed_port/0]).
-import(macula_peer_relays, [start_relay/2, node_of/1, start_member/2, await_registered/2]).

-define(SECOND, {127, 0, 0, 2}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [without_a_relay_little_is_known, no_nat, one_address_does_not_tell_everything, a_node_that_moves_detects_its_nat_again,
     options_are_checked, {group, real}].

groups() ->
    [{real, [], [two_relays_tell_everything, a_relay_with_two_addresses_tells_as_much, a_long_distance_makes_no_difference]}].

init_per_group(real, Config) ->
    case macula_peer_net:available() of
        ok -> [{lab, macula_peer_natlab:start([{Kind, Kind} || Kind <- macula_peer_natlab:kinds()])} | Config];
        {skip, _} = Skip -> Skip
    end.

end_per_group(real, _Config) ->
    macula_peer_natlab:stop().

without_a_relay_little_is_known(_Config) ->
    ok = macula_peer_test:engine(#{}),
    Profile = macula_peer_node:nat_profile(),
    ?assertMatch(#{mapping_policy := unknown, filtering_policy := unknown, allocation_policy := unknown,
                   reflexive_address := undefined, detected_at := undefined}, Profile),
    {ok, {_, Port}} = macula_peer_node:local_address(),
    {ok, Interfaces} = inet:getifaddrs(),
    Own = [Ip || {_, Opts} <- Interfaces, {addr, Ip} <- Opts],
    #{local_addresses := Local} = Profile,
    [?assert(P =:= Port andalso lists:member(Ip, Own) andalso not is_own(Ip)) || {Ip, P} <- Local],
    ?assert([] =/= Local orelse lists:all(fun is_own/1, Own)),
    ok = macula_peer_node:stop().

no_nat(_Config) ->
    Before = erlang:system_time(millisecond),
    Relay = start_relay(here, #{probe_ip => ?SECOND}),
    Member = start_member(here, settings(name, [Relay])),
    await_registered(Member, [Relay]),
    until(fun() -> policies(Member) =:= {ei, ei, pp} end),
    {ok, {_, Port}} = call(Member, macula_peer_node, local_address, []),
    #{reflexive_address := Seen, detected_at := At} = Profile = profile(Member),
    ?assertEqual({{127, 0, 0, 1}, Port}, Seen),
    ?assert(At >= Before andalso At =< erlang:system_time(millisecond)),
    until(fun() -> lists:member(Profile#{event => nat_profile}, events(Member, nat_profile)) end),
    %% The same again is no news.
    ?assertMatch([_], events(Member, nat_profile)).

one_address_does_not_tell_everything(_Config) ->
    Relay = start_relay(here, #{probe_port => closed_port()}),
    Member = start_member(here, settings(name, [Relay])),
    until(fun() -> policies(Member) =:= {unknown, hd, pp} end).

a_node_that_moves_detects_its_nat_again(_Config) ->
    Relay = start_relay(here, #{}),
    Member = start_member(here, settings(name, [Relay])),
    until(fun() -> policies(Member) =/= {unknown, unknown, unknown} end),
    Port = closed_port(),
    {ok, {_, Port}} = call(Member, macula_peer_node, listen, [#{port => Port}]),
    until(fun() -> maps:get(reflexive_address, profile(Member)) =:= {{127, 0, 0, 1}, Port} end),
    until(fun() -> [Port] =:= [P || #{reflexive_address := {_, P}} <- [lists:last(events(Member, nat_profile))]] end).

options_are_checked(_Config) ->
    Relay = start_relay(here, #{}),
    Node = node_of(Relay),
    ok = call(Node, macula_peer_node, close, []),
    Listen = fun(Opts) -> call(Node, macula_peer_node, listen, [#{relay => Opts}]) end,
    [?assertEqual({error, {invalid_option, {Key, Value}}}, Listen(#{Key => Value}))
     || {Key, Value} <- [{probe_port, 65536}, {probe_port, any}, {probe_ip, "127.0.0.1"}, {probe_ip, {1, 2, 3}}]],
    ?assertEqual({error, {listen_failed, eaddrnotavail}}, Listen(#{probe_ip => {192, 0, 2, 1}})),
    ?assertMatch({ok, _}, Listen(#{probe_ip => ?SECOND, probe_port => 0})),
    ?assertError({badmatch, {error, {invalid_option, {hole_punching, sometimes}}}},
                 macula_peer_test:engine(#{hole_punching => sometimes})),
    [ok = macula_peer_test:engine(#{hole_punching => How}) || How <- [on, plain, off]].

%% ---- behind real NATs ----

two_relays_tell_everything(Config) ->
    all_are_told_apart(?config(lab, Config), [#{}, #{}]).

%% The other relay host has no relay.
a_relay_with_two_addresses_tells_as_much(Config) ->
    Lab = ?config(lab, Config),
    [{_, [_, Second | _]} | _] = macula_peer_natlab:relays(Lab, none),
    %% Of the same family as the first.
    are_told_apart(Lab, macula_peer_natlab:kinds() -- [ipv6_firewall], [#{probe_ip => Second}]).

%% Nothing in it depends on quick answers. From here on the cables are long.
a_long_distance_makes_no_difference(Config) ->
    Lab = ?config(lab, Config),
    ok = macula_peer_natlab:lengthen(Lab, 40),
    all_are_told_apart(Lab, [#{}, #{}]).

all_are_told_apart(Lab, Limits) ->
    are_told_apart(Lab, macula_peer_natlab:kinds(), Limits).

%% A relay on each of the first relay hosts, a node behind each kind of NAT.
are_told_apart(Lab, Kinds, Limits) ->
    Hosts = lists:sublist(macula_peer_natlab:relays(Lab), length(Limits)),
    Relays = [start_relay(Host, Of) || {{Host, _}, Of} <- lists:zip(Hosts, Limits)],
    Members = [{Kind, start_member(host(Lab, Kind), settings(Kind, endpoints(Lab, Kind, Relays)))} || Kind <- Kinds],
    Expected = [{Kind, policies_of(macula_peer_nat:is(Kind)), macula_peer_natlab:public(Lab, Kind)} || Kind <- Kinds],
    _ = try until(fun() -> Expected =:= found(Members) end, 10000) catch error:{not_in_time, _} -> ok end,
    ?assertEqual(Expected, found(Members)).

%% A node that looks for no direct paths does not find out what its NAT does.
settings(Name, Relays) ->
    (macula_peer_relays:settings(Name, Relays))#{hole_punching => on}.

found(Members) ->
    [{Kind, policies(Member), seen(profile(Member))} || {Kind, Member} <- Members].

seen(#{reflexive_address := {Ip, _}}) -> Ip;
seen(#{reflexive_address := undefined}) -> undefined.

policies_of(#{mapping := Mapping, filtering := Filtering, allocation := Allocation}) ->
    {Mapping, Filtering, Allocation}.

host(Lab, Kind) -> hd(macula_peer_natlab:hosts(Lab, Kind)).

%% Those of the family that the site has.
endpoints(Lab, Kind, Relays) ->
    [macula_peer_net:endpoint(hd(Ips), port(Relay)) || {{_, Ips}, Relay} <- zip(macula_peer_natlab:relays(Lab, Kind), Relays)].

zip(Hosts, Relays) -> lists:zip(lists:sublist(Hosts, length(Relays)), Relays).

port({relay, _Node, _Where, _Limits, Port}) -> Port.

profile(Node) ->
    call(Node, macula_peer_node, nat_profile, []).

policies(Node) ->
    #{mapping_policy := Mapping, filtering_policy := Filtering, allocation_policy := Allocation} = profile(Node),
    {Mapping, Filtering, Allocation}.

is_own({127, _, _, _}) -> true;
is_own({169, 254, _, _}) -> true;
is_own({0, 0, 0, 0, 0, 0, 0, 1}) -> true;
is_own({16#FE80, _, _, _, _, _, _, _}) -> true;
is_own(_) -> false.
