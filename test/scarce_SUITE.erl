%% Where the system gives no more threads or descriptors, functions return an error, and trying again leaks nothing.
%%
%% As root: a node runs as a user without privileges, whose limits apply.
-module(scarce_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1]).

%% Runs as a user that owns nothing.
-define(AS_USER, ["--reuid", "54321", "--regid", "54321", "--clear-groups"]).
-define(TRIES, 20).

suite() -> [{timetrap, {seconds, 60}}].

all() -> [no_thread_can_be_had, no_descriptor_can_be_had].

init_per_suite(Config) ->
    Missing = [Tool || Tool <- ["setpriv", "prlimit"], os:find_executable(Tool) =:= false],
    case {os:cmd("id -u"), Missing} of
        {"0\n", []} -> Config;
        _ -> {skip, "needs root, setpriv and prlimit"}
    end.

end_per_suite(_Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    %% Readable by every user, wherever the project is.
    Dir = string:trim(os:cmd("mktemp -d")),
    Library = code:lib_dir(macula_peer_connector),
    [] = os:cmd(io_lib:format("cp -RL ~ts/ebin ~ts/priv ~ts && cp ~ts/*.beam ~ts/ebin && chmod -R a+rX ~ts",
                              [Library, Library, Dir, filename:dirname(code:which(?MODULE)), Dir, Dir])),
    Erl = filename:join([code:root_dir(), "bin", "erl"]),
    Exec = {os:find_executable("setpriv"), ?AS_USER ++ [Erl]},
    Node = macula_peer_test:start_node([filename:join(Dir, "ebin")], #{exec => Exec, env => [{"HOME", "/tmp"}]}),
    %% Loading code takes a descriptor.
    ok = call(Node, application, load, [macula_peer_connector]),
    {ok, Modules} = call(Node, application, get_key, [macula_peer_connector, modules]),
    ok = call(Node, code, ensure_modules_loaded, [Modules]),
    [{node, Node}, {os_pid, call(Node, os, getpid, [])}, {dir, Dir} | Config].

end_per_testcase(_Case, Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    file:del_dir_r(?config(dir, Config)).

no_thread_can_be_had(Config) ->
    %% What the first start makes once exists.
    ok = start_and_stop(Config),
    Before = used(Config),
    limit(Config, "--nproc=1:"),
    Failed = {error, {start_failed, eagain}},
    [?assertEqual({Call, Failed}, {Call, ask(Config, Call)}) || _ <- lists:seq(1, ?TRIES), Call <- starting_calls()],
    looks_unchanged(Config, Before),
    limit(Config, "--nproc=1000:"),
    ok = start_and_stop(Config),
    looks_unchanged(Config, Before).

no_descriptor_can_be_had(Config) ->
    ok = start_and_stop(Config),
    #{descriptors := Open} = Before = used(Config),
    limit(Config, ["--nofile=", integer_to_list(Open), ":"]),
    Failed = {error, {start_failed, emfile}},
    [?assertEqual({Call, Failed}, {Call, ask(Config, Call)}) || _ <- lists:seq(1, ?TRIES), Call <- starting_calls()],
    looks_unchanged(Config, Before),
    %% Enough for some of what is needed, and not for the rest.
    [begin
         limit(Config, ["--nofile=", integer_to_list(Open + Spare), ":"]),
         [?assertMatch({_, ok, _}, {Call, no_exception(Config, Call), Spare}) || Call <- starting_calls()],
         ok = call(?config(node, Config), macula_peer_node, stop, [])
     end || Spare <- lists:seq(1, 12)],
    limit(Config, "--nofile=1024:"),
    ok = start_and_stop(Config),
    looks_unchanged(Config, Before).

%% Every function that starts the engine.
starting_calls() ->
    [{macula_peer_node, start, []},
     {macula_peer_node, listen, [#{relay => #{}}]},
     {macula_peer_node, set_handler, [{erlang, display, []}]},
     {macula_peer_node, register, [<<"node">>, [<<"127.0.0.1:9">>]]},
     {macula_peer_connector, send_message, [<<"localhost:9">>, store, #{}, 500]},
     {macula_peer_connector, send_message_and_wait, [<<"127.0.0.1:9">>, store, #{}, 500]},
     {macula_peer_node, request, [<<"other">>, store, #{}, 500, #{endpoint => <<"127.0.0.1:9">>}]}].

ask(Config, {Module, Function, Args}) ->
    call(?config(node, Config), Module, Function, Args).

no_exception(Config, Call) ->
    try ask(Config, Call) of
        ok -> ok;
        {ok, _} -> ok;
        {error, _} -> ok;
        Other -> Other
    catch
        Class:Reason -> {Class, Reason}
    end.

start_and_stop(Config) ->
    Node = ?config(node, Config),
    ok = call(Node, macula_peer_node, start, []),
    ok = call(Node, macula_peer_node, stop, []).

looks_unchanged(Config, Before) ->
    until(fun() -> used(Config) =:= Before end).

used(Config) ->
    Proc = filename:join("/proc", ?config(os_pid, Config)),
    #{threads => entries(Proc, "task"), descriptors => entries(Proc, "fd"),
      processes => length(call(?config(node, Config), erlang, processes, []))}.

entries(Proc, Kind) ->
    {ok, Entries} = file:list_dir(filename:join(Proc, Kind)),
    length(Entries).

limit(Config, Limit) ->
    %% As the same user: that needs no privilege over other users' processes.
    [] = os:cmd(lists:join(" ", ["setpriv" | ?AS_USER] ++ ["prlimit", "--pid", ?config(os_pid, Config), Limit])).
