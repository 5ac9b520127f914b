%% @doc In the place of macula's pool of the same name: its functions, over the engine's peers.
%%
%% macula's gateway supervisor starts it, and other parts of macula ask it for its connections. Messages use the
%% engine's connections. The pool keeps quicer connections that other code in macula gives it as the original does: up
%% to `max_connections', evicting the least recently used, and closing one that is idle for `idle_timeout_ms'. The
%% counters are sums over both. The setting `takeover_pool' decides whether this module or macula's is in force.
-module(macula_peer_connection_pool).

-behaviour(gen_server).

%% Tells this module from macula's: macula_peer_takeover.
-application(macula_peer_connector).

-export([start_link/0]).
-export([start_link/1]).
-export([get_connection/1]).
-export([return_connection/2]).
-export([invalidate/1]).
-export([stats/0]).
-export([put/2]).
-export([get_connected_peers/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).
-export([terminate/2]).

-export_type([stats/0]).

-type stats() :: #{hits := non_neg_integer(), misses := non_neg_integer(), evictions := non_neg_integer(),
                   total := non_neg_integer(), hit_rate := float(), pool_size := non_neg_integer()}.
%% `hit_rate' is in percent, as the original's.

%% The original's.
-define(MAX_CONNECTIONS, 100).
-define(IDLE_TIMEOUT, 60000).
-define(CALL_TIMEOUT, 10000).

%% How often to look for idle connections, in milliseconds.
-define(CLEANUP_INTERVAL, 10000).

-record(given, {connection :: term(), stream :: term(), last_used :: integer()}).

-record(pool, {given = #{} :: #{term() => #given{}},
               max_connections = ?MAX_CONNECTIONS :: pos_integer(),
               idle_timeout = ?IDLE_TIMEOUT :: non_neg_integer(),
               hits = 0 :: non_neg_integer(),
               misses = 0 :: non_neg_integer(),
               evictions = 0 :: non_neg_integer()}).

