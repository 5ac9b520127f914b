#!/usr/bin/env escript
%% A node that answers requests.
-mode(compile).

main([]) ->
    Server = spawn_link(fun() -> answer() end),
    {ok, {_Ip, Port}} = macula_peer_node:listen(#{handler => Server}),
    Endpoint = "127.0.0.1:" ++ integer_to_list(Port),
    {ok, {pong, Answer}} = macula_peer_connector:send_message_and_wait(Endpoint, ping, #{timestamp => 1}, 5000),
    io:format("answered ~p~n", [Answer]),
    macula_peer_node:stop().

answer() ->
    receive
        {macula_peer_message, #{type := ping, message := #{<<"timestamp">> := Time}, reply_to := Token}} ->
            ok = macula_peer_node:reply(Token, pong, #{timestamp => Time, server_time => erlang:system_time(millisecond)})
    end,
    answer().
