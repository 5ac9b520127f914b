%% In the place of the original: says that it was called.
-module(macula_peer_connector).

-export([send_message/3, send_message/4]).
-export([send_message_and_wait/4]).
-export([send_message_nat_aware/4, send_message_nat_aware/5]).

send_message(_Endpoint, _Type, _Msg) -> {error, original}.

send_message(_Endpoint, _Type, _Msg, _Timeout) -> {error, original}.

send_message_and_wait(_Endpoint, _Type, _Msg, _Timeout) -> {error, original}.

send_message_nat_aware(_Local, _Target, _Type, _Msg) -> {error, original}.

send_message_nat_aware(_Local, _Target, _Type, _Msg, _Opts) -> {error, original}.
