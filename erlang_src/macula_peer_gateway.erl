%% @private
%% @doc macula's own gateway on this host: where it listens.
-module(macula_peer_gateway).

-export([setting/0]).

-define(APP, macula_peer_connector).

%% macula's variable for the port of its gateway, and the port without it.
-define(PORT_VARIABLE, "MACULA_QUIC_PORT").
-define(DEFAULT_PORT, "9443").

%% @doc The setting `gateway', with the endpoint that `auto' stands for.
-spec setting() -> {ok, term()} | {error, {invalid_option, {atom(), term()}}}.
setting() ->
    case application:get_env(?APP, gateway, auto) of
        auto -> auto(os:getenv(?PORT_VARIABLE, ""));
        Setting when is_tuple(Setting) -> {error, {invalid_option, {gateway, Setting}}};
        Setting -> {ok, Setting}
    end.

-spec auto(string()) -> {ok, {auto, string()}} | {error, {invalid_option, {atom(), term()}}}.
auto("") ->
    auto(?DEFAULT_PORT);
auto(Port) ->
    case string:to_integer(Port) of
        {Number, ""} when Number > 0, Number < 65536 -> {ok, {auto, "127.0.0.1:" ++ integer_to_list(Number)}};
        _ -> {error, {invalid_option, {list_to_atom(?PORT_VARIABLE), Port}}}
    end.
