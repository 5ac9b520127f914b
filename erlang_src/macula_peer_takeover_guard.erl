%% @private @doc Keeps our modules in force where the settings ask for them. Tools load others on their own: rebar3's
%% `r3:do(compile)' puts the dependencies into the code path again and reloads what differs from the first file there. There is no
%% notice of that, so this process checks once a second.
-module(macula_peer_takeover_guard).

-behaviour(gen_server).

-include("macula_peer_log.hrl").

-export([start_link/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

%% Milliseconds.
-define(INTERVAL, 1000).

-type failures() :: [{module(), term()}].
%% The failures that have been logged.

-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

-spec init([]) -> {ok, failures()} | ignore.
init([]) ->
    case macula_peer_takeover:is_wanted() of
        true -> {ok, wait([])};
        false -> ignore
    end.

-spec handle_call(term(), gen_server:from(), failures()) -> {reply, {error, unknown_call}, failures()}.
handle_call(_Request, _From, Failures) ->
    {reply, {error, unknown_call}, Failures}.

-spec handle_cast(term(), failures()) -> {noreply, failures()}.
handle_cast(_Request, Failures) ->
    {noreply, Failures}.

-spec handle_info(term(), failures()) -> {noreply, failures()}.
handle_info(look, Failures) ->
    Restored = macula_peer_takeover:restore(),
    _ = [?LOG_WARNING("macula_peer_connector: another ~s was loaded; this library's is in force again", [Module], ?DOMAIN)
         || {Module, ok} <- Restored],
    New = [{Module, Reason} || {Module, {error, Reason}} <- Restored],
    _ = [?LOG_ERROR("macula_peer_connector: another ~s was loaded, and this library's cannot be: ~0tp", [Module, Reason], ?DOMAIN)
         || {Module, Reason} <- New -- Failures],
    {noreply, wait(New)};
handle_info(_Info, Failures) ->
    {noreply, Failures}.

-spec wait(failures()) -> failures().
wait(Failures) ->
    _ = erlang:send_after(?INTERVAL, self(), look),
    Failures.
