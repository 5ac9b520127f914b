%% @private
%% @doc Calls of the native library that may have to wait: the answer then comes as one tagged message.
-module(macula_peer_call).

-export([send/4]).
-export([send/5]).
-export([request/4]).
-export([stats/0]).
-export([nat_profile/0]).
-export([access/0]).
-export([kick/1]).
-export([relay_nodes/1]).
-export([left/2]).
-export([encode/2]).

-export_type([target/0, candidates/0]).

-type target() :: macula_peer_connector:endpoint() | {node, NodeId :: binary(), candidates() | none}.
%% Without candidates, a message to a node goes over an existing link; without one the answer is `unlinked'.

-type candidates() :: #{endpoints => [macula_peer_connector:endpoint()], relays => [macula_peer_connector:endpoint()],
                  last_resorts => [macula_peer_connector:endpoint()], fingerprint => binary(), hole_punch => boolean()}.

%% The least time that encoding a message of many terms may take, in milliseconds, whatever its timeout: a timeout of 0
%% means to do what is possible at once, and with a free dirty scheduler encoding is.
-define(ENCODING, 200).

%% @doc Sends a message.
-spec send(target(), term(), term(), term()) -> ok | unlinked | {error, macula_peer_error:send_to_node()}.
send(To, Type, Msg, Timeout) ->
    send(To, Type, Msg, Timeout, undefined).

%% @doc Sends a message. `Local' is the node id that this node looks others up as.
-spec send(target(), term(), term(), term(), term()) -> ok | unlinked | {error, macula_peer_error:send_to_node()}.
send(To, Type, Msg, Timeout, Local) ->
    send_content(To, {Type, Msg}, Timeout, Local).

-spec send_content(target(), macula_peer_nif:content(), term(), term()) ->
          ok | unlinked | {error, macula_peer_error:send_to_node()}.
send_content(To, Content, Timeout, Local) ->
    Tag = make_ref(),
    try macula_peer_nif:send(Tag, To, Content, Timeout) of
        ok -> ok;
        heavy -> encoded(Content, Timeout, fun(Frame, Left) -> send_content(To, Frame, Left, Local) end);
        Answer -> answer(Answer, Tag, To, Local, fun() -> send_content(To, Content, Timeout, Local) end)
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

%% @doc Sends a message and waits for the frame that answers it.
-spec request(target(), term(), term(), term()) ->
          {ok, {macula_peer_wire:type(), map()}} | unlinked | {error, macula_peer_error:request_to_node()}.
request(To, Type, Msg, Timeout) ->
    request_content(To, {Type, Msg}, Timeout).

-spec request_content(target(), macula_peer_nif:content(), term()) ->
          {ok, {macula_peer_wire:type(), map()}} | unlinked | {error, macula_peer_error:request_to_node()}.
request_content(To, Content, Timeout) ->
    Tag = make_ref(),
    try macula_peer_nif:request(Tag, To, Content, Timeout) of
        heavy -> encoded(Content, Timeout, fun(Frame, Left) -> request_content(To, Frame, Left) end);
        Answer -> answer(Answer, Tag, To, undefined, fun() -> request_content(To, Content, Timeout) end)
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

%% Encodes a message on a dirty scheduler, in a separate process: when other code keeps all of them busy, the caller still keeps
%% its timeout.
-spec encoded({term(), term()}, term(), fun((macula_peer_nif:frame(), term()) -> Result)) ->
          Result | {error, timeout | macula_peer_wire:encode_error() | macula_peer_error:native()}.
encoded({Type, Msg}, Timeout, Call) ->
    Start = erlang:monotonic_time(millisecond),
    {Pid, Monitor} = spawn_monitor(?MODULE, encode, [Type, Msg]),
    receive
        {'DOWN', Monitor, process, Pid, {?MODULE, {ok, Frame}}} -> Call(Frame, left(Timeout, Start));
        {'DOWN', Monitor, process, Pid, {?MODULE, Error}} -> Error;
        {'DOWN', Monitor, process, Pid, _Killed} -> {error, timeout}
    after patience(Timeout) ->
        true = demonitor(Monitor, [flush]),
        true = exit(Pid, kill),
        {error, timeout}
    end.

