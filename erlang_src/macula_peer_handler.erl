%% @private @doc Calls a handler that is a function: one process, one message after the other, in the order of arrival. What the
%% function raises is logged and hurts nothing else. The engine decides which process is in force, so that handlers which are set
%% at the same time replace one another in some order.
-module(macula_peer_handler).

%% Waits in no code of its own, so that this module can be loaded again and again under it.
-behaviour(gen_server).

-include("macula_peer_log.hrl").

-export([start/1]).
-export([stop/2]).
-export([abandon/1]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

-type mfargs() :: {module(), atom(), [term()]}.

%% @doc The handler as the native library knows it, with a process for a function.
-spec start(macula_peer_node:handler() | undefined) -> macula_peer_nif:handler().
start({_Module, _Function, _Args} = MFA) ->
    {ok, Pid} = gen_server:start(?MODULE, MFA, []),
    {function, Pid};
start(PidOrUndefined) ->
    PidOrUndefined.

%% @doc Ends the process of a function after the messages it has, and those that the finisher has for it.
-spec stop(pid() | none, Supervisor :: pid()) -> ok.
stop(none, _Supervisor) ->
    ok;
stop(Pid, Supervisor) ->
    macula_peer_finisher:forward(Supervisor, Pid, {?MODULE, stop}).

%% @doc Ends the process of a function that is not in force.
-spec abandon(macula_peer_nif:handler()) -> ok.
abandon({function, Pid}) ->
    Pid ! {?MODULE, stop},
    ok;
abandon(_PidOrUndefined) ->
    ok.

-spec init(mfargs()) -> {ok, mfargs()}.
init(MFA) ->
    %% Stopping the application whose call set the handler must not end this process.
    true = group_leader(whereis(init), self()),
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
            ?LOG_ERROR("handler ~p:~p/~p failed: ~p", [Module, Function, length(Args) + 1, {Class, Reason, Stack}], ?DOMAIN)
    end.
