%% `make natlab': every kind of site with every other, and with a neighbour, as a table. What is not as expected ends it
%% with a status.
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

kinds([]) ->
    macula_peer_natlab_pairs:kinds();
kinds(Kinds) ->
    case Kinds -- kinds([]) of
        [] -> Kinds;
        Unknown -> error({unknown_kinds, Unknown, kinds([])})
    end.

run(Runs, Ms, Permille, Kinds) ->
    Lab = macula_peer_natlab:start(macula_peer_natlab_pairs:sites(Kinds)),
    _ = [ok = macula_peer_natlab:lengthen(Lab, Ms) || Ms > 0],
    ok = macula_peer_natlab:loss(Lab, Permille),
    Pairs = macula_peer_natlab_pairs:start(Lab),
    Columns = (Kinds -- [hairpin]) ++ [neighbour],
    legend(Runs, Ms, Permille),
    heading(Columns),
    Broken = lists:append([row(Kind, Columns, Runs, Pairs) || Kind <- Kinds]),
    _ = [report(Cell) || Cell <- Broken],
    min(length(Broken), 1).

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
    {Verdict, Meetings} = macula_peer_natlab_pairs:meet_as_expected(Pairs, Kind, Column, Runs),
    print(summary(Meetings) ++ [" !" || Verdict =/= ok]),
    [{Kind, Column, Meetings} || Verdict =/= ok].

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
    Paths = lists:map(fun letter/1, Meetings),
    Counts = [[Path | [integer_to_list(count(Path, Paths)) || length(Paths) > 1]] || Path <- lists:usort(Paths)],
    Times = [median([Ms || #{Key := Ms} <- Meetings, is_integer(Ms)]) || Key <- [first, direct]],
    lists:flatten([lists:join(" ", Counts), " ", lists:join("/", Times)]).

letter(#{failed := _}) -> $x;
letter(#{path := Path}) -> hd(atom_to_list(Path)).

report({From, To, Meetings}) ->
    Expected = macula_peer_natlab_pairs:expected(From, To),
    io:format("~n~s to ~s: expected ~s, but~n", [From, To, Expected]),
    Misses = macula_peer_natlab_pairs:misses(Expected, Meetings),
    [io:format("  ~0tP~n", [Miss, 60]) || Miss <- lists:sublist(Misses, ?SHOWN)].

count(Path, Paths) ->
    length([P || P <- Paths, P =:= Path]).

median([]) -> "-";
median(Values) -> integer_to_list(lists:nth((length(Values) + 1) div 2, lists:sort(Values))).
