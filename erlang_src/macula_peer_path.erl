%% @private
%% @doc The ways to a node, one after the other: its endpoint, then a relay.
-module(macula_peer_path).

-export([first/4]).

-type send() :: fun((macula_peer_connector:endpoint(), timeout()) -> ok | {error, term()}).

%% What a direct attempt may take while there is another way.
-define(DIRECT_SHARE, 2).

%% @doc Sends over the first way that works.
-spec first(binary(), macula_peer_connector:nat_opts(), timeout(), send()) -> ok | {error, term()}.
first(NodeId, Opts, Timeout, Send) ->
    Deadline = deadline(Timeout),
    Relay = relay(Opts),
    case endpoint(NodeId, Opts, share(Timeout, Relay)) of
        {ok, Endpoint} ->
            case Send(Endpoint, share(left(Deadline), Relay)) of
                ok -> ok;
                {error, {invalid_timeout, _}} = Error -> Error;
                {error, {invalid_endpoint, _}} = Error -> Error;
                {error, _} -> over_relay(Relay, Deadline, Send)
            end;
        {error, endpoint_not_found} ->
            over_relay(Relay, Deadline, Send)
    end.

-spec endpoint(binary(), map(), timeout()) -> {ok, macula_peer_connector:endpoint()} | {error, endpoint_not_found}.
endpoint(_NodeId, #{endpoint := Endpoint}, _Timeout) when Endpoint =/= undefined ->
    {ok, Endpoint};
endpoint(NodeId, _Opts, Timeout) ->
    macula_peer_resolver:endpoint(NodeId, Timeout).

-spec over_relay({ok, term()} | {error, term()}, integer() | infinity, send()) -> ok | {error, term()}.
over_relay({ok, Relay}, Deadline, Send) ->
    case Send(Relay, left(Deadline)) of
        ok -> ok;
        {error, {connect_failed, Reason}} -> nat_error({relay_connect_failed, Reason});
        {error, Reason} -> nat_error({relay_connect_failed, Reason})
    end;
over_relay({error, Reason}, _Deadline, _Send) ->
    nat_error({no_relay_available, Reason}).

-spec nat_error(term()) -> {error, {nat_connection_failed, term()}}.
nat_error(Reason) ->
    {error, {nat_connection_failed, Reason}}.

%% The relay that the options name, else the first of MACULA_BOOTSTRAP_PEERS.
-spec relay(map()) -> {ok, macula_peer_connector:endpoint()} | {error, term()}.
relay(#{relay_endpoint := {ok, Host, Port}}) -> {ok, host_port(Host, Port)};
relay(#{relay_endpoint := {Host, Port}}) -> {ok, host_port(Host, Port)};
relay(#{relay_endpoint := Endpoint}) when Endpoint =/= undefined -> {ok, Endpoint};
relay(_Opts) -> bootstrap_peer(os:getenv("MACULA_BOOTSTRAP_PEERS", "")).

-spec host_port(term(), term()) -> binary() | undefined.
host_port(Host, Port) when is_integer(Port), is_binary(Host) orelse is_list(Host) ->
    try unicode:characters_to_binary([Host, $:, integer_to_list(Port)]) of
        Text when is_binary(Text) -> Text;
        _ -> undefined
    catch
        error:badarg -> undefined
    end;
host_port(_Host, _Port) ->
    %% Refused by the endpoint parser, with its own term.
    undefined.

-spec bootstrap_peer(string()) -> {ok, string()} | {error, term()}.
bootstrap_peer(Peers) ->
    case [string:trim(Peer) || Peer <- string:lexemes(Peers, ","), string:trim(Peer) =/= ""] of
        [] -> {error, no_bootstrap_peers};
        [First | _] -> checked(First)
    end.

-spec checked(string()) -> {ok, string()} | {error, invalid_bootstrap_format | invalid_bootstrap_port}.
checked(Peer) ->
    case string:split(Peer, ":", trailing) of
        [_, Port] ->
            case string:to_integer(Port) of
                {Number, ""} when Number > 0, Number < 65536 -> {ok, Peer};
                _ -> {error, invalid_bootstrap_port}
            end;
        _ ->
            {error, invalid_bootstrap_format}
    end.

-spec deadline(timeout()) -> integer() | infinity.
deadline(Timeout) when is_integer(Timeout) -> erlang:monotonic_time(millisecond) + Timeout;
deadline(Other) -> Other.

-spec left(integer() | infinity) -> timeout().
left(Deadline) when is_integer(Deadline) -> max(0, Deadline - erlang:monotonic_time(millisecond));
left(Other) -> Other.

-spec share(timeout(), {ok, term()} | {error, term()}) -> timeout().
share(Left, {ok, _}) when is_integer(Left) -> Left div ?DIRECT_SHARE;
share(Left, _) -> Left.
