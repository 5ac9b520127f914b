%% @private
-module(macula_peer_sup).

-behaviour(supervisor).

-export([start_link/0]).

-export([init/1]).

%% The engine has a second for messages in flight, and some time for its threads.
-define(ENGINE_SHUTDOWN, 5000).

-spec start_link() -> supervisor:startlink_ret().
start_link() ->
    supervisor:start_link({local, ?MODULE}, ?MODULE, []).

-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    Engine = #{id => macula_peer_engine, start => {macula_peer_engine, start_link, []}, shutdown => ?ENGINE_SHUTDOWN},
    Admission = #{id => macula_peer_admission, start => {macula_peer_admission, start_link, []}},
    Lookups = #{id => macula_peer_lookups, start => {macula_peer_lookups, start_link, []}},
    Guard = #{id => macula_peer_takeover_guard, start => {macula_peer_takeover_guard, start_link, []}},
    {ok, {#{strategy => one_for_one}, [Guard, Admission, Lookups, Engine]}}.
