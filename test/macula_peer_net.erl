%% A laboratory of hosts, each a network namespace, around a switch, which is another. There is no way out of it, and
%% nothing of it in the namespace that it was made from. One to a BEAM; the processes on the hosts end with it.
-module(macula_peer_net).

-export([available/0]).
-export([start/1, stop/0, namespaces/1]).
-export([address/1, endpoint/2]).
-export([firewall/1, dropped/1, open/1]).
-export([start_node/1, command/3, socket/2]).

-define(PREFIX, "macula-peer-").
-define(TABLE, "inet macula_peer").
%% Only what is there can be deleted.
-define(NO_TABLE, "add table " ?TABLE "; delete table " ?TABLE).
%% Where the administrator's tools are, if not in the PATH.
-define(TOOL_PATH, "/usr/sbin:/sbin:/usr/bin:/bin").

%% Whether there can be one here; if not, what a suite returns to be skipped.
available() ->
    case missing() of
        [] ->
            ok;
        Reason ->
            ct:pal("SKIPPED, a network laboratory is needed: ~ts", [Reason]),
            {skip, Reason}
    end.

missing() ->
    case {os:cmd("id -u"), [Tool || Tool <- ["ip", "nft"], tool(Tool) =:= false]} of
        {"0\n", []} -> forbidden(attempt());
        {"0\n", Tools} -> "not installed: " ++ string:join(Tools, " ");
        {_, _} -> "network namespaces need root"
    end.

%% Root of a container may not do it. Anything else that is wrong is to fail.
forbidden({error, {_, _, Output}}) ->
    case re:run(Output, "not permitted|denied", [caseless, {capture, none}]) of
        match -> "network namespaces need more rights than this root has: " ++ string:trim(Output);
        nomatch -> []
    end;
forbidden(ok) ->
    [].

attempt() ->
    Name = name("attempt"),
    try
        ip(["netns", "add", Name]),
        ip(["netns", "exec", Name, tool("nft"), "list", "tables"]),
        ok
    catch
        error:{command_failed, Command, Status, Output} -> {error, {Command, Status, Output}}
    after
        run(tool("ip"), ["netns", "del", Name])
    end.

%% ---- the laboratory ----

%% The hosts, which reach each other. Removes what was here before, and what a run left that has died.
start(Count) ->
    ok = stop(),
    [remove(Name) || Name <- namespaces(all), not is_alive(Name)],
    Switch = name("switch"),
    ip(["netns", "add", Switch]),
    ip(["-n", Switch, "link", "add", "bridge", "type", "bridge"]),
    ip(["-n", Switch, "link", "set", "bridge", "up"]),
    [add_host(Switch, N) || N <- lists:seq(1, Count)].

stop() ->
    [remove(Name) || Name <- namespaces(os:getpid())],
    ok.

%% The names of those that the BEAM with this process id made, or all.
namespaces(all) ->
    [Name || ?PREFIX ++ _ = Name <- listed()];
namespaces(Pid) ->
    [Name || Name <- listed(), lists:prefix(?PREFIX ++ Pid ++ "-", Name)].

listed() ->
    [hd(string:lexemes(Line, " ")) || Line <- string:lexemes(ip(["netns", "list"]), "\n")].

is_alive(Name) ->
    [Pid | _] = string:lexemes(lists:nthtail(length(?PREFIX), Name), "-"),
    filelib:is_dir("/proc/" ++ Pid).

%% A namespace lives as long as a process is in it, so those end first. Another run may be removing the same.
remove(Name) ->
    {_, Pids} = run(tool("ip"), ["netns", "pids", Name]),
    [run(tool("kill"), ["-9", Pid]) || Pid <- string:lexemes(Pids, "\n"), is_digits(Pid)],
    Removed = run(tool("ip"), ["netns", "del", Name]),
    lists:member(Name, listed()) andalso error({not_removed, Name, Removed}).

is_digits(Text) ->
    lists:all(fun(Char) -> Char >= $0 andalso Char =< $9 end, Text).

add_host(Switch, N) ->
    Name = name(integer_to_list(N)),
    Port = "port" ++ integer_to_list(N),
    Address = {10, 77, 0, N},
    ip(["netns", "add", Name]),
    ip(["-n", Switch, "link", "add", Port, "type", "veth", "peer", "name", "eth0", "netns", Name]),
    ip(["-n", Switch, "link", "set", Port, "master", "bridge", "up"]),
    ip(["-n", Name, "address", "add", inet:ntoa(Address) ++ "/24", "dev", "eth0"]),
    [ip(["-n", Name, "link", "set", Interface, "up"]) || Interface <- ["lo", "eth0"]],
    {?MODULE, Name, Address}.

name(Host) ->
    ?PREFIX ++ os:getpid() ++ "-" ++ Host.

address(here) -> {127, 0, 0, 1};
address({?MODULE, _Name, Address}) -> Address.

endpoint(Where, Port) ->
    macula_peer_test:endpoint(inet:ntoa(address(Where)), Port).

%% ---- the firewall of a host ----

%% Drops what comes by UDP and was not asked for.
firewall(Host) ->
    nft(Host, ?NO_TABLE "; add table " ?TABLE ";"
              "add chain " ?TABLE " input { type filter hook input priority 0; policy accept; };"
              "add rule " ?TABLE " input iif lo accept;"
              "add rule " ?TABLE " input ct state established,related accept;"
              "add rule " ?TABLE " input meta l4proto udp counter drop"),
    ok.

%% How many packets the firewall dropped.
dropped(Host) ->
    {match, [Count]} = re:run(nft(Host, "list table " ?TABLE), "counter packets (\\d+)", [{capture, [1], list}]),
    list_to_integer(Count).

open(Host) ->
    nft(Host, ?NO_TABLE),
    ok.

nft(Host, Script) ->
    {Executable, Args} = command(Host, tool("nft"), [Script]),
    succeed(Executable, Args).

%% ---- what runs on a host ----

%% A BEAM node, as those of macula_peer_test.
start_node(Host) ->
    macula_peer_test:start_node(macula_peer_test:node_paths(), #{exec => command(Host, tool("erl"), [])}).

%% A command line that runs the program on the host.
command(here, Program, Args) -> {Program, Args};
command({?MODULE, Name, _Address}, Program, Args) -> {tool("ip"), ["netns", "exec", Name, Program | Args]}.

%% A UDP socket of this process, on the host.
socket({?MODULE, Name, Address}, Port) ->
    Options = [binary, {active, false}, {ip, Address}, {netns, "/run/netns/" ++ Name}],
    {ok, Socket} = gen_udp:open(Port, Options),
    Socket.

%% ---- commands ----

ip(Args) ->
    succeed(tool("ip"), Args).

succeed(Program, Args) ->
    case run(Program, Args) of
        {0, Output} -> Output;
        {Status, Output} -> error({command_failed, [Program | Args], Status, Output})
    end.

run(Program, Args) ->
    Port = open_port({spawn_executable, Program}, [{args, Args}, exit_status, stderr_to_stdout]),
    output(Port, []).

output(Port, Output) ->
    receive
        {Port, {data, Data}} -> output(Port, [Output, Data]);
        {Port, {exit_status, Status}} -> {Status, lists:flatten(Output)}
    end.

tool(Name) ->
    case os:find_executable(Name) of
        false -> os:find_executable(Name, ?TOOL_PATH);
        Path -> Path
    end.
