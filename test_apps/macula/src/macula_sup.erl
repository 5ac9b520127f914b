%% Like macula's gateway supervisor it starts the connection pool, whichever module of that name is in force, and the
%% servers of the environment's `servers', all unless it says which.
-module(macula_sup).

-behaviour(supervisor).

-export([start_link/0]).
-export([init/1]).

start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

init([]) ->
    Names = [macula_peer_connection_pool | application:get_env(macula, servers, macula_variant:servers())],
    Children = [#{id => Name, start => {Name, start_link, []}} || Name <- Names],
    {ok, {#{strategy => one_for_one, intensity => 1000, period => 1}, Children}}.
