%% Relays, and nodes that are reached through them, for the suites. Each is a BEAM node on a host of macula_peer_net or
%% `here', and ends with the process that started it.
-module(macula_peer_relays).

-export([start_relay/1, start_relay/2, restart_relay/1, kill_relay/1, relay_stats/1]).
-export([endpoint/1, endpoints/1, node_of/1]).
-export([start_cold/2, start_member/2, engine/1, forget/1]).
-export([id/1, settings/2, await_registered/2, registration/3, await_registration/4]).
-export([send/4, send/5, request/4, cold_send/4, delivered/2]).
-export([start_stream/4, stream_with/2, end_stream/2, streamed/1, await_count/2, sequence/1, paths/1, last/1]).
-export([stream/4, stream_end/1, stream_opts/1, stream_state/0, own_sequence/0, own_paths/0, own_last/0]).

-import(macula_peer_test, [call/4, await/3, until/2]).

-define(STREAM, macula_peer_relays_stream).
-define(SEND_TIMEOUT, 10000).
-define(PATIENCE, 30000).

%% ---- relays ----

start_relay(Where) ->
    start_relay(Where, #{}).

start_relay(Where, Limits) ->
    start_relay(Where, Limits, 0).

start_relay(Where, Limits, Port) ->
    Node = start_node(Where),
    {ok, {_, Bound}} = call(Node, macula_peer_test, listen, [#{port => Port, relay => Limits}]),
    {relay, Node, Where, Limits, Bound}.

%% Without closing its connections; on the same port again.
restart_relay({relay, _Node, Where, Limits, Port} = Relay) ->
    ok = kill_relay(Relay),
    start_relay(Where, Limits, Port).

kill_relay(Relay) ->
    macula_peer_test:kill_node(node_of(Relay)).

relay_stats(Relay) ->
    maps:get(relay, macula_peer_test:stats(node_of(Relay))).

node_of({relay, Node, _Where, _Limits, _Port}) -> Node.

endpoint({relay, _Node, Where, _Limits, Port}) -> macula_peer_net:endpoint(Where, Port);
endpoint(Endpoint) when is_binary(Endpoint) -> Endpoint.

endpoints(Relays) ->
    [endpoint(Relay) || Relay <- Relays].

%% ---- their nodes ----

%% Its engine was never started. The variables are those of its environment.
start_cold(Where, Variables) ->
    Node = start_node(Where),
    [true = call(Node, os, putenv, [Name, Value]) || {Name, Value} <- Variables],
    Node.

start_member(Where, Settings) ->
    Node = start_node(Where),
    ok = call(Node, ?MODULE, engine, [Settings]),
    Node.

%% Runs in the node.
engine(Settings) ->
    macula_peer_test:engine(Settings#{handler => macula_peer_test:collector()}).

%% What the node got before.
forget(Node) ->
    _ = call(Node, macula_peer_test, collector, []),
    macula_peer_test:forget(Node).

%% The settings of a node that registers with relays, and is reached through these alone.
settings(Name, Relays) ->
    #{node_id => id(Name), relays => endpoints(Relays), hole_punching => off}.

id(Name) when is_binary(Name) ->
    Name;
id(Name) ->
    crypto:hash(sha256, atom_to_binary(Name)).

await_registered(Node, Relays) ->
    Wanted = lists:sort(endpoints(Relays)),
    until(fun() ->
        #{registrations := All} = macula_peer_test:stats(Node),
        lists:sort([Relay || #{relay := Relay, state := registered} <- All]) =:= Wanted
    end, ?PATIENCE).

%% What a relay says to a registration: `registered', or why not.
registration(Node, Id, Relay) ->
    ok = call(Node, macula_peer_node, unregister, []),
    Before = length(answers(Node, Relay)),
    ok = call(Node, macula_peer_node, register, [Id, [endpoint(Relay)]]),
    Answers = await(fun() -> answers(Node, Relay) end, fun(All) -> length(All) > Before end, ?PATIENCE),
    lists:nth(Before + 1, Answers).

answers(Node, Relay) ->
    Endpoint = endpoint(Relay),
    [answer(Event) || #{relay := E, state := State} = Event <- macula_peer_test:events(Node, registration),
                      E =:= Endpoint, State =/= lost].

