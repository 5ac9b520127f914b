%% @doc In the place of macula's pool of the same name: its functions, over the engine's peers.
%%
%% macula's gateway supervisor starts it, and others in macula ask it what there is. The connections are the engine's, so
%% the process has nothing to do but to be there under its name. Whether this module or macula's is in force is a setting of
%% its own, `takeover_pool'.
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

-export_type([stats/0]).

-type stats() :: #{hits := non_neg_integer(), misses := non_neg_integer(), evictions := non_neg_integer(),
                   total := non_neg_integer(), hit_rate := float(), pool_size := non_neg_integer()}.
%% `hit_rate' is in percent, as the original's.

%% @equiv start_link(#{})
-spec start_link() -> gen_server:start_ret().
start_link() ->
    start_link(#{}).

%% @doc Starts the process that macula's supervisor wants. The options say nothing: the sizes and times of the pool are
%% settings of the application.
-spec start_link(map()) -> gen_server:start_ret().
start_link(Opts) ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, Opts, []).

%% @doc Always an error: there is no quicer connection to give away. Only the original connector asked for one; whoever
%% wants to send calls {@link macula_peer_connector:send_message/4}, over the link that there is.
-spec get_connection(macula_peer_connector:endpoint()) -> {error, no_quicer_connection}.
get_connection(_Endpoint) ->
    {error, no_quicer_connection}.

%% @doc Does nothing: nobody can have taken a connection from here.
-spec return_connection(macula_peer_connector:endpoint(), term()) -> ok.
return_connection(_Endpoint, _Connection) ->
    ok.

%% @doc Closes the link to an endpoint, if there is one. What is on its way goes over the next one if it has to; the next
%% message dials anew.
-spec invalidate(macula_peer_connector:endpoint()) -> ok.
invalidate(Endpoint) ->
    _ = macula_peer_nif:invalidate(Endpoint),
    ok.

%% @doc What is counted of the engine's pool; zeros where no engine runs.
-spec stats() -> stats().
stats() ->
    case macula_peer_call:stats() of
        #{pool := #{hit_rate := Rate} = Pool} -> Pool#{hit_rate := Rate * 100};
        _ -> #{hits => 0, misses => 0, evictions => 0, total => 0, hit_rate => 0.0, pool_size => 0}
    end.

%% @doc Does nothing: connections that others made are theirs. The engine dials when something is to be sent.
-spec put(term(), term()) -> ok.
put(_Peer, _Connection) ->
    ok.

%% @doc The endpoints that there is a live link to.
-spec get_connected_peers() -> [binary()].
get_connected_peers() ->
    case macula_peer_call:stats() of
        #{peers := Peers} -> [Endpoint || #{endpoint := Endpoint, path := Path} <- Peers, Path =/= none];
        _ -> []
    end.

%% @private
-spec init(map()) -> {ok, []}.
init(_Opts) ->
    {ok, []}.

%% The process may be the original's, which goes on with this code and a state of its own.
%% @private
-spec handle_call(term(), gen_server:from(), State) -> {reply, stats() | {error, unknown_request}, State}.
handle_call(stats, _From, State) ->
    {reply, stats(), State};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_request}, State}.

%% @private
-spec handle_cast(term(), State) -> {noreply, State}.
handle_cast({invalidate, Endpoint}, State) ->
    ok = invalidate(Endpoint),
    {noreply, State};
handle_cast(_Request, State) ->
    {noreply, State}.

%% @private
-spec handle_info(term(), State) -> {noreply, State}.
handle_info(_Info, State) ->
    {noreply, State}.
