%% A hook of Common Test: each suite starts without an engine, and without settings of the suite before it.
-module(macula_peer_suites).

-export([init/2, pre_init_per_suite/3]).

-define(APP, macula_peer_connector).

init(_Id, _Opts) ->
    {ok, no_state}.

pre_init_per_suite(_Suite, Config, State) ->
    _ = application:stop(?APP),
    ok = macula_peer_node:stop(),
    [ok = application:unset_env(?APP, Key) || {Key, _} <- application:get_all_env(?APP)],
    {Config, State}.
