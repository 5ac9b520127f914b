%% NATs and firewalls for the routers of macula_peer_natlab: rules for the kernel, and what they amount to, in the words
%% of RFC 4787. A router has the interfaces `outside' and `inside'.
-module(macula_peer_nat).

-export([is/1]).
-export([install/3]).

%% The most flows at once, each with a port of its own.
-define(SEQUENTIAL_PORTS, 4096).
-define(FIRST_SEQUENTIAL_PORT, 40000).
%% How long a mapping lives in the kernel, in seconds: until it is answered, and from then on. As widespread as any.
-define(UNANSWERED, 30).
-define(ANSWERED, 120).

%% What others find out about a node behind it. Mapping and filtering: `ei', `hd' or `pd' (independent of the endpoint,
%% dependent on its host, on its port too). Allocation: `pp', `pc' or `rd' (ports preserved, one after another, random).
is(none) -> #{mapping => ei, filtering => ei, allocation => pp};
is(full_cone) -> #{mapping => ei, filtering => ei, allocation => pp};
is(address_restricted) -> #{mapping => ei, filtering => hd, allocation => pp};
is(port_restricted) -> #{mapping => ei, filtering => pd, allocation => pp};
is(symmetric) -> #{mapping => pd, filtering => pd, allocation => rd};
is(symmetric_sequential) -> #{mapping => pd, filtering => pd, allocation => pc};
is(carrier_grade) -> is(port_restricted);
is(ipv6_firewall) -> is(port_restricted);
is(udp_blocked) -> is(port_restricted).

%% On a router with this address outside. With `hairpin' hosts inside reach each other at their mapped addresses, where
%% the filter lets them. `only', of `udp_blocked', are the addresses that UDP is not blocked to.
install(Router, Kind, #{public := Public} = Opts) ->
    [ok = macula_peer_net:kernel(Router, Setting, Value) || {Setting, Value} <- kernel_settings()],
    macula_peer_net:nft(Router, lists:flatten(rules(Kind, inet:ntoa(Public), Opts))),
    ok.

kernel_settings() ->
    [{"ipv4/ip_forward", 1}, {"ipv6/conf/all/forwarding", 1},
     {"netfilter/nf_conntrack_udp_timeout", ?UNANSWERED}, {"netfilter/nf_conntrack_udp_timeout_stream", ?ANSWERED}].

rules(ipv6_firewall, _Public, _Opts) ->
    table("ip6", [through([]), input()]);
rules(udp_blocked, _Public, #{only := Only}) ->
    Allowed = lists:join(",", [inet:ntoa(Ip) || Ip <- Only]),
    table("ip", [through([["iifname inside meta l4proto udp ip daddr != {", Allowed, "} drop"]]), input(),
                 outward(["oifname outside masquerade"])]);
rules(symmetric, _Public, _Opts) ->
    table("ip", [through([]), input(), outward(["oifname outside masquerade fully-random"])]);
rules(symmetric_sequential, Public, _Opts) ->
    Ports = lists:join(",", lists:map(fun sequential_port/1, lists:seq(0, ?SEQUENTIAL_PORTS - 1))),
    Next = ["numgen inc mod ", integer_to_list(?SEQUENTIAL_PORTS), " map {", Ports, "}"],
    Rule = ["oifname outside meta l4proto udp snat ip to ", Public, " : ", Next],
    table("ip", [through([]), input(), outward([Rule])]);
rules(Cone, Public, Opts) ->
    table("ip", [through([]), input(), inward(inward_rules(Cone, Public, Opts)),
                 outward([["iifname inside oifname inside snat ip to ", Public], "oifname outside masquerade"])]).

sequential_port(N) ->
    lists:concat([N, ":", ?FIRST_SEQUENTIAL_PORT + N]).

%% Unsolicited packets do not come in, unless a rule of `inward' has given them an address inside.
through(First) ->
    chain("through", "filter hook forward priority 0",
          First ++ ["ct state established,related accept", "ct status dnat accept",
                    "iifname outside meta l4proto udp drop"]).

%% The router takes no UDP for itself. Otherwise it would remember the source, and move packets that inside hosts send
%% there to another port: nodes that begin at the same moment would fail for a reason that no real NAT has.
input() ->
    chain("input", "filter hook input priority 0", ["iifname != lo ct state new meta l4proto udp drop"]).

outward(Rules) ->
    chain("outward", "nat hook postrouting priority 100", Rules).

%% The kernel itself passes answers, and nothing else. For other packets there are rules, and the sets they look in:
%% which host has the port, and which addresses it has sent to.
inward([]) ->
    [];
inward(Rules) ->
    [block("map mapped", ["type inet_service : ipv4_addr . inet_service;" | lifetime()]),
     block("set hosts", ["type inet_service . ipv4_addr;" | lifetime()]),
     block("set ports", ["type inet_service . ipv4_addr . inet_service;" | lifetime()]),
     %% Before any address is changed.
     chain("learn", "filter hook prerouting priority -150",
           [["iifname inside meta l4proto udp update @", Update]
            || Update <- ["mapped { udp sport : ip saddr . udp sport }", "hosts { udp sport . ip daddr }",
                          "ports { udp sport . ip daddr . udp dport }"]]),
     chain("inward", "nat hook prerouting priority -100", Rules)].

inward_rules(Cone, Public, Opts) ->
    [["iifname outside ", asked(Cone, "saddr"), translated()] || Cone =/= port_restricted]
    ++ [["iifname inside ip daddr ", Public, " ", asked(Cone, "daddr"), translated()]
        || maps:get(hairpin, Opts, false)].

lifetime() ->
    ["flags dynamic,timeout;", ["timeout ", integer_to_list(?ANSWERED), "s;"]].

asked(full_cone, _Address) -> "";
asked(address_restricted, Address) -> ["udp dport . ip ", Address, " @hosts "];
asked(port_restricted, Address) -> ["udp dport . ip ", Address, " . udp sport @ports "].

translated() ->
    "meta l4proto udp dnat ip to udp dport map @mapped".

table(Family, Blocks) ->
    block(["table ", Family, " nat"], Blocks).

chain(Name, Hook, Rules) ->
    block(["chain ", Name], [["type ", Hook, ";"] | Rules]).

block(Head, Lines) ->
    [Head, " {\n", [[Line, "\n"] || Line <- Lines], "}\n"].
