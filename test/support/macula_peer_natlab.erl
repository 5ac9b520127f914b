%% A small Internet: a switch, two relay hosts with addresses of both families, and sites, each of which is a public
%% host, or hosts behind a NAT or firewall. Every home has the same addresses inside.
-module(macula_peer_natlab).

-export([kinds/0]).
-export([start/1, stop/0, lengthen/2, loss/2]).
-export([between/4, passed/1, move_router/2, move_host/2]).
-export([sites/1, hosts/2, public/2, relays/1, relays/2]).

-define(CARRIER, {100, 64, 0, 1}).
-define(HOME, {192, 168, 1, 1}).
%% The distance from a host's old address to its new one, when it moves.
-define(AWAY, 100).

%% Of sites.
kinds() ->
    [none, full_cone, address_restricted, port_restricted, symmetric, symmetric_sequential, carrier_grade,
     ipv6_firewall, udp_blocked].

%% Sites are `{Name, Kind}' or `{Name, Kind, Opts}'. Options: `hosts' (1), `hairpin' (false; of cones, see
%% macula_peer_nat), and `isolated' (false): the hosts of the site do not reach each other inside.
start(Sites) ->
    Switch = macula_peer_net:start(),
    Relays = [relay(Label, Numbers, Switch) || {Label, Numbers} <- [{"relay1", [1, 2]}, {"relay2", [3]}]],
    Lab = #{switch => Switch, relays => Relays, sites => #{}},
    Numbered = lists:zip(lists:seq(10, 9 + length(Sites)), Sites),
    Built = lists:foldl(fun({Number, Site}, Before) -> add_site(Number, Site, Before) end, Lab, Numbered),
    ok = connect_ipv6(Built),
    Built.

stop() ->
    macula_peer_net:stop().

