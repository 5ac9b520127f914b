%% A laboratory of hosts, each a network namespace, around switches. It has no connection to the outside, and nothing of
%% it is in the namespace that it was made from. One per BEAM; the processes on the hosts end with it.
-module(macula_peer_net).

-export([available/0, init_suite/1]).
-export([start/0, start/1, stop/0, namespaces/1]).
-export([add/2, switch/2, give/3, take/3, plug/4, isolate/2, lengthen/2, loss/2]).
-export([watch/3, passed/1]).

-export([ip/2, nft/2, kernel/3]).
-export([address/1, endpoint/2]).
-export([firewall/1, dropped/1, open/1]).
-export([start_node/1, start_node/2, command/3, socket/2, socket/3]).

-define(PREFIX, "macula-peer-").
-define(TABLE, "inet macula_peer").
%% Only what is there can be deleted.
-define(NO_TABLE, "add table " ?TABLE "; delete table " ?TABLE).
%% Of a node among many that start, in milliseconds.
-define(LONGEST_BOOT, 60000).
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

%% For `init_per_suite' of a suite that needs one.
init_suite(Config) ->
    case available() of
        ok -> Config;
        {skip, _} = Skip -> Skip
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
    Host = {?MODULE, namespace("attempt"), none},
    try
        Host = add("attempt", none),
        nft(Host, "list tables"),
        ok
    catch
        error:{command_failed, Command, Status, Output} -> {error, {Command, Status, Output}}
    after
        run(tool("ip"), ["netns", "del", name(Host)])
    end.

%% ---- the laboratory ----

%% Count hosts on one switch, which reach each other.
start(Count) ->
    Switch = start(),
    [begin
         Address = {10, 77, 0, N},
         Host = add(integer_to_list(N), Address),
         _ = plug(Host, "eth0", [{Address, 24}], Switch),
         Host
     end || N <- lists:seq(1, Count)].

%% One switch and nothing else. Removes what was here before, and what a run left that has died.
start() ->
    ok = stop(),
    [remove(Name) || Name <- namespaces(all), not is_alive(Name)],
    switch(add("switch", none), "bridge").

%% A host that is connected to nothing. The address is the one that it is called by.
add(Label, Address) ->
    Host = {?MODULE, namespace(Label), Address},
    ip(["netns", "add", name(Host)]),
    ip(Host, "link set lo up"),
    Host.

%% A switch with this name on the host, which has a port of it by the same name.
switch(Host, Bridge) ->
    ip(Host, "link add " ++ Bridge ++ " type bridge"),
    ip(Host, "link set " ++ Bridge ++ " up"),
    %% What it passes is not the host's, so the host's rules are not for it.
    Netfilter = "/proc/sys/net/bridge/bridge-nf-call-",
    succeed(Host, "sh", ["-c", "for f in " ++ Netfilter ++ "*tables; do [ ! -e $f ] || echo 0 > $f; done"]),
    {Host, Bridge}.

%% Puts an interface into the host and its cable into the switch. Returns the name of the switch's port.
plug(Host, Interface, Addresses, {Place, Bridge}) ->
    Port = "port-" ++ lists:last(string:split(name(Host), "-", all)),
    ip(Place, "link add " ++ Port ++ " type veth peer name " ++ Interface ++ " netns " ++ name(Host)),
    ip(Place, "link set " ++ Port ++ " master " ++ Bridge ++ " up"),
    ok = give(Host, Interface, Addresses),
    ip(Host, "link set " ++ Interface ++ " up"),
    Port.

%% The hosts at two such ports do not reach each other through the switch.
isolate({Place, _Bridge}, Port) ->
    ip(Place, "link set " ++ Port ++ " type bridge_slave isolated on").

%% From now on every packet takes these milliseconds for each cable of the switch. Once.
lengthen({Place, _Bridge} = Switch, Ms) ->
    Node = start_node(Place, [{"ERL_FLAGS", "+S 1"}]),
    _ = [lengthen(Switch, Port, Node, Ms) || Port <- ports(Switch)],
    ok.

lengthen({Place, Bridge}, Port, Node, Ms) ->
    [Line, Slot] = [Name ++ lists:nthtail(length("port"), Port) || Name <- ["line", "slot"]],
    ip(Place, "link set " ++ Port ++ " nomaster"),
    ip(Place, "link add " ++ Line ++ " type veth peer name " ++ Slot),
    _ = [ok = kernel(Place, "ipv6/conf/" ++ Name ++ "/disable_ipv6", 1) || Name <- [Port, Line, Slot]],
    ip(Place, "link set " ++ Slot ++ " master " ++ Bridge ++ " up"),
    ip(Place, "link set " ++ Line ++ " up"),
    ok = macula_peer_test:call(Node, macula_peer_long_link, join, [Port, Line, Ms]).

ports({Place, Bridge}) ->
    {match, Ports} = re:run(ip(Place, "-o link show master " ++ Bridge), "^\\d+: ([^@:]+)",
                            [global, multiline, {capture, all_but_first, list}]),
    lists:append(Ports).

%% From now on each cable of the switch loses this many UDP packets of a thousand.
loss({Place, _Bridge}, Permille) ->
    Lost = " meta l4proto udp numgen random mod 1000 < " ++ integer_to_list(Permille) ++ " drop\n",
    %% A packet that is passed on comes over one cable and leaves over another.
    nft(Place, "add table bridge loss; delete table bridge loss\n"
               "table bridge loss {\nchain pass {\ntype filter hook forward priority 0;\n" ++ Lost ++ Lost ++ "}\n}"),
    ok.

%% From now on UDP packets between the two addresses pass, or are dropped, and are counted from 0 on.
watch({Place, _Bridge}, [Ip, Other], Verdict) when Verdict =:= accept; Verdict =:= drop ->
    Rules = [lists:concat(["ip saddr ", inet:ntoa(From), " ip daddr ", inet:ntoa(To), " meta l4proto udp counter ",
                           Verdict, "\n"]) || {From, To} <- [{Ip, Other}, {Other, Ip}]],
    nft(Place, lists:append(["add table bridge watch; delete table bridge watch\n"
                             "table bridge watch {\nchain pass {\ntype filter hook forward priority 1;\n"]
                            ++ Rules ++ ["}\n}"])),
    ok.

%% The packets from each of the two.
passed({Place, _Bridge}) ->
    {match, Counts} = re:run(nft(Place, "list table bridge watch"), "counter packets (\\d+)",
                             [global, {capture, [1], list}]),
    [list_to_integer(Count) || [Count] <- Counts].

stop() ->
    [remove(Name) || Name <- namespaces(os:getpid())],
    ok.

%% The names of the namespaces that the BEAM with this process id made, or of all.
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

%% Addresses are `{Ip, PrefixLength}'. They are unique, so duplicate address detection is off.
give(Host, Interface, Addresses) ->
    _ = [ip(Host, lists:concat(["address add ", inet:ntoa(Ip), "/", Length, " dev ", Interface, " nodad"]))
         || {Ip, Length} <- Addresses],
    ok.

