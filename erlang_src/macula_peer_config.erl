%% @private
%% @doc The settings of this node: the application environment of `macula_peer_connector', and the environment variables
%% that operators of macula set. They are read and checked only here, all of them before anything starts. The
%% application environment wins over a variable.
-module(macula_peer_config).

-export([read/0]).
-export([remarks/0]).
-export([bootstrap_peers/0]).
-export([format_error/1]).

-export_type([settings/0]).

-define(APP, macula_peer_connector).

-type settings() :: #{native := map(), handler := macula_peer_node:handler() | undefined,
                      listen := macula_peer_node:listen_opts() | undefined, resolver := module() | none}.
%% `native' is for the native library.

%% Where macula looks for its gateway's port: variables, then keys of its application environment, then the default.
-define(PORT_VARIABLES, ["MACULA_QUIC_PORT", "GATEWAY_PORT"]).
-define(PORT_KEYS, [quic_port, gateway_port]).
-define(GATEWAY_PORT, 9443).

%% Kubernetes gives pods variables for each Service: one that is called `gateway' sets GATEWAY_PORT.
-define(SERVICE_LINK, "^[a-z]+://").
-define(SERVICE_LINK_HINT, <<"Kubernetes set it for a Service of that name; put enableServiceLinks: false in the pod's spec, "
                             "or set the variable to the port">>).

%% In macula many nodes may share these certificates. Here a node is known by its key.
-define(CERTIFICATE_VARIABLES, ["MACULA_TLS_CERTFILE", "MACULA_TLS_KEYFILE", "TLS_CERT_FILE", "TLS_KEY_FILE"]).

%% Where macula looks for authorities by default.
-define(CA_BUNDLES, ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
                     "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/usr/local/share/certs/ca-root-nss.crt",
                     "/etc/ssl/cert.pem"]).

%% What the native library is told, and what it takes.
-define(NATIVE, #{ip => "an address as in inet:ip_address()",
                  port => "a UDP port from 0 to 65535",
                  max_frame_size => "a number of bytes from 1 to 1073741824",
                  max_nesting => "a number from 1 to 512",
                  max_terms => "a number from 1 to 10000000",
                  node_id => "a binary of 1 to 255 bytes",
                  relays => "a list of at most 64 endpoints, each \"host:port\"",
                  hole_punching => "on, plain or off",
                  pool_size => "a number from 1 to 1000000",
                  idle_timeout => "milliseconds, from 1 to a day",
                  keep_alive => "milliseconds, from 1 to a day",
                  connect_timeout => "milliseconds, from 1 to a day",
                  delivery => "at_least_once or at_most_once",
                  max_unacknowledged => "a number of bytes above 0",
                  answer_timeout => "milliseconds, from 1 to a day",
                  workers => "a number from 1 to 256",
                  identity_file => "the name of a file",
                  access => "a map of the lists allow and deny, each a map of keys, node_ids and networks",
                  previous_identity_files => "a list of at most 4 names of files",
                  known_keys_file => "the name of a file",
                  verify => "first_seen, none, {pin, Fingerprints}, {cacertfile, File} or {cacertfile, File, any_name}",
                  realm_secret => "a binary that is not empty",
                  max_accepted => "a number from 1 to 1000000",
                  max_streams => "a number from 1 to 4096",
                  max_known_sessions => "a number from 1024 to 1000000",
                  max_known_requests => "a number from 1024 to 1000000",
                  frame_memory => "a number of bytes from four times max_frame_size to 17179869184",
                  frame_timeout => "milliseconds, from 1 to a day"}).

%% What is ours.
-define(OWN, #{gateway => "auto, an endpoint \"host:port\" or none",
               listen => "a map of options of macula_peer_node:listen/1, but for the handler",
               handler => "a process of this node or {Module, Function, Args}",
               resolver => "a module with callbacks of macula_peer_resolver, or none",
               takeover => "true or false",
               takeover_pool => "true or false"}).

-type kind() :: boolean | positive | port | tls_mode.

%% The variables that are always checked at the start. What is wrong with MACULA_BOOTSTRAP_PEERS is told by each call that needs
%% one of them, as in macula, and logged.
-define(VARIABLES, #{"RELAY_ENABLED" => boolean,
                     "MACULA_NAT_RELAY_ENABLED" => boolean,
                     "MACULA_NAT_RELAY_MAX_SESSIONS" => positive,
                     "MACULA_NAT_RELAY_BANDWIDTH" => positive,
                     "MACULA_NAT_ENABLED" => boolean,
                     "MACULA_NAT_PUNCH_ENABLED" => boolean,
                     "MACULA_TLS_MODE" => tls_mode,
                     "MACULA_TLS_VERIFY_HOSTNAME" => boolean}).

%% @doc All settings, or what is wrong with the first that is.
-spec read() -> {ok, settings()} | {error, macula_peer_error:settings()}.
read() ->
    %% A first call may come before either application is started or loaded, and neither has an environment until then. Loading
    %% one that is not there would search all of the code path, which takes milliseconds; this looks it up by name.
    _ = application:load(?APP),
    _ = is_list(code:lib_dir(macula)) andalso application:load(macula),
    Env = maps:without([included_applications], maps:from_list(application:get_all_env(?APP))),
    case first_error([fun check_variables/0, fun() -> check_known(Env) end, fun() -> check_own(Env) end]) of
        ok -> with_native(Env, native(Env));
        {error, _} = Error -> Error
    end.

-spec with_native(map(), {ok, map()} | {error, macula_peer_error:settings()}) -> {ok, settings()} | {error, macula_peer_error:settings()}.
with_native(Env, {ok, Native}) ->
    case macula_peer_nif:check(settings, Native) of
        ok -> {ok, #{native => Native, handler => maps:get(handler, Env, undefined), listen => listen(Env),
                     resolver => maps:get(resolver, Env, macula_peer_resolver_macula)}};
        {error, _} = Error -> Error
    end;
with_native(_Env, {error, _} = Error) ->
    Error.

%% @doc What the operator should know about variables that do not stop the start: a sentence each, for the log.
-spec remarks() -> [unicode:chardata()].
remarks() ->
    bootstrap_remarks() ++ verify_remarks() ++ certificate_remarks().

%% @doc Every entry of `MACULA_BOOTSTRAP_PEERS' that is an endpoint, and what is wrong with the others.
-spec bootstrap_peers() -> {[string()], no_bootstrap_peers | invalid_bootstrap_format | invalid_bootstrap_port}.
bootstrap_peers() ->
    Checked = checked_bootstrap_peers(),
    Reason = case Checked of
        [{Why, _} | _] when Why =/= ok -> Why;
        _ -> no_bootstrap_peers
    end,
    {[Peer || {ok, Peer} <- Checked], Reason}.

