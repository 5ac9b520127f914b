%% @private
%% @doc The life of the engine, which runs in the native library and not in a process.
%%
%% Under the application's supervisor this process starts it and stops it. Without the application the first call starts
%% it, with the same settings from the application environment. What the engine warns of is logged by this process.
-module(macula_peer_engine).

-behaviour(gen_server).

-include("macula_peer_log.hrl").

-export([start_link/0]).
-export([ensure_started/0]).
-export([running/1]).
-export([figures/1]).
-export([contained/1]).
-export([to_the_end/1]).
-export([return/1]).
-export([stop/0]).
-export([retire/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).
-export([terminate/2]).

-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% @doc Starts the engine unless it runs.
-spec ensure_started() -> ok | {error, macula_peer_error:start()}.
ensure_started() ->
    case macula_peer_config:read() of
        {ok, Settings} -> to_the_end(fun() -> start(Settings) end);
        {error, _} = Error -> Error
    end.

-spec start(macula_peer_config:settings()) -> ok | {error, macula_peer_error:start()}.
start(#{native := Native, handler := Handler, listen := Listen}) ->
    ok = macula_peer_admission:prepare(Listen),
    {Supervisor, _} = Finisher = macula_peer_finisher_sup:start(),
    Process = macula_peer_handler:start(Handler),
    case contained(fun() -> macula_peer_nif:start(Native, Finisher, Process, Listen) end) of
        ok ->
            ?LOG_NOTICE("macula_peer_connector: peers are verified by ~ts", [verify_mode(Native)], ?DOMAIN),
            _ = [?LOG_WARNING("macula_peer_connector: ~ts", [Remark], ?DOMAIN) || Remark <- macula_peer_config:remarks()],
            ok;
        {error, _} = Error ->
            ok = macula_peer_finisher:stop(Supervisor),
            ok = macula_peer_handler:abandon(Process),
            already_started(Error)
    end.

-spec already_started({error, already_started | macula_peer_error:start()}) -> ok | {error, macula_peer_error:start()}.
already_started({error, already_started}) -> ok;
already_started({error, _} = Error) -> Error.

%% @doc Calls the native library for what an engine knows or counts. Never starts one.
-spec figures(fun(() -> Result | not_started)) -> Result | {error, macula_peer_error:engine()}.
figures(Call) ->
    case contained(Call) of
        not_started -> {error, not_started};
        Result -> Result
    end.

%% @doc Calls the native library; starts the engine first if it does not run.
-spec running(fun(() -> Result | not_started)) -> Result | {error, macula_peer_error:start()}.
running(Call) ->
    case contained(Call) of
        not_started ->
            case ensure_started() of
                ok -> running(Call);
                {error, _} = Error -> Error
            end;
        Result ->
            Result
    end.

%% @doc A defect in the native library becomes an error of the call that hit it.
-spec contained(fun(() -> Result)) -> Result | {error, macula_peer_error:native()}.
contained(Call) ->
    try Call()
    catch
        error:nif_panicked -> {error, {internal, nif_panicked}}
    end.

%% @doc Calls a function that starts or takes over processes, in a process of its own. If the caller is killed the function
%% still returns, so no process is left that only the caller knew.
-spec to_the_end(fun(() -> Result)) -> Result.
to_the_end(Fun) ->
    {Pid, Monitor} = spawn_monitor(?MODULE, return, [Fun]),
    receive
        {'DOWN', Monitor, process, Pid, {?MODULE, {returned, Result}}} -> Result;
        {'DOWN', Monitor, process, Pid, {?MODULE, {raised, Class, Reason, Stack}}} -> erlang:raise(Class, Reason, Stack);
        {'DOWN', Monitor, process, Pid, Reason} -> exit(Reason)
    end.

%% @private What the process of {@link to_the_end/1} does.
-spec return(fun(() -> term())) -> no_return().
return(Fun) ->
    Outcome = try
        {returned, Fun()}
    catch
        Class:Reason:Stack -> {raised, Class, Reason, Stack}
    end,
    exit({?MODULE, Outcome}).

%% @doc Stops the engine, if it runs. Messages in flight have a second to arrive.
-spec stop() -> ok.
stop() ->
    to_the_end(fun() -> stopped(contained(fun macula_peer_nif:stop/0)) end).

%% @doc Stops the engine for an upgrade: no call starts it again before the module macula_peer_nif is loaded again, from the
%% same library or another one. Meanwhile calls answer `{error, {start_failed, upgrading}}'.
-spec retire() -> ok.
retire() ->
    to_the_end(fun() -> stopped(contained(fun macula_peer_nif:retire/0)) end).

-spec stopped(macula_peer_nif:released() | not_started | {error, macula_peer_error:native()}) -> ok.
stopped(Stopped) ->
    ok = macula_peer_lookups:stop(),
    ok = macula_peer_admission:stop(),
    case Stopped of
        %% After the stop, because the handler is told what the stop left behind.
        {released, Handler, Supervisor} ->
            ok = macula_peer_handler:stop(Handler, Supervisor),
            macula_peer_finisher:stop(Supervisor);
        _NotRunning ->
            ok
    end.

-spec verify_mode(map()) -> iolist().
verify_mode(#{verify := {pin, Keys}}) -> io_lib:format("pin, ~b keys", [length(Keys)]);
verify_mode(#{verify := {cacertfile, File}}) -> ["cacertfile ", File];
verify_mode(#{verify := {cacertfile, File, any_name}}) -> ["cacertfile ", File, ", for any name"];
verify_mode(#{verify := Mode}) -> atom_to_list(Mode);
verify_mode(#{}) -> "first_seen".

-spec init([]) -> {ok, []} | {stop, macula_peer_error:start()}.
init([]) ->
    _ = process_flag(trap_exit, true),
    _ = macula_peer_nif:set_logger(self()),
    case ensure_started() of
        ok ->
            {ok, []};
        {error, Reason} ->
            ?LOG_ERROR("macula_peer_connector does not start: ~ts", [macula_peer_config:format_error(Reason)], ?DOMAIN),
            {stop, Reason}
    end.

-spec handle_call(term(), gen_server:from(), []) -> {reply, {error, unknown_call}, []}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

-spec handle_cast(term(), []) -> {noreply, []}.
handle_cast(_Request, State) ->
    {noreply, State}.

-spec handle_info(term(), []) -> {noreply, []}.
handle_info({macula_peer_log, Text}, State) ->
    ?LOG_WARNING("macula_peer_connector: ~ts", [Text], ?DOMAIN),
    {noreply, State};
handle_info(_Info, State) ->
    {noreply, State}.

-spec terminate(term(), []) -> ok.
terminate(_Reason, _State) ->
    stop().
