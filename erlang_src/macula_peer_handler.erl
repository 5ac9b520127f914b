%% @private @doc Calls a handler that is a function: one process, one message after the other, in the order of arrival. What the
%% function raises is logged and hurts nothing else. The engine decides which process is in force, so that handlers which are set
%% at the same time replace one another in some order.
-module(macula_peer_handler).

%% Waits in no code of its own, so that this module can be loaded again and again under it.
-behaviour(gen_server).

-export([start/1]).
-export([stop/1]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

-type mfargs() :: {module(), atom(), [term()]}.

%% @doc Starts the process for a function.
-spec start(mfargs()) -> pid().
start(MFA) ->
    {ok, Pid} = gen_server:start(?MODULE, MFA, []),
    Pid.

%% @doc Ends the process, if there is one, after what it has already got.
-spec stop(pid() | none) -> ok.
stop(none) ->
    ok;
stop(Pid) ->
    Pid ! {?MODULE, stop},
    ok.

-spec init(mfargs()) -> {ok, mfargs()}.
init(MFA) ->
    {ok, MFA}.

-spec handle_call(term(), gen_server:from(), mfargs()) -> {reply, {error, unknown_call}, mfargs()}.
handle_call(_Request, _From, MFA) ->
    {reply, {error, unknown_call}, MFA}.

-spec handle_cast(term(), mfargs()) -> {noreply, mfargs()}.
handle_cast(_Request, MFA) ->
    {noreply, MFA}.

-spec handle_info(term(), mfargs()) -> {noreply, mfargs()} | {stop, normal, mfargs()}.
handle_info({?MODULE, stop}, MFA) ->
    {stop, normal, MFA};
handle_info(Message, MFA) ->
    ok = call(MFA, Message),
    {noreply, MFA}.

-spec call(mfargs(), term()) -> ok.
call({Module, Function, Args}, Message) ->
    try apply(Module, Function, [Message | Args]) of
        _ -> ok
    catch
        Class:Reason:Stack ->
            logger:error("handler ~p:~p/~p failed: ~p", [Module, Function, length(Args) + 1, {Class, Reason, Stack}])
    end.
