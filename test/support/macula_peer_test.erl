%% What the suites share: ports, waiting, and other BEAM nodes to talk to.
-module(macula_peer_test).

-export([engine/1]).
-export([node_paths/0]).
-export([start_node/0, start_node/1, start_node/2, call/4, stop_node/1, kill_node/1]).
-export([start_listener/0, start_listener/1]).
-export([listen/1, collector/0, asked/1, received/1, count/1, events/2, forget/1, ids/1, stats/1, serve/1]).
-export([root/0, warm_target/1]).
-export([closed_port/0, free_port/0, silent_port/0, endpoint/1, endpoint/2]).
-export([until/1, until/2, await/2, await/3, elapsed/1, in_parallel/2, mailbox/0]).
-export([peer_stats/1, handlers/0, finishers/0, rpc/2]).

-define(APP, macula_peer_connector).
-define(CALL_TIMEOUT, 30000).
-define(COLLECTOR, macula_peer_test_collector).
%% Larger binaries are kept as their hash.
-define(KEPT_WHOLE, 256).

%% ---- the engine of this node ----

%% Restarts the engine with these settings and no others.
engine(Env) when is_map(Env) ->
    engine(maps:to_list(Env));
engine(Env) ->
    ok = macula_peer_node:stop(),
    _ = application:load(?APP),
    [ok = application:unset_env(?APP, Key) || {Key, _} <- application:get_all_env(?APP)],
    [ok = application:set_env(?APP, Key, Value) || {Key, Value} <- Env],
    ok = macula_peer_node:start().

