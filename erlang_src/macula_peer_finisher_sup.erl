%% @private @doc Starts another finisher when one is killed. Each engine has one of these, with or without the application, so nothing
%% above supervises it: it ends with its finisher, when that is stopped.
-module(macula_peer_finisher_sup).

-behaviour(supervisor).

-export([start/0]).
-export([finisher/1]).

-export([init/1]).

%% The period, in seconds, of the restart limit. Beyond the limit, messages that need the finisher are counted as
%% unhandled.
-define(RESTARTS, 100).
-define(SECONDS, 10).

%% @doc Starts a supervisor and its finisher. Returns it with what the native library knows the finisher by.
-spec start() -> {pid(), macula_peer_nif:finisher()}.
start() ->
    Place = macula_peer_nif:new_finisher(),
    {ok, Supervisor} = supervisor:start_link(?MODULE, Place),
    %% It outlives the process whose call started the engine.
    true = unlink(Supervisor),
    {Supervisor, Place}.

%% @doc The present finisher.
-spec finisher(pid()) -> pid() | none.
finisher(Supervisor) ->
    try supervisor:which_children(Supervisor) of
        [{_, Pid, _, _}] when is_pid(Pid) -> Pid;
        _ -> none
    catch
        exit:_ -> none
    end.

-spec init(macula_peer_nif:finisher()) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init(Place) ->
    %% Stopping the application whose call started the engine must not end this process.
    true = group_leader(whereis(init), self()),
    Flags = #{strategy => one_for_one, intensity => ?RESTARTS, period => ?SECONDS, auto_shutdown => any_significant},
    Finisher = #{id => macula_peer_finisher, start => {macula_peer_finisher, start_link, [Place]},
                 restart => transient, significant => true},
    {ok, {Flags, [Finisher]}}.
