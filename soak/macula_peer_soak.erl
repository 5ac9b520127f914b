%% @doc What `make soak' runs: a node works hard for some minutes, under every fault at once, and must afterwards hold
%% what it held before. Two nodes are measured, the one under load and one that it talks to.
%%
%% The load is on for a warm-up, then both nodes rest and are measured; then it is on for the given time, and they are
%% measured again. At rest nothing is called, no link is up, and the engine runs on; then it is stopped, and they are
%% measured once more.
-module(macula_peer_soak).

-export([main/1]).
-export([prepare/2, load/1, unload/0, measure/1, reading/0, answering/1]).

-import(macula_peer_test, [call/4, elapsed/1, until/2]).

%% The engine, its tables, allocators and the modules that are loaded late reach their size, in seconds.
-define(WARM_UP, 30).
%% Between two samples that are printed, in seconds.
-define(SAMPLE, 30).
%% What a deadline may be late by on a busy machine, in milliseconds.
-define(LATE, 2000).
%% The time until unused links are closed, in milliseconds.
-define(REST, 30000).
%% What a node at rest is watched for, in seconds.
-define(SETTLE, 12).
-define(SETTINGS, #{idle_timeout => 3000, keep_alive => 1000, connect_timeout => 1000, pool_size => 50}).
-define(LOAD, macula_peer_soak_load).
%% malloc has an arena for each thread, up to eight for each processor, and takes minutes to fill them all with pieces. In
%% a few it is soon to be seen whether anything grows.
-define(FEW_ARENAS, #{env => [{"MALLOC_ARENA_MAX", "2"}]}).

%% What may be more at the end than at the beginning, and why.
-define(BOUNDS, #{
    processes => 0, ports => 0, ets => 0, files => 0, threads => 0, peers => 0, accepted => 0,
    %% Modules of OTP that are needed for the first time.
    atoms => 200,
    %% Code of such modules, and the heaps of processes, which the collector leaves at different sizes.
    total => 4 bsl 20,
    %% Where a binary that a process does not use any more lies until its next collection.
    binary => 1 bsl 20,
    %% malloc keeps freed memory in fragments; how many depends on how much was in flight at once.
    rss => 16 bsl 20
}).

-spec main([atom()]) -> no_return().
main([Seconds]) ->
    ok = logger:set_primary_config(level, critical),
    try soak(list_to_integer(atom_to_list(Seconds))) of
        [] ->
            io:format("~nsoak: ok~n"),
            halt(0);
        Wrong ->
            io:format("~nsoak: failed~n~p~n", [Wrong]),
            halt(1)
    catch
        Class:Reason:Stack ->
            io:format("~nsoak: failed: ~p~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

soak(Seconds) ->
    Lab = start(),
    io:format("warming up for ~b s~n", [?WARM_UP]),
    Warm = work(Lab, ?WARM_UP),
    Before = measured(Lab),
    io:format("~b s of load~n", [Seconds]),
    Results = work(Warm, Seconds),
    After = measured(Lab),
    #{counts := Counts, violations := Violations} = maps:get(outcome, Results),
    report(Counts, Before, After),
    Violations ++ missing(Counts) ++ grown(Before, After).

%% ---- the nodes ----

start() ->
    Relay = macula_peer_relays:start_relay(here, #{accept_rate => 1000}),
    Registered = ?SETTINGS#{relays => [macula_peer_relays:endpoint(Relay)]},
    [Gateway, Local] = [gateway(macula_peer_test:endpoint(macula_peer_test:closed_port())) || _ <- [1, 2]],
    Settings = [Registered#{node_id => <<"subject">>, identity_file => identity_file("subject")},
                Registered#{node_id => <<"target">>, identity_file => identity_file("target"), max_nesting => 16,
                            gateway => macula_peer_fake_gateway:endpoint(Local)}],
    [{Subject, SubjectPort}, {Target, TargetPort}] = [node_with(Of, macula_peer_test:closed_port()) || Of <- Settings],
    #{nodes => [{subject, Subject}, {target, Target}], relay => Relay,
      endpoints => [macula_peer_test:endpoint(Port) || Port <- [SubjectPort, TargetPort]],
      %% One that is sent to, and that of the target, which gets what arrives there.
      gateway => Gateway, local_gateway => Local,
      victim => node_with(?SETTINGS, macula_peer_test:closed_port())}.

%% With it the relay knows a node again after its engine was restarted.
identity_file(Name) ->
    File = lists:concat(["_build/soak/", Name, ".pem"]),
    _ = file:delete(File),
    File.

%% That port is in no range, so it is free again when the node is gone.
node_with(Settings, Port) ->
    Node = macula_peer_test:start_node(macula_peer_test:node_paths(), ?FEW_ARENAS),
    ok = call(Node, ?MODULE, prepare, [Settings, Port]),
    {Node, Port}.

gateway(Endpoint) ->
    macula_peer_fake_gateway:start(["--bind", binary_to_list(Endpoint)]).

%% Runs in the node.
prepare(Settings, Port) ->
    {ok, _} = application:ensure_all_started(macula_peer_connector),
    ok = macula_peer_test:engine(Settings#{handler => {?MODULE, answering, []}}),
    listen(Port).

listen(Port) ->
    {ok, _} = macula_peer_node:listen(#{port => Port}),
    ok.

%% The handler of all: keeps nothing.
answering({macula_peer_message, #{type := ping, message := #{<<"timestamp">> := Time}, reply_to := Token}}) ->
    _ = macula_peer_node:reply(Token, pong, #{timestamp => Time, server_time => Time}),
    ok;
answering({macula_peer_message, #{type := rpc_request, message := #{<<"args">> := Ms}, reply_to := Token}})
  when is_integer(Ms), Ms >= 0 ->
    Reply = fun() -> macula_peer_node:reply(Token, rpc_reply, #{request_id => <<"r">>, from_node => <<"n">>}) end,
    _ = erlang:send_after(Ms, spawn(fun() -> receive go -> Reply() end end), go),
    ok;
answering(_Other) ->
    ok.

%% ---- the work ----

%% Load for this many seconds, while faults hit the subject and the nodes it talks to.
work(#{nodes := Nodes} = Lab, Seconds) ->
    Start = now_ms(),
    _ = [ok = call(Node, ?MODULE, load, [kinds(Name, Lab)]) || {Name, Node} <- Nodes],
    Changed = happen(Lab#{sampled => Start}, 1, Start, Start + 1000 * Seconds),
    Outcomes = [call(Node, ?MODULE, unload, []) || {_, Node} <- Nodes],
    Changed#{outcome => lists:foldl(fun merge/2, #{counts => #{}, violations => []}, Outcomes)}.

merge(#{counts := Counts, violations := Violations}, #{counts := Others, violations := More}) ->
    #{counts => maps:merge_with(fun(_, A, B) -> A + B end, Counts, Others), violations => Violations ++ More}.

%% One thing a second. In the last third the engines run on, so that what they lose piles up.
happen(#{nodes := Nodes, sampled := Sampled} = Lab, N, Start, End) ->
    receive after 1000 -> ok end,
    Now = now_ms(),
    if
        Now >= Sampled + 1000 * ?SAMPLE ->
            ok = sample(Nodes, (Now - Start) div 1000),
            happen(Lab#{sampled := Now}, N, Start, End);
        Now >= End -> Lab;
        true ->
            Event = case N rem 10 of
                1 -> {restart, gateway};
                2 -> {silence, local_gateway};
                3 -> {silence, gateway};
                4 -> {restart, local_gateway};
                5 when (Now - Start) * 3 < (End - Start) * 2 -> restart_engine;
                7 -> kill_victim;
                9 -> listen_again;
                _ -> change_handler
            end,
            {Ms, Changed} = elapsed(fun() -> event(Event, N, Lab) end),
            _ = [io:format("~5b s ~p took ~b ms, until ~p~n", [(Now - Start) div 1000, Event, Ms, calendar:local_time()])
                 || Ms > ?LATE],
            happen(Changed, N + 1, Start, End)
    end.

event({restart, Which}, _N, Lab) ->
    #{Which := Gateway} = Lab,
    Endpoint = macula_peer_fake_gateway:endpoint(Gateway),
    ok = macula_peer_fake_gateway:stop(Gateway),
    Lab#{Which := gateway(Endpoint)};
event({silence, Which}, _N, Lab) ->
    #{Which := Gateway} = Lab,
    ok = macula_peer_fake_gateway:silence(Gateway, on),
    receive after 1000 -> ok end,
    ok = macula_peer_fake_gateway:silence(Gateway, off),
    Lab;
event(restart_engine, N, #{nodes := Nodes, endpoints := Endpoints} = Lab) ->
    {{_, Node}, Endpoint} = lists:nth(1 + N div 10 rem 2, lists:zip(Nodes, Endpoints)),
    ok = call(Node, macula_peer_node, stop, []),
    {ok, _} = call(Node, macula_peer_node, listen, [#{port => port(Endpoint)}]),
    Lab;
event(kill_victim, _N, #{victim := {Node, Port}} = Lab) ->
    ok = macula_peer_test:kill_node(Node),
    Lab#{victim := node_with(?SETTINGS, Port)};
event(listen_again, _N, #{nodes := [{_, Subject} | _], endpoints := [Endpoint | _]} = Lab) ->
    ok = call(Subject, macula_peer_node, close, []),
    {ok, _} = call(Subject, macula_peer_node, listen, [#{port => port(Endpoint)}]),
    Lab;
event(change_handler, N, #{nodes := [{_, Subject} | _]} = Lab) ->
    Dead = call(Subject, erlang, spawn, [erlang, is_atom, [dead]]),
    Handlers = [undefined, Dead, {?MODULE, no_such_function, []}],
    Handler = lists:nth(1 + N rem length(Handlers), Handlers),
    ok = call(Subject, macula_peer_node, set_handler, [Handler]),
    receive after 100 -> ok end,
    ok = call(Subject, macula_peer_node, set_handler, [{?MODULE, answering, []}]),
    Lab.

port(Endpoint) ->
    binary_to_integer(lists:last(binary:split(Endpoint, <<":">>))).

%% What a node does all the time: `{Kind, Processes, Pause in milliseconds, What}'.
kinds(target, #{endpoints := [Subject, _]}) ->
    [{to_node, 2, 10, {node, <<"subject">>, 2000}},
     {direct, 2, 10, {send, Subject, 2000}},
     {request, 1, 20, {ping, Subject, 2000}}];
kinds(subject, #{endpoints := [Subject, Target], gateway := Gateway, victim := {_, Port}}) ->
    At = macula_peer_fake_gateway:endpoint(Gateway),
    [{to_node, 2, 5, {node, <<"target">>, 2000}},
     {direct, 4, 2, {send, Target, 2000}},
     {large, 1, 100, {large, Target, 2000}},
     {gateway, 4, 2, {send, At, 2000}},
     {gateway_large, 1, 50, {larger, At, 2000}},
     {request, 2, 5, {ping, Target, 2000}},
     {gateway_request, 2, 10, {ping, At, 2000}},
     {handed_over, 2, 10, {find_value, Target, 2000}},
     {late, 2, 10, {rpc, Target, 200, 50}},
     {dead_caller, 2, 20, {dead_caller, Target}},
     {victim, 1, 10, {send, macula_peer_test:endpoint(Port), 500}},
     {closed, 2, 20, {closed, 300}},
     {silent, 1, 50, {silent, 200}},
     {unknown_node, 1, 50, {unknown_node, 300}},
     {wrong, 2, 5, {wrong, Target}},
     {garbage, 1, 5, {garbage, Subject}},
     {undecodable, 1, 50, {undecodable, Target}},
     {insight, 1, 100, insight}].

%% ---- in the nodes: load ----

load(Kinds) ->
    Owner = self(),
    Pid = spawn(fun() ->
        true = register(?LOAD, self()),
        Counts = ets:new(counts, [public, set]),
        Workers = [spawn_monitor(fun() -> worker(Counts, Kind, Pause, ready(What)) end)
                   || {Kind, Count, Pause, What} <- Kinds, _ <- lists:seq(1, Count)],
        Owner ! {self(), started},
        receive {unload, From, Tag} -> ok end,
        _ = [Worker ! stop || {Worker, _} <- Workers],
        Ends = [receive {'DOWN', Monitor, process, Worker, Reason} -> Reason end || {Worker, Monitor} <- Workers],
        IsViolation = fun({Key, _}) -> element(1, Key) =:= violation end,
        {Violations, Counted} = lists:partition(IsViolation, ets:tab2list(Counts)),
        From ! {Tag, #{counts => maps:from_list(Counted),
                       violations => Violations ++ [{worker_ended, End} || End <- Ends, End =/= normal]}}
    end),
    receive {Pid, started} -> ok end.

unload() ->
    Tag = make_ref(),
    ?LOAD ! {unload, self(), Tag},
    receive {Tag, Outcome} -> Outcome end.

%% What a worker needs for itself.
ready({silent, Timeout}) ->
    {Socket, Port} = macula_peer_test:silent_port(),
    {silent, Socket, macula_peer_test:endpoint(Port), Timeout};
ready({garbage, Endpoint}) ->
    {ok, Socket} = gen_udp:open(0, [binary]),
    {garbage, Socket, port(Endpoint)};
ready(What) ->
    What.

worker(Counts, Kind, Pause, What) ->
    {Ms, Result} = elapsed(fun() ->
        try
            act(What)
        catch
            Class:Reason:Stack -> {raised, Class, Reason, Stack}
        end
    end),
    ok = count(Counts, Kind, Result),
    _ = [count(Counts, {violation, Kind, late}, {Ms, Result, calendar:local_time()}) || Ms > limit(What) + ?LATE],
    receive
        stop -> exit(normal);
        {udp, _, _, _, _} -> worker(Counts, Kind, Pause, What);
        %% Only `unload' has anything to tell the caller.
        Stray -> _ = ets:insert(Counts, {{violation, Kind, stray}, Stray}), worker(Counts, Kind, Pause, What)
    after Pause ->
        worker(Counts, Kind, Pause, What)
    end.

count(Counts, {violation, _, _} = Key, Value) ->
    _ = ets:insert(Counts, {Key, Value}),
    ok;
count(Counts, Kind, Result) ->
    Outcome = case Result of
        ok -> ok;
        {ok, _} -> ok;
        {error, Reason} -> reason(Reason);
        Other -> count(Counts, {violation, Kind, result}, Other), violation
    end,
    _ = ets:update_counter(Counts, {Kind, Outcome}, 1, {{Kind, Outcome}, 0}),
    ok.

%% The word and what it is about: without what differs from case to case.
reason(Reason) when is_atom(Reason) -> Reason;
reason(Reason) when is_tuple(Reason), tuple_size(Reason) > 1, is_atom(element(2, Reason)) ->
    {element(1, Reason), element(2, Reason)};
reason(Reason) when is_tuple(Reason) -> element(1, Reason);
reason(_) -> other.

limit({_, _, Timeout}) when is_integer(Timeout) -> Timeout;
limit({_, _, _, Timeout}) when is_integer(Timeout) -> Timeout;
limit({_, Timeout}) when is_integer(Timeout) -> Timeout;
limit(_) -> 5000.

act({send, Endpoint, Timeout}) ->
    macula_peer_connector:send_message(Endpoint, store, message(rand:uniform(500)), Timeout);
act({larger, Endpoint, Timeout}) ->
    macula_peer_connector:send_message(Endpoint, store, message(rand:uniform(9000)), Timeout);
act({large, Endpoint, Timeout}) ->
    macula_peer_connector:send_message(Endpoint, store, message(rand:uniform(1 bsl 20)), Timeout);
act({ping, Endpoint, Timeout}) ->
    macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 1}, Timeout);
act({find_value, Endpoint, Timeout}) ->
    macula_peer_connector:send_message_and_wait(Endpoint, find_value, #{key => <<"key">>}, Timeout);
act({rpc, Endpoint, Ms, Timeout}) ->
    macula_peer_connector:send_message_and_wait(Endpoint, rpc_request, rpc(Ms), Timeout);
act({node, Name, Timeout}) ->
    to_node(Name, Timeout);
act({unknown_node, Timeout}) ->
    to_node(rand:bytes(16), Timeout);
act({closed, Timeout}) ->
    %% More of them than the pool keeps.
    Endpoint = lists:concat(["127.0.", rand:uniform(3), ".", rand:uniform(50), ":", 1 + rand:uniform(4)]),
    macula_peer_connector:send_message(Endpoint, store, message(10), Timeout);
act({silent, _Socket, Endpoint, Timeout}) ->
    macula_peer_connector:send_message(Endpoint, store, message(10), Timeout);
act({dead_caller, Endpoint}) ->
    {Pid, Monitor} = spawn_monitor(fun() ->
        macula_peer_connector:send_message_and_wait(Endpoint, rpc_request, rpc(1000), 10000)
    end),
    receive after rand:uniform(20) -> exit(Pid, kill) end,
    receive {'DOWN', Monitor, process, Pid, _} -> ok end;
act({wrong, Endpoint}) ->
    {Where, Type, Message} = lists:nth(rand:uniform(8), [
        {Endpoint, ping, #{}}, {Endpoint, nothing, #{}}, {Endpoint, store, banana}, {Endpoint, store, #{k => self()}},
        {<<"nowhere">>, cast, #{}}, {<<"127.0.0.1:99999">>, cast, #{}}, {banana, cast, #{}},
        {Endpoint, cast, #{k => lists:foldl(fun(_, Inner) -> [Inner, a] end, [], lists:seq(1, 100))}}]),
    case macula_peer_connector:send_message(Where, Type, Message, 1000) of
        {error, _} = Error -> Error;
        Taken -> {taken, Where, Type, Taken}
    end;
act({garbage, Socket, Port}) ->
    gen_udp:send(Socket, {127, 0, 0, 1}, Port, rand:bytes(rand:uniform(1400)));
act({undecodable, Endpoint}) ->
    %% The peer's limit of nesting is lower.
    macula_peer_connector:send_message(Endpoint, cast, #{k => [[[[[[[[[[[[[[[[[[[[a]]]]]]]]]]]]]]]]]]]]}, 2000);
act(insight) ->
    _ = macula_peer_node:path(<<"target">>),
    _ = macula_peer_node:nat_profile(),
    _ = macula_peer_node:identity(),
    case macula_peer_node:stats() of
        #{peers := _} -> ok;
        Other -> Other
    end.

to_node(Name, Timeout) ->
    Message = message(rand:uniform(500)),
    macula_peer_connector:send_message_nat_aware(<<"soak">>, Name, store, Message, #{timeout => Timeout}).

message(Size) ->
    #{key => <<"key">>, value => rand:bytes(Size), ttl => 300}.

rpc(Ms) ->
    #{request_id => <<"r">>, procedure => <<"p">>, args => Ms, from_node => <<"n">>}.

%% ---- in the nodes: measuring ----

measure(Port) ->
    ok = until(fun() -> #{peers := Peers, accepted := Accepted} = idle(), Peers + Accepted =:= 0 end, ?REST),
    Running = settled(),
    ok = macula_peer_node:stop(),
    Stopped = settled(),
    ok = listen(Port),
    [{running, Running}, {stopped, Stopped}].

%% The least of some time. Threads that looked up names end after ten seconds without work.
settled() ->
    _ = [erlang:garbage_collect(Pid) || Pid <- processes()],
    Readings = [receive after 1000 -> reading() end || _ <- lists:seq(1, ?SETTLE)],
    lists:foldl(fun least/2, hd(Readings), tl(Readings)).

least(Reading, Other) ->
    maps:intersect_with(fun(_, A, B) -> min(A, B) end, Reading, Other).

reading() ->
    Memory = #{total => erlang:memory(total), binary => erlang:memory(binary)},
    Counts = #{processes => erlang:system_info(process_count), ports => erlang:system_info(port_count),
               atoms => erlang:system_info(atom_count), ets => erlang:system_info(ets_count)},
    lists:foldl(fun maps:merge/2, Memory, [Counts, idle(), of_system()]).

%% Where nothing runs nothing is started for that.
idle() ->
    case macula_peer_call:stats() of
        #{peers := Peers, accepted := Accepted} ->
            #{peers => length([Peer || #{path := Path} = Peer <- Peers, Path =/= none]), accepted => length(Accepted)};
        not_started ->
            #{peers => 0, accepted => 0}
    end.

%% What Linux says of the process.
of_system() ->
    case file:read_file("/proc/self/status") of
        {ok, Status} ->
            [Kilobytes, Threads] = [begin
                {match, [Number]} = re:run(Status, Key ++ ":\\s+(\\d+)", [{capture, [1], list}]),
                list_to_integer(Number)
            end || Key <- ["VmRSS", "Threads"]],
            {ok, Files} = file:list_dir("/proc/self/fd"),
            maps:merge(threads_by_name(), #{rss => Kilobytes bsl 10, threads => Threads, files => length(Files)});
        {error, enoent} ->
            #{}
    end.

%% Schedulers have their number in front.
threads_by_name() ->
    Names = [Name || File <- filelib:wildcard("/proc/self/task/*/comm"), {ok, Name} <- [file:read_file(File)]],
    Kinds = [re:replace(Name, "^[0-9]+_|\\s+$", "", [global, {return, binary}]) || Name <- Names],
    lists:foldl(fun(Kind, Counts) -> maps:update_with({thread, Kind}, fun(N) -> N + 1 end, 1, Counts) end, #{}, Kinds).

%% ---- here: judging ----

measured(#{nodes := Nodes, endpoints := Endpoints}) ->
    Measure = fun({{Name, Node}, Endpoint}) -> {Name, call(Node, ?MODULE, measure, [port(Endpoint)])} end,
    macula_peer_test:in_parallel(length(Nodes), fun(N) -> Measure(lists:nth(N, lists:zip(Nodes, Endpoints))) end).

grown(Before, After) ->
    [{grew, Name, State, Key, {from, Was}, {to, Is}}
     || {Name, State, Key, Was, Is} <- rows(Before, After), Is > Was + bound(State, Key)].

%% A running engine keeps a socket beside its own, for minutes, for a destination that did not answer the usual port.
bound(running, files) -> 4;
bound(_State, {thread, _Name}) -> maps:get(threads, ?BOUNDS);
bound(_State, Key) -> maps:get(Key, ?BOUNDS).

rows(Before, After) ->
    [{Name, State, Key, maps:get(Key, Early, 0), maps:get(Key, Late, 0)}
     || {{Name, Earlier}, {Name, Later}} <- lists:zip(Before, After),
        {{State, Early}, {State, Late}} <- lists:zip(Earlier, Later),
        Key <- lists:sort(maps:keys(maps:merge(Early, Late)))].

%% Nothing was shown of what never happened.
missing(Counts) ->
    [{never, Key} || Key <- [{late, timeout}, {closed, {connect_failed, transport_down}} |
                             [{Kind, ok} || Kind <- [to_node, direct, large, gateway, gateway_large, request,
                                                     gateway_request, handed_over, dead_caller, victim,
                                                     undecodable, insight]]],
                     not maps:is_key(Key, Counts)].

report(Counts, Before, After) ->
    io:format("~ncalls~n"),
    _ = [io:format("  ~-16s ~-60s ~9b~n", [Kind, io_lib:format("~w", [Outcome]), Count])
         || {{Kind, Outcome}, Count} <- lists:sort(maps:to_list(Counts))],
    io:format("~n~-8s ~-8s ~-22s ~12s ~12s ~12s~n", [node, engine, what, before, 'after', 'may grow by']),
    _ = [io:format("~-8s ~-8s ~-22s ~12b ~12b ~12b~n", [Name, State, name(Key), Was, Is, bound(State, Key)])
         || {Name, State, Key, Was, Is} <- rows(Before, After)],
    ok.

name({thread, Name}) -> [Name, " threads"];
name(Key) -> atom_to_list(Key).

%% Under load, to see where it goes.
sample(Nodes, Second) ->
    _ = [begin
             Reading = lists:sort(maps:to_list(call(Node, ?MODULE, reading, []))),
             Shown = [io_lib:format(" ~s ~s", [Key, shown(Key, Value)]) || {Key, Value} <- Reading, is_atom(Key)],
             io:format("~5b s ~-8s~s~n", [Second, Name, Shown])
         end || {Name, Node} <- Nodes],
    ok.

shown(Key, Bytes) when Key =:= total; Key =:= binary; Key =:= rss -> io_lib:format("~.1f MB", [Bytes / (1 bsl 20)]);
shown(_Key, Count) -> integer_to_list(Count).

now_ms() ->
    erlang:monotonic_time(millisecond).
