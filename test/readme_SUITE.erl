%% The README's snippets do what it says: each is run as it stands.
-module(readme_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0, end_per_testcase/2]).
-export([every_snippet_runs/1]).

%% A snippet more or less in the README is to be noticed here.
-define(SNIPPETS, 4).

all() ->
    [every_snippet_runs].

end_per_testcase(_Case, _Config) ->
    macula_peer_endpoint:stop().

every_snippet_runs(_Config) ->
    {ok, Readme} = file:read_file(filename:join(root(), "README.md")),
    {match, Snippets} = re:run(Readme, "```erlang\n(.*?)```", [global, dotall, {capture, [1], list}]),
    ?assertEqual(?SNIPPETS, length(Snippets)),
    lists:foreach(fun run/1, Snippets).

run([Snippet]) ->
    ct:log("~s", [Snippet]),
    {ok, Tokens, _} = erl_scan:string(Snippet),
    {ok, Expressions} = erl_parse:parse_exprs(Tokens),
    {value, _, _} = erl_eval:exprs(Expressions, #{}),
    %% One listener at a time.
    ok = macula_peer_endpoint:close().

root() ->
    filename:dirname(filename:dirname(proplists:get_value(source, ?MODULE:module_info(compile)))).
