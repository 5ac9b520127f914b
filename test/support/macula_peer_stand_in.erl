%% The program that behaves as a macula 0.14.3 gateway. It ends with the process that started it.
-module(macula_peer_stand_in).

-export([start/0, start/1]).
-export([stop/1]).
-export([port/1, endpoint/1]).
-export([stats/1, reset/1, silence/2]).
-export([pause/1, go_on/1]).

start() ->
    start([]).

%% Takes the program's own options, such as ["--bind", "127.0.0.1:4433"].
start(Args) ->
    macula_peer_program:start("gateway_stand_in", Args).

%% Ends it without a word to those who are connected.
stop(StandIn) ->
    macula_peer_program:stop(StandIn).

port(StandIn) ->
    macula_peer_program:port(StandIn).

endpoint(StandIn) ->
    macula_peer_test:endpoint("127.0.0.1", port(StandIn)).

stats(StandIn) ->
    macula_peer_program:command(StandIn, "stats").

reset(StandIn) ->
    ok = macula_peer_program:command(StandIn, "reset").

silence(StandIn, Switch) when Switch =:= on; Switch =:= off ->
    ok = macula_peer_program:command(StandIn, ["silence ", atom_to_list(Switch)]).

%% Nothing in it runs until it is told to go on.
pause(StandIn) ->
    macula_peer_program:signal(StandIn, "STOP").

go_on(StandIn) ->
    macula_peer_program:signal(StandIn, "CONT").