%% @doc A sentence for the log.
-spec format_error(term()) -> unicode:chardata().
format_error({invalid_option, {Key, Value}}) ->
    io_lib:format("the setting ~0tp has the wrong value ~0tP~ts", [Key, Value, 30, wanted(Key)]);
format_error({unknown_option, Key}) ->
    io_lib:format("there is no setting ~0tp", [Key]);
format_error({invalid_variable, {Name, Value}}) ->
    Wanted = maps:get(Name, ?VARIABLES, port),
    io_lib:format("the environment variable ~ts has the wrong value ~0tp; it takes ~ts", [Name, Value, takes(Wanted)]);
format_error({invalid_variable, {Name, Value, Hint}}) ->
    [format_error({invalid_variable, {Name, Value}}), ". ", Hint];
format_error({tls_config_error, {cacertfile_not_found, File}}) ->
    io_lib:format("MACULA_TLS_MODE is production, and there is no file ~0tp with authorities to verify peers. Name one in "
                  "MACULA_TLS_CACERTFILE, or set verify", [File]);
format_error({start_failed, {identity_file, Reason}}) ->
    io_lib:format("identity_file cannot be used (~0tP): ~ts", [Reason, 30, identity_file(Reason)]);
format_error({start_failed, {previous_identity_files, {File, Reason}}}) ->
    io_lib:format("~ts in previous_identity_files cannot be used (~0tP): ~ts", [File, Reason, 30, identity_file(Reason)]);
