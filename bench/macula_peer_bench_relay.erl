%% @doc The part of `make bench' about relays: a node that is reached through one, beside the same node reached directly,
%% in the same run. Sender, relay and target are an OS process each, so on two cores a circuit also has less processor for
%% each of them than a direct link.
-module(macula_peer_bench_relay).

-export([circuits/1, registrations/1]).
-export([listen/1, counted/1, arrived/0]).

-define(SENDERS, [1, 10]).
-define(REQUESTS, 2000).
-define(COLD_STARTS, 20).
-define(PATIENCE, 60000).
-define(MOST_REGISTRATIONS, 10000).

%% What the target is called at the relay. Directly it is reached by its endpoint.
-define(REGISTERED, <<"registered">>).

-spec circuits({pos_integer(), pos_integer()}) -> ok.
circuits({Messages, Rounds}) ->
    [Relay, Target] = Nodes = [start() || _ <- [relay, target]],
    RelayEndpoint = call(Relay, listen, [#{relay => #{bandwidth => 1 bsl 30, accept_rate => 10000}}]),
    TargetEndpoint = call(Target, listen, [#{}]),
    ok = peer:call(Target, macula_peer_node, register, [?REGISTERED, [RelayEndpoint]]),
    Paths = [{direct, TargetEndpoint, at_endpoint},
            {circuit, ?REGISTERED, #{relay_endpoint => RelayEndpoint, skip_hole_punch => true}}],
    ok = linked(Paths, Target),
    io:format("~nfrom BEAM to BEAM, decoded and delivered to one process, directly and through a relay~n"),
    Measure = fun(Count, Fun) -> [[{Path, Fun(To)} || {Path, _, _} = To <- Paths] || _ <- lists:seq(1, Count)] end,
    [rates(Senders, Measure(Rounds, fun(To) -> rate(To, Senders, Messages, Target) end)) || Senders <- ?SENDERS],
    Requests = Measure(Rounds, fun round_trips/1),
    [times(io_lib:format("~s of a request's round trip", [Key]), spreads(Key, Requests)) || Key <- [p50, p99]],
    times("first message of an engine", spreads(Measure(?COLD_STARTS, fun(To) -> cold_start(To, Target) end))),
    ok = dropped(Relay),
    ok = macula_peer_node:stop(),
    [ok = peer:stop(Node) || Node <- Nodes],
    ok.

rates(Senders, Rounds) ->
    [{direct, {Direct, _, _}}, {circuit, {Circuit, _, _}}] = Spreads = spreads(Rounds),
    io:format("~3b processes, 1000/s: ~s, ratio ~.2f~n", [Senders, both(1000, Spreads), Circuit / Direct]).

times(What, [{direct, {Direct, _, _}}, {circuit, {Circuit, _, _}}] = Spreads) ->
    io:format("~s, us: ~s, difference ~.1f~n", [What, both(1, Spreads), float(Circuit - Direct)]).

both(Unit, Spreads) ->
    lists:join(", ", [io_lib:format("~s ~.1f (~.1f-~.1f)", [Path | [Value / Unit || Value <- tuple_to_list(Spread)]])
                      || {Path, Spread} <- Spreads]).

spreads(Key, Rounds) ->
    spreads([[{Path, maps:get(Key, Result)} || {Path, Result} <- Round] || Round <- Rounds]).

spreads([First | _] = Rounds) ->
    [{Path, macula_peer_bench:spread([proplists:get_value(Path, Round) || Round <- Rounds])} || {Path, _} <- First].

%% Until the target has the first message over each, which takes as long as its registration does.
linked(Paths, Target) ->
    [ok = until_sent(To) || To <- Paths],
    Count = length(Paths),
    Count = call(Target, counted, [Count]),
    ok.

until_sent(To) ->
    case send(To) of
        ok -> ok;
        {error, {nat_connection_failed, {relay_setup_failed, not_registered}}} -> timer:sleep(10), until_sent(To)
    end.

rate({_Way, NodeId, Opts}, Senders, Messages, Target) ->
    Message = macula_peer_bench:message(),
    Total = Senders * (Messages div Senders),
    Start = erlang:monotonic_time(microsecond),
    _ = macula_peer_bench:each(fun() -> send(NodeId, Opts, Message) end, Senders, Messages div Senders),
    Total = call(Target, counted, [Total]),
    Total * 1000000 div (erlang:monotonic_time(microsecond) - Start).

round_trips(To) ->
    macula_peer_bench:result(?REQUESTS, 1, macula_peer_bench:each(fun() -> ask(To) end, 1, ?REQUESTS)).

%% In microseconds, from the call to the delivery.
cold_start(To, Target) ->
    ok = macula_peer_node:stop(),
    Start = os:system_time(microsecond),
    ok = send(To),
    1 = call(Target, counted, [1]),
    call(Target, arrived, []) - Start.

send({_Way, NodeId, Opts}) ->
    send(NodeId, Opts, macula_peer_bench:message()).

send(Endpoint, at_endpoint, Message) ->
    macula_peer_connector:send_message(Endpoint, publish, Message);
send(NodeId, Opts, Message) ->
    macula_peer_connector:send_message_nat_aware(<<"sender">>, NodeId, publish, Message, Opts).

ask({direct, Endpoint, at_endpoint}) ->
    {ok, {pong, _}} = macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 1}, 5000),
    ok;
ask({_Way, NodeId, Opts}) ->
    {ok, {pong, _}} = macula_peer_node:request(NodeId, ping, #{timestamp => 1}, 5000, Opts),
    ok.

%% What the relay did not pass on had to be sent again.
dropped(Relay) ->
    [Packets, Dropped] = [relay_stats(Relay, Key) || Key <- [forwarded_packets, dropped]],
    io:format("the relay passed ~b packets on and dropped ~w~n", [Packets, Dropped]).

%% ---- memory ----

%% What idle nodes and idle circuits cost a relay, and whether it has it back when they are gone.
-spec registrations({pos_integer(), pos_integer()}) -> ok.
registrations({Messages, _Rounds}) ->
    Most = min(?MOST_REGISTRATIONS, Messages div 20),
    Relay = start(),
    Endpoint = call(Relay, listen, [#{relay => #{max_sessions => Most, max_sessions_per_node => Most,
                                                 key_share => 100, address_share => 100, accept_rate => 1000000, grace => 0},
                                      key_share => 100, address_share => 100, handshake_rate => 1000000}]),
    Circuits = Most div 2,
    io:format("~nresident memory of a relay, KiB~n~b at first~n", [resident(Relay)]),
    [begin
         {Crowd, _} = macula_peer_bench:start("crowd", ["--relay", binary_to_list(Endpoint)]),
         Before = resident(Relay),
         {Took, {ok, Most}} = timer:tc(fun() -> macula_peer_bench:ask(Crowd, io_lib:format("register ~b", [Most])) end),
         Registered = resident(Relay),
         io:format("~b with ~b registrations, ~b a second, ~b bytes more each~n",
                   [Registered, Most, Most * 1000000 div Took, (Registered - Before) * 1024 div Most]),
         {ok, Circuits} = macula_peer_bench:ask(Crowd, io_lib:format("circuits ~b", [Circuits])),
         Opened = resident(Relay),
         io:format("~b with ~b circuits too, a packet over each, ~b bytes more each~n",
                   [Opened, Circuits, (Opened - Registered) * 1024 div Circuits]),
         ok = macula_peer_bench:ask(Crowd, "leave"),
         ok = until(fun() -> relay_stats(Relay, registrations) =:= 0 end),
         true = port_close(Crowd),
         io:format("~b when all are gone~n", [resident(Relay)])
     end || _ <- [first, again]],
    peer:stop(Relay).

%% As Linux tells it.
resident(Node) ->
    {ok, Status} = file:read_file(["/proc/", peer:call(Node, os, getpid, []), "/status"]),
    {match, [KiB]} = re:run(Status, "VmRSS:\\s+(\\d+) kB", [{capture, all_but_first, binary}]),
    binary_to_integer(KiB).

relay_stats(Relay, Key) ->
    #{relay := #{Key := Value}} = peer:call(Relay, macula_peer_node, stats, []),
    Value.

until(Condition) ->
    case Condition() of
        true -> ok;
        false -> timer:sleep(10), until(Condition)
    end.

%% ---- the nodes ----

start() ->
    {ok, Node, _} = peer:start_link(#{connection => standard_io, args => ["-pa" | code:get_path()]}),
    Node.

call(Node, Function, Args) ->
    peer:call(Node, ?MODULE, Function, Args, ?PATIENCE).

%% These run in the nodes.

-spec listen(macula_peer_node:listen_opts()) -> binary().
listen(Opts) ->
    ok = logger:set_primary_config(level, warning),
    %% Behind a fast sender messages wait; on the heap, collecting garbage would copy them again and again.
    true = register(?MODULE, Counter = spawn_opt(fun() -> counter(0, 0) end, [{message_queue_data, off_heap}])),
    {ok, {_, Port}} = macula_peer_node:listen(Opts#{handler => Counter}),
    iolist_to_binary(["127.0.0.1:", integer_to_list(Port)]).

%% Waits until Count messages have come since the last call.
-spec counted(pos_integer()) -> pos_integer().
counted(Expected) ->
    ?MODULE ! {counted, Expected, self()},
    receive {counted, N} -> N end.

%% When the last message came.
-spec arrived() -> integer().
arrived() ->
    ?MODULE ! {arrived, self()},
    receive {arrived, At} -> At end.

counter(N, At) ->
    receive
        {counted, Expected, From} -> counter(N, At, Expected, From);
        {arrived, From} -> From ! {arrived, At}, counter(N, At);
        Other -> counter(N + message(Other), os:system_time(microsecond))
    end.

counter(N, At, N, From) -> From ! {counted, N}, counter(0, At);
counter(N, _At, Expected, From) ->
    receive {macula_peer_message, _} = Message -> counter(N + message(Message), os:system_time(microsecond), Expected, From) end.

%% How many it counts for.
message({macula_peer_message, #{type := ping, message := #{<<"timestamp">> := Time}, reply_to := Token}}) ->
    ok = macula_peer_node:reply(Token, pong, #{timestamp => Time, server_time => Time}),
    0;
message({macula_peer_message, #{}}) -> 1;
message({macula_peer_event, _}) -> 0.
