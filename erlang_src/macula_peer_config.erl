%% @private
%% @doc What this node is told: the application environment of `macula_peer_connector', and the environment variables that
%% macula's operators set. This is the one place where they are read and checked, all of them before anything starts. The
%% application environment wins over a variable.
-module(macula_peer_config).

-export([read/0]).
-export([listen_options/1]).
-export([gateway_port/0]).
-export([bootstrap_peers/0]).
-export([wrong_bootstrap_peers/0]).
-export([format_error/1]).

-export_type([settings/0, reason/0]).

-define(APP, macula_peer_connector).

-type settings() :: #{native := map(), handler := macula_peer_endpoint:handler() | undefined,
                      listen := macula_peer_endpoint:listen_opts() | undefined, resolver := module() | none}.
%% `native' is for the native library.

-type reason() :: {invalid_option, {Key :: term(), Value :: term()}} | {unknown_option, Key :: atom()}
                | {invalid_variable, {Name :: string(), Value :: string()}}.
%% Of an unknown option no value is told: its name may be that of a secret, mistyped.

%% The gateway's port, as in macula.
-define(GATEWAY_PORT, 9443).

%% What the native library is told, and what it takes.
-define(NATIVE, #{ip => "an address as in inet:ip_address()",
                  port => "a UDP port from 0 to 65535",
                  max_frame_size => "a number of bytes above 0",
                  max_nesting => "a number above 0",
                  node_id => "a binary of 1 to 255 bytes",
                  relays => "a list of at most 64 endpoints, each \"host:port\"",
                  hole_punching => "on, plain or off",
                  pool_size => "a number above 0",
                  idle_timeout => "milliseconds, from 1 to a day",
                  keep_alive => "milliseconds, from 1 to a day",
                  connect_timeout => "milliseconds, from 1 to a day",
                  delivery => "at_least_once or at_most_once",
                  max_unacknowledged => "a number of bytes above 0",
                  answer_timeout => "milliseconds, from 1 to a day",
                  workers => "a number above 0",
                  identity_file => "the name of a file",
                  verify => "none, {pin, Fingerprints} or {cacertfile, File}",
                  realm_secret => "a binary that is not empty",
                  max_accepted => "a number above 0",
                  max_streams => "a number above 0",
                  frame_timeout => "milliseconds, from 1 to a day"}).

%% What is ours.
-define(OWN, #{takeover => "true or false", takeover_pool => "true or false",
               gateway => "auto, none or an endpoint", listen => "options of macula_peer_endpoint:listen/1 but the handler",
               handler => "a process of this node or {Module, Function, Args}",
               resolver => "a module with callbacks of macula_peer_resolver, or none"}).

%% The variables that are checked at the start. What is wrong with MACULA_BOOTSTRAP_PEERS is told by each call that needs
%% one of them, as in macula, and logged.
-define(VARIABLES, #{"RELAY_ENABLED" => boolean,
                     "MACULA_NAT_RELAY_ENABLED" => boolean,
                     "MACULA_NAT_RELAY_MAX_SESSIONS" => positive,
                     "MACULA_NAT_RELAY_BANDWIDTH" => positive,
                     "MACULA_NAT_ENABLED" => boolean,
                     "MACULA_NAT_PUNCH_ENABLED" => boolean,
                     "MACULA_QUIC_PORT" => port}).

%% @doc All settings, or what is wrong with the first that is.
-spec read() -> {ok, settings()} | {error, reason() | term()}.
read() ->
    %% Nothing need be started or loaded.
    _ = application:load(?APP),
    Env = maps:without([included_applications], maps:from_list(application:get_all_env(?APP))),
    Native = native(Env),
    Checks = [fun check_variables/0,
              fun() -> check_known(Env) end,
              fun() -> check_own(Env) end,
              fun() -> macula_peer_nif:check(settings, Native) end],
    case {first_error(Checks), listen(Env)} of
        {ok, {ok, Listen}} ->
            {ok, #{native => Native, handler => maps:get(handler, Env, undefined), listen => Listen,
                   resolver => maps:get(resolver, Env, macula_peer_resolver_macula)}};
        {ok, Error} ->
            Error;
        {Error, _} ->
            Error
    end.