format_error({start_failed, {known_keys_file, Reason}}) ->
    io_lib:format("known_keys_file cannot be used (~0tP): ~ts", [Reason, 30, known_keys_file(Reason)]);
format_error(Reason) ->
    io_lib:format("~0tP", [Reason, 30]).

-spec identity_file(term()) -> unicode:chardata().
identity_file(enoent) -> "its directory does not exist, or it is a link that leads nowhere";
identity_file(erofs) -> "it does not exist, and cannot be made on a read-only file system";
identity_file(eacces) -> "this user may not read it, or may not make it in its directory";
identity_file(eisdir) -> "it is a directory";
identity_file(insecure_permissions) -> "others than its owner may read or write it";
identity_file({foreign_owner, _}) -> "it belongs to a user other than root and the user of this node";
identity_file(not_a_key) -> "it has no private key in PEM format";
identity_file(encrypted_key) -> "its key is encrypted; `openssl pkey' decrypts it";
identity_file(unsupported_key) -> "its key is damaged, or is not ECDSA P-256 or P-384, Ed25519, or RSA of 2048 bits or more";
identity_file(not_pkcs8) -> "its key comes without a certificate and is not in PKCS#8; `openssl pkcs8 -topk8 -nocrypt' converts it";
identity_file({bad_certificate, Text}) -> Text;
identity_file(_) -> "see docs/errors.md".

-spec known_keys_file(term()) -> unicode:chardata().
known_keys_file(in_use) -> "another node keeps its keys there";
known_keys_file(not_known_keys) -> "it is another kind of file";
known_keys_file({bad_line, _}) -> "that line is damaged. Without the line the node that it names may have any key";
known_keys_file(erofs) -> "it cannot be written on a read-only file system";
known_keys_file(Reason) -> identity_file(Reason).

%% ---- the application environment ----

