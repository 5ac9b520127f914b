%% @private
%% @doc One set of lookups: everything that a resolver can be asked about a node, side by side, each in a process of its own
%% with a deadline. What they find is told to the engine as it comes.
-module(macula_peer_lookup).

-export([start_link/4]).
-export([ended/2]).

-export([init/5]).
-export([ask/4]).

%% In milliseconds. The engine itself stops waiting after 5 s, as long as a dial may take; this is before.
-define(LOOKUP_TIMEOUT, 4500).

%% How long the result of a call is waited for, to report it.
-define(REPORT_WITHIN, 60000).

%% Ways that are taken from one answer, as many as a peer keeps, and bytes of one: a host name has 253 at the most.
-define(MAX_WAYS, 16).
-define(MAX_WAY_SIZE, 300).

%% In words, 32 MB: a process that is given more than that, by whatever it asks, is killed.
-define(MAX_HEAP, #{size => 4 bsl 20, kill => true, error_logger => false}).

-type kind() :: endpoints | nat_profile | relays | bootstrap_peers | request_connection | report_result.

-type state() :: #{owner := pid(), resolver := module(), local := binary() | undefined, node := binary(),
                   %% Whose call it is for, and who waits for that one.
                   callers := [pid(), ...], caller := reference(),
                   %% Who is at what.
                   asking := #{pid() => kind()}, timer := reference(),
                   %% Whether the engine knows that no more will be found.
                   resolved := boolean(),
                   session := {ok, term()} | none, result := success | failure | unknown}.

%% @doc Starts a set. It ends with the process that started it, at the latest.
-spec start_link(module(), binary() | undefined, binary(), [pid(), ...]) -> pid().
start_link(Resolver, Local, NodeId, Callers) ->
    spawn_link(?MODULE, init, [self(), Resolver, Local, NodeId, Callers]).

%% @doc Tells what became of the call.
-spec ended(pid(), success | failure) -> ok.
ended(Set, Result) ->
    Set ! {?MODULE, Result},
    ok.

%% @private
-spec init(pid(), module(), binary() | undefined, binary(), [pid(), ...]) -> ok.
init(Owner, Resolver, Local, NodeId, [Caller | _] = Callers) ->
    _ = process_flag(trap_exit, true),
    %% Where modules are loaded when they are called, nobody has called the first.
    _ = code:ensure_loaded(Resolver),
    Strategy = [{request_connection, [Local, NodeId]} || Local =/= undefined],
    Lookups = [{endpoints, [NodeId]}, {nat_profile, [NodeId]}, {relays, [NodeId]}, {bootstrap_peers, []} | Strategy],
    Asking = maps:from_list([{start(Resolver, Kind, Args, Callers), Kind}
                             || {Kind, Args} <- Lookups, erlang:function_exported(Resolver, Kind, length(Args))]),
    next(#{owner => Owner, resolver => Resolver, local => Local, node => NodeId, callers => Callers,
           caller => monitor(process, Caller), asking => Asking, resolved => false, session => none, result => unknown,
           timer => erlang:start_timer(?LOOKUP_TIMEOUT, self(), lookups)}).

