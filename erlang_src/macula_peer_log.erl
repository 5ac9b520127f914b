%% @private
%% @doc Lets the default handler show the log events of this library.
-module(macula_peer_log).

-export([show/0]).

-include("macula_peer_log.hrl").

%% @doc Adds a filter to OTP's default handler, which drops events of every domain but its own. Without such a handler there is
%% nothing to do.
-spec show() -> ok.
show() ->
    #{domain := Domain} = ?DOMAIN,
    _ = logger:add_handler_filter(default, macula_peer, {fun logger_filters:domain/2, {log, sub, Domain}}),
    ok.
