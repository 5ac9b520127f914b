%% The functions return what the original returned, and errors instead of exceptions.
-module(api_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/3, send_message/4, send_message_and_wait/4, send_message_nat_aware/4,
                                send_message_nat_aware/5]).
-import(macula_peer_test, [closed_port/0, silent_port/0, endpoint/1, endpoint/2, until/1, ids/1, rpc/2]).

-define(DOWN, {error, {connect_failed, transport_down}}).
-define(BOOTSTRAP, "MACULA_BOOTSTRAP_PEERS").

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [{group, results}, {group, endpoints}, {group, messages}, {group, nat_aware}, {group, listening},
     the_shell_has_the_documentation].

groups() ->
    [{results, [], [a_live_peer_gets_messages_and_answers, a_closed_port_is_down, a_name_that_does_not_resolve_is_down,
                    a_silent_port_is_down_at_the_timeout, no_reply_is_a_timeout, timeout_zero_on_a_cold_peer,
                    timeout_zero_on_a_live_peer, infinity_works, timeouts_of_other_kinds_are_refused]},
     {endpoints, [], [every_spelling_is_accepted, a_bad_format_is_named, a_bad_port_is_named,
                      an_endpoint_of_another_kind_is_a_bad_format]},
     {messages, [], [encoding_errors_come_before_endpoint_errors, an_unknown_type_is_refused,
                     a_missing_field_is_named, binary_keys_are_accepted_where_the_original_did,
                     dht_store_is_an_alias_of_store, a_value_without_a_wire_form_is_named, a_message_is_a_map]},
     {nat_aware, [], [relay_endpoint_in_its_three_spellings, the_endpoint_option_is_used,
                      a_relay_is_used_when_the_endpoint_is_dead, without_a_relay_the_original_term,
                      an_unreachable_relay_is_named, any_bootstrap_peer_is_used, bad_bootstrap_peers_are_named,
                      invalid_input_raises_nothing]},
     {listening, [], [listen_tells_the_address, a_second_listen_is_refused, listen_options_are_checked,
                      a_taken_port_is_named, a_bad_certificate_is_named, close_stops_accepting,
                      the_handler_is_a_process_or_a_function, a_handler_of_another_kind_is_refused,
                      a_message_is_answered_once, a_refused_answer_leaves_the_token_good, a_token_is_a_token,
                      an_answer_to_a_closed_connection_is_an_error]}].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {endpoint, endpoint(Port)}, {port, Port} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

init_per_testcase(_Case, Config) ->
    true = os:unsetenv(?BOOTSTRAP),
    macula_peer_test:engine([]),
    Config.

end_per_testcase(_Case, _Config) ->
    true = os:unsetenv(?BOOTSTRAP),
    ?assertEqual([], macula_peer_test:mailbox()).

