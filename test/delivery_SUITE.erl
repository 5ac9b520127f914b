%% `ok' means that the message arrives, or is counted and reported as undelivered.
-module(delivery_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/4]).
-import(macula_peer_test, [closed_port/0, endpoint/1, until/1, until/2, ids/1]).

-define(BURST, 20).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [a_restarted_peer_gets_every_message, unacknowledged_messages_arrive_when_a_dead_peer_is_back,
     a_peer_that_stays_away_is_reported, at_most_once_sends_no_message_twice_and_reports_it,
     messages_pass_a_request_that_waits, a_burst_survives_a_graceful_stop,
     a_stop_reports_what_it_leaves_behind, a_function_is_told_of_the_stop_too].

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    Port = closed_port(),
    [{port, Port}, {endpoint, endpoint(Port)} | Config].

end_per_testcase(_Case, _Config) ->
    macula_peer_node:stop().

a_restarted_peer_gets_every_message(Config) ->
    Endpoint = ?config(endpoint, Config),
    macula_peer_test:kill_node(linked_listener(Config)),
    Node = listener(Config),
    Ids = lists:seq(1, 100),
    [?assertEqual({Id, ok}, {Id, send(Endpoint, Id, 5000)}) || Id <- Ids],
    until(fun() -> ids(Node) =:= Ids end),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()),
    settled(Endpoint),
    macula_peer_test:stop_node(Node).

unacknowledged_messages_arrive_when_a_dead_peer_is_back(Config) ->
    ok = macula_peer_node:set_handler(self()),
    macula_peer_test:kill_node(linked_listener(Config)),
    Accepted = accepted(Config, 20000),
    %% Long after the link is given up.
    receive after 2000 -> ok end,
    Node = listener(Config),
    until(fun() -> ids(Node) =:= Accepted end),
    ?assertMatch(#{undelivered := 0}, macula_peer_node:stats()),
    ?assertEqual([], events()),
    settled(?config(endpoint, Config)),
    macula_peer_test:stop_node(Node).

a_peer_that_stays_away_is_reported(Config) ->
    ok = macula_peer_node:set_handler(self()),
    macula_peer_test:kill_node(linked_listener(Config)),
    Accepted = accepted(Config, 1500),
    reported(Config, length(Accepted), expired),
    settled(?config(endpoint, Config)).

at_most_once_sends_no_message_twice_and_reports_it(Config) ->
    macula_peer_test:engine([{delivery, at_most_once}]),
    ok = macula_peer_node:set_handler(self()),
    macula_peer_test:kill_node(linked_listener(Config)),
    Accepted = accepted(Config, 20000),
    Node = listener(Config),
    reported(Config, length(Accepted), connection_closed),
    until(fun() -> send(?config(endpoint, Config), 0, 5000) =:= ok end),
    until(fun() -> ids(Node) =/= [] end),
    settled(?config(endpoint, Config)),
    ?assertEqual([0], ids(Node)),
    macula_peer_test:stop_node(Node).

%% Each message takes a stream, of which a link has a limited number; the streams come back although an older one is
%% still unfinished.
messages_pass_a_request_that_waits(Config) ->
    Node = linked_listener(Config),
    Endpoint = ?config(endpoint, Config),
    Waiting = spawn(fun() ->
        macula_peer_connector:send_message_and_wait(Endpoint, rpc_request, macula_peer_test:rpc(<<"never">>, 0), 60000)
    end),
    until(fun() -> [] =/= [waits || #{type := rpc_request} <- macula_peer_test:received(Node)] end),
    Ids = lists:seq(1, 2000),
    [?assertEqual({Id, ok}, {Id, send(Endpoint, Id, 5000)}) || Id <- Ids],
    until(fun() -> ids(Node) -- [0] =:= Ids end),
    ?assert(is_process_alive(Waiting)),
    exit(Waiting, kill),
    macula_peer_test:stop_node(Node).

a_burst_survives_a_graceful_stop(Config) ->
    Node = linked_listener(Config),
    Ids = lists:seq(1, 1000),
    [ok = send(?config(endpoint, Config), Id, 5000) || Id <- Ids],
    ok = macula_peer_node:stop(),
    until(fun() -> ids(Node) -- [0] =:= Ids end),
    macula_peer_test:stop_node(Node).

a_stop_reports_what_it_leaves_behind(Config) ->
    ok = macula_peer_node:set_handler(self()),
    stops_owing(Config).

a_function_is_told_of_the_stop_too(Config) ->
    ok = macula_peer_node:set_handler({?MODULE, forward, [self()]}),
    stops_owing(Config).

stops_owing(Config) ->
    macula_peer_test:kill_node(linked_listener(Config)),
    Accepted = accepted(Config, 20000),
    ok = macula_peer_node:stop(),
    Endpoint = ?config(endpoint, Config),
    receive
        {macula_peer_event, Event} ->
            ?assertEqual(#{event => undelivered, peer => Endpoint, count => length(Accepted), reason => stopped}, Event)
    after 5000 -> error(not_reported)
    end.

forward(Message, To) -> To ! Message.

%% ----

listener(Config) ->
    {Node, _} = macula_peer_test:start_listener(?config(port, Config)),
    Node.

%% A listener to which there is a link that owes nothing.
linked_listener(Config) ->
    Node = listener(Config),
    ok = send(?config(endpoint, Config), 0, 5000),
    until(fun() -> ids(Node) =:= [0] end),
    settled(?config(endpoint, Config)),
    Node.

%% Sends to a peer that has just died; returns the messages that were taken for the dead link.
accepted(Config, Timeout) ->
    Results = [{Id, send(?config(endpoint, Config), Id, Timeout)} || Id <- lists:seq(1, ?BURST)],
    Down = {error, {connect_failed, transport_down}},
    ?assertEqual([], lists:usort([Result || {_, Result} <- Results]) -- [ok, Down]),
    Accepted = [Id || {Id, ok} <- Results],
    ?assertMatch([_ | _], Accepted),
    Accepted.

send(Endpoint, Id, Timeout) ->
    send_message(Endpoint, store, #{id => Id}, Timeout).

reported(Config, Count, Reason) ->
    until(fun() -> maps:get(undelivered, macula_peer_node:stats()) =:= Count end),
    Events = events(),
    Endpoint = ?config(endpoint, Config),
    [?assertMatch(#{event := undelivered, peer := Endpoint, reason := Reason}, Event) || Event <- Events],
    ?assertEqual(Count, lists:sum([N || #{count := N} <- Events])).

%% The event follows the count by a moment.
events() ->
    receive {macula_peer_event, Event} -> [Event | events()] after 200 -> [] end.

settled(Endpoint) ->
    until(fun() -> maps:get(unacknowledged_bytes, macula_peer_test:peer_stats(Endpoint)) =:= 0 end).
