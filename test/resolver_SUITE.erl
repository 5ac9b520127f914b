%% A node is found with the help of macula's own servers. If they are absent, slow, crash or lie, calls lose only what
%% the servers would have known. They are told the outcome of their advice.
-module(resolver_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message_nat_aware/4, send_message_nat_aware/5]).
-import(macula_peer_test, [endpoint/1, closed_port/0, elapsed/1, until/1, in_parallel/2]).
-import(macula_peer_relays, [start_relay/1, start_member/2, settings/2, id/1, await_registered/2]).

-behaviour(macula_peer_resolver).

-define(NO_RELAY, {error, {nat_connection_failed, {no_relay_available, no_bootstrap_peers}}}).
-define(BOOTSTRAP, "MACULA_BOOTSTRAP_PEERS").
%% How long a slow server takes, and when a lookup is given up, in milliseconds.
-define(SLOW, 5000).
-define(GIVEN_UP, 4500).
%% What one that is not waited for may cost.
-define(SOON, 2500).
-define(SERVERS, [macula_routing_server, macula_nat_cache, macula_nat_coordinator, macula_relay_registry]).
-define(ASKED, resolver_SUITE_asked).

suite() -> [{timetrap, {seconds, 60}}].

all() -> [{group, found}, {group, trouble}, {group, bounds}, {group, reports}, {group, modules}].

groups() ->
    [{found, [], [by_its_endpoint, by_one_of_many_endpoints, by_its_profile, a_profile_without_a_usable_address,
                  by_a_relay_of_the_registry, with_the_key_that_the_dht_has]},
     {trouble, [], [absent_servers_leave_the_original_term, slow_servers_leave_the_original_term,
                    crashing_servers_leave_the_original_term, lies_leave_the_original_term, a_truth_among_lies_is_found,
                    endless_answers_are_ended, slow_servers_delay_no_direct_path, slow_servers_delay_no_relay,
                    slow_servers_do_not_delay_sending_to_a_gateway,
                    no_message_goes_to_a_gateway_if_a_lookup_finds_the_node_soon, the_first_result_is_tried_before_the_others_answer,
                    a_node_found_later_gets_the_next_message_instead_of_the_gateway, a_lookup_may_call_the_connector,
                    a_server_that_calls_is_not_asked]},
     {bounds, [], [an_answer_holds_for_all_messages, an_empty_result_is_cached_too, a_node_is_looked_up_once_at_a_time,
                   many_nodes_leave_nothing_behind, the_engine_ends_its_lookups,
                   the_process_that_bounds_them_may_be_killed, the_application_supervises_them]},
     {reports, [], [success_is_reported, failure_is_reported, a_dead_caller_is_a_failure, advice_after_the_call_is_reported,
                    a_request_is_this_nodes, a_report_delays_no_call]},
     {modules, [], [another_module_is_asked, no_resolver_is_asked]}].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {port, Port} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)).

