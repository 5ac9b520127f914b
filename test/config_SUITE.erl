%% A setting or an environment variable with a wrong value is named, and nothing starts.
-module(config_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(APP, macula_peer_connector).
-define(VARIABLES, ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED", "MACULA_NAT_RELAY_MAX_SESSIONS",
                    "MACULA_NAT_RELAY_BANDWIDTH", "MACULA_NAT_ENABLED", "MACULA_NAT_PUNCH_ENABLED", "MACULA_QUIC_PORT",
                    "MACULA_BOOTSTRAP_PEERS"]).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [a_wrong_value_stops_the_start_and_is_named, every_setting_has_wrong_values, an_unknown_setting_is_named,
     a_wrong_secret_is_not_shown, the_sentence_in_the_log_names_setting_and_value, right_values_start,
     an_application_file_is_enough, a_wrong_variable_stops_the_start_and_is_named, hole_punching_is_turned_off,
     a_node_that_listens_is_a_relay, the_settings_win_over_variables, listen_options_are_checked,
     the_gateways_port, bootstrap_peers].

init_per_testcase(_Case, Config) ->
    ok = macula_peer_endpoint:stop(),
    [true = os:unsetenv(Name) || Name <- ?VARIABLES],
    ok = settings([]),
    Config.

end_per_testcase(Case, Config) ->
    _ = application:stop(?APP),
    _ = init_per_testcase(Case, Config),
    ?assertEqual([], macula_peer_test:mailbox()).

%% ---- settings ----

a_wrong_value_stops_the_start_and_is_named(_Config) ->
    [is_refused({invalid_option, Setting}, [Setting]) || Setting <- wrong_settings()].

%% One that is forgotten here is noticed.
every_setting_has_wrong_values(_Config) ->
    Page = macula_peer_test:root() ++ "/README.md",
    {ok, Readme} = file:read_file(Page),
    [_, Rest] = string:split(Readme, "### Settings"),
    [Table, _] = string:split(Rest, "### Environment"),
    {match, Rows} = re:run(Table, "^\\| (`[^|]*) \\|", [global, multiline, {capture, [1], binary}]),
    Documented = [binary_to_atom(Key) || [Row] <- Rows, {match, Keys} <- [re:run(Row, "`([a-z_]+)`", [global, {capture, [1], binary}])],
                                         [Key] <- Keys],
    ?assertEqual(lists:sort(Documented), lists:usort([realm_secret | [Key || {Key, _} <- wrong_settings()]])).

wrong_settings() ->
    Hex = lists:duplicate(63, $0),
    [{ip, "127.0.0.1"}, {ip, {1, 2, 3}}, {ip, {256, 0, 0, 1}}, {port, -1}, {port, 65536}, {port, "9443"},
     {handler, none}, {handler, {m, f}}, {handler, {"m", f, []}}, {handler, registered_name},
     {max_frame_size, 0}, {max_nesting, -1}, {node_id, <<>>}, {node_id, "name"}, {node_id, <<0:(256 * 8)>>},
     {relays, "127.0.0.1:9443"}, {relays, ["127.0.0.1"]}, {relays, ["r:1" | "r:2"]},
     {relays, ["r:" ++ integer_to_list(N) || N <- lists:seq(1, 65)]}, {hole_punching, true},
     {takeover, yes}, {takeover_pool, 1}, {gateway, 9443}, {gateway, {auto, "127.0.0.1:1"}}, {listen, true},
     {resolver, 1}, {resolver, "none"}, {resolver, no_such_module}, {resolver, lists},
     {pool_size, 0}, {idle_timeout, 0}, {idle_timeout, infinity}, {keep_alive, 86400001}, {connect_timeout, 1.5},
     {delivery, exactly_once}, {max_unacknowledged, many}, {answer_timeout, -1}, {workers, 0},
     {identity_file, none}, {identity_file, 1}, {verify, always}, {verify, {pin, [Hex]}}, {verify, {cacertfile, 1}},
     {max_accepted, 0}, {max_streams, 1 bsl 32}, {frame_timeout, <<"1">>}].

an_unknown_setting_is_named(_Config) ->
    [is_refused({unknown_option, Key}, [{Key, Value}, {port, 0}])
     || {Key, Value} <- [{idle_timout, 1000}, {realm_secrt, <<"secret">>}, {'Port', 1}]].

a_wrong_secret_is_not_shown(_Config) ->
    is_refused({invalid_option, {realm_secret, hidden}}, [{realm_secret, "secret"}]).

