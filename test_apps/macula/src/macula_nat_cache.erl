%% NAT profiles of nodes.
-module(macula_nat_cache).

-behaviour(gen_server).

-export([start_link/0]).
-export([put/2, get_from_dht/1]).
-export([init/1, handle_call/3, handle_cast/2]).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

put(NodeId, Profile) ->
    gen_server:call(?MODULE, {put, NodeId, Profile}, infinity).

%% `{ok, Profile}' or `not_found'.
get_from_dht(NodeId) ->
    gen_server:call(?MODULE, {get, NodeId}, infinity).

init([]) ->
    {ok, application:get_env(macula, nat_profiles, #{})}.

handle_call({put, NodeId, Profile}, _From, Profiles) ->
    {reply, ok, Profiles#{NodeId => Profile}};
handle_call({get, NodeId}, _From, Profiles) ->
    {reply, macula_variant:answer(?MODULE, fun() -> found(NodeId, Profiles) end, fun strange/0), Profiles}.

handle_cast(_Request, State) ->
    {noreply, State}.

found(NodeId, Profiles) ->
    case Profiles of
        #{NodeId := Profile} -> {ok, Profile};
        #{} -> not_found
    end.

strange() ->
    [banana, {ok, banana}, {ok, #{mapping_policy => <<"ei">>, reflexive_address => {"nowhere", -1}}},
     {ok, #{reflexive_address => [], port_delta => banana, requires_relay => 7}}, {error, {1, 2}}, {ok, []}].
