%% In the place of the original: a process with its name and no connections.
-module(macula_peer_connection_pool).

-behaviour(gen_server).

-export([start_link/0, start_link/1]).
-export([get_connection/1, return_connection/2, invalidate/1, put/2]).
-export([stats/0, get_connected_peers/0]).
-export([init/1, handle_call/3, handle_cast/2]).

start_link() -> start_link(#{}).

start_link(Opts) -> gen_server:start_link({local, ?MODULE}, ?MODULE, Opts, []).

get_connection(_Endpoint) -> {error, original}.

return_connection(_Endpoint, _Connection) -> ok.

invalidate(_Endpoint) -> ok.

put(_Endpoint, _Connection) -> ok.

stats() -> #{hits => 0, misses => 0, evictions => 0, total => 0, hit_rate => 0.0, pool_size => 0}.

get_connected_peers() -> [].

init(_Opts) -> {ok, []}.

handle_call(_Request, _From, State) -> {reply, {error, unknown_request}, State}.

handle_cast(_Request, State) -> {noreply, State}.
