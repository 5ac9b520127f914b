%% A long or lossy path to a server: a program that passes UDP packets on. It ends with the process that started it.
-module(macula_peer_forwarder).

-export([start/2, start/3]).
-export([stop/1]).
-export([endpoint/1]).
-export([stats/1, delay/2, loss/2, swallow/1, pass/1]).

start(To, Opts) ->
    start(here, To, Opts).

%% Options: `delay', the milliseconds that one direction takes, and `loss', how many packets of a thousand.
start(Where, To, Opts) ->
    Options = [{"--delay-ms", maps:get(delay, Opts, 0)}, {"--loss", maps:get(loss, Opts, 0)}],
    Args = ["--to", binary_to_list(To), "--bind", binary_to_list(macula_peer_net:endpoint(Where, 0))
            | lists:append([[Name, integer_to_list(Value)] || {Name, Value} <- Options])],
    {Where, macula_peer_program:start(Where, "forwarder", Args)}.

stop({_Where, Program}) ->
    macula_peer_program:stop(Program).

%% What is sent there reaches the server.
endpoint({Where, Program}) ->
    macula_peer_net:endpoint(Where, macula_peer_program:port(Program)).

stats({_Where, Program}) ->
    macula_peer_program:command(Program, "stats").

delay({_Where, Program}, Ms) ->
    ok = macula_peer_program:command(Program, ["delay ", integer_to_list(Ms)]).

loss({_Where, Program}, Permille) ->
    ok = macula_peer_program:command(Program, ["loss ", integer_to_list(Permille)]).

%% Drops all packets silently.
swallow({_Where, Program}) ->
    ok = macula_peer_program:command(Program, "swallow").

pass({_Where, Program}) ->
    ok = macula_peer_program:command(Program, "pass").