-spec native(map()) -> {ok, map()} | {error, macula_peer_error:settings()}.
native(Env) ->
    Punching = case variable("MACULA_NAT_ENABLED", true) andalso variable("MACULA_NAT_PUNCH_ENABLED", true) of
        true -> #{};
        false -> #{hole_punching => off}
    end,
    case {gateway(Env), verify(Env)} of
        {{ok, Gateway}, {ok, Verify}} ->
            Variables = maps:merge(Punching#{gateway => Gateway}, Verify),
            {ok, maps:merge(Variables, maps:with(maps:keys(?NATIVE), Env))};
        {{error, _} = Error, _} -> Error;
        {_, {error, _} = Error} -> Error
    end.

-spec gateway(map()) -> {ok, term()} | {error, macula_peer_error:settings()}.
gateway(#{gateway := Gateway}) when Gateway =/= auto ->
    {ok, Gateway};
gateway(#{}) ->
    case gateway_port() of
        {ok, Port} -> {ok, {auto, "127.0.0.1:" ++ integer_to_list(Port)}};
        {error, _} = Error -> Error
    end.

%% As macula finds it, so what it would not look at is not checked either.
-spec gateway_port() -> {ok, inet:port_number()} | {error, macula_peer_error:settings()}.
gateway_port() ->
    case [{Name, Value} || Name <- ?PORT_VARIABLES, Value <- [os:getenv(Name, "")], string:trim(Value) =/= ""] of
        [{Name, Value} | _] ->
            case parse(port, Value) of
                wrong -> {error, {invalid_variable, explained(Name, Value)}};
                Port -> {ok, Port}
            end;
        [] ->
            case macula_env(?PORT_KEYS) of
                {Key, Port} when not is_integer(Port); Port < 1; Port > 65535 -> {error, {invalid_option, {{macula, Key}, Port}}};
                {_, Port} -> {ok, Port};
                undefined -> {ok, ?GATEWAY_PORT}
            end
    end.

-spec explained(string(), string()) -> {string(), string()} | {string(), string(), binary()}.
explained(Name, Value) ->
    case re:run(Value, ?SERVICE_LINK, [{capture, none}]) of
        match -> {Name, Value, ?SERVICE_LINK_HINT};
        nomatch -> {Name, Value}
    end.

%% The first of these that macula's application environment has.
-spec macula_env([Key]) -> {Key, term()} | undefined.
macula_env(Keys) ->
    case [{Key, Value} || Key <- Keys, {ok, Value} <- [application:get_env(macula, Key)]] of
        [Found | _] -> Found;
        [] -> undefined
    end.

%% In macula's mode `production' a peer that is dialled shows a certificate of an authority. A peer that connects does not have
%% to.
-spec verify(map()) -> {ok, map()} | {error, macula_peer_error:settings()}.
verify(#{verify := _}) ->
    {ok, #{}};
verify(#{}) ->
    case tls_mode() of
        {ok, development} -> {ok, #{}};
        {ok, production} -> verify_by(cacertfile(), verify_hostname());
        {error, _} = Error -> Error
    end.

-spec verify_by(file:filename(), {ok, boolean()} | {error, macula_peer_error:settings()}) -> {ok, map()} | {error, macula_peer_error:settings()}.
verify_by(File, {ok, Hostname}) ->
    case {is_file(File), Hostname} of
        {true, true} -> {ok, #{verify => {cacertfile, File}, verify_clients => false}};
        {true, false} -> {ok, #{verify => {cacertfile, File, any_name}, verify_clients => false}};
        {false, _} -> {error, {tls_config_error, {cacertfile_not_found, File}}}
    end;
verify_by(_File, {error, _} = Error) ->
    Error.

-spec is_file(term()) -> boolean().
is_file(Name) when is_list(Name); is_binary(Name) -> filelib:is_regular(Name);
is_file(_) -> false.

-spec tls_mode() -> {ok, production | development} | {error, macula_peer_error:settings()}.
tls_mode() ->
    case {variable("MACULA_TLS_MODE", unset), macula_env([tls_mode])} of
        {unset, undefined} -> {ok, development};
        {unset, {_, Mode}} when Mode =:= production; Mode =:= development -> {ok, Mode};
        {unset, {Key, Value}} -> {error, {invalid_option, {{macula, Key}, Value}}};
        {Mode, _} -> {ok, Mode}
    end.

-spec cacertfile() -> file:filename().
cacertfile() ->
    case {os:getenv("MACULA_TLS_CACERTFILE", ""), macula_env([tls_cacertfile])} of
        {"", undefined} -> hd([File || File <- ?CA_BUNDLES, filelib:is_regular(File)] ++ [""]);
        {"", {_, File}} -> File;
        {File, _} -> File
    end.

-spec verify_hostname() -> {ok, boolean()} | {error, macula_peer_error:settings()}.
verify_hostname() ->
    case {variable("MACULA_TLS_VERIFY_HOSTNAME", unset), macula_env([tls_verify_hostname])} of
        {unset, undefined} -> {ok, true};
        {unset, {_, Verify}} when is_boolean(Verify) -> {ok, Verify};
        {unset, {Key, Value}} -> {error, {invalid_option, {{macula, Key}, Value}}};
        {Verify, _} -> {ok, Verify}
    end.

-spec verify_remarks() -> [unicode:chardata()].
verify_remarks() ->
    case {application:get_env(?APP, verify), tls_mode(), os:getenv("MACULA_TLS_CACERTFILE", "")} of
        {{ok, Verify}, {ok, production}, _} when Verify =:= none; Verify =:= first_seen ->
            [io_lib:format("MACULA_TLS_MODE is production, but the setting verify is ~s: any node may pose as the peer", [Verify])];
        {undefined, {ok, development}, File} when File =/= "" ->
            ["MACULA_TLS_CACERTFILE is only used with MACULA_TLS_MODE=production, as in macula: peers are not verified by it"];
        _ ->
            []
    end.

-spec certificate_remarks() -> [unicode:chardata()].
certificate_remarks() ->
    case [Name || Name <- ?CERTIFICATE_VARIABLES, os:getenv(Name, "") =/= ""] of
        [] -> [];
        Names -> [[lists:join(", ", Names), ": not used here. The setting identity_file names this node's key and certificate, the "
                   "option certfile of listen the one that a listener shows"]]
    end.

-spec check_known(map()) -> ok | {error, macula_peer_error:settings()}.
check_known(Env) ->
    case maps:keys(maps:without(maps:keys(maps:merge(?NATIVE, ?OWN)), Env)) of
        [] -> ok;
        [Key | _] -> {error, {unknown_option, Key}}
    end.

-spec check_own(map()) -> ok | {error, macula_peer_error:settings()}.
check_own(Env) ->
    first_error([fun() -> check(Key, Value) end || {Key, Value} <- maps:to_list(maps:with(maps:keys(?OWN), Env))]).

-spec check(atom(), term()) -> ok | {error, macula_peer_error:settings()}.
check(handler, undefined) ->
    ok;
check(handler, Pid) when is_pid(Pid), node(Pid) =:= node() ->
    ok;
check(handler, {Module, Function, Args}) when is_atom(Module), is_atom(Function), is_list(Args) ->
    ok;
check(gateway, Gateway) when not is_tuple(Gateway) ->
    %% The native library looks at it.
    ok;
check(listen, Opts) when is_map(Opts) ->
    case macula_peer_nif:check(listen, with_relay(Opts)) of
        {error, {invalid_option, Option}} -> {error, {invalid_option, {listen, Option}}};
        Result -> Result
    end;
check(resolver, none) ->
    ok;
check(resolver, Module) when is_atom(Module) ->
    case macula_peer_resolver:is_one(Module) of
        true -> ok;
        false -> {error, {invalid_option, {resolver, Module}}}
    end;
check(Takeover, Value) when Takeover =:= takeover orelse Takeover =:= takeover_pool, is_boolean(Value) ->
    ok;
check(Key, Value) ->
    {error, {invalid_option, {Key, Value}}}.

-spec wanted(term()) -> unicode:chardata().
wanted(Key) ->
    case maps:merge(?NATIVE, ?OWN) of
        #{Key := Wanted} -> ["; it takes ", Wanted];
        #{} -> ""
    end.

-spec first_error([fun(() -> ok | {error, Reason})]) -> ok | {error, Reason}.
first_error([Check | Checks]) ->
    case Check() of
        ok -> first_error(Checks);
        {error, _} = Error -> Error
    end;
first_error([]) ->
    ok.

%% ---- listening ----

%% The variables make a node that listens by its settings a relay, or say what the relay gives, where the options do not.
-spec listen(map()) -> macula_peer_node:listen_opts() | undefined.
listen(#{listen := Opts}) -> with_relay(Opts);
listen(#{}) -> undefined.

-spec with_relay(map()) -> map().
with_relay(#{relay := Limits} = Opts) when is_map(Limits) ->
    Opts#{relay := maps:merge(relay_limits(), Limits)};
with_relay(#{relay := _} = Opts) ->
    Opts;
with_relay(Opts) ->
    %% One says yes, and none no.
    case lists:usort([variable(Name, unset) || Name <- ["RELAY_ENABLED", "MACULA_NAT_RELAY_ENABLED"]]) -- [unset] of
        [true] -> Opts#{relay => relay_limits()};
        _ -> Opts
    end.

-spec relay_limits() -> map().
relay_limits() ->
    Limits = #{max_sessions => variable("MACULA_NAT_RELAY_MAX_SESSIONS", unset),
               bandwidth => variable("MACULA_NAT_RELAY_BANDWIDTH", unset)},
    maps:filter(fun(_Key, Value) -> Value =/= unset end, Limits).

%% ---- environment variables ----

-spec check_variables() -> ok | {error, macula_peer_error:settings()}.
check_variables() ->
    first_error([fun() -> check_variable(Name, Kind) end || {Name, Kind} <- lists:sort(maps:to_list(?VARIABLES))]).

-spec check_variable(string(), kind()) -> ok | {error, macula_peer_error:settings()}.
check_variable(Name, Kind) ->
    Value = os:getenv(Name, ""),
    case parse(Kind, Value) of
        wrong -> {error, {invalid_variable, {Name, Value}}};
        _ -> ok
    end.

%% Without a variable, or with one that is wrong, what is given instead.
-spec variable(string(), Value) -> boolean() | pos_integer() | production | development | Value.
variable(Name, Default) ->
    case parse(maps:get(Name, ?VARIABLES), os:getenv(Name, "")) of
        Nothing when Nothing =:= unset; Nothing =:= wrong -> Default;
        Value -> Value
    end.

-spec parse(kind(), string()) -> boolean() | pos_integer() | production | development | unset | wrong.
parse(Kind, Text) ->
    case {string:lowercase(string:trim(Text)), Kind} of
        {"", _} -> unset;
        {Mode, tls_mode} when Mode =:= "production"; Mode =:= "prod" -> production;
        {Mode, tls_mode} when Mode =:= "development"; Mode =:= "dev" -> development;
        {_, tls_mode} -> wrong;
        {Yes, boolean} when Yes =:= "true"; Yes =:= "1" -> true;
        {No, boolean} when No =:= "false"; No =:= "0" -> false;
        {_, boolean} -> wrong;
        {Digits, _} -> number(Kind, string:to_integer(Digits))
    end.

-spec number(positive | port, {integer(), string()} | {error, term()}) -> pos_integer() | wrong.
number(positive, {Number, ""}) when Number > 0 -> Number;
number(port, {Number, ""}) when Number > 0, Number < 65536 -> Number;
number(_Kind, _NoSuchNumber) -> wrong.

-spec takes(kind()) -> string().
takes(boolean) -> "true, 1, false or 0";
takes(tls_mode) -> "production or development";
takes(positive) -> "a number above 0";
takes(port) -> "a port from 1 to 65535".

-spec bootstrap_remarks() -> [unicode:chardata()].
bootstrap_remarks() ->
    [io_lib:format("in MACULA_BOOTSTRAP_PEERS, ~0tp is not host:port", [Peer])
     || {Why, Peer} <- checked_bootstrap_peers(), Why =/= ok].

-spec checked_bootstrap_peers() -> [{ok | invalid_bootstrap_format | invalid_bootstrap_port, string()}].
checked_bootstrap_peers() ->
    Entries = [string:trim(Peer) || Peer <- string:lexemes(os:getenv("MACULA_BOOTSTRAP_PEERS", ""), ",")],
    [{bootstrap_peer(Entry), Entry} || Entry <- Entries, Entry =/= ""].

-spec bootstrap_peer(string()) -> ok | invalid_bootstrap_format | invalid_bootstrap_port.
bootstrap_peer(Peer) ->
    case string:split(Peer, ":", trailing) of
        [_, Port] ->
            case string:to_integer(Port) of
                {Number, ""} when Number > 0, Number < 65536 -> ok;
                _ -> invalid_bootstrap_port
            end;
        _ ->
            invalid_bootstrap_format
    end.
