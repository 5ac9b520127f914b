%% A relay gives no more than it was told to, and says which limit it was. What a limit slows down arrives all the same.
-module(relay_limits_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, until/2, elapsed/1, events/2]).
-import(macula_peer_relays, [start_relay/2, endpoint/1, relay_stats/1, start_member/2, settings/2, id/1,
                             await_registered/2, registration/3, await_registration/4, send/4, send/5, delivered/2]).

-define(SECRET, <<"the secret of the realm">>).

suite() -> [{timetrap, {seconds, 120}}].

all() ->
    [a_node_id_is_its_first_owners, a_node_id_is_kept_for_its_owner_for_a_while, sessions, sessions_per_node,
     registrations, accept_rate, shares, a_realm_needs_its_secret, idle_circuits_end,
     messages_beyond_the_bandwidth_arrive_later, messages_beyond_the_queue_arrive_later].

%% ---- node ids ----

a_node_id_is_its_first_owners(_Config) ->
    Relay = start_relay(here, #{}),
    Owner = start_member(here, settings(name, [Relay])),
    await_registered(Owner, [Relay]),
    Other = start_member(here, settings(name, [Relay])),
    Endpoint = endpoint(Relay),
    until(fun() -> [] =/= [taken || #{relay := E, state := refused, reason := node_id_taken}
                                        <- events(Other, registration), E =:= Endpoint] end),
    ?assertMatch([#{relay := Endpoint, state := refused}], maps:get(registrations, macula_peer_test:stats(Other))),
    %% The owner may come again, and its messages still go to it.
    ?assertEqual(registered, registration(Owner, id(name), Relay)),
    Sender = start_member(here, settings(sender, [Relay])),
    ?assertEqual(ok, send(Sender, {sender, name}, 1, #{})),
    _ = delivered(Owner, 1),
    ?assertEqual(refused(node_id_taken), send(Other, {name, sender}, 2, #{})),
    ?assertMatch(#{registrations := 2, refused := #{node_id_taken := N}} when N >= 1, relay_stats(Relay)).

%% It begins when the owner goes.
a_node_id_is_kept_for_its_owner_for_a_while(_Config) ->
    Relay = start_relay(here, #{grace => 2000}),
    Owner = start_member(here, settings(name, [Relay])),
    await_registered(Owner, [Relay]),
    Gone = erlang:monotonic_time(millisecond),
    ok = call(Owner, macula_peer_node, stop, []),
    until(fun() -> maps:get(registrations, relay_stats(Relay)) =:= 0 end),
    Other = start_member(here, #{}),
    ?assertEqual(node_id_taken, registration(Other, id(name), Relay)),
    await_registration(Other, id(name), Relay, registered),
    ?assert(erlang:monotonic_time(millisecond) - Gone >= 2000),
    %% Now it is the other's.
    ok = call(Owner, macula_peer_relays, engine, [#{}]),
    ?assertEqual(node_id_taken, registration(Owner, id(name), Relay)).

%% ---- how many ----

sessions(_Config) ->
    Relay = start_relay(here, #{max_sessions => 1}),
    [A, B | Targets] = members([a, b, c, d], Relay),
    ?assertEqual(ok, send(A, {a, c}, 1, #{})),
    [?assertEqual(refused(sessions), send(From, Names, 2, #{})) || {From, Names} <- [{A, {a, d}}, {B, {b, d}}]],
    ?assertEqual(ok, send(A, {a, c}, 3, #{})),
    _ = delivered(hd(Targets), 3),
    ?assertMatch(#{circuits := 1, refused := #{sessions := N}} when N >= 2, relay_stats(Relay)).

sessions_per_node(_Config) ->
    Relay = start_relay(here, #{max_sessions_per_node => 1}),
    [A, B, C, D] = members([a, b, c, d], Relay),
    ?assertEqual(ok, send(A, {a, c}, 1, #{})),
    %% Circuits that a node opens and circuits to it have separate limits.
    [?assertEqual(refused(sessions_per_node), send(From, Names, 2, #{}))
     || {From, Names} <- [{A, {a, d}}, {B, {b, c}}]],
    ?assertEqual(ok, send(B, {b, d}, 3, #{})),
    [_ = delivered(Target, Id) || {Target, Id} <- [{C, 1}, {D, 3}]],
    ?assertMatch(#{circuits := 2, refused := #{sessions_per_node := N}} when N >= 2, relay_stats(Relay)).

registrations(_Config) ->
    Relay = start_relay(here, #{max_registrations => 1}),
    [First] = members([a], Relay),
    Second = start_member(here, #{}),
    ?assertEqual(registrations, registration(Second, id(b), Relay)),
    ?assertEqual(refused(registrations), send(Second, {b, a}, 1, #{relay_endpoint => endpoint(Relay)})),
    ?assertMatch(#{registrations := 1, refused := #{registrations := N}} when N >= 1, relay_stats(Relay)),
    ok = call(First, macula_peer_node, unregister, []),
    await_registration(Second, id(b), Relay, registered).

%% One a second: of three that come at once two are too many, and get in later.
accept_rate(_Config) ->
    Relay = start_relay(here, #{accept_rate => 1}),
    Members = [{start_member(here, #{}), Name} || Name <- [a, b, c]],
    Answers = macula_peer_test:in_parallel(3, fun(N) ->
        {Node, Name} = lists:nth(N, Members),
        registration(Node, id(Name), Relay)
    end),
    ct:pal("~p", [Answers]),
    ?assertEqual([accept_rate, registered], lists:usort(Answers)),
    ?assertMatch(#{refused := #{accept_rate := N}} when N >= 1, relay_stats(Relay)),
    [await_registered_slowly(Node, Name, Relay) || {Node, Name} <- Members],
    ?assertMatch(#{registrations := 3}, relay_stats(Relay)).

await_registered_slowly(Node, Name, Relay) ->
    #{registrations := [#{state := State}]} = macula_peer_test:stats(Node),
    State =:= registered orelse await_registration(Node, id(Name), Relay, registered).

%% One key has half of the two names: a name that its node has just given up counts too. The other half is for others.
shares(_Config) ->
    Relay = start_relay(here, #{max_registrations => 2, key_share => 50, address_share => 100, grace => 60000}),
    [First] = members([a], Relay),
    timer:sleep(500),
    ?assertEqual(registrations_per_key, registration(First, id(b), Relay)),
    ?assertEqual(refused(registrations_per_key), send(First, {b, a}, 1, #{relay_endpoint => endpoint(Relay)})),
    Second = start_member(here, #{}),
    ?assertEqual(registered, registration(Second, id(b), Relay)),
    ?assertEqual(registered, registration(First, id(a), Relay)),
    ?assertMatch(#{registrations := 2, refused := #{registrations_per_key := N}} when N >= 1, relay_stats(Relay)),
    [?assertMatch({error, {invalid_option, {Option, Wrong}}},
                  call(First, macula_peer_node, listen, [#{relay => #{Option => Wrong}}]))
     || Option <- [key_share, address_share], Wrong <- [0, 101, -1, 0.5, half]].

a_realm_needs_its_secret(_Config) ->
    Relay = start_relay(here, #{realm_secret => ?SECRET}),
    [Without, Wrong, Right] = Nodes =
        [start_member(here, Settings)
         || Settings <- [#{}, #{realm_secret => <<"another">>}, #{realm_secret => ?SECRET}]],
    Names = [without, wrong, right],
    ?assertEqual([realm, realm, registered],
                 [registration(Node, id(Name), Relay) || {Node, Name} <- lists:zip(Nodes, Names)]),
    [?assertEqual(refused(realm), send(Node, {Name, right}, 1, #{relay_endpoint => endpoint(Relay)}))
     || {Node, Name} <- [{Without, without}, {Wrong, wrong}]],
    [Sender] = members([sender], Relay, #{realm_secret => ?SECRET}),
    ?assertEqual(ok, send(Sender, {sender, right}, 2, #{})),
    _ = delivered(Right, 2),
    ?assertEqual([2], macula_peer_test:ids(Right)),
    ?assertMatch(#{registrations := 2, refused := #{realm := N}} when N >= 2, relay_stats(Relay)).

%% ---- how long and how much ----

idle_circuits_end(_Config) ->
    Relay = start_relay(here, #{idle_timeout => 500}),
    [A, B] = members([a, b], Relay),
    [begin
         ?assertEqual(ok, send(A, {a, b}, Id, #{})),
         _ = delivered(B, Id),
         until(fun() -> maps:get(circuits, relay_stats(Relay)) =:= 0 end),
         until(fun() -> [Of || #{circuits := Of} <- maps:get(registrations, macula_peer_test:stats(A))] =:= [0] end)
     end || Id <- [1, 2]],
    ?assertMatch(#{registrations := 2, circuits := 0}, relay_stats(Relay)),
    ?assertEqual([], events(A, undelivered)).

%% 500 KB at 100 KB/s, of which 64 KB may go at once.
messages_beyond_the_bandwidth_arrive_later(_Config) ->
    Relay = start_relay(here, #{bandwidth => 100000}),
    [A, B] = members([a, b], Relay),
    {Took, ok} = elapsed(fun() -> transfer(A, B, 50, 10000) end),
    ct:pal("~p ms", [Took]),
    ?assert(Took >= 4000),
    limit_is_told(bandwidth, A, Relay).

%% The path to the target is slow, so packets to it have to wait.
messages_beyond_the_queue_arrive_later(_Config) ->
    Relay = start_relay(here, #{packet_queue => 4000, bandwidth => 1 bsl 30}),
    Path = macula_peer_forwarder:start(here, endpoint(Relay), #{delay => 25}),
    [A] = members([a], Relay),
    [B] = members([b], macula_peer_forwarder:endpoint(Path)),
    transfer(A, B, 30, 10000),
    limit_is_told(packet_queue, A, Relay).

%% The messages are all there, once each.
transfer(From, To, Count, Size) ->
    Ids = lists:seq(1, Count),
    [ok = send(From, {a, b}, store, #{id => Id, payload => rand:bytes(Size)}, #{timeout => 60000}) || Id <- Ids],
    until(fun() -> macula_peer_test:count(To) >= Count end, 60000),
    ?assertEqual({in_order, Count}, macula_peer_relays:sequence(To)),
    ok.

limit_is_told(Limit, Node, Relay) ->
    Endpoint = endpoint(Relay),
    until(fun() -> [] =/= [told || #{limit := L, relay := E} <- events(Node, relay_limit), L =:= Limit, E =:= Endpoint]
          end),
    #{dropped := Dropped} = relay_stats(Relay),
    ?assertMatch(#{Limit := N} when N > 0, Dropped),
    ?assertEqual([], events(Node, undelivered)).

%% ---- common ----

members(Names, Relay) ->
    members(Names, Relay, #{}).

members(Names, Relay, Settings) ->
    Members = [start_member(here, maps:merge(settings(Name, [Relay]), Settings)) || Name <- Names],
    [await_registered(Member, [Relay]) || Member <- Members],
    Members.

refused(Limit) ->
    {error, {nat_connection_failed, {relay_setup_failed, Limit}}}.
