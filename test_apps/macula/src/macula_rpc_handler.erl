%% Asynchronous calls of procedures on other nodes: a request goes out, and the reply comes back as a message.
-module(macula_rpc_handler).

-behaviour(gen_server).

-export([start_link/0]).
-export([request/4, replied/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% Until a request is given up, in milliseconds.
-define(TIMEOUT, 30000).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% `{ok, RequestId}'; then the caller gets `{macula_rpc, RequestId, {ok, Result} | {error, timeout}}'.
request(Target, Procedure, Args, Opts) ->
    gen_server:call(?MODULE, {request, Target, Procedure, Args, Opts}, infinity).

%% A reply has come.
replied(Message) ->
    gen_server:cast(?MODULE, {replied, Message}).

init([]) ->
    {ok, #{}}.

handle_call({request, Target, Procedure, Args, Opts}, {Caller, _}, Pending) ->
    Id = crypto:strong_rand_bytes(16),
    Local = macula_node:id(),
    Request = #{type => <<"rpc_request">>, request_id => Id, procedure => Procedure, args => Args, from_node => Local,
                timestamp => os:system_time(millisecond)},
    Path = maps:with([endpoint], Opts),
    case macula_peer_connector:send_message_nat_aware(Local, Target, rpc_request, Request, Path) of
        ok ->
            Timer = erlang:send_after(maps:get(timeout, Opts, ?TIMEOUT), self(), {timeout, Id}),
            {reply, {ok, Id}, Pending#{Id => {Caller, Timer}}};
        {error, _} = Error ->
            {reply, Error, Pending}
    end.

handle_cast({replied, #{<<"request_id">> := Id} = Message}, Pending) ->
    {noreply, settle(Id, {ok, maps:get(<<"result">>, Message, null)}, Pending)};
handle_cast({replied, _Message}, Pending) ->
    {noreply, Pending}.

handle_info({timeout, Id}, Pending) ->
    {noreply, settle(Id, {error, timeout}, Pending)};
handle_info(_Info, Pending) ->
    {noreply, Pending}.

settle(Id, Result, Pending) ->
    case maps:take(Id, Pending) of
        {{Caller, Timer}, Left} ->
            _ = erlang:cancel_timer(Timer),
            Caller ! {macula_rpc, Id, Result},
            Left;
        error ->
            Pending
    end.
