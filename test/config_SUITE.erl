%% A setting or an environment variable with a wrong value is named, and nothing starts.
-module(config_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("stdlib/include/assert.hrl").

-define(APP, macula_peer_connector).
-define(VARIABLES, ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED", "MACULA_NAT_RELAY_MAX_SESSIONS",
                    "MACULA_NAT_RELAY_BANDWIDTH", "MACULA_NAT_ENABLED", "MACULA_NAT_PUNCH_ENABLED", "MACULA_QUIC_PORT",
                    "GATEWAY_PORT", "MACULA_BOOTSTRAP_PEERS", "MACULA_TLS_MODE", "MACULA_TLS_CACERTFILE",
                    "MACULA_TLS_VERIFY_HOSTNAME", "MACULA_TLS_CERTFILE", "MACULA_TLS_KEYFILE", "TLS_CERT_FILE",
                    "TLS_KEY_FILE"]).
-define(MACULA_KEYS, [quic_port, gateway_port, tls_mode, tls_cacertfile, tls_verify_hostname]).

suite() -> [{timetrap, {seconds, 60}}].

all() ->
    [a_wrong_value_stops_the_start_and_is_named, every_setting_has_a_type_and_wrong_values, an_unknown_setting_is_named,
     a_wrong_secret_is_not_shown, there_is_memory_for_the_largest_frame, the_sentence_in_the_log_names_setting_and_value, right_values_start,
     an_application_file_is_enough, a_wrong_variable_stops_the_start_and_is_named, hole_punching_is_turned_off,
     a_node_that_listens_is_a_relay, the_settings_win_over_variables, the_options_of_listen_are_checked,
     bootstrap_peers, the_gateway_is_where_macula_puts_it, variables_that_macula_does_not_read_are_not_checked,
     a_service_link_is_explained, production_means_verified_by_authorities, production_without_authorities_stops_the_start,
     a_setting_wins_over_production, variables_that_mean_nothing_here_are_named].

init_per_testcase(_Case, Config) ->
    ok = macula_peer_node:stop(),
    [true = os:unsetenv(Name) || Name <- ?VARIABLES],
    [ok = application:unset_env(macula, Key) || Key <- ?MACULA_KEYS],
    ok = settings([]),
    Config.

end_per_testcase(Case, Config) ->
    _ = application:stop(?APP),
    _ = init_per_testcase(Case, Config),
    ?assertEqual([], macula_peer_test:mailbox()).

%% ---- settings ----

a_wrong_value_stops_the_start_and_is_named(_Config) ->
    [is_refused({invalid_option, Setting}, [Setting]) || Setting <- wrong_settings()].

%% A setting that is missing in the type, or in these tests, is noticed.
every_setting_has_a_type_and_wrong_values(_Config) ->
    Documented = documented(),
    ?assertEqual(Documented, typed()),
    ?assertEqual(Documented, lists:usort([realm_secret | [Key || {Key, _} <- wrong_settings()]])).

documented() ->
    {ok, Table} = file:read_file(macula_peer_test:root() ++ "/docs/settings.md"),
    {match, Rows} = re:run(Table, "^\\| (`[^|]*) \\|", [global, multiline, {capture, [1], binary}]),
    Keys = [Keys || [Row] <- Rows, {match, Keys} <- [re:run(Row, "`([a-z_]+)`", [global, {capture, [1], binary}])]],
    lists:sort([binary_to_atom(Key) || [Key] <- lists:append(Keys)]).

