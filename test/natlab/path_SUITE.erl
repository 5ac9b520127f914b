%% Paths between nodes behind NATs change, are lost and found again, and no message is lost. The nodes are those of the
%% NAT laboratory, with a new engine in every case.
-module(path_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, await/3, until/1, until/2]).
-import(macula_peer_relays, [start_stream/4, stream_with/2, end_stream/2, await_count/2, sequence/1, streamed/1]).

%% Milliseconds between two messages of a stream that goes on while something happens.
-define(EVERY, 10).
%% How long something may take that has no promise, in milliseconds.
-define(PATIENCE, 30000).
%% Promises: to be on the relay again when the direct path is dead, and on a direct path again from another network.
-define(BACK_ON_RELAY, 5000).
-define(HEALED, 10000).
%% Less than an attempt to punch that comes to nothing takes.
-define(ATTEMPT, 2500).
%% Packets that a node may have sent when it hears that the other one wants none. An attempt sends hundreds.
-define(A_FEW, 100).

suite() -> [{timetrap, {seconds, 90}}].

all() ->
    [a_stream_goes_on_over_the_relay_while_the_direct_path_is_cut, an_unused_direct_path_is_let_go,
     relays_and_gateways_say_the_address_that_was_found_out, one_connection_remains_when_both_begin_at_once,
     one_connection_remains_when_a_hard_one_and_another_begin_at_once,
     a_caller_that_skips_hole_punching_stays_on_the_relay, a_node_that_never_punches_stays_on_the_relay,
     a_node_that_never_punches_is_not_punched, many_packets_are_not_sent_where_they_are_not_allowed,
     a_hopeless_punch_is_not_tried_for_every_message, punching_leaves_descriptors_to_the_application, a_stream_goes_on_when_the_router_moves,
     a_stream_goes_on_when_the_host_moves].

init_per_suite(Config) ->
    case macula_peer_net:available() of
        ok ->
            Lab = macula_peer_natlab:start([{one, port_restricted}, {two, port_restricted}, {cone, full_cone},
                                            {hard, symmetric}, {random, symmetric}]),
            [{lab, Lab}, {pairs, macula_peer_natlab_pairs:start(Lab)} | Config];
        {skip, _} = Skip ->
            io:format(user, "SKIPPED: ~b cases of paths through NATs~n", [length(all())]),
            Skip
    end.

end_per_suite(_Config) ->
    macula_peer_natlab:stop().

%% ---- paths that come and go ----

