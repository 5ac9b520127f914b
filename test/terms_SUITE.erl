%% Any term that is sent arrives unchanged, over every path, and nothing that a peer sends ends a node.
-module(terms_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, endpoint/1, until/1, await/2, elapsed/1]).

-define(TIMEOUT, 60000).
-define(STORE_ID, 16#42).
-define(KEEPER, terms_SUITE_keeper).

suite() -> [{timetrap, {seconds, 120}}].

all() ->
    [{group, ours}, {group, original}, {group, relayed}, {group, raw},
     messages_of_one_sender_stay_in_order, macula_gateway_gets_every_term,
     a_killed_process_that_finishes_messages_is_replaced, messages_lost_with_the_finisher_are_counted,
     a_replaced_function_gets_the_messages_in_flight, a_handler_that_died_is_counted,
     the_deepest_nesting_that_is_accepted,
     busy_dirty_schedulers_delay_no_call, a_heavy_message_keeps_its_timeout, decoding_finishes_terms].

%% Between the same two nodes, by the dialect and the path.
groups() ->
    Both = [messages_arrive_as_they_are, answers_arrive_as_they_are],
    [{ours, [], Both}, {original, [], Both}, {relayed, [], Both},
     {raw, [], [repeated_keys_in_messages, repeated_keys_in_answers, hostile_frames_are_refused_and_counted]}].

init_per_suite(Config) ->
    [Sender, Receiver] = [macula_peer_test:start_node() || _ <- [sender, receiver]],
    Port = listen(Receiver),
    ok = call(Sender, macula_peer_test, engine, [#{gateway => none}]),
    [{sender, Sender}, {receiver, Receiver}, {port, Port} | Config].

end_per_suite(Config) ->
    [macula_peer_test:stop_node(?config(Node, Config)) || Node <- [sender, receiver]].

init_per_group(original, Config) ->
    %% The port of the program belongs to the process that starts it.
    with_hop(Config);
init_per_group(raw, Config) ->
    with_hop(Config);
init_per_group(relayed, Config) ->
    Relay = macula_peer_test:start_node(),
    {ok, {_, Port}} = call(Relay, macula_peer_node, listen, [#{relay => #{bandwidth => 100000000}}]),
    ok = call(?config(receiver, Config), macula_peer_node, register, [<<"terms">>, [endpoint(Port)]]),
    macula_peer_relays:await_registered(?config(receiver, Config), [endpoint(Port)]),
    [{relay, Relay}, {to, {node, endpoint(Port)}} | Config];
init_per_group(ours, Config) ->
    [{to, endpoint(?config(port, Config))} | Config].

end_per_group(relayed, Config) ->
    ok = call(?config(receiver, Config), macula_peer_node, unregister, []),
    macula_peer_test:stop_node(?config(relay, Config));
end_per_group(Group, Config) when Group =:= original; Group =:= raw ->
    ?config(hop_owner, Config) ! stop;
end_per_group(_Group, _Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    [] = ask(?config(receiver, Config), take),
    Config.

end_per_testcase(_Case, Config) ->
    _ = ask(?config(receiver, Config), take),
    Config.

with_hop(Config) ->
    Self = self(),
    Owner = spawn(fun() ->
        Program = macula_peer_program:start("legacy_hop", ["--to", binary_to_list(endpoint(?config(port, Config)))]),
        Self ! {self(), Program},
        own(Program)
    end),
    receive {Owner, Hop} -> [{hop, Hop}, {hop_owner, Owner}, {to, endpoint(macula_peer_program:port(Hop))} | Config] end.

%% Programs take their commands from the process that started them.
own(Program) ->
    receive
        {command, From, Command} ->
            From ! {self(), macula_peer_program:command(Program, Command)},
            own(Program);
        stop ->
            macula_peer_program:stop(Program)
    end.

command(Config, Command) ->
    Owner = ?config(hop_owner, Config),
    Owner ! {command, self(), Command},
    receive {Owner, Answer} -> Answer end.

%% ---- a node that keeps what it gets ----

listen(Node) ->
    ok = call(Node, macula_peer_test, engine, [#{gateway => none}]),
    {ok, {_, Port}} = call(Node, ?MODULE, listen_and_keep, []),
    Port.

%% Runs in the node.
listen_and_keep() ->
    Keeper = spawn(fun() -> true = register(?KEEPER, self()), keep([], #{}) end),
    macula_peer_node:listen(#{handler => Keeper}).

%% Requests are answered with what the node was told to answer, or with themselves.
keep(Kept, Answer) ->
    receive
        {macula_peer_message, #{type := call, message := Message, reply_to := Token}} ->
            ok = macula_peer_node:reply(Token, reply, Message),
            keep(Kept, Answer);
        {macula_peer_message, #{message := Message}} ->
            keep([Message | Kept], Answer);
        {?KEEPER, take, From, Tag} ->
            From ! {Tag, lists:reverse(Kept)},
            keep([], Answer);
        {?KEEPER, count, From, Tag} ->
            From ! {Tag, length(Kept)},
            keep(Kept, Answer);
        _Event ->
            keep(Kept, Answer)
    end.

ask(Node, What) ->
    call(Node, ?MODULE, asked, [What]).

asked(What) ->
    Tag = make_ref(),
    ?KEEPER ! {?KEEPER, What, self(), Tag},
    receive {Tag, Answer} -> Answer end.

taken(Node, Count) ->
    _ = await(fun() -> ask(Node, count) end, fun(N) -> N >= Count end),
    ask(Node, take).

%% ---- terms ----

%% As they come out of the decoder, so that they can be compared.
messages() ->
    Sizes = [0, 1, 2, 31, 32, 33, 64, 127, 128, 129, 1000, 20000, 200000],
    [{{keys, N}, numbered(N)} || N <- Sizes]
        ++ [{list, #{<<"l">> => lists:seq(-100000, -1)}},
            {strings, #{<<"l">> => [<<"element">> || _ <- lists:seq(1, 100000)]}},
            {text, #{<<"t">> => lists:duplicate(100000, $t)}},
            {wide_in_deep, nested(60, numbered(300))},
            {deep_in_wide, maps:map(fun(_, N) -> nested(10, #{<<"n">> => N}) end, numbered(1000))},
            {wide_in_list, #{<<"l">> => [numbered(N) || N <- lists:seq(30, 40)]}},
            {key_of_many_keys, #{numbered(100) => 1, [numbered(40)] => 2, #{numbered(50) => 1} => 3, <<"k">> => 4}},
            {keys_of_all_kinds, all_kinds()},
            {integers, #{<<"l">> => borders(), <<"m">> => maps:from_list([{N, N} || N <- borders()])}},
            {binaries, #{<<"l">> => [binary:copy(<<"b">>, N) || N <- [0, 1, 63, 64, 65, 1000, 70000, 2000000]]}}].

numbered(N) ->
    maps:from_list([{<<"key", (integer_to_binary(I))/binary>>, I} || I <- lists:seq(1, N)]).

nested(0, Term) -> Term;
nested(Depth, Term) -> #{<<"d">> => nested(Depth - 1, Term)}.

borders() ->
    Powers = [1 bsl Bits || Bits <- [0, 7, 8, 15, 16, 28, 31, 32, 58, 59, 60, 61, 62, 63]],
    Around = lists:append([[N - 1, N, N + 1] || N <- Powers]),
    lists:usort(Around ++ [-N || N <- Around, N =< 1 bsl 63] ++ [(1 bsl 64) - 1]).

all_kinds() ->
    Keys = [null, true, false, 1, 1.0, -1, 1 bsl 63, <<>>, <<"1">>, "1", [1.5], [[<<"a">>]], #{}, #{<<"a">> => #{}}, 0.0],
    Numbers = lists:seq(100, 120) ++ [N / 2 || N <- lists:seq(1, 31, 2)],
    maps:from_list([{Key, Key} || Key <- Keys ++ Numbers]).

%% ---- messages, answers ----

messages_arrive_as_they_are(Config) ->
    [begin
         ok = send(Config, store, Message),
         ?assertEqual({Name, true}, {Name, [Message] =:= taken(?config(receiver, Config), 1)})
     end || {Name, Message} <- messages()].

answers_arrive_as_they_are(Config) ->
    [?assertEqual({Name, true}, {Name, {ok, {reply, Message}} =:= request(Config, Message)})
     || {Name, Message} <- messages()],
    ?assertEqual([], call(?config(sender, Config), macula_peer_test, mailbox, [])).

send(Config, Type, Message) ->
    send(Config, Type, Message, ?config(to, Config)).

send(Config, Type, Message, {node, Relay}) ->
    quiet_call(?config(sender, Config), macula_peer_connector, send_message_nat_aware,
               [<<"sender">>, <<"terms">>, Type, Message, #{relay_endpoint => Relay, timeout => ?TIMEOUT, skip_hole_punch => true}]);
send(Config, Type, Message, Endpoint) ->
    quiet_call(?config(sender, Config), macula_peer_connector, send_message, [Endpoint, Type, Message, ?TIMEOUT]).

%% A node that ends meanwhile does not fill the log with its arguments.
quiet_call(Node, Module, Function, Args) ->
    try call(Node, Module, Function, Args)
    catch
        exit:{Reason, _} -> exit({Function, Reason})
    end.

request(Config, Message) ->
    request(Config, Message, ?config(to, Config)).

request(Config, Message, {node, Relay}) ->
    quiet_call(?config(sender, Config), macula_peer_node, request,
         [<<"terms">>, call, Message, ?TIMEOUT, #{relay_endpoint => Relay, skip_hole_punch => true}]);
request(Config, Message, Endpoint) ->
    quiet_call(?config(sender, Config), macula_peer_connector, send_message_and_wait, [Endpoint, call, Message, ?TIMEOUT]).

%% ---- what our own encoder never writes ----

%% Payloads with repeated keys, and their terms: the last one counts, as in the original.
repeating() ->
    Key = fun(N) -> <<16#CD, N:16>> end,
    Map = fun(Pairs) -> [<<16#DF, (length(Pairs)):32>>, [[K, V] || {K, V} <- Pairs]] end,
    Twice = fun(N) -> Map([{Key(I), Key(Round * 1000 + I)} || Round <- [1, 2], I <- lists:seq(1, N)]) end,
    Wanted = fun(N) -> maps:from_list([{I, 2000 + I} || I <- lists:seq(1, N)]) end,
    %% The number 5 in four forms, and a map with its keys in another order.
    Fives = [<<5>>, <<16#CC, 5>>, <<16#CD, 5:16>>, <<16#D3, 5:64>>],
    Forward = Map([{Key(I), <<0>>} || I <- lists:seq(1, 40)]),
    Backward = Map([{Key(I), <<0>>} || I <- lists:seq(40, 1, -1)]),
    Zeros = maps:from_list([{I, 0} || I <- lists:seq(1, 40)]),
    [{Twice(N), Wanted(N)} || N <- [1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 1000, 30000]]
        ++ [{Map([{Five, <<N>>} || {N, Five} <- lists:enumerate(Fives)]), #{5 => 4}},
            {Map([{Forward, <<1>>}, {Backward, <<2>>}]), #{Zeros => 2}},
            {Map([{[<<16#91>>, Forward], <<1>>}, {[<<16#91>>, Backward], <<2>>}]), #{[Zeros] => 2}},
            {Map([{<<16#A1, "v">>, Map([{<<1>>, <<1>>}, {<<1>>, Twice(3)}])}]), #{"v" => #{1 => Wanted(3)}}},
            {<<16#93, 16#80, 16#80, 16#81, 1, 16#80>>, [#{}, #{}, #{1 => #{}}]}].

repeated_keys_in_messages(Config) ->
    [begin
         ?assertMatch({ok, 0}, raw(Config, frame(?STORE_ID, Payload))),
         ?assertEqual([Wanted], taken(?config(receiver, Config), 1))
     end || {Payload, Wanted} <- repeating()].

repeated_keys_in_answers(Config) ->
    [begin
         File = file(Config, frame(16#21, Payload)),
         ok = command(Config, ["answer ", File]),
         ?assertEqual({ok, {reply, Wanted}}, request(Config, #{}))
     end || {Payload, Wanted} <- repeating()].

%% At worst they are refused.
hostile_frames_are_refused_and_counted(Config) ->
    Receiver = ?config(receiver, Config),
    Malformed = fun() -> maps:get(malformed, macula_peer_test:stats(Receiver)) end,
    Bomb = fun(Byte) -> [<<16#DD, 200000:32>>, binary:copy(Byte, 200000)] end,
    Refused = [binary:copy(<<16#91>>, 1000000), binary:copy(<<16#81>>, 1000000), <<16#DF, 16#FFFFFFFF:32>>,
               [<<16#DF, 1000:32>>, binary:copy(<<1>>, 1999)], <<16#C1>>, <<16#A1, 16#FF>>, <<16#D4, 1, 1>>],
    _ = lists:foldl(fun(Payload, Before) ->
        {ok, 0} = raw(Config, frame(?STORE_ID, Payload)),
        await(Malformed, fun(Count) -> Count =:= Before + 1 end)
    end, Malformed(), Refused),
    ?assertEqual(0, ask(Receiver, count)),
    %% These are valid, and small on the wire.
    Valid = [Bomb(<<16#80>>), Bomb(<<16#90>>), Bomb(<<16#A0>>), Bomb(<<16#C0>>)],
    [{ok, 0} = raw(Config, frame(?STORE_ID, Payload)) || Payload <- Valid],
    [begin ?assertEqual(200000, length(List)), ?assertEqual(1, length(lists:usort(List))) end
     || List <- taken(Receiver, length(Valid))].

raw(Config, Frame) ->
    command(Config, ["send ", file(Config, Frame)]).

file(Config, Frame) ->
    File = filename:join(?config(priv_dir, Config), "frame"),
    ok = file:write_file(File, Frame),
    File.

frame(Type, Payload) ->
    [<<1, Type, 0, 0, (iolist_size(Payload)):32>>, Payload].

decoding_finishes_terms(_Config) ->
    [?assertEqual({ok, {store, Wanted}}, macula_peer_wire:decode(iolist_to_binary(frame(?STORE_ID, Payload))))
     || {Payload, Wanted} <- repeating()],
    [begin
         {ok, Frame} = macula_peer_wire:encode(store, Message),
         ?assertEqual({Name, true}, {Name, {ok, {store, Message}} =:= macula_peer_wire:decode(Frame)})
     end || {Name, Message} <- messages()].

%% ---- through the finisher ----

%% Messages that do not need that process do not overtake those that do.
messages_of_one_sender_stay_in_order(Config) ->
    Receiver = ?config(receiver, Config),
    Message = fun(N) ->
        Keys = case N rem 50 of 0 -> 5000; 25 -> 40; _ -> 3 end,
        (numbered(Keys))#{<<"id">> => N}
    end,
    Count = 2000,
    ok = quiet_call(?config(sender, Config), ?MODULE, send_all, [endpoint(?config(port, Config)), [Message(N) || N <- lists:seq(1, Count)]]),
    Ids = [Id || #{<<"id">> := Id} <- taken(Receiver, Count)],
    %% Frames of 64 KiB and more are a sequence of their own.
    {Large, Small} = lists:partition(fun(N) -> N rem 50 =:= 0 end, Ids),
    ?assertEqual({lists:seq(50, Count, 50), [N || N <- lists:seq(1, Count), N rem 50 =/= 0]}, {Large, Small}).

send_all(Endpoint, Messages) ->
    lists:foreach(fun(Message) -> ok = macula_peer_connector:send_message(Endpoint, store, Message, ?TIMEOUT) end, Messages).

macula_gateway_gets_every_term(Config) ->
    {Node, Endpoint} = node_with_macula_gateway(),
    [begin
         ok = send(Config, store, Message, Endpoint),
         [Arrived] = await(fun() -> call(Node, ?MODULE, casts, []) end, fun(Casts) -> Casts =/= [] end),
         ?assertEqual({Name, true}, {Name, Message =:= Arrived})
     end || {Name, Message} <- [{few, numbered(3)}, {some, numbered(40)}, {many, numbered(1000)}]],
    macula_peer_test:stop_node(Node).

node_with_macula_gateway() ->
    Node = macula_peer_test:start_node(),
    ok = call(Node, macula_peer_test, engine, [#{gateway => endpoint(macula_peer_test:closed_port())}]),
    {ok, {_, Port}} = call(Node, macula_peer_node, listen, [#{}]),
    Self = call(Node, erlang, spawn, [?MODULE, gateway, [[]]]),
    true = call(Node, erlang, register, [macula_gateway, Self]),
    {Node, endpoint(Port)}.

gateway(Casts) ->
    receive
        {'$gen_cast', {route_message, store, Message, Stream, {ok, {_Ip, _Port}}}} when is_reference(Stream) ->
            gateway([Message | Casts]);
        {casts, From} ->
            From ! {casts, Casts},
            gateway([])
    end.

casts() ->
    macula_gateway ! {casts, self()},
    receive {casts, Casts} -> Casts end.

a_killed_process_that_finishes_messages_is_replaced(Config) ->
    Node = macula_peer_test:start_node(),
    Endpoint = endpoint(listen(Node)),
    [begin
         [Finisher] = call(Node, macula_peer_test, finishers, []),
         true = call(Node, ?MODULE, kill, [Finisher]),
         [_] = await(fun() -> call(Node, macula_peer_test, finishers, []) end, fun(Pids) -> length(Pids -- [Finisher]) =:= 1 end),
         [ok = send(Config, store, numbered(Keys), Endpoint) || Keys <- [100, 10, 200]],
         ?assertEqual([numbered(Keys) || Keys <- [100, 10, 200]], taken(Node, 3))
     end || _ <- [1, 2]],
    ?assertMatch(#{unhandled := 0}, macula_peer_test:stats(Node)),
    macula_peer_test:stop_node(Node).

messages_lost_with_the_finisher_are_counted(Config) ->
    Node = macula_peer_test:start_node(),
    Endpoint = endpoint(listen(Node)),
    [Finisher] = call(Node, macula_peer_test, finishers, []),
    true = call(Node, ?MODULE, suspend, [Finisher]),
    [ok = send(Config, store, numbered(Keys), Endpoint) || Keys <- [100, 10, 100]],
    until(fun() -> 3 =:= call(Node, ?MODULE, queue, [Finisher]) end),
    true = call(Node, ?MODULE, kill, [Finisher]),
    _ = await(fun() -> maps:get(unhandled, macula_peer_test:stats(Node)) end, fun(Count) -> Count =:= 3 end),
    ok = send(Config, store, numbered(10), Endpoint),
    ?assertEqual([numbered(10)], taken(Node, 1)),
    %% The next engine has its own, and it ends with the engine.
    [Replaced] = call(Node, macula_peer_test, finishers, []),
    ok = call(Node, macula_peer_node, stop, []),
    ok = call(Node, macula_peer_node, start, []),
    _ = await(fun() -> call(Node, macula_peer_test, finishers, []) end,
              fun(Pids) -> length(Pids) =:= 1 andalso Pids =/= [Replaced] end),
    ok = call(Node, macula_peer_node, stop, []),
    until(fun() -> [] =:= call(Node, macula_peer_test, finishers, []) end),
    macula_peer_test:stop_node(Node).

%% A function that is replaced gets what had arrived for it, also what is not finished yet.
a_replaced_function_gets_the_messages_in_flight(Config) ->
    Node = macula_peer_test:start_node(),
    {ok, {_, Port}} = call(Node, macula_peer_node, listen, [#{handler => {?MODULE, keep_slowly, []}}]),
    [Finisher] = call(Node, macula_peer_test, finishers, []),
    true = call(Node, ?MODULE, suspend, [Finisher]),
    [ok = send(Config, store, numbered(100), endpoint(Port)) || _ <- [1, 2, 3]],
    until(fun() -> 3 =:= call(Node, ?MODULE, queue, [Finisher]) end),
    ok = call(Node, macula_peer_node, set_handler, [undefined]),
    true = call(Node, ?MODULE, resume, []),
    until(fun() -> 3 =:= call(Node, ?MODULE, kept_slowly, []) end),
    until(fun() -> [] =:= call(Node, macula_peer_test, handlers, []) end),
    macula_peer_test:stop_node(Node).

keep_slowly({macula_peer_message, _}) ->
    timer:sleep(20),
    persistent_term:put(?MODULE, kept_slowly() + 1);
keep_slowly({macula_peer_event, _}) ->
    ok.

kept_slowly() ->
    persistent_term:get(?MODULE, 0).

kill(Name) when is_atom(Name) ->
    kill(whereis(Name));
kill(Pid) ->
    Monitor = monitor(process, Pid),
    true = exit(Pid, kill),
    receive {'DOWN', Monitor, process, _, _} -> true end.

%% The process that suspends must live on.
suspend(Pid) ->
    Self = self(),
    _ = spawn(fun() ->
        true = register(suspender, self()),
        Self ! erlang:suspend_process(Pid),
        receive resume -> erlang:resume_process(Pid) end
    end),
    receive true -> true end.

resume() ->
    suspender ! resume,
    true.

queue(Pid) ->
    {message_queue_len, Length} = process_info(Pid, message_queue_len),
    Length.

a_handler_that_died_is_counted(Config) ->
    Node = macula_peer_test:start_node(),
    Endpoint = endpoint(listen(Node)),
    true = call(Node, ?MODULE, kill, [?KEEPER]),
    [ok = send(Config, store, numbered(Keys), Endpoint) || Keys <- [10, 100, 10]],
    _ = await(fun() -> maps:get(unhandled, macula_peer_test:stats(Node)) end, fun(Count) -> Count =:= 3 end),
    macula_peer_test:stop_node(Node).

%% ---- settings ----

%% Encoded on a normal scheduler and, with many terms, on a dirty one, which has a smaller stack.
the_deepest_nesting_that_is_accepted(_Config) ->
    [Sender, Receiver] = Nodes = [macula_peer_test:start_node() || _ <- [sender, receiver]],
    _ = listen(Receiver),
    [ok = call(Node, macula_peer_test, engine, [#{gateway => none, max_nesting => 512}]) || Node <- Nodes],
    {ok, {_, Port}} = call(Receiver, ?MODULE, listen_again, []),
    Send = fun(Depth, Inner) -> call(Sender, ?MODULE, ask_deep, [endpoint(Port), Depth, Inner]) end,
    [?assertEqual({Inner, Depth, true}, {Inner, Depth, Send(Depth, Inner)})
     || Inner <- [maps, lists, wide, keys], Depth <- [64, 511, 512]],
    ?assertEqual({error, {invalid_message, {too_deep, 512}}}, Send(513, maps)),
    [macula_peer_test:stop_node(Node) || Node <- Nodes].

%% Runs in the node, so that a failure does not print the message.
ask_deep(Endpoint, Depth, Inner) ->
    Message = deep(Depth, Inner),
    case macula_peer_connector:send_message_and_wait(Endpoint, call, Message, ?TIMEOUT) of
        {ok, {reply, Reply}} -> Reply =:= Message;
        Error -> Error
    end.

deep(Depth, maps) -> nested(Depth - 1, #{});
deep(Depth, lists) -> #{<<"l">> => lists:foldl(fun(_, Inner) -> [Inner] end, [<<"i">>], lists:seq(3, Depth))};
deep(Depth, wide) -> nested(Depth - 1, numbered(30000));
deep(Depth, keys) -> maps:from_list([{nested(Depth - 2, #{<<"k">> => N}), N} || N <- lists:seq(1, 40)]).

listen_again() ->
    macula_peer_node:listen(#{handler => whereis(?KEEPER)}).

%% ---- busy dirty schedulers ----

-define(BUSY, 6000).
-define(PROMPT, 2000).

busy_dirty_schedulers_delay_no_call(Config) ->
    Endpoint = endpoint(?config(port, Config)),
    Node = node_with_busy_dirty_schedulers(Endpoint),
    [begin
         {Took, Result} = call(Node, ?MODULE, timed, [What, Endpoint]),
         ?assertEqual({What, true}, {What, Result}),
         ?assert(Took < ?PROMPT, {What, Took})
     end || What <- [{send, 100000}, {send, 1000000}, {request, 800000}, wire, stats, nat_profile, identity, local_address,
                     path]],
    true = is_busy(Node),
    macula_peer_test:stop_node(Node).

%% Runs in the node: getting the terms there takes longer than what is measured.
timed(What, Endpoint) ->
    Do = doing(What, Endpoint),
    elapsed(Do).

doing({send, Bytes}, Endpoint) ->
    Message = #{v => binary:copy(<<0>>, Bytes)},
    fun() -> ok =:= macula_peer_connector:send_message(Endpoint, store, Message, 1000) end;
doing({request, Bytes}, Endpoint) ->
    Message = #{v => binary:copy(<<0>>, Bytes)},
    fun() -> {ok, reply} =:= kind(macula_peer_connector:send_message_and_wait(Endpoint, call, Message, 1900)) end;
doing({heavy, Function, Timeout}, Endpoint) ->
    %% Not much larger than that: garbage of large heaps is collected on dirty schedulers.
    Message = #{<<"l">> => lists:seq(-25000, -1)},
    fun() -> kind(macula_peer_connector:Function(Endpoint, call, Message, Timeout)) end;
doing(wire, _Endpoint) ->
    Message = #{<<"v">> => binary:copy(<<0>>, 800000)},
    fun() ->
        {ok, Frame} = macula_peer_wire:encode(store, Message),
        {ok, {store, Message}} =:= macula_peer_wire:decode(Frame)
    end;
doing(path, Endpoint) ->
    fun() -> {ok, #{path := Path}} = macula_peer_node:path(Endpoint), Path =:= direct end;
doing(local_address, _Endpoint) ->
    fun() -> element(1, macula_peer_node:local_address()) =:= ok end;
doing(Figures, _Endpoint) ->
    fun() -> is_map(macula_peer_node:Figures()) end.

kind({ok, {Type, _Message}}) -> {ok, Type};
kind(Other) -> Other.

%% It needs a dirty scheduler, and gets none within its timeout.
a_heavy_message_keeps_its_timeout(Config) ->
    Endpoint = endpoint(?config(port, Config)),
    Node = node_with_busy_dirty_schedulers(Endpoint),
    Heavy = fun(Function, Timeout) -> call(Node, ?MODULE, timed, [{heavy, Function, Timeout}, Endpoint]) end,
    [begin
         {Took, Result} = Heavy(Function, 500),
         ?assertEqual({Function, {error, timeout}}, {Function, Result}),
         ?assert(Took >= 500 andalso Took < ?PROMPT, {Function, Took})
     end || Function <- [send_message, send_message_and_wait]],
    true = is_busy(Node),
    until(fun() -> not is_busy(Node) end),
    ?assertEqual([], call(Node, macula_peer_test, mailbox, [])),
    ?assertMatch({_, {ok, reply}}, Heavy(send_message_and_wait, ?TIMEOUT)),
    %% Work that can be done at once is done, even with a timeout of 0.
    ?assertMatch({_, ok}, Heavy(send_message, 0)),
    macula_peer_test:stop_node(Node).

%% With a link. Code is loaded on dirty schedulers, so all of it is there before.
node_with_busy_dirty_schedulers(Endpoint) ->
    Node = macula_peer_test:start_node(macula_peer_test:node_paths() ++ [filename:dirname(code:which(?MODULE))],
                                       #{env => [{"ERL_FLAGS", "+SDcpu 1:1"}]}),
    ok = call(Node, macula_peer_test, engine, [#{gateway => none}]),
    {ok, Modules} = call(Node, application, get_key, [macula_peer_connector, modules]),
    ok = call(Node, code, ensure_modules_loaded, [Modules]),
    {ok, {reply, _}} = call(Node, macula_peer_connector, send_message_and_wait, [Endpoint, call, #{}, ?TIMEOUT]),
    [_ = call(Node, M, module_info, []) || M <- [?MODULE, macula_peer_test, erts_debug]],
    Busy = call(Node, erlang, spawn, [erts_debug, dirty_cpu, [wait, ?BUSY]]),
    true = call(Node, erlang, register, [terms_SUITE_busy, Busy]),
    Node.

is_busy(Node) ->
    undefined =/= call(Node, erlang, whereis, [terms_SUITE_busy]).