%% The keys of the type `macula_peer_node:settings()'.
typed() ->
    {ok, {_, [{abstract_code, {_, Forms}}]}} = beam_lib:chunks(code:which(macula_peer_node), [abstract_code]),
    [Fields] = [Fields || {attribute, _, type, {settings, {type, _, map, Fields}, []}} <- Forms],
    lists:sort([Key || {type, _, map_field_assoc, [{atom, _, Key}, _]} <- Fields]).

wrong_settings() ->
    Hex = lists:duplicate(63, $0),
    [{ip, "127.0.0.1"}, {ip, {1, 2, 3}}, {ip, {256, 0, 0, 1}}, {port, -1}, {port, 65536}, {port, "9443"},
     {handler, none}, {handler, {m, f}}, {handler, {"m", f, []}}, {handler, registered_name},
     {max_frame_size, 0}, {max_nesting, -1}, {max_terms, 0}, {node_id, <<>>}, {node_id, "name"}, {node_id, <<0:(256 * 8)>>},
     {relays, "127.0.0.1:9443"}, {relays, ["127.0.0.1"]}, {relays, ["r:1" | "r:2"]},
     {relays, ["r:" ++ integer_to_list(N) || N <- lists:seq(1, 65)]}, {hole_punching, true},
     {gateway, 9443}, {gateway, "127.0.0.1"}, {gateway, {auto, "127.0.0.1:9443"}}, {listen, true}, {listen, [{port, 0}]},
     {takeover, yes}, {takeover_pool, 1}, {resolver, 1}, {resolver, "none"}, {resolver, no_such_module}, {resolver, lists},
     {pool_size, 0}, {idle_timeout, 0}, {idle_timeout, infinity}, {keep_alive, 86400001}, {connect_timeout, 1.5},
     {delivery, exactly_once}, {max_unacknowledged, many}, {answer_timeout, -1}, {workers, 0},
     {identity_file, none}, {identity_file, 1}, {known_keys_file, none}, {known_keys_file, 1},
     {previous_identity_files, "old.pem"}, {previous_identity_files, [1]}, {previous_identity_files, lists:duplicate(5, "old.pem")},
     {verify, always}, {verify, {pin, [Hex]}}, {verify, {cacertfile, 1}},
     {verify, {cacertfile, "ca.pem", some_names}},
     {access, []}, {access, #{refuse => #{}}}, {access, #{deny => []}}, {access, #{allow => #{keys => [<<"key">>]}}},
     {max_accepted, 0}, {max_streams, 1 bsl 32}, {frame_timeout, <<"1">>}
     | [{Key, Most + 1} || {Key, Most} <- largest()] ++ [{Key, Least - 1} || {Key, Least} <- smallest()]].

%% Beyond these a setting could not be safe.
largest() ->
    [{max_frame_size, 1 bsl 30}, {max_nesting, 512}, {max_terms, 10000000}, {pool_size, 1000000}, {workers, 256}, {max_accepted, 1000000},
     {max_streams, 4096}, {max_known_sessions, 1000000}, {max_known_requests, 1000000}, {frame_memory, 16 bsl 30},
     {keep_alive, 86400000}].

%% Below these one key's share would be too small.
smallest() ->
    [{max_known_sessions, 1024}, {max_known_requests, 1024}, {frame_memory, 64 bsl 20}].

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
                        {verify, {pin, [<<0:256>>]}}, {verify, first_seen}, {ip, {127, 0, 0, 1}} | largest() ++ smallest()]].

%% In whichever order the two are set.
there_is_memory_for_the_largest_frame(_Config) ->
    [begin
         ?assertEqual(ok, start([{max_frame_size, Largest}, {frame_memory, 4 * Largest}])),
         is_refused({invalid_option, {frame_memory, 4 * Largest - 1}}, [{max_frame_size, Largest}, {frame_memory, 4 * Largest - 1}])
     end || Largest <- [1, 1000, 1 bsl 30]].

%% Without the application, or its file, having been loaded, as at the first call of an escript.
an_application_file_is_enough(_Config) ->
    Node = macula_peer_test:start_node(),
    Call = fun(M, F, A) -> macula_peer_test:call(Node, M, F, A) end,
    ?assertEqual(undefined, Call(application, get_key, [?APP, vsn])),
    ok = Call(application, set_env, [?APP, port, wrong]),
    ?assertEqual({error, {invalid_option, {port, wrong}}}, Call(macula_peer_node, start, [])),
    macula_peer_test:stop_node(Node).

%% ---- variables ----

a_wrong_variable_stops_the_start_and_is_named(_Config) ->
    Booleans = [{Name, Value} || Name <- ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED", "MACULA_NAT_ENABLED",
                                          "MACULA_NAT_PUNCH_ENABLED"],
                                 Value <- ["yes", "2", "true,false"]],
    Numbers = [{Name, Value} || Name <- ["MACULA_NAT_RELAY_MAX_SESSIONS", "MACULA_NAT_RELAY_BANDWIDTH", "MACULA_QUIC_PORT"],
                                Value <- ["0", "-1", "many", "1.5", "1e6", "100 kB"]],
    Others = [{"MACULA_QUIC_PORT", "65536"}, {"GATEWAY_PORT", "gateway"}, {"MACULA_TLS_MODE", "strict"},
              {"MACULA_TLS_VERIFY_HOSTNAME", "no"}],
    [with_variable(Name, Value, fun() -> is_refused({invalid_variable, {Name, Value}}, []) end)
     || {Name, Value} <- Others ++ Booleans ++ Numbers],
    %% Nothing is the same as none.
    [with_variable(Name, "", fun() -> ?assertEqual({Name, ok}, {Name, start([])}) end) || Name <- ?VARIABLES].

hole_punching_is_turned_off(_Config) ->
    [with_variable(Name, Value, fun() -> ?assertEqual({Name, Value, Expected}, {Name, Value, hole_punching()}) end)
     || Name <- ["MACULA_NAT_ENABLED", "MACULA_NAT_PUNCH_ENABLED"],
        {Value, Expected} <- [{"false", off}, {"0", off}, {"FALSE", off}, {"true", default}, {"1", default}, {"", default}]].

a_node_that_listens_is_a_relay(_Config) ->
    ok = settings([{listen, #{port => 1}}]),
    Relay = fun() -> maps:get(relay, listens_with(), none) end,
    ?assertEqual(none, Relay()),
    [with_variable(Name, Value, fun() -> ?assertEqual({Name, Expected}, {Name, Relay()}) end)
     || Name <- ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED"], {Value, Expected} <- [{"true", #{}}, {"1", #{}}, {"false", none}]],
    true = os:putenv("RELAY_ENABLED", "true"),
    true = os:putenv("MACULA_NAT_RELAY_MAX_SESSIONS", "7"),
    ?assertEqual(#{max_sessions => 7}, Relay()),
    true = os:putenv("MACULA_NAT_RELAY_BANDWIDTH", "1000"),
    ?assertEqual(#{max_sessions => 7, bandwidth => 1000}, Relay()),
    ok = settings([{listen, #{}}]),
    ok = macula_peer_node:start(),
    ?assertMatch(#{relay := #{circuits := 0}}, macula_peer_node:stats()),
    %% One of them says no.
    true = os:putenv("MACULA_NAT_RELAY_ENABLED", "false"),
    ?assertEqual(none, Relay()).

the_settings_win_over_variables(_Config) ->
    [true = os:putenv(Name, Value) || {Name, Value} <- [{"MACULA_NAT_PUNCH_ENABLED", "false"}, {"RELAY_ENABLED", "false"},
                                                        {"MACULA_NAT_RELAY_MAX_SESSIONS", "7"},
                                                        {"MACULA_NAT_RELAY_BANDWIDTH", "1000"}]],
    ok = settings([{hole_punching, plain}, {listen, #{relay => #{max_sessions => 9}}}]),
    ?assertEqual(plain, hole_punching()),
    ?assertEqual(#{relay => #{max_sessions => 9, bandwidth => 1000}}, listens_with()).

the_options_of_listen_are_checked(_Config) ->
    [is_refused({invalid_option, {listen, Wrong}}, [{listen, Opts}])
     || {Opts, Wrong} <- [{#{port => 65536}, {port, 65536}}, {#{handler => self()}, {handler, self()}},
                          {#{no_option => 1}, {no_option, 1}}, {#{relay => #{bandwidth => 0}}, {bandwidth, 0}},
                          {#{relay => #{realm_secret => "secret"}}, {realm_secret, hidden}}]].

%% They do not stop the start: calls that need them say what is wrong, as in macula.
bootstrap_peers(_Config) ->
    [with_variable("MACULA_BOOTSTRAP_PEERS", Value, fun() ->
         ?assertEqual(Expected, macula_peer_config:bootstrap_peers()),
         ?assertEqual(ok, start([]))
     end) || {Value, Expected} <- [{"", {[], no_bootstrap_peers}}, {"host", {[], invalid_bootstrap_format}},
                                   {"a:1, https://b:2", {["a:1", "https://b:2"], no_bootstrap_peers}}]].

%% ---- macula's gateway ----

%% The first of these that is there, as in macula.
the_gateway_is_where_macula_puts_it(_Config) ->
    Where = fun() -> {ok, #{native := #{gateway := {auto, Endpoint}}}} = macula_peer_config:read(), Endpoint end,
    ?assertEqual("127.0.0.1:9443", Where()),
    [begin
         ok = Set(Port),
         ?assertEqual("127.0.0.1:" ++ integer_to_list(Port), Where())
     end || {Set, Port} <- [{fun(P) -> application:set_env(macula, gateway_port, P) end, 4431},
                            {fun(P) -> application:set_env(macula, quic_port, P) end, 4432},
                            {fun(P) -> put_variable("GATEWAY_PORT", integer_to_list(P)) end, 4433},
                            {fun(P) -> put_variable("MACULA_QUIC_PORT", integer_to_list(P)) end, 4434}]],
    ok = settings([{gateway, "127.0.0.1:4435"}]),
    ?assertMatch({ok, #{native := #{gateway := "127.0.0.1:4435"}}}, macula_peer_config:read()).

variables_that_macula_does_not_read_are_not_checked(_Config) ->
    ok = application:set_env(macula, quic_port, "4433"),
    is_refused({invalid_option, {{macula, quic_port}, "4433"}}, []),
    ok = put_variable("GATEWAY_PORT", "tcp://10.96.0.7:80"),
    ok = put_variable("MACULA_QUIC_PORT", "4433"),
    ?assertEqual(ok, start([])),
    ok = put_variable("MACULA_QUIC_PORT", "nonsense"),
    ?assertEqual(ok, start([{gateway, none}])),
    ok = application:set_env(macula, tls_mode, strict),
    is_refused({invalid_option, {{macula, tls_mode}, strict}}, [{gateway, none}]),
    ?assertEqual(ok, start([{gateway, none}, {verify, none}])).

a_service_link_is_explained(_Config) ->
    [with_variable(Name, Value, fun() ->
         {error, {invalid_variable, {Name, Value, Hint}}} = macula_peer_node:start(),
         ?assertMatch({match, _}, re:run(Hint, "Kubernetes.*enableServiceLinks: false")),
         is_refused({invalid_variable, {Name, Value, Hint}}, []),
         [Sentence] = logged(fun() -> start([]) end),
         ?assertMatch({match, _}, re:run(Sentence, [Name, ".*", Value, ".*enableServiceLinks: false"]))
     end) || Name <- ["MACULA_QUIC_PORT", "GATEWAY_PORT"], Value <- ["udp://10.96.0.1:9443", "tcp://10.96.0.1:9443"]].

%% ---- macula's TLS ----

production_means_verified_by_authorities(Config) ->
    File = authorities(Config),
    Read = fun() -> {ok, #{native := Native}} = macula_peer_config:read(), maps:with([verify, verify_clients], Native) end,
    ok = put_variable("MACULA_TLS_CACERTFILE", File),
    ?assertEqual(#{}, Read()),
    Verified = #{verify => {cacertfile, File}, verify_clients => false},
    [with_variable("MACULA_TLS_MODE", Mode, fun() -> ?assertEqual({Mode, Expected}, {Mode, Read()}) end)
     || {Mode, Expected} <- [{"production", Verified}, {"prod", Verified}, {"development", #{}}, {"dev", #{}}, {"", #{}}]],
    ok = application:set_env(macula, tls_mode, production),
    ?assertEqual(Verified, Read()),
    [with_variable("MACULA_TLS_VERIFY_HOSTNAME", Value, fun() -> ?assertEqual(Verified#{verify => Verify}, Read()) end)
     || {Value, Verify} <- [{"true", {cacertfile, File}}, {"false", {cacertfile, File, any_name}}]],
    ok = application:set_env(macula, tls_verify_hostname, false),
    ?assertMatch(#{verify := {cacertfile, File, any_name}}, Read()),
    ?assertEqual(ok, start([])),
    with_variable("MACULA_TLS_MODE", "dev", fun() -> ?assertEqual(#{}, Read()) end),
    true = os:unsetenv("MACULA_TLS_CACERTFILE"),
    ok = application:set_env(macula, tls_cacertfile, File),
    ?assertMatch(#{verify := {cacertfile, File, any_name}}, Read()).

production_without_authorities_stops_the_start(Config) ->
    Missing = filename:join(proplists:get_value(priv_dir, Config), "missing.pem"),
    ok = put_variable("MACULA_TLS_MODE", "production"),
    ok = put_variable("MACULA_TLS_CACERTFILE", Missing),
    is_refused({tls_config_error, {cacertfile_not_found, Missing}}, []),
    [Sentence] = logged(fun() -> start([]) end),
    ?assertMatch({match, _}, re:run(Sentence, "MACULA_TLS_MODE is production.*missing.pem.*MACULA_TLS_CACERTFILE")),
    true = os:unsetenv("MACULA_TLS_CACERTFILE"),
    %% The system's own authorities, if it has any.
    case filelib:is_regular("/etc/ssl/certs/ca-certificates.crt") of
        true -> ?assertEqual(ok, start([]));
        false -> ok
    end.

a_setting_wins_over_production(_Config) ->
    ok = put_variable("MACULA_TLS_MODE", "production"),
    [begin
         ok = settings([{verify, Verify}]),
         Remarks = remarks(),
         ?assertMatch({match, _}, re:run(Remarks, ["production.*", atom_to_list(Verify), ".*any node may pose as the peer"])),
         ?assertMatch({ok, #{native := #{verify := Verify} = Native}} when not is_map_key(verify_clients, Native),
                      macula_peer_config:read())
     end || Verify <- [none, first_seen]],
    ok = settings([{verify, {pin, []}}]),
    ?assertEqual("", remarks()).

variables_that_mean_nothing_here_are_named(_Config) ->
    ?assertEqual("", remarks()),
    Names = ["MACULA_TLS_CERTFILE", "MACULA_TLS_KEYFILE", "TLS_CERT_FILE", "TLS_KEY_FILE"],
    [with_variable(Name, "/some/file.pem", fun() ->
         ?assertMatch({Name, {match, _}}, {Name, re:run(remarks(), [Name, ": not used here.*identity_file.*certfile"])})
     end) || Name <- Names],
    with_variable("MACULA_TLS_CACERTFILE", "/some/ca.pem", fun() ->
        ?assertMatch({match, _}, re:run(remarks(), "MACULA_TLS_CACERTFILE is only used with MACULA_TLS_MODE=production"))
    end).

remarks() ->
    lists:flatten(macula_peer_config:remarks()).

authorities(Config) ->
    File = filename:join(proplists:get_value(priv_dir, Config), "ca.pem"),
    #{cert := Root} = public_key:pkix_test_root_cert("authority", [{key, {rsa, 2048, 65537}}, {digest, sha256}]),
    ok = file:write_file(File, public_key:pem_encode([{'Certificate', Root, not_encrypted}])),
    File.

%% ----

%% By the application, and by the first call.
is_refused(Reason, Settings) ->
    ?assertEqual({Settings, {error, Reason}}, {Settings, start(Settings)}),
    ?assertEqual(not_started, macula_peer_call:stats()),
    [?assertEqual({error, Reason}, Result)
     || Result <- [macula_peer_node:start(), macula_peer_connector:send_message("127.0.0.1:9", cast, #{})]],
    ?assertEqual(not_started, macula_peer_call:stats()).

%% Starts the application, and stops it if it did.
start(Settings) ->
    ok = settings(Settings),
    case application:start(?APP) of
        ok -> application:stop(?APP);
        {error, {Reason, {macula_peer_app, start, _}}} -> {error, Reason}
    end.

settings(Settings) ->
    _ = application:load(?APP),
    [ok = application:unset_env(?APP, Key) || {Key, _} <- application:get_all_env(?APP)],
    [ok = application:set_env(?APP, Key, Value) || {Key, Value} <- Settings],
    ok.

listens_with() ->
    {ok, #{listen := Opts}} = macula_peer_config:read(),
    Opts.

hole_punching() ->
    {ok, #{native := Native}} = macula_peer_config:read(),
    maps:get(hole_punching, Native, default).

put_variable(Name, Value) ->
    true = os:putenv(Name, Value),
    ok.

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