peer_stats(Endpoint) ->
    #{peers := Peers} = macula_peer_node:stats(),
    case [Peer || #{endpoint := E} = Peer <- Peers, E =:= Endpoint] of
        [Peer] -> Peer;
        [] -> none
    end.

%% The processes of handlers that are functions.
handlers() ->
    started_by(macula_peer_handler).

finishers() ->
    started_by(macula_peer_finisher).

started_by(Module) ->
    [Pid || Pid <- processes(), proc_lib:translate_initial_call(Pid) =:= {Module, init, 1}].

%% The top of the project, wherever in it the application was built.
root() ->
    root(code:lib_dir(?APP)).

root(Dir) ->
    case {filelib:is_dir(filename:join(Dir, "native/testkit")), filename:dirname(Dir)} of
        {true, _} -> Dir;
        {false, Dir} -> error(project_not_found);
        {false, Above} -> root(Above)
    end.

%% A target directory for cargo in which the dependencies are compiled already, and nothing of ours.
warm_target(Dir) ->
    From = filename:join(root(), "target/release"),
    To = filename:join(Dir, "release"),
    Entries = [Entry || Entry <- filelib:wildcard("{build,deps,.fingerprint}/*", From), string:find(Entry, "macula") =:= nomatch],
    [] = os:cmd(["mkdir -p ", [[" ", filename:join(To, Sub)] || Sub <- ["build", "deps", ".fingerprint"]]]),
    [[] = os:cmd(["cp -Rp ", filename:join(From, Entry), " ", filename:join([To, filename:dirname(Entry), "."])])
     || Entry <- Entries],
    ok.

%% ---- other nodes ----

node_paths() ->
    [filename:dirname(code:which(Module)) || Module <- [macula_peer_nif, ?MODULE]].

start_node() ->
    start_node(node_paths()).

start_node(Paths) ->
    start_node(Paths, #{}).

%% Takes more options of `peer'.
start_node(Paths, Opts) ->
    Args = ["-kernel", "logger_level", "critical" | lists:append([["-pa", Path] || Path <- Paths])],
    {ok, Node, _} = peer:start(Opts#{connection => standard_io, args => Args}),
    Node.

call(Node, Module, Function, Args) ->
    peer:call(Node, Module, Function, Args, ?CALL_TIMEOUT).

stop_node(Node) ->
    peer:stop(Node).

%% Ends a node without a goodbye, and returns when it has ended.
kill_node(Node) ->
    Monitor = monitor(process, Node),
    [] = os:cmd("kill -9 " ++ call(Node, os, getpid, [])),
    receive {'DOWN', Monitor, process, Node, _} -> ok end.

%% A node that keeps what it gets.
start_listener() ->
    start_listener(0).

start_listener(Port) ->
    Node = start_node(),
    {ok, {_, Bound}} = call(Node, ?MODULE, listen, [#{port => Port}]),
    {Node, Bound}.

%% Runs in the listener's node.
listen(Opts) ->
    macula_peer_node:listen(Opts#{handler => collector()}).

%% The handler of this node that keeps what it gets.
collector() ->
    case whereis(?COLLECTOR) of
        undefined ->
            Pid = spawn(?MODULE, serve, [self()]),
            receive {Pid, ready} -> Pid end;
        Pid ->
            Pid
    end.

serve(Started) ->
    true = register(?COLLECTOR, self()),
    Started ! {self(), ready},
    collect([], []).

%% Every message that a listener got, in the order of arrival, and when: `at' is the system's time in microseconds.
received(Node) ->
    call(Node, ?MODULE, asked, [received]).

%% How many messages a listener got.
count(Node) ->
    call(Node, ?MODULE, asked, [count]).

%% Every event of this name that a listener was told of, in their order.
events(Node, Name) ->
    [Event || #{event := Of} = Event <- call(Node, ?MODULE, asked, [events]), Of =:= Name].

%% A listener lets go of what it got.
forget(Node) ->
    call(Node, ?MODULE, asked, [forget]).

%% Runs in the listener's node.
asked(What) ->
    Tag = make_ref(),
    ?COLLECTOR ! {?COLLECTOR, What, self(), Tag},
    receive {Tag, Answer} -> Answer end.

%% The distinct `id' fields of what a listener got.
ids(Node) ->
    lists:usort([Id || #{message := #{<<"id">> := Id}} <- received(Node)]).

stats(Node) ->
    call(Node, macula_peer_node, stats, []).

%% Every token is kept: an application need not let go of what it does not answer.
collect(Messages, Events) ->
    receive
        {macula_peer_message, #{type := Type, message := Message, reply_to := Token} = Inbound} ->
            answer(Type, Message, Token),
            Kept = maps:with([type, from, dialect, path, key], Inbound),
            Arrived = Kept#{message => hashed(Message), at => os:system_time(microsecond)},
            collect([{Arrived, Token} | Messages], Events);
        {macula_peer_event, Event} ->
            collect(Messages, [Event | Events]);
        {?COLLECTOR, forget, From, Tag} ->
            From ! {Tag, ok},
            collect([], []);
        {?COLLECTOR, What, From, Tag} ->
            From ! {Tag, kept(What, Messages, Events)},
            collect(Messages, Events)
    end.

kept(received, Messages, _Events) -> [Kept || {Kept, _} <- lists:reverse(Messages)];
kept(count, Messages, _Events) -> length(Messages);
kept(events, _Messages, Events) -> lists:reverse(Events).

hashed(Value) when byte_size(Value) > ?KEPT_WHOLE -> {sha256, crypto:hash(sha256, Value)};
hashed(Map) when is_map(Map) -> maps:map(fun(_, Value) -> hashed(Value) end, Map);
hashed(Other) -> Other.

answer(ping, #{<<"timestamp">> := Time}, Token) ->
    macula_peer_node:reply(Token, pong, #{timestamp => Time, server_time => Time});
answer(rpc_request, #{<<"procedure">> := <<"bytes">>, <<"args">> := Size}, Token) ->
    reply(Token, binary:copy(<<"b">>, Size));
answer(rpc_request, #{<<"procedure">> := <<"late">>, <<"args">> := Ms}, Token) ->
    spawn(fun() -> timer:sleep(Ms), reply(Token, <<"late">>) end);
answer(_Type, _Message, _Token) ->
    no_answer.

reply(Token, Result) ->
    Reply = #{request_id => <<"r">>, from_node => <<"n">>, result => Result},
    macula_peer_node:reply(Token, rpc_reply, Reply).

%% A request for the listener: `bytes' is answered with that many, `late' after that many milliseconds, others never.
rpc(Procedure, Args) ->
    #{request_id => <<"r">>, procedure => Procedure, args => Args, from_node => <<"n">>}.

%% ---- ports ----

%% A port without a listener. Below the range that the system hands out, so that it stays free.
closed_port() ->
    Port = 20000 + rand:uniform(10000),
    case gen_udp:open(Port, [inet6, {ipv6_v6only, false}]) of
        {ok, Socket} -> ok = gen_udp:close(Socket), Port;
        {error, eafnosupport} -> Port;
        {error, eaddrinuse} -> closed_port()
    end.

%% A free port for a listener.
free_port() ->
    {ok, Socket} = gen_udp:open(0),
    {ok, Port} = inet:port(Socket),
    ok = gen_udp:close(Socket),
    Port.

%% Bound, and never answers.
silent_port() ->
    Port = closed_port(),
    {ok, Socket} = gen_udp:open(Port, [binary, {ip, {127, 0, 0, 1}}, {active, false}]),
    {Socket, Port}.

endpoint(Port) ->
    endpoint("127.0.0.1", Port).

endpoint(Host, Port) ->
    iolist_to_binary([Host, $:, integer_to_list(Port)]).

%% ---- waiting and measuring ----

until(Condition) ->
    until(Condition, 10000).

%% Polls until the function returns true; fails with its last value.
until(Condition, Timeout) ->
    true = await(Condition, fun(Value) -> Value =:= true end, Timeout),
    ok.

await(Read, Wanted) ->
    await(Read, Wanted, 15000).

%% Reads until what is read is wanted, and returns it.
await(Read, Wanted, Timeout) ->
    poll(Read, Wanted, erlang:monotonic_time(millisecond) + Timeout).

poll(Read, Wanted, Deadline) ->
    Value = Read(),
    case {Wanted(Value), erlang:monotonic_time(millisecond) > Deadline} of
        {true, _} -> Value;
        {false, true} -> error({not_in_time, Value});
        {false, false} -> receive after 10 -> poll(Read, Wanted, Deadline) end
    end.

elapsed(Fun) ->
    {Us, Result} = timer:tc(Fun),
    {Us div 1000, Result}.

%% The results of Fun(1) to Fun(N), each in a process of its own, all started before the first result is awaited. A
%% mailbox that is not empty afterwards fails.
in_parallel(N, Fun) ->
    Workers = [spawn_monitor(fun() -> exit({result, Fun(I), mailbox()}) end) || I <- lists:seq(1, N)],
    [receive {'DOWN', Monitor, process, Pid, Reason} -> {result, Result, []} = Reason, Result end
     || {Pid, Monitor} <- Workers].

mailbox() ->
    {messages, Messages} = process_info(self(), messages),
    Messages.
