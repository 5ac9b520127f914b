%% `make natlab': every kind of site with every other, and with a neighbour, as a table; what is not as it should be ends
%% it with a status.
-module(macula_peer_natlab_matrix).

-export([main/1]).

%% Characters.
-define(HEAD, 22).
-define(CELL, 15).
%% Of what is broken, these meetings are shown.
-define(SHOWN, 3).

main([Runs, Delay, Loss | Kinds]) ->
    Status = try
        ok = available(),
        [RunCount, Ms, Permille] = [list_to_integer(atom_to_list(Value)) || Value <- [Runs, Delay, Loss]],
        run(RunCount, Ms, Permille, kinds(Kinds))
    catch
        Class:Reason:Stack ->
            io:format("~p: ~tP~n~tP~n", [Class, Reason, 40, Stack, 40]),
            2
    after
        macula_peer_natlab:stop()
    end,
    halt(Status).

available() ->
    case macula_peer_net:available() of
        ok -> ok;
        {skip, Reason} -> error(Reason)
    end.

%% A `hairpin' is no kind of its own to others: its hosts reach each other only at their addresses outside.
kinds([]) ->
    macula_peer_natlab:kinds() ++ [hairpin];
kinds(Kinds) ->
    case Kinds -- kinds([]) of
        [] -> Kinds;
        Unknown -> error({unknown_kinds, Unknown, kinds([])})
    end.

run(Runs, Ms, Permille, Kinds) ->
    Lab = macula_peer_natlab:start(lists:append([sites(Kind) || Kind <- Kinds])),
    _ = [ok = macula_peer_natlab:lengthen(Lab, Ms) || Ms > 0],
    ok = macula_peer_natlab:loss(Lab, Permille),
    Pairs = macula_peer_natlab_pairs:start(Lab),
    Columns = (Kinds -- [hairpin]) ++ [neighbour],
    legend(Runs, Ms, Permille),
    heading(Columns),
    Broken = lists:append([row(Kind, Columns, Runs, Pairs) || Kind <- Kinds]),
    _ = [report(Cell) || Cell <- Broken],
    min(length(Broken), 1).

%% Rows are on the one side, columns on the other.
sites(none) -> [{{none, row}, none}, {{none, column}, none}];
sites(hairpin) -> [{{hairpin, row}, port_restricted, #{hosts => 2, hairpin => true, isolated => true}}];
sites(Kind) -> [{{Kind, row}, Kind, #{hosts => 2}}, {{Kind, column}, Kind}].

%% ---- rows ----

row(Kind, Columns, Runs, Pairs) ->
    io:format("~*s", [-?HEAD, atom_to_list(Kind)]),
    Broken = lists:append([cell(Kind, Column, Runs, Pairs) || Column <- Columns]),
    io:nl(),
    Broken.

%% Returns what is not as expected.
cell(none, neighbour, _Runs, _Pairs) ->
    print("");
cell(hairpin, Column, _Runs, _Pairs) when Column =/= neighbour ->
    print("");
cell(Kind, Column, Runs, Pairs) ->
    Expected = macula_peer_natlab_pairs:expected(Kind, Column),
    {Verdict, Meetings} = meetings(Pairs, {{{Kind, row}, 1}, other(Kind, Column)}, Expected, Runs),
    print(summary(Meetings) ++ [" !" || Verdict =/= ok]),
    [{Kind, Column, Expected, Meetings} || Verdict =/= ok].

other(Kind, neighbour) -> {{Kind, row}, 2};
other(_Kind, Column) -> {{Column, column}, 1}.

meetings(Pairs, {From, To}, Expected, Runs) ->
    judged(Pairs, {From, To}, Expected, [macula_peer_natlab_pairs:meet(Pairs, From, To) || _ <- lists:seq(1, Runs)]).

judged(Pairs, {From, To}, Expected, Meetings) ->
    case macula_peer_natlab_pairs:judge(Expected, Meetings) of
        more -> judged(Pairs, {From, To}, Expected, [macula_peer_natlab_pairs:meet(Pairs, From, To) | Meetings]);
        Verdict -> {Verdict, Meetings}
    end.

%% ---- words ----

legend(Runs, Ms, Permille) ->
    io:format("~nRows send to columns, ~b time(s), with ~b ms and ~b of 1000 packets lost on each cable.~n"
              "Paths: d direct, h hole_punch, r relay, n none, x failed. Then the medians of the milliseconds to the~n"
              "first message, and to the direct path. What is expected otherwise is marked with a !.~n~n",
              [Runs, Ms, Permille]).

heading(Columns) ->
    Words = [string:split(atom_to_list(Column) ++ "_", "_") || Column <- Columns],
    [begin
         io:format("~*s", [-?HEAD, ""]),
         _ = [print(string:trim(lists:nth(N, Two), trailing, "_")) || Two <- Words],
         io:nl()
     end || N <- [1, 2]].

print(Text) ->
    io:format("~*s", [-?CELL, Text]),
    [].

summary(Meetings) ->
    Paths = [case Meeting of #{failed := _} -> $x; #{path := Path} -> hd(atom_to_list(Path)) end || Meeting <- Meetings],
    Counts = [[Path | [integer_to_list(count(Path, Paths)) || length(Paths) > 1]] || Path <- lists:usort(Paths)],
    Times = [median([Ms || #{Key := Ms} <- Meetings, is_integer(Ms)]) || Key <- [first, direct]],
    lists:flatten([lists:join(" ", Counts), " ", lists:join("/", Times)]).

report({From, To, Expected, Meetings}) ->
    io:format("~n~s to ~s: expected ~s, but~n", [From, To, Expected]),
    Misses = macula_peer_natlab_pairs:misses(Expected, Meetings),
    [io:format("  ~0tP~n", [Miss, 60]) || Miss <- lists:sublist(Misses, ?SHOWN)].

count(Path, Paths) ->
    length([P || P <- Paths, P =:= Path]).

median([]) -> "-";
median(Values) -> integer_to_list(lists:nth((length(Values) + 1) div 2, lists:sort(Values))).
