%% Like macula's gateway supervisor it starts the connection pool, whichever module of that name is in force.
-module(macula_sup).

-behaviour(supervisor).

-export([start_link/0]).
-export([init/1]).

start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

init([]) ->
    Pool = #{id => macula_peer_connection_pool, start => {macula_peer_connection_pool, start_link, []}},
    {ok, {#{strategy => one_for_one}, [Pool]}}.
