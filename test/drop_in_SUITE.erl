%% Fresh projects with a fake of macula, and this library in place of its modules, by the steps of docs/drop-in.md:
%% what the page says to write is taken from the page.
-module(drop_in_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-define(PAGE, "docs/drop-in.md").

%% The longest that a tool may take to build or to answer.
-define(PATIENCE, 120000).

%% What is asked of a running system, as one expression: which modules are in force, whether macula runs, and whether a
%% message that it sends to itself arrives.
-define(QUESTION,
        "begin"
        " {ok, {_, Port}} = macula_peer_node:listen(#{handler => self()}),"
        " Sent = macula_peer_connector:send_message(\"127.0.0.1:\" ++ integer_to_list(Port), dht_store, #{key => 1}, 5000),"
        " Type = receive {macula_peer_message, #{type := T}} -> T after 5000 -> none end,"
        " ok = macula_peer_node:close(),"
        " Whose = fun(M) -> maps:get(module, maps:get(M, macula_peer_node:which())) end,"
        " {says, Whose(macula_peer_connector), Whose(macula_peer_connection_pool),"
        "  is_pid(whereis(macula_peer_connection_pool)), macula_peer_connection_pool:get_connection(<<\"x:1\">>), Sent, Type}"
        " end").

-define(BOTH_OURS, {says, ours, ours, true, {error, no_quicer_connection}, ok, store}).
-define(POOL_OF_MACULA, {says, ours, other, true, {error, original}, ok, store}).

suite() -> [{timetrap, {minutes, 4}}].

all() ->
    [a_release_with_both_is_an_error, release_with_erts, release_without_erts, release_that_links_to_the_build,
     release_with_the_pool_of_macula, shell, common_test, umbrella, mix_run, mix_release].

init_per_suite(Config) ->
    %% A project of its own would be that of the tests.
    [os:unsetenv(Name) || Name <- ["REBAR_CONFIG", "REBAR_BASE_DIR", "REBAR_PROFILE", "ERL_LIBS", "ERL_FLAGS"]],
    %% Nodes with names start the port mapper and leave it running. The suite ends it if it started it.
    true = os:putenv("ERL_EPMD_PORT", integer_to_list(free_tcp_port())),
    %% Not below this project: the links back to it would make tools go round in circles.
    Dir = string:trim(os:cmd("mktemp -d")),
    Macula = filename:join(Dir, "macula"),
    copy(filename:join(macula_peer_test:root(), "test_apps/macula"), Macula),
    new(Dir, "release", "shop", Macula),
    [{top, Dir}, {macula, Macula}, {project, filename:join(Dir, "shop")} | Config].

end_per_suite(Config) ->
    ct:log("~ts", [os:cmd("epmd -kill")]),
    true = os:unsetenv("ERL_EPMD_PORT"),
    ok = file:del_dir_r(?config(top, Config)).

free_tcp_port() ->
    {ok, Socket} = gen_tcp:listen(0, []),
    {ok, Port} = inet:port(Socket),
    ok = gen_tcp:close(Socket),
    Port.

init_per_testcase(Case, Config) when Case =:= mix_run; Case =:= mix_release ->
    case os:find_executable("mix") of
        false ->
            ct:pal("SKIPPED: there is no mix here. `apt-get install elixir`, and this is tested."),
            {skip, "no mix"};
        _ ->
            mix_project(Config)
    end;
init_per_testcase(_Case, Config) ->
    Config.

end_per_testcase(_Case, _Config) -> ok.

%% ---- rebar3 ----

a_release_with_both_is_an_error(Config) ->
    Project = ?config(project, Config),
    configure(Project, []),
    {Status, Said} = run(Project, "rebar3 release"),
    ?assertNotEqual(0, Status),
    ?assertMatch({match, _}, re:run(Said, "Duplicated modules:\\s+macula_peer_connector specified in macula_peer_connector and macula")).

release_with_erts(Config) ->
    Release = release(Config, "rebar3 as prod release", "prod", "relx"),
    ?assertMatch([_], filelib:wildcard(Release ++ "/erts-*")),
    ?assertEqual([], filelib:wildcard(Release ++ "/lib/macula-*/ebin/macula_peer_connect*")),
    ?assertEqual(?BOTH_OURS, ask_release(Config, Release)).

release_without_erts(Config) ->
    Release = release(Config, "rebar3 as bare release", "bare", "relx"),
    ?assertEqual([], filelib:wildcard(Release ++ "/erts-*")),
    ?assertEqual(?BOTH_OURS, ask_release(Config, Release)).

release_that_links_to_the_build(Config) ->
    Release = release(Config, "rebar3 release", "default", "relx"),
    ?assertMatch({ok, _}, file:read_link(hd(filelib:wildcard(Release ++ "/lib/macula_peer_connector-*")))),
    ?assertEqual(?BOTH_OURS, ask_release(Config, Release)).

release_with_the_pool_of_macula(Config) ->
    Release = release(Config, "rebar3 as prod release", "prod", "relx: keep macula's pool"),
    ?assertEqual(?POOL_OF_MACULA, ask_release(Config, Release)).

shell(Config) ->
    Project = ?config(project, Config),
    configure(Project, []),
    sys_config(Project, fragment("config/sys.config")),
    ?assertEqual(?BOTH_OURS, ask_shell(Project)),
    %% The second switch is one of its own.
    sys_config(Project, string:replace(fragment("config/sys.config"), "{takeover_pool, true}", "{takeover_pool, false}")),
    ?assertMatch({says, ours, _, true, _, ok, store}, ask_shell(Project)),
    %% What the developer does all day: rebar3 reloads what differs from the first file in its code path.
    sys_config(Project, fragment("config/sys.config")),
    ?assertEqual(?BOTH_OURS, ask_shell(Project, "begin r3:do(compile), " ++ ?QUESTION ++ " end")).

common_test(Config) ->
    Project = ?config(project, Config),
    configure(Project, []),
    sys_config(Project, fragment("config/sys.config")),
    Suite = ["-module(shop_SUITE).\n-compile(export_all).\n-compile(nowarn_export_all).\n"
             "all() -> [in_force].\n"
             "in_force(_) ->\n"
             "    {ok, _} = application:ensure_all_started(shop),\n",
             io_lib:format("    ~0p = ~s.\n", [?BOTH_OURS, ?QUESTION])],
    write(Project, "apps/shop/test/shop_SUITE.erl", Suite),
    {Status, Said} = run(Project, "rebar3 ct --cover"),
    ?assertMatch({0, {match, _}}, {Status, re:run(Said, "All 1 tests passed")}).

%% Two applications: one that calls, and one that is called and does not know macula.
umbrella(Config) ->
    Top = ?config(top, Config),
    new(Top, "umbrella", "market", ?config(macula, Config)),
    Project = filename:join(Top, "market"),
    Template = filename:join(Project, "rebar.config"),
    {0, _} = run(filename:join(Project, "apps"), "rebar3 new app shop"),
    {0, _} = run(filename:join(Project, "apps"), "rebar3 new lib goods"),
    _ = file:delete(filename:join(Project, "apps/shop/rebar.config")),
    _ = file:delete(filename:join(Project, "apps/goods/rebar.config")),
    applications(Project),
    write(Project, "apps/goods/src/goods.erl", ["-module(goods).\n-export([says/0]).\nsays() -> ", ?QUESTION, ".\n"]),
    Relx = "{relx, [{release, {market, \"0.1.0\"}, [shop, goods]}, {mode, prod}, " ++ fragment("relx") ++ "]}.\n",
    ok = file:write_file(Template, ["{erl_opts, [debug_info]}.\n", fragment("rebar.config"),
                                    fragment("rebar.config: shell and ct"), Relx]),
    sys_config(Project, fragment("config/sys.config")),
    ?assertEqual(?BOTH_OURS, ask_shell(Project, "goods:says()")),
    {0, _} = run(Project, "rebar3 release"),
    ?assertEqual(?BOTH_OURS, ask_release(filename:join(Project, "_build/default/rel/market"), "market", "goods:says()")).

%% ---- mix ----

mix_run(Config) ->
    Project = ?config(mix, Config),
    {Status, Said} = run(Project, "mix run -e '" ++ elixir(?QUESTION) ++ "'"),
    ?assertEqual({0, ?BOTH_OURS}, {Status, answer(Said)}).

mix_release(Config) ->
    Project = ?config(mix, Config),
    Mix = filename:join(Project, "mix.exs"),
    {ok, Whole} = file:read_file(Mix),
    {Status, Said} = run(Project, "MIX_ENV=prod mix release"),
    ?assertNotEqual(0, Status),
    ?assertMatch({match, _}, re:run(Said, "Duplicated modules:\\s+macula_peer_connector")),
    With = insert(Whole, "deps: deps()", "deps: deps(), releases: releases()"),
    ok = file:write_file(Mix, insert(With, "# Run \"mix help deps\"", [fragment("mix.exs: releases"), "\n# Deps"])),
    %% No module is replaced here.
    ok = file:delete(filename:join(Project, "config/config.exs")),
    {0, _} = run(Project, "MIX_ENV=prod mix release"),
    Program = filename:join(Project, "_build/prod/rel/shop/bin/shop"),
    Running = start(Project, Program ++ " start"),
    Ask = fun() -> run(Project, Program ++ " rpc '" ++ elixir(?QUESTION) ++ "'") end,
    {0, Answer} = macula_peer_test:await(Ask, fun({Done, _}) -> Done =:= 0 end, 30000),
    {0, _} = run(Project, Program ++ " stop"),
    {0, _} = ended(Running),
    ?assertEqual(?BOTH_OURS, answer(Answer)).

mix_project(Config) ->
    Project = filename:join(?config(top, Config), "mix_shop"),
    _ = file:del_dir_r(Project),
    {0, _} = run(?config(top, Config), "mix new --sup --app shop mix_shop"),
    {ok, Mix} = file:read_file(filename:join(Project, "mix.exs")),
    Deps = re:replace(fragment("mix.exs: deps"), "git: \"[^\"]*\"", ["path: \"", macula_peer_test:root(), "\""]),
    %% No registry is asked.
    Local = string:replace(Deps, "\"0.14.3\"", ["path: \"", ?config(macula, Config), "\""]),
    ok = file:write_file(filename:join(Project, "mix.exs"), insert(Mix, "# {:dep_from_hexpm, \"~> 0.3.0\"},", [Local, "#"])),
    write(Project, "config/config.exs", fragment("config/config.exs")),
    [{mix, Project} | Config].

%% Erlang, evaluated by Elixir; the answer is printed as Erlang has it.
elixir(Expression) ->
    Text = binary_to_list(base64:encode(Expression ++ ".")),
    "{:ok, tokens, _} = :erl_scan.string(:base64.decode_to_string(~c\"" ++ Text ++ "\")); "
    "{:ok, expressions} = :erl_parse.parse_exprs(tokens); "
    "{:value, value, _} = :erl_eval.exprs(expressions, []); "
    ":io.format(~c\"~n~0p.~n\", [value])".

%% ---- projects ----

%% `rebar3 new', with the fake and this library in place of the dependencies it names.
new(Top, Template, Name, Macula) ->
    {0, _} = run(Top, ["rebar3 new ", Template, " ", Name]),
    Project = filename:join(Top, Name),
    Checkouts = filename:join(Project, "_checkouts"),
    ok = file:make_dir(Checkouts),
    ok = file:make_symlink(Macula, filename:join(Checkouts, "macula")),
    ok = file:make_symlink(macula_peer_test:root(), filename:join(Checkouts, "macula_peer_connector")),
    {ok, Generated} = file:read_file(filename:join(Project, "rebar.config")),
    ok = file:write_file(filename:join(Project, "rebar.config.generated"), Generated),
    case Template of
        "release" -> applications(Project);
        "umbrella" -> ok
    end.

applications(Project) ->
    File = filename:join(Project, "apps/shop/src/shop.app.src"),
    {ok, App} = file:read_file(File),
    Ours = re:replace(App, "\\{applications,\\s*\\[[^]]*\\]\\s*\\}", string:trim(fragment("shop.app.src"))),
    ?assertNotEqual(App, iolist_to_binary(Ours)),
    ok = file:write_file(File, Ours).

%% What `rebar3 new release' made, with what the page says, and these lines for relx.
configure(Project, Relx) ->
    {ok, Generated} = file:read_file(filename:join(Project, "rebar.config.generated")),
    WithDeps = insert(Generated, "{deps, []}.", [fragment("rebar.config"), fragment("rebar.config: shell and ct")]),
    WithRelx = insert(WithDeps, "{mode, dev},", [[Line, ",\n"] || Line <- Relx] ++ ["{mode, dev},"]),
    Bare = "{profiles, [{bare, [{relx, [{mode, minimal}]}]}, ",
    ok = file:write_file(filename:join(Project, "rebar.config"), insert(WithRelx, "{profiles, [", Bare)),
    sys_config(Project, "[].").

sys_config(Project, Text) ->
    write(Project, "config/sys.config", Text).

release(Config, Command, Profile, Fragment) ->
    Project = ?config(project, Config),
    configure(Project, [fragment(Fragment)]),
    _ = file:del_dir_r(filename:join([Project, "_build", Profile])),
    {0, Said} = run(Project, Command),
    ct:log("~ts", [Said]),
    filename:join([Project, "_build", Profile, "rel/shop"]).

%% What stands on the page under this name.
fragment(Name) ->
    {ok, Page} = file:read_file(filename:join(macula_peer_test:root(), ?PAGE)),
    Pattern = "```[a-z]+ \\Q" ++ Name ++ "\\E\n(.*?)```",
    {match, [[Text]]} = re:run(Page, Pattern, [global, dotall, {capture, [1], list}]),
    Text.

insert(Text, Place, New) ->
    [Before, After] = string:split(Text, Place),
    iolist_to_binary([Before, New, After]).

write(Project, File, Text) ->
    Path = filename:join(Project, File),
    ok = filelib:ensure_dir(Path),
    ok = file:write_file(Path, Text).

copy(From, To) ->
    [begin
         ok = filelib:ensure_dir(filename:join(To, File)),
         {ok, _} = file:copy(filename:join(From, File), filename:join(To, File))
     end || Pattern <- ["rebar.config", "src/**/*.erl", "src/*.app.src", "include/*.hrl"],
            File <- filelib:wildcard(Pattern, From)].

%% ---- running systems ----

ask_release(_Config, Release) ->
    ask_release(Release, "shop", ?QUESTION).

%% Its node's name is its own: other releases may run on this host.
ask_release(Release, Name, Expression) ->
    Node = Name ++ integer_to_list(erlang:unique_integer([positive])) ++ "_" ++ os:getpid(),
    Vm = filename:join(Release, "test.vm.args"),
    ok = file:write_file(Vm, ["-sname ", Node, "\n-setcookie ", Node, "\n"]),
    Env = "VMARGS_PATH=" ++ Vm ++ " ",
    Program = Env ++ filename:join([Release, "bin", Name]),
    Running = start(Release, Program ++ " foreground"),
    Ask = fun() -> run(Release, Program ++ " eval '" ++ Expression ++ ".'") end,
    {0, Answer} = macula_peer_test:await(Ask, fun({Status, Said}) -> Status =:= 0 andalso says(Said) end, 30000),
    {0, _} = run(Release, Program ++ " stop"),
    {_, Log} = ended(Running),
    ct:log("~ts", [Log]),
    answer(Answer ++ ".").

says(Said) ->
    string:find(Said, "{says") =/= nomatch.

ask_shell(Project) ->
    ask_shell(Project, ?QUESTION).

%% Typed when the application is up.
ask_shell(Project, Expression) ->
    Shell = start(Project, "rebar3 shell"),
    Booted = heard(Shell, "Booted shop"),
    true = port_command(Shell, ["io:format(\"~n~0p.~n\", [", Expression, "]).\nhalt(0).\n"]),
    {0, Said} = ended(Shell),
    ct:log("~ts~ts", [Booted, Said]),
    answer(Said).

%% The term on a line that begins with it.
answer(Said) ->
    {match, [Text]} = re:run(Said, "\\{says.*?\\}(?=\\.?\\s*$)", [multiline, dotall, {capture, first, list}]),
    {ok, Tokens, _} = erl_scan:string(Text ++ "."),
    {ok, Term} = erl_parse:parse_term(Tokens),
    Term.

run(Dir, Command) ->
    {Status, Said} = ended(start(Dir, Command)),
    ct:log("~ts~n~ts", [Command, Said]),
    {Status, Said}.

start(Dir, Command) ->
    Env = [{"MIX_REBAR3", os:find_executable("rebar3")}, {"LC_ALL", "C.UTF-8"}, {"TERM", "dumb"}],
    open_port({spawn_executable, "/bin/sh"},
              [{args, ["-c", unicode:characters_to_list(["exec 2>&1; ", Command])]}, {cd, Dir}, {env, Env}, exit_status]).

ended(Port) -> ended(Port, []).

ended(Port, Said) ->
    receive
        {Port, {data, Data}} -> ended(Port, [Said, Data]);
        {Port, {exit_status, Status}} -> {Status, lists:flatten(Said)}
    after ?PATIENCE -> error({no_end, lists:flatten(Said)})
    end.

heard(Port, Text) -> heard(Port, Text, []).

heard(Port, Text, Said) ->
    receive
        {Port, {data, Data}} ->
            Now = lists:flatten([Said, Data]),
            case string:find(Now, Text) of
                nomatch -> heard(Port, Text, Now);
                _ -> Now
            end;
        {Port, {exit_status, Status}} ->
            error({ended, Status, Said})
    after ?PATIENCE -> error({not_heard, Text, Said})
    end.
