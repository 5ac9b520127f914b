%% Nodes with the application that stands in for macula, and this one in the place of its module.
-module(macula_peer_macula).

-export([build/0]).
-export([start_node/2, start_node/3]).
-export([start/2]).

-import(macula_peer_test, [call/4]).

-define(APP, "test_apps/macula").

%% Where the compiled application is.
build() ->
    Source = filename:join([macula_peer_test:root(), ?APP, "src"]),
    Ebin = filename:join([macula_peer_test:root(), "_build", "macula", os:getpid(), "macula-0.14.3", "ebin"]),
    ok = filelib:ensure_path(Ebin),
    _ = [{ok, _} = compile:file(File, [debug_info, {outdir, Ebin}])
         || File <- filelib:wildcard(filename:join(Source, "*.erl"))],
    {ok, _} = file:copy(filename:join(Source, "macula.app.src"), filename:join(Ebin, "macula.app")),
    Ebin.

%% A BEAM node here with both applications started. See start/2 for the settings.
start_node(Ebin, Settings) ->
    start_node(here, Ebin, Settings).

%% On a host of the laboratory.
start_node(Host, Ebin, Settings) ->
    Node = case Host of
        here -> macula_peer_test:start_node();
        _ -> macula_peer_net:start_node(Host)
    end,
    ok = call(Node, code, add_pathsz, [[Ebin]]),
    ok = call(Node, ?MODULE, start, [maps:get(macula, Settings, #{}), maps:get(macula_peer_connector, Settings, #{})]),
    Node.

%% Runs in the node: starts both applications with these settings. The gateway listens unless its `listener' is `false'.
start(Macula, Ours) ->
    Listener = #{listener => macula_peer_program:path("gateway_stand_in")},
    ok = application:load(macula),
    _ = [ok = application:set_env(macula, Key, Value) || {Key, Value} <- maps:to_list(maps:merge(Listener, Macula))],
    _ = application:load(macula_peer_connector),
    _ = [ok = application:set_env(macula_peer_connector, Key, Value) || {Key, Value} <- maps:to_list(Ours)],
    {ok, _} = application:ensure_all_started(macula),
    {ok, _} = application:ensure_all_started(macula_peer_connector),
    ok.
