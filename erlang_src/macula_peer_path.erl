%% @private
%% @doc Calls to a node, wherever it is: what the caller's options and the environment say of the ways to it.
-module(macula_peer_path).

-export([call/3]).

%% The original's default, in milliseconds.
-define(TIMEOUT, 10000).

-type call(Result) :: fun((macula_peer_call:target(), timeout()) -> Result | unlinked).

%% @doc Calls a node over the link that there is, or says how it can be reached.
-spec call(binary(), macula_peer_connector:nat_opts(), call(Result)) -> Result | {error, macula_peer_error:invalid_option()}.
call(NodeId, Opts, Call) when is_map(Opts) ->
    Start = erlang:monotonic_time(millisecond),
    Timeout = maps:get(timeout, Opts, ?TIMEOUT),
    case ways_of_caller(Opts) of
        None when map_size(None) =:= 0 ->
            case Call({node, NodeId, none}, Timeout) of
                unlinked -> with_ways(NodeId, None, macula_peer_call:left(Timeout, Start), Call);
                Result -> Result
            end;
        Ways ->
            with_ways(NodeId, Ways, Timeout, Call)
    end;
call(_NodeId, Opts, _Call) ->
    {error, {invalid_option, {options, Opts}}}.

-spec with_ways(binary(), macula_peer_call:ways(), timeout(), call(Result)) -> Result.
with_ways(NodeId, Ways, Timeout, Call) ->
    {LastResorts, Reason} = macula_peer_config:bootstrap_peers(),
    case Call({node, NodeId, Ways#{last_resorts => LastResorts}}, Timeout) of
        {error, {nat_connection_failed, {no_relay_available, _}}} ->
            {error, {nat_connection_failed, {no_relay_available, Reason}}};
        unlinked ->
            %% The ways were said.
            error(unlinked);
        Result ->
            Result
    end.

-spec ways_of_caller(map()) -> macula_peer_call:ways().
ways_of_caller(Opts) ->
    maps:fold(fun way/3, #{}, Opts).

-spec way(term(), term(), macula_peer_call:ways()) -> macula_peer_call:ways().
way(_Key, undefined, Ways) -> Ways;
way(endpoint, Endpoint, Ways) -> Ways#{endpoints => [Endpoint]};
way(relay_endpoint, {ok, Host, Port}, Ways) -> Ways#{relays => [host_port(Host, Port)]};
way(relay_endpoint, {Host, Port}, Ways) -> Ways#{relays => [host_port(Host, Port)]};
way(relay_endpoint, Relay, Ways) -> Ways#{relays => [Relay]};
way(skip_hole_punch, Skip, Ways) when is_boolean(Skip) -> Ways#{hole_punch => not Skip};
way(fingerprint, Fingerprint, Ways) -> Ways#{fingerprint => Fingerprint};
way(_Key, _Value, Ways) -> Ways.

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
