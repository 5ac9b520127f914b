%% @private @doc Finishes the terms that the native library cannot build on its own threads: maps of many keys, and maps in which
%% a key came twice. Messages with such a map come to this process, which sends them on to the handler; answers are finished by
%% the process that asked.
%%
%% Each engine has one. If it is killed, the messages that it had are counted as unhandled, and its supervisor starts another one.
-module(macula_peer_finisher).

-behaviour(gen_server).

-export([start_link/1]).
-export([stop/1]).
-export([forward/3]).
-export([pass_on/3]).
-export([finish/1]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

-type around() :: {message, map()} | {route_message, macula_peer_wire:type(), reference(), {ok, macula_peer_nif:ip_port()}}.
%% The rest of a message for the handler, or for the process macula_gateway.

-spec start_link(macula_peer_nif:finisher()) -> gen_server:start_ret().
start_link(Place) ->
    gen_server:start_link(?MODULE, Place, []).

%% @doc Ends the process and its supervisor, after the messages that it already has.
-spec stop(Supervisor :: pid()) -> ok.
stop(Supervisor) ->
    _ = case macula_peer_finisher_sup:finisher(Supervisor) of
        none -> ok;
        Finisher -> Finisher ! {?MODULE, stop}
    end,
    ok.

%% @doc Sends a message after those that the process already has for the same receiver.
-spec forward(Supervisor :: pid(), pid(), term()) -> ok.
forward(Supervisor, To, Message) ->
    _ = case macula_peer_finisher_sup:finisher(Supervisor) of
        none -> To ! Message;
        %% The finisher may have long to do before it comes to this.
        Finisher -> spawn(?MODULE, pass_on, [Finisher, To, Message])
    end,
    ok.

%% @private Sends the message through the finisher, or directly if that ends first: it may have been told to stop.
-spec pass_on(pid(), pid(), term()) -> term().
pass_on(Finisher, To, Message) ->
    try
        gen_server:call(Finisher, {forward, To, Message}, infinity)
    catch
        exit:_ -> To ! Message
    end.

%% @doc The term that an unfinished one stands for. Of equal keys the last one counts, as in the original.
-spec finish(macula_peer_nif:unfinished()) -> term().
finish({map, Pairs}) -> maps:from_list([{finish(Key), finish(Value)} || {Key, Value} <- Pairs]);
finish([_ | _] = List) -> [finish(Element) || Element <- List];
finish(Map) when is_map(Map) -> maps:map(fun(_Key, Value) -> finish(Value) end, Map);
finish(Term) -> Term.

-spec init(macula_peer_nif:finisher()) -> {ok, []}.
init(Place) ->
    ok = macula_peer_nif:set_finisher(Place, self()),
    {ok, []}.

-spec handle_call(term(), gen_server:from(), []) -> {reply, ok | {error, unknown_call}, [], hibernate}.
handle_call({forward, To, Message}, _From, State) ->
    To ! Message,
    {reply, ok, State, hibernate};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State, hibernate}.

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
handle_info({?MODULE, stop}, State) ->
    {stop, normal, State};
handle_info(_Info, State) ->
    {noreply, State, hibernate}.

-spec whole(around(), term()) -> term().
whole({message, Fields}, Message) ->
    {macula_peer_message, Fields#{message := Message}};
whole({route_message, Type, Stream, From}, Message) ->
    {'$gen_cast', {route_message, Type, Message, Stream, From}}.
