%% How the library gets into other people's projects: the precompiled NIF, the package for Hex, a git dependency, a
%% checkout. What is committed is tested, not what lies about.
-module(package_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("public_key/include/public_key.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [root/0]).

-define(APP, macula_peer_connector).
-define(NIF, "priv/macula_peer_nif.so").

%% The Rust of the package is compiled, if not its dependencies.
suite() -> [{timetrap, {minutes, 15}}].

all() ->
    [{group, precompiled}, {group, source}, {group, package}, {group, repository}].

groups() ->
    [{precompiled, [a_precompiled_nif_is_taken_without_rust, a_precompiled_nif_needs_its_checksum,
                    a_precompiled_nif_with_another_checksum_is_refused, missing_programs_are_named,
                    the_file_is_that_of_the_target, without_cargo_the_build_gives_instructions]},
     {source, [the_rust_settings_of_the_project_do_not_apply, flags_of_the_user_are_kept, too_old_a_rust_is_named,
               read_only_sources_will_do, an_escript_gives_instructions]},
     {package, [the_package_has_exactly_the_files_it_needs, the_links_of_the_package_lead_somewhere,
                a_project_builds_it_from_source]},
     {repository, [a_project_has_it_as_a_git_dependency, a_project_has_it_as_a_checkout, two_builds_at_once]}].

init_per_suite(Config) ->
    case run(root(), [], "git rev-parse HEAD") of
        {0, _} -> precompiled(Config);
        {_, Said} -> {skip, "the committed files cannot be read: " ++ Said}
    end.

precompiled(Config) ->
    {0, Said} = run(root(), [], "make --no-print-directory nif-package"),
    {match, [Dir]} = re:run(Said, "^MACULA_PEER_NIF_DIR=(.*)$", [multiline, {capture, [1], list}]),
    {match, [Sum]} = re:run(Said, "^MACULA_PEER_NIF_SHA256=(.*)$", [multiline, {capture, [1], list}]),
    Precompiled = [{"MACULA_PEER_NIF_DIR", Dir}, {"MACULA_PEER_NIF_SHA256", Sum}],
    [{precompiled, Precompiled}, {nif_dir, Dir}, {nif_sum, Sum} | Config].

end_per_suite(_Config) ->
    ok.

init_per_group(package, Config) ->
    %% The code that makes and reads packages is rebar3's own.
    case code:ensure_loaded(r3_hex_tarball) of
        {module, _} ->
            {Files, Tarball} = package(Config),
            Unpacked = filename:join(?config(priv_dir, Config), "unpacked"),
            {ok, _} = r3_hex_tarball:unpack(Tarball, Unpacked),
            [{files, Files}, {tarball, Tarball}, {unpacked, Unpacked} | Config];
        {error, _} ->
            {skip, "not run by rebar3"}
    end;
init_per_group(_Group, Config) ->
    Config.

end_per_group(_Group, _Config) ->
    ok.

%% ---- the precompiled NIF ----

a_precompiled_nif_is_taken_without_rust(Config) ->
    Project = clone(Config),
    Env = without_rust(Config, ?config(precompiled, Config)),
    ?assertMatch({0, _}, run(Project, Env, "make --no-print-directory nif")),
    ?assertEqual(?config(nif_sum, Config), sha256(filename:join(Project, ?NIF))),
    %% The same through rebar3, with any spelling of the digits.
    ok = file:del_dir_r(filename:join(Project, "priv")),
    Upper = lists:keyreplace("MACULA_PEER_NIF_SHA256", 1, Env,
                             {"MACULA_PEER_NIF_SHA256", string:uppercase(?config(nif_sum, Config))}),
    ?assertMatch({0, _}, run(Project, Upper, "rebar3 compile")),
    ?assertEqual(?config(nif_sum, Config), sha256(filename:join(Project, ?NIF))),
    ?assertNot(rust_was_called(Config)),
    works([filename:join(Project, "_build/default/lib/macula_peer_connector/ebin")]).

a_precompiled_nif_needs_its_checksum(Config) ->
    refused(Config, [{"MACULA_PEER_NIF_DIR", ?config(nif_dir, Config)}], ["MACULA_PEER_NIF_SHA256"]).

a_precompiled_nif_with_another_checksum_is_refused(Config) ->
    Other = lists:duplicate(64, $0),
    refused(Config, [{"MACULA_PEER_NIF_DIR", ?config(nif_dir, Config)}, {"MACULA_PEER_NIF_SHA256", Other}],
            [Other, ?config(nif_sum, Config), "not installed"]).

missing_programs_are_named(Config) ->
    Sum = ?config(nif_sum, Config),
    Nowhere = filename:join([?config(priv_dir, Config)]),
    refused(Config, [{"MACULA_PEER_NIF_DIR", Nowhere}, {"MACULA_PEER_NIF_SHA256", Sum}],
            [filename:join(Nowhere, file_name(Config))]),
    refused(Config, [{"MACULA_PEER_NIF_DIR", "relative"}, {"MACULA_PEER_NIF_SHA256", Sum}], ["absolute"]).

%% What Erlang calls the machine it was built for, and what Rust calls it.
the_file_is_that_of_the_target(Config) ->
    Targets = [{"x86_64-pc-linux-gnu", "x86_64-unknown-linux-gnu"},
               {"x86_64-redhat-linux-gnu", "x86_64-unknown-linux-gnu"},
               {"aarch64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"},
               {"x86_64-pc-linux-musl", "x86_64-unknown-linux-musl"},
               {"x86_64-alpine-linux-musl", "x86_64-unknown-linux-musl"},
               {"aarch64-linux-musl", "aarch64-unknown-linux-musl"},
               {"x86_64-apple-darwin22.6.0", "x86_64-apple-darwin"},
               {"aarch64-apple-darwin23.1.0", "aarch64-apple-darwin"},
               {"x86_64-portbld-freebsd14.1", "x86_64-unknown-freebsd"},
               {"aarch64-unknown-linux-gnu_ilp32", none},
               {"sparc64-unknown-linux-gnu", none},
               {"win32", none}],
    Project = clone(Config),
    Bin = filename:join(?config(priv_dir, Config), "other_machine"),
    [begin
         program(Bin, "erl", ["printf '%s' '", Architecture, "'"]),
         Env = [path(Bin), {"MACULA_PEER_NIF_DIR", Bin}, {"MACULA_PEER_NIF_SHA256", ?config(nif_sum, Config)}],
         {Status, Said} = run(Project, Env, "sh native/nif.sh"),
         Wanted = case Target of
             none -> "MACULA_PEER_NIF_TARGET";
             _ -> "macula_peer_nif-" ++ version() ++ "-" ++ Target ++ ".so "
         end,
         ?assertMatch({1, [_ | _], _}, {Status, string:find(Said, Wanted), {Architecture, Wanted, Said}}),
         {1, Named} = run(Project, [{"MACULA_PEER_NIF_TARGET", "of-my-own"} | Env], "sh native/nif.sh"),
         ?assertMatch([_ | _], string:find(Named, "-of-my-own.so "))
     end || {Architecture, Target} <- Targets].

without_cargo_the_build_gives_instructions(Config) ->
    refused(Config, [{"CARGO", "there-is-no-such-cargo"}], ["cargo", "install Rust", "MACULA_PEER_NIF_DIR"]).

%% The build fails, says this, and leaves nothing behind.
refused(Config, Env, Words) ->
    Project = clone(Config),
    [begin
         {Status, Said} = run(Project, without_rust(Config, Env), Command),
         ?assertNotEqual({0, Command}, {Status, Command}),
         [?assertMatch({_, [_ | _]}, {Said, string:find(Said, Word)}) || Word <- ["macula_peer_connector: " | Words]]
     end || Command <- ["make --no-print-directory nif", "rebar3 compile"]],
    ?assertEqual([], filelib:wildcard("priv/{*,.m*}", Project)),
    ?assertEqual([], filelib:wildcard("_build/**/*.beam", Project)),
    ?assertNot(rust_was_called(Config)).

file_name(Config) ->
    [File] = [File || File <- filelib:wildcard("macula_peer_nif-*.so", ?config(nif_dir, Config)),
                      sha256(filename:join(?config(nif_dir, Config), File)) =:= ?config(nif_sum, Config)],
    File.

version() ->
    _ = application:load(?APP),
    {ok, Version} = application:get_key(?APP, vsn),
    Version.

%% The first in the path are a cargo and a rustc that fail, and tell.
without_rust(Config, Env) ->
    Bin = filename:join(?config(priv_dir, Config), "no_rust"),
    [program(Bin, Name, ["touch ", called(Config), "; exit 1"]) || Name <- ["cargo", "rustc"]],
    [path(Bin) | Env].

rust_was_called(Config) ->
    filelib:is_file(called(Config)).

called(Config) ->
    filename:join(?config(priv_dir, Config), "rust_was_called").

program(Dir, Name, Script) ->
    File = filename:join(Dir, Name),
    ok = filelib:ensure_dir(File),
    ok = file:write_file(File, ["#!/bin/sh\n", Script, "\n"]),
    ok = file:change_mode(File, 8#755).

path(Dir) ->
    {"PATH", Dir ++ ":" ++ os:getenv("PATH")}.

%% ---- from source ----

%% A dependency lies in the project that uses it, below its rust-toolchain.toml and .cargo/config.toml.
the_rust_settings_of_the_project_do_not_apply(Config) ->
    {Project, Env} = with_rust(Config, "1.99.0"),
    Above = filename:dirname(Project),
    ok = file:write_file(filename:join(Above, "rust-toolchain.toml"), "[toolchain]\nchannel = \"1.60.0\"\n"),
    ok = filelib:ensure_dir(filename:join(Above, ".cargo/config.toml")),
    ok = file:write_file(filename:join(Above, ".cargo/config.toml"), "[profile.release]\npanic = \"abort\"\n"),
    {1, Said} = run(Project, Env, "sh native/nif.sh"),
    said(Said, ["toolchain=the-default ", "profile.release.panic=\"unwind\"", "reason that it gives above",
                filename:join(Above, ".cargo/config.toml")]),
    {1, Named} = run(Project, [{"RUSTUP_TOOLCHAIN", "of-my-own"}, {"RUSTC_WRAPPER", "sccache"} | Env], "sh native/nif.sh"),
    said(Named, ["toolchain=of-my-own ", "RUSTC_WRAPPER"]),
    ok = file:delete(filename:join(Above, "rust-toolchain.toml")),
    ok = file:del_dir_r(filename:join(Above, ".cargo")).

%% Flags in the environment replace those that we need.
flags_of_the_user_are_kept(Config) ->
    {Project, Env} = with_rust(Config, "1.99.0"),
    Flags = fun(Set) ->
        {1, Said} = run(Project, Set ++ Env, "sh native/nif.sh"),
        {match, [Flags]} = re:run(Said, "^flags=(.*)$", [multiline, {capture, [1], list}]),
        Flags
    end,
    ?assertEqual("none", Flags([])),
    ?assertEqual("[-g -Ctarget-feature=-crt-static]", Flags([{"RUSTFLAGS", "-g"}])),
    ?assertEqual("[-Ctarget-feature=-crt-static,+aes -Ctarget-feature=-crt-static]",
                 Flags([{"RUSTFLAGS", "-Ctarget-feature=+crt-static,+aes"}])),
    ?assertEqual("encoded [-C|debuginfo=1|-Ctarget-feature=-crt-static]",
                 Flags([{"CARGO_ENCODED_RUSTFLAGS", "-C\x{1f}debuginfo=1"}, {"RUSTFLAGS", "-g"}])).

too_old_a_rust_is_named(Config) ->
    [begin
         {Project, Env} = with_rust(Config, Version),
         {1, Said} = run(Project, Env, "sh native/nif.sh"),
         ?assertEqual({Version, Old, Said}, {Version, string:find(Said, "this is cargo " ++ Version) =/= nomatch, Said})
     end || {Version, Old} <- [{"1.60.0", true}, {"1.90.1", true}, {"1.100.0", false}, {"2.0.0", false}]].

%% A clone, and tools that report their arguments, and fail.
with_rust(Config, Version) ->
    Bin = filename:join(?config(priv_dir, Config), "rust"),
    program(Bin, "rustup", "echo 'the-default (default)'"),
    program(Bin, "cargo", ["[ \"$1\" != --version ] || { echo 'cargo ", Version, " (x)'; exit; }\n"
                           "exec >&2\necho \"toolchain=$RUSTUP_TOOLCHAIN $*\"\n"
                           "if [ \"${CARGO_ENCODED_RUSTFLAGS+x}\" ]; then\n"
                           "  echo \"flags=encoded [$CARGO_ENCODED_RUSTFLAGS]\" | tr '\\037' '|'\n"
                           "elif [ \"${RUSTFLAGS+x}\" ]; then echo \"flags=[$RUSTFLAGS]\"; else echo flags=none; fi\n"
                           "exit 101"]),
    {clone(Config), [path(Bin)]}.

said(Said, Words) ->
    [?assertMatch({_, _, [_ | _]}, {Word, Said, string:find(Said, Word)}) || Word <- Words].

%% As in an image, or where another user has built it. There is no Rust then.
read_only_sources_will_do(Config) ->
    case os:cmd("unshare --mount true 2>&1") of
        "" -> read_only_sources(Config);
        _ -> {skip, "only root may mount file systems"}
    end.

read_only_sources(Config) ->
    Project = project(?config(priv_dir, Config), "read_only", [{deps, [?APP]}]),
    Checkout = filename:join([Project, "_checkouts", ?APP]),
    Clone = clone(Config),
    ok = filelib:ensure_dir(Checkout),
    ok = file:make_symlink(Clone, Checkout),
    ?assertMatch({0, _}, run(Project, ?config(precompiled, Config), "rebar3 compile")),
    Again = fun(Env) ->
        run(Project, Env, ["unshare --mount sh -c 'mount --bind ", Clone, " ", Clone, " && mount -o remount,bind,ro ", Clone,
                           " && rebar3 compile'"])
    end,
    Env = without_rust(Config, []),
    ?assertMatch({0, _}, Again(Env)),
    ?assertMatch({0, _}, Again(?config(precompiled, Config) ++ Env)),
    works_in(Project),
    ok = file:change_time(filename:join(Clone, "native/peer/src/lib.rs"), calendar:local_time()),
    ok = file:change_time(filename:join(Clone, ?NIF), {{2020, 1, 1}, {0, 0, 0}}),
    {1, Said} = Again(Env),
    said(Said, [?NIF ++ " is missing or older than its sources", "cannot be written"]),
    ?assertNot(rust_was_called(Config)).

%% Then it follows the advice.
an_escript_gives_instructions(Config) ->
    Dir = ?config(priv_dir, Config),
    Lib = filename:join(Dir, "lib"),
    App = filename:join(Lib, ?APP),
    [begin
         Of = filename:join(App, Sub),
         ok = filelib:ensure_dir(filename:join(Of, "x")),
         [{ok, _} = file:copy(File, filename:join(Of, filename:basename(File)))
          || File <- filelib:wildcard(filename:join([code:lib_dir(?APP), Sub, "*"]))]
     end || Sub <- ["ebin", "priv"]],
    Main = filename:join(Dir, "program.erl"),
    ok = file:write_file(Main, "-module(program).\n-export([main/1]).\nmain(_) -> io:format(\"~0p.\", "
                               "[macula_peer_wire:encode(ping, #{timestamp => 1})]).\n"),
    {ok, program} = compile:file(Main, [{outdir, Dir}]),
    {ok, Beam} = file:read_file(filename:join(Dir, "program.beam")),
    Files = fun(Sub) ->
        [begin
             {ok, Content} = file:read_file(File),
             {filename:join([?APP, Sub, filename:basename(File)]), Content}
         end || File <- filelib:wildcard(filename:join([App, Sub, "*"]))]
    end,
    Says = fun(Name, Archived, Env) ->
        Script = filename:join(Dir, Name),
        ok = escript:create(Script, [shebang, {emu_args, "-escript main program -kernel logger_level none"},
                                     {archive, [{"program.beam", Beam} | Archived], []}]),
        {_, Said} = run(Dir, Env, ["escript ", Script]),
        {ok, Tokens, _} = erl_scan:string(Said),
        {ok, Term} = erl_parse:parse_term(Tokens),
        {Script, Term}
    end,
    {Script, {error, {nif_not_loaded, Text}}} = Says("all", Files("ebin") ++ Files("priv"), []),
    said(unicode:characters_to_list(Text), [Script ++ " is an archive", "ERL_LIBS", "release"]),
    ?assertEqual(nomatch, string:find(Text, "rebar3 compile")),
    ?assertMatch({_, {ok, <<_/binary>>}}, Says("bare", [], [{"ERL_LIBS", Lib}])).

%% ---- the package ----

%% Built as `rebar3 hex build' does it, from a clone with other files in it.
package(Config) ->
    Project = clone(Config),
    [begin
         ok = filelib:ensure_dir(filename:join(Project, File)),
         ok = file:write_file(filename:join(Project, File), "left behind")
     end || File <- ["priv/macula_peer_nif.so", "target/release/libmacula_peer_nif.so", "target/package/some.so",
                     "_build/default/lib/macula_peer_connector/ebin/x.beam", "native/fuzz/target/x",
                     "native/fuzz/corpus/decode/x", "doc/index.html", "erl_crash.dump"]],
    AppSrc = "macula_peer_connector.app.src",
    {ok, [{application, ?APP, Keys} = App]} = file:consult(filename:join([Project, "erlang_src", AppSrc])),
    Files = [{File, filename:join(Project, File)} || Path <- proplists:get_value(files, Keys), File <- expand(Path, Project)],
    %% The plugin puts the application's file there, wherever else it may be.
    All = [{filename:join("src", AppSrc), unicode:characters_to_binary(io_lib:format("~tp.~n", [App]))} | Files],
    Text = fun(Key) -> unicode:characters_to_binary(proplists:get_value(Key, Keys)) end,
    Metadata = #{<<"name">> => atom_to_binary(?APP), <<"app">> => atom_to_binary(?APP), <<"version">> => Text(vsn),
                 <<"description">> => Text(description), <<"requirements">> => #{}, <<"build_tools">> => [<<"rebar3">>],
                 <<"licenses">> => [unicode:characters_to_binary(L) || L <- proplists:get_value(licenses, Keys)],
                 <<"links">> => #{}, <<"files">> => [unicode:characters_to_binary(File) || {File, _} <- All]},
    {ok, #{tarball := Tarball}} = r3_hex_tarball:create(Metadata, All),
    {[File || {File, _} <- All], Tarball}.

%% Every name in the list is one of something.
expand(Path, Project) ->
    [_ | _] = [File || Found <- filelib:wildcard(Path, Project),
                       File <- case filelib:is_dir(filename:join(Project, Found)) of
                                   true -> filelib:wildcard(filename:join(Found, "**"), Project);
                                   false -> [Found]
                               end,
                       filelib:is_regular(filename:join(Project, File))].

the_package_has_exactly_the_files_it_needs(Config) ->
    Files = ?config(files, Config),
    {0, Committed} = run(root(), [], "git ls-tree -r --name-only HEAD"),
    ?assertEqual([], Files -- ["src/macula_peer_connector.app.src" | string:lexemes(Committed, "\n")]),
    Sources = [File || File <- string:lexemes(Committed, "\n"),
                       re:run(File, "^(erlang_src|docs)/|^native/(nif|peer|core|wire)/src/|^native/[^/]*/Cargo.toml$") =/= nomatch,
                       not lists:prefix("native/fuzz/", File)],
    ?assertEqual([], Sources -- Files),
    ?assertEqual([], [File || File <- Files, re:run(File, "^test|^native/fuzz|/tests/|[.](so|beam)$") =/= nomatch]).

the_links_of_the_package_lead_somewhere(Config) ->
    {Files, Unpacked} = {?config(files, Config), ?config(unpacked, Config)},
    Links = [{File, Link} || File <- Files, filename:extension(File) =:= ".md",
                             Link <- links(filename:join(Unpacked, File))],
    ?assertMatch([_, _, _ | _], Links),
    ?assertEqual([], [{File, Link} || {File, Link} <- Links,
                                      not filelib:is_regular(filename:join([Unpacked, filename:dirname(File), Link]))]).

links(File) ->
    {ok, Page} = file:read_file(File),
    case re:run(Page, "\\]\\(([^):#]+)[^):]*\\)", [global, {capture, [1], list}]) of
        {match, Links} -> lists:append(Links);
        nomatch -> []
    end.

%% A registry on this machine, and a project that has the package from it by name and version.
a_project_builds_it_from_source(Config) ->
    {Httpd, Registry} = registry(Config),
    Project = project(?config(priv_dir, Config), "from_hex", [{deps, [{?APP, version()}]}, {hex, [{repos, replace, [Registry]}]}]),
    Cache = [{"REBAR_CACHE_DIR", filename:join(?config(priv_dir, Config), "cache")},
             {"REBAR_GLOBAL_CONFIG_DIR", ?config(priv_dir, Config)}],
    ?assertMatch({0, _}, run(Project, Cache, "rebar3 get-deps")),
    Target = filename:join([Project, "_build/default/lib", ?APP, "target"]),
    ok = macula_peer_test:warm_target(Target),
    ?assertMatch({0, _}, run(Project, Cache, "rebar3 compile")),
    ok = file:del_dir_r(Target),
    ok = inets:stop(httpd, Httpd),
    ?assert(filelib:is_regular(filename:join([Project, "_build/default/lib", ?APP, "hex_metadata.config"]))),
    works_in(Project).

registry(Config) ->
    Root = filename:join(?config(priv_dir, Config), "registry"),
    Tarball = ?config(tarball, Config),
    Name = atom_to_binary(?APP),
    Version = unicode:characters_to_binary(version()),
    {ok, #{inner_checksum := Inner, outer_checksum := Outer}} = r3_hex_tarball:unpack(Tarball, memory),
    Release = #{version => Version, inner_checksum => Inner, outer_checksum => Outer, dependencies => []},
    #'RSAPrivateKey'{modulus = N, publicExponent = E} = PrivateKey = public_key:generate_key({rsa, 2048, 65537}),
    Pem = fun(Type, What) -> public_key:pem_encode([public_key:pem_entry_encode(Type, What)]) end,
    Key = Pem('RSAPrivateKey', PrivateKey),
    Signed = fun(Protobuf) -> zlib:gzip(r3_hex_registry:sign_protobuf(Protobuf, Key)) end,
    [begin
         ok = filelib:ensure_dir(filename:join(Root, File)),
         ok = file:write_file(filename:join(Root, File), Content)
     end || {File, Content} <- [
        {"names", Signed(r3_hex_registry:encode_names(#{repository => <<"here">>, packages => [#{name => Name}]}))},
        {"versions", Signed(r3_hex_registry:encode_versions(
                         #{repository => <<"here">>, packages => [#{name => Name, versions => [Version], retired => []}]}))},
        {filename:join("packages", Name), Signed(r3_hex_registry:encode_package(
                         #{repository => <<"here">>, name => Name, releases => [Release]}))},
        {"tarballs/" ++ atom_to_list(?APP) ++ "-" ++ version() ++ ".tar", Tarball}]],
    {ok, _} = application:ensure_all_started(inets),
    {ok, Httpd} = inets:start(httpd, [{port, 0}, {bind_address, {127, 0, 0, 1}}, {server_name, "registry"},
                                      {server_root, Root}, {document_root, Root}]),
    Url = ["http://127.0.0.1:", integer_to_list(proplists:get_value(port, httpd:info(Httpd)))],
    {Httpd, #{name => <<"here">>, repo_url => unicode:characters_to_binary(Url),
              repo_public_key => Pem('SubjectPublicKeyInfo', #'RSAPublicKey'{modulus = N, publicExponent = E})}}.

%% ---- dependencies of other kinds ----

a_project_has_it_as_a_git_dependency(Config) ->
    {0, Head} = run(root(), [], "git rev-parse HEAD"),
    Project = project(?config(priv_dir, Config), "from_git", [{deps, [{?APP, {git, "file://" ++ root(), {ref, string:trim(Head)}}}]}]),
    %% The compiler's warnings are not its users' concern.
    Warned = [{"ERL_COMPILER_OPTIONS", "[recv_opt_info]"} | ?config(precompiled, Config)],
    {0, Said} = run(Project, Warned, "rebar3 compile"),
    said(Said, ["Warning: "]),
    works_in(Project).

a_project_has_it_as_a_checkout(Config) ->
    Project = project(?config(priv_dir, Config), "from_checkout", [{deps, [?APP]}]),
    Checkout = filename:join([Project, "_checkouts", ?APP]),
    ok = filelib:ensure_dir(Checkout),
    ok = file:make_symlink(clone(Config), Checkout),
    ?assertMatch({0, _}, run(Project, ?config(precompiled, Config), "rebar3 compile")),
    works_in(Project).

%% Neither installs half a library, nor fails because of the other's.
two_builds_at_once(Config) ->
    Project = clone(Config),
    Env = ?config(precompiled, Config),
    Builds = [spawn_monitor(fun() -> exit(run(Project, Env, "sh native/nif.sh")) end) || _ <- lists:seq(1, 8)],
    [receive {'DOWN', Monitor, process, Pid, Ended} -> ?assertMatch({0, _}, Ended) end || {Pid, Monitor} <- Builds],
    ?assertEqual(["macula_peer_nif.so"], filelib:wildcard("{*,.m*}", filename:join(Project, "priv"))),
    ?assertEqual(?config(nif_sum, Config), sha256(filename:join(Project, ?NIF))).

%% ---- projects ----

%% A new application that starts ours.
project(Dir, Name, RebarConfig) ->
    {0, _} = run(Dir, [], ["rebar3 new app ", Name]),
    Project = filename:join(Dir, Name),
    ok = file:write_file(filename:join(Project, "rebar.config"), [io_lib:format("~tp.~n", [Term]) || Term <- RebarConfig]),
    AppSrc = filename:join([Project, "src", Name ++ ".app.src"]),
    {ok, [{application, App, Keys}]} = file:consult(AppSrc),
    Started = lists:keyreplace(applications, 1, Keys, {applications, [kernel, stdlib, ?APP]}),
    ok = file:write_file(AppSrc, io_lib:format("~tp.~n", [{application, App, Started}])),
    Project.

works_in(Project) ->
    Paths = filelib:wildcard(filename:join(Project, "_build/default/{lib,checkouts}/*/ebin")),
    works(Paths),
    Node = macula_peer_test:start_node(Paths),
    {ok, Started} = macula_peer_test:call(Node, application, ensure_all_started, [list_to_atom(filename:basename(Project))]),
    ?assert(lists:member(?APP, Started)),
    Priv = macula_peer_test:call(Node, code, priv_dir, [?APP]),
    ?assert(filelib:is_regular(filename:join(filename:dirname(Priv), "ebin/macula_peer_connector.appup"))),
    ?assertMatch({_, [_ | _]}, {Priv, string:find(Priv, filename:basename(Project))}),
    ?assert(filelib:is_regular(filename:join(filename:dirname(Priv), "doc/chunks/macula_peer_node.chunk"))),
    macula_peer_test:stop_node(Node).

%% What is committed, in a directory of its own.
clone(Config) ->
    Dir = filename:join(?config(priv_dir, Config), "clone" ++ integer_to_list(erlang:unique_integer([positive]))),
    {0, _} = run(root(), [], ["git clone --quiet . ", Dir]),
    Dir.

%% A node of its own encodes with the library that was installed, and sends with it.
works(Paths) ->
    Node = macula_peer_test:start_node(Paths),
    {ok, Frame} = macula_peer_test:call(Node, macula_peer_wire, encode, [ping, #{timestamp => 1}]),
    ?assertMatch({ok, {ping, #{<<"timestamp">> := 1}}}, macula_peer_test:call(Node, macula_peer_wire, decode, [Frame])),
    Closed = macula_peer_test:endpoint(macula_peer_test:closed_port()),
    ?assertEqual({error, {connect_failed, transport_down}},
                 macula_peer_test:call(Node, ?APP, send_message, [Closed, store, #{}])),
    macula_peer_test:stop_node(Node).

sha256(File) ->
    {ok, Content} = file:read_file(File),
    string:lowercase(binary_to_list(binary:encode_hex(crypto:hash(sha256, Content)))).

%% Runs a command, and returns its status and what it said.
run(Dir, Env, Command) ->
    Port = open_port({spawn_executable, "/bin/sh"},
                     [{args, ["-c", lists:flatten(Command)]}, {cd, Dir}, {env, clean(Env)}, exit_status, stderr_to_stdout,
                      hide, binary]),
    {Status, Said} = output(Port, []),
    ct:log("~ts$ ~ts ~p~n~ts~n=> ~p", [Dir, Command, Env, Said, Status]),
    {Status, Said}.

%% What this run of rebar3 and its caller have set is not for another one.
clean(Env) ->
    Set = [{Name, false} || Name <- ["REBAR_PROFILE", "ERL_LIBS", "ERL_FLAGS", "MACULA_PEER_NIF_DIR", "MACULA_PEER_NIF_SHA256",
                                     "MACULA_PEER_NIF_TARGET", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN",
                                     "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "ERL_COMPILER_OPTIONS", "http_proxy", "https_proxy", "MAKEFLAGS", "MAKELEVEL"]],
    lists:ukeymerge(1, lists:ukeysort(1, Env), lists:ukeysort(1, Set)).

output(Port, Said) ->
    receive
        {Port, {data, Data}} -> output(Port, [Said | Data]);
        {Port, {exit_status, Status}} -> {Status, unicode:characters_to_list(iolist_to_binary(Said))}
    end.
