%% @private @doc Finishes the terms that the native library cannot build on its own threads: maps of many keys, and maps in which
%% a key came twice. Messages with such a map come to this process, which sends them on to the handler; answers are finished by
%% the process that asked.
%%
%% Each engine has one, with or without the application. If it is killed, the messages that it had and those that would need it
%% are counted as unhandled until the engine is stopped and started.
-module(macula_peer_finisher).

-behaviour(gen_server).

-export([start/0]).
-export([stop/1]).
-export([forward/3]).
-export([finish/1]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

-type around() :: {message, map()} | {route_message, macula_peer_wire:type(), reference(), {ok, macula_peer_nif:ip_port()}}.
%% The rest of a message for the handler, or for the process macula_gateway.

%% @doc Starts a process.
-spec start() -> pid().
start() ->
    {ok, Pid} = gen_server:start(?MODULE, [], []),
    Pid.

%% @doc Ends a process, after the messages that it already has.
-spec stop(pid()) -> ok.
stop(Finisher) ->
    Finisher ! {?MODULE, stop},
    ok.

%% @doc Sends a message behind those that the process already has for the same receiver.
-spec forward(pid(), pid(), term()) -> ok.
forward(Finisher, To, Message) ->
    _ = case is_process_alive(Finisher) of
        true -> Finisher ! {?MODULE, forward, To, Message};
        false -> To ! Message
    end,
    ok.

%% @doc The term that an unfinished one stands for. Of equal keys the last one counts, as in the original.
-spec finish(macula_peer_nif:unfinished()) -> term().
finish({map, Pairs}) -> maps:from_list([{finish(Key), finish(Value)} || {Key, Value} <- Pairs]);
finish([_ | _] = List) -> [finish(Element) || Element <- List];
finish(Map) when is_map(Map) -> maps:map(fun(_Key, Value) -> finish(Value) end, Map);
finish(Term) -> Term.

-spec init([]) -> {ok, []}.
init([]) ->
    %% Stopping the application whose call started the engine must not end this process.
    true = group_leader(whereis(init), self()),
    {ok, []}.

-spec handle_call(term(), gen_server:from(), []) -> {reply, {error, unknown_call}, []}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

-spec handle_cast(term(), []) -> {noreply, []}.
handle_cast(_Request, State) ->
    {noreply, State}.

-spec handle_info(term(), []) -> {noreply, [], hibernate} | {stop, normal, []}.
handle_info({macula_peer_finish, Receipt, To, Around, Unfinished}, State) ->
    To ! whole(Around, finish(Unfinished)),
    %% It is in the mailbox when this returns: nothing that the native library sends directly from then on overtakes it.
    case is_process_alive(To) of
        true -> ok = macula_peer_nif:handed_over(Receipt);
        %% The receipt goes with the garbage, and the message is counted.
        false -> ok
    end,
    %% Gives back the memory, which may be a hundred times that of the next message.
    {noreply, State, hibernate};
handle_info({?MODULE, forward, To, Message}, State) ->
    To ! Message,
    {noreply, State, hibernate};
handle_info({?MODULE, stop}, State) ->
    {stop, normal, State};
handle_info(_Info, State) ->
    {noreply, State, hibernate}.

-spec whole(around(), term()) -> term().
whole({message, Fields}, Message) ->
    {macula_peer_message, Fields#{message := Message}};
whole({route_message, Type, Stream, From}, Message) ->
    {'$gen_cast', {route_message, Type, Message, Stream, From}}.
