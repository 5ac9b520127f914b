%% A gateway of macula 0.14.3, with its faults, gets every accepted message. Its answers reach the callers.
-module(gateway_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_testcase/2, end_per_testcase/2]).
-export([all_arrive_from_many_processes/1, lone_messages_share_streams/1, a_burst_of_an_answered_type_goes_on/1]).
-export([messages_larger_than_a_packet_arrive/1, a_frame_leaves_in_one_send/1]).
-export([many_peers_are_dialled_at_once/1]).
-export([requests_are_answered/1, late_answers_reach_the_handler/1, answers_reach_the_handler/1]).
-export([silence_loses_nothing_unreported/1, calls_keep_their_deadlines_in_silence/1]).
-export([a_restarted_gateway_gets_all/1, a_paused_gateway_reads_what_it_acknowledged/1]).
-export([a_gateway_reads_what_was_sent_before_a_stop/1]).

-define(TIMEOUT, 5000).
%% What a deadline may be late by on a busy machine.
-define(LATE, 2000).

all() ->
    [all_arrive_from_many_processes, lone_messages_share_streams, a_burst_of_an_answered_type_goes_on,
     messages_larger_than_a_packet_arrive, a_frame_leaves_in_one_send, many_peers_are_dialled_at_once,
     requests_are_answered, late_answers_reach_the_handler, answers_reach_the_handler,
     silence_loses_nothing_unreported, calls_keep_their_deadlines_in_silence, a_restarted_gateway_gets_all,
     a_paused_gateway_reads_what_it_acknowledged, a_gateway_reads_what_was_sent_before_a_stop].

