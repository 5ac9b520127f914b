%% Knows relays.
-module(macula_relay_registry).

-behaviour(gen_server).

-export([start_link/0]).
-export([find_relay/1, set/1]).
-export([init/1, handle_call/3, handle_cast/2]).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% `{ok, #{endpoint := {Host, Port}}}' or `{error, no_relays_available}'.
find_relay(Realm) when is_binary(Realm) ->
    gen_server:call(?MODULE, find_relay, infinity).

%% The relays from now on, each `{Host, Port}'.
set(Relays) ->
    gen_server:call(?MODULE, {set, Relays}, infinity).

init([]) ->
    {ok, application:get_env(macula, relays, [])}.

handle_call({set, Relays}, _From, _Before) ->
    {reply, ok, Relays};
handle_call(find_relay, _From, Relays) ->
    {reply, macula_variant:answer(?MODULE, fun() -> found(Relays) end, fun strange/0), Relays}.

handle_cast(_Request, State) ->
    {noreply, State}.

found([]) -> {error, no_relays_available};
found([Endpoint | _]) -> {ok, #{node_id => <<"relay">>, endpoint => Endpoint}}.

strange() ->
    [banana, {ok, banana}, {ok, #{}}, {ok, #{endpoint => banana}}, {ok, #{endpoint => {1, 2}}},
     {ok, #{endpoint => {"127.0.0.1", 99999}}}, {ok, #{endpoint => {{127, 0, 0}, 1}}}].
