%% @private
%% @doc Asks macula where a node is. Each lookup runs in a process of its own with a deadline: macula's servers may be
%% slow, absent or call the connector themselves.
-module(macula_peer_resolver).

-export([resolve/1]).

-export([look_up/1]).
-export([ask/1]).

%% How long a lookup may take. The engine waits for its end only where it knows no other way.
-define(LOOKUP_TIMEOUT, 4500).

%% How many nodes the DHT asks, as in the original.
-define(NODES, 20).

%% @doc Begins to look up the ways to a node. What is found, if anything, is told to the engine.
-spec resolve(binary()) -> ok.
resolve(NodeId) ->
    _ = spawn(?MODULE, look_up, [NodeId]),
    ok.

%% @private
-spec look_up(binary()) -> ok | not_started | {error, term()}.
look_up(NodeId) ->
    macula_peer_nif:resolved(NodeId, endpoint(NodeId)).

%% What the DHT has.
-spec endpoint(binary()) -> macula_peer_call:ways().
endpoint(NodeId) ->
    case whereis(macula_routing_server) of
        undefined -> #{};
        Server -> found(contained(fun() -> find_value(Server, NodeId) end))
    end.

-spec find_value(pid() | port(), binary()) -> term().
find_value(Server, NodeId) ->
    Key = crypto:hash(sha256, <<"peer.endpoint.", NodeId/binary>>),
    %% The module is macula's; this application does not depend on it.
    apply(macula_routing_server, find_value, [Server, Key, ?NODES]).

-spec found(term()) -> macula_peer_call:ways().
found({ok, {ok, [Entry | _]}}) ->
    found({ok, {ok, Entry}});
found({ok, {ok, #{<<"host">> := Host, <<"port">> := Port} = Entry}})
  when is_integer(Port), is_binary(Host) orelse is_list(Host) ->
    Ways = #{endpoints => [iolist_to_binary([Host, $:, integer_to_list(Port)])]},
    case Entry of
        #{<<"fingerprint">> := Fingerprint} when is_binary(Fingerprint) -> Ways#{fingerprint => Fingerprint};
        _ -> Ways
    end;
found(_) ->
    #{}.

%% Exits, exceptions and slowness stay in the process that asks.
-spec contained(fun(() -> term())) -> {ok, term()} | error.
contained(Lookup) ->
    {Pid, Monitor} = spawn_monitor(?MODULE, ask, [Lookup]),
    receive
        {'DOWN', Monitor, process, Pid, {?MODULE, Result}} -> {ok, Result};
        {'DOWN', Monitor, process, Pid, _Reason} -> error
    after ?LOOKUP_TIMEOUT ->
        exit(Pid, kill),
        _ = erlang:demonitor(Monitor, [flush]),
        error
    end.

%% @private
-spec ask(fun(() -> term())) -> no_return().
ask(Lookup) ->
    exit({?MODULE, Lookup()}).
