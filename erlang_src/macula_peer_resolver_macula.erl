%% @doc Asks those of macula's own servers that run where a node is: the DHT for its endpoints
%% (`macula_routing_server'), the cache of NAT profiles (`macula_nat_cache'), the coordinator (`macula_nat_coordinator')
%% and the registry of relays (`macula_relay_registry').
-module(macula_peer_resolver_macula).

-behaviour(macula_peer_resolver).

-export([endpoints/1]).
-export([nat_profile/1]).
-export([relays/1]).
-export([request_connection/2]).
-export([report_result/3]).

%% How many nodes the DHT asks, as in macula.
-define(NODES, 20).

%% @doc What the DHT has under the key that macula's nodes store their endpoint at: a list of entries, or one.
-spec endpoints(binary()) -> [macula_peer_resolver:candidate()].
endpoints(NodeId) ->
    Key = crypto:hash(sha256, <<"peer.endpoint.", NodeId/binary>>),
    case ask(macula_routing_server, find_value, fun(Server) -> [Server, Key, ?NODES] end) of
        {ok, Entry} when is_map(Entry) -> [Entry];
        {ok, Entries} when is_list(Entries) -> Entries;
        _ -> []
    end.

-spec nat_profile(binary()) -> macula_peer_resolver:profile() | undefined.
nat_profile(NodeId) ->
    case ask(macula_nat_cache, get_from_dht, fun(_) -> [NodeId] end) of
        {ok, Profile} when is_map(Profile) -> Profile;
        _ -> undefined
    end.

%% @doc One relay, the same for every node.
-spec relays(binary()) -> [macula_peer_resolver:candidate()].
relays(_NodeId) ->
    case ask(macula_relay_registry, find_relay, fun(_) -> [<<>>] end) of
        {ok, #{endpoint := Endpoint}} -> [Endpoint];
        _ -> []
    end.

-spec request_connection(binary(), binary()) -> {ok, macula_peer_resolver:strategy(), term()} | {error, term()}.
request_connection(LocalNodeId, NodeId) ->
    ask(macula_nat_coordinator, request_connection, fun(_) -> [LocalNodeId, NodeId] end).

-spec report_result(term(), binary(), success | failure) -> term().
report_result(SessionId, LocalNodeId, Result) ->
    ask(macula_nat_coordinator, report_result, fun(_) -> [SessionId, LocalNodeId, Result] end).

%% Calls a function of the module that its server is registered as. These are macula's; this application does not depend on
%% it. A server that is waiting for what is looked up cannot answer: macula's send from their own callbacks.
-spec ask(module(), atom(), fun((pid() | port()) -> [term()])) -> term().
ask(Module, Function, Args) ->
    Server = whereis(Module),
    case Server =/= undefined andalso not lists:member(Server, callers()) of
        true -> apply(Module, Function, Args(Server));
        false -> {error, unavailable}
    end.

-spec callers() -> [pid()].
callers() ->
    case get('$callers') of
        Callers when is_list(Callers) -> Callers;
        _ -> []
    end.
