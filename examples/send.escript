#!/usr/bin/env escript
%% A node that listens, and a message to it by its endpoint.
-mode(compile).

main([]) ->
    {ok, {_Ip, Port}} = macula_peer_node:listen(#{handler => self()}),
    Endpoint = "127.0.0.1:" ++ integer_to_list(Port),
    ok = macula_peer_connector:send_message(Endpoint, store, #{key => <<"answer">>, value => 42}),
    receive
        {macula_peer_message, #{type := store, message := Message, dialect := Dialect}} ->
            io:format("received ~p in the dialect ~s~n", [Message, Dialect])
    end,
    macula_peer_node:stop().
