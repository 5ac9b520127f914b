%% The program that behaves as a macula 0.14.3 gateway, driven over its standard input. It ends with the process that
%% started it.
-module(macula_peer_stand_in).

-export([start/0, start/1]).
-export([stop/1]).
-export([port/1, endpoint/1]).
-export([stats/1, reset/1, silence/2]).

-define(PATIENCE, 10000).
-define(LONGEST_LINE, 65536).

start() ->
    start([]).

%% Takes the program's own options, such as ["--bind", "127.0.0.1:4433"].
start(Args) ->
    Options = [{args, Args}, {line, ?LONGEST_LINE}, exit_status],
    Program = open_port({spawn_executable, program()}, Options),
    "ready " ++ Port = line(Program),
    {Program, list_to_integer(Port)}.

%% Ends it without a word to those who are connected.
stop({Program, _Port}) ->
    true = port_command(Program, "quit\n"),
    receive
        {Program, {exit_status, 0}} -> ok
    after ?PATIENCE -> error(stand_in_does_not_end)
    end.

port({_Program, Port}) ->
    Port.

endpoint({_Program, Port}) ->
    macula_peer_test:endpoint("127.0.0.1", Port).

stats(StandIn) ->
    command(StandIn, "stats").

reset(StandIn) ->
    ok = command(StandIn, "reset").

silence(StandIn, Switch) when Switch =:= on; Switch =:= off ->
    ok = command(StandIn, ["silence ", atom_to_list(Switch)]).

command({Program, _Port}, Command) ->
    true = port_command(Program, [Command, $\n]),
    {ok, Tokens, _} = erl_scan:string(line(Program)),
    {ok, Term} = erl_parse:parse_term(Tokens),
    Term.

line(Program) ->
    receive
        {Program, {data, {eol, Line}}} -> Line;
        {Program, {exit_status, Status}} -> error({stand_in_ended, Status})
    after ?PATIENCE -> error(stand_in_silent)
    end.

program() ->
    Target = os:getenv("CARGO_TARGET_DIR", filename:join(macula_peer_test:root(), "target")),
    Program = filename:join([Target, "release", "gateway_stand_in"]),
    filelib:is_regular(Program) orelse
        error({not_built, Program, "cargo build --release -p macula-peer-testkit"}),
    Program.
