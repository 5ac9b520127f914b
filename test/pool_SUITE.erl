%% The pool keeps a bounded number of peers, evicts the least recently used one, and forgets unused ones.
-module(pool_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/3, send_message/4]).
-import(macula_peer_test, [endpoint/2, until/1]).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [the_least_recently_used_peer_is_evicted, an_evicted_peer_loses_no_message,
     a_caller_of_an_evicted_peer_is_answered, an_idle_peer_is_forgotten, a_used_peer_is_kept,
     hits_and_misses_are_counted, spellings_of_one_address_are_one_peer].

%% One listener: each address of 127/8 is a peer of its own.
init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {port, Port} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

the_least_recently_used_peer_is_evicted(Config) ->
    macula_peer_test:engine([{pool_size, 3}]),
    [A, B, C, D, E] = peers(Config),
    [use(Peer) || Peer <- [A, B, C]],
    ?assertMatch(#{evictions := 0, pool_size := 3}, pool()),
    use(A),
    use(D),
    ?assertEqual(lists:sort([A, C, D]), known()),
    use(A),
    use(E),
    ?assertEqual(lists:sort([A, D, E]), known()),
    ?assertMatch(#{evictions := 2, pool_size := 3}, pool()),
    %% Their links are closed.
    until(fun() -> length(maps:get(accepted, macula_peer_test:stats(?config(node, Config)))) =:= 3 end).

an_evicted_peer_loses_no_message(Config) ->
    macula_peer_test:engine([{pool_size, 3}]),
    Base = erlang:unique_integer([positive]) * 1000,
    Ids = lists:seq(Base + 1, Base + 500),
    [ok = send_message(lists:nth(1 + Id rem 5, peers(Config)), store, #{id => Id}, 5000) || Id <- Ids],
    until(fun() -> Ids -- macula_peer_test:ids(?config(node, Config)) =:= [] end),
    ?assertMatch(#{undelivered := 0, pool := #{evictions := Evictions}} when Evictions >= 400,
                 macula_peer_node:stats()).

a_caller_of_an_evicted_peer_is_answered(Config) ->
    macula_peer_test:engine([{pool_size, 1}]),
    {Socket, Port} = macula_peer_test:silent_port(),
    Silent = macula_peer_test:endpoint(Port),
    {Pid, Monitor} = spawn_monitor(fun() -> exit({result, send_message(Silent, store, #{}, 3000)}) end),
    until(fun() -> known() =:= [Silent] end),
    [Other | _] = peers(Config),
    use(Other),
    ?assertEqual([Other], known()),
    receive
        {'DOWN', Monitor, process, Pid, {result, Result}} ->
            ?assertEqual({error, {connect_failed, transport_down}}, Result)
    after 10000 -> error(not_answered)
    end,
    gen_udp:close(Socket).

an_idle_peer_is_forgotten(Config) ->
    macula_peer_test:engine([{idle_timeout, 1000}]),
    [A | _] = peers(Config),
    use(A),
    ?assertEqual([A], known()),
    until(fun() -> known() =:= [] end),
    until(fun() -> maps:get(accepted, macula_peer_test:stats(?config(node, Config))) =:= [] end),
    ?assertMatch(#{evictions := 0}, pool()),
    use(A).

a_used_peer_is_kept(Config) ->
    macula_peer_test:engine([{idle_timeout, 1000}]),
    [A | _] = peers(Config),
    Started = erlang:monotonic_time(millisecond),
    until(fun() -> use(A), erlang:monotonic_time(millisecond) > Started + 2500 end),
    ?assertMatch(#{dials := 1}, macula_peer_test:peer_stats(A)).

hits_and_misses_are_counted(Config) ->
    macula_peer_test:engine([]),
    [A, B | _] = peers(Config),
    ?assertEqual(#{hits => 0, misses => 0, total => 0, hit_rate => 0.0, evictions => 0, pool_size => 0}, pool()),
    [use(Peer) || Peer <- [A, B, A, A]],
    ?assertEqual(#{hits => 2, misses => 2, total => 4, hit_rate => 0.5, evictions => 0, pool_size => 2}, pool()).

spellings_of_one_address_are_one_peer(Config) ->
    macula_peer_test:engine([]),
    Address = binary_to_list(endpoint("127.0.0.1", ?config(port, Config))),
    [use(Peer) || Peer <- [Address, list_to_binary(Address), "https://" ++ Address, "http://" ++ Address]],
    ?assertEqual([list_to_binary(Address)], known()).

peers(Config) ->
    [endpoint("127.0.0." ++ integer_to_list(I), ?config(port, Config)) || I <- lists:seq(1, 5)].

%% Last use is known to the millisecond: the next one is later.
use(Peer) ->
    ok = send_message(Peer, store, #{}),
    Now = erlang:monotonic_time(millisecond),
    until(fun() -> erlang:monotonic_time(millisecond) > Now + 1 end).

known() -> lists:sort([Endpoint || #{endpoint := Endpoint} <- maps:get(peers, macula_peer_node:stats())]).

pool() -> maps:get(pool, macula_peer_node:stats()).