%% @equiv start_link(#{})
-spec start_link() -> gen_server:start_ret().
start_link() ->
    start_link(#{}).

%% @doc Starts the process that macula's supervisor wants. `max_connections' and `idle_timeout_ms' apply to the connections that
%% are given to it; the engine's limits are settings of the application.
-spec start_link(#{max_connections => pos_integer(), idle_timeout_ms => non_neg_integer(), _ => _}) ->
          gen_server:start_ret().
start_link(Opts) ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, Opts, []).

%% @doc A quicer connection that was returned or put, if it is alive. This function opens none: only the original
%% connector needed one. To send, call {@link macula_peer_connector:send_message/4}.
-spec get_connection(macula_peer_connector:endpoint()) ->
          {ok, Connection :: term(), Stream :: term()} | {error, no_quicer_connection}.
get_connection(Endpoint) ->
    case whereis(?MODULE) of
        undefined -> {error, no_quicer_connection};
        Pool -> gen_server:call(Pool, {get_connection, Endpoint}, ?CALL_TIMEOUT)
    end.

%% @doc Gives a connection of quicer and its stream to the pool.
-spec return_connection(macula_peer_connector:endpoint(), {Connection :: term(), Stream :: term()} | term()) -> ok.
return_connection(Endpoint, {Connection, Stream}) ->
    gen_server:cast(?MODULE, {return_connection, Endpoint, Connection, Stream});
return_connection(_Endpoint, _NoConnection) ->
    ok.

%% @doc Closes the link to an endpoint, if there is one. Messages in flight go over the next link if they have to; the
%% next message dials again. A connection that was given to the pool is closed too.
-spec invalidate(macula_peer_connector:endpoint()) -> ok.
invalidate(Endpoint) ->
    _ = macula_peer_nif:invalidate(Endpoint),
    gen_server:cast(?MODULE, {close_given, Endpoint}).

%% @doc The counters of the engine's pool and of the connections that were given, added up; zeros where neither runs.
-spec stats() -> stats().
stats() ->
    Given = case whereis(?MODULE) of
        undefined -> counted(#pool{});
        Pool -> gen_server:call(Pool, given_stats, ?CALL_TIMEOUT)
    end,
    with_engine(Given).

%% @doc Gives the pool a connection of quicer to a peer, without a stream.
-spec put(term(), term()) -> ok.
put(Peer, Connection) ->
    gen_server:cast(?MODULE, {put_direct, Peer, Connection}).

%% @doc The endpoints with a live link, and the peers whose connections the pool was given.
-spec get_connected_peers() -> [binary()].
get_connected_peers() ->
    Linked = case macula_peer_call:stats() of
        #{peers := Peers} -> [Endpoint || #{endpoint := Endpoint, path := Path} <- Peers, Path =/= none];
        _ -> []
    end,
    Given = case whereis(?MODULE) of
        undefined -> [];
        Pool -> gen_server:call(Pool, given_peers, ?CALL_TIMEOUT)
    end,
    lists:usort(Linked ++ Given).

%% @private
-spec init(map()) -> {ok, #pool{}}.
init(Opts) ->
    _ = erlang:send_after(?CLEANUP_INTERVAL, self(), cleanup_idle_connections),
    {ok, #pool{max_connections = maps:get(max_connections, Opts, ?MAX_CONNECTIONS),
               idle_timeout = maps:get(idle_timeout_ms, Opts, ?IDLE_TIMEOUT)}}.

%% The process may be the original's, which goes on with this code and starts empty. @private
-spec handle_call(term(), gen_server:from(), #pool{} | term()) ->
          {reply, stats() | [term()] | {ok, term(), term()} | {error, no_quicer_connection | unknown_request}, #pool{}}.
handle_call(Request, From, Others) when not is_record(Others, pool) ->
    handle_call(Request, From, #pool{});
handle_call(stats, _From, Pool) ->
    {reply, with_engine(counted(Pool)), Pool};
handle_call(given_stats, _From, Pool) ->
    {reply, counted(Pool), Pool};
handle_call(given_peers, _From, #pool{given = Given} = Pool) ->
    {reply, maps:keys(Given), Pool};
handle_call({get_connection, Endpoint}, _From, #pool{given = Given, hits = Hits, misses = Misses} = Pool) ->
    case Given of
        #{Endpoint := #given{connection = Connection, stream = Stream} = Found} ->
            case is_alive(Connection) of
                true ->
                    Used = Given#{Endpoint := Found#given{last_used = now_ms()}},
                    {reply, {ok, Connection, Stream}, Pool#pool{given = Used, hits = Hits + 1}};
                false ->
                    {reply, {error, no_quicer_connection},
                     Pool#pool{given = maps:remove(Endpoint, Given), misses = Misses + 1}}
            end;
        #{} ->
            {reply, {error, no_quicer_connection}, Pool#pool{misses = Misses + 1}}
    end;
handle_call(_Request, _From, Pool) ->
    {reply, {error, unknown_request}, Pool}.

%% @private
-spec handle_cast(term(), #pool{} | term()) -> {noreply, #pool{}}.
handle_cast(Request, Others) when not is_record(Others, pool) ->
    handle_cast(Request, #pool{});
handle_cast({return_connection, Endpoint, Connection, Stream}, Pool) ->
    {noreply, given(Endpoint, Connection, Stream, Pool)};
handle_cast({put_direct, Peer, Connection}, Pool) ->
    {noreply, given(Peer, Connection, undefined, Pool)};
handle_cast({close_given, Peer}, Pool) ->
    {noreply, close(Peer, Pool)};
%% From callers that still run the original's code.
handle_cast({invalidate, Endpoint}, Pool) ->
    _ = macula_peer_nif:invalidate(Endpoint),
    {noreply, close(Endpoint, Pool)};
handle_cast(_Request, Pool) ->
    {noreply, Pool}.

%% @private
-spec handle_info(term(), #pool{} | term()) -> {noreply, #pool{}}.
handle_info(Info, Others) when not is_record(Others, pool) ->
    handle_info(Info, #pool{});
handle_info(cleanup_idle_connections, #pool{given = Given, idle_timeout = Timeout} = Pool) ->
    _ = erlang:send_after(?CLEANUP_INTERVAL, self(), cleanup_idle_connections),
    Since = now_ms() - Timeout,
    Idle = [Peer || {Peer, #given{last_used = Used}} <- maps:to_list(Given), Used < Since],
    {noreply, lists:foldl(fun close/2, Pool, Idle)};
handle_info(_Info, Pool) ->
    {noreply, Pool}.

%% @private
-spec terminate(term(), #pool{} | term()) -> ok.
terminate(_Reason, #pool{given = Given} = Pool) ->
    _ = lists:foldl(fun close/2, Pool, maps:keys(Given)),
    ok;
terminate(_Reason, _Others) ->
    ok.

%% ---- connections that were given ----

-spec given(term(), term(), term(), #pool{}) -> #pool{}.
given(Peer, Connection, Stream, Pool) ->
    #pool{given = Given} = Roomy = make_room(Peer, Pool),
    Roomy#pool{given = Given#{Peer => #given{connection = Connection, stream = Stream, last_used = now_ms()}}}.

-spec make_room(term(), #pool{}) -> #pool{}.
make_room(Peer, #pool{given = Given, max_connections = Max, evictions = Evictions} = Pool)
  when map_size(Given) >= Max, not is_map_key(Peer, Given) ->
    [{_, Oldest} | _] = lists:sort([{Used, Key} || {Key, #given{last_used = Used}} <- maps:to_list(Given)]),
    close(Oldest, Pool#pool{evictions = Evictions + 1});
make_room(_Peer, Pool) ->
    Pool.

-spec close(term(), #pool{}) -> #pool{}.
close(Peer, #pool{given = Given} = Pool) ->
    case maps:take(Peer, Given) of
        {#given{connection = Connection, stream = Stream}, Others} ->
            _ = quicer(async_shutdown_stream, [Stream, 1, 0]),
            _ = quicer(async_shutdown_connection, [Connection, 0, 0]),
            Pool#pool{given = Others};
        error ->
            Pool
    end.

-spec is_alive(term()) -> boolean().
is_alive(Connection) ->
    case quicer(getstat, [Connection, [recv_cnt]]) of
        {ok, _} -> true;
        _ -> false
    end.

%% macula's library, which this application does not depend on. It raises on terms that are not its handles.
-spec quicer(atom(), [term()]) -> term().
quicer(Function, Args) ->
    try apply(quicer, Function, Args) catch _:_ -> {error, badarg} end.

-spec now_ms() -> integer().
now_ms() ->
    erlang:monotonic_time(millisecond).

%% ---- counting ----

-spec counted(#pool{}) -> stats().
counted(#pool{given = Given, hits = Hits, misses = Misses, evictions = Evictions}) ->
    #{hits => Hits, misses => Misses, evictions => Evictions, total => Hits + Misses, hit_rate => 0.0,
      pool_size => map_size(Given)}.

-spec with_engine(stats()) -> stats().
with_engine(Given) ->
    Engine = case macula_peer_call:stats() of
        #{pool := Pool} -> Pool;
        _ -> #{}
    end,
    Sum = maps:map(fun(Key, Count) -> Count + maps:get(Key, Engine, 0) end, Given),
    Sum#{hit_rate := hit_rate(Sum)}.

-spec hit_rate(stats()) -> float().
hit_rate(#{total := 0}) -> 0.0;
hit_rate(#{hits := Hits, total := Total}) -> Hits / Total * 100.
