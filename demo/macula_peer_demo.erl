%% @doc What `make demo' runs: this node sends, to one that listens and to one that only a relay reaches; then others send
%% through NATs, where there can be some.
-module(macula_peer_demo).

-export([main/0]).
-export([listen/1, register_at/1, ask/2]).

-define(NODE_ID, <<"greenhouse">>).
-define(BURST_PROCESSES, 10).
-define(BURST_MESSAGES, 1000).

-spec main() -> no_return().
main() ->
    ok = logger:set_primary_config(level, warning),
    io:format("four nodes, a BEAM each: this one sends, one listens, one is a relay,~n"
              "and one listens nowhere and is registered at the relay~n~n"),
    [Listener, Relay, Registered] = [start_node() || _ <- [listener, relay, registered]],
    Endpoint = peer:call(Listener, ?MODULE, listen, [#{}]),
    RelayEndpoint = peer:call(Relay, ?MODULE, listen, [#{relay => #{}}]),
    ok = peer:call(Registered, ?MODULE, register_at, [RelayEndpoint]),
    try
        ok = dht_store(Listener, Endpoint),
        ok = request("request", fun(Msg) ->
            macula_peer_connector:send_message_and_wait(Endpoint, ping, Msg, 1000)
        end),
        ok = burst(Listener, Endpoint),
        ok = closed_port(),
        ok = stats(#{endpoint => Endpoint}),
        io:format("~nby node id, to nodes that nothing was sent to before~n"
                  "  ~-34s ~-15s ~s~n", ["", "first message", "then"]),
        ok = direct(Listener, Endpoint),
        ok = relayed(Registered, RelayEndpoint),
        ok = through_nats(),
        io:format("~ndemo: ok~n"),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("~ndemo: failed: ~p~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

start_node() ->
    {ok, Node, _} = peer:start_link(#{connection => standard_io, args => ["-pa" | code:get_path()]}),
    Node.

%% The documentation's own example.
dht_store(Listener, Endpoint) ->
    {Time, ok} = timer:tc(fun() ->
        macula_peer_connector:send_message(Endpoint, dht_store, #{key => <<"temperature">>, value => <<"21.5">>})
    end),
    {_, #{type := store, message := Msg, from := From}} = peer:call(Listener, ?MODULE, ask, [first, store]),
    io:format("DHT store       ok after ~s with a new link; ~0p arrived from ~0p~n", [us(Time), Msg, From]),
    ok.

request(Title, Ask) ->
    Median = median(fun() -> Ask(#{timestamp => 1}) end),
    io:format("~-15s 200 pings, 200 pongs; median ~s~n", [Title, us(Median)]),
    ok.

median(Ask) ->
    Times = [begin {Time, {ok, {pong, _}}} = timer:tc(Ask), Time end || _ <- lists:seq(1, 200)],
    lists:nth(100, lists:sort(Times)).

burst(Listener, Endpoint) ->
    Send = fun(N) ->
        ok = macula_peer_connector:send_message(Endpoint, publish, publication(N))
    end,
    Start = erlang:monotonic_time(microsecond),
    Senders = [spawn_monitor(fun() -> lists:foreach(Send, lists:seq(1, ?BURST_MESSAGES)) end)
               || _ <- lists:seq(1, ?BURST_PROCESSES)],
    [receive {'DOWN', Ref, process, Pid, Reason} -> normal = Reason end || {Pid, Ref} <- Senders],
    Sent = erlang:monotonic_time(microsecond) - Start,
    Expected = ?BURST_PROCESSES * ?BURST_MESSAGES,
    Expected = peer:call(Listener, ?MODULE, ask, [count, {publish, Expected}], 30000),
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

%% The node's endpoint is known.
direct(Listener, Endpoint) ->
    Sent = send_to_node(<<"orangery">>, #{endpoint => Endpoint}),
    {Arrived, #{path := direct}} = peer:call(Listener, ?MODULE, ask, [first, subscribe]),
    row("direct", Arrived - Sent, "").

%% Nothing is known of the node but a relay. This node registers there too, and opens a circuit.
relayed(Registered, RelayEndpoint) ->
    Sent = send_to_node(?NODE_ID, #{relay_endpoint => RelayEndpoint, skip_hole_punch => true}),
    {Arrived, #{path := relay}} = peer:call(Registered, ?MODULE, ask, [first, subscribe]),
    Ask = fun() -> macula_peer_node:request(?NODE_ID, ping, #{timestamp => 1}, 1000) end,
    row("through a relay, no NATs", Arrived - Sent, ["a request takes " | us(median(Ask))]).

send_to_node(NodeId, Opts) ->
    Began = os:system_time(microsecond),
    Message = #{topics => [<<"demo">>], qos => 0},
    ok = macula_peer_connector:send_message_nat_aware(<<"demo">>, NodeId, subscribe, Message, Opts),
    Began.

%% Nodes in network namespaces, behind NATs of the kernel's.
through_nats() ->
    Meetings = [{"both behind NATs", port_restricted, port_restricted},
                {"one behind a symmetric NAT", symmetric, port_restricted},
                {"both behind symmetric NATs", symmetric, symmetric}],
    case macula_peer_net:available() of
        ok ->
            try
                Lab = macula_peer_natlab:start(macula_peer_natlab_pairs:sites([port_restricted, symmetric])),
                Pairs = macula_peer_natlab_pairs:start(Lab),
                lists:foreach(fun(Meeting) -> ok = meet(Pairs, Meeting) end, Meetings)
            after
                macula_peer_natlab:stop()
            end;
        {skip, Reason} ->
            io:format("  left out: ~s. ~s~n", [lists:join(", ", [Title || {Title, _, _} <- Meetings]), Reason])
    end.

meet(Pairs, {Title, Kind, Other}) ->
    {_, [Meeting | _]} = macula_peer_natlab_pairs:meet_as_expected(Pairs, Kind, Other, 1),
    case Meeting of
        #{first := First, direct := Ms} when is_integer(Ms) ->
            row(Title, First * 1000, ["a direct path after " | us(Ms * 1000)]);
        #{first := First, path := relay, why := #{hole_punch := Why}} ->
            row(Title, First * 1000, io_lib:format("by the relay: ~0p", [Why]))
    end.

row(Title, First, Then) ->
    io:format("  ~-34s ~-15s ~s~n", [Title, us(First), Then]).

stats(Name) ->
    #{undelivered := 0} = macula_peer_node:stats(),
    Shown = maps:with([path, dialect, sent, acknowledged, received, failed], peer_stats(Name)),
    io:format("  stats         ~0p~n", [Shown]),
    ok.

peer_stats(Name) ->
    #{peers := Peers} = macula_peer_node:stats(),
    [Peer] = [Peer || Peer <- Peers, maps:with(maps:keys(Name), Peer) =:= Name],
    Peer.

publication(N) ->
    #{topic => <<"demo">>, payload => integer_to_binary(N), qos => 0, retain => false, message_id => <<>>}.

us(Time) when Time < 10000 -> io_lib:format("~b us", [Time]);
us(Time) -> io_lib:format("~.1f ms", [Time / 1000]).

%% ---- these run in the other nodes ----

-spec listen(map()) -> binary().
listen(Opts) ->
    {ok, {_, Port}} = macula_peer_node:listen(Opts#{handler => server()}),
    iolist_to_binary(io_lib:format("127.0.0.1:~b", [Port])).

%% Returns when the relay has said that this node is registered.
-spec register_at(binary()) -> ok.
register_at(Relay) ->
    ok = macula_peer_node:set_handler(server()),
    ok = macula_peer_node:register(?NODE_ID, [Relay]),
    ask(registered, Relay).

-spec ask(first | count | registered, term()) -> term().
ask(Question, Argument) ->
    ?MODULE ! {Question, Argument, self()},
    receive {?MODULE, Answer} -> Answer end.

%% The process that counts what arrives, and answers pings.
server() ->
    case whereis(?MODULE) of
        undefined ->
            ok = logger:set_primary_config(level, warning),
            Server = spawn(fun() -> loop(#{}, []) end),
            true = register(?MODULE, Server),
            Server;
        Server ->
            Server
    end.

%% `Seen' has, for each type and relay, how often it was seen, and what came first, when. `Asked' are questions that wait
%% for their answer.
loop(Seen, Asked) ->
    loop(Seen, [], Asked).

