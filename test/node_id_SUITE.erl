%% A message for a node goes to that node, and a node that came back with another key is accepted when the user says so.
-module(node_id_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, endpoint/1]).
-import(macula_peer_relays, [start_relay/1, start_member/2, settings/2, id/1, await_registered/2, delivered/2]).

-define(APP, macula_peer_connector).
-define(ERROR(Why), {error, {nat_connection_failed, {connect_failed, Why}}}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [an_endpoint_that_leads_back_here_is_not_the_node, a_node_with_another_id_gets_nothing,
     a_node_with_another_key_is_reported_and_let_in_when_it_is_forgotten, only_a_node_id_is_forgotten].

end_per_testcase(_Case, _Config) ->
    _ = application:stop(?APP),
    %% Without the settings of the case.
    ok = macula_peer_test:engine(#{}),
    macula_peer_node:stop().

%% The right node is found by the relay afterwards, although the endpoint is still known.
an_endpoint_that_leads_back_here_is_not_the_node(_Config) ->
    ok = macula_peer_test:engine(#{node_id => id(sender)}),
    {ok, {_, Port}} = macula_peer_node:listen(#{handler => self()}),
    ?assertEqual(?ERROR(wrong_node), send(target, 1, #{endpoint => endpoint(Port)})),
    ?assertEqual(?ERROR(wrong_node), ask(target, #{endpoint => endpoint(Port)})),
    ?assertMatch({ok, #{path := none, failed := #{direct := wrong_node}}},
                 macula_peer_node:path({node, id(target)})),
    Relay = start_relay(here),
    Target = start_member(here, settings(target, [Relay])),
    await_registered(Target, [Relay]),
    Options = #{endpoint => endpoint(Port), relay_endpoint => macula_peer_relays:endpoint(Relay)},
    ?assertEqual(ok, send(target, 2, Options)),
    ?assertMatch(#{path := relay}, delivered(Target, 2)),
    ?assertMatch({ok, {pong, _}}, ask(target, #{})),
    receive {macula_peer_message, Stray} -> ct:fail({ours, Stray}) after 0 -> ok end.

a_node_with_another_id_gets_nothing(_Config) ->
    [{Other, Wrong}, {Target, Right}] = [listener(Name) || Name <- [other, target]],
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(?ERROR(wrong_node), send(target, 1, #{endpoint => Wrong})),
    ?assertEqual(?ERROR(wrong_node), ask(target, #{endpoint => Wrong})),
    ?assertEqual(ok, send(target, 2, #{endpoint => Right})),
    _ = delivered(Target, 2),
    %% It is renamed, and the next message goes to the node that has the name now.
    ok = call(Target, macula_peer_node, register, [id(spare), []]),
    ok = call(Other, macula_peer_node, register, [id(target), []]),
    ?assertEqual(ok, send(target, 3, #{endpoint => Wrong})),
    _ = delivered(Other, 3),
    ?assertEqual({[3], [2]}, {macula_peer_test:ids(Other), macula_peer_test:ids(Target)}).

a_node_with_another_key_is_reported_and_let_in_when_it_is_forgotten(_Config) ->
    ok = macula_peer_test:engine(#{}),
    ok = macula_peer_node:stop(),
    {ok, _} = application:ensure_all_started(?APP),
    ok = macula_peer_node:set_handler(self()),
    {Before, Old} = listener(target),
    ?assertEqual(ok, send(target, 1, #{endpoint => Old})),
    _ = delivered(Before, 1),
    macula_peer_test:kill_node(Before),
    {After, New} = listener(target),
    Lines = logged(fun() ->
        %% Over the link that is not known to be dead.
        ?assertEqual(ok, send(target, 2, #{endpoint => New, timeout => 3000})),
        receive
            {macula_peer_event, #{event := undelivered} = Event} ->
                ?assertMatch(#{count := 1, reason := untrusted_peer}, Event)
        after 20000 -> ct:fail(not_reported)
        end,
        [?assertEqual(?ERROR(untrusted_peer), send(target, N, #{endpoint => New})) || N <- [3, 4]],
        ?assertEqual(?ERROR(untrusted_peer), ask(target, #{}))
    end),
    ?assertMatch([_], Lines),
    [?assertNotEqual(nomatch, string:find(Lines, Word)) || Word <- ["identity_file", "macula_peer_node:forget"]],
    ?assertEqual([], macula_peer_test:ids(After)),
    ?assertEqual(ok, macula_peer_node:forget(id(target))),
    ?assertEqual(ok, send(target, 5, #{endpoint => New})),
    _ = delivered(After, 5),
    ?assertEqual([5], macula_peer_test:ids(After)).

only_a_node_id_is_forgotten(_Config) ->
    ok = macula_peer_node:stop(),
    ?assertEqual(ok, macula_peer_node:forget(id(target))),
    ?assertEqual(not_started, macula_peer_call:stats()),
    [?assertEqual({error, {invalid_node_id, Term}}, macula_peer_node:forget(Term))
     || Term <- [target, <<>>, "target", <<0:(256 * 8)>>]],
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(ok, macula_peer_node:forget(id(target))).

%% ---- common ----

listener(Name) ->
    Node = start_member(here, settings(Name, [])),
    {ok, {_, Port}} = call(Node, macula_peer_node, listen, [#{}]),
    {Node, endpoint(Port)}.

send(To, Id, Opts) ->
    macula_peer_connector:send_message_nat_aware(id(sender), id(To), store, #{id => Id}, Opts).

ask(To, Opts) ->
    macula_peer_node:request(id(To), ping, #{timestamp => 1}, 5000, Opts).

%% The warnings about keys meanwhile.
logged(Fun) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => warning}),
    try
        Fun(),
        lines()
    after
        logger:remove_handler(?MODULE)
    end.

lines() ->
    receive
        {logged, {Format, Args}} ->
            Line = lists:flatten(io_lib:format(Format, Args)),
            [Line || string:find(Line, "another key") =/= nomatch] ++ lines();
        {logged, _Report} ->
            lines()
    after 0 -> []
    end.

%% As a handler of logger.
log(#{msg := Message}, #{config := Pid}) ->
    Pid ! {logged, Message}.
