%% Says how two nodes should try to reach each other, and hears what came of it.
-module(macula_nat_coordinator).

-behaviour(gen_server).

-export([start_link/0]).
-export([request_connection/2, report_result/3]).
-export([results/0]).
-export([init/1, handle_call/3, handle_cast/2]).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% `{ok, Strategy, SessionId}'; the strategy is `relay' unless the environment's `strategy' says another.
request_connection(Local, Target) ->
    gen_server:call(?MODULE, {request_connection, Local, Target}, infinity).

report_result(SessionId, Reporter, Result) when Result =:= success; Result =:= failure ->
    gen_server:cast(?MODULE, {report_result, SessionId, Reporter, Result}).

%% What was asked and said, in order: `{Local, Target, SessionId, Reports}'.
results() ->
    gen_server:call(?MODULE, results, infinity).

init([]) ->
    {ok, []}.

handle_call({request_connection, Local, Target}, _From, Sessions) ->
    SessionId = crypto:strong_rand_bytes(16),
    Strategy = application:get_env(macula, strategy, relay),
    Answer = macula_variant:answer(?MODULE, fun() -> {ok, Strategy, SessionId} end, fun() -> strange(SessionId) end),
    {reply, Answer, Sessions ++ [{Local, Target, SessionId, []}]};
handle_call(results, _From, Sessions) ->
    {reply, Sessions, Sessions}.

handle_cast({report_result, SessionId, Reporter, Result}, Sessions) ->
    {noreply, [case Session of
                   {Local, Target, SessionId, Reports} -> {Local, Target, SessionId, Reports ++ [{Reporter, Result}]};
                   _ -> Session
               end || Session <- Sessions]}.

strange(SessionId) ->
    [banana, {ok, direct}, {ok, teleport, SessionId}, {ok, hole_punch, banana}, {error, {1, 2}}, {error, SessionId}].
