%% @private
%% @doc Keeps the number of lookups bounded: one set of them for a node at a time, and a number of sets in all.
%%
%% With the application this process is supervised. Without it the first lookup starts it, and the end of the engine ends it. The
%% end of the engine also ends all sets.
-module(macula_peer_lookups).

-behaviour(gen_server).

-export([start_link/0]).
-export([look_up/3]).
-export([ended/2]).
-export([stop/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

%% Sets of lookups at once, including those that only wait to report the result of the call: more than twice the peers
%% that are kept. Each has at most six processes.
-define(MAX_SETS, 256).

-type state() :: #{supervised := boolean(),
                   %% Read by the first lookup of an engine.
                   resolver := module() | none | unread, node_id := binary() | undefined,
                   %% The nodes that are being looked up, and the set of each.
                   nodes := #{binary() => pid()},
                   %% All sets, and the calls that they are for.
                   sets := #{pid() => reference()}, calls := #{reference() => pid()}}.

-spec start_link() -> gen_server:start_ret().
start_link() ->
    case gen_server:start_link({local, ?MODULE}, ?MODULE, supervised, []) of
        %% One that a call started before the application, or while this one was restarted.
        {error, {already_started, _}} ->
            ok = stop(),
            start_link();
        Started ->
            Started
    end.

%% @doc Starts a lookup of a node for a call of this process, which is known by `Tag'. The engine is told the results.
%% Without `LocalNodeId' this node's id is that of the settings.
-spec look_up(binary(), term(), reference()) -> ok.
look_up(NodeId, LocalNodeId, Tag) ->
    gen_server:cast(server(), {look_up, NodeId, LocalNodeId, callers(), Tag}).

-spec server() -> pid().
server() ->
    case whereis(?MODULE) of
        undefined ->
            case gen_server:start({local, ?MODULE}, ?MODULE, alone, []) of
                {ok, Pid} -> Pid;
                {error, {already_started, Pid}} -> Pid
            end;
        Pid ->
            Pid
    end.

%% This process, and its callers as far as they are known: the key is that of Elixir's `Task'.
-spec callers() -> [pid(), ...].
callers() ->
    case get('$callers') of
        Callers when is_list(Callers) -> [self() | Callers];
        _ -> [self()]
    end.

%% @doc Tells the result of a call that a node was looked up for.
-spec ended(reference(), term()) -> ok.
ended(Tag, Result) ->
    gen_server:cast(?MODULE, {ended, Tag, success(Result)}).

-spec success(term()) -> success | failure.
success(ok) -> success;
success({ok, _}) -> success;
success(_) -> failure.

%% @doc Ends all lookups, and this process unless it is supervised.
-spec stop() -> ok.
stop() ->
    try gen_server:call(?MODULE, stop)
    catch
        exit:_ -> ok
    end.

-spec init(supervised | alone) -> {ok, state()}.
init(How) ->
    _ = process_flag(trap_exit, true),
    %% Stopping the application whose call started the first lookup must not end this process.
    true = How =:= supervised orelse group_leader(whereis(init), self()),
    {ok, new(How =:= supervised)}.

-spec new(boolean()) -> state().
new(Supervised) ->
    #{supervised => Supervised, resolver => unread, node_id => undefined, nodes => #{}, sets => #{}, calls => #{}}.

-spec handle_call(term(), gen_server:from(), state()) ->
          {reply, ok | {error, unknown_call}, state()} | {stop, normal, ok, state()}.
handle_call(stop, _From, #{supervised := Supervised, nodes := Nodes, sets := Sets} = State) ->
    ok = lists:foreach(fun(Set) -> exit(Set, shutdown) end, maps:keys(Sets)),
    %% The engine may go on, when the application takes over.
    _ = [macula_peer_nif:resolved(NodeId, false) || NodeId <- maps:keys(Nodes)],
    case Supervised of
        true -> {reply, ok, new(true)};
        false -> {stop, normal, ok, State}
    end;
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

-spec handle_cast(term(), state()) -> {noreply, state()}.
handle_cast({look_up, _NodeId, _Local, _Callers, _Tag} = LookUp, #{resolver := unread} = State) ->
    handle_cast(LookUp, with_settings(State));
handle_cast({look_up, NodeId, _Local, _Callers, _Tag}, #{resolver := none} = State) ->
    _ = macula_peer_nif:resolved(NodeId, true),
    {noreply, State};
handle_cast({look_up, NodeId, _Local, _Callers, _Tag}, #{nodes := Nodes} = State) when is_map_key(NodeId, Nodes) ->
    %% It began for an earlier peer of this name. This one hears of its end.
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

-spec with_settings(state()) -> state().
with_settings(State) ->
    case macula_peer_config:read() of
        {ok, #{resolver := Resolver, native := Native}} ->
            State#{resolver := Resolver, node_id := maps:get(node_id, Native, undefined)};
        {error, _} ->
            %% The settings have become wrong since the engine was started.
            State#{resolver := none}
    end.

-spec local(term(), binary() | undefined) -> binary() | undefined.
local(Local, _Own) when is_binary(Local) -> Local;
local(_Local, Own) -> Own.

-spec handle_info(term(), state()) -> {noreply, state()}.
handle_info({'EXIT', Set, _Reason}, #{nodes := Nodes, sets := Sets, calls := Calls} = State) when is_map_key(Set, Sets) ->
    {Tag, Others} = maps:take(Set, Sets),
    %% The set itself tells when the node has been looked up, unless it fails.
    Ended = maps:filter(fun(_NodeId, By) -> By =:= Set end, Nodes),
    _ = [macula_peer_nif:resolved(NodeId, false) || NodeId <- maps:keys(Ended)],
    {noreply, State#{nodes := maps:without(maps:keys(Ended), Nodes), sets := Others, calls := maps:remove(Tag, Calls)}};
handle_info(_Info, State) ->
    {noreply, State}.
