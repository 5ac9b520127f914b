%% A node keeps its key, others know it by that, and it talks only to nodes whose key it trusts.
-module(identity_SUITE).

-include_lib("kernel/include/file.hrl").
-include_lib("public_key/include/public_key.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([all/0, init_per_suite/1, end_per_suite/1, init_per_testcase/2, end_per_testcase/2]).
-export([a_key_is_new_at_every_start/1, a_key_in_a_file_stays/1, a_fingerprint_is_of_the_public_key/1]).
-export([a_bad_file_is_named/1, a_secret_of_kubernetes_is_read/1, a_key_is_made_where_there_are_no_links/1, wrong_values_are_named/1, a_wrong_secret_is_not_shown/1]).
-export([a_message_names_the_key_of_its_sender/1, an_answer_of_a_gateway_has_no_key/1]).
-export([only_a_pinned_peer_is_dialled/1, only_pinned_keys_may_connect/1]).
-export([a_listener_may_trust_others_than_its_node/1, signed_nodes_trust_only_each_other/1]).
-export([bad_authorities_are_named/1, in_macula_s_production_mode_peers_are_verified/1]).
-export([the_mode_is_logged/1, an_unverified_link_is_warned_of_once/1]).
-export([a_certificate_that_is_half_renewed_is_warned_of/1]).
-export([log/2]).

-define(APP, macula_peer_connector).
-define(TIMEOUT, 5000).
-define(UNTRUSTED, {error, {connect_failed, untrusted_peer}}).
-define(REJECTED, {error, {connect_failed, rejected_by_peer}}).

all() ->
    [a_key_is_new_at_every_start, a_key_in_a_file_stays, a_fingerprint_is_of_the_public_key, a_bad_file_is_named,
     a_secret_of_kubernetes_is_read, a_key_is_made_where_there_are_no_links, wrong_values_are_named,
     a_wrong_secret_is_not_shown, a_message_names_the_key_of_its_sender, an_answer_of_a_gateway_has_no_key,
     only_a_pinned_peer_is_dialled, only_pinned_keys_may_connect,
     a_listener_may_trust_others_than_its_node, signed_nodes_trust_only_each_other,
     bad_authorities_are_named, in_macula_s_production_mode_peers_are_verified, the_mode_is_logged, an_unverified_link_is_warned_of_once,
     a_certificate_that_is_half_renewed_is_warned_of].

init_per_suite(Config) ->
    [{other, macula_peer_test:start_node()} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(proplists:get_value(other, Config)).

init_per_testcase(_Case, Config) ->
    ok = on(Config, macula_peer_test, engine, [#{}]),
    ok = macula_peer_test:engine(#{}),
    Config.

end_per_testcase(_Case, Config) ->
    [true = os:unsetenv(Name) || Name <- ["MACULA_TLS_MODE", "MACULA_TLS_CACERTFILE", "MACULA_TLS_VERIFY_HOSTNAME"]],
    _ = application:stop(?APP),
    ok = on(Config, macula_peer_node, stop, []),
    %% Without the settings of the case.
    ok = macula_peer_test:engine(#{}),
    macula_peer_node:stop().

%% ---- the key ----

a_key_is_new_at_every_start(_Config) ->
    First = key(),
    ?assertEqual(32, byte_size(First)),
    ?assertEqual(First, key()),
    ok = macula_peer_node:stop(),
    ?assertNotEqual(First, key()).

a_key_in_a_file_stays(Config) ->
    File = in_priv_dir(Config, "key.pem"),
    ok = macula_peer_test:engine(#{identity_file => File}),
    Key = key(),
    {ok, #file_info{mode = Mode}} = file:read_file_info(File),
    ?assertEqual(8#600, Mode band 8#777),
    ?assertEqual({ok, ["key.pem"]}, file:list_dir(filename:dirname(File))),
    ok = macula_peer_test:engine(#{identity_file => list_to_binary(File)}),
    ?assertEqual(Key, key()),
    %% Another process with the same file is the same node.
    ok = on(Config, macula_peer_test, engine, [#{identity_file => File}]),
    ?assertEqual(Key, key_of_other(Config)).

%% By another library's reading of the file.
a_fingerprint_is_of_the_public_key(Config) ->
    File = in_priv_dir(Config, "key.pem"),
    ok = macula_peer_test:engine(#{identity_file => File}),
    {ok, Pem} = file:read_file(File),
    [Entry] = public_key:pem_decode(Pem),
    #'ECPrivateKey'{parameters = {namedCurve, ?secp256r1} = Curve, publicKey = Point} =
        public_key:pem_entry_decode(Entry),
    {_, PublicKey, _} = public_key:pem_entry_encode('SubjectPublicKeyInfo', {#'ECPoint'{point = Point}, Curve}),
    ?assertEqual(crypto:hash(sha256, PublicKey), key()).

a_bad_file_is_named(Config) ->
    {CA, _} = authority(),
    {Cert, EcKey} = node_of(CA),
    {OtherCert, _} = node_of(CA),
    Key = public_key:pem_encode([public_key:pem_entry_encode('PrivateKeyInfo', EcKey)]),
    [begin
         File = in_priv_dir(Config, Name),
         ok = write(File, Content, Mode),
         {error, {start_failed, {identity_file, Said}}} = Refused = start(#{identity_file => File}),
         ?assertEqual({Name, Reason}, {Name, without_text(Said)}),
         %% Every call says so.
         ?assertEqual(Refused, macula_peer_node:listen(#{})),
         ?assertEqual(Refused, macula_peer_connector:send_message("127.0.0.1:9", cast, #{}))
     end
     || {Name, Content, Mode, Reason} <-
            [{"readable.pem", Key, 8#644, insecure_permissions}, {"writable.pem", Key, 8#620, insecure_permissions},
             {"garbage.pem", <<"garbage">>, 8#600, not_a_key}, {"cert.pem", pem(Cert), 8#600, not_a_key},
             {"sec1.pem", pem(EcKey), 8#600, not_pkcs8}, {"encrypted.pem", encrypted(EcKey), 8#600, encrypted_key},
             {"p521.pem", p521(), 8#600, unsupported_key}, {"other.pem", [Key, pem(OtherCert)], 8#600, bad_certificate}]],
    ?assertEqual({error, {start_failed, {identity_file, enoent}}},
                 start(#{identity_file => in_priv_dir(Config, "nowhere/key.pem")})),
    ?assertEqual({error, {start_failed, {identity_file, eisdir}}}, start(#{identity_file => in_priv_dir(Config, "")})),
    ok = start(#{identity_file => in_priv_dir(Config, "fresh.pem")}).

without_text({bad_certificate, Text}) when is_binary(Text) -> bad_certificate;
without_text(Reason) -> Reason.

encrypted(Key) ->
    Cipher = {"AES-256-CBC", rand:bytes(16)},
    public_key:pem_encode([public_key:pem_entry_encode('ECPrivateKey', Key, {Cipher, "password"})]).

p521() ->
    Key = public_key:generate_key({namedCurve, secp521r1}),
    public_key:pem_encode([public_key:pem_entry_encode('PrivateKeyInfo', Key)]).

%% In a pod: the files of a secret are root's and the pod's group's, behind links, and mounted read-only.
a_secret_of_kubernetes_is_read(_Config) ->
    case os:cmd("unshare --mount setpriv --reuid 1000 true 2>&1") of
        "" -> secret_is_read(string:trim(os:cmd("mktemp -d")));
        _ -> {skip, "only root may mount file systems and run a node as another user"}
    end.

secret_is_read(Dir) ->
    %% Where the others may read it.
    [] = os:cmd(["cp -RL ", code:lib_dir(?APP), "/ebin ", filename:join(code:lib_dir(?APP), "priv"), " ", Dir,
                 " && chmod -R a+rX ", Dir, " && mkdir -p ", Dir, "/secret"]),
    Key = public_key:pem_encode([public_key:pem_entry_encode('PrivateKeyInfo',
                                                             public_key:generate_key({namedCurve, secp256r1}))]),
    ok = file:write_file(filename:join(Dir, "tls.key"), Key),
    Start = "application:load(macula_peer_connector), [File] = init:get_plain_arguments(), "
            "application:set_env(macula_peer_connector, identity_file, File), "
            "io:format(\"~0p.\", [macula_peer_node:start()]), halt().",
    Said = fun(Owner, Mode, User, File) ->
        Script = ["cd ", Dir, " && mount -t tmpfs none secret && mkdir secret/..2026 && cp tls.key secret/..2026 && "
                  "ln -s ..2026 secret/..data && ln -s ..data/tls.key secret/tls.key && chown ", Owner, " secret/..2026/* && "
                  "chmod ", Mode, " secret/..2026/* && mount -o remount,ro secret && export HOME=/tmp && "
                  "exec setpriv --reuid ", User, " --regid ", User, " --clear-groups "
                  "erl -noshell -pa ebin -kernel logger_level none -eval '", Start, "' -extra secret/", File],
        Output = os:cmd(["unshare --mount sh -c ", quoted(Script), " 2>&1"]),
        {ok, Tokens, _} = erl_scan:string(Output),
        {ok, Term} = erl_parse:parse_term(Tokens),
        Term
    end,
    Refused = fun(Reason) -> {error, {start_failed, {identity_file, Reason}}} end,
    [?assertEqual({Owner, Mode, User, File, Wanted}, {Owner, Mode, User, File, Said(Owner, Mode, User, File)})
     || {Owner, Mode, User, File, Wanted} <- [
        {"0:1000", "0440", "1000", "tls.key", ok},
        {"0:0", "0440", "0", "tls.key", ok},
        {"0:1000", "0444", "1000", "tls.key", Refused(insecure_permissions)},
        {"1001:1000", "0440", "1000", "tls.key", Refused({foreign_owner, 1001})},
        %% A missing file cannot be made.
        {"0:1000", "0440", "1000", "other.key", Refused(erofs)}]],
    [] = os:cmd(["rm -rf ", Dir]).

quoted(Text) ->
    ["'", string:replace(Text, "'", "'\\''", all), "'"].

%% As on SMB, FUSE, exFAT or 9p.
a_key_is_made_where_there_are_no_links(Config) ->
    [Source, Shim, File] = [in_priv_dir(Config, Name) || Name <- ["nolinks.c", "nolinks.so", "keys/key.pem"]],
    ok = filelib:ensure_dir(File),
    ok = file:write_file(Source, "#include <errno.h>\n"
                                 "int link(const char *f, const char *t) { errno = EPERM; return -1; }\n"
                                 "int linkat(int a, const char *f, int b, const char *t, int g) { errno = EPERM; return -1; }\n"),
    case os:cmd(["cc -shared -fPIC -o ", Shim, " ", Source]) of
        "" ->
            Node = macula_peer_test:start_node(macula_peer_test:node_paths(), #{env => [{"LD_PRELOAD", Shim}]}),
            ?assertEqual({error, eperm}, macula_peer_test:call(Node, file, make_link, [Source, Source ++ "2"])),
            ok = macula_peer_test:call(Node, macula_peer_test, engine, [#{identity_file => File}]),
            #{fingerprint := Key} = macula_peer_test:call(Node, macula_peer_node, identity, []),
            macula_peer_test:stop_node(Node),
            {ok, #file_info{mode = Mode}} = file:read_file_info(File),
            ?assertEqual(8#600, Mode band 8#777),
            ?assertEqual({ok, ["key.pem"]}, file:list_dir(filename:dirname(File))),
            ok = start(#{identity_file => File}),
            ?assertEqual(Key, key());
        Said ->
            {skip, Said}
    end.

wrong_values_are_named(_Config) ->
    Digits = lists:duplicate(63, $0),
    [begin
         ?assertEqual({error, {invalid_option, {Key, Value}}}, start(#{Key => Value})),
         ?assertEqual({error, {invalid_option, {Key, Value}}}, macula_peer_node:listen(#{}))
     end
     || {Key, Value} <- [{identity_file, 1}, {identity_file, none}, {verify, always}, {verify, true}, {verify, {pin, none}},
                         {verify, {pin, Digits ++ "0"}}, {verify, {pin, [Digits]}}, {verify, {pin, [Digits ++ "g"]}},
                         {verify, {pin, [<<0:248>>]}}, {verify, {pin, [1]}}, {verify, {pin, [<<0:256>> | 1]}},
                         {verify, {cacertfile, 1}}, {verify, {cacertfile, "a", "b"}}]],
    ok = start(#{}),
    [?assertEqual({error, {invalid_option, {verify, Value}}}, macula_peer_node:listen(#{verify => Value}))
     || Value <- [always, {pin, none}, {cacertfile, 1}]].

a_wrong_secret_is_not_shown(_Config) ->
    [?assertEqual({error, {invalid_option, {realm_secret, hidden}}}, start(#{realm_secret => Secret}))
     || Secret <- ["secret", <<>>, secret]],
    ok = start(#{realm_secret => <<"secret">>}).

%% ---- the key of a message ----

a_message_names_the_key_of_its_sender(Config) ->
    Endpoint = listen(#{}),
    Key = key_of_other(Config),
    [begin ok = send_from_other(Config, Endpoint), ?assertEqual(Key, sender()) end || _ <- [1, 2]],
    ok = on(Config, macula_peer_test, engine, [#{}]),
    ok = send_from_other(Config, Endpoint),
    ?assertEqual(key_of_other(Config), sender()),
    ?assertNotEqual(Key, key_of_other(Config)).

an_answer_of_a_gateway_has_no_key(_Config) ->
    Gateway = macula_peer_fake_gateway:start(),
    ok = macula_peer_node:set_handler(self()),
    ok = macula_peer_connector:send_message(macula_peer_fake_gateway:endpoint(Gateway), ping, #{timestamp => 1}),
    receive
        {macula_peer_message, Answer} -> ?assertMatch(#{type := pong, dialect := macula, key := undefined}, Answer)
    after ?TIMEOUT -> ct:fail(no_answer)
    end,
    macula_peer_fake_gateway:stop(Gateway).

%% ---- trust ----

only_a_pinned_peer_is_dialled(Config) ->
    Endpoint = listen(#{}),
    Key = key(),
    [begin
         ok = on(Config, macula_peer_test, engine, [#{verify => {pin, [<<0:256>>, Pin]}}]),
         ?assertEqual(ok, send_from_other(Config, Endpoint)),
         ?assertEqual(key_of_other(Config), sender())
     end || Pin <- [Key, hex(Key), string:uppercase(hex(Key)), list_to_binary(hex(Key))]],
    [begin
         ok = on(Config, macula_peer_test, engine, [#{verify => {pin, Pins}}]),
         ?assertEqual(?UNTRUSTED, send_from_other(Config, Endpoint)),
         ?assertEqual(?UNTRUSTED, ask_from_other(Config, Endpoint))
     end || Pins <- [[], [<<0:256>>]]],
    Gateway = macula_peer_fake_gateway:start(),
    ?assertEqual(?UNTRUSTED, send_from_other(Config, macula_peer_fake_gateway:endpoint(Gateway))),
    macula_peer_fake_gateway:stop(Gateway).

only_pinned_keys_may_connect(Config) ->
    ok = macula_peer_test:engine(#{verify => {pin, [key_of_other(Config)]}}),
    Endpoint = listen(#{}),
    ok = send_from_other(Config, Endpoint),
    ?assertEqual(key_of_other(Config), sender()),
    ok = on(Config, macula_peer_test, engine, [#{}]),
    ?assertEqual(?REJECTED, send_from_other(Config, Endpoint)),
    ?assertEqual(?REJECTED, ask_from_other(Config, Endpoint)),
    ?assertMatch(#{undelivered := 0}, on(Config, macula_peer_node, stats, [])).

a_listener_may_trust_others_than_its_node(Config) ->
    ok = macula_peer_test:engine(#{verify => {pin, []}}),
    Endpoint = listen(#{verify => none}),
    ok = send_from_other(Config, Endpoint),
    _ = sender(),
    ok = macula_peer_node:close(),
    Endpoint = listen(#{verify => {pin, [hex(key_of_other(Config))]}}),
    _ = macula_peer_test:await(fun() -> send_from_other(Config, Endpoint) end, fun(Sent) -> Sent =:= ok end),
    _ = sender(),
    ok = macula_peer_node:close(),
    Endpoint = listen(#{}),
    ?REJECTED = macula_peer_test:await(fun() -> send_from_other(Config, Endpoint) end, fun(Sent) -> Sent =/= ok end).

%% sha256WithRSAEncryption, with the NULL that rustls wants after it. OTP 29's test certificates have none.
-define(SHA256_WITH_RSA, <<16#06, 9, 16#2a, 16#86, 16#48, 16#86, 16#f7, 16#0d, 1, 1, 11, 5, 0>>).

signed_nodes_trust_only_each_other(Config) ->
    {_, Der} = Authority = authority(),
    case binary:match(Der, ?SHA256_WITH_RSA) of
        nomatch -> {skip, "this OTP's test certificates are not for rustls"};
        _ -> signed_nodes_trust_each_other(Config, Authority)
    end.

signed_nodes_trust_each_other(Config, {CA, CADer}) ->
    {Stranger, StrangerDer} = authority(),
    File = fun(Name, Content) ->
        ok = write(in_priv_dir(Config, Name), Content, 8#600),
        in_priv_dir(Config, Name)
    end,
    Node = fun(Name, Authority) ->
        {Cert, Key} = node_of(Authority),
        File(Name, [pem(Key), pem(Cert)])
    end,
    [CAFile, StrangerFile] = [File("ca.pem", pem(CADer)), File("stranger.pem", pem(StrangerDer))],
    [Ours, Theirs, Strange] = [Node("ours.pem", CA), Node("theirs.pem", CA), Node("strange.pem", Stranger)],
    ok = macula_peer_test:engine(#{identity_file => Ours, verify => {cacertfile, CAFile}}),
    Endpoint = listen(#{}),
    Send = fun(Env, To) ->
        ok = on(Config, macula_peer_test, engine, [Env]),
        send_from_other(Config, To)
    end,
    Signed = #{identity_file => Theirs, verify => {cacertfile, list_to_binary(CAFile)}},
    ?assertEqual(ok, Send(Signed, Endpoint)),
    ?assertEqual(key_of_other(Config), sender()),
    %% The certificate is for 127.0.0.1 and no other name.
    [_, Port] = string:split(Endpoint, ":"),
    ?assertEqual(?UNTRUSTED, Send(Signed, macula_peer_test:endpoint("localhost", binary_to_integer(Port)))),
    ?assertEqual(?UNTRUSTED, Send(Signed#{verify => {cacertfile, StrangerFile}}, Endpoint)),
    ?assertEqual(?REJECTED, Send(#{identity_file => Strange}, Endpoint)),
    ?assertEqual(?REJECTED, Send(#{}, Endpoint)).

%% As in macula: a peer that is dialled must show a certificate of an authority, a peer that connects does not have to.
in_macula_s_production_mode_peers_are_verified(Config) ->
    {CA, CADer} = authority(),
    case binary:match(CADer, ?SHA256_WITH_RSA) of
        nomatch -> {skip, "this OTP's test certificates are not for rustls"};
        _ -> in_production_mode(Config, CA, CADer)
    end.

in_production_mode(Config, CA, CADer) ->
    ok = write(in_priv_dir(Config, "ca.pem"), pem(CADer), 8#600),
    {Cert, Key} = node_of(CA),
    ok = write(in_priv_dir(Config, "node.pem"), [pem(Key), pem(Cert)], 8#600),
    Gateway = macula_peer_fake_gateway:start(),
    ok = on(Config, macula_peer_test, engine, [#{identity_file => in_priv_dir(Config, "node.pem")}]),
    {ok, {_, Port}} = on(Config, macula_peer_test, listen, [#{}]),
    Send = fun(To) -> macula_peer_connector:send_message(To, cast, #{}, ?TIMEOUT) end,
    [true = os:putenv(Name, Value) || {Name, Value} <- [{"MACULA_TLS_MODE", "production"},
                                                        {"MACULA_TLS_CACERTFILE", in_priv_dir(Config, "ca.pem")}]],
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(?UNTRUSTED, Send(macula_peer_fake_gateway:endpoint(Gateway))),
    ?assertEqual(ok, Send(macula_peer_test:endpoint("127.0.0.1", Port))),
    ?assertEqual(?UNTRUSTED, Send(macula_peer_test:endpoint("localhost", Port))),
    ?assertMatch(#{verify_none_links := 0}, macula_peer_node:stats()),
    %% A peer that connects shows a certificate without an authority.
    Endpoint = listen(#{}),
    ok = on(Config, macula_peer_test, engine, [#{}]),
    ?assertEqual(ok, send_from_other(Config, Endpoint)),
    _ = sender(),
    %% Without names.
    ok = on(Config, macula_peer_test, engine, [#{identity_file => in_priv_dir(Config, "node.pem")}]),
    {ok, {_, Again}} = on(Config, macula_peer_test, listen, [#{}]),
    true = os:putenv("MACULA_TLS_VERIFY_HOSTNAME", "false"),
    ok = macula_peer_test:engine(#{}),
    ?assertEqual(ok, Send(macula_peer_test:endpoint("localhost", Again))),
    ?assertEqual(?UNTRUSTED, Send(macula_peer_fake_gateway:endpoint(Gateway))),
    macula_peer_fake_gateway:stop(Gateway).

bad_authorities_are_named(Config) ->
    Garbage = in_priv_dir(Config, "garbage.pem"),
    ok = file:write_file(Garbage, "garbage"),
    Missing = in_priv_dir(Config, "missing.pem"),
    [begin
         Verify = {cacertfile, File},
         ?assertEqual({error, {start_failed, {cacertfile, Reason}}}, start(#{verify => Verify})),
         ok = start(#{}),
         ?assertEqual({error, {listen_failed, {cacertfile, Reason}}}, macula_peer_node:listen(#{verify => Verify}))
     end || {File, Reason} <- [{Garbage, not_a_certificate}, {Missing, enoent}]].

%% ---- what is logged ----

the_mode_is_logged(_Config) ->
    [begin
         Lines = logged(fun() -> ok = macula_peer_test:engine(Env) end, Mode),
         ?assertEqual(1, length([Line || Line <- Lines, string:find(Line, "verified") =/= nomatch]))
     end
     || {Env, Mode} <- [{#{}, "first_seen"}, {#{verify => none}, "none"}, {#{verify => {pin, [<<0:256>>]}}, "pin"}]].

an_unverified_link_is_warned_of_once(_Config) ->
    Gateways = [macula_peer_fake_gateway:start() || _ <- [1, 2]],
    ok = macula_peer_node:stop(),
    {ok, _} = application:ensure_all_started(?APP),
    Send = fun(Gateway) ->
        {ok, _} = macula_peer_connector:send_message_and_wait(macula_peer_fake_gateway:endpoint(Gateway), ping,
                                                              #{timestamp => 1}, ?TIMEOUT)
    end,
    %% The warning of the first link comes before what is logged after the second.
    Lines = logged(fun() ->
        lists:foreach(Send, Gateways),
        macula_peer_engine ! {macula_peer_log, <<"the end">>}
    end, "the end"),
    ?assertMatch([_, _], Lines),
    ?assertNotEqual(nomatch, string:find(hd(Lines), "not verified")),
    ?assertMatch(#{verify_none_links := 2}, macula_peer_node:stats()),
    lists:foreach(fun macula_peer_fake_gateway:stop/1, Gateways).

a_certificate_that_is_half_renewed_is_warned_of(Config) ->
    ok = macula_peer_node:stop(),
    {ok, _} = application:ensure_all_started(?APP),
    Pair = fun() -> {CA, _} = authority(), {Cert, Key} = node_of(CA), {pem(Cert), pem(Key)} end,
    [CertFile, KeyFile] = [in_priv_dir(Config, Name) || Name <- ["cert.pem", "key.pem"]],
    Write = fun({Cert, Key}) -> ok = file:write_file(CertFile, Cert), ok = file:write_file(KeyFile, Key) end,
    Write(Pair()),
    Endpoint = listen(#{certfile => CertFile, keyfile => KeyFile}),
    {NewCert, NewKey} = Pair(),
    [Line] = logged(fun() -> ok = file:write_file(CertFile, NewCert) end, "cannot be used"),
    ?assertMatch({_, [_ | _]}, {Line, string:find(Line, CertFile)}),
    ok = send_from_other(Config, Endpoint),
    _ = sender(),
    ok = file:write_file(KeyFile, NewKey),
    #'OTPCertificate'{tbsCertificate = #'OTPTBSCertificate'{subjectPublicKeyInfo = Public}} = decoded(NewCert),
    #'OTPSubjectPublicKeyInfo'{subjectPublicKey = Point} = Public,
    {_, PublicKey, _} = public_key:pem_entry_encode('SubjectPublicKeyInfo', {Point, {namedCurve, ?secp256r1}}),
    Pin = crypto:hash(sha256, PublicKey),
    _ = macula_peer_test:await(fun() ->
        ok = on(Config, macula_peer_test, engine, [#{verify => {pin, [Pin]}}]),
        send_from_other(Config, Endpoint)
    end, fun(Sent) -> Sent =:= ok end).

decoded(Pem) ->
    [{'Certificate', Der, not_encrypted}] = public_key:pem_decode(iolist_to_binary(Pem)),
    public_key:pkix_decode_cert(Der, otp).

%% What is logged up to the line that has this text in it, from `notice' on.
logged(Fun, Last) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self(), level => notice}),
    try
        Fun(),
        lines(Last)
    after
        logger:remove_handler(?MODULE)
    end.

lines(Last) ->
    receive
        {logged, {Format, Args}} ->
            Line = lists:flatten(io_lib:format(Format, Args)),
            case {string:find(Line, "macula_peer_connector:"), string:find(Line, Last)} of
                {nomatch, _} -> lines(Last);
                {_, nomatch} -> [Line | lines(Last)];
                {_, _} -> [Line]
            end;
        {logged, _Report} ->
            lines(Last)
    after ?TIMEOUT -> ct:fail({not_logged, Last})
    end.

%% As a handler of logger.
log(#{msg := Message}, #{config := Pid}) ->
    Pid ! {logged, Message}.

%% ---- certificates ----

%% With an RSA key: what public_key's test certificates say of ECDSA signatures is understood by few.
authority() ->
    Root = public_key:pkix_test_root_cert("authority", [{key, {rsa, 2048, 65537}}, {digest, sha256}]),
    {Root, maps:get(cert, Root)}.

%% A key and its certificate, for 127.0.0.1.
node_of(Authority) ->
    Address = #'Extension'{extnID = ?'id-ce-subjectAltName', critical = false,
                           extnValue = [{iPAddress, <<127, 0, 0, 1>>}]},
    Peer = [{key, {namedCurve, secp256r1}}, {digest, sha256}, {extensions, [Address]}],
    Conf = public_key:pkix_test_data(#{root => Authority, peer => Peer}),
    {cert, Cert} = lists:keyfind(cert, 1, Conf),
    {key, {'ECPrivateKey', Key}} = lists:keyfind(key, 1, Conf),
    {Cert, public_key:der_decode('ECPrivateKey', Key)}.

pem(#'ECPrivateKey'{} = Key) -> public_key:pem_encode([public_key:pem_entry_encode('ECPrivateKey', Key)]);
pem(Cert) -> public_key:pem_encode([{'Certificate', Cert, not_encrypted}]).

write(File, Content, Mode) ->
    ok = file:write_file(File, Content),
    ok = file:change_mode(File, Mode).

in_priv_dir(Config, Name) ->
    filename:join(proplists:get_value(priv_dir, Config), Name).

%% ---- common ----

%% Starts the engine of this node with these settings and no others.
start(Env) ->
    try macula_peer_test:engine(Env)
    catch error:{badmatch, {error, _} = Error} -> Error
    end.

listen(Opts) ->
    {ok, {_, Port}} = macula_peer_node:listen(Opts#{handler => self()}),
    macula_peer_test:endpoint("127.0.0.1", Port).

key() ->
    ok = macula_peer_node:start(),
    #{fingerprint := Key} = macula_peer_node:identity(),
    Key.

key_of_other(Config) ->
    #{fingerprint := Key} = on(Config, macula_peer_node, identity, []),
    Key.

send_from_other(Config, Endpoint) ->
    on(Config, macula_peer_connector, send_message, [Endpoint, cast, #{}, ?TIMEOUT]).

ask_from_other(Config, Endpoint) ->
    on(Config, macula_peer_connector, send_message_and_wait, [Endpoint, ping, #{timestamp => 1}, ?TIMEOUT]).

%% The key that the next message came with.
sender() ->
    receive {macula_peer_message, #{key := Key}} -> Key after ?TIMEOUT -> ct:fail(no_message) end.

hex(Bytes) ->
    lists:flatten([io_lib:format("~2.16.0b", [Byte]) || <<Byte>> <= Bytes]).

on(Config, Module, Function, Args) ->
    macula_peer_test:call(proplists:get_value(other, Config), Module, Function, Args).
