%% @private
%% @doc One set of lookups: everything that a resolver can be asked about a node, at the same time, each question in a process of
%% its own with a deadline. The engine is told what they find as it comes. A set ends with the process that started it, at the
%% latest.
%%
%% The states: `asking'; `called', while the call that the node is looked up for goes on and a coordinator wants its result;
%% `reporting' that result.
-module(macula_peer_lookup).

-behaviour(gen_statem).

-include("macula_peer_log.hrl").

-export([start_link/4]).
-export([ended/2]).

-export([init/1]).
-export([callback_mode/0]).
-export([asking/3]).
-export([called/3]).
-export([reporting/3]).
-export([terminate/3]).
-export([ask/4]).

%% In milliseconds. The engine itself stops waiting after 5 s, as long as a dial may take; this is before.
-define(LOOKUP_TIMEOUT, 4500).

%% How long the set waits for the result of the call, in milliseconds.
-define(REPORT_WITHIN, 60000).

%% Candidates that are taken from one answer, as many as a peer keeps, and bytes of one: a host name has at most 253.
-define(MAX_CANDIDATES, 16).
-define(MAX_WAY_SIZE, 300).

%% In words, 32 MB: a process that receives more than that, from any server, is killed.
-define(MAX_HEAP, #{size => 4 bsl 20, kill => true, error_logger => false}).

-type kind() :: endpoints | nat_profile | relays | bootstrap_peers | request_connection | report_result.

-type data() :: #{owner := pid(), resolver := module(), local := binary() | undefined, node := binary(),
                  %% The process whose call it is for, and its callers.
                  callers := [pid(), ...], caller := reference(),
                  %% The processes that ask, and what.
                  asking := #{pid() => kind()},
                  %% Whether the engine knows that no more will be found.
                  resolved := boolean(),
                  session := {ok, term()} | none, result := success | failure | unknown}.

-type next() :: gen_statem:event_handler_result(asking | called | reporting, data()).

-spec start_link(module(), binary() | undefined, binary(), [pid(), ...]) -> pid().
start_link(Resolver, Local, NodeId, Callers) ->
    {ok, Set} = gen_statem:start_link(?MODULE, {self(), Resolver, Local, NodeId, Callers}, []),
    Set.

%% @doc Tells the result of the call.
-spec ended(pid(), success | failure) -> ok.
ended(Set, Result) ->
    gen_statem:cast(Set, {ended, Result}).

-spec callback_mode() -> state_functions.
callback_mode() -> state_functions.

-spec init({pid(), module(), binary() | undefined, binary(), [pid(), ...]}) -> gen_statem:init_result(asking, data()).
init({Owner, Resolver, Local, NodeId, [Caller | _] = Callers}) ->
    _ = process_flag(trap_exit, true),
    Data = #{owner => Owner, resolver => Resolver, local => Local, node => NodeId, callers => Callers,
             caller => monitor(process, Caller), asking => #{}, resolved => false, session => none, result => unknown},
    %% The owner does not wait for the module to be loaded.
    {ok, asking, Data, [{next_event, internal, ask}, {state_timeout, ?LOOKUP_TIMEOUT, give_up}]}.

-spec asking(gen_statem:event_type(), term(), data()) -> next().
asking(internal, ask, #{resolver := Resolver, local := Local, node := NodeId, callers := Callers} = Data) ->
    %% Where modules are loaded when they are called, the resolver may not have been called yet.
    _ = code:ensure_loaded(Resolver),
    Advice = [{request_connection, [Local, NodeId]} || Local =/= undefined],
    Questions = [{endpoints, [NodeId]}, {nat_profile, [NodeId]}, {relays, [NodeId]}, {bootstrap_peers, []} | Advice],
    Asking = maps:from_list([{start(Resolver, Kind, Args, Callers), Kind}
                             || {Kind, Args} <- Questions, erlang:function_exported(Resolver, Kind, length(Args))]),
    go_on(Data#{asking := Asking});
asking(info, {'EXIT', Pid, Outcome}, #{asking := Asking} = Data) when is_map_key(Pid, Asking) ->
    {Kind, Others} = maps:take(Pid, Asking),
    go_on(answered(Kind, Outcome, Data#{asking := Others}));
asking(state_timeout, give_up, Data) ->
    %% The exit signals of the processes end this state.
    ok = end_lookups(Data),
    keep_state_and_data;
asking(cast, {ended, Result}, Data) ->
    {keep_state, Data#{result := Result}};
asking(info, {'DOWN', Caller, process, _, _}, #{caller := Caller, result := unknown} = Data) ->
    {keep_state, Data#{result := failure}};
asking(_Type, _Event, _Data) ->
    keep_state_and_data.

-spec called(gen_statem:event_type(), term(), data()) -> next().
called(cast, {ended, Result}, Data) ->
    report(Data#{result := Result});
called(info, {'DOWN', Caller, process, _, _}, #{caller := Caller} = Data) ->
    report(Data#{result := failure});
called(state_timeout, give_up, Data) ->
    report(Data#{result := failure});
called(_Type, _Event, _Data) ->
    keep_state_and_data.

-spec reporting(gen_statem:event_type(), term(), data()) -> next().
reporting(info, {'EXIT', Pid, Outcome}, #{asking := Asking} = Data) when is_map_key(Pid, Asking) ->
    {stop, normal, answered(report_result, Outcome, Data#{asking := #{}})};
reporting(state_timeout, give_up, _Data) ->
    {stop, normal};
reporting(_Type, _Event, _Data) ->
    keep_state_and_data.

-spec terminate(term(), asking | called | reporting, data()) -> ok.
terminate(_Reason, _State, Data) ->
    end_lookups(Data).

-spec go_on(data()) -> next().
go_on(#{resolved := false, node := NodeId, owner := Owner, asking := Asking} = Data) ->
    %% Advice is not a candidate.
    case maps:values(Asking) -- [request_connection] of
        [] ->
            %% In this order: another set may begin when the engine has been told.
            ok = gen_server:cast(Owner, {looked_up, NodeId}),
            _ = macula_peer_nif:resolved(NodeId, true),
            go_on(Data#{resolved := true});
        _ ->
            {keep_state, Data}
    end;
go_on(#{asking := Asking} = Data) when map_size(Asking) > 0 ->
    {keep_state, Data};
go_on(#{session := none} = Data) ->
    {stop, normal, Data};
go_on(#{result := unknown} = Data) ->
    {next_state, called, Data, {state_timeout, ?REPORT_WITHIN, give_up}};
go_on(Data) ->
    report(Data).

-spec report(data()) -> next().
report(#{resolver := Resolver, session := {ok, Session}, local := Local, result := Result, callers := Callers} = Data) ->
    case erlang:function_exported(Resolver, report_result, 3) of
        true ->
            Pid = start(Resolver, report_result, [Session, Local, Result], Callers),
            {next_state, reporting, Data#{asking := #{Pid => report_result}}, {state_timeout, ?LOOKUP_TIMEOUT, give_up}};
        false ->
            {stop, normal, Data}
    end.

-spec answered(kind(), term(), data()) -> data().
answered(request_connection, {?MODULE, {ok, _} = Session}, Data) ->
    Data#{session := Session};
answered(request_connection, {?MODULE, none}, Data) ->
    Data;
answered(report_result, {?MODULE, _}, Data) ->
    Data;
answered(_Kind, {?MODULE, Found}, #{node := NodeId} = Data) ->
    %% One by one: an invalid candidate says nothing about the others.
    ok = lists:foreach(fun(Candidates) -> found(NodeId, Candidates) end, Found),
    Data;
answered(Kind, Failure, #{node := NodeId} = Data) ->
    ?LOG_DEBUG("macula_peer_connector: ~p of ~p: ~0tP", [Kind, NodeId, Failure, 30], ?DOMAIN),
    Data.

-spec found(binary(), macula_peer_call:candidates()) -> ok.
found(NodeId, Candidates) ->
    case macula_peer_nif:found(NodeId, Candidates) of
        ok -> ok;
        Refused -> ?LOG_DEBUG("macula_peer_connector: a candidate for ~p: ~0tP", [NodeId, Refused, 30], ?DOMAIN)
    end.

-spec end_lookups(data()) -> ok.
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
    %% The answer may be of any size and form, and stays in this process.
    Outcome = try {?MODULE, understood(Kind, apply(Resolver, Kind, Args))}
    catch
        Class:Reason -> unicode:characters_to_binary(io_lib:format("~0tP", [{Class, Reason}, 30]))
    end,
    exit(Outcome).

-spec understood(kind(), term()) -> [macula_peer_call:candidates()] | {ok, term()} | none.
understood(endpoints, Candidates) ->
    [with_fingerprint(Candidate, #{endpoints => [Endpoint]}) || {Candidate, Endpoint} <- candidates(Candidates)];
understood(nat_profile, #{reflexive_address := Address} = Profile) ->
    [#{endpoints => [Endpoint]} || receives(Profile), {_, Endpoint} <- candidates([Address])];
understood(relays, Candidates) ->
    [#{relays => [Relay]} || {_, Relay} <- candidates(Candidates)];
understood(bootstrap_peers, Candidates) ->
    [#{last_resorts => [Relay]} || {_, Relay} <- candidates(Candidates)];
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

-spec with_fingerprint(term(), macula_peer_call:candidates()) -> macula_peer_call:candidates().
with_fingerprint(#{<<"fingerprint">> := Fingerprint}, Candidates) -> Candidates#{fingerprint => Fingerprint};
with_fingerprint(#{fingerprint := Fingerprint}, Candidates) -> Candidates#{fingerprint => Fingerprint};
with_fingerprint(_Candidate, Candidates) -> Candidates.

%% The first of them that are endpoints.
-spec candidates(term()) -> [{term(), binary()}].
candidates(Candidates) ->
    [{Candidate, Endpoint} || Candidate <- first(?MAX_CANDIDATES, Candidates), {ok, Endpoint} <- [endpoint(Candidate)]].

%% However long the list is, and even if it is improper.
-spec first(non_neg_integer(), term()) -> [term()].
first(N, [Candidate | Candidates]) when N > 0 -> [Candidate | first(N - 1, Candidates)];
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
