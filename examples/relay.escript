#!/usr/bin/env escript
%% A message to a node that listens nowhere, by its node id. The relay and the sender are two other BEAMs.
-mode(compile).

main([]) ->
    [Relay, Sender] = [start() || _ <- [relay, sender]],
    {ok, {_Ip, Port}} = peer:call(Relay, macula_peer_node, listen, [#{relay => #{}}]),
    Endpoint = "127.0.0.1:" ++ integer_to_list(Port),

    ok = macula_peer_node:set_handler(self()),
    ok = macula_peer_node:register(<<"greenhouse">>, [Endpoint]),
    receive {macula_peer_event, #{event := registration, state := registered}} -> ok end,

    %% Without direct paths, so that the message comes by the relay.
    ok = peer:call(Sender, macula_peer_connector, send_message_nat_aware,
                   [<<"office">>, <<"greenhouse">>, store, #{key => <<"temperature">>, value => 21},
                    #{relay_endpoint => Endpoint, skip_hole_punch => true}]),
    receive
        {macula_peer_message, #{type := store, message := Message, path := Path}} ->
            io:format("received ~p by the path ~s~n", [Message, Path])
    end,
    macula_peer_node:stop().

start() ->
    {ok, Node, _} = peer:start_link(#{connection => standard_io}),
    Node.