init_per_testcase(_Case, Config) ->
    true = os:unsetenv(?BOOTSTRAP),
    ok = logger:add_handler(?MODULE, ?MODULE, #{level => warning, config => self()}),
    ?ASKED = ets:new(?ASKED, [named_table, public, bag]),
    ok = macula_peer_test:engine(#{connect_timeout => 2000}),
    Config.

end_per_testcase(_Case, _Config) ->
    true = os:unsetenv(?BOOTSTRAP),
    [absent(Server) || Server <- ?SERVERS],
    ok = macula_peer_node:stop(),
    true = ets:delete(?ASKED),
    ok = logger:remove_handler(?MODULE),
    %% Nothing that servers do is worth a warning either.
    ?assertEqual([], macula_peer_test:mailbox()).

log(Event, #{config := Test}) ->
    Test ! {logged, Event}.

%% ---- found ----

by_its_endpoint(Config) ->
    Port = ?config(port, Config),
    Entry = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => Port},
    [begin
         serve(macula_routing_server, fun(find_value, [_, _, 20]) -> Answer end),
         arrives(Config, Node, direct)
     end || {Node, Answer} <- [{<<"list">>, {ok, [Entry]}}, {<<"map">>, {ok, Entry}},
                               {<<"string">>, {ok, [Entry#{<<"host">> := "127.0.0.1"}]}},
                               {<<"name">>, {ok, [Entry#{<<"host">> := <<"localhost">>}]}},
                               {<<"address">>, {ok, [Entry#{<<"host">> := {127, 0, 0, 1}}]}}]],
    Server = whereis(macula_routing_server),
    Key = crypto:hash(sha256, <<"peer.endpoint.address">>),
    ?assertMatch([[Server, Key, 20]], lists:filter(fun([_, K, _]) -> K =:= Key end, asked(find_value))).

by_one_of_many_endpoints(Config) ->
    Dead = [#{<<"host">> => <<"127.0.0.1">>, <<"port">> => closed_port()} || _ <- lists:seq(1, 10)],
    Live = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => ?config(port, Config)},
    serve(macula_routing_server, fun(_, _) -> {ok, Dead ++ [Live]} end),
    arrives(Config, <<"node">>, direct).

by_its_profile(Config) ->
    Address = {{127, 0, 0, 1}, ?config(port, Config)},
    [begin
         serve(macula_nat_cache, fun(get_from_dht, [N]) when N =:= Node -> {ok, Profile#{reflexive_address => Address}} end),
         arrives(Config, Node, direct)
     end || {Node, Profile} <- [{<<"open">>, #{can_receive_unsolicited => true}},
                                {<<"cone">>, #{mapping_policy => ei, filtering_policy => ei}},
                                {<<"both">>, #{can_receive_unsolicited => true, requires_relay => false, mapping_policy => pd}}]].

a_profile_without_a_usable_address(Config) ->
    Address = {{127, 0, 0, 1}, ?config(port, Config)},
    [begin
         serve(macula_nat_cache, fun(_, _) -> {ok, Profile#{reflexive_address => Address}} end),
         ?assertEqual({Node, ?NO_RELAY}, {Node, send(Node, 1)})
     end || {Node, Profile} <- [{<<"unknown">>, #{}}, {<<"closed">>, #{can_receive_unsolicited => false}},
                                {<<"filter">>, #{mapping_policy => ei, filtering_policy => pd}},
                                {<<"relay">>, #{can_receive_unsolicited => true, requires_relay => true}}]].

by_a_relay_of_the_registry(_Config) ->
    {relay, _, _, _, Port} = Relay = start_relay(here),
    Target = start_member(here, settings(target, [Relay])),
    await_registered(Target, [Relay]),
    [begin
         ok = macula_peer_test:engine(#{hole_punching => off}),
         serve(macula_relay_registry, fun(find_relay, [<<>>]) -> {ok, #{endpoint => Endpoint, node_id => <<"r">>}} end),
         ?assertEqual(ok, send(id(target), N)),
         ?assertMatch(#{path := relay}, macula_peer_relays:delivered(Target, N))
     end || {N, Endpoint} <- [{1, {<<"127.0.0.1">>, Port}}, {2, {"127.0.0.1", Port}}, {3, {{127, 0, 0, 1}, Port}},
                              {4, endpoint(Port)}]].

with_the_key_that_the_dht_has(Config) ->
    #{fingerprint := Key} = macula_peer_test:call(?config(node, Config), macula_peer_node, identity, []),
    Entry = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => ?config(port, Config), <<"fingerprint">> => Key},
    serve(macula_routing_server, fun(_, _) -> {ok, [Entry]} end),
    arrives(Config, <<"known">>, direct),
    <<First, Rest/binary>> = Key,
    Wrong = Entry#{<<"fingerprint">> := <<(First bxor 1), Rest/binary>>},
    serve(macula_routing_server, fun(_, _) -> {ok, [Wrong]} end),
    ?assertEqual({error, {nat_connection_failed, {connect_failed, untrusted_peer}}}, send(<<"other">>, 1)).

%% ---- trouble ----

absent_servers_leave_the_original_term(_Config) ->
    {Took, Result} = elapsed(fun() -> send(<<"node">>, 1) end),
    ?assertEqual(?NO_RELAY, Result),
    ?assert(Took < ?SOON).

slow_servers_leave_the_original_term(_Config) ->
    [slow(Server) || Server <- ?SERVERS],
    {Took, Result} = elapsed(fun() -> send(<<"node">>, 1) end),
    ?assertEqual(?NO_RELAY, Result),
    ?assert(Took >= ?GIVEN_UP - 100 andalso Took < ?SLOW + ?SOON),
    %% The deadline is the call's.
    {Less, Same} = elapsed(fun() -> send_message_nat_aware(<<"me">>, <<"other">>, store, #{}, #{timeout => 300}) end),
    ?assertEqual(?NO_RELAY, Same),
    ?assert(Less >= 300 andalso Less < 300 + ?SOON).

crashing_servers_leave_the_original_term(_Config) ->
    Crashes = [fun() -> exit({noproc, {gen_server, call, [x]}}) end, fun() -> exit(normal) end, fun() -> throw(up) end,
               fun() -> error(undef) end, fun() -> exit(self(), kill), receive after infinity -> ok end end,
               fun() -> spawn_link(fun() -> exit(crashed) end), receive after infinity -> ok end end,
               fun() -> error(lists:seq(1, 100000)) end],
    [begin
         [serve(Server, fun(_, _) -> Crash() end) || Server <- ?SERVERS],
         {Took, Result} = elapsed(fun() -> send(<<"node", N>>, 1) end),
         ?assertEqual({N, ?NO_RELAY}, {N, Result}),
         ?assert(Took < ?SOON)
     end || {N, Crash} <- lists:zip(lists:seq(1, length(Crashes)), Crashes)],
    %% The name is there, the module is not as expected.
    [serve(Server, fun(_, _) -> error(no_such_function) end, []) || Server <- ?SERVERS],
    ?assertEqual(?NO_RELAY, send(<<"node">>, 1)).

lies_leave_the_original_term(_Config) ->
    [begin
         [serve(Server, fun(_, _) -> Lie end) || Server <- ?SERVERS],
         {Took, Result} = elapsed(fun() -> send(<<"node", N>>, 1) end),
         ?assertEqual({N, ?NO_RELAY}, {N, Result}),
         ?assert(Took < ?SOON)
     end || {N, Lie} <- numbered(lies())],
    ?assertMatch(#{}, macula_peer_node:stats()).

numbered(List) -> lists:zip(lists:seq(1, length(List)), List).

lies() ->
    [ok, [], undefined, self(), {ok, undefined}, {ok, []}, {ok, [[]]}, {ok, [a | b]}, {ok, self()}, {nodes, [1]}, {ok, #{}},
     {ok, relay, 1}, {ok, dig, <<"session">>}, {error, not_found}, not_found, {ok, fun() -> ok end}, {ok, <<1:3>>},
     {ok, #{endpoint => undefined}}, {ok, #{endpoint => {a, b, c}}}, {ok, #{reflexive_address => undefined,
                                                                        can_receive_unsolicited => true}}
     | [{ok, [wrong(Candidate)]} || Candidate <- wrong_candidates()] ++ [{ok, #{endpoint => Candidate}} || Candidate <- wrong_candidates()]
       ++ [{ok, #{reflexive_address => Candidate, can_receive_unsolicited => true}} || Candidate <- wrong_candidates()]].

wrong({Host, Port}) -> #{<<"host">> => Host, <<"port">> => Port}.

wrong_candidates() ->
    [{<<255, 254>>, 9443}, {<<>>, 9443}, {"", 9443}, {[16#D800], 9443}, {[a], 9443}, {["h" | o], 9443}, {host, 9443},
     {{1, 2, 3}, 9443}, {{256, 0, 0, 1}, 9443}, {<<"a b:c">>, 9443}, {<<"127.0.0.1">>, 0}, {<<"127.0.0.1">>, 65536},
     {<<"127.0.0.1">>, -1}, {<<"127.0.0.1">>, <<"9443">>}, {<<"127.0.0.1">>, 1 bsl 100}, {<<"127.0.0.1">>, 1.0},
     {binary:copy(<<"h">>, 10000), 9443}, {lists:duplicate(100000, $h), 9443}, {#{}, #{}}].

a_truth_among_lies_is_found(Config) ->
    Truth = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => ?config(port, Config)},
    [begin
         serve(macula_routing_server, fun(_, _) -> {ok, [wrong(Lie), Truth | Lie]} end),
         arrives(Config, <<"node", N>>, direct)
     end || {N, Lie} <- numbered(wrong_candidates())],
    serve(macula_routing_server, fun(_, _) -> {ok, [Truth#{<<"fingerprint">> => 1}, Truth]} end),
    arrives(Config, <<"fingerprint">>, direct).

%% Too much to read: the first are taken. Too much to hold: it is not held.
endless_answers_are_ended(Config) ->
    Truth = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => ?config(port, Config)},
    serve(macula_routing_server, fun(_, _) -> {ok, lists:duplicate(100000, Truth)} end),
    arrives(Config, <<"long">>, direct),
    serve(macula_routing_server, fun(_, _) -> {ok, endless([Truth])} end),
    {Took, Result} = elapsed(fun() -> send(<<"endless">>, 1) end),
    ?assertEqual(?NO_RELAY, Result),
    ?assert(Took < ?GIVEN_UP).

endless(List) -> endless([List | List]).

slow_servers_delay_no_direct_path(Config) ->
    [slow(Server) || Server <- ?SERVERS],
    {Took, ok} = elapsed(fun() ->
        send_message_nat_aware(<<"me">>, <<"node">>, store, #{id => 1}, #{endpoint => endpoint(?config(port, Config))})
    end),
    ?assert(Took < ?SOON).

slow_servers_delay_no_relay(_Config) ->
    Relay = start_relay(here),
    Target = start_member(here, settings(target, [Relay])),
    await_registered(Target, [Relay]),
    ok = macula_peer_test:engine(settings(sender, [Relay])),
    [slow(Server) || Server <- ?SERVERS],
    {Took, ok} = elapsed(fun() -> send(id(target), 1) end),
    ?assert(Took < ?SOON),
    ?assertMatch(#{path := relay}, macula_peer_relays:delivered(Target, 1)).

slow_servers_do_not_delay_sending_to_a_gateway(_Config) ->
    Gateway = gateway(),
    [slow(Server) || Server <- ?SERVERS],
    {Took, ok} = elapsed(fun() -> send(<<"node">>, 1) end),
    ?assert(Took < ?SOON),
    until(fun() -> maps:get(distinct, macula_peer_fake_gateway:stats(Gateway)) =:= 1 end).

%% As slow as a DHT that asks others may be.
no_message_goes_to_a_gateway_if_a_lookup_finds_the_node_soon(Config) ->
    Gateway = gateway(),
    serve(macula_routing_server, fun(_, _) ->
        receive after 100 -> listener(Config) end
    end),
    arrives(Config, <<"node">>, direct),
    ?assertMatch(#{distinct := 0}, macula_peer_fake_gateway:stats(Gateway)).

the_first_result_is_tried_before_the_others_answer(Config) ->
    [slow(Server) || Server <- ?SERVERS],
    Found = [{macula_routing_server, listener(Config)},
             {macula_nat_cache, {ok, #{reflexive_address => {{127, 0, 0, 1}, ?config(port, Config)},
                                       can_receive_unsolicited => true}}}],
    [begin
         serve(Server, fun(_, _) -> Answer end),
         {Took, ok} = elapsed(fun() -> send(atom_to_binary(Server), 1) end),
         ?assert(Took < ?SOON),
         slow(Server)
     end || {Server, Answer} <- Found].

%% The first message goes to a gateway that may pass it on, the next one to the node itself.
a_node_found_later_gets_the_next_message_instead_of_the_gateway(Config) ->
    Gateway = gateway(),
    Test = self(),
    serve(macula_routing_server, fun(_, _) ->
        Test ! {asked, self()},
        receive answer -> listener(Config) end
    end),
    ok = macula_peer_test:forget(?config(node, Config)),
    ok = send(<<"node">>, -1),
    until(fun() -> maps:get(distinct, macula_peer_fake_gateway:stats(Gateway)) =:= 1 end),
    receive {asked, Lookup} -> Lookup ! answer end,
    %% It ends after what it has found was told.
    Id = macula_peer_test:await(fun() ->
        N = erlang:unique_integer([positive]),
        ok = send(<<"node">>, N),
        receive after 50 -> ok end,
        {N, macula_peer_test:ids(?config(node, Config))}
    end, fun({N, Ids}) -> lists:member(N, Ids) end),
    ?assertMatch({N, _} when N > 0, Id).

%% For another node, and for the very one that is looked up, also from within the server: macula's do that.
a_lookup_may_call_the_connector(Config) ->
    Endpoint = endpoint(?config(port, Config)),
    %% The server may be asked again, for the calls that it makes itself. The first time is looked at.
    First = alias([reply]),
    serve(macula_routing_server, fun(_, _) ->
        First ! {nested, send_message_nat_aware(<<"me">>, <<"other">>, store, #{id => 1}, #{endpoint => Endpoint}),
                macula_peer_connector:send_message(Endpoint, store, #{id => 2}),
                send_message_nat_aware(<<"me">>, <<"node">>, store, #{id => 3}, #{timeout => 300})},
        listener(Config)
    end),
    {Took, ok} = elapsed(fun() -> send(<<"node">>, 4) end),
    ?assert(Took < ?SOON),
    ?assertEqual({ok, ok, ?NO_RELAY}, receive {nested, A, B, C} -> {A, B, C} end),
    %% One that waits for itself as long as it may: given up, and so is the call that it waits in.
    serve(macula_routing_server, fun(_, _) ->
        send_message_nat_aware(<<"me">>, <<"loop">>, store, #{}, #{timeout => infinity})
    end),
    {Long, Result} = elapsed(fun() -> send(<<"loop">>, 5) end),
    ?assertEqual(?NO_RELAY, Result),
    ?assert(Long < ?SLOW + ?SOON).

%% macula's send from their callbacks.
a_server_that_calls_is_not_asked(_Config) ->
    Test = self(),
    [begin
         serve(Server, fun(_, _) -> receive after infinity -> ok end end),
         Server ! {run, fun() -> Test ! {result, elapsed(fun() -> send(atom_to_binary(Server), 1) end)} end},
         {Took, Result} = receive {result, What} -> What end,
         ?assertEqual({Server, ?NO_RELAY}, {Server, Result}),
         ?assert(Took < ?SOON),
         absent(Server)
     end || Server <- ?SERVERS],
    ?assertEqual([], ets:tab2list(?ASKED)).

%% ---- bounds ----

an_answer_holds_for_all_messages(Config) ->
    serve(macula_routing_server, fun(_, _) -> listener(Config) end),
    [ok = send(<<"node">>, N) || N <- lists:seq(1, 20)],
    ?assertMatch([_], asked(find_value)).

an_empty_result_is_cached_too(_Config) ->
    serve(macula_routing_server, fun(_, _) -> {error, not_found} end),
    [?assertEqual(?NO_RELAY, send(<<"node">>, N)) || N <- lists:seq(1, 20)],
    ?assertMatch([_], asked(find_value)).

a_node_is_looked_up_once_at_a_time(_Config) ->
    [slow(Server) || Server <- ?SERVERS],
    Results = in_parallel(50, fun(N) -> send(<<"node">>, N) end),
    ?assertEqual([?NO_RELAY], lists:usort(Results)),
    [?assertMatch([_], asked(Function)) || Function <- [find_value, get_from_dht, find_relay, request_connection]].

%% More than may be looked up at once.
many_nodes_leave_nothing_behind(_Config) ->
    [slow(Server) || Server <- ?SERVERS],
    Before = erlang:system_info(process_count),
    Calls = 400,
    {_, Monitor} = spawn_monitor(fun() ->
        exit(lists:usort(in_parallel(Calls, fun(N) ->
            send_message_nat_aware(<<"me">>, <<"node", N:16>>, store, #{}, #{timeout => 3000})
        end)))
    end),
    until(fun() -> length(asked(find_value)) >= 200 end),
    %% A set, and a process for each of four servers.
    ?assert(erlang:system_info(process_count) - Before =< Calls + 256 * 5 + 20),
    receive {'DOWN', Monitor, process, _, Results} -> ?assertEqual([?NO_RELAY], Results) end,
    ?assert(length(asked(find_value)) =< 256),
    until(fun() -> erlang:system_info(process_count) =< Before + 20 end).

the_engine_ends_its_lookups(_Config) ->
    Test = self(),
    [serve(Server, fun(_, _) -> Test ! {asked, self()}, receive after infinity -> ok end end) || Server <- ?SERVERS],
    Call = spawn_monitor(fun() -> exit(send(<<"node">>, 1)) end),
    Lookups = [receive {asked, Pid} -> monitor(process, Pid) end || _ <- ?SERVERS],
    ok = macula_peer_node:stop(),
    [receive {'DOWN', Monitor, process, _, _} -> ok end || Monitor <- Lookups],
    receive {'DOWN', _, process, Pid, Result} when Pid =:= element(1, Call) ->
        ?assertEqual({error, {send_failed, connection_shutdown}}, Result)
    end,
    ?assertEqual(undefined, whereis(macula_peer_lookups)).

%% Its lookups end with it. The next call starts another.
the_process_that_bounds_them_may_be_killed(Config) ->
    {Call, Lookup} = hanging_call(),
    exit(whereis(macula_peer_lookups), kill),
    receive {'DOWN', Lookup, process, _, _} -> ok end,
    serve(macula_routing_server, fun(_, _) -> listener(Config) end),
    arrives(Config, <<"other">>, direct),
    receive {'DOWN', Call, process, _, Result} -> ?assertEqual(?NO_RELAY, Result) end,
    %% OTP reports a state machine whose parent was killed.
    [receive {logged, #{meta := #{error_logger := #{tag := Tag}}}} -> ok end || Tag <- [error, error_report]].

%% The application takes the place of the process that a call started before it. Calls that wait for lookups of that process go on
%% without them.
the_application_supervises_them(Config) ->
    {Call, Lookup} = hanging_call(),
    {ok, _} = application:ensure_all_started(macula_peer_connector),
    receive {'DOWN', Lookup, process, _, _} -> ok end,
    {Took, Result} = elapsed(fun() -> receive {'DOWN', Call, process, _, Reason} -> Reason end end),
    ?assertEqual(?NO_RELAY, Result),
    ?assert(Took < ?SOON),
    Supervised = whereis(macula_peer_lookups),
    ?assertMatch([_], [Pid || {macula_peer_lookups, Pid, _, _} <- supervisor:which_children(macula_peer_sup), Pid =:= Supervised]),
    serve(macula_routing_server, fun(_, _) -> listener(Config) end),
    arrives(Config, <<"other">>, direct),
    %% The end of the engine ends lookups and leaves the process, which reads the settings again for the next engine.
    {LastCall, LastLookup} = hanging_call(),
    ok = macula_peer_test:engine(#{resolver => none}),
    receive {'DOWN', LastLookup, process, _, _} -> ok end,
    receive {'DOWN', LastCall, process, _, Stopped} -> ?assertEqual({error, {send_failed, connection_shutdown}}, Stopped) end,
    Asked = length(asked(find_value)),
    ?assertEqual(?NO_RELAY, send(<<"node">>, 1)),
    ?assertEqual({Supervised, Asked}, {whereis(macula_peer_lookups), length(asked(find_value))}),
    ok = application:stop(macula_peer_connector),
    ?assertEqual(undefined, whereis(macula_peer_lookups)).

%% A call that waits for a lookup, and the lookup.
hanging_call() ->
    Test = self(),
    serve(macula_routing_server, fun(_, _) -> Test ! {asked, self()}, receive after infinity -> ok end end),
    {_, Call} = spawn_monitor(fun() -> exit(send(<<"node">>, 1)) end),
    {Call, receive {asked, Pid} -> monitor(process, Pid) end}.

%% ---- reports ----

success_is_reported(Config) ->
    serve(macula_routing_server, fun(_, _) -> listener(Config) end),
    [begin
         coordinate(fun() -> {ok, Strategy, Session} end),
         arrives(Config, Node, direct),
         until(fun() -> reported(Session) =:= [[Session, <<"me">>, success]] end)
     end || {Strategy, Session, Node} <- [{direct, <<"s1">>, <<"n1">>}, {hole_punch, <<"s2">>, <<"n2">>}, {relay, <<"s3">>, <<"n3">>}]],
    ?assertMatch([[<<"me">>, <<"n1">>], [<<"me">>, <<"n2">>], [<<"me">>, <<"n3">>]], asked(request_connection)),
    %% Nothing is looked up where there is a link.
    ok = send(<<"n1">>, 1),
    ?assertEqual(3, length(asked(request_connection))).

failure_is_reported(_Config) ->
    coordinate(fun() -> {ok, direct, <<"session">>} end),
    ?assertEqual(?NO_RELAY, send(<<"node">>, 1)),
    until(fun() -> reported(<<"session">>) =:= [[<<"session">>, <<"me">>, failure]] end).

a_dead_caller_is_a_failure(_Config) ->
    slow(macula_routing_server),
    coordinate(fun() -> {ok, direct, <<"session">>} end),
    {Pid, Monitor} = spawn_monitor(fun() -> send(<<"node">>, 1) end),
    until(fun() -> asked(request_connection) =/= [] end),
    exit(Pid, kill),
    receive {'DOWN', Monitor, process, Pid, killed} -> ok end,
    until(fun() -> reported(<<"session">>) =:= [[<<"session">>, <<"me">>, failure]] end).

advice_after_the_call_is_reported(Config) ->
    Test = self(),
    coordinate(fun() -> Test ! {asked, self()}, receive answer -> {ok, relay, <<"late">>} end end),
    ok = send_message_nat_aware(<<"me">>, <<"node">>, store, #{}, #{endpoint => endpoint(?config(port, Config))}),
    receive {asked, Pid} -> Pid ! answer end,
    until(fun() -> reported(<<"late">>) =:= [[<<"late">>, <<"me">>, success]] end).

%% Its only name is that of the settings; without one no advice is asked for.
a_request_is_this_nodes(Config) ->
    Ask = fun(Node) -> macula_peer_node:request(Node, ping, #{timestamp => 1}, 5000) end,
    serve(macula_routing_server, fun(_, _) -> listener(Config) end),
    coordinate(fun() -> {ok, direct, <<"session">>} end),
    ?assertMatch({ok, {pong, _}}, Ask(<<"one">>)),
    ok = macula_peer_test:engine(#{node_id => <<"own">>}),
    ?assertMatch({ok, {pong, _}}, Ask(<<"two">>)),
    until(fun() -> reported(<<"session">>) =:= [[<<"session">>, <<"own">>, success]] end),
    ?assertEqual([[<<"own">>, <<"two">>]], asked(request_connection)).

a_report_delays_no_call(Config) ->
    Entry = #{<<"host">> => <<"127.0.0.1">>, <<"port">> => ?config(port, Config)},
    serve(macula_routing_server, fun(_, _) -> {ok, [Entry]} end),
    serve(macula_nat_coordinator, fun(request_connection, _) -> {ok, direct, <<"session">>};
                                     (report_result, _) -> receive after ?SLOW -> ok end end),
    {Took, ok} = elapsed(fun() -> send(<<"node">>, 1) end),
    ?assert(Took < ?SOON),
    until(fun() -> length(reported(<<"session">>)) =:= 1 end),
    {Again, ok} = elapsed(fun() -> send(<<"node">>, 2) end),
    ?assert(Again < ?SOON),
    %% And is given up.
    until(fun() -> {links, []} =:= process_info(whereis(macula_peer_lookups), links) end).

coordinate(Advice) ->
    serve(macula_nat_coordinator, fun(request_connection, _) -> Advice(); (report_result, _) -> ok end).

reported(Session) ->
    [Args || [S | _] = Args <- asked(report_result), S =:= Session].

%% ---- modules ----

%% This one.
another_module_is_asked(Config) ->
    serve(macula_routing_server, fun(_, _) -> error(not_me) end),
    ok = macula_peer_test:engine(#{resolver => ?MODULE, node_id => <<"own">>}),
    Live = endpoint(?config(port, Config)),
    %% Last resorts are relays.
    Relay = start_relay(here),
    Target = start_member(here, settings(target, [Relay])),
    await_registered(Target, [Relay]),
    ok = persistent_term:put(?MODULE, #{endpoints => [Live], bootstrap_peers => []}),
    arrives(Config, <<"node">>, direct),
    ok = persistent_term:put(?MODULE, #{endpoints => [], bootstrap_peers => [macula_peer_relays:endpoint(Relay)]}),
    ?assertEqual(ok, send(id(target), 2)),
    _ = macula_peer_relays:delivered(Target, 2),
    ?assertMatch({ok, {pong, _}}, macula_peer_node:request(id(target), ping, #{timestamp => 1}, 5000)),
    ?assertEqual([], asked(find_value)).

endpoints(_NodeId) -> maps:get(endpoints, persistent_term:get(?MODULE)).

bootstrap_peers() -> maps:get(bootstrap_peers, persistent_term:get(?MODULE)).

no_resolver_is_asked(Config) ->
    serve(macula_routing_server, fun(_, _) -> listener(Config) end),
    ok = macula_peer_test:engine(#{resolver => none}),
    ?assertEqual(?NO_RELAY, send(<<"node">>, 1)),
    ?assertEqual([], asked(find_value)),
    %% The variable is a setting and is not asked.
    Gateway = gateway(),
    ?assertEqual(ok, send(<<"node">>, 2)),
    until(fun() -> maps:get(distinct, macula_peer_fake_gateway:stats(Gateway)) =:= 1 end).

%% ---- macula's servers, as far as they matter here ----

%% What the DHT says of the listener.
listener(Config) ->
    {ok, [#{<<"host">> => <<"127.0.0.1">>, <<"port">> => ?config(port, Config)}]}.

functions(macula_routing_server) -> [{find_value, 3}];
functions(macula_nat_cache) -> [{get_from_dht, 1}];
functions(macula_nat_coordinator) -> [{request_connection, 2}, {report_result, 3}];
functions(macula_relay_registry) -> [{find_relay, 1}].

serve(Server, Answer) ->
    serve(Server, Answer, functions(Server)).

%% A process with that name, and a module whose functions answer like this.
serve(Server, Answer, Functions) ->
    absent(Server),
    ok = persistent_term:put({?MODULE, Server}, Answer),
    Forms = [{attribute, 1, module, Server}, {attribute, 1, export, Functions} | [function(Server, F) || F <- Functions]],
    {ok, Server, Beam} = compile:forms(Forms),
    {module, Server} = code:load_binary(Server, "resolver_SUITE", Beam),
    true = register(Server, spawn(fun() -> server() end)).

server() ->
    receive
        stop -> ok;
        {run, Fun} -> Fun(), server()
    end.

function(Server, {Name, Arity}) ->
    Args = [{var, 1, list_to_atom("A" ++ integer_to_list(N))} || N <- lists:seq(1, Arity)],
    List = lists:foldr(fun(Arg, Tail) -> {cons, 1, Arg, Tail} end, {nil, 1}, Args),
    Body = {call, 1, {remote, 1, {atom, 1, ?MODULE}, {atom, 1, answer}}, [{atom, 1, Server}, {atom, 1, Name}, List]},
    {function, 1, Name, Arity, [{clause, 1, Args, [], [Body]}]}.

%% Runs in the calling process.
answer(Server, Function, Args) ->
    true = ets:insert(?ASKED, {Function, Args, make_ref()}),
    (persistent_term:get({?MODULE, Server}))(Function, Args).

slow(Server) ->
    serve(Server, fun(_, _) -> receive after ?SLOW -> {error, slow} end end).

absent(Server) ->
    case whereis(Server) of
        undefined -> ok;
        Pid -> unregister(Server), Pid ! stop
    end,
    _ = code:purge(Server),
    _ = code:delete(Server),
    _ = code:purge(Server),
    ok.

%% What a function was asked, in the order of the arguments.
asked(Function) ->
    lists:sort([Args || {F, Args, _} <- ets:lookup(?ASKED, Function), F =:= Function]).

%% ----

%% One of 0.14.3, known as a bootstrap peer.
gateway() ->
    Gateway = macula_peer_fake_gateway:start(),
    true = os:putenv(?BOOTSTRAP, binary_to_list(macula_peer_fake_gateway:endpoint(Gateway))),
    Gateway.

send(Node, Id) ->
    send_message_nat_aware(<<"me">>, Node, store, #{id => Id, n => Id}).

arrives(Config, Node, Path) ->
    Id = erlang:unique_integer([positive]),
    {Took, Result} = elapsed(fun() -> send(Node, Id) end),
    ?assertEqual({Node, ok}, {Node, Result}),
    ?assert(Took < ?SOON),
    until(fun() -> lists:member(Id, macula_peer_test:ids(?config(node, Config))) end),
    ?assertMatch({ok, #{path := Path}}, macula_peer_node:path(Node)).
