%% macula's servers do their work through this application's module, which is in the place of theirs: the DHT, NAT
%% probes, pub/sub and asynchronous calls. Servers that are absent, slow, strange or crash cost no caller its deadline.
-module(macula_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, until/1, elapsed/1]).

-define(TIMEOUT, 5000).
%% What a deadline may be late by on a busy machine, in milliseconds.
-define(LATE, 1500).
%% The longest time of a call that waits for no other node.
-define(SOON, 1000).
-define(PEERS, 20).
-define(NO_RELAY, {error, {nat_connection_failed, {no_relay_available, no_bootstrap_peers}}}).

suite() -> [{timetrap, {seconds, 90}}].

all() ->
    [{group, work}, {group, trouble}].

groups() ->
    [{work, [], [a_value_is_stored_at_20_peers, a_value_is_found_at_others, dead_peers_cost_their_own_time_alone,
                 observers_are_probed, a_publication_reaches_subscribers, a_procedure_is_called_by_node_id,
                 a_slow_procedure_answers_over_another_path]},
     {trouble, [], [{group, Variant} || Variant <- variants()]}
     | [{Variant, [], [an_unknown_node_has_the_original_term, an_endpoint_is_sent_to_at_once, a_relay_is_used_at_once,
                       a_lookup_from_inside_the_server_ends]} || Variant <- variants()]].

variants() -> [absent, slow, wrong, crashing].

init_per_suite(Config) ->
    Ebin = macula_peer_macula:build(),
    RelayNode = macula_peer_test:start_node(),
    %% The nodes come again with other keys.
    {ok, {_, RelayPort}} = call(RelayNode, macula_peer_node, listen, [#{relay => #{grace => 0}}]),
    Relay = macula_peer_test:endpoint(RelayPort),
    Names = [<<"one">>, <<"two">>, <<"three">>],
    Started = macula_peer_test:in_parallel(3, fun(N) -> start_node(Ebin, lists:nth(N, Names), Relay) end),
    [{relay_node, RelayNode}, {relay, Relay}, {nodes, maps:from_list(lists:zip(Names, Started))} | Config].

end_per_suite(Config) ->
    Nodes = [?config(relay_node, Config) | [Node || {Node, _} <- maps:values(?config(nodes, Config))]],
    lists:foreach(fun macula_peer_test:stop_node/1, Nodes).

start_node(Ebin, Name, Relay) ->
    Port = macula_peer_test:free_port(),
    Node = macula_peer_macula:start_node(Ebin, #{macula => #{node_id => Name, port => Port},
                                                 macula_peer_connector => #{node_id => Name, relays => [Relay],
                                                                            connect_timeout => 2000}}),
    {Node, macula_peer_test:endpoint(Port)}.

init_per_group(Variant, Config) ->
    case lists:member(Variant, variants()) of
        true -> [{variant, Variant} | Config];
        false -> Config
    end.

end_per_group(_Group, _Config) ->
    ok.

%% Every case begins with engines that know nothing.
init_per_testcase(_Case, Config) ->
    _ = [begin
             ok = call(Node, macula_variant, set, [normal]),
             ok = call(Node, ?MODULE, engine, [[?config(relay, Config)]]),
             _ = [begin
                      ok = call(Node, macula_variant, set, [Server, absent]),
                      ok = call(Node, macula_variant, set, [Server, normal])
                  end || Server <- [macula_routing_server, macula_gateway]],
             ok = macula_peer_relays:await_registered(Node, [?config(relay, Config)])
         end || {Node, _} <- maps:values(?config(nodes, Config))],
    ok = call(node(Config, <<"one">>), macula_variant, set, [proplists:get_value(variant, Config, normal)]),
    Config.

end_per_testcase(_Case, _Config) ->
    ok.

%% ---- work ----