loop(Seen, Waiting, [{Question, Argument, From} = Asked | Rest]) ->
    case answer(Question, Argument, Seen) of
        wait -> loop(Seen, [Asked | Waiting], Rest);
        Answer -> From ! {?MODULE, Answer}, loop(Seen, Waiting, Rest)
    end;
loop(Seen, Waiting, []) ->
    receive
        {macula_peer_message, #{type := Type, message := Msg, reply_to := Token} = Message} ->
            Type =:= ping andalso pong(Token, Msg),
            loop(see(Type, {os:system_time(microsecond), Message}, Seen), Waiting);
        {macula_peer_event, #{event := registration, state := registered, relay := Relay}} ->
            loop(see(Relay, registered, Seen), Waiting);
        {macula_peer_event, _} ->
            loop(Seen, Waiting);
        {_, _, _} = Asked ->
            loop(Seen, [Asked | Waiting])
    end.

answer(first, What, Seen) when is_map_key(What, Seen) -> element(2, map_get(What, Seen));
answer(count, {What, Count}, Seen) when element(1, map_get(What, Seen)) =:= Count -> Count;
answer(registered, Relay, Seen) when is_map_key(Relay, Seen) -> ok;
answer(_, _, _) -> wait.

see(What, First, Seen) ->
    maps:update_with(What, fun({N, Before}) -> {N + 1, Before} end, {1, First}, Seen).

pong(Token, #{<<"timestamp">> := Time}) ->
    ok = macula_peer_node:reply(Token, pong, #{timestamp => Time, server_time => erlang:system_time(millisecond)}).
