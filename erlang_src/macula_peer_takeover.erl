%% @private
%% @doc Which modules are in force, where macula brings modules of the same names: what is loaded, and putting ours in the
%% place of others where the settings ask for it.
-module(macula_peer_takeover).

-include("macula_peer_log.hrl").

-export([apply_settings/0]).
-export([is_wanted/0]).
-export([restore/0]).
-export([which/0]).

-export_type([found/0]).

-define(APP, macula_peer_connector).

-type found() :: #{module := ours | other | mock | none, file := file:filename() | cover_compiled | preloaded | none,
                   loaded := boolean()}.

%% @doc Puts our modules in the place of others where `takeover' and `takeover_pool' say so, and logs what is in force.
-spec apply_settings() -> ok | {error, macula_peer_error:takeover()}.
apply_settings() ->
    case take_over(modules()) of
        ok ->
            log(which());
        {error, Reason} = Error ->
            ?LOG_ERROR("~s: ~ts", [?APP, explain(Reason)], ?DOMAIN),
            Error
    end.

%% @doc Whether a setting asks for our modules.
-spec is_wanted() -> boolean().
is_wanted() ->
    lists:any(fun({_, Setting}) -> is_set(Setting) end, modules()).

%% @doc Puts our modules back where the settings ask for them and something else has been loaded since. Returns the modules, each
%% with `ok' or the error.
-spec restore() -> [{module(), ok | {error, macula_peer_error:takeover()}}].
restore() ->
    [{Module, Restored} || {Module, Setting} <- modules(), is_set(Setting), Restored <- restored(Module, Setting)].

-spec restored(module(), atom()) -> [ok | {error, macula_peer_error:takeover()}].
restored(Module, Setting) ->
    try is_lost(find(Module)) of
        true -> [take_over([{Module, Setting}])];
        false -> []
    catch
        %% It was unloaded while it was looked at. The next look finds what is there then.
        error:undef -> [];
        error:Reason -> [{error, {takeover_failed, Module, Reason}}]
    end.

-spec is_lost(found()) -> boolean().
is_lost(#{module := Whose}) -> Whose =:= other.

%% @doc What is in force, by module. One that is not loaded yet is what the code path has.
-spec which() -> #{module() => found()}.
which() ->
    maps:from_list([{Module, find(Module)} || {Module, _} <- modules()]).

%% With the setting that says whether ours takes the place of another.
-spec modules() -> [{module(), atom()}].
modules() ->
    [{macula_peer_connector, takeover}, {macula_peer_connection_pool, takeover_pool}].

-spec is_set(atom()) -> boolean().
is_set(Setting) ->
    application:get_env(?APP, Setting, false).

-spec take_over([{module(), atom()}]) -> ok | {error, macula_peer_error:takeover()}.
take_over([]) ->
    ok;
take_over([{Module, Setting} | Rest]) ->
    ok = put_in_front(),
    Taken = case {is_set(Setting), find(Module)} of
        {true, #{module := ours, loaded := true}} -> ok;
        %% A mock was made on purpose.
        {true, #{module := mock}} -> ok;
        {true, _} -> load(Module);
        {false, _} -> ok
    end,
    case Taken of
        ok -> take_over(Rest);
        {error, _} -> Taken
    end.

%% After a module is unloaded, as mocking does, the first one in the code path is loaded next. Our modules are all in one
%% directory, so it goes to the front only where both are wanted.
-spec put_in_front() -> ok.
put_in_front() ->
    Ebin = filename:dirname(own_file(?MODULE)),
    case lists:all(fun({_, Setting}) -> is_set(Setting) end, modules()) andalso code:add_patha(Ebin) of
        {error, bad_directory} -> ?LOG_WARNING("~s: the code path does not take ~ts, which is not a directory", [?APP, Ebin], ?DOMAIN);
        _ -> ok
    end.

%% The code server kills processes that run old code, so there must be none. Those that run the current code go on with
%% it.
-spec load(module()) -> ok | {error, macula_peer_error:takeover()}.
load(Module) ->
    File = own_file(Module),
    case {erl_prim_loader:get_file(File), code:soft_purge(Module)} of
        {error, _} ->
            {error, {takeover_failed, Module, {not_found, File}}};
        {_, false} ->
            {error, {takeover_failed, Module, old_code_in_use}};
        {{ok, Binary, _}, true} ->
            case load_without_version(Module, File, Binary) of
                {module, Module} -> ok;
                {error, What} -> {error, {takeover_failed, Module, What}}
            end
    end.

%% rebar3 reloads a module whose attribute `vsn' differs from that of the first file in the code path. It leaves a
%% module without the attribute.
-spec load_without_version(module(), file:filename(), binary()) -> {module, module()} | {error, code:load_error_rsn() | beam_lib:chnk_rsn()}.
load_without_version(Module, File, Binary) ->
    case beam_lib:all_chunks(Binary) of
        {ok, _, Chunks} ->
            {ok, Without} = beam_lib:build_module([without_version_in(Chunk) || Chunk <- Chunks]),
            code:load_binary(Module, File, Without);
        {error, beam_lib, Reason} ->
            {error, Reason}
    end.

