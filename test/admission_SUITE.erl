%% A callback and lists, which can change while the node runs, decide which nodes may connect.
-module(admission_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, elapsed/1, endpoint/1, engine/1]).
-import(macula_peer_relays, [id/1, settings/2, start_member/2, await_registered/2]).

-define(APP, macula_peer_connector).
-define(TIMEOUT, 5000).
-define(REJECTED, {error, {connect_failed, rejected_by_peer}}).
-define(REFUSED, {error, {connect_failed, connection_refused}}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [the_callback_is_asked_about_connections_and_registrations, its_answers_are_remembered_for_their_time,
     a_slow_callback_refuses_its_node_and_delays_no_other, a_callback_that_fails_refuses_and_is_logged_once,
     a_callback_s_process_that_is_killed_comes_back, lists_can_be_settings_and_work_without_the_application,
     wrong_values_are_named, lists_hold_at_once, lists_are_a_setting, a_kicked_node_leaves_and_waits,
     a_relay_lists_its_nodes, looking_starts_nothing].

init_per_testcase(_Case, Config) ->
    Config.

end_per_testcase(_Case, _Config) ->
    _ = persistent_term:erase(?MODULE),
    _ = application:stop(?APP),
    ok = engine(#{}),
    macula_peer_node:stop().

%% ---- the callback ----

the_callback_is_asked_about_connections_and_registrations(_Config) ->
    Relay = listen(#{relay => #{}, admission => callback(allow)}),
    Member = start_member(here, settings(a, [Relay])),
    await_registered(Member, [Relay]),
    Key = key(Member),
    Id = id(a),
    {A, B} = {asked(), asked()},
    ?assertMatch(#{kind := connection, key := Key, address := {{127, 0, 0, 1}, _}, path := direct}, A),
    ?assertMatch(#{kind := registration, key := Key, address := {{127, 0, 0, 1}, _}, path := direct, node_id := Id}, B),
    ?assertEqual({4, 5}, {map_size(A), map_size(B)}),
    %% The next one may connect, and not register.
    answer(fun(#{kind := connection}) -> allow; (#{kind := registration}) -> {deny, "not this one"} end),
    Other = start_member(here, settings(b, [Relay])),
    until(fun() -> [denied] =:= [R || #{state := refused, reason := R} <- macula_peer_test:events(Other, registration)] end),
    ?assertMatch(#{registrations := 1, refused := #{denied := N}} when N >= 1, maps:get(relay, macula_peer_node:stats())),
    %% And the third is not even let in.
    answer(deny),
    Third = start_member(here, #{}),
    ?assertEqual(?REJECTED, send(Third, Relay)),
    ?assertMatch(#{callback := N} when N >= 2, refused()).

its_answers_are_remembered_for_their_time(_Config) ->
    Here = listen(#{admission => callback(deny), admission_cache => 1000}),
    Client = client(#{}),
    [?assertEqual(?REJECTED, send(Client, Here)) || _ <- [1, 2, 3]],
    answer(allow),
    ?assertEqual(?REJECTED, send(Client, Here)),
    ?assertMatch(#{asked := 1, remembered := 3}, admission()),
    until(fun() -> send(Client, Here) =:= ok end),
    ?assertMatch(#{asked := 2}, admission()),
    %% For no time at all.
    ok = macula_peer_node:close(),
    Again = listen(#{admission => callback(deny), admission_cache => 0}),
    [?assertEqual(?REJECTED, send(Client, Again)) || _ <- [1, 2]],
    ?assertMatch(#{asked := 2, remembered := 0}, admission()).

%% Meanwhile others' messages go on, and others are asked about.
a_slow_callback_refuses_its_node_and_delays_no_other(_Config) ->
    Here = listen(#{admission => callback(allow), admission_timeout => 300}),
    [Honest, Late, New] = [client(#{connect_timeout => 1000}) || _ <- [1, 2, 3]],
    ?assertEqual(ok, send(Honest, Here)),
    Slow = key(Late),
    answer(fun(#{key := Key}) when Key =:= Slow -> receive after infinity -> ok end; (_) -> allow end),
    Owner = self(),
    Lines = logged(fun() ->
        Sending = spawn_monitor(fun() -> exit({sent, elapsed(fun() -> send(Late, Here) end)}) end),
        {Took, _} = elapsed(fun() -> [?assertEqual(ok, send(Honest, Here)) || _ <- lists:seq(1, 100)] end),
        {Waited, ok} = elapsed(fun() -> send(New, Here) end),
        ct:pal("100 messages took ~b ms, a new node ~b ms", [Took, Waited]),
        ?assert(Waited < 300),
        {_, Monitor} = Sending,
        receive {'DOWN', Monitor, process, _, {sent, {Gave, Sent}}} ->
            %% As it happens to be refused, or waiting again, when it gives up.
            ?assert(lists:member(Sent, [?REFUSED, {error, {connect_failed, transport_down}}])),
            ?assert(Gave < 3000)
        end,
        %% It was asked again after the first refusal, so the second one is logged no more.
        ?assertMatch(#{timeout := N} when N >= 2, refused()),
        Owner ! done
    end),
    receive done -> ok end,
    ?assertMatch([_], [Line || Line <- Lines, string:find(Line, "did not answer in time") =/= nomatch]),
    until(fun() -> workers() =:= [] end),
    answer(allow),
    ?assertEqual(ok, send(Late, Here)).

a_callback_that_fails_refuses_and_is_logged_once(_Config) ->
    Here = listen(#{admission => callback(allow)}),
    [Honest, Failing] = [client(#{connect_timeout => 500}) || _ <- [1, 2]],
    ?assertEqual(ok, send(Honest, Here)),
    Lines = logged(fun() ->
        [begin
             answer(Fail),
             ?assertEqual(?REFUSED, send(Failing, Here))
         end
         || Fail <- [fun(_) -> error(the_database_is_gone) end, fun(_) -> throw(no) end, fun(_) -> exit(kill) end,
                     fun(_) -> yes end, fun(_) -> exit(self(), kill) end]]
    end),
    ?assertMatch([_], [Line || Line <- Lines, string:find(Line, "the_database_is_gone") =/= nomatch]),
    ?assertMatch([_], [Line || Line <- Lines, string:find(Line, "admission callback") =/= nomatch]),
    ?assertMatch(#{crash := N} when N >= 5, refused()),
    ?assertEqual(ok, send(Honest, Here)),
    answer(allow),
    ?assertEqual(ok, send(Failing, Here)).

a_callback_s_process_that_is_killed_comes_back(_Config) ->
    ok = macula_peer_node:stop(),
    {ok, _} = application:ensure_all_started(?APP),
    Here = listen(#{admission => callback(allow)}),
    Killed = whereis(macula_peer_admission),
    true = exit(Killed, kill),
    until(fun() -> Now = whereis(macula_peer_admission), is_pid(Now) andalso Now =/= Killed end),
    ?assertEqual(ok, send(client(#{}), Here)).

lists_can_be_settings_and_work_without_the_application(_Config) ->
    Port = macula_peer_test:free_port(),
    Settings = #{listen => #{port => Port, admission => callback(allow)}, handler => macula_peer_test:collector()},
    ok = engine(Settings),
    Client = client(#{connect_timeout => 500}),
    ?assertEqual(ok, send(Client, endpoint(Port))),
    %% While the callback cannot be asked, no node is let in.
    true = exit(whereis(macula_peer_admission), kill),
    Other = client(#{connect_timeout => 500}),
    ?assertEqual(?REFUSED, send(Other, endpoint(Port))),
    ok = macula_peer_node:close(),
    {ok, _} = macula_peer_node:listen(#{port => Port, admission => callback(allow)}),
    ?assertEqual(ok, send(Other, endpoint(Port))),
    ok = macula_peer_node:stop(),
    ?assertEqual(undefined, whereis(macula_peer_admission)),
    %% The application takes the place of one without it.
    ok = engine(Settings),
    {ok, _} = application:ensure_all_started(?APP),
    ?assertMatch([_], [Pid || {macula_peer_admission, Pid, _, _} <- supervisor:which_children(macula_peer_sup),
                              Pid =:= whereis(macula_peer_admission)]),
    ?assertEqual(ok, send(client(#{}), endpoint(Port))).

wrong_values_are_named(_Config) ->
    ok = engine(#{}),
    [?assertEqual({error, {invalid_option, {Key, Value}}}, macula_peer_node:listen(#{Key => Value}))
     || {Key, Value} <- [{admission, fun erlang:is_map/1}, {admission, {m, f}}, {admission, {m, f, a}}, {admission, {"m", f, []}},
                         {admission_timeout, 0}, {admission_timeout, 60001}, {admission_cache, -1}]],
    [?assertEqual({error, {invalid_option, {Key, Value}}}, macula_peer_node:set_access(#{deny => #{Key => Value}}))
     || {Key, Value} <- [{keys, none}, {keys, [<<0:248>>]}, {node_ids, [<<>>]}, {node_ids, [a]}, {networks, ["10.0.0.0/33"]},
                         {networks, ["10.0.0.1/8"]}, {networks, [{1, 2, 3}]}, {networks, "10.0.0.0/8"}, {addresses, []}]],
    ?assertEqual({error, {invalid_option, {refuse, #{}}}}, macula_peer_node:set_access(#{refuse => #{}})),
    ?assertEqual({error, {invalid_option, {deny, []}}}, macula_peer_node:set_access(#{deny => []})),
    ?assertEqual({error, {invalid_option, {access, []}}}, macula_peer_node:set_access([])),
    [?assertEqual({error, {invalid_kick, Target}}, macula_peer_node:kick(Target))
     || Target <- [<<"a">>, {key, <<"a">>}, {node_id, <<>>}, {address, {127, 0, 0, 1}}]],
    ?assertEqual(#{allow => #{}, deny => #{}}, macula_peer_node:access()).

%% ---- lists ----

lists_hold_at_once(_Config) ->
    Here = listen(#{}),
    [Honest, Other] = [client(#{connect_timeout => 500}) || _ <- [1, 2]],
    [?assertEqual(ok, send(Node, Here)) || Node <- [Honest, Other]],
    Key = key(Other),
    Hex = string:lowercase(binary:encode_hex(Key)),
    [begin
         ok = macula_peer_node:set_access(Access),
         Gone = [Node || Node <- [Honest, Other], links(Node) =:= []],
         until(fun() -> links(Other) =:= [] end),
         ct:pal("~p: ~p", [Access, Gone]),
         ?assertEqual(Expected, send(Other, Here)),
         ok = macula_peer_node:set_access(#{}),
         [?assertEqual(ok, send(Node, Here)) || Node <- [Honest, Other]]
     end
     || {Access, Expected} <- [{#{deny => #{keys => [Key]}}, ?REJECTED},
                               {#{deny => #{keys => [Hex]}}, ?REJECTED},
                               {#{allow => #{keys => [key(Honest)]}}, ?REJECTED},
                               {#{deny => #{networks => ["127.0.0.0/8"]}}, ?REFUSED},
                               {#{deny => #{networks => [{127, 0, 0, 1}]}}, ?REFUSED},
                               {#{allow => #{networks => [<<"2001:db8::/32">>]}}, ?REFUSED}]],
    ok = macula_peer_node:set_access(#{deny => #{keys => [Key], networks => ["10.0.0.0/8"]}}),
    ?assertEqual(#{allow => #{}, deny => #{keys => [Key], networks => [<<"10.0.0.0/8">>]}}, macula_peer_node:access()),
    ?assertEqual(ok, send(Honest, Here)),
    ?assertEqual([honest], [honest || _ <- links(Honest)]),
    ?assertMatch(#{key := K, network := N} when K >= 3 andalso N >= 3, refused()).

lists_are_a_setting(_Config) ->
    Access = #{deny => #{networks => ["127.0.0.0/8"]}},
    ok = engine(#{access => Access}),
    {ok, {_, Port}} = macula_peer_node:listen(#{}),
    Client = client(#{connect_timeout => 500}),
    ?assertEqual(?REFUSED, send(Client, endpoint(Port))),
    ok = macula_peer_node:set_access(#{}),
    ?assertEqual(ok, send(Client, endpoint(Port))),
    ok = macula_peer_node:stop(),
    ok = macula_peer_node:start(),
    ?assertEqual(#{allow => #{}, deny => #{networks => [<<"127.0.0.0/8">>]}}, macula_peer_node:access()),
    ok = macula_peer_node:stop(),
    Wrong = #{deny => #{networks => [1]}},
    ok = application:set_env(?APP, access, Wrong),
    ?assertEqual({error, {invalid_option, {access, Wrong}}}, macula_peer_node:start()).

%% ---- a relay's nodes ----

a_kicked_node_leaves_and_waits(_Config) ->
    Relay = listen(#{relay => #{}}),
    [A, B] = [start_member(here, settings(Name, [Relay])) || Name <- [a, b]],
    [await_registered(Member, [Relay]) || Member <- [A, B]],
    ?assertEqual({error, not_found}, macula_peer_node:kick({node_id, id(c)})),
    ?assertEqual(ok, macula_peer_node:kick({node_id, id(a)})),
    ?assertEqual(ok, macula_peer_node:kick({key, key(B)})),
    ?assertMatch(#{nodes := []}, macula_peer_node:relay_nodes()),
    [until(fun() -> [kicked] =:= [R || #{state := refused, reason := R} <- macula_peer_test:events(Member, registration)] end)
     || Member <- [A, B]],
    %% Other names of the key wait too.
    ?assertEqual(kicked, macula_peer_relays:registration(B, id(c), Relay)),
    ?assertMatch(#{kicked := N} when N >= 3, refused()),
    ?assertMatch({error, {nat_connection_failed, {relay_setup_failed, kicked}}},
                 call(A, macula_peer_connector, send_message_nat_aware,
                      [id(a), id(b), store, #{id => 1}, #{timeout => ?TIMEOUT}])).

a_relay_lists_its_nodes(_Config) ->
    Relay = listen(#{relay => #{}}),
    Before = erlang:system_time(millisecond),
    [A, B] = [start_member(here, settings(Name, [Relay])) || Name <- [a, b]],
    [await_registered(Member, [Relay]) || Member <- [A, B]],
    ok = macula_peer_relays:send(A, {a, b}, 1, #{}),
    _ = macula_peer_relays:delivered(B, 1),
    #{nodes := Nodes, next := none} = macula_peer_node:relay_nodes(),
    [#{key := KeyA, since := Since, peers := [IdB], circuits := 1, sent := #{packets := Packets, bytes := Bytes}}] =
        [Node || #{node_id := Id} = Node <- Nodes, Id =:= id(a)],
    ?assertEqual({key(A), id(b), 2}, {KeyA, IdB, length(Nodes)}),
    ?assert(Since >= Before - 1000 andalso Since =< erlang:system_time(millisecond) + 1000),
    ?assert(Packets > 0 andalso Bytes > Packets),
    ?assertMatch([#{address := {{127, 0, 0, 1}, _}, received := #{packets := N}} | _] when N > 0, Nodes),
    ?assertEqual({error, not_a_relay}, call(A, macula_peer_node, relay_nodes, [])),
    ?assertMatch(#{nodes := [], next := none}, macula_peer_node:relay_nodes(1 bsl 40)).

looking_starts_nothing(_Config) ->
    ok = macula_peer_node:stop(),
    [?assertEqual({error, not_started}, Look())
     || Look <- [fun macula_peer_node:access/0, fun macula_peer_node:relay_nodes/0,
                 fun() -> macula_peer_node:kick({node_id, <<"a">>}) end]],
    ?assertEqual(undefined, whereis(macula_peer_admission)).

%% ---- helpers ----

%% This node listens, and is reached there.
listen(Opts) ->
    _ = whereis(macula_peer_sup) =/= undefined orelse engine(#{}),
    {ok, {_, Port}} = macula_peer_test:listen(Opts),
    endpoint(Port).

client(Settings) ->
    start_member(here, Settings).

send(Node, Endpoint) ->
    call(Node, macula_peer_connector, send_message, [Endpoint, store, #{key => <<"k">>, value => <<"v">>}, ?TIMEOUT]).

key(Node) ->
    #{fingerprint := Key} = call(Node, macula_peer_node, identity, []),
    Key.

links(Node) ->
    #{peers := Peers} = macula_peer_test:stats(Node),
    [Peer || #{path := direct} = Peer <- Peers].

admission() ->
    maps:get(admission, macula_peer_node:stats()).

refused() ->
    maps:get(refused, admission()).

workers() ->
    [Pid || Pid <- processes(), {current_function, {?MODULE, _, _}} <- [process_info(Pid, current_function)], Pid =/= self()].

callback(Answer) ->
    answer(Answer),
    {?MODULE, decide, [self()]}.

%% From now on the callback answers so.
answer(Answer) ->
    persistent_term:put(?MODULE, Answer).

asked() ->
    receive {asked, Question} -> Question after ?TIMEOUT -> ct:fail(not_asked) end.

%% The callback.
decide(Question, Owner) ->
    Owner ! {asked, Question},
    case persistent_term:get(?MODULE) of
        Decide when is_function(Decide) -> Decide(Question);
        Answer -> Answer
    end.

%% What is logged meanwhile, from `notice' on.
logged(Fun) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => notice}),
    try Fun()
    after
        ok = logger:remove_handler(?MODULE)
    end,
    lines().

lines() ->
    receive
        {logged, {Format, Args}} -> [lists:flatten(io_lib:format(Format, Args)) | lines()];
        {logged, _Report} -> lines()
    after 0 -> []
    end.

%% As a handler of logger.
log(#{msg := Message}, #{config := Pid}) ->
    Pid ! {logged, Message}.
