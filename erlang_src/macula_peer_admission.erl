%% @private @doc Asks the callback `admission' of a listener. The native library sends the questions, at most 256 at a time, and
%% waits for the answers. Each is asked by a process of its own, which is killed when its time is over.
%%
%% With the application this process is supervised. Without it a listener with such a callback starts it, and the end of the engine
%% ends it. While it is not there, a listener with a callback admits no one.
-module(macula_peer_admission).

-behaviour(gen_server).

-include("macula_peer_log.hrl").

-export([start_link/0]).
-export([prepare/1]).
-export([stop/0]).
-export([ask/2]).

-export([init/1]).
-export([handle_call/3]).
-export([handle_cast/2]).
-export([handle_info/2]).

%% A callback that fails is logged at once, and then once per this many milliseconds, with the number of failures since.
-define(LOG_EVERY, 60000).

-type question() :: macula_peer_node:admission_question().
-type callback() :: {module(), atom(), [term()]}.
-type answer() :: allow | deny | timeout | crash.
-type asked() :: {pid(), macula_peer_nif:admission_token(), Timer :: reference(), callback(), question()}.
-type failure() :: timeout | crash.

-type state() :: #{supervised := boolean(), asked := #{reference() => asked()},
                   %% When it was last logged, and how often it has happened since.
                   logged := #{failure() => {integer(), non_neg_integer()}}}.

-spec start_link() -> gen_server:start_ret().
start_link() ->
    %% One of an engine that was started before the application.
    ok = stop(),
    gen_server:start_link({local, ?MODULE}, ?MODULE, supervised, []).

%% @doc Starts the process unless it runs, if these options of a listener need it.
-spec prepare(macula_peer_node:listen_opts() | undefined) -> ok.
prepare(#{admission := _}) ->
    _ = whereis(?MODULE) =:= undefined andalso gen_server:start({local, ?MODULE}, ?MODULE, alone, []),
    ok;
prepare(_Opts) ->
    ok.

%% @doc Ends the process, unless it is supervised.
-spec stop() -> ok.
stop() ->
    try gen_server:call(?MODULE, stop)
    catch
        exit:_ -> ok
    end.

-spec init(supervised | alone) -> {ok, state()}.
init(How) ->
    %% Stopping the application whose call started the engine must not end this process.
    true = How =:= supervised orelse group_leader(whereis(init), self()),
    {ok, #{supervised => How =:= supervised, asked => #{}, logged => #{}}}.

-spec handle_call(term(), gen_server:from(), state()) ->
          {reply, ok | {error, unknown_call}, state()} | {stop, normal, ok, state()}.
handle_call(stop, _From, #{supervised := true} = State) ->
    {reply, ok, State};
handle_call(stop, _From, State) ->
    {stop, normal, ok, State};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

-spec handle_cast(term(), state()) -> {noreply, state()}.
handle_cast(_Request, State) ->
    {noreply, State}.

-spec handle_info(term(), state()) -> {noreply, state()}.
handle_info({macula_peer_admit, Token, Callback, Question, Timeout}, #{asked := Asked} = State) ->
    {Pid, Monitor} = spawn_monitor(?MODULE, ask, [Callback, Question]),
    Timer = erlang:send_after(Timeout, self(), {?MODULE, timeout, Monitor}),
    {noreply, State#{asked := Asked#{Monitor => {Pid, Token, Timer, Callback, Question}}}};
handle_info({'DOWN', Monitor, process, _Pid, Reason}, #{asked := Asked} = State) when is_map_key(Monitor, Asked) ->
    {{_, Token, Timer, Callback, Question}, Others} = maps:take(Monitor, Asked),
    _ = erlang:cancel_timer(Timer),
    {noreply, answered(answer(Reason), Token, Callback, Question, State#{asked := Others})};
handle_info({?MODULE, timeout, Monitor}, #{asked := Asked} = State) when is_map_key(Monitor, Asked) ->
    {{Pid, Token, _, Callback, Question}, Others} = maps:take(Monitor, Asked),
    true = demonitor(Monitor, [flush]),
    true = exit(Pid, kill),
    {noreply, answered({timeout, none}, Token, Callback, Question, State#{asked := Others})};
handle_info(_Info, State) ->
    {noreply, State}.

-spec answered({answer(), term()}, macula_peer_nif:admission_token(), callback(), question(), state()) -> state().
answered({Answer, Why}, Token, Callback, Question, State) ->
    _ = macula_peer_nif:admitted(Token, Answer),
    logged(Answer, Why, Callback, Question, State).

%% @private
-spec ask(callback(), question()) -> no_return().
ask({Module, Function, Args}, Question) ->
    Answer = try {answer, apply(Module, Function, [Question | Args])}
    catch
        Class:Reason:Stack -> {raised, {Class, Reason, Stack}}
    end,
    exit({?MODULE, Answer}).

-spec answer(term()) -> {allow | deny | crash, term()}.
answer({?MODULE, {answer, allow}}) -> {allow, none};
answer({?MODULE, {answer, deny}}) -> {deny, none};
answer({?MODULE, {answer, {deny, Reason}}}) -> {deny, Reason};
answer({?MODULE, {answer, Other}}) -> {crash, {bad_answer, Other}};
answer({?MODULE, {raised, What}}) -> {crash, What};
answer(Killed) -> {crash, {exit, Killed, []}}.

-spec logged(answer(), term(), callback(), question(), state()) -> state().
logged(allow, _Why, _Callback, _Question, State) ->
    State;
logged(deny, Why, _Callback, Question, State) ->
    ?LOG_INFO("macula_peer_connector: not let in: ~0tp, because of ~0tP", [Question, Why, 30], ?DOMAIN),
    State;
logged(Failure, Why, Callback, Question, #{logged := Logged} = State) ->
    Now = erlang:monotonic_time(millisecond),
    case Logged of
        #{Failure := {Last, Since}} when Now - Last < ?LOG_EVERY ->
            State#{logged := Logged#{Failure := {Last, Since + 1}}};
        #{} ->
            {_, Since} = maps:get(Failure, Logged, {Now, 0}),
            ok = log(Failure, Why, Callback, Question, Since),
            State#{logged := Logged#{Failure => {Now, 0}}}
    end.

-spec log(failure(), term(), callback(), question(), non_neg_integer()) -> ok.
log(timeout, _Why, {Module, Function, Args}, Question, Since) ->
    ?LOG_WARNING("admission callback ~p:~p/~p did not answer in time whether to let in ~0tp~ts",
                 [Module, Function, length(Args) + 1, Question, times(Since)], ?DOMAIN);
log(crash, Why, {Module, Function, Args}, Question, Since) ->
    ?LOG_ERROR("admission callback ~p:~p/~p failed, so this one is not let in: ~0tp: ~0tP~ts",
               [Module, Function, length(Args) + 1, Question, Why, 50, times(Since)], ?DOMAIN).

-spec times(non_neg_integer()) -> iolist().
times(0) -> "";
times(Since) -> io_lib:format(" (and ~b more since the last report)", [Since]).
