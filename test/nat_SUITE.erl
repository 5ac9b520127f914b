%% Nodes find out what the NAT is like that they are behind.
-module(nat_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, events/2, closed_port/0]).
-import(macula_peer_relays, [start_relay/2, node_of/1, start_member/2, settings/2, await_registered/2]).

-define(SECOND, {127, 0, 0, 2}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [without_a_relay_little_is_known, no_nat, one_address_does_not_tell_everything, who_moves_looks_again,
     options_are_checked].

without_a_relay_little_is_known(_Config) ->
    ok = macula_peer_test:engine(#{}),
    Profile = macula_peer_endpoint:nat_profile(),
    ?assertMatch(#{mapping_policy := unknown, filtering_policy := unknown, allocation_policy := unknown,
                   reflexive_address := undefined, detected_at := undefined}, Profile),
    {ok, {_, Port}} = macula_peer_endpoint:local_address(),
    {ok, Interfaces} = inet:getifaddrs(),
    Own = [Ip || {_, Opts} <- Interfaces, {addr, Ip} <- Opts],
    #{local_addresses := Local} = Profile,
    [?assert(P =:= Port andalso lists:member(Ip, Own) andalso not is_own(Ip)) || {Ip, P} <- Local],
    ?assert([] =/= Local orelse lists:all(fun is_own/1, Own)),
    ok = macula_peer_endpoint:stop().

no_nat(_Config) ->
    Before = erlang:system_time(millisecond),
    Relay = start_relay(here, #{probe_ip => ?SECOND}),
    Member = start_member(here, settings(name, [Relay])),
    await_registered(Member, [Relay]),
    until(fun() -> policies(Member) =:= {ei, ei, pp} end),
    {ok, {_, Port}} = call(Member, macula_peer_endpoint, local_address, []),
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

who_moves_looks_again(_Config) ->
    Relay = start_relay(here, #{}),
    Member = start_member(here, settings(name, [Relay])),
    until(fun() -> policies(Member) =/= {unknown, unknown, unknown} end),
    Port = closed_port(),
    {ok, {_, Port}} = call(Member, macula_peer_endpoint, listen, [#{port => Port}]),
    until(fun() -> maps:get(reflexive_address, profile(Member)) =:= {{127, 0, 0, 1}, Port} end),
    until(fun() -> [Port] =:= [P || #{reflexive_address := {_, P}} <- [lists:last(events(Member, nat_profile))]] end).

options_are_checked(_Config) ->
    Relay = start_relay(here, #{}),
    Node = node_of(Relay),
    ok = call(Node, macula_peer_endpoint, close, []),
    Listen = fun(Opts) -> call(Node, macula_peer_endpoint, listen, [#{relay => Opts}]) end,
    [?assertEqual({error, {invalid_option, {Key, Value}}}, Listen(#{Key => Value}))
     || {Key, Value} <- [{probe_port, 65536}, {probe_port, any}, {probe_ip, "127.0.0.1"}, {probe_ip, {1, 2, 3}}]],
    ?assertEqual({error, {listen_failed, eaddrnotavail}}, Listen(#{probe_ip => {192, 0, 2, 1}})),
    ?assertMatch({ok, _}, Listen(#{probe_ip => ?SECOND, probe_port => 0})).

profile(Node) ->
    call(Node, macula_peer_endpoint, nat_profile, []).

policies(Node) ->
    #{mapping_policy := Mapping, filtering_policy := Filtering, allocation_policy := Allocation} = profile(Node),
    {Mapping, Filtering, Allocation}.

is_own({127, _, _, _}) -> true;
is_own({169, 254, _, _}) -> true;
is_own({0, 0, 0, 0, 0, 0, 0, 1}) -> true;
is_own({16#FE80, _, _, _, _, _, _, _}) -> true;
is_own(_) -> false.