%% Like macula_peer_net for the switch: every path crosses two of its cables.
lengthen(#{switch := Switch}, Ms) ->
    macula_peer_net:lengthen(Switch, Ms).

loss(#{switch := Switch}, Permille) ->
    macula_peer_net:loss(Switch, Permille).

%% Packets between two sites, see macula_peer_net:watch/3.
between(#{switch := Switch} = Lab, Name, Other, Verdict) ->
    macula_peer_net:watch(Switch, [public(Lab, Site) || Site <- [Name, Other]], Verdict).

passed(#{switch := Switch}) ->
    macula_peer_net:passed(Switch).

%% The site's router gets another address outside in place of its present one.
move_router(#{sites := Sites} = Lab, Name) ->
    #{router := Router, public := Public} = Site = maps:get(Name, Sites),
    Other = second(Public, ?AWAY),
    ok = macula_peer_net:take(Router, "outside", [subnet(Public)]),
    ok = macula_peer_net:give(Router, "outside", [subnet(Other)]),
    Lab#{sites := Sites#{Name := Site#{public := Other}}}.

%% The first host of the site gets another address inside in place of its present one. No host addresses it by that.
move_host(Lab, Name) ->
    Host = hd(hosts(Lab, Name)),
    Inside = macula_peer_net:address(Host),
    ok = macula_peer_net:take(Host, "eth0", [subnet(Inside)]),
    ok = macula_peer_net:give(Host, "eth0", [subnet(second(Inside, ?AWAY))]),
    default_route(Host, ?HOME).

%% ---- what there is ----

sites(#{sites := Sites}) -> maps:keys(Sites).

hosts(#{sites := Sites}, Name) -> maps:get(hosts, maps:get(Name, Sites)).

%% The address that others see the first host of the site at.
public(#{sites := Sites}, Name) -> maps:get(public, maps:get(Name, Sites)).

%% Each with its host and addresses.
relays(#{relays := Relays}) -> Relays.

%% With the addresses of the family that the site has, or likes.
relays(Lab, Name) ->
    [{Host, [Ip || Ip <- Ips, size(Ip) =:= size(public(Lab, Name))]} || {Host, Ips} <- relays(Lab)].

%% ---- building ----

relay(Label, Numbers, Switch) ->
    Ips = [Ip || Family <- [fun ipv4/1, fun ipv6/1], Ip <- lists:map(Family, Numbers)],
    Host = macula_peer_net:add(Label, hd(Ips)),
    _ = plug_in(Host, "eth0", Ips, Switch),
    {Host, Ips}.

add_site(Number, {Name, Kind}, Lab) ->
    add_site(Number, {Name, Kind, #{}}, Lab);
add_site(Number, {Name, Kind, Opts}, #{sites := Sites} = Lab) ->
    Site = build(Kind, Number, Opts, Lab),
    Lab#{sites := Sites#{Name => Site#{kind => Kind, number => Number}}}.

build(none, Number, _Opts, #{switch := Switch}) ->
    Host = macula_peer_net:add(label("host", Number), ipv4(Number)),
    _ = plug_in(Host, "eth0", [ipv4(Number), ipv6(Number)], Switch),
    #{public => ipv4(Number), hosts => [Host]};
build(ipv6_firewall = Kind, Number, Opts, #{switch := Switch}) ->
    Router = router("router", Number, Kind, ipv6(Number), Switch, #{}),
    Home = {8193, 3512, Number, 0, 0, 0, 0, 1},
    Hosts = home(Router, Number, Home, Opts),
    #{public => macula_peer_net:address(hd(Hosts)), router => Router, hosts => Hosts};
build(carrier_grade, Number, Opts, #{switch := Switch}) ->
    Carrier = router("carrier", Number, port_restricted, ipv4(Number), Switch, #{}),
    Inner = inside(Carrier, ?CARRIER),
    Router = router("router", Number, port_restricted, second(?CARRIER, 1), Inner, Opts),
    ok = default_route(Router, ?CARRIER),
    #{public => ipv4(Number), router => Carrier, hosts => home(Router, Number, ?HOME, Opts)};
build(Kind, Number, Opts, #{switch := Switch, relays := Relays}) ->
    Only = [Ip || {_, Ips} <- Relays, Ip <- Ips, size(Ip) =:= 4],
    Router = router("router", Number, Kind, ipv4(Number), Switch, Opts#{only => Only}),
    #{public => ipv4(Number), router => Router, hosts => home(Router, Number, ?HOME, Opts)}.

router(Label, Number, Kind, Public, Switch, Opts) ->
    Router = macula_peer_net:add(label(Label, Number), Public),
    ok = macula_peer_nat:install(Router, Kind, Opts#{public => Public}),
    _ = plug_in(Router, "outside", [Public], Switch),
    Router.

%% The hosts behind a router.
home(Router, Number, Gateway, Opts) ->
    Switch = inside(Router, Gateway),
    [begin
         Host = macula_peer_net:add(label("host", Number) ++ [$` + N], second(Gateway, 9 + N)),
         Port = plug_in(Host, "eth0", [macula_peer_net:address(Host)], Switch),
         _ = [macula_peer_net:isolate(Switch, Port) || maps:get(isolated, Opts, false)],
         ok = default_route(Host, Gateway),
         Host
     end || N <- lists:seq(1, maps:get(hosts, Opts, 1))].

inside(Router, Gateway) ->
    Switch = macula_peer_net:switch(Router, "inside"),
    ok = macula_peer_net:give(Router, "inside", [subnet(Gateway)]),
    Switch.

plug_in(Host, Interface, Ips, Switch) ->
    macula_peer_net:plug(Host, Interface, lists:map(fun subnet/1, Ips), Switch).

subnet(Ip) when size(Ip) =:= 4 -> {Ip, 24};
subnet(Ip) -> {Ip, 64}.

default_route(Host, Gateway) ->
    route(Host, "default", Gateway).

%% Each host with an IPv6 address on the switch is told which networks are behind which firewall.
connect_ipv6(#{relays := Relays, sites := Sites}) ->
    Firewalls = [Site || #{kind := ipv6_firewall} = Site <- maps:values(Sites)],
    Public = [Host || {Host, _} <- Relays] ++ [Host || #{kind := none, hosts := [Host]} <- maps:values(Sites)]
             ++ [Router || #{router := Router} <- Firewalls],
    _ = [ok = route(Host, network(Site), macula_peer_net:address(Router))
         || #{router := Router} = Site <- Firewalls, Host <- Public, Host =/= Router],
    ok.

network(#{public := {A, B, C, D, _, _, _, _}}) ->
    inet:ntoa({A, B, C, D, 0, 0, 0, 0}) ++ "/64".

route(Host, To, Via) ->
    Family = case size(Via) of 4 -> "-4"; 8 -> "-6" end,
    macula_peer_net:ip(Host, lists:concat([Family, " route add ", To, " via ", inet:ntoa(Via)])),
    ok.

%% Addresses for documentation: the others of this machine are not among them, nor are they private.
ipv4(Number) -> {198, 51, 100, Number}.
ipv6(Number) -> {8193, 3512, 0, 0, 0, 0, 0, Number}.

second(Ip, Distance) ->
    setelement(size(Ip), Ip, element(size(Ip), Ip) + Distance).

label(Name, Number) ->
    Name ++ integer_to_list(Number).
