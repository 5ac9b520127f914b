%% A program that behaves as a macula 0.14.3 gateway. It ends with the process that started it.
-module(macula_peer_fake_gateway).

-export([start/0, start/1]).
-export([stop/1]).
-export([port/1, endpoint/1]).
-export([stats/1, reset/1, silence/2]).
-export([pause/1, go_on/1]).

start() ->
    start([]).

%% Takes the program's own options, such as ["--bind", "127.0.0.1:4433"].
start(Args) ->
    macula_peer_program:start("fake_gateway", Args).

%% Ends it without closing its connections.
stop(Gateway) ->
    macula_peer_program:stop(Gateway).

port(Gateway) ->
    macula_peer_program:port(Gateway).

endpoint(Gateway) ->
    macula_peer_test:endpoint("127.0.0.1", port(Gateway)).

stats(Gateway) ->
    macula_peer_program:command(Gateway, "stats").

reset(Gateway) ->
    ok = macula_peer_program:command(Gateway, "reset").

silence(Gateway, Switch) when Switch =:= on; Switch =:= off ->
    ok = macula_peer_program:command(Gateway, ["silence ", atom_to_list(Switch)]).

%% Nothing in it runs until it is told to go on.
pause(Gateway) ->
    macula_peer_program:signal(Gateway, "STOP").

go_on(Gateway) ->
    macula_peer_program:signal(Gateway, "CONT").