%% @private
-spec encode(term(), term()) -> no_return().
encode(Type, Msg) ->
    Encoded = try macula_peer_nif:encode_frame(Type, Msg)
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end,
    exit({?MODULE, Encoded}).

%% An invalid timeout is refused after the message has been checked.
-spec patience(term()) -> timeout().
patience(Timeout) when is_integer(Timeout), Timeout >= 0, Timeout < 1 bsl 32 -> max(Timeout, ?ENCODING);
patience(_Timeout) -> infinity.

%% @doc What is left of a timeout that began to run at a time, in milliseconds of monotonic time.
-spec left(term(), integer()) -> term().
left(Timeout, Start) when is_integer(Timeout), Timeout > 0 ->
    max(0, Timeout - (erlang:monotonic_time(millisecond) - Start));
left(Timeout, _Start) ->
    Timeout.

-spec answer(Answer, reference(), target(), term(), fun(() -> Result)) -> Result
              when Answer :: Result | wait | resolve | not_started,
                   Result :: ok | unlinked | {ok, {macula_peer_wire:type(), map()}} | {error, macula_peer_error:request_to_node()}.
answer(wait, Tag, _To, _Local, _Again) ->
    receive {Tag, Result} -> finished(Result) end;
answer(resolve, Tag, {node, NodeId, _Ways}, Local, _Again) ->
    ok = macula_peer_lookups:look_up(NodeId, Local, Tag),
    receive
        {Tag, Answer} ->
            Result = finished(Answer),
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

-spec finished(Result | {unfinished, macula_peer_wire:type(), macula_peer_nif:unfinished()}) -> Result
              when Result :: ok | {ok, {macula_peer_wire:type(), map()}} | {error, macula_peer_error:request_to_node()}.
finished({unfinished, Type, Msg}) -> {ok, {Type, macula_peer_finisher:finish(Msg)}};
finished(Result) -> Result.

%% @doc The engine's counters. They are not made on a scheduler, dirty or not, so work there does not delay them.
-spec stats() -> macula_peer_node:stats() | not_started | {error, macula_peer_error:native()}.
stats() ->
    Tag = make_ref(),
    told(macula_peer_nif:stats(Tag), Tag).

%% @doc What is known of the NAT that this node is behind; as {@link stats/0}.
-spec nat_profile() -> macula_peer_node:nat_profile() | not_started | {error, macula_peer_error:native()}.
nat_profile() ->
    Tag = make_ref(),
    told(macula_peer_nif:nat_profile(Tag), Tag).

%% @doc Which nodes may connect to this one; as {@link stats/0}.
-spec access() -> macula_peer_node:access() | not_started | {error, macula_peer_error:native()}.
access() ->
    Tag = make_ref(),
    told(macula_peer_nif:access(Tag), Tag).

%% @doc Disconnects a node; waits as {@link stats/0} does.
-spec kick(term()) -> ok | not_started | {error, not_found | {invalid_kick, term()} | macula_peer_error:native()}.
kick(Target) ->
    Tag = make_ref(),
    told(macula_peer_nif:kick(Tag, Target), Tag).

%% @doc Nodes of this relay; as {@link stats/0}.
-spec relay_nodes(non_neg_integer()) ->
          macula_peer_node:relay_nodes() | not_started | {error, not_a_relay | macula_peer_error:native()}.
relay_nodes(From) ->
    Tag = make_ref(),
    told(macula_peer_nif:relay_nodes(Tag, From), Tag).

-spec told(wait | Told, reference()) -> Told.
told(wait, Tag) -> receive {Tag, Told} -> Told end;
told(Told, _Tag) -> Told.