the_sentence_in_the_log_names_setting_and_value(_Config) ->
    Sentences = [{[{port, 99999}], "the setting port has the wrong value 99999; it takes a UDP port from 0 to 65535"},
                 {[{prot, 1}], "there is no setting prot"}],
    [?assertEqual(["macula_peer_connector does not start: " ++ Sentence], logged(fun() -> start(Settings) end))
     || {Settings, Sentence} <- Sentences],
    true = os:putenv("MACULA_QUIC_PORT", "9443/udp"),
    Sentence = "the environment variable MACULA_QUIC_PORT has the wrong value \"9443/udp\"; it takes a port from 1 to 65535",
    ?assertEqual(["macula_peer_connector does not start: " ++ Sentence], logged(fun() -> start([]) end)).

right_values_start(_Config) ->
    Relays = [lists:concat(["127.0.0.1:", N]) || N <- lists:seq(1, 64)],
    [begin
         ok = settings([Setting]),
         ?assertEqual({Setting, ok}, {Setting, application:start(?APP)}),
         ok = application:stop(?APP)
     end || Setting <- [{handler, self()}, {handler, {erlang, display, []}}, {handler, undefined}, {resolver, none},
                        {resolver, macula_peer_resolver_macula}, {relays, Relays}, {hole_punching, plain},
                        {verify, {pin, [<<0:256>>]}}, {ip, {127, 0, 0, 1}}]].

%% Without the application, or its file, having been loaded, as at the first call of an escript.
an_application_file_is_enough(_Config) ->
    Node = macula_peer_test:start_node(),
    Call = fun(M, F, A) -> macula_peer_test:call(Node, M, F, A) end,
    ?assertEqual(undefined, Call(application, get_key, [?APP, vsn])),
    ok = Call(application, set_env, [?APP, port, wrong]),
    ?assertEqual({error, {invalid_option, {port, wrong}}}, Call(macula_peer_endpoint, start, [])),
    macula_peer_test:stop_node(Node).

%% ---- variables ----

a_wrong_variable_stops_the_start_and_is_named(_Config) ->
    Booleans = [{Name, Value} || Name <- ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED", "MACULA_NAT_ENABLED",
                                          "MACULA_NAT_PUNCH_ENABLED"],
                                 Value <- ["yes", "2", "true,false"]],
    Numbers = [{Name, Value} || Name <- ["MACULA_NAT_RELAY_MAX_SESSIONS", "MACULA_NAT_RELAY_BANDWIDTH", "MACULA_QUIC_PORT"],
                                Value <- ["0", "-1", "many", "1.5", "1e6", "100 kB"]],
    [with_variable(Name, Value, fun() -> is_refused({invalid_variable, {Name, Value}}, []) end)
     || {Name, Value} <- [{"MACULA_QUIC_PORT", "65536"} | Booleans ++ Numbers]],
    %% Nothing is the same as none.
    [with_variable(Name, "", fun() -> ?assertEqual({Name, ok}, {Name, start([])}) end) || Name <- ?VARIABLES].

hole_punching_is_turned_off(_Config) ->
    [with_variable(Name, Value, fun() -> ?assertEqual({Name, Value, Expected}, {Name, Value, hole_punching()}) end)
     || Name <- ["MACULA_NAT_ENABLED", "MACULA_NAT_PUNCH_ENABLED"],
        {Value, Expected} <- [{"false", off}, {"0", off}, {"FALSE", off}, {"true", default}, {"1", default}, {"", default}]].

