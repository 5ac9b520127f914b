%% A program of the testkit, driven over its standard input. It ends with the process that started it.
-module(macula_peer_program).

-export([start/2, start/3]).
-export([stop/1]).
-export([port/1, command/2, signal/2]).
-export([path/1]).

-define(PATIENCE, 10000).
-define(LONGEST_LINE, 65536).

start(Name, Args) ->
    start(here, Name, Args).

%% On a host of the laboratory, or here.
start(Where, Name, Args) ->
    {Executable, AllArgs} = macula_peer_net:command(Where, path(Name), Args),
    Program = open_port({spawn_executable, Executable}, [{args, AllArgs}, {line, ?LONGEST_LINE}, exit_status]),
    "ready " ++ Port = line(Program),
    {Program, list_to_integer(Port)}.

%% Ends it without closing its connections.
stop({Program, _Port}) ->
    true = port_command(Program, "quit\n"),
    receive
        {Program, {exit_status, 0}} -> ok
    after ?PATIENCE -> error(program_does_not_end)
    end.

%% The port that it is bound to.
port({_Program, Port}) ->
    Port.

%% The term that it answers.
command({Program, _Port}, Command) ->
    true = port_command(Program, [Command, $\n]),
    {ok, Tokens, _} = erl_scan:string(line(Program)),
    {ok, Term} = erl_parse:parse_term(Tokens),
    Term.

line(Program) ->
    receive
        {Program, {data, {eol, Line}}} -> Line;
        {Program, {exit_status, Status}} -> error({program_ended, Status})
    after ?PATIENCE -> error(program_silent)
    end.

%% Sends the process a signal, by its name.
signal({Program, _Port}, Signal) ->
    {os_pid, Pid} = erlang:port_info(Program, os_pid),
    "" = os:cmd("kill -" ++ Signal ++ " " ++ integer_to_list(Pid)),
    ok.

%% Where the program is.
path(Name) ->
    Target = os:getenv("CARGO_TARGET_DIR", filename:join(macula_peer_test:root(), "target")),
    Path = filename:join([Target, "release", Name]),
    filelib:is_regular(Path) orelse error({not_built, Path, "cargo build --release -p macula-peer-testkit"}),
    Path.
