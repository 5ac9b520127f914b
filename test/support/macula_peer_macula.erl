%% Nodes with the fake of macula (test_apps/macula). This application replaces some of its modules.
-module(macula_peer_macula).

-export([build/0]).
-export([start_node/2, start_node/3]).
-export([start/3]).
-export([received/2]).

-import(macula_peer_test, [call/4]).

-define(APP, "test_apps/macula").

%% Where the compiled application is.
build() ->
    Source = filename:join([macula_peer_test:root(), ?APP, "src"]),
    Ebin = filename:join([macula_peer_test:root(), "_build", "macula-" ++ os:getpid(), "macula-0.14.3", "ebin"]),
    ok = filelib:ensure_dir(filename:join(Ebin, "x")),
    _ = [{ok, _} = compile:file(File, [debug_info, {outdir, Ebin}])
         || File <- filelib:wildcard(filename:join(Source, "*.erl"))],
    {ok, _} = file:copy(filename:join(Source, "macula.app.src"), filename:join(Ebin, "macula.app")),
    Ebin.

%% A BEAM node here with both applications started. The settings are `#{macula => Map, macula_peer_connector => Map}'; a
%% `port' in those of macula is the gateway's, which both are told by the operator's variable.
start_node(Ebin, Settings) ->
    start_node(here, Ebin, Settings).

%% On a host of the laboratory.
start_node(Host, Ebin, Settings) ->
    Node = case Host of
        here -> macula_peer_test:start_node();
        _ -> macula_peer_net:start_node(Host)
    end,
    [Macula, Ours] = [maps:get(Application, Settings, #{}) || Application <- [macula, macula_peer_connector]],
    Listener = #{listener => macula_peer_program:path("fake_gateway")},
    ok = call(Node, ?MODULE, start, [Ebin, maps:merge(Listener, Macula), Ours]),
    Node.

%% Runs in the node. macula's modules come first in its path, so they are in force until ours take over.
start(Ebin, Macula, Ours) ->
    true = code:add_patha(Ebin),
    _ = [true = os:putenv("MACULA_QUIC_PORT", integer_to_list(Port)) || #{port := Port} <- [Macula]],
    ok = set(macula, maps:remove(port, Macula)),
    ok = set(macula_peer_connector, Ours#{takeover => true, takeover_pool => true}),
    {ok, _} = application:ensure_all_started(macula_peer_connector),
    #{macula_peer_connector := #{module := ours}, macula_peer_connection_pool := #{module := ours}} =
        macula_peer_node:which(),
    {ok, _} = application:ensure_all_started(macula),
    ok.

set(Application, Settings) ->
    _ = application:load(Application),
    lists:foreach(fun({Key, Value}) -> ok = application:set_env(Application, Key, Value) end, maps:to_list(Settings)).

%% What the node's gateway got of a type.
received(Node, Type) ->
    [Message || {T, Message, _, _} <- call(Node, macula_gateway, received, []), T =:= Type].