-spec next(state()) -> ok.
next(#{resolved := false, node := NodeId, owner := Owner, asking := Asking} = State) ->
    case maps:values(Asking) -- [request_connection] of
        [] ->
            %% An advice is no way. In this order: another set may begin when the engine has been told.
            ok = gen_server:cast(Owner, {looked_up, NodeId}),
            _ = macula_peer_nif:resolved(NodeId, true),
            next(State#{resolved := true});
        _ ->
            wait(State)
    end;
next(#{asking := Asking} = State) when map_size(Asking) > 0 ->
    wait(State);
next(#{session := none}) ->
    ok;
next(#{result := unknown} = State) ->
    wait(State);
next(#{session := {ok, Session}} = State) ->
    #{resolver := Resolver, local := Local, result := Result, callers := Callers} = State,
    case erlang:function_exported(Resolver, report_result, 3) of
        true ->
            Pid = start(Resolver, report_result, [Session, Local, Result], Callers),
            wait(State#{session := none, asking := #{Pid => report_result},
                        timer := erlang:start_timer(?LOOKUP_TIMEOUT, self(), lookups)});
        false ->
            ok
    end.

-spec wait(state()) -> ok.
wait(#{asking := Asking, timer := Timer, caller := Caller, owner := Owner} = State) ->
    receive
        {'EXIT', Pid, Outcome} when is_map_key(Pid, Asking) ->
            {Kind, Others} = maps:take(Pid, Asking),
            next(answered(Kind, Outcome, State#{asking := Others}));
        {timeout, Timer, lookups} ->
            %% Their ends come as messages.
            ok = end_lookups(State),
            next(State#{timer := erlang:start_timer(?REPORT_WITHIN, self(), result)});
        {timeout, Timer, result} ->
            next(first_result(failure, State));
        {?MODULE, Result} ->
            next(State#{result := Result});
        {'DOWN', Caller, process, _, _} ->
            next(first_result(failure, State));
        {'EXIT', Owner, Reason} ->
            ok = end_lookups(State),
            exit(Reason);
        {'EXIT', _Pid, _Reason} ->
            next(State)
    end.

-spec answered(kind(), term(), state()) -> state().
answered(request_connection, {?MODULE, {ok, _} = Session}, State) ->
    State#{session := Session};
answered(request_connection, {?MODULE, none}, State) ->
    State;
answered(report_result, {?MODULE, _}, State) ->
    State;
answered(_Kind, {?MODULE, Found}, #{node := NodeId} = State) ->
    %% One by one: what is wrong with a way says nothing of the others.
    ok = lists:foreach(fun(Ways) -> found(NodeId, Ways) end, Found),
    State;
answered(Kind, Failure, #{node := NodeId} = State) ->
    logger:debug("macula_peer_connector: ~p of ~p: ~0tP", [Kind, NodeId, Failure, 30]),
    State.

-spec found(binary(), macula_peer_call:ways()) -> ok.
found(NodeId, Ways) ->
    case macula_peer_nif:found(NodeId, Ways) of
        ok -> ok;
        Refused -> logger:debug("macula_peer_connector: a way to ~p: ~0tP", [NodeId, Refused, 30])
    end.

-spec first_result(failure, state()) -> state().
first_result(Result, #{result := unknown} = State) -> State#{result := Result};
first_result(_Result, State) -> State.

-spec end_lookups(state()) -> ok.
end_lookups(#{asking := Asking}) ->
    lists:foreach(fun(Pid) -> exit(Pid, kill) end, maps:keys(Asking)).

%% ---- one lookup ----

-spec start(module(), kind(), [term()], [pid(), ...]) -> pid().
start(Resolver, Kind, Args, Callers) ->
    spawn_opt(?MODULE, ask, [Resolver, Kind, Args, Callers], [link, {max_heap_size, ?MAX_HEAP}]).

%% @private
-spec ask(module(), kind(), [term()], [pid(), ...]) -> no_return().
ask(Resolver, Kind, Args, Callers) ->
    _ = put('$callers', Callers),
    %% What was said may be of any size and form, and stays here.
    Outcome = try {?MODULE, understood(Kind, apply(Resolver, Kind, Args))}
    catch
        Class:Reason -> unicode:characters_to_binary(io_lib:format("~0tP", [{Class, Reason}, 30]))
    end,
    exit(Outcome).

-spec understood(kind(), term()) -> [macula_peer_call:ways()] | {ok, term()} | none.
understood(endpoints, Ways) ->
    [with_fingerprint(Way, #{endpoints => [Endpoint]}) || {Way, Endpoint} <- ways(Ways)];
understood(nat_profile, #{reflexive_address := Address} = Profile) ->
    [#{endpoints => [Endpoint]} || receives(Profile), {_, Endpoint} <- ways([Address])];
understood(relays, Ways) ->
    [#{relays => [Relay]} || {_, Relay} <- ways(Ways)];
understood(bootstrap_peers, Ways) ->
    [#{last_resorts => [Relay]} || {_, Relay} <- ways(Ways)];
understood(request_connection, {ok, Strategy, Session})
  when Strategy =:= direct; Strategy =:= hole_punch; Strategy =:= relay ->
    {ok, Session};
understood(request_connection, _Other) ->
    none;
understood(_Kind, _Other) ->
    [].

%% Whether a node gets what it did not ask for.
-spec receives(map()) -> boolean().
receives(#{requires_relay := true}) -> false;
receives(#{can_receive_unsolicited := Receives}) -> Receives =:= true;
receives(#{mapping_policy := ei, filtering_policy := ei}) -> true;
receives(#{}) -> false.

-spec with_fingerprint(term(), macula_peer_call:ways()) -> macula_peer_call:ways().
with_fingerprint(#{<<"fingerprint">> := Fingerprint}, Ways) -> Ways#{fingerprint => Fingerprint};
with_fingerprint(#{fingerprint := Fingerprint}, Ways) -> Ways#{fingerprint => Fingerprint};
with_fingerprint(_Way, Ways) -> Ways.

%% The first of them that are endpoints.
-spec ways(term()) -> [{term(), binary()}].
ways(Ways) ->
    [{Way, Endpoint} || Way <- first(?MAX_WAYS, Ways), {ok, Endpoint} <- [endpoint(Way)]].

%% However long the list is, and whatever it ends in.
-spec first(non_neg_integer(), term()) -> [term()].
first(N, [Way | Ways]) when N > 0 -> [Way | first(N - 1, Ways)];
first(_N, _Ways) -> [].

-spec endpoint(term()) -> {ok, binary()} | error.
endpoint(#{<<"host">> := Host, <<"port">> := Port}) -> host_port(Host, Port);
endpoint(#{host := Host, port := Port}) -> host_port(Host, Port);
endpoint({Host, Port}) -> host_port(Host, Port);
endpoint(Endpoint) when is_binary(Endpoint); is_list(Endpoint) -> text(Endpoint);
endpoint(_Other) -> error.

-spec host_port(term(), term()) -> {ok, binary()} | error.
host_port(Host, Port) when is_tuple(Host) ->
    case inet:is_ip_address(Host) of
        true -> host_port(inet:ntoa(Host), Port);
        false -> error
    end;
host_port(Host, Port) when is_integer(Port), is_binary(Host) orelse is_list(Host) ->
    text([Host, $:, integer_to_binary(Port)]);
host_port(_Host, _Port) ->
    error.

-spec text(iodata()) -> {ok, binary()} | error.
text(Text) ->
    try unicode:characters_to_binary(Text) of
        Binary when is_binary(Binary), byte_size(Binary) =< ?MAX_WAY_SIZE -> {ok, Binary};
        _ -> error
    catch
        error:badarg -> error
    end.
