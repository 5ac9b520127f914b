%% @private
%% @doc Calls a handler that is a function: one process, one message after the other, in the order of arrival. What the
%% function raises is logged and hurts nobody else.
-module(macula_peer_handler).

-export([start/1]).
-export([stop/0]).

-export([init/1]).

-type mfargs() :: {module(), atom(), [term()]}.

%% @doc Starts the process for a function; ends the one before.
-spec start(mfargs()) -> pid().
start(MFA) ->
    ok = stop(),
    Pid = proc_lib:spawn(?MODULE, init, [MFA]),
    true = register(?MODULE, Pid),
    Pid.

%% @doc Ends the process, if there is one, after what it has already got.
-spec stop() -> ok.
stop() ->
    case whereis(?MODULE) of
        undefined ->
            ok;
        Pid ->
            true = unregister(?MODULE),
            Pid ! {?MODULE, stop},
            ok
    end.

%% @private
-spec init(mfargs()) -> ok.
init(MFA) ->
    receive
        {?MODULE, stop} ->
            ok;
        Message ->
            ok = call(MFA, Message),
            init(MFA)
    end.

-spec call(mfargs(), term()) -> ok.
call({Module, Function, Args}, Message) ->
    try apply(Module, Function, [Message | Args]) of
        _ -> ok
    catch
        Class:Reason:Stack ->
            logger:error("handler ~p:~p/~p failed: ~p", [Module, Function, length(Args) + 1, {Class, Reason, Stack}])
    end.
