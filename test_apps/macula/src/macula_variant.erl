%% How the servers behave: `normal', `slow' (the server takes five seconds for each call, and others wait their turn),
%% `wrong' (strange answers), `crashing' (the server exits in the call), `absent' (it does not run).
-module(macula_variant).

-export([servers/0]).
-export([set/1, set/2]).
-export([answer/3]).

%% In milliseconds.
-define(SLOW, 5000).

servers() ->
    [macula_routing_server, macula_nat_cache, macula_nat_coordinator, macula_relay_registry, macula_nat_detector,
     macula_rpc_handler, macula_pubsub_dht, macula_gateway, macula_gateway_listener].

%% Of all that others ask.
set(Variant) ->
    _ = [ok = set(Server, Variant) || Server <- [macula_routing_server, macula_nat_cache, macula_nat_coordinator,
                                                 macula_relay_registry]],
    ok.

set(Server, absent) ->
    supervisor:terminate_child(macula_sup, Server);
set(Server, Variant) ->
    ok = application:set_env(macula, Server, Variant),
    case supervisor:restart_child(macula_sup, Server) of
        {ok, _} -> ok;
        {error, running} -> ok
    end.

%% What the server answers in its present variant. Called in the server; the functions give the right answer and a list
%% of strange ones.
answer(Server, Answer, Strange) ->
    case application:get_env(macula, Server, normal) of
        normal -> Answer();
        slow -> timer:sleep(?SLOW), Answer();
        wrong -> one_of(Strange());
        crashing -> exit({crashing, Server})
    end.

one_of(Answers) ->
    lists:nth(rand:uniform(length(Answers)), Answers).
