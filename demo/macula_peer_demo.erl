%% @doc What `make demo' runs: two nodes, one listens, the other sends.
-module(macula_peer_demo).

-export([main/0]).
-export([serve/2]).

-define(BURST_PROCESSES, 10).
-define(BURST_MESSAGES, 1000).

-spec main() -> no_return().
main() ->
    ok = logger:set_primary_config(level, warning),
    io:format("two nodes: this one sends, another BEAM listens~n~n"),
    {ok, Listener, _} = peer:start_link(#{connection => standard_io, args => ["-pa" | code:get_path()]}),
    {ok, Port} = peer:call(Listener, ?MODULE, serve, [listen, undefined]),
    Endpoint = iolist_to_binary(io_lib:format("127.0.0.1:~b", [Port])),
    try
        ok = dht_store(Listener, Endpoint),
        ok = request(Endpoint),
        ok = burst(Listener, Endpoint),
        ok = closed_port(),
        ok = stats(),
        io:format("~ndemo: ok~n"),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("~ndemo: failed: ~p~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

%% The documentation's own example.
dht_store(Listener, Endpoint) ->
    {Time, ok} = timer:tc(fun() ->
        macula_peer_connector:send_message(Endpoint, dht_store, #{key => <<"temperature">>, value => <<"21.5">>})
    end),
    #{type := store, message := Msg, from := From} = peer:call(Listener, ?MODULE, serve, [first, store]),
    io:format("DHT store       ok after ~s with a new link; ~0p arrived from ~0p~n", [us(Time), Msg, From]),
    ok.

request(Endpoint) ->
    Ask = fun() ->
        macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 1}, 1000)
    end,
    Times = [begin {Time, {ok, {pong, _}}} = timer:tc(Ask), Time end || _ <- lists:seq(1, 200)],
    io:format("request         200 pings, 200 pongs; median ~s~n", [us(lists:nth(100, lists:sort(Times)))]),
    ok.

burst(Listener, Endpoint) ->
    Send = fun(N) ->
        ok = macula_peer_connector:send_message(Endpoint, publish,
            #{topic => <<"demo">>, payload => integer_to_binary(N), qos => 0, retain => false, message_id => <<>>})
    end,
    Start = erlang:monotonic_time(microsecond),
    Senders = [spawn_monitor(fun() -> lists:foreach(Send, lists:seq(1, ?BURST_MESSAGES)) end)
               || _ <- lists:seq(1, ?BURST_PROCESSES)],
    [receive {'DOWN', Ref, process, Pid, Reason} -> normal = Reason end || {Pid, Ref} <- Senders],
    Sent = erlang:monotonic_time(microsecond) - Start,
    Expected = ?BURST_PROCESSES * ?BURST_MESSAGES,
    Expected = peer:call(Listener, ?MODULE, serve, [count, {publish, Expected}], 30000),
    Arrived = erlang:monotonic_time(microsecond) - Start,
    io:format("burst           ~b messages from ~b processes: sent in ~s, all arrived after ~s (~b a second)~n",
              [Expected, ?BURST_PROCESSES, us(Sent), us(Arrived), Expected * 1000000 div Arrived]),
    ok.

closed_port() ->
    {ok, Socket} = gen_udp:open(0, [{ip, {127, 0, 0, 1}}]),
    {ok, Port} = inet:port(Socket),
    ok = gen_udp:close(Socket),
    Endpoint = "127.0.0.1:" ++ integer_to_list(Port),
    {Time, {error, {connect_failed, transport_down}} = Error} =
        timer:tc(fun() -> macula_peer_connector:send_message(Endpoint, ping, #{timestamp => 1}) end),
    io:format("closed port     ~0p after ~s~n", [Error, us(Time)]),
    ok.

stats() ->
    #{peers := Peers, undelivered := 0} = macula_peer_endpoint:stats(),
    [Live] = [Peer || #{path := direct} = Peer <- Peers],
    io:format("stats           ~0p~n", [maps:with([path, dialect, sent, acknowledged, received, failed], Live)]),
    ok.

us(Time) when Time < 10000 -> io_lib:format("~b us", [Time]);
us(Time) -> io_lib:format("~.1f ms", [Time / 1000]).

%% Runs in the listening node: `listen' starts a process that counts what arrives and answers pings, the others ask it.
-spec serve(listen | first | count, term()) -> term().
serve(listen, _) ->
    Server = spawn(fun() -> loop(#{}) end),
    true = register(?MODULE, Server),
    ok = logger:set_primary_config(level, warning),
    {ok, {_, Port}} = macula_peer_endpoint:listen(#{handler => Server}),
    {ok, Port};
serve(Question, Argument) ->
    ?MODULE ! {Question, Argument, self()},
    receive {?MODULE, Answer} -> Answer end.

loop(Seen) ->
    Asked = maps:get(asked, Seen, none),
    case Asked of
        {first, Type, From} when is_map_key(Type, Seen) -> answer(From, element(2, maps:get(Type, Seen)), Seen);
        {count, {Type, N}, From} -> case Seen of
            #{Type := {N, _}} -> answer(From, N, Seen);
            _ -> next(Seen)
        end;
        _ -> next(Seen)
    end.

answer(From, Answer, Seen) ->
    From ! {?MODULE, Answer},
    loop(maps:remove(asked, Seen)).

next(Seen) ->
    receive
        {macula_peer_message, #{type := ping, reply_to := Token, message := #{<<"timestamp">> := Time}}} ->
            ok = macula_peer_endpoint:reply(Token, pong, #{timestamp => Time, server_time => erlang:system_time(millisecond)}),
            loop(Seen);
        {macula_peer_message, #{type := Type} = Message} ->
            {N, First} = maps:get(Type, Seen, {0, Message}),
            loop(Seen#{Type => {N + 1, First}});
        {_, _, _} = Asked ->
            loop(Seen#{asked => Asked})
    end.
