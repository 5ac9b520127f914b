%% A node hands messages over to macula's own gateway on the same host, and its answers reach the senders. Without a
%% gateway the process macula_gateway gets them, or the handler, or they are counted.
-module(inbound_SUITE).

-include_lib("stdlib/include/assert.hrl").

-compile([export_all, nowarn_export_all]).

-import(macula_peer_test, [call/4, until/1, await/2, endpoint/1, elapsed/1]).

-define(TIMEOUT, 10000).
-define(LATE, 2000).

suite() -> [{timetrap, {seconds, 120}}].

all() ->
    [{group, network},
     the_gateway_answers_requests, a_node_behind_a_relay_answers_requests, an_answer_to_the_gateway_reaches_it,
     every_message_of_a_burst_is_handed_over, large_messages_are_handed_over, slow_answers_delay_no_other,
     ping_and_nat_probe_are_answered_by_the_node,
     a_missing_gateway_delays_no_message, the_process_macula_gateway_gets_messages_without_a_gateway,
     the_handler_gets_messages_the_gateway_does_not_take, a_message_without_a_receiver_is_counted_and_logged_once,
     a_gateway_that_is_restarted_gets_messages_again, a_silent_gateway_is_given_up,
     the_gateway_of_macula_is_found, a_handler_takes_the_place_of_the_gateway, an_endpoint_comes_before_the_handler,
     gateway_none_hands_nothing_over,
     the_gateway_does_not_get_its_own_messages_back, another_node_is_not_taken_for_the_gateway,
     the_gateways_port_is_left_to_it, a_wrong_gateway_stops_the_start,
     a_node_listens_as_it_starts, a_wrong_listen_stops_the_start].

groups() ->
    [{network, [], [any_port_is_not_the_gateways]}].

init_per_group(network, Config) ->
    case macula_peer_net:available() of
        ok -> [{hosts, macula_peer_net:start(1)} | Config];
        {skip, _} = Skip -> Skip
    end.

end_per_group(network, _Config) ->
    macula_peer_net:stop().

