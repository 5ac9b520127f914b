%% @private
%% @doc Asks macula where a node is. Each lookup runs in a process of its own with a deadline: macula's servers may be
%% slow, absent or call the connector themselves.
-module(macula_peer_resolver).

-export([endpoint/2]).

-export([ask/1]).

%% How long a lookup may take when the call itself waits for ever.
-define(LOOKUP_TIMEOUT, 5000).

%% How many nodes the DHT asks, as in the original.
-define(NODES, 20).

%% @doc The endpoint that the DHT has for a node.
-spec endpoint(binary(), timeout()) -> {ok, binary()} | {error, endpoint_not_found}.
endpoint(NodeId, Timeout) when is_binary(NodeId) ->
    case whereis(macula_routing_server) of
        undefined -> {error, endpoint_not_found};
        Server -> found(contained(fun() -> find_value(Server, NodeId) end, min(Timeout, ?LOOKUP_TIMEOUT)))
    end;
endpoint(_NodeId, _Timeout) ->
    {error, endpoint_not_found}.

-spec find_value(pid() | port(), binary()) -> term().
find_value(Server, NodeId) ->
    Key = crypto:hash(sha256, <<"peer.endpoint.", NodeId/binary>>),
    %% The module is macula's; this application does not depend on it.
    apply(macula_routing_server, find_value, [Server, Key, ?NODES]).

-spec found(term()) -> {ok, binary()} | {error, endpoint_not_found}.
found({ok, {ok, [Entry | _]}}) -> found({ok, {ok, Entry}});
found({ok, {ok, #{<<"host">> := Host, <<"port">> := Port}}}) when is_integer(Port), is_binary(Host) orelse is_list(Host) ->
    {ok, iolist_to_binary([Host, $:, integer_to_list(Port)])};
found(_) ->
    {error, endpoint_not_found}.

%% Exits, exceptions and slowness stay in the process that asks.
-spec contained(fun(() -> term()), timeout()) -> {ok, term()} | error.
contained(Lookup, Timeout) ->
    {Pid, Monitor} = spawn_monitor(?MODULE, ask, [Lookup]),
    receive
        {'DOWN', Monitor, process, Pid, {?MODULE, Result}} -> {ok, Result};
        {'DOWN', Monitor, process, Pid, _Reason} -> error
    after Timeout ->
        exit(Pid, kill),
        _ = erlang:demonitor(Monitor, [flush]),
        error
    end.

%% @private
-spec ask(fun(() -> term())) -> no_return().
ask(Lookup) ->
    exit({?MODULE, Lookup()}).