%% Takes them away again.
take(Host, Interface, Addresses) ->
    _ = [ip(Host, lists:concat(["address del ", inet:ntoa(Ip), "/", Length, " dev ", Interface]))
         || {Ip, Length} <- Addresses],
    ok.

namespace(Label) ->
    ?PREFIX ++ os:getpid() ++ "-" ++ Label.

name({?MODULE, Name, _Address}) -> Name.

address(here) -> {127, 0, 0, 1};
address({?MODULE, _Name, Address}) -> Address.

%% Of a host, of this one, or of an address.
endpoint({_, _, _, _} = Ip, Port) -> macula_peer_test:endpoint(inet:ntoa(Ip), Port);
endpoint({_, _, _, _, _, _, _, _} = Ip, Port) -> macula_peer_test:endpoint([$[, inet:ntoa(Ip), $]], Port);
endpoint(Where, Port) -> endpoint(address(Where), Port).

%% ---- the firewall of a host ----

%% Drops unsolicited UDP packets.
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
    succeed(Host, "nft", [Script]).

%% ---- what runs on a host ----

%% A BEAM node, as those of macula_peer_test.
start_node(Host) ->
    start_node(Host, []).

%% With variables of its environment.
start_node(Host, Variables) ->
    macula_peer_test:start_node(macula_peer_test:node_paths(),
                                #{exec => command(Host, tool("erl"), []), env => Variables,
                                  wait_boot => ?LONGEST_BOOT}).

%% A command line that runs the program on the host.
command(here, Program, Args) -> {Program, Args};
command(Host, Program, Args) -> {tool("ip"), ["netns", "exec", name(Host), Program | Args]}.

%% A UDP socket of this process, on the host.
socket(Host, Port) ->
    socket(Host, address(Host), Port).

%% At this one of its addresses.
socket(Host, Address, Port) ->
    Family = case size(Address) of 4 -> inet; 8 -> inet6 end,
    Options = [Family, binary, {active, false}, {ip, Address}, {netns, "/run/netns/" ++ name(Host)}],
    {ok, Socket} = gen_udp:open(Port, Options),
    Socket.

%% ---- commands ----

%% What `ip' says to these words on the host.
ip(Host, Words) ->
    ip(["-n", name(Host) | string:lexemes(Words, " ")]).

ip(Args) ->
    succeed(here, "ip", Args).

%% Sets what the host's kernel has below /proc/sys/net.
kernel(Host, Setting, Value) ->
    succeed(Host, "sh", ["-c", lists:concat(["echo ", Value, " > /proc/sys/net/", Setting])]),
    ok.

succeed(Where, Tool, Args) ->
    {Program, AllArgs} = command(Where, tool(Tool), Args),
    case run(Program, AllArgs) of
        {0, Output} -> Output;
        {Status, Output} -> error({command_failed, [Program | AllArgs], Status, Output})
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