a_value_is_stored_at_20_peers(Config) ->
    One = node(Config, <<"one">>),
    Gateways = more_peers(Config, One),
    {Ms, Sent} = elapsed(fun() -> store(One, <<"key">>, <<"value">>) end),
    ct:pal("stored at ~b peers in ~b ms", [length(Sent), Ms]),
    ?assertEqual(lists:duplicate(?PEERS, ok), Sent),
    _ = [macula_peer_test:await(fun() -> macula_peer_fake_gateway:stats(Gateway) end,
                                fun(#{types := Types}) -> maps:get(store, Types, 0) =:= 1 end) || Gateway <- Gateways],
    _ = [until(fun() -> call(Node, macula_routing_server, get_local, [<<"key">>]) =:= {ok, [<<"value">>]} end)
         || Node <- [node(Config, <<"two">>), node(Config, <<"three">>)]].

a_value_is_found_at_others(Config) ->
    One = node(Config, <<"one">>),
    Gateways = more_peers(Config, One),
    Where = #{<<"host">> => <<"192.0.2.1">>, <<"port">> => 9443},
    ok = call(node(Config, <<"two">>), macula_routing_server, store_local, [<<"key">>, Where]),
    {Ms, {ok, Found}} = elapsed(fun() -> find_value(One, <<"key">>) end),
    ct:pal("~b peers asked in ~b ms", [?PEERS, Ms]),
    ?assert(lists:member(Where, Found)),
    %% Each was asked once.
    ?assertEqual([1], lists:usort([maps:get(find_value, maps:get(types, macula_peer_fake_gateway:stats(Gateway)))
                                   || Gateway <- Gateways])).

dead_peers_cost_their_own_time_alone(Config) ->
    One = node(Config, <<"one">>),
    {_Socket, Silent} = macula_peer_test:silent_port(),
    Dead = [macula_peer_test:closed_port() || _ <- lists:seq(1, 5)] ++ [Silent],
    _ = [add_node(One, macula_peer_test:endpoint(Port)) || Port <- Dead],
    add_node(One, endpoint(Config, <<"two">>)),
    {Ms, [ok | Failed]} = elapsed(fun() -> store(One, <<"key">>, <<"value">>) end),
    ?assertEqual(lists:duplicate(6, {error, {connect_failed, transport_down}}), Failed),
    %% The silent one, for as long as a dial may take.
    ?assert(Ms < 2000 + ?LATE),
    ?assertEqual({nodes, 7}, nodes_left(find_value(One, <<"nowhere">>))).

nodes_left({nodes, Nodes}) -> {nodes, length(Nodes)};
nodes_left(Other) -> Other.

observers_are_probed(Config) ->
    One = node(Config, <<"one">>),
    Others = [endpoint(Config, Name) || Name <- [<<"two">>, <<"three">>]],
    ?assertEqual([], call(One, macula_nat_detector, detect, [])),
    _ = [add_node(One, Endpoint) || Endpoint <- Others],
    [ok, ok] = store(One, <<"key">>, <<"value">>),
    {ok, {_, Port}} = call(One, macula_peer_node, local_address, []),
    ?assertEqual([{Endpoint, {{127, 0, 0, 1}, Port}} || Endpoint <- lists:sort(Others)],
                 lists:sort(call(One, macula_nat_detector, detect, []))).

%% Each subscriber in turn is known by its endpoint and by its node id alone.
a_publication_reaches_subscribers(Config) ->
    One = node(Config, <<"one">>),
    Hows = [endpoint, node_id],
    _ = [add_node(node(Config, Name), endpoint(Config, <<"one">>)) || Name <- [<<"two">>, <<"three">>]],
    _ = [[ok] = call(node(Config, Name), ?MODULE, subscribe, [topic(How), How])
         || How <- Hows, Name <- [<<"two">>, <<"three">>]],
    _ = [begin
             until(fun() -> length(values(One, topic(How))) =:= 2 end),
             Sent = call(One, macula_pubsub_dht, publish, [topic(How), <<"payload">>]),
             ?assertEqual([{<<"three">>, ok}, {<<"two">>, ok}], lists:sort(Sent))
         end || How <- Hows],
    _ = [until(fun() -> published(Config, Name, How) =:= [{<<"one">>, <<"payload">>}] end)
         || Name <- [<<"two">>, <<"three">>], How <- Hows].

topic(How) -> atom_to_binary(How).

values(Node, Topic) ->
    case call(Node, macula_routing_server, get_local, [crypto:hash(sha256, Topic)]) of
        {ok, Values} -> Values;
        not_found -> []
    end.

published(Config, Name, How) ->
    [{From, Payload} || #{<<"topic">> := Topic, <<"payload">> := Payload, <<"source_node_id">> := From}
                            <- macula_peer_macula:received(node(Config, Name), pubsub_route), Topic =:= topic(How)].

%% Runs in the node.
subscribe(Topic, How) ->
    macula_pubsub_dht:subscribe(Topic, How).

%% Request and reply, each found by the DHT, over the gateways' own listeners.
a_procedure_is_called_by_node_id(Config) ->
    [One, Two] = [node(Config, Name) || Name <- [<<"one">>, <<"two">>]],
    ok = call(Two, macula_gateway, handle, [<<"double">>, fun ?MODULE:double/1]),
    ok = call(Two, macula_gateway, handle, [<<"forever">>, fun ?MODULE:forever/1]),
    _ = [ok = known(Config, Node, Name) || {Node, Name} <- [{One, <<"two">>}, {Two, <<"one">>}]],
    _ = [begin
             ok = call(Two, application, set_env, [macula, rpc_reply, How]),
             ?assertEqual({ok, 42}, call(One, ?MODULE, rpc, [<<"two">>, <<"double">>, 21]))
         end || How <- [stream, node]],
    ?assertEqual({error, timeout}, call(One, ?MODULE, rpc, [<<"two">>, <<"forever">>, 1, 500])).

%% The request goes by the relay. A direct path is found meanwhile, and the relayed connection is let go a second later.
a_slow_procedure_answers_over_another_path(Config) ->
    [One, Two] = [node(Config, Name) || Name <- [<<"one">>, <<"two">>]],
    ok = call(Two, application, set_env, [macula, rpc_reply, stream]),
    ok = call(Two, macula_gateway, handle, [<<"slow">>, fun ?MODULE:slow/1]),
    ?assertEqual({ok, 42}, call(One, ?MODULE, rpc, [<<"two">>, <<"slow">>, 21])),
    ?assertMatch({ok, #{path := hole_punch}}, call(One, macula_peer_node, path, [{node, <<"two">>}])).

known(Config, Node, Name) ->
    [Host, Port] = binary:split(endpoint(Config, Name), <<":">>),
    Key = call(Node, macula_routing_server, peer_endpoint_key, [Name]),
    Where = #{<<"host">> => Host, <<"port">> => binary_to_integer(Port)},
    call(Node, macula_routing_server, store_local, [Key, Where]).

%% These run in a node.

double(N) -> 2 * N.

slow(N) ->
    timer:sleep(3000),
    2 * N.

forever(_) -> receive after infinity -> ok end.

rpc(Target, Procedure, Args) ->
    rpc(Target, Procedure, Args, ?TIMEOUT).

rpc(Target, Procedure, Args, Timeout) ->
    {ok, Id} = macula_rpc_handler:request(Target, Procedure, Args, #{timeout => Timeout}),
    receive {macula_rpc, Id, Result} -> Result end.

%% ---- trouble ----

an_unknown_node_has_the_original_term(Config) ->
    One = node(Config, <<"one">>),
    ok = call(One, ?MODULE, engine, [[]]),
    _ = [begin
             Name = crypto:strong_rand_bytes(32),
             {Ms, Result} = elapsed(fun() -> send(One, Name, #{timeout => Timeout}) end),
             ct:pal("~p after ~b of ~b ms", [Result, Ms, Timeout]),
             ?assert(Ms < Timeout + ?LATE),
             %% With time enough for the lookups the term is the original's.
             ?assert(Result =:= ?NO_RELAY orelse Timeout < 5000 andalso Result =:= {error, timeout})
         end || Timeout <- [0, 1000, 6000]].

%% Runs in the node: restarts the engine with these relays.
engine(Relays) ->
    ok = macula_peer_node:stop(),
    ok = application:set_env(macula_peer_connector, relays, Relays),
    macula_peer_node:start().

an_endpoint_is_sent_to_at_once(Config) ->
    One = node(Config, <<"one">>),
    Endpoint = endpoint(Config, <<"two">>),
    {Sent, ok} = elapsed(fun() -> send(One, <<"a node">>, #{endpoint => Endpoint}) end),
    ?assert(Sent < ?SOON),
    {Asked, Pong} = elapsed(fun() ->
        call(One, macula_peer_connector, send_message_and_wait, [Endpoint, ping, #{timestamp => 1}, ?TIMEOUT])
    end),
    ?assertMatch({ok, {pong, _}}, Pong),
    ?assert(Asked < ?SOON).

a_relay_is_used_at_once(Config) ->
    One = node(Config, <<"one">>),
    _ = [begin
             {Ms, ok} = elapsed(fun() -> send(One, Name, Opts) end),
             ?assert(Ms < ?SOON)
         end || {Name, Opts} <- [{<<"two">>, #{}}, {<<"three">>, #{relay_endpoint => ?config(relay, Config)}}]].

%% The server that is asked is itself waiting for the answer.
a_lookup_from_inside_the_server_ends(Config) ->
    One = node(Config, <<"one">>),
    Absent = ?config(variant, Config) =:= absent,
    %% Another node stores all the same.
    _ = [ok = call(One, macula_variant, set, [macula_routing_server, normal]) || Absent],
    _ = [ok = call(One, macula_routing_server, add_node, [#{node_id => Name}]) || Name <- [<<"two">>, <<"unknown">>]],
    {Ms, Sent} = elapsed(fun() -> store(One, <<"key">>, <<"value">>) end),
    ct:pal("~p after ~b ms", [Sent, Ms]),
    ?assertMatch([{error, _}, ok], Sent),
    ?assert(Ms < 10000 + ?LATE).

send(Node, Name, Opts) ->
    call(Node, macula_peer_connector, send_message_nat_aware,
         [<<"one">>, Name, store, #{key => <<"k">>, value => <<"v">>}, Opts]).

%% ---- common ----

%% The number of peers that the node knows: the other nodes, and their gateways.
more_peers(Config, Node) ->
    _ = [add_node(Node, endpoint(Config, Name)) || Name <- [<<"two">>, <<"three">>]],
    [begin
         Gateway = macula_peer_fake_gateway:start(),
         add_node(Node, macula_peer_fake_gateway:endpoint(Gateway)),
         Gateway
     end || _ <- lists:seq(3, ?PEERS)].

add_node(Node, Endpoint) ->
    ok = call(Node, macula_routing_server, add_node, [#{node_id => Endpoint, endpoint => Endpoint}]).

store(Node, Key, Value) ->
    call(Node, macula_routing_server, store, [macula_routing_server, Key, Value]).

find_value(Node, Key) ->
    call(Node, macula_routing_server, find_value, [macula_routing_server, Key, ?PEERS]).

node(Config, Name) ->
    {Node, _} = maps:get(Name, ?config(nodes, Config)),
    Node.

endpoint(Config, Name) ->
    {_, Endpoint} = maps:get(Name, ?config(nodes, Config)),
    Endpoint.