%% @doc The options of `listen/1' for a node that listens by its settings: the variables make it a relay, or say what the
%% relay gives, where the options do not.
-spec listen_options(term()) -> {ok, macula_peer_endpoint:listen_opts()} | {error, reason() | term()}.
listen_options(Opts) when is_map(Opts) ->
    case check_variables() of
        ok -> checked_listen_options(with_relay(Opts));
        {error, _} = Error -> Error
    end;
listen_options(Opts) ->
    {error, {invalid_option, {listen, Opts}}}.

%% @doc The port that macula's gateway on this host listens at. Never ours.
-spec gateway_port() -> inet:port_number().
gateway_port() ->
    variable("MACULA_QUIC_PORT", ?GATEWAY_PORT).

%% @doc Every entry of `MACULA_BOOTSTRAP_PEERS' that is an endpoint, and what is wrong where there is none.
-spec bootstrap_peers() -> {[string()], no_bootstrap_peers | invalid_bootstrap_format | invalid_bootstrap_port}.
bootstrap_peers() ->
    Checked = checked_bootstrap_peers(),
    Reason = case Checked of
        [{Why, _} | _] when Why =/= ok -> Why;
        _ -> no_bootstrap_peers
    end,
    {[Peer || {ok, Peer} <- Checked], Reason}.

%% @doc Every entry that is none.
-spec wrong_bootstrap_peers() -> [string()].
wrong_bootstrap_peers() ->
    [Peer || {Why, Peer} <- checked_bootstrap_peers(), Why =/= ok].

%% @doc A sentence for the log.
-spec format_error(term()) -> unicode:chardata().
format_error({invalid_option, {Key, Value}}) ->
    io_lib:format("the setting ~0tp has the wrong value ~0tP~ts", [Key, Value, 30, wanted(Key)]);
format_error({unknown_option, Key}) ->
    io_lib:format("there is no setting ~0tp", [Key]);
format_error({invalid_variable, {Name, Value}}) ->
    Wanted = maps:get(Name, ?VARIABLES),
    io_lib:format("the environment variable ~ts has the wrong value ~0tp; it takes ~ts", [Name, Value, takes(Wanted)]);
format_error(Reason) ->
    io_lib:format("~0tP", [Reason, 30]).

%% ---- the application environment ----