%% What `h(macula_peer_connector, send_message, 4)' prints.
the_shell_has_the_documentation(_Config) ->
    Text = fun(Render) -> unicode:characters_to_list(Render) end,
    [begin
         {ok, Docs} = code:get_doc(Module),
         ?assertMatch({Module, {match, _}}, {Module, re:run(Text(shell_docs:render(Module, Function, Arity, Docs)), Says)})
     end || {Module, Function, Arity, Says} <- [{macula_peer_connector, send_message, 4, "Sends a message"},
                                                {macula_peer_node, listen, 1, "Accepts connections"}]],
    {ok, Node} = code:get_doc(macula_peer_node),
    Options = Text(shell_docs:render_type(macula_peer_node, listen_opts, 0, Node)),
    ?assertMatch({match, _}, re:run(Options, "handshake_rate \\(500\\)")),
    ?assertMatch({ok, {docs_v1, _, _, _, hidden, _, _}}, code:get_doc(macula_peer_lookup)).

%% ---- results ----

a_live_peer_gets_messages_and_answers(Config) ->
    Endpoint = ?config(endpoint, Config),
    arrives(Config, fun(Message) -> send_message(Endpoint, store, Message) end),
    arrives(Config, fun(Message) -> send_message(Endpoint, store, Message, 5000) end),
    ?assertMatch({ok, {pong, #{<<"timestamp">> := 7, <<"server_time">> := 7}}},
                 send_message_and_wait(Endpoint, ping, #{timestamp => 7}, 5000)).

a_closed_port_is_down(_Config) ->
    Endpoint = endpoint(closed_port()),
    ?assertEqual(?DOWN, send_message(Endpoint, store, #{})),
    ?assertEqual(?DOWN, send_message_and_wait(Endpoint, store, #{}, 5000)).

a_name_that_does_not_resolve_is_down(_Config) ->
    ?assertEqual(?DOWN, send_message(<<"no-such-host.invalid:9443">>, store, #{}, 5000)),
    ?assertEqual(?DOWN, send_message_and_wait(<<"no-such-host.invalid:9443">>, store, #{}, 5000)).

a_silent_port_is_down_at_the_timeout(_Config) ->
    {Socket, Port} = silent_port(),
    ?assertEqual(?DOWN, send_message(endpoint(Port), store, #{}, 200)),
    ?assertEqual(?DOWN, send_message_and_wait(endpoint(Port), store, #{}, 200)),
    gen_udp:close(Socket).

no_reply_is_a_timeout(Config) ->
    ?assertEqual({error, timeout},
                 send_message_and_wait(?config(endpoint, Config), rpc_request, rpc(<<"never">>, 0), 300)).

timeout_zero_on_a_cold_peer(Config) ->
    Endpoint = ?config(endpoint, Config),
    ?assertEqual({error, timeout}, send_message(Endpoint, store, #{}, 0)),
    ?assertEqual({error, timeout}, send_message_and_wait(Endpoint, ping, #{timestamp => 1}, 0)).

timeout_zero_on_a_live_peer(Config) ->
    Endpoint = ?config(endpoint, Config),
    ok = send_message(Endpoint, store, #{}),
    arrives(Config, fun(Message) -> send_message(Endpoint, store, Message, 0) end).

infinity_works(Config) ->
    Endpoint = ?config(endpoint, Config),
    arrives(Config, fun(Message) -> send_message(Endpoint, store, Message, infinity) end),
    ?assertMatch({ok, {pong, _}}, send_message_and_wait(Endpoint, ping, #{timestamp => 1}, infinity)),
    ?assertEqual(?DOWN, send_message(endpoint(closed_port()), store, #{}, infinity)).

timeouts_of_other_kinds_are_refused(Config) ->
    Endpoint = ?config(endpoint, Config),
    [begin
         Refused = {error, {invalid_timeout, Timeout}},
         ?assertEqual(Refused, send_message(Endpoint, store, #{}, Timeout)),
         ?assertEqual(Refused, send_message_and_wait(Endpoint, store, #{}, Timeout)),
         ?assertEqual(Refused, send_message_nat_aware(<<"a">>, <<"b">>, store, #{},
                                                      #{endpoint => Endpoint, timeout => Timeout}))
     end || Timeout <- [-1, 1.5, never, <<"5000">>, 1 bsl 64]].

%% ---- endpoints ----

every_spelling_is_accepted(Config) ->
    Port = integer_to_list(?config(port, Config)),
    Spellings = ["127.0.0.1:" ++ Port, "localhost:" ++ Port, "LocalHost:" ++ Port, "https://127.0.0.1:" ++ Port,
                 "http://localhost:" ++ Port],
    [arrives(Config, fun(Message) -> send_message(Endpoint, store, Message) end)
     || Spelling <- Spellings, Endpoint <- [Spelling, list_to_binary(Spelling)]].

a_bad_format_is_named(_Config) ->
    refused_endpoints(invalid_format, [<<>>, "", <<"10.0.0.1">>, "localhost"]).

a_bad_port_is_named(_Config) ->
    Ports = ["abc", "", "0", "-1", "65536", "99999", "9443:extra", "9443/", "9443 "],
    refused_endpoints(invalid_port, [endpoint_of(Port) || Port <- Ports]),
    refused_endpoints(invalid_port, [<<"https://host:9443/">>, <<"https://host:">>]).

endpoint_of(Port) -> <<"host:", (list_to_binary(Port))/binary>>.

an_endpoint_of_another_kind_is_a_bad_format(_Config) ->
    refused_endpoints(invalid_format, [host, 9443, 1.5, {"host", 9443}, #{host => "host"}, self(), make_ref(),
                                       fun() -> "host:9443" end, <<1:7>>, <<255, ":9443">>, [host | 9443], [$h | 9443],
                                       ["host:", 9443.0], ["host:" | 9443], [-1], [16#D800]]).

refused_endpoints(Why, Endpoints) ->
    Refused = {error, {invalid_endpoint, Why}},
    [begin
         ?assertEqual({Endpoint, Refused}, {Endpoint, send_message(Endpoint, store, #{})}),
         ?assertEqual({Endpoint, Refused}, {Endpoint, send_message_and_wait(Endpoint, store, #{}, 1000)}),
         ?assertEqual({Endpoint, Refused},
                      {Endpoint, send_message_nat_aware(<<"a">>, <<"b">>, store, #{}, #{endpoint => Endpoint})})
     end || Endpoint <- Endpoints].

%% ---- messages ----

encoding_errors_come_before_endpoint_errors(_Config) ->
    [refused_message(Endpoint, Type, Message, Reason)
     || Endpoint <- [<<>>, <<"host:abc">>, not_an_endpoint],
        {Type, Message, Reason} <- [{no_type, #{}, {invalid_message_type, no_type}},
                                    {ping, #{}, {invalid_message, {missing_field, timestamp}}},
                                    {store, #{v => {}}, {invalid_message, {not_encodable, v, tuple}}},
                                    {store, [], {invalid_message, not_a_map}}]].

an_unknown_type_is_refused(_Config) ->
    [refused_message(Type, #{}, {invalid_message_type, Type})
     || Type <- [no_type, <<"store">>, "store", 16#42, {store}, 'STORE']].

a_missing_field_is_named(_Config) ->
    [refused_message(Type, maps:remove(Field, full(Fields)), {invalid_message, {missing_field, Field}})
     || {Type, Fields} <- required(), Field <- Fields].

%% Where a type takes binary keys too, all of them are binary.
binary_keys_are_accepted_where_the_original_did(Config) ->
    Both = [publish, subscribe, unsubscribe, rpc_route, pubsub_route, nat_probe, nat_probe_reply, punch_request,
            punch_coordinate, punch_result, relay_request, relay_data, rpc_request, rpc_reply],
    [begin
         Binary = maps:from_list([{atom_to_binary(Field), 1} || Field <- Fields]),
         case lists:member(Type, Both) of
             true ->
                 ?assertEqual({Type, ok}, {Type, send_message(?config(endpoint, Config), Type, Binary)}),
                 Last = atom_to_binary(lists:last(Fields)),
                 length(Fields) > 1 andalso
                     refused_message(Type, maps:remove(Last, Binary),
                                     {invalid_message, {missing_field, lists:last(Fields)}});
             false ->
                 refused_message(Type, Binary, {invalid_message, {missing_field, hd(Fields)}})
         end
     end || {Type, Fields} <- required()].

dht_store_is_an_alias_of_store(Config) ->
    arrives(Config, fun(Message) -> send_message(?config(endpoint, Config), dht_store, Message) end),
    ?assertMatch([store], lists:usort([Type || #{type := Type, message := #{<<"id">> := _}}
                                                   <- macula_peer_test:received(?config(node, Config))])).

a_value_without_a_wire_form_is_named(_Config) ->
    Port = hd(erlang:ports()),
    Values = [{{}, tuple}, {self(), pid}, {Port, port}, {make_ref(), reference}, {fun() -> ok end, function},
              {<<1:3>>, bitstring}, {[a | b], improper_list}, {1 bsl 64, integer_out_of_range},
              {-(1 bsl 63) - 1, integer_out_of_range}],
    [refused_message(store, Message, {invalid_message, {not_encodable, Field, Kind}})
     || {Value, Kind} <- Values,
        {Message, Field} <- [{#{v => Value}, v}, {#{<<"v">> => [a, #{b => Value}]}, <<"v">>},
                             {#{Value => 1}, Value}]].

a_message_is_a_map(_Config) ->
    [refused_message(Type, Message, {invalid_message, not_a_map})
     || Type <- [store, ping], Message <- [[], <<"map">>, undefined, {}, 1]].

refused_message(Type, Message, Reason) ->
    refused_message(<<"127.0.0.1:9">>, Type, Message, Reason).

refused_message(Endpoint, Type, Message, Reason) ->
    What = {Endpoint, Type, Message},
    Refused = {What, {error, Reason}},
    ?assertEqual(Refused, {What, send_message(Endpoint, Type, Message)}),
    ?assertEqual(Refused, {What, send_message_and_wait(Endpoint, Type, Message, 1000)}),
    ?assertEqual(Refused, {What, send_message_nat_aware(<<"a">>, <<"b">>, Type, Message, #{endpoint => Endpoint})}).

full(Fields) ->
    maps:from_list([{Field, 1} || Field <- Fields]).

required() ->
    Route = [destination_node_id, source_node_id, hop_count, max_hops],
    [{connect, [version, node_id, realm_id, capabilities]},
     {disconnect, [reason, message]},
     {ping, [timestamp]},
     {pong, [timestamp, server_time]},
     {publish, [topic, payload, qos, retain, message_id]},
     {subscribe, [topics, qos]},
     {unsubscribe, [topics]},
     {rpc_route, Route ++ [payload_type, payload]},
     {pubsub_route, Route ++ [topic, payload]},
     {nat_probe, [node_id, local_port]},
     {nat_probe_reply, [node_id, reflexive_ip, reflexive_port, server_time]},
     {punch_request, [session_id, requester_id, target_id]},
     {punch_coordinate, [session_id, peer_id, peer_host, peer_ports, punch_time, role]},
     {punch_result, [session_id, success]},
     {relay_request, [session_id, target_id]},
     {relay_data, [session_id, payload]},
     {rpc_request, [request_id, procedure, args, from_node]},
     {rpc_reply, [request_id, from_node]}].

%% ---- nat_aware ----

relay_endpoint_in_its_three_spellings(Config) ->
    Port = ?config(port, Config),
    [arrives(Config, fun(Message) -> nat_send(Message, #{relay_endpoint => Relay}) end)
     || Relay <- [?config(endpoint, Config), "https://127.0.0.1:" ++ integer_to_list(Port), {"127.0.0.1", Port},
                  {<<"127.0.0.1">>, Port}, {ok, "127.0.0.1", Port}, {ok, <<"127.0.0.1">>, Port}]].

the_endpoint_option_is_used(Config) ->
    Endpoint = ?config(endpoint, Config),
    [arrives(Config, fun(Message) -> nat_send(Message, Opts#{endpoint => Endpoint}) end)
     || Opts <- [#{}, #{skip_hole_punch => true}, #{timeout => infinity}, #{timeout => 2000},
                 #{relay_endpoint => endpoint(closed_port())}]].

a_relay_is_used_when_the_endpoint_is_dead(Config) ->
    {Socket, Silent} = silent_port(),
    [arrives(Config, fun(Message) ->
                             nat_send(Message, #{endpoint => endpoint(Dead), timeout => 3000,
                                                 relay_endpoint => ?config(endpoint, Config)})
                     end)
     || Dead <- [closed_port(), Silent]],
    gen_udp:close(Socket).

without_a_relay_the_original_term(_Config) ->
    Expected = {error, {nat_connection_failed, {no_relay_available, no_bootstrap_peers}}},
    ?assertEqual(Expected, send_message_nat_aware(<<"a">>, <<"b">>, store, #{})),
    ?assertEqual(Expected, send_message_nat_aware(<<"a">>, <<"b">>, store, #{}, #{skip_hole_punch => true})),
    ?assertEqual(Expected, nat_send(#{}, #{endpoint => endpoint(closed_port())})).

an_unreachable_relay_is_named(_Config) ->
    {Socket, Silent} = silent_port(),
    [?assertEqual({error, {nat_connection_failed, {relay_connect_failed, transport_down}}},
                  nat_send(#{}, #{relay_endpoint => endpoint(Port), timeout => 300}))
     || Port <- [closed_port(), Silent]],
    gen_udp:close(Socket).

any_bootstrap_peer_is_used(Config) ->
    Live = binary_to_list(?config(endpoint, Config)),
    Dead = binary_to_list(endpoint(closed_port())),
    [begin
         true = os:putenv(?BOOTSTRAP, Peers),
         arrives(Config, fun(Message) -> send_message_nat_aware(<<"a">>, <<"b">>, store, Message) end)
     end || Peers <- [Live, "https://" ++ Live, Live ++ "," ++ Dead, " " ++ Dead ++ " , " ++ Live]],
    true = os:putenv(?BOOTSTRAP, Dead ++ "," ++ Dead),
    ?assertEqual({error, {nat_connection_failed, {relay_connect_failed, transport_down}}},
                 send_message_nat_aware(<<"a">>, <<"other">>, store, #{})).

bad_bootstrap_peers_are_named(_Config) ->
    [begin
         true = os:putenv(?BOOTSTRAP, Peers),
         ?assertEqual({Peers, {error, {nat_connection_failed, {no_relay_available, Reason}}}},
                      {Peers, send_message_nat_aware(<<"a">>, <<"b">>, store, #{})})
     end || {Peers, Reason} <- [{"host", invalid_bootstrap_format}, {"host:abc", invalid_bootstrap_port},
                                {"host:0", invalid_bootstrap_port}, {"host:65536", invalid_bootstrap_port},
                                {"https://host", invalid_bootstrap_port}, {",", no_bootstrap_peers},
                                {"", no_bootstrap_peers}]].

invalid_input_raises_nothing(_Config) ->
    [?assertEqual({error, {invalid_node_id, Node}}, send_message_nat_aware(Node, Node, store, #{}))
     || Node <- [node_id, 1, "id", undefined, <<>>, binary:copy(<<"i">>, 256)]],
    [?assertMatch({Relay, {error, {nat_connection_failed, _}}}, {Relay, nat_send(#{}, #{relay_endpoint => Relay})})
     || Relay <- [relay, 1, {}, {"host"}, {"host", "9443"}, {host, 9443}, {"host", 0}, {"host", 65536},
                  {[host], 9443}, {["h" | o], 9443}, {[16#20AC], 9443}, {ok, 1, 2}, <<"host">>, <<"host:0">>]].

nat_send(Message, Opts) ->
    send_message_nat_aware(<<"a">>, <<"b">>, store, Message, Opts).

%% ---- listening ----

listen_tells_the_address(_Config) ->
    {ok, {_, Port}} = macula_peer_node:local_address(),
    ?assertMatch({ok, {_, Port}}, macula_peer_node:listen(#{})),
    ok = macula_peer_node:close(),
    Other = closed_port(),
    ?assertEqual({ok, {{127, 0, 0, 1}, Other}}, macula_peer_node:listen(#{ip => {127, 0, 0, 1}, port => Other})),
    ?assertEqual({ok, {{127, 0, 0, 1}, Other}}, macula_peer_node:local_address()).

a_second_listen_is_refused(_Config) ->
    {ok, Address} = macula_peer_node:listen(#{}),
    ?assertEqual({error, already_listening}, macula_peer_node:listen(#{})),
    ok = macula_peer_node:close(),
    ?assertEqual({ok, Address}, macula_peer_node:listen(#{})).

listen_options_are_checked(_Config) ->
    [?assertEqual({error, {invalid_option, {Key, Value}}}, macula_peer_node:listen(#{Key => Value}))
     || {Key, Value} <- [{port, -1}, {port, 65536}, {port, "9443"}, {ip, "127.0.0.1"}, {ip, {1, 2, 3}},
                         {ip, {256, 0, 0, 1}}, {certfile, 1}, {keyfile, {}}, {handler, 1}, {no_option, 1},
                         {<<"port">>, 1}]],
    ?assertEqual({error, {invalid_option, {keyfile, undefined}}}, macula_peer_node:listen(#{certfile => "c"})),
    ?assertEqual({error, {invalid_option, {certfile, undefined}}}, macula_peer_node:listen(#{keyfile => "k"})).

a_taken_port_is_named(_Config) ->
    {Socket, Port} = silent_port(),
    ?assertEqual({error, {listen_failed, eaddrinuse}},
                 macula_peer_node:listen(#{ip => {127, 0, 0, 1}, port => Port})),
    ?assertEqual({error, {listen_failed, eaddrnotavail}}, macula_peer_node:listen(#{ip => {192, 0, 2, 1}})),
    gen_udp:close(Socket),
    %% A failure leaves nothing behind.
    ?assertMatch({ok, _}, macula_peer_node:listen(#{ip => {127, 0, 0, 1}, port => Port})).

a_bad_certificate_is_named(Config) ->
    File = filename:join(?config(priv_dir, Config), "empty.pem"),
    ok = file:write_file(File, <<>>),
    [?assertMatch({error, {bad_certificate, Text}} when is_binary(Text),
                  macula_peer_node:listen(#{certfile => Certificate, keyfile => File}))
     || Certificate <- [File, File ++ ".absent", list_to_binary(File)]].

close_stops_accepting(Config) ->
    Node = macula_peer_test:start_node(),
    {ok, {_, Port}} = macula_peer_test:call(Node, macula_peer_test, listen, [#{}]),
    ok = send_message(endpoint(Port), store, #{}),
    ok = macula_peer_test:call(Node, macula_peer_node, close, []),
    ok = macula_peer_test:call(Node, macula_peer_node, close, []),
    until(fun() -> maps:get(accepted, macula_peer_test:stats(Node)) =:= [] end),
    until(fun() -> is_refused(send_message(endpoint(Port), store, #{}, 300)) end),
    macula_peer_test:stop_node(Node),
    ?assertEqual(ok, send_message(?config(endpoint, Config), store, #{})).

is_refused({error, {connect_failed, _}}) -> true;
is_refused(Other) -> Other.

the_handler_is_a_process_or_a_function(_Config) ->
    {ok, {_, Port}} = macula_peer_node:listen(#{handler => self()}),
    ok = send_message(endpoint(Port), store, #{n => 1}),
    ?assertMatch(#{type := store, message := #{<<"n">> := 1}, dialect := 'macula-peer/1',
                   from := {{127, 0, 0, 1}, Port}}, next_message()),
    ok = macula_peer_node:set_handler({?MODULE, forward, [self()]}),
    ok = send_message(endpoint(Port), store, #{n => 2}),
    ?assertMatch(#{message := #{<<"n">> := 2}}, next_message()),
    ok = macula_peer_node:set_handler(undefined),
    ok = send_message(endpoint(Port), store, #{n => 3}),
    until(fun() -> maps:get(unhandled, macula_peer_node:stats()) =:= 1 end).

forward(Message, To) -> To ! Message.

next_message() ->
    receive {macula_peer_message, Inbound} -> Inbound after 5000 -> error(no_message) end.

a_handler_of_another_kind_is_refused(_Config) ->
    [?assertEqual({error, {invalid_option, {handler, Handler}}}, macula_peer_node:set_handler(Handler))
     || Handler <- [none, 1, fun(_) -> ok end, {m, f}, {m, f, a}, {"m", f, []}, registered_name]].

a_message_is_answered_once(_Config) ->
    {Token, Asked} = ask(5000),
    ?assertEqual(ok, macula_peer_node:reply(Token, pong, #{timestamp => 1, server_time => 2})),
    ?assertEqual({error, already_replied},
                 macula_peer_node:reply(Token, pong, #{timestamp => 1, server_time => 3})),
    ?assertMatch({ok, {pong, #{<<"server_time">> := 2}}}, answer(Asked)).

a_refused_answer_leaves_the_token_good(_Config) ->
    {Token, Asked} = ask(5000),
    [?assertEqual({error, Reason}, macula_peer_node:reply(Token, Type, Message))
     || {Type, Message, Reason} <- [{no_type, #{}, {invalid_message_type, no_type}},
                                    {pong, #{timestamp => 1}, {invalid_message, {missing_field, server_time}}},
                                    {reply, 1, {invalid_message, not_a_map}}]],
    ?assertEqual(ok, macula_peer_node:reply(Token, reply, #{})),
    ?assertMatch({ok, {reply, _}}, answer(Asked)).

a_token_is_a_token(_Config) ->
    [?assertEqual({error, invalid_token}, macula_peer_node:reply(Token, reply, #{}))
     || Token <- [none, undefined, make_ref(), self(), <<>>]].

an_answer_to_a_closed_connection_is_an_error(_Config) ->
    {Token, Asked} = ask(5000),
    ok = macula_peer_node:close(),
    until(fun() -> maps:get(accepted, macula_peer_node:stats()) =:= [] end),
    ?assertEqual({error, gone}, macula_peer_node:reply(Token, reply, #{})),
    ?assertMatch({error, _}, answer(Asked)).

%% A request that this node makes to itself.
ask(Timeout) ->
    {ok, {_, Port}} = macula_peer_node:listen(#{handler => self()}),
    Asked = spawn_monitor(fun() ->
        exit({answer, send_message_and_wait(endpoint(Port), ping, #{timestamp => 1}, Timeout)})
    end),
    #{reply_to := Token} = next_message(),
    {Token, Asked}.

answer({Pid, Monitor}) ->
    receive {'DOWN', Monitor, process, Pid, {answer, Answer}} -> Answer end.

%% ----

arrives(Config, Send) ->
    Id = erlang:unique_integer([positive]),
    ?assertEqual(ok, Send(#{id => Id})),
    until(fun() -> lists:member(Id, ids(?config(node, Config))) end).
