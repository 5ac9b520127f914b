%% @private
%% @doc The life of the engine, which runs in the native library and not in a process.
%%
%% Under the application's supervisor this process starts it and stops it. Without the application the first call starts
%% it, with the same settings from the application environment. What the engine warns of is logged by this process.
-module(macula_peer_engine).

-behaviour(gen_server).

-export([start_link/0]).
-export([ensure_started/0]).
-export([running/1]).
-export([stop/0]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).
-export([terminate/2]).

-define(APP, macula_peer_connector).

%% What the native part is told; the other keys of the environment are ours.
-define(NATIVE_KEYS, [ip, port, max_frame_size, max_nesting, pool_size, idle_timeout, keep_alive, connect_timeout,
                      delivery, max_unacknowledged, answer_timeout, workers, max_accepted, max_streams,
                      frame_timeout, node_id, relays, hole_punching, identity_file, verify, realm_secret]).

-spec start_link() -> gen_server:start_ret().
start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% @doc Starts the engine unless it runs.
-spec ensure_started() -> ok | {error, term()}.
ensure_started() ->
    case macula_peer_gateway:setting() of
        {ok, Gateway} -> start_with((settings())#{gateway => Gateway});
        {error, _} = Error -> Error
    end.

-spec start_with(map()) -> ok | {error, term()}.
start_with(Settings) ->
    case macula_peer_nif:start(Settings) of
        ok ->
            logger:notice("macula_peer_connector: peers are verified by ~p", [verify_mode()]),
            or_stop([fun set_default_handler/0, fun listen/0]);
        {error, already_started} ->
            ok;
        {error, _} = Error ->
            Error
    end.

-spec or_stop([fun(() -> ok | {error, term()})]) -> ok | {error, term()}.
or_stop([]) ->
    ok;
or_stop([Step | Steps]) ->
    case Step() of
        ok ->
            or_stop(Steps);
        {error, _} = Error ->
            ok = stop(),
            Error
    end.

%% @doc Calls the native library; starts the engine first if it does not run.
-spec running(fun(() -> Result | not_started)) -> Result | {error, term()}.
running(Call) ->
    case Call() of
        not_started ->
            case ensure_started() of
                ok -> running(Call);
                {error, _} = Error -> Error
            end;
        Result ->
            Result
    end.

%% @doc Stops the engine, if it runs; what is on its way has a second to arrive.
-spec stop() -> ok.
stop() ->
    _ = macula_peer_nif:stop(),
    %% Afterwards: it is told of what the stop left behind.
    ok = macula_peer_handler:stop().

-spec settings() -> map().
settings() ->
    maps:from_list([{Key, Value} || Key <- ?NATIVE_KEYS, {ok, Value} <- [application:get_env(?APP, Key)]]).

-spec verify_mode() -> first_seen | none | pin | cacertfile.
verify_mode() ->
    case application:get_env(?APP, verify) of
        undefined -> first_seen;
        {ok, {Mode, _}} -> Mode;
        {ok, Mode} -> Mode
    end.

-spec set_default_handler() -> ok | {error, term()}.
set_default_handler() ->
    case application:get_env(?APP, handler) of
        {ok, Handler} -> macula_peer_endpoint:set_handler(Handler);
        undefined -> ok
    end.

%% As the setting `listen' says. The handler is a setting of its own.
-spec listen() -> ok | {error, term()}.
listen() ->
    case application:get_env(?APP, listen) of
        undefined ->
            ok;
        {ok, Opts} when is_map(Opts) ->
            case macula_peer_nif:listen(Opts) of
                {ok, _Address} -> ok;
                not_started -> {error, {send_failed, connection_shutdown}};
                {error, {invalid_option, Option}} -> {error, {invalid_option, {listen, Option}}};
                {error, _} = Error -> Error
            end;
        {ok, Other} ->
            {error, {invalid_option, {listen, Other}}}
    end.

-spec init([]) -> {ok, []} | {stop, term()}.
init([]) ->
    _ = process_flag(trap_exit, true),
    _ = macula_peer_nif:set_logger(self()),
    case ensure_started() of
        ok -> {ok, []};
        {error, Reason} -> {stop, Reason}
    end.

-spec handle_call(term(), gen_server:from(), []) -> {reply, {error, unknown_call}, []}.
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

-spec handle_cast(term(), []) -> {noreply, []}.
handle_cast(_Request, State) ->
    {noreply, State}.

-spec handle_info(term(), []) -> {noreply, []}.
handle_info({macula_peer_log, Text}, State) ->
    logger:warning("macula_peer_connector: ~ts", [Text]),
    {noreply, State};
handle_info(_Info, State) ->
    {noreply, State}.

-spec terminate(term(), []) -> ok.
terminate(_Reason, _State) ->
    stop().