init_per_testcase(_Case, Config) ->
    ok = macula_peer_test:engine(#{}),
    Config.

end_per_testcase(_Case, _Config) ->
    macula_peer_node:stop().

%% ---- arriving ----

all_arrive_from_many_processes(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Numbers = lists:seq(1, 20000),
    in_processes(10, Numbers, fun(N) -> ok = send(Gateway, cast, #{n => N, payload => <<0:800>>}) end),
    Stats = arrived(Gateway, 20000),
    ?assertMatch(#{connections := 1, received := 20000, incomplete := 0, invalid := 0, extra_bytes := 0}, Stats).

lone_messages_share_streams(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Send = fun(Count) ->
        [begin
             ok = send(Gateway, cast, #{n => N}),
             %% Messages that come faster are a burst, and share nothing.
             timer:sleep(10)
         end || N <- lists:seq(1, Count)],
        #{streams := Streams} = Stats = arrived(Gateway, Count),
        ?assertMatch(#{received := Count, incomplete := 0, invalid := 0, extra_bytes := 0}, Stats),
        Streams
    end,
    %% Until it has certainly looked at the streams that will be shared.
    _ = Send(700),
    macula_peer_fake_gateway:reset(Gateway),
    ?assert(Send(2000) < 50).

%% The gateway allows 100 streams, and each of these leaves one open for its answer.
a_burst_of_an_answered_type_goes_on(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    [ok = send(Gateway, store, #{n => N, key => <<"k">>, value => <<"v">>}) || N <- lists:seq(1, 2000)],
    ?assertMatch(#{connections := 1, incomplete := 0, types := #{store := 2000}}, arrived(Gateway, 2000)).

%% A gateway takes frames of less than about 10 KB whole, where nothing comes between their packets.
messages_larger_than_a_packet_arrive(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    [begin
         ok = send(Gateway, cast, larger(N)),
         ?assertMatch(#{connections := 1, incomplete := 0, invalid := 0, extra_bytes := 0}, arrived(Gateway, N))
     end || N <- lists:seq(1, 200)].

%% From one packet to seven.
larger(N) ->
    #{n => N, payload => rand:bytes(1000 + 40 * N)}.

%% This gateway takes what one send brings for a frame.
a_frame_leaves_in_one_send(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--first-look-ms", "0"]),
    [begin
         ok = send(Gateway, cast, #{n => N, payload => rand:bytes(Size)}),
         ?assertMatch({Size, #{connections := 1, incomplete := 0, invalid := 0, extra_bytes := 0}},
                      {Size, arrived(Gateway, N)})
     end || {N, Size} <- lists:enumerate(lists:append(lists:duplicate(5, [1000, 14000, 16000, 30000, 45000, 60000])))].

%% One gateway under many addresses, each a peer of its own. It refuses connections that come too fast.
many_peers_are_dialled_at_once(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--bind", "0.0.0.0:0"]),
    Port = macula_peer_fake_gateway:port(Gateway),
    Endpoints = [macula_peer_test:endpoint(["127.0.0.", integer_to_list(N)], Port) || N <- lists:seq(1, 20)],
    in_processes(20, Endpoints, fun(Endpoint) ->
        {ok, {pong, #{<<"timestamp">> := 7}}} =
            macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 7}, ?TIMEOUT)
    end),
    #{refused := Refused} = Stats = macula_peer_fake_gateway:stats(Gateway),
    ct:pal("refused meanwhile: ~p", [Refused]),
    ?assertMatch(#{connections := 20, types := #{ping := 20}}, Stats).

%% ---- answers ----

requests_are_answered(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--rpc-delay-ms", "500"]),
    {ok, {_, Port}} = macula_peer_node:local_address(),
    Ask = fun(Type, Msg) ->
        macula_peer_connector:send_message_and_wait(macula_peer_fake_gateway:endpoint(Gateway), Type, Msg, ?TIMEOUT)
    end,
    ?assertMatch({ok, {pong, #{<<"timestamp">> := 42, <<"server_time">> := _}}}, Ask(ping, #{timestamp => 42})),
    ?assertMatch({ok, {nat_probe_reply, #{<<"node_id">> := <<"me">>, <<"reflexive_ip">> := <<"127.0.0.1">>,
                                          <<"reflexive_port">> := Port}}},
                 Ask(nat_probe, #{node_id => <<"me">>, local_port => Port})),
    ?assertMatch({ok, {find_value_reply, #{<<"value">> := <<"value">>}}}, Ask(find_value, #{key => <<"k">>})),
    ?assertMatch({ok, {find_node_reply, #{<<"nodes">> := []}}}, Ask(find_node, #{target => <<"t">>})),
    ?assertMatch({ok, {reply, #{<<"call_id">> := <<"c">>}}}, Ask(call, #{call_id => <<"c">>})),
    ?assertMatch({ok, {rpc_reply, #{<<"request_id">> := <<"r">>, <<"result">> := <<"ok">>}}},
                 Ask(rpc_request, rpc_request(<<"r">>))),
    ?assertMatch(#{connections := 1}, macula_peer_fake_gateway:stats(Gateway)).

late_answers_reach_the_handler(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--rpc-delay-ms", "2000"]),
    ok = macula_peer_node:set_handler(self()),
    ok = send(Gateway, rpc_request, rpc_request(<<"late">>)),
    %% Others do not take its stream.
    [ok = send(Gateway, cast, #{n => N}) || N <- lists:seq(1, 500)],
    ?assertMatch(#{message := #{<<"request_id">> := <<"late">>, <<"result">> := <<"ok">>}}, answer(Gateway, rpc_reply)),
    ?assertMatch(#{types := #{rpc_request := 1}}, arrived(Gateway, 500)).

answers_reach_the_handler(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    ok = macula_peer_node:set_handler(self()),
    [begin
         ok = send(Gateway, ping, #{timestamp => N}),
         ?assertMatch(#{message := #{<<"timestamp">> := N}}, answer(Gateway, pong)),
         ok = send(Gateway, find_value, #{key => <<"k">>}),
         ?assertMatch(#{message := #{<<"value">> := <<"value">>}}, answer(Gateway, find_value_reply))
     end || N <- lists:seq(1, 20)],
    ?assertMatch(#{connections := 1, types := #{ping := 20, find_value := 20}}, macula_peer_fake_gateway:stats(Gateway)).

answer(Gateway, Type) ->
    receive
        {macula_peer_message, #{type := Type} = Answer} ->
            ?assertMatch(#{dialect := macula, reply_to := none}, Answer),
            ?assertEqual({{127, 0, 0, 1}, macula_peer_fake_gateway:port(Gateway)}, maps:get(from, Answer)),
            Answer
    after 10000 -> ct:fail({no_answer, Type, erlang:process_info(self(), messages)})
    end.

%% ---- trouble ----

silence_loses_nothing_unreported(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    ok = macula_peer_node:set_handler(self()),
    {ok, {pong, _}} = ping(Gateway, ?TIMEOUT),
    ok = macula_peer_fake_gateway:silence(Gateway, on),
    Sent = [{N, macula_peer_connector:send_message(Endpoint, cast, #{n => N}, 10000)} || N <- lists:seq(1, 50)],
    Accepted = [N || {N, ok} <- Sent],
    ?assertNotEqual([], Accepted),
    %% Longer than it takes to notice.
    ?assertMatch({error, _}, ping(Gateway, 1000)),
    ok = macula_peer_fake_gateway:silence(Gateway, off),
    _ = macula_peer_test:await(fun() -> macula_peer_test:peer_stats(Endpoint) end,
                               fun(Stats) -> maps:get(unacknowledged_bytes, Stats) =:= 0 end),
    #{undelivered := Undelivered} = macula_peer_node:stats(),
    ?assertEqual(Undelivered, undelivered()),
    %% What is acknowledged is read a moment later.
    _ = macula_peer_test:await(fun() -> macula_peer_fake_gateway:stats(Gateway) end,
                               fun(#{distinct := Distinct}) -> Distinct + Undelivered >= length(Accepted) end),
    ?assertMatch({ok, {pong, _}}, ping(Gateway, ?TIMEOUT)).

undelivered() ->
    receive
        {macula_peer_event, #{event := undelivered, count := Count}} -> Count + undelivered()
    after 0 -> 0
    end.

calls_keep_their_deadlines_in_silence(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    {ok, {pong, _}} = ping(Gateway, ?TIMEOUT),
    ok = macula_peer_fake_gateway:silence(Gateway, on),
    %% While the link still seems alive, and when it is known to be silent.
    [in_processes(10, lists:seq(1, 10), fun(_) -> keeps_deadline(Call, Timeout) end)
     || Timeout <- [0, 300, 1500],
        Call <- [fun(Left) -> {error, _} = ping(Gateway, Left) end,
                 fun(Left) -> macula_peer_connector:send_message(Endpoint, cast, #{}, Left) end]].

keeps_deadline(Call, Timeout) ->
    {Took, _} = timer:tc(fun() -> Call(Timeout) end),
    ?assert(Took div 1000 =< Timeout + ?LATE).

a_restarted_gateway_gets_all(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Bind = ["--bind", binary_to_list(macula_peer_fake_gateway:endpoint(Gateway))],
    [ok = send(Gateway, cast, #{n => -N}) || N <- lists:seq(1, 10)],
    _ = arrived(Gateway, 10),
    ok = macula_peer_fake_gateway:stop(Gateway),
    Again = macula_peer_fake_gateway:start(Bind),
    [ok = send(Again, cast, #{n => N}) || N <- lists:seq(1, 100)],
    ?assertMatch(#{incomplete := 0, invalid := 0, extra_bytes := 0}, arrived(Again, 100)),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()).

%% It acknowledges everything at once when it goes on, reads it some time later, and drops what it has not read of a connection
%% that is closed.
a_paused_gateway_reads_what_it_acknowledged(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--first-look-ms", "50"]),
    Sent = counters:new(1, []),
    Sender = spawn_link(fun() -> send_until_told(Gateway, Sent) end),
    [begin
         sends_on(Sent, 100),
         macula_peer_fake_gateway:pause(Gateway),
         %% Many messages wait after that time, and the connection is not yet given up.
         timer:sleep(800),
         macula_peer_fake_gateway:go_on(Gateway)
     end || _ <- lists:seq(1, 3)],
    sends_on(Sent, 100),
    Sender ! {stop, self()},
    receive {Sender, stopped} -> ok after 20000 -> ct:fail(sender_hangs) end,
    _ = arrived(Gateway, counters:get(Sent, 1)),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()).

send_until_told(Gateway, Sent) ->
    ok = send(Gateway, cast, #{n => counters:get(Sent, 1)}),
    ok = counters:add(Sent, 1, 1),
    receive
        {stop, From} -> From ! {self(), stopped}
    after 2 -> send_until_told(Gateway, Sent)
    end.

%% Waits until Count more messages have been sent.
sends_on(Sent, More) ->
    Before = counters:get(Sent, 1),
    macula_peer_test:until(fun() -> counters:get(Sent, 1) >= Before + More end, 20000).

a_gateway_reads_what_was_sent_before_a_stop(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--first-look-ms", "20"]),
    [ok = send(Gateway, cast, #{n => N}) || N <- lists:seq(1, 50)],
    ok = macula_peer_node:stop(),
    ?assertMatch(#{unread := 0}, arrived(Gateway, 50)).

%% ---- common ----

send(Gateway, Type, Msg) ->
    macula_peer_connector:send_message(macula_peer_fake_gateway:endpoint(Gateway), Type, Msg, ?TIMEOUT).

ping(Gateway, Timeout) ->
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 1}, Timeout).

rpc_request(Id) ->
    #{request_id => Id, procedure => <<"p">>, args => [], from_node => <<"me">>}.

%% The gateway's counters once Count different messages have arrived.
arrived(Gateway, Distinct) ->
    macula_peer_test:await(fun() -> macula_peer_fake_gateway:stats(Gateway) end,
                           fun(#{distinct := D}) -> D =:= Distinct end).

%% Deals the items out to Count processes and waits for all.
in_processes(Count, Items, Fun) ->
    Dealt = lists:zip(lists:seq(1, length(Items)), Items),
    Workers = [spawn_monitor(fun() -> [Fun(Item) || {N, Item} <- Dealt, N rem Count =:= Worker] end)
               || Worker <- lists:seq(0, Count - 1)],
    [receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual(normal, Reason) end || {Pid, Monitor} <- Workers].
