%% What a node knows of itself, from the environment of the application and the operator's variables.
-module(macula_node).

-export([id/0, port/0, endpoint/0]).

id() ->
    application:get_env(macula, node_id, <<"node">>).

%% Of the gateway.
port() ->
    case application:get_env(macula, port, os:getenv("MACULA_QUIC_PORT", "9443")) of
        Port when is_integer(Port) -> Port;
        Text -> list_to_integer(Text)
    end.

%% Where others reach the gateway, as far as this node knows.
endpoint() ->
    Host = application:get_env(macula, host, "127.0.0.1"),
    iolist_to_binary([Host, $:, integer_to_list(port())]).
