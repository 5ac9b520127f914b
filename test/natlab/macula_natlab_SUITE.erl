%% Nodes of macula work behind NATs: messages to their node ids reach their gateways, and the answers go back, over any
%% path. The nodes are in the NAT laboratory, with the fake of macula on each.
-module(macula_natlab_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, until/2, in_parallel/2]).

-define(TIMEOUT, 10000).
%% Until a path is found, in milliseconds.
-define(PATIENCE, 30000).
%% Where the nodes listen, beside their gateways.
-define(PORT, 9444).

suite() -> [{timetrap, {seconds, 120}}].

all() ->
    [{group, Path} || Path <- paths()].

groups() ->
    [{Path, [], [a_procedure_is_called, a_reply_comes_by_itself, values_are_stored_and_found, a_publication_arrives,
                 probes_are_answered]} || Path <- paths()].

%% `direct': behind one router, at the endpoint that the DHT has.
paths() -> [direct, hole_punch, relay].

%% The hosts that meet there: one of each site.
ends(direct) -> {{near, 1}, {near, 2}};
ends(hole_punch) -> {{home, 1}, {other, 1}};
ends(relay) -> {{hard, 1}, {random, 1}}.

init_per_suite(Config) ->
    case macula_peer_net:available() of
        ok ->
            Lab = macula_peer_natlab:start([{near, port_restricted, #{hosts => 2}}, {home, port_restricted},
                                            {other, port_restricted}, {hard, symmetric}, {random, symmetric}]),
            [{Host, [Ip | _]} | _] = macula_peer_natlab:relays(Lab),
            {ok, {_, Port}} = call(macula_peer_net:start_node(Host), macula_peer_node, listen, [#{relay => #{}}]),
            Relay = macula_peer_net:endpoint(Ip, Port),
            Ebin = macula_peer_macula:build(),
            Ends = lists:usort(lists:append([tuple_to_list(ends(Path)) || Path <- paths()])),
            Nodes = in_parallel(length(Ends), fun(N) -> start_node(Lab, Ebin, Relay, lists:nth(N, Ends)) end),
            [{lab, Lab}, {nodes, maps:from_list(lists:zip(Ends, Nodes))} | Config];
        {skip, _} = Skip ->
            io:format(user, "SKIPPED: ~b cases of macula behind NATs~n", [length(paths()) * 5]),
            Skip
    end.

end_per_suite(_Config) ->
    macula_peer_natlab:stop().

start_node(Lab, Ebin, Relay, {Site, N} = End) ->
    Host = lists:nth(N, macula_peer_natlab:hosts(Lab, Site)),
    %% Neighbours would find a path of their own before they ask the DHT.
    Punching = case Site of near -> off; _ -> on end,
    Node = macula_peer_macula:start_node(Host, Ebin, #{
        macula => #{node_id => name(End)},
        macula_peer_connector => #{node_id => name(End), relays => [Relay], hole_punching => Punching,
                                   listen => #{port => ?PORT}}}),
    ok = macula_peer_relays:await_registered(Node, [Relay]),
    until(fun() -> is_integer(maps:get(detected_at, call(Node, macula_peer_node, nat_profile, []))) end),
    ok = call(Node, macula_gateway, handle, [<<"double">>, fun ?MODULE:double/1]),
    Node.

name({Site, N}) ->
    iolist_to_binary(io_lib:format("~s ~b", [Site, N])).

init_per_group(Path, Config) ->
    {One, Two} = ends(Path),
    [Node, Other] = [maps:get(End, ?config(nodes, Config)) || End <- [One, Two]],
    Meeting = [{path, Path}, {one, {Node, name(One)}}, {two, {Other, name(Two)}}, {seen, seen(Path, One, Config)}],
    _ = [ok = known(Config, Node, Two) || Path =:= direct],
    ok = meet(Path, Node, One, Two),
    ok = meet(Path, Other, Two, One),
    Meeting ++ Config.

end_per_group(_Path, _Config) ->
    ok.

init_per_testcase(_Case, Config) ->
    _ = [ok = call(Node, macula_gateway, forget, []) || {Node, _} <- [?config(one, Config), ?config(two, Config)]],
    Config.

end_per_testcase(_Case, Config) ->
    %% Still by that path.
    {Node, _} = ?config(one, Config),
    {_, Other} = ?config(two, Config),
    ?assertEqual(?config(path, Config), path(Node, Other)).

%% The address at which the other node sees it.
seen(direct, {Site, N}, Config) ->
    macula_peer_net:address(lists:nth(N, macula_peer_natlab:hosts(?config(lab, Config), Site)));
seen(_Path, {Site, _}, Config) ->
    macula_peer_natlab:public(?config(lab, Config), Site).

%% One node's DHT has the endpoint of the other.
known(Config, Node, {Site, N} = End) ->
    Host = lists:nth(N, macula_peer_natlab:hosts(?config(lab, Config), Site)),
    Where = #{<<"host">> => list_to_binary(inet:ntoa(macula_peer_net:address(Host))), <<"port">> => ?PORT},
    Key = call(Node, macula_routing_server, peer_endpoint_key, [name(End)]),
    call(Node, macula_routing_server, store_local, [Key, Where]).

%% Messages go by this path from now on.
meet(Path, Node, From, To) ->
    ok = call(Node, macula_peer_connector, send_message_nat_aware, [name(From), name(To), cast, #{hello => 1}]),
    Found = fun() -> call(Node, macula_peer_node, path, [{node, name(To)}]) end,
    {ok, _} = macula_peer_test:await(Found, fun({ok, #{path := By}}) -> By =:= Path end, ?PATIENCE),
    ok.

path(Node, Name) ->
    {ok, #{path := Path}} = call(Node, macula_peer_node, path, [{node, Name}]),
    Path.

%% ---- asynchronous calls ----

%% The gateway answers on the stream that the request came on.
a_procedure_is_called(Config) ->
    calls(Config, stream).

%% The gateway sends the reply to the node id in the request.
a_reply_comes_by_itself(Config) ->
    calls(Config, node).

calls(Config, How) ->
    Ends = [?config(one, Config), ?config(two, Config)],
    _ = [ok = call(Node, application, set_env, [macula, rpc_reply, How]) || {Node, _} <- Ends],
    _ = [?assertEqual({ok, 2 * N}, call(Node, ?MODULE, rpc, [Name, <<"double">>, N]))
         || {{Node, _}, {_, Name}} <- [list_to_tuple(Ends), list_to_tuple(lists:reverse(Ends))], N <- lists:seq(1, 10)],
    _ = [?assertMatch([_ | _], macula_peer_macula:received(Node, Type))
         || {Node, _} <- Ends, Type <- [rpc_request, rpc_reply]].

%% These run in the nodes.

double(N) -> 2 * N.

rpc(Target, Procedure, Args) ->
    {ok, Id} = macula_rpc_handler:request(Target, Procedure, Args, #{timeout => ?TIMEOUT}),
    receive {macula_rpc, Id, Result} -> Result end.

%% ---- the DHT ----

values_are_stored_and_found(Config) ->
    {Node, _} = ?config(one, Config),
    {Other, Name} = ?config(two, Config),
    Add = case lists:member(#{node_id => Name}, call(Node, macula_routing_server, nodes, [])) of
        true -> [];
        false -> [#{node_id => Name}]
    end,
    _ = [ok = call(Node, macula_routing_server, add_node, [New]) || New <- Add],
    %% A gateway may lose a frame of several packets that is sent in a burst.
    Small = [{integer_to_binary(N), rand:bytes(N * 20)} || N <- lists:seq(1, 50)],
    ok = store(Node, Small),
    ok = await_stored(Other, Small),
    Large = [{<<"large", N>>, rand:bytes(N * 1000)} || N <- lists:seq(1, 5)],
    _ = [begin
             ok = store(Node, [Value]),
             ok = await_stored(Other, [Value])
         end || Value <- Large],
    %% A question over the same paths; its answer is the gateway's.
    {Key, Value} = lists:last(Small),
    ?assertMatch({ok, {find_value_reply, #{<<"value">> := [Value]}}},
                 call(Node, macula_peer_node, request, [Name, find_value, #{key => Key}, ?TIMEOUT])),
    ?assertMatch({ok, {find_value_reply, #{<<"nodes">> := _}}},
                 call(Node, macula_peer_node, request, [Name, find_value, #{key => <<"no">>}, ?TIMEOUT])).

store(Node, Values) ->
    lists:foreach(fun({Key, Value}) ->
        Sent = call(Node, macula_routing_server, store, [macula_routing_server, Key, Value]),
        [] = [Failed || Failed <- Sent, Failed =/= ok]
    end, Values).

await_stored(Node, Values) ->
    Missing = fun() ->
        [Key || {Key, Value} <- Values, call(Node, macula_routing_server, get_local, [Key]) =/= {ok, [Value]}]
    end,
    [] = macula_peer_test:await(Missing, fun(Keys) -> Keys =:= [] end),
    ok.

%% ---- publishing ----

a_publication_arrives(Config) ->
    {Node, _} = ?config(one, Config),
    {Other, Name} = ?config(two, Config),
    Topic = atom_to_binary(?config(path, Config)),
    Key = crypto:hash(sha256, Topic),
    ok = call(Node, macula_routing_server, store_local, [Key, #{<<"node_id">> => Name}]),
    Payloads = [integer_to_binary(N) || N <- lists:seq(1, 20)],
    _ = [?assertEqual([{Name, ok}], call(Node, macula_pubsub_dht, publish, [Topic, Payload])) || Payload <- Payloads],
    Arrived = fun() -> lists:sort([P || #{<<"payload">> := P} <- macula_peer_macula:received(Other, pubsub_route)]) end,
    All = macula_peer_test:await(Arrived, fun(Some) -> length(Some) >= length(Payloads) end),
    ?assertEqual(lists:sort(Payloads), All).

%% ---- probes ----

probes_are_answered(Config) ->
    {Node, _} = ?config(one, Config),
    {_, Name} = ?config(two, Config),
    Ask = fun(Type, Message) -> call(Node, macula_peer_node, request, [Name, Type, Message, 3000]) end,
    ?assertMatch({ok, {pong, #{<<"timestamp">> := 7}}}, Ask(ping, #{timestamp => 7})),
    Probed = Ask(nat_probe, #{node_id => <<"me">>, local_port => 1}),
    case ?config(path, Config) of
        relay ->
            %% The source address of a packet that came through a relay is unknown.
            ?assertEqual({error, timeout}, Probed);
        _ ->
            %% What the other side sees, and not what its gateway sees on the loopback.
            {ok, {nat_probe_reply, #{<<"reflexive_ip">> := Seen}}} = Probed,
            ?assertEqual(list_to_binary(inet:ntoa(?config(seen, Config))), Seen)
    end.