init_per_testcase(_Case, Config) ->
    %% It may have messages of another suite.
    _ = macula_peer_test:collector(),
    ok = macula_peer_test:asked(forget),
    ok = macula_peer_test:engine(#{gateway => none}),
    Config.

end_per_testcase(_Case, _Config) ->
    [true = os:unsetenv(Name) || Name <- ["MACULA_QUIC_PORT", "GATEWAY_PORT"]],
    [ok = application:unset_env(macula, Key) || Key <- [quic_port, gateway_port]],
    [ok = application:unset_env(macula_peer_connector, Key) || Key <- [gateway, listen, port]],
    [unregister(macula_gateway) || whereis(macula_gateway) =/= undefined],
    macula_peer_node:stop().

%% ---- handing over ----

the_gateway_answers_requests(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--rpc-delay-ms", "2000"]),
    {Node, Endpoint} = start_node(Gateway),
    Ask = fun(Type, Msg) -> macula_peer_connector:send_message_and_wait(Endpoint, Type, Msg, ?TIMEOUT) end,
    ?assertMatch({ok, {find_value_reply, #{<<"value">> := <<"value">>}}}, Ask(find_value, #{key => <<"k">>})),
    ?assertMatch({ok, {find_node_reply, #{<<"nodes">> := []}}}, Ask(find_node, #{target => <<"t">>})),
    ?assertMatch({ok, {reply, #{<<"call_id">> := <<"c">>}}}, Ask(call, #{call_id => <<"c">>})),
    {Took, Answer} = elapsed(fun() -> Ask(rpc_request, rpc_request(<<"r">>)) end),
    ?assertMatch({ok, {rpc_reply, #{<<"request_id">> := <<"r">>, <<"result">> := <<"ok">>}}}, Answer),
    ?assert(Took >= 2000),
    ok = macula_peer_connector:send_message(Endpoint, store, #{n => 1, key => <<"k">>, value => <<"v">>}),
    _ = arrived(Gateway, 1),
    ?assertMatch(#{gateway := #{handed_over := 5, answered := 4, fallen_back := 0}, unhandled := 0},
                 macula_peer_test:stats(Node)),
    ?assertMatch(#{connections := 1, incomplete := 0, invalid := 0, extra_bytes := 0,
                   types := #{find_value := 1, find_node := 1, call := 1, rpc_request := 1, store := 1}},
                 macula_peer_fake_gateway:stats(Gateway)).

a_node_behind_a_relay_answers_requests(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--rpc-delay-ms", "300"]),
    Relay = macula_peer_relays:start_relay(here),
    Target = macula_peer_test:start_node(),
    ok = call(Target, macula_peer_test, engine,
              [(macula_peer_relays:settings(target, [Relay]))#{gateway => endpoint_of(Gateway)}]),
    ok = macula_peer_relays:await_registered(Target, [Relay]),
    Opts = #{relay_endpoint => macula_peer_relays:endpoint(Relay)},
    Ask = fun(Type, Msg) ->
        macula_peer_node:request(macula_peer_relays:id(target), Type, Msg, ?TIMEOUT, Opts)
    end,
    ?assertMatch({ok, {find_value_reply, #{<<"value">> := <<"value">>}}}, Ask(find_value, #{key => <<"k">>})),
    ?assertMatch({ok, {rpc_reply, #{<<"request_id">> := <<"r">>}}}, Ask(rpc_request, rpc_request(<<"r">>))),
    ?assertMatch({ok, #{path := relay}}, macula_peer_node:path({node, macula_peer_relays:id(target)})),
    %% The address of a probe through a relay is not known.
    ?assertEqual({error, timeout},
                 macula_peer_node:request(macula_peer_relays:id(target), nat_probe, nat_probe(), 500, Opts)),
    ?assertMatch({ok, {pong, #{<<"timestamp">> := 7}}}, Ask(ping, #{timestamp => 7})),
    ?assertMatch(#{types := Types} when map_size(Types) =:= 2, macula_peer_fake_gateway:stats(Gateway)).

%% One gateway asks another one without waiting, as macula's RPC does: both nodes only hand over.
an_answer_to_the_gateway_reaches_it(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Other = macula_peer_fake_gateway:start(["--rpc-delay-ms", "300"]),
    {_Node, Endpoint} = start_node(Other),
    ok = macula_peer_test:engine(#{gateway => endpoint_of(Gateway)}),
    ok = macula_peer_connector:send_message(Endpoint, rpc_request, rpc_request(<<"r">>)),
    _ = await(fun() -> macula_peer_fake_gateway:stats(Gateway) end, fun(#{types := Types}) -> Types =:= #{rpc_reply => 1} end),
    ?assertMatch(#{gateway := #{handed_over := 1, answered := 0}}, macula_peer_node:stats()).

every_message_of_a_burst_is_handed_over(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    {Node, Endpoint} = start_node(Gateway),
    Count = 5000,
    %% Every tenth is of a type that is answered, or might be.
    _ = macula_peer_test:in_parallel(10, fun(P) ->
        [ok = macula_peer_connector:send_message(Endpoint, type(N), #{n => N, key => <<"k">>, payload => <<0:800>>}, 60000)
         || N <- lists:seq(P, Count, 10)]
    end),
    ?assertMatch(#{received := Count, incomplete := 0, invalid := 0, extra_bytes := 0}, arrived(Gateway, Count)),
    ?assertMatch(#{unhandled := 0, gateway := #{handed_over := Count, fallen_back := 0}}, macula_peer_test:stats(Node)).

type(N) when N rem 20 =:= 0 -> store;
type(N) when N rem 20 =:= 10 -> find_value;
type(_) -> cast.

%% What a gateway reads at all, and what it would lose.
large_messages_are_handed_over(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    {Node, Endpoint} = start_node(Gateway),
    [begin
         ok = macula_peer_connector:send_message(Endpoint, cast, #{n => N, payload => rand:bytes(Size)}),
         ?assertMatch(#{incomplete := 0, invalid := 0, extra_bytes := 0}, arrived(Gateway, N))
     end || {N, Size} <- lists:zip(lists:seq(1, 5), [1000, 2000, 4000, 6000, 8000])],
    %% The process itself can have it.
    Payload = rand:bytes(1 bsl 20),
    true = call(Node, erlang, register, [macula_gateway, call(Node, erlang, spawn, [timer, sleep, [infinity]])]),
    ok = macula_peer_connector:send_message(Endpoint, cast, #{n => 6, payload => Payload}),
    Casts = fun() -> call(Node, ?MODULE, casts, []) end,
    [{route_message, cast, Message, _Stream, {ok, _From}}] = await(Casts, fun(All) -> All =/= [] end),
    ?assertEqual(#{<<"n">> => 6, <<"payload">> => Payload}, Message),
    ?assertMatch(#{received := 5, incomplete := 0}, macula_peer_fake_gateway:stats(Gateway)).

%% Runs in the node: what the process macula_gateway has not looked at.
casts() ->
    {messages, Messages} = process_info(whereis(macula_gateway), messages),
    [Cast || {'$gen_cast', Cast} <- Messages].

%% As many as the gateway allows streams on one connection, and more.
slow_answers_delay_no_other(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--rpc-delay-ms", "2000"]),
    {Node, Endpoint} = start_node(Gateway),
    Asked = spawn_monitor(fun() ->
        Answers = macula_peer_test:in_parallel(150, fun(N) ->
            Id = integer_to_binary(N),
            {ok, {rpc_reply, #{<<"request_id">> := Id}}} =
                macula_peer_connector:send_message_and_wait(Endpoint, rpc_request, rpc_request(Id), 30000),
            ok
        end),
        exit({answers, length(Answers)})
    end),
    _ = await(fun() -> macula_peer_fake_gateway:stats(Gateway) end,
              fun(#{types := Types}) -> maps:get(rpc_request, Types, 0) =:= 150 end),
    %% Meanwhile others go through, and messages without an answer take no place of theirs.
    [ok = macula_peer_connector:send_message(Endpoint, store, #{n => N}) || N <- lists:seq(1, 500)],
    _ = arrived(Gateway, 500),
    {Pid, Monitor} = Asked,
    receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual({answers, 150}, Reason) end,
    ?assertMatch(#{gateway := #{answered := 150}}, macula_peer_test:stats(Node)).

ping_and_nat_probe_are_answered_by_the_node(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    {_Node, Endpoint} = start_node(Gateway),
    {ok, {_, Port}} = macula_peer_node:local_address(),
    ?assertMatch({ok, {pong, #{<<"timestamp">> := 42, <<"server_time">> := _}}},
                 macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 42}, ?TIMEOUT)),
    ?assertMatch({ok, {nat_probe_reply, #{<<"node_id">> := <<"me">>, <<"reflexive_ip">> := <<"127.0.0.1">>,
                                          <<"reflexive_port">> := Port}}},
                 macula_peer_connector:send_message_and_wait(Endpoint, nat_probe, nat_probe(), ?TIMEOUT)),
    ?assertMatch(#{received := 0}, macula_peer_fake_gateway:stats(Gateway)).

%% ---- where no gateway listens ----

a_missing_gateway_delays_no_message(_Config) ->
    true = register(macula_gateway, self()),
    Endpoint = listen(#{gateway => endpoint(macula_peer_test:closed_port())}),
    Sender = macula_peer_test:start_node(),
    {Took, ok} = elapsed(fun() -> call(Sender, ?MODULE, send_many, [Endpoint, 1000]) end),
    _ = [receive {'$gen_cast', {route_message, cast, #{<<"n">> := N}, _, _}} -> N after ?TIMEOUT -> ct:fail(N) end
         || N <- lists:seq(1, 1000)],
    ?assert(Took < ?LATE),
    fallen_back(1000).

the_process_macula_gateway_gets_messages_without_a_gateway(_Config) ->
    true = register(macula_gateway, self()),
    %% The handler is not asked.
    Endpoint = listen(#{gateway => endpoint(macula_peer_test:closed_port()), handler => macula_peer_test:collector()}),
    Sender = macula_peer_test:start_node(),
    ok = call(Sender, macula_peer_node, start, []),
    {ok, {_, Port}} = call(Sender, macula_peer_node, local_address, []),
    ok = call(Sender, macula_peer_connector, send_message, [Endpoint, store, #{key => <<"k">>, ttl => 60}]),
    receive
        {'$gen_cast', {route_message, Type, Msg, Stream, From}} ->
            ?assertEqual({store, #{<<"key">> => <<"k">>, <<"ttl">> => 60}, {ok, {{127, 0, 0, 1}, Port}}}, {Type, Msg, From}),
            ?assert(is_reference(Stream))
    after ?TIMEOUT -> ct:fail(no_cast)
    end,
    ?assertEqual(0, macula_peer_test:asked(count)).

the_handler_gets_messages_the_gateway_does_not_take(_Config) ->
    Endpoint = listen(#{gateway => endpoint(macula_peer_test:closed_port()), handler => self()}),
    Sender = macula_peer_test:start_node(),
    Request = spawn_monitor(fun() ->
        exit(call(Sender, macula_peer_connector, send_message_and_wait, [Endpoint, call, #{n => 1}, ?TIMEOUT]))
    end),
    receive
        {macula_peer_message, #{type := call, message := #{<<"n">> := 1}, reply_to := Token}} ->
            %% It can answer: the gateway did not.
            ok = macula_peer_node:reply(Token, reply, #{n => 2})
    after ?TIMEOUT -> ct:fail(no_message)
    end,
    {Pid, Monitor} = Request,
    receive {'DOWN', Monitor, process, Pid, Reason} -> ?assertEqual({ok, {reply, #{<<"n">> => 2}}}, Reason) end.

a_message_without_a_receiver_is_counted_and_logged_once(_Config) ->
    ok = application:ensure_started(crypto),
    ok = macula_peer_node:stop(),
    [ok = application:set_env(macula_peer_connector, Key, Value)
     || {Key, Value} <- [{gateway, endpoint(macula_peer_test:closed_port())}, {listen, #{}}]],
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => warning}),
    try
        {ok, _} = application:ensure_all_started(macula_peer_connector),
        {ok, {_, Port}} = macula_peer_node:local_address(),
        Sender = macula_peer_test:start_node(),
        [ok = call(Sender, macula_peer_connector, send_message, [endpoint(Port), cast, #{}]) || _ <- lists:seq(1, 20)],
        _ = await(fun macula_peer_node:stats/0, fun(#{unhandled := N}) -> N =:= 20 end),
        receive {logged, Text} -> ?assertMatch({match, _}, re:run(Text, "no handler takes them")) after ?TIMEOUT -> ct:fail(not_logged) end,
        receive {logged, Again} -> ct:fail({logged_again, Again}) after 0 -> ok end
    after
        logger:remove_handler(?MODULE),
        application:stop(macula_peer_connector)
    end.

%% As a handler of logger.
log(#{msg := {Format, Args}}, #{config := Pid}) when is_list(Args) ->
    Text = unicode:characters_to_binary(io_lib:format(Format, Args)),
    case re:run(Text, "messages arrive") of
        {match, _} -> Pid ! {logged, Text};
        nomatch -> ok
    end;
log(_Event, _Config) ->
    ok.

a_gateway_that_is_restarted_gets_messages_again(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Bind = ["--bind", binary_to_list(endpoint_of(Gateway))],
    {Node, Endpoint} = start_node(Gateway),
    ok = send_many(Endpoint, 100),
    _ = arrived(Gateway, 100),
    ok = macula_peer_fake_gateway:stop(Gateway),
    %% Into the gap: handed over later, or dropped and counted.
    ok = send_many(Endpoint, 500),
    Again = macula_peer_fake_gateway:start(Bind),
    Handed = await(fun() ->
        #{unhandled := Unhandled, undelivered := Undelivered} = macula_peer_test:stats(Node),
        #{distinct := Distinct} = macula_peer_fake_gateway:stats(Again),
        {Distinct + Unhandled + Undelivered >= 500, Distinct, Unhandled, Undelivered}
    end, fun({All, _, _, _}) -> All end),
    ct:pal("handed over, unhandled, undelivered: ~p", [Handed]),
    %% Soon all is as it was.
    _ = await(fun() -> macula_peer_connector:send_message_and_wait(Endpoint, find_value, #{key => <<"k">>}, 1000) end,
              fun(Answer) -> element(1, Answer) =:= ok end).

%% It is bound and says nothing.
a_silent_gateway_is_given_up(_Config) ->
    {_Socket, Silent} = macula_peer_test:silent_port(),
    Endpoint = listen(#{gateway => endpoint(Silent), handler => self()}),
    Sender = macula_peer_test:start_node(),
    {Took, ok} = elapsed(fun() ->
        ok = call(Sender, ?MODULE, send_many, [Endpoint, 3000]),
        _ = [receive {macula_peer_message, #{message := #{<<"n">> := N}}} -> N after 20000 -> ct:fail(N) end
             || N <- lists:seq(1, 3000)],
        ok
    end),
    ct:pal("given up after ~p ms", [Took]),
    fallen_back(3000).

%% ---- the setting ----

%% Wherever macula was told its port.
the_gateway_of_macula_is_found(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Port = macula_peer_fake_gateway:port(Gateway),
    Sender = macula_peer_test:start_node(),
    [begin
         true = Set(),
         Endpoint = listen(#{}),
         Asked = call(Sender, macula_peer_connector, send_message_and_wait, [Endpoint, find_value, #{key => <<"k">>}, ?TIMEOUT]),
         ?assertMatch({ok, {find_value_reply, _}}, Asked),
         end_per_testcase(again, [])
     end || Set <- [fun() -> os:putenv("MACULA_QUIC_PORT", integer_to_list(Port)) end,
                    fun() -> os:putenv("GATEWAY_PORT", integer_to_list(Port)) end,
                    fun() -> ok =:= application:set_env(macula, quic_port, Port) end,
                    fun() -> ok =:= application:set_env(macula, gateway_port, Port) end]],
    ?assertMatch(#{types := #{find_value := 4}}, macula_peer_fake_gateway:stats(Gateway)).

a_handler_takes_the_place_of_the_gateway(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    true = os:putenv("MACULA_QUIC_PORT", integer_to_list(macula_peer_fake_gateway:port(Gateway))),
    Endpoint = listen(#{handler => self()}),
    Sender = macula_peer_test:start_node(),
    ok = call(Sender, macula_peer_connector, send_message, [Endpoint, ping, #{timestamp => 1}]),
    receive {macula_peer_message, #{type := ping}} -> ok after ?TIMEOUT -> ct:fail(no_message) end,
    %% Without one, it is the gateway's turn.
    ok = macula_peer_node:set_handler(undefined),
    ok = call(Sender, macula_peer_connector, send_message, [Endpoint, cast, #{n => 1}]),
    ?assertMatch(#{types := #{cast := 1}}, arrived(Gateway, 1)).

an_endpoint_comes_before_the_handler(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    Endpoint = listen(#{gateway => endpoint_of(Gateway), handler => macula_peer_test:collector()}),
    Sender = macula_peer_test:start_node(),
    ok = call(Sender, macula_peer_connector, send_message, [Endpoint, cast, #{n => 1}]),
    ?assertMatch(#{types := #{cast := 1}}, arrived(Gateway, 1)),
    ?assertEqual(0, macula_peer_test:asked(count)),
    %% Events are the handler's all the same.
    Relay = macula_peer_relays:start_relay(here),
    ok = macula_peer_node:register(<<"me">>, [macula_peer_relays:endpoint(Relay)]),
    until(fun() -> [E || #{event := registration, state := registered} = E <- macula_peer_test:asked(events)] =/= [] end).

gateway_none_hands_nothing_over(_Config) ->
    true = register(macula_gateway, self()),
    Gateway = macula_peer_fake_gateway:start(),
    true = os:putenv("MACULA_QUIC_PORT", integer_to_list(macula_peer_fake_gateway:port(Gateway))),
    Endpoint = listen(#{gateway => none}),
    Sender = macula_peer_test:start_node(),
    ok = call(Sender, macula_peer_connector, send_message, [Endpoint, cast, #{n => 1}]),
    _ = await(fun macula_peer_node:stats/0, fun(#{unhandled := N}) -> N =:= 1 end),
    ?assertNot(maps:is_key(gateway, macula_peer_node:stats())),
    ?assertMatch(#{received := 0}, macula_peer_fake_gateway:stats(Gateway)),
    ?assertEqual([], macula_peer_test:mailbox()).

%% ---- no circles ----

%% The application itself sends to its gateway, whose late answers are not for the gateway.
the_gateway_does_not_get_its_own_messages_back(_Config) ->
    Gateway = macula_peer_fake_gateway:start(["--rpc-delay-ms", "100"]),
    ok = macula_peer_test:engine(#{gateway => endpoint_of(Gateway)}),
    ok = macula_peer_connector:send_message(endpoint_of(Gateway), rpc_request, rpc_request(<<"r">>)),
    _ = await(fun macula_peer_node:stats/0, fun(#{unhandled := N}) -> N =:= 1 end),
    ok = macula_peer_node:set_handler(self()),
    ok = macula_peer_connector:send_message(endpoint_of(Gateway), rpc_request, rpc_request(<<"r">>)),
    receive {macula_peer_message, #{type := rpc_reply}} -> ok after ?TIMEOUT -> ct:fail(no_message) end,
    ?assertMatch(#{received := 2, types := #{rpc_request := 2}}, macula_peer_fake_gateway:stats(Gateway)).

%% Two that took each other for gateways would hand messages on for ever.
another_node_is_not_taken_for_the_gateway(_Config) ->
    {Other, Port} = macula_peer_test:start_listener(),
    Endpoint = listen(#{gateway => endpoint(Port), handler => self()}),
    Sender = macula_peer_test:start_node(),
    ok = call(Sender, macula_peer_connector, send_message, [Endpoint, cast, #{n => 1}]),
    receive {macula_peer_message, #{type := cast}} -> ok after ?TIMEOUT -> ct:fail(no_message) end,
    ?assertEqual(0, macula_peer_test:count(Other)).

%% ---- its port ----

the_gateways_port_is_left_to_it(_Config) ->
    Port = macula_peer_test:closed_port(),
    ok = macula_peer_test:engine(#{gateway => endpoint(Port)}),
    Refused = {error, {listen_failed, {gateway_port, Port}}},
    ?assertEqual(Refused, macula_peer_node:listen(#{port => Port})),
    ?assertEqual(Refused, macula_peer_node:listen(#{port => Port, ip => {127, 0, 0, 1}})),
    ?assertEqual(Refused, macula_peer_node:listen(#{relay => #{probe_port => Port}})),
    ?assertMatch({ok, _}, macula_peer_node:listen(#{})),
    ok = macula_peer_node:stop(),
    Start = {error, {start_failed, {gateway_port, Port}}},
    ok = application:set_env(macula_peer_connector, port, Port),
    ?assertEqual(Start, macula_peer_node:start()),
    ok = application:unset_env(macula_peer_connector, gateway),
    [begin
         true = os:putenv(Name, integer_to_list(Port)),
         ?assertEqual({Name, Start}, {Name, macula_peer_node:start()}),
         true = os:unsetenv(Name)
     end || Name <- ["MACULA_QUIC_PORT", "GATEWAY_PORT"]],
    ok = application:set_env(macula, quic_port, Port),
    ?assertEqual(Start, macula_peer_node:start()),
    ok = application:set_env(macula_peer_connector, gateway, none),
    ?assertEqual(ok, macula_peer_node:start()).

%% Where the system has but two ports to give.
any_port_is_not_the_gateways(Config) ->
    [Host] = proplists:get_value(hosts, Config),
    Node = macula_peer_net:start_node(Host),
    ok = macula_peer_net:kernel(Host, "ipv4/ip_local_port_range", "40000 40001"),
    [begin
         ok = call(Node, macula_peer_test, engine, [#{gateway => endpoint(40000)}]),
         ?assertMatch({ok, {_, 40001}}, call(Node, macula_peer_node, local_address, []))
     end || _ <- lists:seq(1, 10)],
    macula_peer_test:stop_node(Node).

a_wrong_gateway_stops_the_start(_Config) ->
    ok = macula_peer_node:stop(),
    [begin
         ok = application:set_env(macula_peer_connector, gateway, Wrong),
         ?assertEqual({error, {invalid_option, {gateway, Wrong}}}, macula_peer_node:start())
     end || Wrong <- [9443, <<"127.0.0.1">>, "127.0.0.1:0", on, {auto, <<"127.0.0.1:9443">>}, {127, 0, 0, 1}]],
    ok = application:unset_env(macula_peer_connector, gateway),
    [begin
         true = os:putenv("MACULA_QUIC_PORT", Wrong),
         ?assertEqual({error, {invalid_variable, {"MACULA_QUIC_PORT", Wrong}}}, macula_peer_node:start())
     end || Wrong <- ["0", "65536", "quic", "9443 x", "-1"]],
    true = os:putenv("MACULA_QUIC_PORT", ""),
    ?assertEqual(ok, macula_peer_node:start()),
    ?assertMatch(#{gateway := #{endpoint := <<"127.0.0.1:9443">>}}, macula_peer_node:stats()).

%% ---- listening at the start ----

a_node_listens_as_it_starts(_Config) ->
    Node = macula_peer_test:start_node(),
    Port = macula_peer_test:free_port(),
    Settings = #{gateway => none, listen => #{port => Port, relay => #{max_sessions => 7}}},
    ok = call(Node, macula_peer_test, engine, [Settings#{handler => call(Node, macula_peer_test, collector, [])}]),
    ?assertMatch({ok, {_, Port}}, call(Node, macula_peer_node, local_address, [])),
    ok = macula_peer_connector:send_message(endpoint(Port), cast, #{n => 1}),
    until(fun() -> macula_peer_test:count(Node) =:= 1 end),
    ?assertMatch(#{relay := _}, macula_peer_test:stats(Node)),
    ?assertEqual({error, already_listening}, call(Node, macula_peer_node, listen, [#{}])).

a_wrong_listen_stops_the_start(_Config) ->
    ok = macula_peer_node:stop(),
    [begin
         ok = application:set_env(macula_peer_connector, listen, Wrong),
         ?assertEqual({error, {invalid_option, {listen, Named}}}, macula_peer_node:start()),
         %% Nothing is left running.
         ?assertEqual(not_started, macula_peer_nif:local_address())
     end || {Wrong, Named} <- [{4433, 4433}, {[{port, 4433}], [{port, 4433}]}, {#{port => 70000}, {port, 70000}},
                               {#{handler => self()}, {handler, self()}}, {#{relay => #{max_packet => 1}}, {max_packet, 1}}]],
    {ok, Socket} = gen_udp:open(0, [inet6, {ipv6_v6only, false}]),
    {ok, Port} = inet:port(Socket),
    ok = application:set_env(macula_peer_connector, listen, #{port => Port}),
    ?assertEqual({error, {listen_failed, eaddrinuse}}, macula_peer_node:start()),
    ok = gen_udp:close(Socket),
    ?assertEqual(ok, macula_peer_node:start()).

%% ---- common ----

%% A node in front of a gateway, and where it listens.
start_node(Gateway) ->
    Node = macula_peer_test:start_node(),
    ok = call(Node, macula_peer_test, engine, [#{gateway => endpoint_of(Gateway)}]),
    {ok, {_, Port}} = call(Node, macula_peer_node, listen, [#{}]),
    {Node, endpoint(Port)}.

%% This node listens with these settings.
listen(Settings) ->
    ok = macula_peer_test:engine(Settings),
    {ok, {_, Port}} = macula_peer_node:listen(#{}),
    endpoint(Port).

endpoint_of(Gateway) ->
    macula_peer_fake_gateway:endpoint(Gateway).

send_many(Endpoint, Count) ->
    lists:foreach(fun(N) -> ok = macula_peer_connector:send_message(Endpoint, cast, #{n => N}, 30000) end,
                  lists:seq(1, Count)).

arrived(Gateway, Distinct) ->
    await(fun() -> macula_peer_fake_gateway:stats(Gateway) end, fun(#{distinct := D}) -> D =:= Distinct end).

%% This many were for others than the gateway, and none were dropped.
fallen_back(Count) ->
    Stats = await(fun macula_peer_node:stats/0, fun(#{gateway := #{fallen_back := N}}) -> N =:= Count end),
    ?assertMatch(#{unhandled := 0, gateway := #{handed_over := 0}}, Stats).

rpc_request(Id) ->
    #{request_id => Id, procedure => <<"p">>, args => [], from_node => <<"me">>}.

nat_probe() ->
    #{node_id => <<"me">>, local_port => 1}.
