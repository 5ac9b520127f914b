%% @private
%% @doc Keeps the number of lookups bounded: one set of them for a node at a time, and so many sets in all. Started by the
%% first lookup and ended with the engine, like the engine with or without the application.
-module(macula_peer_lookups).

-behaviour(gen_server).

-export([look_up/3]).
-export([ended/2]).
-export([stop/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

%% Sets at once, also those that only wait to report what became of the call: more than twice the peers that are kept. Each
%% has six processes at the most.
-define(MAX_SETS, 256).

-type state() :: #{resolver := module() | none, node_id := binary() | undefined,
                   %% Nodes that are being looked up, by whom.
                   nodes := #{binary() => pid()},
                   %% All sets, and the calls that they are for.
                   sets := #{pid() => reference()}, calls := #{reference() => pid()}}.

%% @doc Begins to look up the ways to a node for a call of this process, which `Tag' stands for. What is found is told to the
%% engine. Without `LocalNodeId' this node is what the settings call it.
-spec look_up(binary(), term(), reference()) -> ok.
look_up(NodeId, LocalNodeId, Tag) ->
    Started = case whereis(?MODULE) of
        undefined -> gen_server:start({local, ?MODULE}, ?MODULE, [], []);
        Running -> {ok, Running}
    end,
    Server = case Started of
        {ok, Pid} -> Pid;
        {error, {already_started, Pid}} -> Pid
    end,
    gen_server:cast(Server, {look_up, NodeId, LocalNodeId, callers(), Tag}).

%% This process, and those who wait for it as far as is known: the key is that of Elixir's `Task'.
-spec callers() -> [pid(), ...].
callers() ->
    case get('$callers') of
        Callers when is_list(Callers) -> [self() | Callers];
        _ -> [self()]
    end.

%% @doc Tells what became of a call that a node was looked up for.
-spec ended(reference(), term()) -> ok.
ended(Tag, Result) ->
    gen_server:cast(?MODULE, {ended, Tag, success(Result)}).

-spec success(term()) -> success | failure.
success(ok) -> success;
success({ok, _}) -> success;
success(_) -> failure.

%% @doc Ends all lookups.
-spec stop() -> ok.
stop() ->
    try gen_server:stop(?MODULE)
    catch
        exit:_ -> ok
    end.

-spec init([]) -> {ok, state()}.
init([]) ->
    _ = process_flag(trap_exit, true),
    %% Stopping the application whose call started the first lookup must not end this process.
    true = group_leader(whereis(init), self()),
    State = #{resolver => none, node_id => undefined, nodes => #{}, sets => #{}, calls => #{}},
    case macula_peer_config:read() of
        {ok, #{resolver := Resolver, native := Native}} ->
            {ok, State#{resolver := Resolver, node_id := maps:get(node_id, Native, undefined)}};
        {error, _} ->
            %% Changed to something wrong since the engine was started.
            {ok, State}
    end.

-spec handle_call(term(), gen_server:from(), state()) -> {reply, {error, unknown_call}, state()}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

-spec handle_cast(term(), state()) -> {noreply, state()}.
handle_cast({look_up, NodeId, _Local, _Callers, _Tag}, #{resolver := none} = State) ->
    _ = macula_peer_nif:resolved(NodeId, true),
    {noreply, State};
handle_cast({look_up, NodeId, _Local, _Callers, _Tag}, #{nodes := Nodes} = State) when is_map_key(NodeId, Nodes) ->
    %% Begun for an earlier peer of this name. Its end is told to this one.
    {noreply, State};
handle_cast({look_up, NodeId, _Local, _Callers, _Tag}, #{sets := Sets} = State) when map_size(Sets) >= ?MAX_SETS ->
    _ = macula_peer_nif:resolved(NodeId, false),
    {noreply, State};
handle_cast({look_up, NodeId, Local, Callers, Tag}, State) ->
    #{resolver := Resolver, node_id := Own, nodes := Nodes, sets := Sets, calls := Calls} = State,
    Set = macula_peer_lookup:start_link(Resolver, local(Local, Own), NodeId, Callers),
    {noreply, State#{nodes := Nodes#{NodeId => Set}, sets := Sets#{Set => Tag}, calls := Calls#{Tag => Set}}};
handle_cast({looked_up, NodeId}, #{nodes := Nodes} = State) ->
    {noreply, State#{nodes := maps:remove(NodeId, Nodes)}};
handle_cast({ended, Tag, Result}, #{calls := Calls} = State) ->
    case Calls of
        #{Tag := Set} -> macula_peer_lookup:ended(Set, Result);
        #{} -> ok
    end,
    {noreply, State};
handle_cast(_Request, State) ->
    {noreply, State}.

-spec local(term(), binary() | undefined) -> binary() | undefined.
local(Local, _Own) when is_binary(Local) -> Local;
local(_Local, Own) -> Own.

-spec handle_info(term(), state()) -> {noreply, state()}.
handle_info({'EXIT', Set, _Reason}, #{nodes := Nodes, sets := Sets, calls := Calls} = State) when is_map_key(Set, Sets) ->
    {Tag, Others} = maps:take(Set, Sets),
    %% It says itself when the node has been looked up, unless it fails.
    Ended = maps:filter(fun(_NodeId, By) -> By =:= Set end, Nodes),
    _ = [macula_peer_nif:resolved(NodeId, false) || NodeId <- maps:keys(Ended)],
    {noreply, State#{nodes := maps:without(maps:keys(Ended), Nodes), sets := Others, calls := maps:remove(Tag, Calls)}};
handle_info(_Info, State) ->
    {noreply, State}.
