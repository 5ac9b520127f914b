%% @private
-module(macula_peer_app).

-behaviour(application).

-include("macula_peer_log.hrl").

-export([start/2]).
-export([stop/1]).

-spec start(application:start_type(), term()) -> {ok, pid()} | {error, Reason}
              when Reason :: macula_peer_error:settings() | macula_peer_error:takeover() | OfSupervisor :: term().
start(_Type, _Args) ->
    case macula_peer_config:read() of
        {ok, _} ->
            case macula_peer_takeover:apply_settings() of
                ok -> start();
                {error, _} = Error -> Error
            end;
        {error, Reason} ->
            ?LOG_ERROR("macula_peer_connector does not start: ~ts", [macula_peer_config:format_error(Reason)], ?DOMAIN),
            {error, Reason}
    end.

-spec start() -> {ok, pid()} | {error, OfSupervisor :: term()}.
start() ->
    case macula_peer_sup:start_link() of
        {ok, Pid} -> {ok, Pid};
        ignore -> {error, ignore};
        {error, _} = Error -> Error
    end.

-spec stop(term()) -> ok.
stop(_State) ->
    ok.
