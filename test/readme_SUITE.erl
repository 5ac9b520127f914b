%% The snippets in the README and the pages for users, and the examples, do what they say: each is run as it stands.
-module(readme_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, end_per_testcase/2]).
-export([every_snippet_runs/1, every_example_runs/1, every_link_leads_somewhere/1, every_attack_has_its_test/1]).

%% A snippet that is added or lost fails here. Sending goes first, while no relay is known.
-define(SNIPPETS, [{"docs/sending.md", 1}, {"README.md", 3}, {"docs/nat.md", 1}, {"docs/inbound.md", 1}, {"docs/relays.md", 3}, {"docs/drop-in.md", 1}]).

%% A snippet that waits for what does not come.
suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [every_snippet_runs, every_example_runs, every_link_leads_somewhere, every_attack_has_its_test].

end_per_testcase(_Case, _Config) ->
    macula_peer_node:stop().

every_snippet_runs(_Config) ->
    Pages = [{File, snippets(File)} || {File, _} <- ?SNIPPETS],
    ?assertEqual(?SNIPPETS, [{File, length(Snippets)} || {File, Snippets} <- Pages]),
    [lists:foreach(fun run/1, Snippets) || {_, Snippets} <- Pages].

%% An example that is added or lost fails here.
every_example_runs(_Config) ->
    Said = [{"relay.escript", "received #{<<\"key\">> => <<\"temperature\">>,<<\"value\">> => 21} by the path relay\n"},
            {"request.escript", "answered #{<<\"server_time\">> => [0-9]+,<<\"timestamp\">> => 1}\n"},
            {"send.escript", "received #{<<\"key\">> => <<\"answer\">>,<<\"value\">> => 42} in the dialect macula-peer/1\n"}],
    ?assertEqual([Name || {Name, _} <- Said], lists:sort(filelib:wildcard("*", filename:join(root(), "examples")))),
    [?assertMatch({Name, 0, {match, _}}, example(Name, Pattern)) || {Name, Pattern} <- Said].

example(Name, Pattern) ->
    Env = [{"ERL_LIBS", filename:dirname(code:lib_dir(macula_peer_connector))}],
    Escript = open_port({spawn_executable, os:find_executable("escript")},
                        [{args, [filename:join([root(), "examples", Name])]}, {env, Env}, exit_status, stderr_to_stdout]),
    {Status, Output} = output(Escript, []),
    ct:log("~ts", [Output]),
    {Name, Status, re:run(Output, Pattern)}.

output(Port, Output) ->
    receive
        {Port, {data, Data}} -> output(Port, [Output, Data]);
        {Port, {exit_status, Status}} -> {Status, Output}
    end.

%% Links between the pages: the file is there, and so is the heading.
every_link_leads_somewhere(_Config) ->
    Pages = [Page || Pattern <- ["*.md", "docs/**/*.md"], Page <- filelib:wildcard(Pattern, root())],
    Links = [{Page, Link} || Page <- Pages, Link <- links(Page)],
    ?assert(length(Links) > 50),
    ?assertEqual([], [Dead || {Page, Link} = Dead <- Links, not leads_somewhere(Page, Link)]).

links(Page) ->
    {match, Links} = re:run(["[]()", text(Page)], "\\]\\(([^)\\s]*)\\)", [global, {capture, [1], list}]),
    [Link || [Link] <- Links, Link =/= "", string:prefix(Link, "https://") =:= nomatch].

leads_somewhere(Page, Link) ->
    {File, Heading} = case string:split(Link, "#") of
        ["", Anchor] -> {Page, Anchor};
        [To] -> {filename:join(filename:dirname(Page), To), ""};
        [To, Anchor] -> {filename:join(filename:dirname(Page), To), Anchor}
    end,
    filelib:is_file(filename:join(root(), File)) andalso (Heading =:= "" orelse lists:member(Heading, anchors(File))).

%% As GitHub makes them.
anchors(Page) ->
    case re:run(text(Page), "^#+ (.*)$", [global, multiline, {capture, [1], list}]) of
        {match, Headings} -> [anchor(string:lowercase(Heading)) || [Heading] <- Headings];
        nomatch -> []
    end.

anchor(Heading) ->
    Kept = re:replace(Heading, "[^a-z0-9 _-]", "", [global, {return, list}]),
    lists:flatten(string:replace(Kept, " ", "-", all)).

text(Page) ->
    {ok, Text} = file:read_file(filename:join(root(), Page)),
    Text.

%% Each row of the table of attacks ends with the name of a test that exists.
every_attack_has_its_test(_Config) ->
    {ok, Page} = file:read_file(filename:join(root(), "docs/attacks.md")),
    {match, Rows} = re:run(Page, "^\\| [^-].*\\| (.*) \\|$", [global, multiline, {capture, [1], binary}]),
    Tests = [Test || [Test] <- Rows, Test =/= <<"test">>],
    ?assert(length(Tests) >= 40),
    Sources = [begin {ok, Source} = file:read_file(File), Source end || File <- tests()],
    ?assertEqual([], [Test || Test <- Tests, not is_in(Test, Sources)]).

is_in(Test, Sources) ->
    Name = string:trim(Test, both, "`"),
    lists:any(fun(Source) -> re:run(Source, ["^(\\s*(async )?fn )?", Name, "\\("], [multiline]) =/= nomatch end, Sources).

tests() ->
    Patterns = ["native/*/tests/**/*.rs", "native/*/src/**/*.rs", "test/*_SUITE.erl"],
    [filename:join(root(), File) || Pattern <- Patterns, File <- filelib:wildcard(Pattern, root())].

snippets(File) ->
    {ok, Page} = file:read_file(filename:join(root(), File)),
    {match, Snippets} = re:run(Page, "```erlang\n(.*?)```", [global, dotall, {capture, [1], list}]),
    Snippets.

run([Snippet]) ->
    ct:log("~s", [Snippet]),
    {ok, Tokens, _} = erl_scan:string(Snippet),
    {ok, Expressions} = erl_parse:parse_exprs(Tokens),
    {value, _, _} = erl_eval:exprs(Expressions, #{}),
    %% One listener at a time.
    ok = macula_peer_node:close().

root() ->
    filename:dirname(filename:dirname(proplists:get_value(source, ?MODULE:module_info(compile)))).
