%% @doc Sends messages to peers. The functions, their results and their errors are those of the module of the same name
%% in macula 0.14.3.
%%
%% Every function keeps its timeout, which covers name lookup, dialling, handshake, sending and, where there is one, the
%% answer. `0' tries what can be done at once, `infinity' waits as long as it takes. Only a dial has its own limit, the
%% `connect_timeout' of the settings (5 s): a call to a silent peer fails then at the latest. The caller gets its result as
%% the return value and never a message.
%%
%% `ok' means accepted: the message arrives, or is counted in {@link macula_peer_endpoint:stats/0} and reported to the
%% handler as undelivered.
-module(macula_peer_connector).

-export([send_message/3]).
-export([send_message/4]).
-export([send_message_and_wait/4]).
-export([send_message_nat_aware/4]).
-export([send_message_nat_aware/5]).

-export_type([endpoint/0, nat_opts/0]).

-type endpoint() :: binary() | string().
%% `host:port', `https://host:port' or `http://host:port'; the host is a name, an IPv4 address or an IPv6 address, with or
%% without brackets.

-type nat_opts() :: #{endpoint => endpoint(),
                      relay_endpoint => endpoint() | {Host :: binary() | string(), inet:port_number()}
                                      | {ok, Host :: binary() | string(), inet:port_number()},
                      skip_hole_punch => boolean(),
                      timeout => timeout()}.

%% The original's defaults, in milliseconds.
-define(SEND_TIMEOUT, 5000).
-define(NAT_TIMEOUT, 10000).

%% @equiv send_message(Endpoint, Type, Msg, 5000)
-spec send_message(endpoint(), macula_peer_wire:type(), map()) -> ok | {error, term()}.
send_message(Endpoint, Type, Msg) ->
    send_message(Endpoint, Type, Msg, ?SEND_TIMEOUT).

%% @doc Sends a message.
%%
%% ```
%% ok = macula_peer_connector:send_message(<<"node.example:9443">>, dht_store, #{key => Key, value => Value}).
%% '''
-spec send_message(endpoint(), macula_peer_wire:type(), map(), timeout()) -> ok | {error, term()}.
send_message(Endpoint, Type, Msg, Timeout) ->
    Tag = make_ref(),
    try macula_peer_nif:send(Tag, Endpoint, Type, Msg, Timeout) of
        ok -> ok;
        wait -> receive {Tag, Result} -> Result end;
        dirty -> send_large(Endpoint, Type, Msg, Timeout);
        not_started -> started(fun() -> send_message(Endpoint, Type, Msg, Timeout) end);
        {error, _} = Error -> Error
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

%% @doc Sends a message and waits for the frame that the peer answers with.
-spec send_message_and_wait(endpoint(), macula_peer_wire:type(), map(), timeout()) ->
          {ok, {macula_peer_wire:type(), map()}} | {error, term()}.
send_message_and_wait(Endpoint, Type, Msg, Timeout) ->
    Tag = make_ref(),
    try macula_peer_nif:request(Tag, Endpoint, Type, Msg, Timeout) of
        wait -> receive {Tag, Result} -> Result end;
        dirty -> request_large(Endpoint, Type, Msg, Timeout);
        not_started -> started(fun() -> send_message_and_wait(Endpoint, Type, Msg, Timeout) end);
        {error, _} = Error -> Error
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

%% @equiv send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg, #{})
-spec send_message_nat_aware(binary(), binary(), macula_peer_wire:type(), map()) -> ok | {error, term()}.
send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg) ->
    send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg, #{}).

%% @doc Sends a message to a node: to the endpoint that the options name or that macula knows, else through a relay, which
%% gets the message itself.
-spec send_message_nat_aware(binary(), binary(), macula_peer_wire:type(), map(), nat_opts()) -> ok | {error, term()}.
send_message_nat_aware(_LocalNodeId, _TargetNodeId, _Type, _Msg, Opts) when not is_map(Opts) ->
    {error, {invalid_option, {options, Opts}}};
send_message_nat_aware(_LocalNodeId, TargetNodeId, Type, Msg, Opts) ->
    Timeout = maps:get(timeout, Opts, ?NAT_TIMEOUT),
    case macula_peer_wire:encode(Type, Msg) of
        {ok, _Frame} when Timeout =/= infinity, not (is_integer(Timeout) andalso Timeout >= 0) ->
            {error, {invalid_timeout, Timeout}};
        {ok, _Frame} ->
            Send = fun(Endpoint, Left) -> send_message(Endpoint, Type, Msg, Left) end,
            macula_peer_path:first(TargetNodeId, Opts, Timeout, Send);
        {error, _} = Error ->
            Error
    end.

%% What is large is encoded on a dirty scheduler.
-spec send_large(term(), term(), term(), term()) -> ok | {error, term()}.
send_large(Endpoint, Type, Msg, Timeout) ->
    Tag = make_ref(),
    case macula_peer_nif:send_dirty(Tag, Endpoint, Type, Msg, Timeout) of
        ok -> ok;
        wait -> receive {Tag, Result} -> Result end;
        not_started -> started(fun() -> send_large(Endpoint, Type, Msg, Timeout) end);
        {error, _} = Error -> Error
    end.

-spec request_large(term(), term(), term(), term()) -> {ok, {macula_peer_wire:type(), map()}} | {error, term()}.
request_large(Endpoint, Type, Msg, Timeout) ->
    Tag = make_ref(),
    case macula_peer_nif:request_dirty(Tag, Endpoint, Type, Msg, Timeout) of
        wait -> receive {Tag, Result} -> Result end;
        not_started -> started(fun() -> request_large(Endpoint, Type, Msg, Timeout) end);
        {error, _} = Error -> Error
    end.

-spec started(fun(() -> Result)) -> Result | {error, term()}.
started(Retry) ->
    case macula_peer_engine:ensure_started() of
        ok -> Retry();
        {error, _} = Error -> Error
    end.
