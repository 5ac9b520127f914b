%% @private
-module(macula_peer_app).

-behaviour(application).

-export([start/2]).
-export([stop/1]).

-spec start(application:start_type(), term()) -> {ok, pid()} | {error, term()}.
start(_Type, _Args) ->
    case macula_peer_takeover:apply_settings() of
        ok -> start();
        {error, _} = Error -> Error
    end.

-spec start() -> {ok, pid()} | {error, term()}.
start() ->
    case macula_peer_sup:start_link() of
        {ok, Pid} -> {ok, Pid};
        ignore -> {error, ignore};
        {error, _} = Error -> Error
    end.

-spec stop(term()) -> ok.
stop(_State) ->
    ok.