-spec without_version_in({string(), binary()}) -> {string(), binary()}.
without_version_in({"Attr", Attributes}) ->
    {"Attr", term_to_binary(proplists:delete(vsn, binary_to_term(Attributes)))};
without_version_in(Chunk) ->
    Chunk.

-spec find(module()) -> found().
find(Module) ->
    case {erlang:module_loaded(Module), code:get_mode()} of
        {true, _} ->
            #{module => whose_is_loaded(Module, code:is_loaded(Module)), file => file(code:which(Module)), loaded => true};
        {false, interactive} ->
            found_in_path(code:which(Module));
        {false, embedded} ->
            found_in_path(non_existing)
    end.

-spec found_in_path(file:filename() | atom()) -> found().
found_in_path(File) when is_list(File), File =/= [] ->
    #{module => whose(is_ours_file(File)), file => File, loaded => false};
found_in_path(_) ->
    #{module => none, file => none, loaded => false}.

-spec file(file:filename() | atom()) -> file:filename() | cover_compiled | preloaded | none.
file(File) when is_list(File), File =/= [] -> File;
file(How) when How =:= cover_compiled; How =:= preloaded -> How;
file(_) -> none.

%% A mock is made in memory and belongs to no file.
-spec whose_is_loaded(module(), {file, file:filename() | atom()} | false) -> ours | other | mock.
whose_is_loaded(_Module, {file, ""}) -> mock;
whose_is_loaded(Module, _) -> whose(is_ours_loaded(Module)).

-spec whose(boolean()) -> ours | other.
whose(true) -> ours;
whose(false) -> other.

%% Ours has an attribute, also when it is compiled for coverage. A release that is stripped has no attributes; the code is
%% then that of our file.
-spec is_ours_loaded(module()) -> boolean().
is_ours_loaded(Module) ->
    is_marked(Module:module_info(attributes)) orelse is_code_of(Module:module_info(md5), own_file(Module)).

-spec is_ours_file(file:filename()) -> boolean().
is_ours_file(File) ->
    Module = list_to_existing_atom(filename:basename(File, ".beam")),
    case erl_prim_loader:get_file(File) of
        {ok, Binary, _} ->
            case beam_lib:chunks(Binary, [attributes]) of
                {ok, {_, [{attributes, Attributes}]}} -> is_marked(Attributes) orelse is_own_code(Binary, Module);
                {error, beam_lib, _} -> is_own_code(Binary, Module)
            end;
        error ->
            false
    end.

-spec is_own_code(binary(), module()) -> boolean().
is_own_code(Binary, Module) ->
    {ok, {_, Md5}} = beam_lib:md5(Binary),
    is_code_of(Md5, own_file(Module)).

-spec is_code_of(binary() | undefined, file:filename()) -> boolean().
is_code_of(Md5, File) ->
    case erl_prim_loader:get_file(File) of
        {ok, Binary, _} -> beam_lib:md5(Binary) =:= {ok, {list_to_existing_atom(filename:basename(File, ".beam")), Md5}};
        error -> false
    end.

-spec is_marked([{atom(), term()}]) -> boolean().
is_marked(Attributes) ->
    lists:member({application, [?APP]}, Attributes).

%% Beside this module, unless that was compiled for coverage.
-spec own_file(module()) -> file:filename().
own_file(Module) ->
    Ebin = case {code:which(?MODULE), code:lib_dir(?APP)} of
        {File, _} when is_list(File), File =/= [] -> filename:dirname(File);
        {_, Dir} when is_list(Dir) -> filename:join(Dir, "ebin");
        {_, {error, bad_name}} -> "."
    end,
    filename:join(Ebin, atom_to_list(Module) ++ ".beam").

-spec log(#{module() => found()}) -> ok.
log(#{macula_peer_connector := #{module := Whose} = Connector, macula_peer_connection_pool := Pool}) ->
    Text = io_lib:format("module macula_peer_connector: ~ts, macula_peer_connection_pool: ~ts",
                         [describe(Connector), describe(Pool)]),
    case Whose of
        ours ->
            ?LOG_NOTICE("~s is in force: ~ts", [?APP, Text], ?DOMAIN);
        mock ->
            ?LOG_NOTICE("~s is mocked and stays so: ~ts", [?APP, Text], ?DOMAIN);
        _ ->
            ?LOG_WARNING("~s is NOT in force: ~ts. Calls do not come here. Set {takeover, true}, or leave the other module "
                         "out of the release; docs/drop-in.md says how", [?APP, Text], ?DOMAIN)
    end.

-spec describe(found()) -> iolist().
describe(#{module := none}) -> "none";
describe(#{module := Whose, file := File}) -> io_lib:format("~s (~ts)", [Whose, [File || is_list(File)]]).

-spec explain(term()) -> iolist().
explain({takeover_failed, Module, old_code_in_use}) ->
    io_lib:format("cannot take the place of ~s: processes still run code of it that was replaced before, and would be killed. "
                  "Start ~s before macula, or restart the node", [Module, ?APP]);
explain({takeover_failed, Module, {not_found, File}}) ->
    io_lib:format("cannot take the place of ~s: there is no ~ts. It may have been left out of the release; then leave "
                  "out the module of macula instead", [Module, File]);
explain({takeover_failed, Module, What}) ->
    io_lib:format("cannot take the place of ~s: ~p", [Module, What]).
