%% @private
%% @doc Calls to a node by its id: the candidates come from the caller's options and the environment.
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
    case candidates_of_caller(Opts) of
        None when map_size(None) =:= 0 ->
            case Call({node, NodeId, none}, Timeout) of
                unlinked -> with_candidates(NodeId, None, macula_peer_call:left(Timeout, Start), Call);
                Result -> Result
            end;
        Candidates ->
            with_candidates(NodeId, Candidates, Timeout, Call)
    end;
call(_NodeId, Opts, _Call) ->
    {error, {invalid_option, {options, Opts}}}.

-spec with_candidates(binary(), macula_peer_call:candidates(), timeout(), call(Result)) -> Result.
with_candidates(NodeId, Candidates, Timeout, Call) ->
    {LastResorts, Reason} = macula_peer_config:bootstrap_peers(),
    case Call({node, NodeId, Candidates#{last_resorts => LastResorts}}, Timeout) of
        {error, {nat_connection_failed, {no_relay_available, _}}} ->
            {error, {nat_connection_failed, {no_relay_available, Reason}}};
        unlinked ->
            %% The engine has the candidates.
            error(unlinked);
        Result ->
            Result
    end.

-spec candidates_of_caller(map()) -> macula_peer_call:candidates().
candidates_of_caller(Opts) ->
    maps:fold(fun option/3, #{}, Opts).

-spec option(term(), term(), macula_peer_call:candidates()) -> macula_peer_call:candidates().
option(_Key, undefined, Candidates) -> Candidates;
option(endpoint, Endpoint, Candidates) -> Candidates#{endpoints => [Endpoint]};
option(relay_endpoint, {ok, Host, Port}, Candidates) -> Candidates#{relays => [host_port(Host, Port)]};
option(relay_endpoint, {Host, Port}, Candidates) -> Candidates#{relays => [host_port(Host, Port)]};
option(relay_endpoint, Relay, Candidates) -> Candidates#{relays => [Relay]};
option(skip_hole_punch, Skip, Candidates) when is_boolean(Skip) -> Candidates#{hole_punch => not Skip};
option(fingerprint, Fingerprint, Candidates) -> Candidates#{fingerprint => Fingerprint};
option(_Key, _Value, Candidates) -> Candidates.

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
