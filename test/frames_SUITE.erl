%% What a frame costs its receiver is bounded before terms are built from it, and the sender is told of a refused frame.
-module(frames_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, endpoint/1, until/1, await/2, elapsed/1]).

-define(TIMEOUT, 20000).
-define(MAX_FRAME, 16777216).
-define(STORE_ID, 16#42).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [millions_of_terms_are_refused_before_they_are_built, the_sender_is_told_of_a_refused_message,
     the_sender_is_told_of_a_message_refused_over_a_relay, a_request_that_is_not_taken_fails_at_once,
     an_answer_of_too_many_terms_is_an_error, a_gateway_gets_nothing_that_is_too_much, the_most_terms_arrive,
     large_messages_of_one_sender_hold_up_no_small_ones_of_others].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    Sender = macula_peer_test:start_node(),
    Generous = macula_peer_test:start_node(),
    ok = call(Generous, macula_peer_test, engine, [#{max_terms => 10000000, max_nesting => 512, max_frame_size => 2 * ?MAX_FRAME}]),
    _ = call(Generous, macula_peer_test, collector, []),
    ok = call(Generous, ?MODULE, handle, []),
    ok = call(Sender, macula_peer_test, engine, [[]]),
    [{node, Node}, {sender, Sender}, {generous, Generous}, {endpoint, endpoint(Port)} | Config].

end_per_suite(Config) ->
    [macula_peer_test:stop_node(?config(Node, Config)) || Node <- [node, sender, generous]].

init_per_testcase(_Case, Config) ->
    [ok = macula_peer_test:forget(?config(Node, Config)) || Node <- [node, generous]],
    Config.

end_per_testcase(_Case, Config) ->
    Config.

%% Runs in a node.
handle() ->
    macula_peer_node:set_handler(macula_peer_test:collector()).

send(Config, From, What) ->
    send(Config, From, What, ?config(endpoint, Config)).

send(Config, From, What, Endpoint) ->
    call(?config(From, Config), ?MODULE, with, [What, fun(Message) ->
        macula_peer_connector:send_message(Endpoint, store, Message, ?TIMEOUT)
    end]).

%% Runs in a node, which large messages would take long to get to.
with(What, Do) ->
    Do(message(What)).

message({id, N}) -> #{<<"id">> => N};
message({deep, Depth}) -> #{<<"d">> => deep(Depth - 1)};
message({wide, Terms}) -> #{<<"w">> => [#{} || _ <- lists:seq(1, Terms - 3)]};
message({bytes, N}) -> #{<<"v">> => <<0:(8 * N)>>}.

deep(1) -> [<<"bottom">>];
deep(Depth) -> [deep(Depth - 1)].

malformed(Config) ->
    maps:get(malformed, macula_peer_test:stats(?config(node, Config))).

%% The most memory that a node had so far, in bytes.
peak(Node) ->
    {ok, Status} = file:read_file("/proc/" ++ call(Node, os, getpid, []) ++ "/status"),
    {match, [KiB]} = re:run(Status, "VmHWM:\\s+(\\d+) kB", [{capture, [1], binary}]),
    binary_to_integer(KiB) * 1024.

%% ---- strangers ----

%% In the fewest bytes, in frames of the largest size.
bombs() ->
    Array = fun(Element) ->
        N = (?MAX_FRAME - 8 - 5) div byte_size(Element),
        [<<16#DD, N:32>>, binary:copy(Element, N)]
    end,
    Pairs = (?MAX_FRAME - 8 - 5) div 2,
    Text = ?MAX_FRAME - 8 - 5,
    [Array(<<16#80>>), Array(<<16#81, 1, 1>>), Array(<<16#91, 16#90>>), [<<16#DF, Pairs:32>>, binary:copy(<<1, 1>>, Pairs)],
     [<<16#DB, Text:32>>, binary:copy(<<"a">>, Text)]].

millions_of_terms_are_refused_before_they_are_built(Config) ->
    Node = ?config(node, Config),
    Hop = macula_peer_program:start("legacy_hop", ["--to", binary_to_list(?config(endpoint, Config))]),
    File = filename:join(?config(priv_dir, Config), "bomb"),
    Before = {malformed(Config), peak(Node)},
    Took = [begin
                ok = file:write_file(File, [<<1, ?STORE_ID, 0, 0, (iolist_size(Bomb)):32>>, Bomb]),
                {Sent, {ok, 0}} = elapsed(fun() -> macula_peer_program:command(Hop, ["send ", File]) end),
                %% Others are served meanwhile.
                {Others, ok} = elapsed(fun() -> send(Config, sender, {id, N}) end),
                {Sent, Others}
            end || {N, Bomb} <- lists:enumerate(bombs())],
    Count = length(Took),
    _ = await(fun() -> malformed(Config) end, fun(Malformed) -> Malformed =:= element(1, Before) + Count end),
    _ = await(fun() -> macula_peer_test:ids(Node) end, fun(Ids) -> Ids =:= lists:seq(1, Count) end),
    Grown = peak(Node) - element(2, Before),
    ct:pal("ms for each bomb and for a message beside it: ~p; at most ~b MiB more", [Took, Grown bsr 20]),
    %% The frames themselves and what their packets wait in.
    ?assert(Grown < 150 bsl 20, Grown),
    macula_peer_program:stop(Hop).

%% ---- senders with other limits ----

undelivered(Config) ->
    Events = macula_peer_test:events(?config(generous, Config), undelivered),
    lists:sort([{Why, Count} || #{reason := Why, count := Count} <- Events]).

the_sender_is_told_of_a_refused_message(Config) ->
    told(Config, fun(What) -> send(Config, generous, What) end).

the_sender_is_told_of_a_message_refused_over_a_relay(Config) ->
    {Relay, Port} = {macula_peer_test:start_node(), macula_peer_test:free_port()},
    {ok, _} = call(Relay, macula_peer_node, listen, [#{port => Port, relay => #{bandwidth => 100000000}}]),
    Registered = ?config(node, Config),
    ok = call(Registered, macula_peer_node, register, [<<"frames">>, [endpoint(Port)]]),
    macula_peer_relays:await_registered(Registered, [endpoint(Port)]),
    Opts = #{relay_endpoint => endpoint(Port), timeout => ?TIMEOUT, skip_hole_punch => true},
    told(Config, fun(What) ->
        call(?config(generous, Config), ?MODULE, with, [What, fun(Message) ->
            macula_peer_connector:send_message_nat_aware(<<"generous">>, <<"frames">>, store, Message, Opts)
        end])
    end),
    ok = call(Registered, macula_peer_node, unregister, []),
    macula_peer_test:stop_node(Relay).

%% The session goes on, and everything is either there or reported.
told(Config, Send) ->
    Undelivered = fun() -> maps:get(undelivered, macula_peer_test:stats(?config(generous, Config))) end,
    Before = Undelivered(),
    Messages = [{id, 1}, {deep, 65}, {id, 2}, {wide, 1000001}, {id, 3}, {bytes, ?MAX_FRAME}, {id, 4}],
    [?assertEqual(ok, Send(What)) || What <- Messages],
    Wanted = [{{rejected, too_deep}, 1}, {{rejected, too_large}, 1}, {{rejected, too_many_terms}, 1}],
    _ = await(fun() -> undelivered(Config) end, fun(Told) -> Told =:= Wanted end),
    _ = await(fun() -> macula_peer_test:ids(?config(node, Config)) end, fun(Ids) -> Ids =:= [1, 2, 3, 4] end),
    ?assertEqual(4, macula_peer_test:count(?config(node, Config))),
    ?assertEqual(Before + 3, Undelivered()),
    _ = await(fun() -> [Bytes || #{unacknowledged_bytes := Bytes} <- maps:get(peers, macula_peer_test:stats(?config(generous, Config))), Bytes > 0] end,
              fun(Owed) -> Owed =:= [] end).

a_request_that_is_not_taken_fails_at_once(Config) ->
    Endpoint = ?config(endpoint, Config),
    Request = fun(What) ->
        call(?config(generous, Config), ?MODULE, with, [What, fun(Message) ->
            elapsed(fun() -> macula_peer_connector:send_message_and_wait(Endpoint, call, Message, ?TIMEOUT) end)
        end])
    end,
    [begin
         {Took, Answer} = Request(What),
         ?assertEqual({error, {rejected, Why}}, Answer),
         ?assert(Took < ?TIMEOUT div 4, {Why, Took})
     end || {What, Why} <- [{{deep, 65}, too_deep}, {{wide, 1000001}, too_many_terms},
                               {{bytes, ?MAX_FRAME}, too_large}]].

%% What a peer answers is decoded for the caller, within the caller's limits.
an_answer_of_too_many_terms_is_an_error(Config) ->
    Generous = ?config(generous, Config),
    {ok, {_, Port}} = call(Generous, ?MODULE, listen_and_answer, [{wide, 1000001}]),
    Answer = call(?config(sender, Config), macula_peer_connector, send_message_and_wait, [endpoint(Port), call, #{}, ?TIMEOUT]),
    ?assertEqual({error, {msgpack_decode_error, {too_many_terms, 1000000}}}, Answer),
    ok = call(Generous, macula_peer_node, close, []),
    ok = call(Generous, ?MODULE, handle, []).

listen_and_answer(What) ->
    Answer = message(What),
    Handler = spawn(fun Loop() ->
        receive
            {macula_peer_message, #{reply_to := Token}} -> ok = macula_peer_node:reply(Token, reply, Answer), Loop();
            _ -> Loop()
        end
    end),
    macula_peer_node:listen(#{handler => Handler}).

%% Nothing of it is decoded before it is handed over, and the gateway would build it.
a_gateway_gets_nothing_that_is_too_much(Config) ->
    Node = macula_peer_test:start_node(),
    Gateway = macula_peer_program:start("fake_gateway", []),
    ok = call(Node, macula_peer_test, engine, [#{gateway => endpoint(macula_peer_program:port(Gateway))}]),
    {ok, {_, Port}} = call(Node, macula_peer_node, listen, [#{}]),
    HandedOver = fun() -> maps:get(handed_over, maps:get(gateway, macula_peer_test:stats(Node))) end,
    [?assertEqual(ok, send(Config, generous, What, endpoint(Port)))
     || What <- [{id, 1}, {deep, 65}, {wide, 1000001}, {id, 2}]],
    _ = await(fun() -> undelivered(Config) end,
              fun(Told) -> Told =:= [{{rejected, too_deep}, 1}, {{rejected, too_many_terms}, 1}] end),
    _ = await(HandedOver, fun(Count) -> Count =:= 2 end),
    macula_peer_program:stop(Gateway),
    macula_peer_test:stop_node(Node).

%% ---- what every node may send ----

the_most_terms_arrive(Config) ->
    Node = ?config(node, Config),
    Peak = peak(Node),
    {Took, ok} = elapsed(fun() -> send(Config, sender, {wide, 1000000}) end),
    {Arrived, _} = elapsed(fun() -> await(fun() -> macula_peer_test:count(Node) end, fun(Count) -> Count =:= 1 end) end),
    {Refused, TooMany} = elapsed(fun() -> send(Config, sender, {wide, 1000001}) end),
    ?assertEqual({error, {invalid_message, {too_many_terms, 1000000}}}, TooMany),
    ct:pal("ms until ok ~b, until there ~b, until refused ~b; at most ~b MiB more",
           [Took, Arrived, Refused, (peak(Node) - Peak) bsr 20]).

%% Every one takes a tenth of a second and more to decode.
large_messages_of_one_sender_hold_up_no_small_ones_of_others(Config) ->
    Endpoint = ?config(endpoint, Config),
    Quiet = call(?config(sender, Config), ?MODULE, round_trips, [Endpoint, 50]),
    Flood = call(?config(generous, Config), ?MODULE, flood, [Endpoint]),
    until(fun() -> macula_peer_test:count(?config(node, Config)) > 0 end),
    Busy = call(?config(sender, Config), ?MODULE, round_trips, [Endpoint, 50]),
    %% It went on meanwhile.
    ?assert(call(?config(generous, Config), erlang, is_process_alive, [Flood])),
    true = call(?config(generous, Config), erlang, exit, [Flood, kill]),
    ct:pal("round trips in us, quiet ~p, busy ~p", [percentiles(Quiet), percentiles(Busy)]),
    ?assert(lists:nth(45, Busy) < 250000, Busy).

percentiles(Sorted) ->
    [lists:nth(max(1, length(Sorted) * P div 100), Sorted) || P <- [50, 90, 99]].

%% Runs in the node.
round_trips(Endpoint, Count) ->
    lists:sort([begin
                    {Us, {ok, {pong, _}}} = timer:tc(macula_peer_connector, send_message_and_wait,
                                                     [Endpoint, ping, #{timestamp => 1}, ?TIMEOUT]),
                    Us
                end || _ <- lists:seq(1, Count)]).

flood(Endpoint) ->
    Message = message({wide, 900000}),
    spawn(fun Send() ->
        ok = macula_peer_connector:send_message(Endpoint, store, Message, ?TIMEOUT),
        Send()
    end).
