%% A listener gets what others send, answers it, and survives any input.
-module(listen_SUITE).

-include_lib("public_key/include/public_key.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([a_process_gets_messages/1, a_function_gets_messages/1, a_function_may_crash/1, a_handler_is_replaced/1]).
-export([a_request_is_answered/1, a_request_is_answered_once/1, an_answer_may_come_too_late/1]).
-export([an_invalid_token_is_refused/1, a_token_survives_an_invalid_answer/1]).
-export([any_process_may_answer/1, answers_come_in_any_order/1]).
-export([listening_twice_is_refused/1, a_taken_port_is_refused/1, invalid_options_are_refused/1]).
-export([a_closed_listener_accepts_no_connection/1, links_follow_the_socket/1]).
-export([certificates_come_from_files/1, bad_certificates_are_refused/1, an_old_certificate_is_explained/1]).
-export([garbage_hurts_no_connection/1]).
-export([forward/2, forward_or_crash/2, log/2]).

-define(TIMEOUT, 5000).

all() ->
    [a_process_gets_messages, a_function_gets_messages, a_function_may_crash, a_handler_is_replaced,
     a_request_is_answered, a_request_is_answered_once, an_answer_may_come_too_late, an_invalid_token_is_refused,
     a_token_survives_an_invalid_answer, any_process_may_answer, answers_come_in_any_order, listening_twice_is_refused,
     a_taken_port_is_refused, invalid_options_are_refused, a_closed_listener_accepts_no_connection, links_follow_the_socket,
     certificates_come_from_files, bad_certificates_are_refused, an_old_certificate_is_explained, garbage_hurts_no_connection].

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

%% ---- handlers ----

a_process_gets_messages(Config) ->
    Endpoint = listen(#{handler => self()}),
    ok = send(Config, Endpoint, cast, #{text => <<"hello">>, number => 1}),
    Inbound = message(cast),
    {ok, {_, Port}} = on(Config, macula_peer_node, local_address, []),
    #{fingerprint := Key} = on(Config, macula_peer_node, identity, []),
    ?assertEqual(#{type => cast, message => #{<<"text">> => <<"hello">>, <<"number">> => 1},
                   from => {{127, 0, 0, 1}, Port}, path => direct, dialect => 'macula-peer/1', key => Key, reply_to => none}, Inbound).

a_function_gets_messages(Config) ->
    Endpoint = listen(#{handler => {?MODULE, forward, [self()]}}),
    [ok = send(Config, Endpoint, cast, #{n => N}) || N <- lists:seq(1, 100)],
    ?assertEqual(lists:seq(1, 100), lists:sort([n(message(cast)) || _ <- lists:seq(1, 100)])).

forward(Message, Pid) ->
    Pid ! Message.

a_function_may_crash(Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => error}),
    try
        Endpoint = listen(#{handler => {?MODULE, forward_or_crash, [self()]}}),
        ok = send(Config, Endpoint, cast, #{crash => true}),
        receive
            {logged, {Format, Args}} ->
                Line = io_lib:format(Format, Args),
                ?assertMatch({match, _}, re:run(Line, "handler .*forward_or_crash/2 failed: .*on_request"))
        after ?TIMEOUT -> ct:fail(not_logged)
        end,
        ok = send(Config, Endpoint, cast, #{n => 1}),
        ?assertEqual(1, n(message(cast)))
    after
        logger:remove_handler(?MODULE)
    end.

forward_or_crash({macula_peer_message, #{message := #{<<"crash">> := true}}}, _Pid) -> error(on_request);
forward_or_crash(Message, Pid) -> Pid ! Message.

%% As a handler of logger.
log(#{msg := Message}, #{config := Pid}) ->
    Pid ! {logged, Message}.

a_handler_is_replaced(Config) ->
    Endpoint = listen(#{handler => {?MODULE, forward, [self()]}}),
    ok = send(Config, Endpoint, cast, #{n => 1}),
    ?assertEqual(1, n(message(cast))),
    ok = macula_peer_node:set_handler(self()),
    ok = send(Config, Endpoint, cast, #{n => 2}),
    ?assertEqual(2, n(message(cast))),
    ok = macula_peer_node:set_handler(undefined),
    ok = send(Config, Endpoint, cast, #{n => 3}),
    _ = macula_peer_test:await(fun macula_peer_node:stats/0, fun(#{unhandled := N}) -> N =:= 1 end),
    ?assertEqual(none, receive {macula_peer_message, Message} -> Message after 0 -> none end),
    ?assertEqual({error, {invalid_option, {handler, 7}}}, macula_peer_node:set_handler(7)).

%% ---- answers ----

a_request_is_answered(Config) ->
    Endpoint = listen(#{handler => self()}),
    [begin
         Asked = ask(Config, Endpoint, N),
         #{reply_to := Token} = message(call),
         ok = macula_peer_node:reply(Token, reply, #{n => N, payload => <<0:Bits>>}),
         ?assertEqual({ok, {reply, #{<<"n">> => N, <<"payload">> => <<0:Bits>>}}}, answer(Asked))
     end || {N, Bits} <- [{1, 0}, {2, 80000}, {3, 8000000}]].

a_request_is_answered_once(Config) ->
    Asked = ask(Config, listen(#{handler => self()}), 1),
    #{reply_to := Token} = message(call),
    ok = macula_peer_node:reply(Token, reply, #{n => 1}),
    ?assertEqual({error, already_replied}, macula_peer_node:reply(Token, reply, #{n => 2})),
    ?assertMatch({ok, {reply, #{<<"n">> := 1}}}, answer(Asked)),
    ?assertEqual({error, already_replied}, macula_peer_node:reply(Token, reply, #{n => 3})).

an_answer_may_come_too_late(Config) ->
    Endpoint = listen(#{handler => self()}),
    %% The requester has given up, but is still connected.
    Impatient = ask(Config, Endpoint, 1, 100),
    #{reply_to := Late} = message(call),
    ?assertEqual({error, timeout}, answer(Impatient)),
    ?assert(lists:member(macula_peer_node:reply(Late, reply, #{}), [ok, {error, gone}])),
    %% The requester has left.
    Gone = ask(Config, Endpoint, 2),
    #{reply_to := TooLate} = message(call),
    ok = on(Config, macula_peer_node, stop, []),
    ?assertMatch({error, _}, answer(Gone)),
    _ = macula_peer_test:await(fun macula_peer_node:stats/0, fun(#{accepted := Accepted}) -> Accepted =:= [] end),
    ?assertEqual({error, gone}, macula_peer_node:reply(TooLate, reply, #{})),
    %% And comes back.
    answers(Config, Endpoint).

an_invalid_token_is_refused(_Config) ->
    [?assertEqual({error, invalid_token}, macula_peer_node:reply(Token, reply, #{}))
     || Token <- [none, make_ref(), self(), <<>>]].

a_token_survives_an_invalid_answer(Config) ->
    Asked = ask(Config, listen(#{handler => self()}), 1),
    #{reply_to := Token} = message(call),
    Reply = fun(Type, Msg) -> macula_peer_node:reply(Token, Type, Msg) end,
    ?assertEqual({error, {invalid_message, {not_encodable, n, pid}}}, Reply(reply, #{n => self()})),
    ?assertEqual({error, {invalid_message, {missing_field, timestamp}}}, Reply(pong, #{})),
    ?assertEqual({error, {invalid_message_type, no_type}}, Reply(no_type, #{})),
    ok = macula_peer_node:reply(Token, reply, #{n => 1}),
    ?assertMatch({ok, {reply, #{<<"n">> := 1}}}, answer(Asked)).

any_process_may_answer(Config) ->
    Asked = ask(Config, listen(#{handler => self()}), 1),
    #{reply_to := Token} = message(call),
    _ = spawn_link(fun() -> ok = macula_peer_node:reply(Token, reply, #{n => 1}) end),
    ?assertMatch({ok, {reply, #{<<"n">> := 1}}}, answer(Asked)).

answers_come_in_any_order(Config) ->
    Endpoint = listen(#{handler => self()}),
    Numbers = lists:seq(1, 100),
    Asked = [{N, ask(Config, Endpoint, N)} || N <- Numbers],
    Requests = [message(call) || _ <- Numbers],
    ByChance = [Request || {_, Request} <- lists:sort([{rand:uniform(), Request} || Request <- Requests])],
    [ok = macula_peer_node:reply(Token, reply, #{n => n(Request)}) || #{reply_to := Token} = Request <- ByChance],
    [?assertMatch({ok, {reply, #{<<"n">> := N}}}, answer(Ask)) || {N, Ask} <- Asked].

%% ---- listening and not ----

listening_twice_is_refused(Config) ->
    Endpoint = listen(#{handler => self()}),
    ?assertEqual({error, already_listening}, macula_peer_node:listen(#{})),
    answers(Config, Endpoint).

a_taken_port_is_refused(Config) ->
    {ok, Taker} = gen_udp:open(0),
    {ok, Taken} = inet:port(Taker),
    ?assertEqual({error, {listen_failed, eaddrinuse}}, macula_peer_node:listen(#{port => Taken})),
    answers(Config, listen(#{handler => self()})),
    gen_udp:close(Taker).

invalid_options_are_refused(_Config) ->
    [?assertEqual({error, {invalid_option, Option}}, macula_peer_node:listen(maps:from_list([Option])))
     || Option <- [{port, 65536}, {port, -1}, {port, a}, {ip, "127.0.0.1"}, {ip, {1, 2, 3}}, {certfile, 1},
                   {no_such_option, 1}, {handler, 1}, {key_share, 0}, {address_share, 101}, {handshake_rate, 0}]],
    ?assertEqual({error, {invalid_option, {keyfile, undefined}}}, macula_peer_node:listen(#{certfile => "c.pem"})),
    ?assertEqual({error, {invalid_option, {certfile, undefined}}}, macula_peer_node:listen(#{keyfile => "k.pem"})).

a_closed_listener_accepts_no_connection(Config) ->
    Endpoint = listen(#{handler => self()}),
    answers(Config, Endpoint),
    ok = macula_peer_node:close(),
    ok = macula_peer_node:close(),
    %% The other side may take a moment to know.
    Send = fun() -> on(Config, macula_peer_connector, send_message, [Endpoint, cast, #{}, 500]) end,
    {error, _} = macula_peer_test:await(Send, fun(Sent) -> Sent =/= ok end),
    ?assertMatch(#{accepted := []}, macula_peer_node:stats()),
    %% The same socket listens again.
    ?assertEqual(Endpoint, listen(#{})),
    answers(Config, Endpoint).

links_follow_the_socket(Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    ToGateway = macula_peer_fake_gateway:endpoint(Gateway),
    Ping = fun() -> macula_peer_connector:send_message_and_wait(ToGateway, ping, #{timestamp => 1}, ?TIMEOUT) end,
    {ok, {pong, _}} = Ping(),
    {ok, {_, Before}} = macula_peer_node:local_address(),
    Port = macula_peer_test:free_port(),
    Endpoint = listen(#{port => Port, handler => self()}),
    ?assertEqual(macula_peer_test:endpoint("127.0.0.1", Port), Endpoint),
    ?assertNotEqual(Before, Port),
    [?assertMatch({ok, {pong, _}}, Ping()) || _ <- lists:seq(1, 10)],
    ?assertMatch({ok, {_, Port}}, macula_peer_node:local_address()),
    ?assertMatch(#{connections := 1}, macula_peer_fake_gateway:stats(Gateway)),
    ?assertMatch(#{dials := 1}, macula_peer_test:peer_stats(ToGateway)),
    answers(Config, Endpoint).

%% ---- certificates ----

certificates_come_from_files(Config) ->
    {CertFile, KeyFile} = certificate(Config, "own"),
    answers(Config, listen(#{certfile => CertFile, keyfile => KeyFile, handler => self()})),
    ok = macula_peer_node:close(),
    answers(Config, listen(#{certfile => list_to_binary(CertFile), keyfile => list_to_binary(KeyFile)})).

bad_certificates_are_refused(Config) ->
    {CertFile, KeyFile} = certificate(Config, "own"),
    {OtherCertFile, _} = certificate(Config, "other"),
    Missing = in_priv_dir(Config, "missing.pem"),
    Garbage = in_priv_dir(Config, "garbage.pem"),
    ok = file:write_file(Garbage, "-----BEGIN CERTIFICATE-----\nnot base64!\n-----END CERTIFICATE-----\n"),
    [?assertMatch({error, {bad_certificate, Text}} when is_binary(Text),
                  macula_peer_node:listen(#{certfile => Cert, keyfile => Key}))
     || {Cert, Key} <- [{Missing, KeyFile}, {CertFile, Missing}, {Garbage, KeyFile}, {CertFile, Garbage},
                        {KeyFile, CertFile}, {OtherCertFile, KeyFile}]],
    answers(Config, listen(#{certfile => CertFile, keyfile => KeyFile, handler => self()})).

%% What `openssl x509 -req' makes by itself.
an_old_certificate_is_explained(Config) ->
    {CertFile, KeyFile} = certificate(Config, "own"),
    [Old, Key] = [in_priv_dir(Config, Name) || Name <- ["old-cert.pem", "old-key.pem"]],
    {ok, Pem} = file:read_file(CertFile),
    [{'Certificate', Der, not_encrypted}] = public_key:pem_decode(Pem),
    #'OTPCertificate'{tbsCertificate = Signed} = public_key:pkix_decode_cert(Der, otp),
    {ok, KeyPem} = file:read_file(KeyFile),
    [Entry] = public_key:pem_decode(KeyPem),
    Version1 = public_key:pkix_sign(Signed#'OTPTBSCertificate'{version = v1, extensions = asn1_NOVALUE},
                                    public_key:pem_entry_decode(Entry)),
    ok = file:write_file(Old, public_key:pem_encode([{'Certificate', Version1, not_encrypted}])),
    {ok, _} = file:copy(KeyFile, Key),
    {error, {bad_certificate, Text}} = macula_peer_node:listen(#{certfile => Old, keyfile => Key}),
    [?assertMatch({_, _, [_ | _]}, {Word, Text, string:find(binary_to_list(Text), Word)})
     || Word <- [Old, "version 1", "openssl req -x509", "docs/security.md"]].

certificate(Config, Name) ->
    #{cert := Cert, key := Key} = public_key:pkix_test_root_cert(Name, [{key, {namedCurve, secp256r1}}]),
    [CertFile, KeyFile] = [in_priv_dir(Config, Name ++ End) || End <- ["-cert.pem", "-key.pem"]],
    ok = file:write_file(CertFile, public_key:pem_encode([{'Certificate', Cert, not_encrypted}])),
    ok = file:write_file(KeyFile, public_key:pem_encode([public_key:pem_entry_encode('ECPrivateKey', Key)])),
    {CertFile, KeyFile}.

in_priv_dir(Config, Name) ->
    filename:join(proplists:get_value(priv_dir, Config), Name).

%% ---- hostile input ----

garbage_hurts_no_connection(Config) ->
    Endpoint = listen(#{handler => self()}),
    answers(Config, Endpoint),
    {ok, {_, Port}} = macula_peer_node:local_address(),
    {ok, Socket} = gen_udp:open(0),
    [ok = gen_udp:send(Socket, {127, 0, 0, 1}, Port, garbage()) || _ <- lists:seq(1, 10000)],
    answers(Config, Endpoint),
    %% Nor a new client.
    ok = on(Config, macula_peer_node, stop, []),
    answers(Config, Endpoint),
    gen_udp:close(Socket).

%% Half of it looks like the first packet of a QUIC connection.
garbage() ->
    Bytes = rand:bytes(rand:uniform(1400)),
    case rand:uniform(2) of
        1 -> Bytes;
        2 -> <<2#11:2, (rand:uniform(64) - 1):6, 1:32, 8, (rand:bytes(8))/binary, 0, 0, Bytes/binary>>
    end.

%% ---- common ----

%% The endpoint of this node, which listens now.
listen(Opts) ->
    {ok, {_, Port} = Address} = macula_peer_node:listen(Opts),
    ?assertEqual({ok, Address}, macula_peer_node:local_address()),
    macula_peer_test:endpoint("127.0.0.1", Port).

other(Config) ->
    proplists:get_value(other, Config).

on(Config, Module, Function, Args) ->
    peer:call(other(Config), Module, Function, Args, 4 * ?TIMEOUT).

send(Config, Endpoint, Type, Msg) ->
    on(Config, macula_peer_connector, send_message, [Endpoint, Type, Msg]).

%% The next message of a type.
message(Type) ->
    receive
        {macula_peer_message, #{type := Type} = Message} -> Message
    after ?TIMEOUT -> ct:fail({no_message, Type, erlang:process_info(self(), messages)})
    end.

n(#{message := #{<<"n">> := N}}) ->
    N.

%% The other node asks, while this process goes on.
ask(Config, Endpoint, N) ->
    ask(Config, Endpoint, N, 2 * ?TIMEOUT).

ask(Config, Endpoint, N, Timeout) ->
    Args = [Endpoint, call, #{n => N}, Timeout],
    {_, Monitor} = spawn_monitor(fun() ->
        exit({answer, on(Config, macula_peer_connector, send_message_and_wait, Args)})
    end),
    Monitor.

answer(Monitor) ->
    receive
        {'DOWN', Monitor, process, _, {answer, Answer}} -> Answer;
        {'DOWN', Monitor, process, _, Reason} -> ct:fail(Reason)
    after 4 * ?TIMEOUT -> ct:fail(no_answer)
    end.

%% That this process, as the handler, can serve the other node.
answers(Config, Endpoint) ->
    Asked = ask(Config, Endpoint, 0),
    #{reply_to := Token} = message(call),
    ok = macula_peer_node:reply(Token, reply, #{n => 0}),
    ?assertMatch({ok, {reply, #{<<"n">> := 0}}}, answer(Asked)).