-spec native(map()) -> map().
native(Env) ->
    Variables = case variable("MACULA_NAT_ENABLED", true) andalso variable("MACULA_NAT_PUNCH_ENABLED", true) of
        true -> #{};
        false -> #{hole_punching => off}
    end,
    Gateway = case maps:get(gateway, Env, auto) of
        auto -> {auto, "127.0.0.1:" ++ integer_to_list(gateway_port())};
        Setting -> Setting
    end,
    maps:merge(Variables#{gateway => Gateway}, maps:with(maps:keys(?NATIVE), Env)).

-spec check_known(map()) -> ok | {error, reason()}.
check_known(Env) ->
    case maps:keys(maps:without(maps:keys(maps:merge(?NATIVE, ?OWN)), Env)) of
        [] -> ok;
        [Key | _] -> {error, {unknown_option, Key}}
    end.

-spec check_own(map()) -> ok | {error, reason()}.
check_own(Env) ->
    first_error([fun() -> check(Key, Value) end || {Key, Value} <- maps:to_list(maps:with(maps:keys(?OWN), Env))]).

-spec check(atom(), term()) -> ok | {error, reason()}.
check(Switch, On) when Switch =:= takeover orelse Switch =:= takeover_pool, is_boolean(On) ->
    ok;
check(listen, _Opts) ->
    %% By itself: the variables have a part in it.
    ok;
check(gateway, Setting) when not is_tuple(Setting) ->
    %% An endpoint, which the native library knows; a tuple is what it gets for `auto'.
    ok;
check(handler, undefined) ->
    ok;
check(handler, Pid) when is_pid(Pid), node(Pid) =:= node() ->
    ok;
check(handler, {Module, Function, Args}) when is_atom(Module), is_atom(Function), is_list(Args) ->
    ok;
check(resolver, none) ->
    ok;
check(resolver, Module) when is_atom(Module) ->
    case macula_peer_resolver:is_one(Module) of
        true -> ok;
        false -> {error, {invalid_option, {resolver, Module}}}
    end;
check(Key, Value) ->
    {error, {invalid_option, {Key, Value}}}.

-spec wanted(term()) -> unicode:chardata().
wanted(Key) ->
    case maps:merge(?NATIVE, ?OWN) of
        #{Key := Wanted} -> ["; it takes ", Wanted];
        #{} -> ""
    end.

-spec first_error([fun(() -> ok | {error, term()})]) -> ok | {error, term()}.
first_error([Check | Checks]) ->
    case Check() of
        ok -> first_error(Checks);
        {error, _} = Error -> Error
    end;
first_error([]) ->
    ok.

%% ---- listening ----

-spec listen(map()) -> {ok, macula_peer_endpoint:listen_opts() | undefined} | {error, reason() | term()}.
listen(#{listen := #{handler := Handler}}) ->
    %% A setting of its own.
    {error, {invalid_option, {listen, {handler, Handler}}}};
listen(#{listen := Opts}) ->
    case listen_options(Opts) of
        {error, {invalid_option, {listen, _}}} = Error -> Error;
        {error, {invalid_option, Option}} -> {error, {invalid_option, {listen, Option}}};
        Result -> Result
    end;
listen(#{}) ->
    {ok, undefined}.

-spec checked_listen_options(map()) -> {ok, macula_peer_endpoint:listen_opts()} | {error, reason() | term()}.
checked_listen_options(Opts) ->
    Checks = [fun() -> check(handler, maps:get(handler, Opts, undefined)) end,
              fun() -> macula_peer_nif:check(listen, maps:remove(handler, Opts)) end],
    case first_error(Checks) of
        ok -> {ok, Opts};
        {error, _} = Error -> Error
    end.

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

-spec check_variables() -> ok | {error, reason()}.
check_variables() ->
    first_error([fun() -> check_variable(Name, Kind) end || {Name, Kind} <- lists:sort(maps:to_list(?VARIABLES))]).

-spec check_variable(string(), boolean | positive | port) -> ok | {error, reason()}.
check_variable(Name, Kind) ->
    Value = os:getenv(Name, ""),
    case parse(Kind, Value) of
        wrong -> {error, {invalid_variable, {Name, Value}}};
        _ -> ok
    end.

%% Without a variable, or with one that is wrong, what is given instead.
-spec variable(string(), Value) -> boolean() | pos_integer() | Value.
variable(Name, Default) ->
    case parse(maps:get(Name, ?VARIABLES), os:getenv(Name, "")) of
        Nothing when Nothing =:= unset; Nothing =:= wrong -> Default;
        Value -> Value
    end.

-spec parse(boolean | positive | port, string()) -> boolean() | pos_integer() | unset | wrong.
parse(Kind, Text) ->
    case {string:lowercase(string:trim(Text)), Kind} of
        {"", _} -> unset;
        {Yes, boolean} when Yes =:= "true"; Yes =:= "1" -> true;
        {No, boolean} when No =:= "false"; No =:= "0" -> false;
        {_, boolean} -> wrong;
        {Digits, _} -> number(Kind, string:to_integer(Digits))
    end.

-spec number(positive | port, {integer(), string()} | {error, term()}) -> pos_integer() | wrong.
number(positive, {Number, ""}) when Number > 0 -> Number;
number(port, {Number, ""}) when Number > 0, Number < 65536 -> Number;
number(_Kind, _NoSuchNumber) -> wrong.

-spec takes(boolean | positive | port) -> string().
takes(boolean) -> "true, 1, false or 0";
takes(positive) -> "a number above 0";
takes(port) -> "a port from 1 to 65535".

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
