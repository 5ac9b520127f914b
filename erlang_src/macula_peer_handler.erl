%% @private
%% @doc Calls a handler that is a function: one process, one message after the other, in the order of arrival. What the
%% function raises is logged and hurts nobody else.
-module(macula_peer_handler).

%% Waits in no code of its own, so that this module can be loaded again and again under it.
-behaviour(gen_server).

-export([start/1]).
-export([stop/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

-type mfargs() :: {module(), atom(), [term()]}.

%% @doc Starts the process for a function; ends the one before.
-spec start(mfargs()) -> pid().
start(MFA) ->
    ok = stop(),
    {ok, Pid} = gen_server:start({local, ?MODULE}, ?MODULE, MFA, []),
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