a_stream_goes_on_over_the_relay_while_the_direct_path_is_cut(Config) ->
    Lab = ?config(lab, Config),
    [{Sender, Name}, {Target, Other}] = begin_anew(Config, [one, two]),
    ok = start_stream(Sender, {Name, Other}, {every, ?EVERY}, #{skip_hole_punch => true}),
    #{path := relay} = await_path(Sender, Other, relay, #{hole_punch => hole_punch_skipped}),
    ok = stream_with(Sender, #{skip_hole_punch => false}),
    #{failed := None} = await_path(Sender, Other, hole_punch),
    ?assertEqual(#{}, None),
    until(fun() -> maps:get(path, macula_peer_relays:last(Target)) =:= hole_punch end),
    Cut = now_ms(),
    ok = macula_peer_natlab:between(Lab, one, two, drop),
    _ = await_path(Sender, Other, relay, #{hole_punch => timeout}),
    ok = macula_peer_natlab:between(Lab, one, two, accept),
    Open = now_ms(),
    _ = await_path(Sender, Other, hole_punch),
    Count = end_stream(Sender, 1000),
    ok = await_count(Target, Count),
    ?assertEqual({Count, []}, streamed(Sender)),
    ?assertEqual({in_order, Count}, sequence(Target)),
    ?assertEqual([relay, hole_punch, relay, hole_punch], macula_peer_relays:paths(Target)),
    ?assertEqual([relay, hole_punch, relay, hole_punch], told_paths(Sender)),
    ?assertEqual([timeout], lists:usort([Why || #{path := relay, failed := #{hole_punch := Why}} <- told(Sender),
                                                Why =/= hole_punch_skipped])),
    OnRelay = arrived(Target, relay, Cut) - Cut,
    ct:pal("~b messages; ~b ms after the cut by relay, ~b ms after the opening direct",
           [Count, OnRelay, arrived(Target, hole_punch, Open) - Open]),
    ?assert(OnRelay < ?BACK_ON_RELAY).

an_unused_direct_path_is_let_go(Config) ->
    Lab = ?config(lab, Config),
    %% As long as there is a link, one can see it.
    Settings = #{idle_timeout => 1000, keep_alive => 100},
    [{Sender, Name}, {Target, Other}] = begin_anew(Config, [one, two], Settings),
    ok = send(Sender, Name, Other, 1),
    _ = await_path(Sender, Other, hole_punch),
    ok = send(Sender, Name, Other, 2),
    ok = macula_peer_natlab:between(Lab, one, two, accept),
    until(fun() -> lists:sum(macula_peer_natlab:passed(Lab)) > 4 end),
    _ = await_path(Sender, Other, none),
    until(fun() -> accepted([Target]) =:= [] end),
    %% Its last packets are in flight, and the other side may look for the path for three seconds.
    until(fun() -> nothing_passes(Lab) end),
    Sent = now_ms(),
    ok = send(Sender, Name, Other, 3),
    #{at := At, path := Path} = macula_peer_relays:delivered(Target, 3),
    ct:pal("the next one took ~b ms, by ~p", [At div 1000 - Sent, Path]),
    ?assert(At div 1000 - Sent < 1000),
    ?assertEqual({in_order, 3}, sequence(Target)).

%% For many times as long as a live link is quiet.
nothing_passes(Lab) ->
    ok = macula_peer_natlab:between(Lab, one, two, accept),
    receive after 1500 -> ok end,
    macula_peer_natlab:passed(Lab) =:= [0, 0].

%% ---- addresses ----

%% One socket has one mapping, for every observer.
relays_and_gateways_say_the_address_that_was_found_out(Config) ->
    Lab = ?config(lab, Config),
    [_, {Host, [Ip | _]}] = macula_peer_natlab:relays(Lab),
    Gateway = macula_peer_program:start(Host, "fake_gateway",
                                        ["--bind", binary_to_list(macula_peer_net:endpoint(Ip, 0))]),
    Asked = [macula_peer_net:endpoint(Ip, macula_peer_program:port(Gateway))],
    _ = [begin
             [{Node, _}] = begin_anew(Config, [Site]),
             #{reflexive_address := {Public, _} = Address} = call(Node, macula_peer_node, nat_profile, []),
             ?assertEqual(macula_peer_natlab:public(Lab, Site), Public),
             Relays = [Relay || #{relay := Relay} <- maps:get(registrations, macula_peer_test:stats(Node))],
             ?assertEqual([{Endpoint, Address} || Endpoint <- Relays ++ Asked],
                          [{Endpoint, probed(Node, Endpoint)} || Endpoint <- Relays ++ Asked])
         end || Site <- [one, cone]],
    macula_peer_fake_gateway:stop(Gateway).

probed(Node, Endpoint) ->
    Probe = #{node_id => <<"me">>, local_port => 0},
    {ok, {nat_probe_reply, #{<<"reflexive_ip">> := Ip, <<"reflexive_port">> := Port}}} =
        call(Node, macula_peer_connector, send_message_and_wait, [Endpoint, nat_probe, Probe, 5000]),
    {ok, Address} = inet:parse_address(binary_to_list(Ip)),
    {Address, Port}.

%% ---- both at once ----

one_connection_remains_when_both_begin_at_once(Config) ->
    Times = [begin_at_once(Config, [one, two]) || _ <- lists:seq(1, 10)],
    ct:pal("one remained after ~p ms", [Times]).

one_connection_remains_when_a_hard_one_and_another_begin_at_once(Config) ->
    ct:pal("one remained after ~p ms", [begin_at_once(Config, [hard, two])]).

begin_at_once(Config, Sites) ->
    [{One, Name}, {Other, OtherName}] = begin_anew(Config, Sites),
    %% As long as two calls take to get there, and more.
    Start = now_ms() + 50,
    Sends = {{One, Name, OtherName}, {Other, OtherName, Name}},
    [ok, ok] = macula_peer_test:in_parallel(2, fun(N) ->
        {Node, From, To} = element(N, Sends),
        call(Node, ?MODULE, send_many_at, [Start, From, To, 20])
    end),
    _ = [ok = await_count(Node, 20) || Node <- [One, Other]],
    _ = [await_path(Node, To, hole_punch) || {Node, _, To} <- tuple_to_list(Sends)],
    %% Replaced links are closed a second later.
    until(fun() -> length(accepted([One, Other])) =:= 1 end),
    Ms = now_ms() - Start,
    _ = [ok = send(Node, From, To, 21) || {Node, From, To} <- tuple_to_list(Sends)],
    _ = [ok = await_count(Node, 21) || Node <- [One, Other]],
    ?assertEqual([{in_order, 21}, {in_order, 21}], [sequence(Node) || Node <- [One, Other]]),
    ?assertMatch([#{path := hole_punch}], accepted([One, Other])),
    ?assertEqual([hole_punch, hole_punch],
                 [maps:get(path, macula_peer_relays:delivered(Node, 21)) || Node <- [One, Other]]),
    Ms.

%% Runs in the node.
send_many_at(Start, From, To, Count) ->
    receive after max(0, Start - now_ms()) -> ok end,
    [ok = macula_peer_connector:send_message_nat_aware(From, To, store, #{id => Id}) || Id <- lists:seq(1, Count)],
    ok.

accepted(Nodes) ->
    lists:append([maps:get(accepted, macula_peer_test:stats(Node)) || Node <- Nodes]).

%% ---- what is not wanted ----

a_caller_that_skips_hole_punching_stays_on_the_relay(Config) ->
    stays_on_relay(Config, [one, two], [#{}, #{}], #{skip_hole_punch => true}, hole_punch_skipped).

a_node_that_never_punches_stays_on_the_relay(Config) ->
    stays_on_relay(Config, [one, two], [#{hole_punching => off}, #{}], #{}, hole_punch_skipped).

a_node_that_never_punches_is_not_punched(Config) ->
    Ms = stays_on_relay(Config, [one, two], [#{}, #{hole_punching => off}], #{}, not_allowed),
    ct:pal("said after ~p ms", [Ms]),
    ?assert(Ms < ?ATTEMPT).

%% Neither by the node that does not allow it, nor for long by the other one, which is told.
many_packets_are_not_sent_where_they_are_not_allowed(Config) ->
    Ms = [stays_on_relay(Config, Sites, Settings, #{}, not_allowed)
          || Sites <- [[hard, two], [two, hard]],
             Settings <- [[#{hole_punching => plain}, #{}], [#{}, #{hole_punching => plain}]]],
    ct:pal("said after ~p ms", [Ms]),
    ?assert(lists:max(Ms) < ?ATTEMPT).

stays_on_relay(Config, [Site, OtherSite], [Settings, OtherSettings], Opts, Why) ->
    Lab = ?config(lab, Config),
    Ends = [{Site, Settings}, {OtherSite, OtherSettings}],
    [{Sender, Name}, {Target, Other}] = begin_all_anew(Config, Ends),
    ok = macula_peer_natlab:between(Lab, Site, OtherSite, accept),
    Start = now_ms(),
    ok = send(Sender, Name, Other, 1, Opts),
    _ = await_path(Sender, Other, relay, #{hole_punch => Why}),
    Ms = now_ms() - Start,
    ok = send(Sender, Name, Other, 2, Opts),
    ok = await_count(Target, 2),
    ?assertEqual([relay], macula_peer_relays:paths(Target)),
    ?assertEqual([relay], told_paths(Sender)),
    %% As long as the first packets of an attempt take.
    receive after 300 -> ok end,
    [Packets, Back] = macula_peer_natlab:passed(Lab),
    Most = case Why of
        hole_punch_skipped -> 0;
        %% Until one node's refusal has reached the other.
        not_allowed -> ?A_FEW
    end,
    ?assertMatch({true, true, _}, {Packets =< Most, Back =< Most, {Packets, Back}}),
    Ms.

%% A caller may pass the candidates each time. That does not make it ask the relay more often.
a_hopeless_punch_is_not_tried_for_every_message(Config) ->
    [{Sender, Name}, {Target, Other}] = begin_anew(Config, [hard, random]),
    Relays = [Relay || #{relay := Relay} <- maps:get(registrations, macula_peer_test:stats(Sender))],
    Opts = #{relay_endpoint => hd(Relays), skip_hole_punch => false},
    Before = asked_relays(Config),
    [begin
         ok = send(Sender, Name, Other, Id, Opts),
         Id =:= 1 andalso await_path(Sender, Other, relay, #{hole_punch => both_hard}),
         receive after ?EVERY -> ok end
     end || Id <- lists:seq(1, 100)],
    ok = await_count(Target, 100),
    ?assertEqual({in_order, 100}, sequence(Target)),
    ?assertEqual(1, asked_relays(Config) - Before).

%% A process with room for 120 more opens fewer than the 256 sockets that such an attempt wants.
punching_leaves_descriptors_to_the_application(Config) ->
    [{Sender, Name}, {Target, Other}] = begin_anew(Config, [hard, two]),
    Pid = call(Sender, os, getpid, []),
    Open = descriptors(Pid),
    Limit = Open + 120,
    Usual = limit_descriptors(Pid, Limit),
    try
        Test = self(),
        _ = spawn_link(fun() -> Test ! {most, most_descriptors(Pid, Open, now_ms() + 5000)} end),
        ok = send(Sender, Name, Other, 1),
        _ = macula_peer_relays:delivered(Target, 1),
        Most = receive {most, Count} -> Count end,
        ct:pal("~b descriptors before, ~b at the most, of ~b", [Open, Most, Limit]),
        ?assert(Most > Open + Limit div 8),
        ?assert(Most < Limit - 60)
    after
        limit_descriptors(Pid, Usual)
    end.

descriptors(Pid) ->
    {ok, All} = file:list_dir("/proc/" ++ Pid ++ "/fd"),
    length(All).

%% Returns what it was.
limit_descriptors(Pid, Limit) ->
    [Soft] = string:lexemes(os:cmd("prlimit --noheadings --raw --output SOFT --nofile --pid " ++ Pid), "\n"),
    [] = os:cmd(lists:concat(["prlimit --pid ", Pid, " --nofile=", Limit, ":"])),
    list_to_integer(Soft).

most_descriptors(Pid, Most, Until) ->
    case now_ms() > Until of
        true -> Most;
        false -> receive after 5 -> most_descriptors(Pid, max(Most, descriptors(Pid)), Until) end
    end.

%% ---- another network ----

a_stream_goes_on_when_the_router_moves(Config) ->
    Move = fun(Lab) ->
        Moved = macula_peer_natlab:move_router(Lab, one),
        macula_peer_natlab:public(Moved, one)
    end,
    goes_on(Config, [one, two], Move).

a_stream_goes_on_when_the_host_moves(Config) ->
    Move = fun(Lab) ->
        ok = macula_peer_natlab:move_host(Lab, two),
        macula_peer_natlab:public(Lab, two)
    end,
    goes_on(Config, [two, one], Move).

goes_on(Config, Sites, Move) ->
    [{Sender, Name}, {Target, Other}] = begin_anew(Config, Sites),
    ok = start_stream(Sender, {Name, Other}, {every, ?EVERY}, #{}),
    _ = await_path(Sender, Other, hole_punch),
    until(fun() -> maps:get(path, macula_peer_relays:last(Target)) =:= hole_punch end),
    #{reflexive_address := Before, local_addresses := Local} = profile(Sender),
    Moved = now_ms(),
    Public = Move(?config(lab, Config)),
    Detected = fun(#{reflexive_address := Seen, detected_at := At}) -> At > Moved andalso Seen =/= Before end,
    #{reflexive_address := {Public, _}, local_addresses := NewLocal} =
        await(fun() -> profile(Sender) end, Detected, ?PATIENCE),
    Known = now_ms(),
    Registered = fun() ->
        #{registrations := All} = macula_peer_test:stats(Sender),
        [Public, Public] =:= [Ip || #{state := registered, address := {Ip, _} = Address} <- All, Address =/= Before]
    end,
    until(Registered, ?PATIENCE),
    BothKnow = now_ms(),
    #{from := New} = await(fun() -> macula_peer_relays:last(Target) end, fun(#{path := Path, from := From}) ->
        Path =:= hole_punch andalso From =/= Before
    end, ?PATIENCE),
    Count = end_stream(Sender, 0),
    ok = await_count(Target, Count),
    ?assertEqual({in_order, Count}, sequence(Target)),
    ?assertEqual({Count, []}, streamed(Sender)),
    ?assertMatch({Public, _}, New),
    Told = macula_peer_test:events(Sender, nat_profile),
    ?assertMatch(#{reflexive_address := {Public, _}}, lists:last(Told)),
    [OnRelay, Healed] = [arrived(Target, Path, Moved, Before) - Moved || Path <- [relay, hole_punch]],
    ct:pal("~p, seen at ~p, became ~p, seen at ~p: by relay after ~b ms, direct from there after ~b ms;~n"
           "the NAT was known after ~b ms, and both relays knew after ~b ms",
           [Local, Before, NewLocal, New, OnRelay, Healed, Known - Moved, BothKnow - Moved]),
    ?assert(lists:max([Healed, Known - Moved, BothKnow - Moved]) < ?HEALED).

profile(Node) ->
    call(Node, macula_peer_node, nat_profile, []).

%% ---- common ----

%% Nodes at these sites, with their names.
begin_anew(Config, Sites) ->
    begin_anew(Config, Sites, #{}).

begin_anew(Config, Sites, Settings) ->
    begin_all_anew(Config, [{Site, Settings} || Site <- Sites]).

begin_all_anew(Config, Ends) ->
    macula_peer_test:in_parallel(length(Ends), fun(N) ->
        {Site, Settings} = lists:nth(N, Ends),
        macula_peer_natlab_pairs:begin_anew(?config(pairs, Config), {Site, 1}, Settings)
    end).

send(Node, Name, Other, Id) ->
    send(Node, Name, Other, Id, #{}).

send(Node, Name, Other, Id, Opts) ->
    macula_peer_relays:send(Node, {Name, Other}, Id, Opts).

path(Node, To) ->
    {ok, Path} = call(Node, macula_peer_node, path, [{node, To}]),
    Path.

await_path(Node, To, Wanted) ->
    await_path(Node, To, Wanted, #{}).

%% And it failed for these reasons.
await_path(Node, To, Wanted, Why) ->
    await(fun() -> path(Node, To) end, fun(#{path := Path, failed := Failed}) ->
        Path =:= Wanted andalso maps:with(maps:keys(Why), Failed) =:= Why
    end, ?PATIENCE).

%% What the handler was told of paths.
told(Node) ->
    macula_peer_test:events(Node, path).

told_paths(Node) ->
    once([Path || #{path := Path} <- told(Node)]).

once([A, A | Rest]) -> once([A | Rest]);
once([A | Rest]) -> [A | once(Rest)];
once([]) -> [].

%% When the first message came by that path after a moment, from another address than that one.
arrived(Target, Path, After) ->
    arrived(Target, Path, After, none).

arrived(Target, Wanted, After, Old) ->
    hd([At div 1000 || #{path := Path, at := At, from := From} <- macula_peer_test:received(Target),
                       Path =:= Wanted, At div 1000 > After, From =/= Old]).

%% The number of requests to relays for a direct path.
asked_relays(Config) ->
    #{lab := Lab, nodes := Nodes} = ?config(pairs, Config),
    lists:sum([maps:get(punches, maps:get(relay, macula_peer_test:stats(maps:get(Host, Nodes))))
               || {Host, _} <- macula_peer_natlab:relays(Lab)]).

now_ms() ->
    os:system_time(millisecond).