answer(#{state := registered}) -> registered;
answer(#{state := refused, reason := Reason}) -> Reason.

%% Tries again until the relay says that; slowly, as a relay counts the attempts.
await_registration(Node, Id, Relay, Wanted) ->
    Ask = fun() -> receive after 100 -> registration(Node, Id, Relay) end end,
    await(Ask, fun(Answer) -> Answer =:= Wanted end, ?PATIENCE).

start_node(Where) ->
    Node = case Where of
        here -> macula_peer_test:start_node();
        Host -> macula_peer_net:start_node(Host)
    end,
    Owner = self(),
    _ = spawn(fun() ->
        [monitor(process, Pid) || Pid <- [Owner, Node]],
        receive
            {'DOWN', _, process, Owner, _} -> try macula_peer_test:stop_node(Node) catch _:_ -> ok end;
            {'DOWN', _, process, Node, _} -> ok
        end
    end),
    Node.

%% ---- messages ----

%% Sends a message with that id from the node with the first name to the one with the second.
send(Node, Names, Id, Opts) ->
    send(Node, Names, store, #{id => Id}, Opts).

send(Node, {From, To}, Type, Message, Opts) ->
    call(Node, macula_peer_connector, send_message_nat_aware,
         [id(From), id(To), Type, Message, maps:merge(#{timeout => ?SEND_TIMEOUT}, Opts)]).

request(Node, To, Type, Message) ->
    call(Node, macula_peer_node, request, [id(To), Type, Message, ?SEND_TIMEOUT]).

%% The first message of a node, without options; how many microseconds later the target had it.
cold_send(Node, Names, Target, Id) ->
    Start = os:system_time(microsecond),
    {From, To} = Names,
    ok = call(Node, macula_peer_connector, send_message_nat_aware, [id(From), id(To), store, #{id => Id}]),
    maps:get(at, delivered(Target, Id)) - Start.

%% The message with that id, once it has arrived.
delivered(Target, Id) ->
    Received = fun() ->
        [Inbound || #{message := #{<<"id">> := I}} = Inbound <- macula_peer_test:received(Target), I =:= Id]
    end,
    hd(await(Received, fun(Messages) -> Messages =/= [] end, ?PATIENCE)).

%% ---- a stream of numbered messages ----

%% The node sends Count messages, one after the other, while the test does something else; or, with `{every, Ms}', one
%% each time until the stream is ended.
start_stream(Node, {From, To}, Rhythm, Opts) ->
    ok = call(Node, ?MODULE, stream, [id(From), id(To), Rhythm, Opts]).

%% What is not sent yet is sent with other options.
stream_with(Node, Opts) ->
    ok = call(Node, ?MODULE, stream_opts, [Opts]).

%% Sends at least one more and Count in total, without a pause; returns their number.
end_stream(Node, AtLeast) ->
    call(Node, ?MODULE, stream_end, [AtLeast]).

%% The number of sent messages, and those that were not accepted.
streamed(Node) ->
    call(Node, ?MODULE, stream_state, []).

await_count(Target, Count) ->
    until(fun() -> macula_peer_test:count(Target) >= Count end, 60000).

%% `{in_order, Count}' if the target got 1 to Count, once each and in this order; otherwise what is wrong.
sequence(Target) ->
    call(Target, ?MODULE, own_sequence, []).

%% The paths that messages came by, in order, each once while it was used.
paths(Target) ->
    call(Target, ?MODULE, own_paths, []).

%% Which message the target got last.
last(Target) ->
    call(Target, ?MODULE, own_last, []).

%% These run in the nodes.

stream(From, To, Rhythm, Opts) ->
    Sent = counters:new(1, []),
    Refused = ets:new(?STREAM, [public]),
    ok = stream_opts(Opts),
    Send = fun(Id) ->
        Result = macula_peer_connector:send_message_nat_aware(From, To, store, #{id => Id},
                                                              persistent_term:get({?STREAM, opts})),
        Result =:= ok orelse ets:insert(Refused, {Id, Result}),
        counters:add(Sent, 1, 1)
    end,
    Owner = spawn(fun() ->
        receive go -> ok end,
        stream_on(1, Rhythm, Send),
        receive after infinity -> ok end
    end),
    ok = persistent_term:put(?STREAM, {Sent, Refused, Owner}),
    true = ets:give_away(Refused, Owner, none),
    Owner ! go,
    ok.

stream_on(Id, {every, Ms}, Send) ->
    Send(Id),
    receive
        {stream_end, AtLeast, From, Tag} ->
            Count = max(AtLeast, Id + 1),
            stream_on(Id + 1, Count, Send),
            From ! {Tag, Count}
    after Ms ->
        stream_on(Id + 1, {every, Ms}, Send)
    end;
stream_on(Id, Count, Send) when Id =< Count ->
    Send(Id),
    %% Some seconds long, so that relays can be killed and started meanwhile.
    Id rem 20 =:= 0 andalso receive after 1 -> ok end,
    stream_on(Id + 1, Count, Send);
stream_on(_Id, _Count, _Send) ->
    ok.

stream_end(AtLeast) ->
    {_Sent, _Refused, Owner} = persistent_term:get(?STREAM),
    Tag = make_ref(),
    Owner ! {stream_end, AtLeast, self(), Tag},
    receive {Tag, Count} -> Count end.

stream_opts(Opts) ->
    persistent_term:put({?STREAM, opts}, Opts).

stream_state() ->
    {Sent, Refused, _Owner} = persistent_term:get(?STREAM),
    {counters:get(Sent, 1), ets:tab2list(Refused)}.

own_sequence() ->
    Ids = [Id || #{message := #{<<"id">> := Id}} <- macula_peer_test:asked(received)],
    Count = length(Ids),
    case lists:seq(1, Count) of
        Ids -> {in_order, Count};
        Wanted -> #{count => Count, missing => few(Wanted -- lists:usort(Ids)), twice => few(Ids -- lists:usort(Ids)),
                    out_of_order => few(backwards(Ids))}
    end.

own_paths() ->
    once([Path || #{path := Path} <- macula_peer_test:asked(received)]).

own_last() ->
    lists:last([none | macula_peer_test:asked(received)]).

once([A, A | Rest]) -> once([A | Rest]);
once([A | Rest]) -> [A | once(Rest)];
once([]) -> [].

backwards([A, B | Rest]) when B =< A -> [{A, B} | backwards([B | Rest])];
backwards([_ | Rest]) -> backwards(Rest);
backwards([]) -> [].

few(List) ->
    lists:sublist(List, 10).
