%% What happens is counted, each thing where it belongs.
-module(stats_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([a_link_to_a_gateway/1, a_link_between_our_nodes/1, unacknowledged_bytes/1, failed_calls/1, redials/1]).
-export([pool/1, evictions/1, idle_peers_leave/1]).
-export([expired_messages/1, lost_messages/1, stopped_messages/1]).
-export([unhandled_messages/1, malformed_messages/1, refused_connections/1]).

-define(TIMEOUT, 5000).

all() ->
    [a_link_to_a_gateway, a_link_between_our_nodes, unacknowledged_bytes, failed_calls, redials, pool, evictions,
     idle_peers_leave, expired_messages, lost_messages, stopped_messages, unhandled_messages, malformed_messages,
     refused_connections].

init_per_suite(Config) ->
    [{other, macula_peer_test:start_node()} | Config].

end_per_suite(Config) ->
    peer:stop(other(Config)).

init_per_testcase(_Case, Config) ->
    ok = macula_peer_test:engine(#{}),
    ok = on(Config, macula_peer_test, engine, [#{}]),
    Config.

end_per_testcase(_Case, Config) ->
    ok = on(Config, macula_peer_node, stop, []),
    macula_peer_node:stop().

%% ---- peers and links ----

a_link_to_a_gateway(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    ?assertMatch(#{peers := [], accepted := [], verify_none_links := 0, undelivered := 0, unhandled := 0,
                   malformed := 0, sessions := 0}, macula_peer_node:stats()),
    [ok = send(Endpoint, #{n => N}) || N <- lists:seq(1, 10)],
    {ok, _} = ping(Endpoint, ?TIMEOUT),
    Stats = acknowledged(Endpoint, 11),
    Address = {{127, 0, 0, 1}, macula_peer_fake_gateway:port(Gateway)},
    ?assertMatch(#{endpoint := Endpoint, path := direct, dialect := macula, address := Address, sent := 11,
                   received := 1, failed := 0, dials := 1, unacknowledged_bytes := 0}, Stats),
    ?assert(maps:get(round_trip_us, Stats) > 0),
    ?assertMatch(#{verify_none_links := 1, undelivered := 0}, macula_peer_node:stats()).

a_link_between_our_nodes(Config) ->
    ok = macula_peer_node:set_handler(self()),
    Endpoint = listen(),
    [ok = on(Config, macula_peer_connector, send_message, [Endpoint, cast, #{n => N}]) || N <- lists:seq(1, 5)],
    Theirs = macula_peer_test:await(fun() -> on(Config, macula_peer_test, peer_stats, [Endpoint]) end,
                                    fun(#{acknowledged := N}) -> N =:= 5 end),
    ?assertMatch(#{dialect := 'macula-peer/1', path := direct, sent := 5, dials := 1}, Theirs),
    {ok, {_, TheirPort}} = on(Config, macula_peer_node, local_address, []),
    #{accepted := [Accepted]} = macula_peer_node:stats(),
    ?assertMatch(#{dialect := 'macula-peer/1', address := {{127, 0, 0, 1}, TheirPort}, received := 5}, Accepted),
    ?assert(maps:get(round_trip_us, Accepted) > 0),
    %% They are gone when they say so.
    ok = on(Config, macula_peer_node, stop, []),
    stats(accepted, []).

unacknowledged_bytes(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    {ok, _} = ping(Endpoint, ?TIMEOUT),
    _ = acknowledged(Endpoint, 1),
    ok = macula_peer_fake_gateway:silence(Gateway, on),
    Msg = #{payload => <<0:8000>>},
    {ok, Frame} = macula_peer_wire:encode(cast, Msg),
    [ok = send(Endpoint, Msg) || _ <- lists:seq(1, 3)],
    ?assertMatch(#{sent := 4, acknowledged := 1, unacknowledged_bytes := Bytes} when Bytes =:= 3 * byte_size(Frame),
                 macula_peer_test:peer_stats(Endpoint)),
    ok = macula_peer_fake_gateway:silence(Gateway, off),
    _ = macula_peer_test:await(fun() -> macula_peer_test:peer_stats(Endpoint) end,
                               fun(#{unacknowledged_bytes := Left}) -> Left =:= 0 end),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()).

failed_calls(_Config) ->
    Endpoint = macula_peer_test:endpoint("127.0.0.1", macula_peer_test:free_port()),
    {error, {connect_failed, transport_down}} = send(Endpoint, #{}),
    {error, {connect_failed, transport_down}} = ping(Endpoint, ?TIMEOUT),
    Stats = macula_peer_test:peer_stats(Endpoint),
    ?assertMatch(#{failed := 2, sent := 0, acknowledged := 0, received := 0, path := none,
                   unacknowledged_bytes := 0}, Stats),
    ?assertEqual([], [Key || Key <- [dialect, address, round_trip_us], maps:is_key(Key, Stats)]),
    ?assertMatch(#{dials := Dials} when Dials >= 2, Stats),
    ?assertMatch(#{verify_none_links := 0, undelivered := 0}, macula_peer_node:stats()),
    %% What is refused before it concerns a peer concerns none.
    {error, {invalid_endpoint, _}} = send(<<"nowhere">>, #{}),
    {error, {invalid_message, _}} = macula_peer_connector:send_message(Endpoint, ping, #{}),
    ?assertMatch(#{failed := 2}, macula_peer_test:peer_stats(Endpoint)).

redials(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    {ok, _} = ping(Endpoint, ?TIMEOUT),
    ok = macula_peer_fake_gateway:stop(Gateway),
    _ = macula_peer_fake_gateway:start(["--bind", binary_to_list(Endpoint)]),
    {ok, _} = macula_peer_test:await(fun() -> ping(Endpoint, ?TIMEOUT) end, fun({Result, _}) -> Result =:= ok end),
    ?assertMatch(#{dials := Dials, path := direct} when Dials >= 2, macula_peer_test:peer_stats(Endpoint)),
    ?assertMatch(#{verify_none_links := 2}, macula_peer_node:stats()).

%% ---- pool ----

pool(_Config) ->
    ?assertEqual(#{hits => 0, misses => 0, evictions => 0, total => 0, hit_rate => 0.0, pool_size => 0}, pool()),
    Endpoint = macula_peer_fake_gateway:endpoint(macula_peer_fake_gateway:start()),
    [{ok, _} = ping(Endpoint, ?TIMEOUT) || _ <- lists:seq(1, 2)],
    [ok = send(Endpoint, #{}) || _ <- lists:seq(1, 2)],
    ?assertEqual(#{hits => 3, misses => 1, evictions => 0, total => 4, hit_rate => 0.75, pool_size => 1}, pool()).

evictions(_Config) ->
    ok = macula_peer_test:engine(#{pool_size => 2}),
    Port = macula_peer_fake_gateway:port(macula_peer_fake_gateway:start(["--bind", "0.0.0.0:0"])),
    [First, Second, Third] = Endpoints = [macula_peer_test:endpoint(["127.0.0.", N], Port) || N <- ["1", "2", "3"]],
    %% A pause, for the clock to tell which was used last.
    [begin
         {ok, _} = ping(Endpoint, ?TIMEOUT),
         timer:sleep(10)
     end || Endpoint <- Endpoints],
    ?assertMatch(#{evictions := 1, pool_size := 2, misses := 3}, pool()),
    ?assertEqual([Second, Third], endpoints()),
    {ok, _} = ping(First, ?TIMEOUT),
    ?assertMatch(#{evictions := 2, pool_size := 2, misses := 4}, pool()),
    ?assertEqual([First, Third], endpoints()).

idle_peers_leave(_Config) ->
    ok = macula_peer_test:engine(#{idle_timeout => 300, keep_alive => 100}),
    Endpoint = macula_peer_fake_gateway:endpoint(macula_peer_fake_gateway:start()),
    {ok, _} = ping(Endpoint, ?TIMEOUT),
    _ = macula_peer_test:await(fun pool/0, fun(#{pool_size := Size}) -> Size =:= 0 end),
    ?assertMatch(#{evictions := 0}, pool()),
    {ok, _} = ping(Endpoint, ?TIMEOUT),
    ?assertMatch(#{pool_size := 1}, pool()).

endpoints() ->
    lists:sort([Endpoint || #{endpoint := Endpoint} <- maps:get(peers, macula_peer_node:stats())]).

pool() ->
    maps:get(pool, macula_peer_node:stats()).

%% ---- undelivered ----

expired_messages(_Config) ->
    ok = macula_peer_test:engine(#{connect_timeout => 500}),
    ?assertEqual(expired, undelivered(fun(_Gateway) -> ok end)).

lost_messages(_Config) ->
    ok = macula_peer_test:engine(#{delivery => at_most_once, connect_timeout => 500}),
    ?assertEqual(connection_closed, undelivered(fun(Gateway) -> ok = macula_peer_fake_gateway:stop(Gateway) end)).

stopped_messages(_Config) ->
    Endpoint = silent(fun(_Gateway) -> ok end),
    ok = macula_peer_node:stop(),
    ?assertEqual({3, stopped}, reported(Endpoint, 0)).

%% Sends to a gateway that has fallen silent; why its messages are reported.
undelivered(Then) ->
    Endpoint = silent(Then),
    {3, Reason} = reported(Endpoint, 0),
    stats(undelivered, 3),
    ?assertMatch(#{failed := 3, unacknowledged_bytes := 0}, macula_peer_test:peer_stats(Endpoint)),
    Reason.

silent(Then) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    ok = macula_peer_node:set_handler(self()),
    {ok, _} = ping(Endpoint, ?TIMEOUT),
    _ = acknowledged(Endpoint, 1),
    ok = macula_peer_fake_gateway:silence(Gateway, on),
    [ok = macula_peer_connector:send_message(Endpoint, cast, #{n => N}, 400) || N <- lists:seq(1, 3)],
    ok = Then(Gateway),
    Endpoint.

%% The events may come in several.
reported(Endpoint, Before) ->
    receive
        {macula_peer_event, #{event := undelivered, peer := Endpoint, count := Count, reason := Reason}} ->
            case Before + Count of
                3 -> {3, Reason};
                Fewer when Fewer < 3 -> reported(Endpoint, Fewer)
            end
    after 15000 -> ct:fail({reported, Before})
    end.

%% ---- what is not handled ----

unhandled_messages(Config) ->
    Endpoint = listen(),
    Send = fun() -> ok = on(Config, macula_peer_connector, send_message, [Endpoint, cast, #{}]) end,
    [Send() || _ <- lists:seq(1, 3)],
    stats(unhandled, 3),
    {Dead, Monitor} = spawn_monitor(fun() -> ok end),
    receive {'DOWN', Monitor, process, Dead, _} -> ok end,
    ok = macula_peer_node:set_handler(Dead),
    [Send() || _ <- lists:seq(1, 2)],
    stats(unhandled, 5),
    ok = macula_peer_node:set_handler(self()),
    Send(),
    receive {macula_peer_message, #{type := cast}} -> ok after ?TIMEOUT -> ct:fail(no_message) end,
    ?assertMatch(#{unhandled := 5, accepted := [#{received := 6}]}, macula_peer_node:stats()).

%% The other node allows more than this one.
malformed_messages(Config) ->
    ok = macula_peer_test:engine(#{max_nesting => 4, max_frame_size => 2000}),
    ok = macula_peer_node:set_handler(self()),
    Endpoint = listen(),
    Send = fun(Msg) -> ok = on(Config, macula_peer_connector, send_message, [Endpoint, cast, Msg]) end,
    Send(#{v => [[[[[a]]]]]}),
    stats(malformed, 1),
    Send(#{v => <<0:(8 * 3000)>>}),
    stats(malformed, 2),
    Send(#{v => 1}),
    receive
        {macula_peer_message, #{message := Msg}} -> ?assertEqual(#{<<"v">> => 1}, Msg)
    after ?TIMEOUT -> ct:fail(no_message)
    end,
    ?assertMatch(#{malformed := 2, unhandled := 0}, macula_peer_node:stats()).

refused_connections(Config) ->
    ok = macula_peer_test:engine(#{max_accepted => 1}),
    %% How long a dial that is refused is tried again.
    ok = on(Config, macula_peer_test, engine, [#{connect_timeout => 500}]),
    {ok, {_, Port}} = macula_peer_node:listen(#{handler => self()}),
    Send = fun(Host) ->
        on(Config, macula_peer_connector, send_message, [macula_peer_test:endpoint(Host, Port), cast, #{}])
    end,
    ok = Send("127.0.0.1"),
    ?assertEqual({error, {connect_failed, connection_refused}}, Send("127.0.0.2")),
    ?assertMatch(#{refused := #{connections := N}, accepted := [_]} when N >= 1, macula_peer_node:stats()),
    ok = Send("127.0.0.1").

%% ---- common ----

listen() ->
    {ok, {_, Port}} = macula_peer_node:listen(#{}),
    macula_peer_test:endpoint("127.0.0.1", Port).

other(Config) ->
    proplists:get_value(other, Config).

on(Config, Module, Function, Args) ->
    peer:call(other(Config), Module, Function, Args, 4 * ?TIMEOUT).

send(Endpoint, Msg) ->
    macula_peer_connector:send_message(Endpoint, cast, Msg, ?TIMEOUT).

ping(Endpoint, Timeout) ->
    macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 1}, Timeout).

%% The counters of a peer once Count messages are acknowledged.
acknowledged(Endpoint, Count) ->
    macula_peer_test:await(fun() -> macula_peer_test:peer_stats(Endpoint) end,
                           fun(#{acknowledged := N}) -> N =:= Count end).

%% Waits for a count of this node.
stats(Key, Value) ->
    macula_peer_test:await(fun() -> maps:get(Key, macula_peer_node:stats()) end, fun(V) -> V =:= Value end).
