%% @private
%% @doc Calls of the native library that may have to wait: the answer then comes as one tagged message.
-module(macula_peer_call).

-export([send/4]).
-export([send/5]).
-export([request/4]).

-export_type([target/0, ways/0]).

-type target() :: macula_peer_connector:endpoint() | {node, NodeId :: binary(), ways() | none}.
%% A node without ways is only sent to over a link that there is; otherwise the answer is `unlinked'.

-type ways() :: #{endpoints => [macula_peer_connector:endpoint()], relays => [macula_peer_connector:endpoint()],
                  last_resorts => [macula_peer_connector:endpoint()], fingerprint => binary(), hole_punch => boolean()}.

%% @doc Sends a message.
-spec send(target(), term(), term(), term()) -> ok | unlinked | {error, term()}.
send(To, Type, Msg, Timeout) ->
    send(To, Type, Msg, Timeout, undefined).

%% @doc Sends a message. `Local' is the node id that this node looks others up as.
-spec send(target(), term(), term(), term(), term()) -> ok | unlinked | {error, term()}.
send(To, Type, Msg, Timeout, Local) ->
    Tag = make_ref(),
    try macula_peer_nif:send(Tag, To, Type, Msg, Timeout) of
        ok -> ok;
        dirty -> answer(macula_peer_nif:send_dirty(Tag, To, Type, Msg, Timeout), Tag, To, Local,
                        fun() -> send(To, Type, Msg, Timeout, Local) end);
        Answer -> answer(Answer, Tag, To, Local, fun() -> send(To, Type, Msg, Timeout, Local) end)
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

%% @doc Sends a message and waits for the frame that answers it.
-spec request(target(), term(), term(), term()) ->
          {ok, {macula_peer_wire:type(), map()}} | unlinked | {error, term()}.
request(To, Type, Msg, Timeout) ->
    Tag = make_ref(),
    Again = fun() -> request(To, Type, Msg, Timeout) end,
    try macula_peer_nif:request(Tag, To, Type, Msg, Timeout) of
        dirty -> answer(macula_peer_nif:request_dirty(Tag, To, Type, Msg, Timeout), Tag, To, undefined, Again);
        Answer -> answer(Answer, Tag, To, undefined, Again)
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

-spec answer(Answer, reference(), target(), term(), fun(() -> Answer)) -> Answer
              when Answer :: ok | unlinked | {ok, term()} | {error, term()} | wait | resolve | not_started.
answer(wait, Tag, _To, _Local, _Again) ->
    receive {Tag, Result} -> Result end;
answer(resolve, Tag, {node, NodeId, _Ways}, Local, _Again) ->
    ok = macula_peer_lookups:look_up(NodeId, Local, Tag),
    receive
        {Tag, Result} ->
            ok = macula_peer_lookups:ended(Tag, Result),
            Result
    end;
answer(not_started, _Tag, _To, _Local, Again) ->
    case macula_peer_engine:ensure_started() of
        ok -> Again();
        {error, _} = Error -> Error
    end;
answer(Answer, _Tag, _To, _Local, _Again) ->
    Answer.