a_node_that_listens_is_a_relay(_Config) ->
    Relay = fun() -> {ok, Opts} = macula_peer_config:listen_options(#{port => 1}), maps:get(relay, Opts, none) end,
    ?assertEqual(none, Relay()),
    [with_variable(Name, Value, fun() -> ?assertEqual({Name, Expected}, {Name, Relay()}) end)
     || Name <- ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED"], {Value, Expected} <- [{"true", #{}}, {"1", #{}}, {"false", none}]],
    true = os:putenv("RELAY_ENABLED", "true"),
    true = os:putenv("MACULA_NAT_RELAY_MAX_SESSIONS", "7"),
    ?assertEqual(#{max_sessions => 7}, Relay()),
    true = os:putenv("MACULA_NAT_RELAY_BANDWIDTH", "1000"),
    ?assertEqual(#{max_sessions => 7, bandwidth => 1000}, Relay()),
    {ok, Opts} = macula_peer_config:listen_options(#{}),
    ?assertMatch({ok, _}, macula_peer_endpoint:listen(Opts)),
    ?assertMatch(#{relay := #{circuits := 0}}, macula_peer_endpoint:stats()),
    %% One of them says no.
    true = os:putenv("MACULA_NAT_RELAY_ENABLED", "false"),
    ?assertEqual(none, Relay()).

the_settings_win_over_variables(_Config) ->
    [true = os:putenv(Name, Value) || {Name, Value} <- [{"MACULA_NAT_PUNCH_ENABLED", "false"}, {"RELAY_ENABLED", "false"},
                                                        {"MACULA_NAT_RELAY_MAX_SESSIONS", "7"},
                                                        {"MACULA_NAT_RELAY_BANDWIDTH", "1000"}]],
    ok = settings([{hole_punching, plain}]),
    ?assertEqual(plain, hole_punching()),
    ?assertEqual({ok, #{relay => #{max_sessions => 9, bandwidth => 1000}}},
                 macula_peer_config:listen_options(#{relay => #{max_sessions => 9}})).

listen_options_are_checked(_Config) ->
    [?assertEqual({error, {invalid_option, Wrong}}, macula_peer_config:listen_options(Opts))
     || {Opts, Wrong} <- [{#{port => 65536}, {port, 65536}}, {#{handler => 1}, {handler, 1}}, {#{no_option => 1}, {no_option, 1}},
                          {#{relay => #{bandwidth => 0}}, {bandwidth, 0}}, {true, {listen, true}},
                          {#{relay => #{realm_secret => "secret"}}, {realm_secret, hidden}}]],
    true = os:putenv("RELAY_ENABLED", "perhaps"),
    ?assertEqual({error, {invalid_variable, {"RELAY_ENABLED", "perhaps"}}}, macula_peer_config:listen_options(#{})).

the_gateways_port(_Config) ->
    ?assertEqual(9443, macula_peer_config:gateway_port()),
    with_variable("MACULA_QUIC_PORT", "4433", fun() -> ?assertEqual(4433, macula_peer_config:gateway_port()) end).

%% They do not stop the start: calls that need them say what is wrong, as in macula.
bootstrap_peers(_Config) ->
    [with_variable("MACULA_BOOTSTRAP_PEERS", Value, fun() ->
         ?assertEqual(Expected, macula_peer_config:bootstrap_peers()),
         ?assertEqual(ok, start([]))
     end) || {Value, Expected} <- [{"", {[], no_bootstrap_peers}}, {"host", {[], invalid_bootstrap_format}},
                                   {"a:1, https://b:2", {["a:1", "https://b:2"], no_bootstrap_peers}}]].

%% ----

%% By the application, and by the first call.
is_refused(Reason, Settings) ->
    ?assertEqual({Settings, {error, Reason}}, {Settings, start(Settings)}),
    ?assertEqual(not_started, macula_peer_nif:stats()),
    [?assertEqual({error, Reason}, Result)
     || Result <- [macula_peer_endpoint:start(), macula_peer_connector:send_message("127.0.0.1:9", cast, #{})]],
    ?assertEqual(not_started, macula_peer_nif:stats()).

%% Starts the application, and stops it if it did.
start(Settings) ->
    ok = settings(Settings),
    case application:start(?APP) of
        ok -> application:stop(?APP);
        {error, {{shutdown, {failed_to_start_child, macula_peer_engine, Reason}}, _}} -> {error, Reason}
    end.

settings(Settings) ->
    _ = application:load(?APP),
    [ok = application:unset_env(?APP, Key) || {Key, _} <- application:get_all_env(?APP)],
    [ok = application:set_env(?APP, Key, Value) || {Key, Value} <- Settings],
    ok.

hole_punching() ->
    {ok, #{native := Native}} = macula_peer_config:read(),
    maps:get(hole_punching, Native, default).

with_variable(Name, Value, Fun) ->
    true = os:putenv(Name, Value),
    Fun(),
    true = os:unsetenv(Name).

%% What is logged as an error by this application meanwhile.
logged(Fun) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{level => error, config => self()}),
    _ = Fun(),
    ok = logger:remove_handler(?MODULE),
    [Sentence || "macula_peer_connector" ++ _ = Sentence <- sentences()].

log(#{msg := {report, _}}, _Handler) -> ok;
log(#{msg := {Format, Args}}, #{config := To}) -> To ! {logged, lists:flatten(io_lib:format(Format, Args))}.

sentences() ->
    receive {logged, Sentence} -> [Sentence | sentences()] after 0 -> [] end.
