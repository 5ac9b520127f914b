%% What is known of nodes' keys lasts, and a node changes its key.
-module(known_keys_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_test, [call/4, endpoint/1]).
-import(macula_peer_relays, [start_member/2, settings/2, id/1, delivered/2]).

-define(APP, macula_peer_connector).
-define(UNTRUSTED, {error, {nat_connection_failed, {connect_failed, untrusted_peer}}}).
-define(REFUSED(Reason), {error, {start_failed, {known_keys_file, Reason}}}).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [a_name_stays_bound_to_its_key_after_a_restart_until_it_is_forgotten, a_node_changes_its_key,
     a_name_moves_to_the_key_that_a_call_names, errors_name_what_is_wrong_with_a_file].

init_per_testcase(Case, Config) ->
    Dir = filename:join(proplists:get_value(priv_dir, Config), atom_to_list(Case)),
    ok = filelib:ensure_dir(filename:join(Dir, "keys")),
    [{dir, Dir} | Config].

end_per_testcase(_Case, _Config) ->
    %% Without the settings of the case.
    ok = macula_peer_test:engine(#{}),
    macula_peer_node:stop().

a_name_stays_bound_to_its_key_after_a_restart_until_it_is_forgotten(Config) ->
    [{Right, At}, {Wrong, WrongAt}] = [listener(settings(target, [])) || _ <- [right, wrong]],
    Settings = #{known_keys_file => file(Config, "keys")},
    ok = macula_peer_test:engine(Settings),
    ?assertEqual(ok, send(1, #{endpoint => At})),
    _ = delivered(Right, 1),
    ok = macula_peer_test:engine(Settings),
    ?assertEqual(?UNTRUSTED, send(2, #{endpoint => WrongAt})),
    ?assertEqual(ok, send(3, #{endpoint => At})),
    _ = delivered(Right, 3),
    %% Also where no engine runs.
    ok = macula_peer_node:stop(),
    ?assertEqual(ok, macula_peer_node:forget(id(target))),
    ok = macula_peer_test:engine(Settings),
    ?assertEqual(ok, send(4, #{endpoint => WrongAt})),
    _ = delivered(Wrong, 4),
    %% In memory it lasts no longer than the engine.
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(ok, send(5, #{endpoint => At})),
    _ = delivered(Right, 5),
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(ok, send(6, #{endpoint => WrongAt})),
    _ = delivered(Wrong, 6),
    ?assertEqual({[1, 3, 5], [4, 6]}, {macula_peer_test:ids(Right), macula_peer_test:ids(Wrong)}).

a_node_changes_its_key(Config) ->
    [Old, New] = [file(Config, Name) || Name <- ["old.pem", "new.pem"]],
    Target = (settings(target, []))#{identity_file => Old},
    {Before, At} = listener(Target),
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(ok, send(1, #{endpoint => At})),
    _ = delivered(Before, 1),
    ok = call(Before, macula_peer_node, stop, []),
    macula_peer_test:until(fun() ->
        {ok, #{path := Path}} = macula_peer_node:path({node, id(target)}),
        Path =:= none
    end),
    {Alone, AloneAt} = listener(Target#{identity_file := New}),
    ?assertEqual(?UNTRUSTED, send(2, #{endpoint => AloneAt})),
    ?assertEqual([], macula_peer_test:ids(Alone)),
    macula_peer_test:kill_node(Alone),
    {After, AfterAt} = listener(Target#{identity_file := New, previous_identity_files => [Old]}),
    ?assertEqual(ok, send(3, #{endpoint => AfterAt})),
    _ = delivered(After, 3),
    ?assertEqual([3], macula_peer_test:ids(After)).

a_name_moves_to_the_key_that_a_call_names(_Config) ->
    [{Right, At}, {Wrong, WrongAt}] = [listener(settings(target, [])) || _ <- [right, wrong]],
    #{fingerprint := Key} = call(Right, macula_peer_node, identity, []),
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(ok, send(1, #{endpoint => WrongAt})),
    _ = delivered(Wrong, 1),
    %% The link to the wrong one lives, and is all that is known.
    ?assertEqual(?UNTRUSTED, send(2, #{fingerprint => Key})),
    ?assertEqual(ok, send(3, #{endpoint => At, fingerprint => Key})),
    _ = delivered(Right, 3),
    ?assertEqual(ok, send(4, #{})),
    _ = delivered(Right, 4),
    ?assertEqual([1], macula_peer_test:ids(Wrong)).

errors_name_what_is_wrong_with_a_file(Config) ->
    File = file(Config, "keys"),
    Settings = #{known_keys_file => File},
    ok = macula_peer_test:engine(Settings),
    Other = macula_peer_test:start_node(macula_peer_test:node_paths(), #{}),
    ?assertEqual(?REFUSED(in_use), start(Other, Settings)),
    ok = macula_peer_node:stop(),
    ?assertEqual(ok, start(Other, Settings)),
    ok = call(Other, macula_peer_node, stop, []),
    Key = binary:copy(<<"0">>, 64),
    [begin
         ok = file:write_file(File, Text),
         ok = file:change_mode(File, Mode),
         ?assertEqual({Text, Mode, ?REFUSED(Reason)}, {Text, Mode, start(Other, Settings)}),
         ?assertEqual({ok, iolist_to_binary(Text)}, file:read_file(File))
     end || {Text, Mode, Reason} <- [
        {"something else\n", 8#600, not_known_keys},
        {["macula-peer known keys 1\n61 ", Key, "\n61\n62 ", Key, "\n"], 8#600, {bad_line, 3}},
        {"macula-peer known keys 1\n", 8#620, insecure_permissions}]],
    ?assertEqual(?REFUSED(enoent), start(Other, #{known_keys_file => file(Config, "nowhere/keys")})),
    Missing = file(Config, "missing.pem"),
    ?assertEqual({error, {start_failed, {previous_identity_files, {unicode:characters_to_binary(Missing), enoent}}}},
                 start(Other, #{previous_identity_files => [Missing]})),
    [?assertEqual({error, {invalid_option, {Setting, Value}}}, start(Other, #{Setting => Value}))
     || {Setting, Value} <- [{known_keys_file, none}, {known_keys_file, 1}, {previous_identity_files, "old.pem"},
                             {previous_identity_files, [1]}, {previous_identity_files, lists:duplicate(5, "old.pem")}]],
    [?assertNotEqual(nomatch, string:find(macula_peer_config:format_error({start_failed, Why}), Word))
     || {Why, Word} <- [{{known_keys_file, in_use}, "another node"}, {{known_keys_file, {bad_line, 3}}, "damaged"},
                        {{known_keys_file, eacces}, "this user"},
                        {{previous_identity_files, {<<"old.pem">>, enoent}}, "old.pem"}]].

%% ---- common ----

listener(Settings) ->
    Node = start_member(here, Settings),
    {ok, {_, Port}} = call(Node, macula_peer_node, listen, [#{}]),
    {Node, endpoint(Port)}.

send(Id, Opts) ->
    macula_peer_connector:send_message_nat_aware(id(sender), id(target), store, #{id => Id}, Opts).

start(Node, Settings) ->
    call(Node, ?MODULE, start, [Settings]).

%% Runs in the node.
start(Settings) ->
    ok = macula_peer_node:stop(),
    _ = application:load(?APP),
    [ok = application:unset_env(?APP, Setting) || {Setting, _} <- application:get_all_env(?APP)],
    [ok = application:set_env(?APP, Setting, Value) || {Setting, Value} <- maps:to_list(Settings)],
    macula_peer_node:start().

file(Config, Name) ->
    filename:join(proplists:get_value(dir, Config), Name).
