%% @doc What `make bench' runs: messages from Erlang processes to a receiver in another OS process, beside a bare quinn
%% loop of the same shape that sends to the same receiver, in the same run. Compare within one run only.
%%
%% In `macula-peer/1' frames go on one stream (`framed'), in `macula' on one bidirectional stream per message, of which the
%% receiver allows 256 at a time: write, finish, stop the receive half. The `sync' shapes write from plain threads by polling
%% once, as the NIF does on a scheduler thread; the others await in tokio tasks.
-module(macula_peer_bench).

-export([main/1]).
-export([start/2, ask/2, message/0, each/3, result/3, spread/1]).

-define(SENDERS, [1, 10, 100]).
-define(FRAME_SIZE, 128).
-define(DIALECTS, [{"macula-peer/1", [{Shape, Coalesce, Driver}
                                      || Coalesce <- [1, 16], Shape <- ["framed", "framed-sync"],
                                         Driver <- ["plain", "yield"]]},
                   {"macula", [{Shape, 1, Driver} || Shape <- ["bi", "sync"], Driver <- ["plain", "yield"]]}]).

-spec main([atom()]) -> no_return().
main([Messages, Rounds]) ->
    ok = logger:set_primary_config(level, warning),
    Config = {to_integer(Messages), to_integer(Rounds)},
    ok = machine(Config),
    try
        [ok = dialect(Dialect, Config) || Dialect <- ?DIALECTS],
        ok = macula_peer_bench_relay:circuits(Config),
        ok = macula_peer_bench_relay:registrations(Config),
        io:format("~nbench: ok~n"),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("~nbench: failed: ~p~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

machine({Messages, Rounds}) ->
    Cpu = string:trim(os:cmd("grep -m1 'model name' /proc/cpuinfo | cut -d: -f2")),
    io:format("~s, ~b schedulers, OTP ~s, ~s~n~b B frames, ~b messages a row, median of ~b rounds (least-most)~n"
              "times of send_message are less the ~b ns of reading the clock around it~n",
              [Cpu, erlang:system_info(schedulers_online), erlang:system_info(otp_release),
               string:trim(os:cmd("rustc --version")), ?FRAME_SIZE, Messages, Rounds, clock()]).

dialect({Alpn, Bare}, {Messages, Rounds}) ->
    io:format("~n~s~n~s~n", [Alpn, header()]),
    [begin
         Round = fun() ->
             [{"send_message", ours(Alpn, Senders, Messages)}
              | [{bare_name(Contender), bare(Alpn, Contender, Senders, Messages)} || Contender <- Bare]]
         end,
         rows(Senders, [Round() || _ <- lists:seq(1, Rounds)])
     end || Senders <- ?SENDERS],
    ok.

%% Rounds interleave the contenders, so that other load of the machine affects them alike.
rows(Senders, [First | _] = Rounds) ->
    Medians = [begin
        Results = [proplists:get_value(Name, Round) || Round <- Rounds],
        {Name, [spread([maps:get(Key, Result) || Result <- Results]) || Key <- [rate, p50, p99]]}
    end || {Name, _} <- First],
    Best = lists:max([Rate || {"bare, " ++ _, [{Rate, _, _} | _]} <- Medians]),
    [io:format("~3b ~-27s ~s ~6.2f ~s ~s~n", [Senders, Name, thousands(Rate), element(1, Rate) / Best, us(P50), us(P99)])
     || {Name, [Rate, P50, P99]} <- Medians],
    ok.

%% What writes many frames at a time is beside the contest.
bare_name({Shape, 1, Driver}) -> "bare, " ++ Shape ++ " " ++ Driver;
bare_name({Shape, Coalesce, Driver}) -> lists:concat(["bare*", Coalesce, ", ", Shape, " ", Driver]).

header() ->
    "  n                                1000 a second x best         p50 us (least-most)           p99 us (least-most)".

ours(Alpn, Senders, Messages) ->
    with_sink(Alpn, fun(Port, Ask) ->
        Endpoint = iolist_to_binary(["127.0.0.1:", integer_to_list(Port)]),
        Msg = message(),
        %% The link, and one stream more than is counted.
        ok = macula_peer_connector:send_message(Endpoint, store, Msg),
        ok = until(fun() -> frames(Ask) =:= 1 end),
        Start = erlang:monotonic_time(microsecond),
        Send = fun() -> macula_peer_connector:send_message(Endpoint, publish, Msg) end,
        Times = each(Send, Senders, Messages div Senders),
        ok = until(fun() -> frames(Ask) > Senders * (Messages div Senders) end),
        Elapsed = erlang:monotonic_time(microsecond) - Start,
        ok = macula_peer_node:stop(),
        result(Messages, Elapsed, Times)
    end).

%% A frame of 128 bytes of a type that is not answered.
-spec message() -> map().
message() ->
    Fields = #{topic => <<"bench">>, qos => 0, retain => false, message_id => <<>>},
    {ok, Empty} = macula_peer_wire:encode(publish, Fields#{payload => <<>>}),
    Msg = Fields#{payload => binary:copy(<<"v">>, ?FRAME_SIZE - byte_size(Empty))},
    {ok, Frame} = macula_peer_wire:encode(publish, Msg),
    ?FRAME_SIZE = byte_size(Frame),
    Msg.

%% The time of each of Count calls in as many concurrent processes, in nanoseconds.
-spec each(fun(() -> ok), pos_integer(), pos_integer()) -> [integer()].
each(Call, Processes, Each) ->
    Parent = self(),
    Pids = [spawn_link(fun() -> Parent ! {self(), times(Call, Each, [])} end) || _ <- lists:seq(1, Processes)],
    lists:append([receive {Pid, Times} -> Times end || Pid <- Pids]).

times(_Call, 0, Times) -> Times;
times(Call, N, Times) ->
    Before = erlang:monotonic_time(nanosecond),
    ok = Call(),
    times(Call, N - 1, [erlang:monotonic_time(nanosecond) - Before | Times]).

bare(Alpn, {Shape, Coalesce, Driver}, Senders, Messages) ->
    with_sink(Alpn, fun(Port, _Ask) ->
        Args = io_lib:format("source --addr 127.0.0.1:~b --shape ~s --coalesce ~b --driver ~s --senders ~b --messages ~b"
                             " --size ~b --alpn ~s",
                             [Port, Shape, Coalesce, Driver, Senders, Messages, ?FRAME_SIZE, Alpn]),
        #{per_second := Rate, call_p50_ns := P50, call_p99_ns := P99} = term(os:cmd(program("bare_quinn") ++ " " ++ Args)),
        #{rate => Rate, p50 => P50 / 1000, p99 => P99 / 1000}
    end).

%% The receiver is an OS process of its own; `Ask' sends it a command.
with_sink(Alpn, Fun) ->
    {Sink, Port} = start("bare_quinn", ["sink", "--alpn", Alpn]),
    Result = Fun(Port, fun(Command) -> ask(Sink, Command) end),
    true = port_close(Sink),
    Result.

%% A program of the testkit, and the UDP port that it says it has.
-spec start(string(), [string()]) -> {port(), inet:port_number()}.
start(Name, Args) ->
    Program = open_port({spawn_executable, program(Name)}, [{args, Args}, {line, 1000}, binary]),
    <<"ready ", Port/binary>> = line(Program),
    {Program, binary_to_integer(Port)}.

-spec ask(port(), iodata()) -> term().
ask(Program, Command) ->
    true = port_command(Program, [Command, $\n]),
    term(line(Program)).

line(Program) ->
    receive {Program, {data, {eol, Text}}} -> Text end.

frames(Ask) ->
    #{frames := Frames} = Ask("stats"),
    Frames.

until(Condition) ->
    case Condition() of
        true -> ok;
        false -> timer:sleep(1), until(Condition)
    end.

term(Text) ->
    {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
    {ok, Term} = erl_parse:parse_term(Tokens),
    Term.

%% Messages a second, and the median and the 99th percentile of the calls in microseconds.
-spec result(pos_integer(), pos_integer(), [integer()]) -> #{rate | p50 | p99 => number()}.
result(Messages, Elapsed, Times) ->
    Sorted = lists:sort(Times),
    N = length(Sorted),
    Clock = clock(),
    At = fun(Index) -> max(0, lists:nth(max(1, Index), Sorted) - Clock) / 1000 end,
    #{rate => Messages * 1000000 div Elapsed, p50 => At((N + 1) div 2), p99 => At(N * 99 div 100)}.

%% What reading the clock around a call adds to it, in nanoseconds.
clock() ->
    Times = [begin
        Before = erlang:monotonic_time(nanosecond),
        erlang:monotonic_time(nanosecond) - Before
    end || _ <- lists:seq(1, 10001)],
    lists:nth(5001, lists:sort(Times)).

%% The median, the least and the most.
-spec spread([number()]) -> {number(), number(), number()}.
spread(Values) ->
    Sorted = lists:sort(Values),
    {lists:nth((length(Sorted) + 1) div 2, Sorted), hd(Sorted), lists:last(Sorted)}.

thousands({Median, Least, Most}) ->
    io_lib:format("~16s", [io_lib:format("~b (~b-~b)", [N div 1000 || N <- [Median, Least, Most]])]).

us({Median, Least, Most}) ->
    io_lib:format("~30s", [io_lib:format("~.2f (~.2f-~.2f)", [float(T) || T <- [Median, Least, Most]])]).

program(Name) ->
    filename:absname(filename:join("target/release", Name)).

to_integer(Atom) ->
    list_to_integer(atom_to_list(Atom)).
