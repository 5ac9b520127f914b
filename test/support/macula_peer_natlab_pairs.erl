%% Two nodes of the NAT laboratory meet: how soon the first message arrives, and which path there is in the end. Each
%% host has a node, which is started once; for each meeting both engines start with new names.
-module(macula_peer_natlab_pairs).

-export([kinds/0, sites/1, start/1]).
-export([meet_as_expected/4, expected/2, misses/2]).
-export([begin_anew/3]).
-export([first_message/4]).

-import(macula_peer_test, [call/4]).

%% Until a direct path is no longer waited for, in milliseconds: as long as a node may take to find one or say why not.
-define(PATIENCE, 3000).
%% The same where there must be one every time: packets are lost, and nodes try again.
-define(LONG_PATIENCE, 10000).
-define(POLL, 5).
%% Many on few processors.
-define(SMALL, [{"ERL_FLAGS", "+S 1 +SDio 2 +A 1"}]).

%% The kinds that meet each other. A `hairpin' only meets its neighbour: the hosts of one reach each other at no other
%% addresses than those outside.
kinds() ->
    macula_peer_natlab:kinds() ++ [hairpin].

%% Each kind meets its own at another site, and a neighbour behind the same router.
sites(Kinds) ->
    lists:append([sites_of(Kind) || Kind <- Kinds]).

sites_of(none) -> [{{none, here}, none}, {{none, there}, none}];
sites_of(hairpin) -> [{{hairpin, here}, port_restricted, #{hosts => 2, hairpin => true, isolated => true}}];
sites_of(Kind) -> [{{Kind, here}, Kind, #{hosts => 2}}, {{Kind, there}, Kind}].

%% A relay on each relay host, and a node on each host of the sites, which are those of the laboratory.
start(Lab) ->
    Sites = macula_peer_natlab:sites(Lab),
    Hosts = [Host || {Host, _} <- macula_peer_natlab:relays(Lab)]
            ++ [Host || Site <- Sites, Host <- macula_peer_natlab:hosts(Lab, Site)],
    Started = macula_peer_test:in_parallel(length(Hosts), fun(N) ->
        macula_peer_net:start_node(lists:nth(N, Hosts), ?SMALL)
    end),
    Nodes = maps:from_list(lists:zip(Hosts, Started)),
    Ports = maps:from_list([{Host, relay(maps:get(Host, Nodes))} || {Host, _} <- macula_peer_natlab:relays(Lab)]),
    #{lab => Lab, nodes => Nodes, ports => Ports}.

relay(Node) ->
    {ok, {_, Port}} = call(Node, macula_peer_test, listen, [#{relay => #{}}]),
    Port.

%% ---- meetings ----

%% This many, or more if that is too few to tell.
meet_as_expected(Pairs, Kind, Other, Count) ->
    Ends = {{{Kind, here}, 1}, end_of(Kind, Other)},
    Expected = expected(Kind, Other),
    judged(Pairs, Ends, Expected, [meet(Pairs, Ends, Expected) || _ <- lists:seq(1, Count)]).

end_of(Kind, neighbour) -> {{Kind, here}, 2};
end_of(_Kind, Other) -> {{Other, there}, 1}.

judged(Pairs, Ends, Expected, Meetings) ->
    case judge(Expected, Meetings) of
        more -> judged(Pairs, Ends, Expected, [meet(Pairs, Ends, Expected) | Meetings]);
        Verdict -> {Verdict, Meetings}
    end.

%% For the nodes on the N-th hosts of two sites, of which the first sends to the other. `failed' is an error. `first'
%% and `direct' are the milliseconds until the first message had arrived and until there was a direct path (`none':
%% there was not), `path' is the final one, and `said' the milliseconds until the node reported that there is no direct
%% one (`none': it did not), and `why'.
meet(Pairs, Ends, Expected) ->
    try
        try_to_meet(Pairs, Ends, Expected)
    catch
        Class:Reason:Stack -> #{failed => {Class, Reason, Stack}}
    end.

try_to_meet(Pairs, Ends, Expected) ->
    [{Sender, Name}, {Target, Other}] =
        macula_peer_test:in_parallel(2, fun(N) -> begin_anew(Pairs, element(N, Ends), #{}) end),
    Id = erlang:unique_integer([positive]),
    case call(Sender, ?MODULE, first_message, [Name, Other, Id, Expected]) of
        {ok, Start, Outcome} ->
            #{at := At} = macula_peer_relays:delivered(Target, Id),
            confirm(Outcome#{first => (At - Start) div 1000}, Sender, {Name, Other}, Target);
        {error, Reason} ->
            #{failed => Reason}
    end.

%% The node on the N-th host of a site, with a name that is new, as soon as it can be reached.
begin_anew(#{lab := Lab, nodes := Nodes} = Pairs, {Site, N}, Settings) ->
    Node = maps:get(lists:nth(N, macula_peer_natlab:hosts(Lab, Site)), Nodes),
    Name = crypto:strong_rand_bytes(32),
    Relays = relays(Pairs, Site),
    ok = call(Node, macula_peer_node, stop, []),
    ok = macula_peer_relays:forget(Node),
    ok = call(Node, macula_peer_relays, engine, [Settings#{node_id => Name, relays => Relays, workers => 1}]),
    macula_peer_relays:await_registered(Node, Relays),
    macula_peer_test:until(fun() -> knows_its_nat(Node) end),
    {Node, Name}.

relays(#{lab := Lab, ports := Ports}, Site) ->
    [macula_peer_net:endpoint(Ip, maps:get(Host, Ports)) || {Host, [Ip | _]} <- macula_peer_natlab:relays(Lab, Site)].

knows_its_nat(Node) ->
    #{detected_at := At} = call(Node, macula_peer_node, nat_profile, []),
    is_integer(At).

%% Runs in the sender.
first_message(Name, Other, Id, Expected) ->
    Start = os:system_time(microsecond),
    case macula_peer_connector:send_message_nat_aware(Name, Other, store, #{id => Id}) of
        ok -> {ok, Start, outcome(Other, Start, Expected)};
        {error, _} = Error -> Error
    end.

outcome(To, Start, Expected) ->
    {ok, Path} = macula_peer_node:path(To),
    Ms = (os:system_time(microsecond) - Start) div 1000,
    Late = Ms > patience(Expected),
    Hoped = Expected =:= direct orelse Expected =:= mostly_direct,
    case Path of
        #{path := Direct} when Direct =:= direct; Direct =:= hole_punch ->
            #{path => Direct, direct => Ms, said => none};
        #{path := Other, failed := #{hole_punch := _} = Why} when Late; not Hoped ->
            #{path => Other, direct => none, said => Ms, why => Why};
        #{path := Other} when Late ->
            #{path => Other, direct => none, said => none};
        #{} ->
            receive after ?POLL -> outcome(To, Start, Expected) end
    end.

patience(direct) -> ?LONG_PATIENCE;
patience(_) -> ?PATIENCE.

%% A message does come by the path that there is said to be.
confirm(#{direct := none} = Outcome, _Sender, _Names, _Target) ->
    Outcome;
confirm(#{path := Path} = Outcome, Sender, {Name, Other}, Target) ->
    Id = erlang:unique_integer([positive]),
    ok = call(Sender, macula_peer_connector, send_message_nat_aware, [Name, Other, store, #{id => Id}]),
    case macula_peer_relays:delivered(Target, Id) of
        #{path := relay} -> Outcome#{failed => {not_by, Path}};
        #{} -> Outcome
    end.

%% ---- the expected outcome ----

%% Between two kinds of site, or two neighbours of one: `direct' every time, `mostly_direct', which is nine times of
%% ten, by `relay', `said' to be by relay only, or `any'.
expected(Kind, neighbour) when Kind =:= none; Kind =:= udp_blocked -> any;
expected(_Kind, neighbour) -> direct;
expected(One, Other) -> between(lists:sort([class(One), class(Other)])).

%% From the easiest to the hardest.
class(none) -> {1, public};
class(full_cone) -> {2, cone};
class(address_restricted) -> {2, cone};
class(port_restricted) -> {3, strict};
class(carrier_grade) -> {3, strict};
class(symmetric_sequential) -> {4, sequential};
class(symmetric) -> {5, random};
class(ipv6_firewall) -> {6, ipv6};
class(udp_blocked) -> {7, blocked}.

between([_, {_, blocked}]) -> relay;
between([{_, ipv6}, {_, ipv6}]) -> direct;
%% This one has addresses of both families, and says to the relays which it likes.
between([{_, public}, {_, ipv6}]) -> any;
between([_, {_, ipv6}]) -> relay;
between([{_, random}, {_, random}]) -> said;
between([{_, sequential}, {_, random}]) -> any;
between([{_, strict}, {_, random}]) -> mostly_direct;
between([{_, sequential}, {_, sequential}]) -> any;
between([_, {_, sequential}]) -> mostly_direct;
between([_, _]) -> direct.

%% Whether these meetings are what is expected: `ok', `broken', or `more' where there were too few to tell.
judge(Expected, Meetings) ->
    Failed = [Meeting || #{failed := _} = Meeting <- Meetings],
    case {length(misses(Expected, Meetings)), length(Meetings)} of
        {_, _} when Failed =/= [] -> broken;
        {0, _} -> ok;
        {Misses, Count} when Expected =:= mostly_direct, Misses * 10 =< Count -> ok;
        {1, _} when Expected =:= mostly_direct -> more;
        {_, _} -> broken
    end.

%% The results that differ.
misses(Expected, Meetings) ->
    [Meeting || Meeting <- Meetings, not fits(Expected, Meeting)].

fits(_, #{failed := _}) -> false;
fits(any, _) -> true;
fits(relay, Meeting) -> not is_direct(Meeting);
fits(said, Meeting) -> not is_direct(Meeting) andalso maps:get(said, Meeting) =/= none;
fits(_, Meeting) -> is_direct(Meeting).

is_direct(#{direct := Ms}) -> Ms =/= none.
