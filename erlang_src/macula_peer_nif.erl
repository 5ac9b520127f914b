%% @private
%% @doc The native library. Thin by rule: what these functions mean is said where they are called.
-module(macula_peer_nif).

-include("macula_peer_log.hrl").

-define(NIFS, [check/2, start/4, stop/0, retire/0, send/4, request/4, encode_frame/2, found/2, resolved/2,
               forget/1, register/2, unregister/0, listen/1, close/0, local_address/0, identity/0, set_handler/1,
               set_logger/1, reply/2, new_finisher/0, set_finisher/2, handed_over/1, invalidate/1, set_access/1,
               access/1, kick/2, relay_nodes/2, admitted/2, stats/1, path/1, nat_profile/1, encode/1, decode/1,
               decode_dirty/1]).

-export(?NIFS).
-nifs(?NIFS).

-export_type([ip_port/0, handler/0, released/0, finisher/0, frame/0, content/0, target_error/0, unfinished/0,
              admission_token/0]).

-on_load(init/0).

-define(APP, macula_peer_connector).
-define(LOAD_ERROR, {?MODULE, load_error}).

-type handler() :: pid() | {function, pid()} | undefined.
%% `function': the process that calls a function.
-type released() :: {released, pid() | none, Supervisor :: pid()}.
%% The process of the previous handler, if that was a function, and the supervisor of the engine's finisher.
-type ip_port() :: {inet:ip_address(), inet:port_number()}.

-opaque finisher() :: reference().
%% The place of the process that finishes messages.

-opaque frame() :: reference().
%% An encoded message.

-type content() :: {Type :: term(), Msg :: term()} | frame().
%% A message, or what encode_frame/2 made of it.

-type decoded() :: {ok, {macula_peer_wire:type(), term()}} | {unfinished, macula_peer_wire:type(), unfinished()}
                 | {error, macula_peer_wire:decode_error() | macula_peer_error:native()}.

-type target_error() :: macula_peer_error:endpoint() | macula_peer_error:invalid_node_id() | macula_peer_error:native().

-opaque admission_token() :: reference().
%% For the answer of a callback.

-type unfinished() :: term().
%% A term for macula_peer_finisher:finish/1.

%% A node whose library is missing keeps running, and every call says what is wrong. Loading fails only if the module
%% already runs with its library: libraries are not replaced, and the running module stays.
-spec init() -> ok | {error, {upgrade, string()}}.
init() ->
    %% Here, because nothing is logged before this module is loaded.
    ok = macula_peer_log:show(),
    Library = library(),
    case erlang:load_nif(Library, version()) of
        ok ->
            _ = persistent_term:erase(?LOAD_ERROR),
            ok;
        {error, {upgrade, Text}} ->
            {error, {upgrade, Text}};
        {error, {Reason, Text}} ->
            Message = io_lib:format("the native library ~ts.so was not loaded (~p: ~ts). ~ts",
                                    [Library, Reason, Text, advice(archive(Library))]),
            persistent_term:put(?LOAD_ERROR, {error, {nif_not_loaded, unicode:characters_to_binary(Message)}}),
            ?LOG_ERROR("~ts", [Message], ?DOMAIN)
    end.

-spec advice(none | file:filename_all()) -> io_lib:chars().
advice(none) ->
    io_lib:format("Build it on this machine, with `rebar3 compile` or `make nif`, from the same version of ~s, with Rust's "
                  "cargo in the PATH.", [?APP]);
advice(Archive) ->
    io_lib:format("~ts is an archive, and the system loads no library from inside one. Leave ~s out of the escript and "
                  "put its directory in ERL_LIBS, or make a release: docs/packaging.md.", [Archive, ?APP]).

%% An escript or .ez file in the path of a file.
-spec archive(file:filename_all()) -> none | file:filename_all().
archive(Path) ->
    case {filelib:is_regular(Path), filename:dirname(Path)} of
        {true, _} -> Path;
        {false, Path} -> none;
        {false, Above} -> archive(Above)
    end.

-spec library() -> file:filename_all().
library() ->
    Priv = case code:priv_dir(?APP) of
        {error, bad_name} -> filename:join(filename:dirname(filename:dirname(code:which(?MODULE))), "priv");
        Dir -> Dir
    end,
    filename:join(Priv, "macula_peer_nif").

%% The library refuses to load for another version than its own. The version is taken from the application's own file,
%% because nothing need be started or even loaded.
-spec version() -> string().
version() ->
    _ = application:load(?APP),
    case application:get_key(?APP, vsn) of
        {ok, Vsn} -> Vsn;
        undefined -> ""
    end.

-spec check(settings | listen, map()) -> ok | {error, macula_peer_error:invalid_option() | macula_peer_error:native()}.
check(_What, _Options) -> not_loaded().

-spec start(map(), {Supervisor :: pid(), finisher()}, handler(), map() | undefined) ->
          ok | {error, already_started | macula_peer_error:start()}.
start(_Options, _Finisher, _Handler, _Listen) -> not_loaded().

-spec stop() -> released() | not_started | {error, macula_peer_error:native()}.
stop() -> not_loaded().

-spec retire() -> released() | not_started | {error, macula_peer_error:native()}.
retire() -> not_loaded().

-spec send(reference(), term(), content(), term()) ->
          ok | wait | resolve | unlinked | heavy | not_started | {error, macula_peer_error:send_to_node()}.
send(_Tag, _To, _Content, _Timeout) -> not_loaded().

-spec request(reference(), term(), content(), term()) ->
          wait | resolve | unlinked | heavy | not_started | {error, macula_peer_error:send_to_node()}.
request(_Tag, _To, _Content, _Timeout) -> not_loaded().

-spec encode_frame(term(), term()) -> {ok, frame()} | {error, macula_peer_wire:encode_error() | macula_peer_error:native()}.
encode_frame(_Type, _Msg) -> not_loaded().

-spec found(term(), map()) -> ok | not_started | {error, macula_peer_error:send_to_node()}.
found(_NodeId, _Ways) -> not_loaded().

-spec resolved(term(), boolean()) -> ok | not_started | {error, macula_peer_error:invalid_node_id() | macula_peer_error:native()}.
resolved(_NodeId, _Answered) -> not_loaded().

-spec forget(term()) -> ok | not_started | {error, macula_peer_error:invalid_node_id() | macula_peer_error:native()}.
forget(_NodeId) -> not_loaded().

-spec register(term(), term()) ->
          ok | not_started | {error, macula_peer_error:invalid_node_id() | macula_peer_error:invalid_option() | macula_peer_error:native()}.
register(_NodeId, _Relays) -> not_loaded().

-spec unregister() -> ok | not_started | {error, macula_peer_error:native()}.
unregister() -> not_loaded().

-spec listen(map()) -> {ok, ip_port()} | not_started | {error, macula_peer_error:listen() | macula_peer_error:native()}.
listen(_Options) -> not_loaded().

-spec close() -> ok | not_started | {error, macula_peer_error:native()}.
close() -> not_loaded().

-spec local_address() -> {ok, ip_port()} | not_started | {error, gone | macula_peer_error:native()}.
local_address() -> not_loaded().

-spec identity() -> #{fingerprint := <<_:256>>} | not_started | {error, macula_peer_error:native()}.
identity() -> not_loaded().

-spec set_handler(handler()) -> released() | not_started | {error, macula_peer_error:native()}.
set_handler(_Handler) -> not_loaded().

-spec set_logger(pid()) -> ok | {error, macula_peer_error:native()}.
set_logger(_Logger) -> not_loaded().

-spec reply(term(), content()) -> ok | heavy | {error, macula_peer_error:reply()}.
reply(_Token, _Content) -> not_loaded().

-spec new_finisher() -> finisher() | {error, macula_peer_error:native()}.
new_finisher() -> not_loaded().

-spec set_finisher(finisher(), pid()) -> ok | {error, macula_peer_error:native()}.
set_finisher(_Finisher, _Pid) -> not_loaded().

-spec handed_over(reference()) -> ok | {error, macula_peer_error:native()}.
handed_over(_Receipt) -> not_loaded().

-spec path(macula_peer_call:target()) -> {ok, macula_peer_node:path()} | not_started | {error, target_error()}.
path(_Peer) -> not_loaded().

-spec invalidate(term()) -> ok | not_started | {error, target_error()}.
invalidate(_Endpoint) -> not_loaded().

-spec set_access(term()) -> ok | not_started | {error, macula_peer_error:invalid_option() | macula_peer_error:native()}.
set_access(_Access) -> not_loaded().

-spec access(reference()) -> wait | not_started | {error, macula_peer_error:native()}.
access(_Tag) -> not_loaded().

-spec kick(reference(), term()) -> wait | not_started | {error, {invalid_kick, term()} | macula_peer_error:native()}.
kick(_Tag, _Whom) -> not_loaded().

-spec relay_nodes(reference(), non_neg_integer()) -> wait | not_started | {error, macula_peer_error:native()}.
relay_nodes(_Tag, _From) -> not_loaded().

-spec admitted(admission_token(), allow | deny | timeout | crash) -> ok | {error, macula_peer_error:native()}.
admitted(_Token, _Answer) -> not_loaded().

-spec stats(reference()) -> wait | not_started | {error, macula_peer_error:native()}.
stats(_Tag) -> not_loaded().

-spec nat_profile(reference()) -> wait | not_started | {error, macula_peer_error:native()}.
nat_profile(_Tag) -> not_loaded().

-spec encode(content()) -> {ok, binary()} | heavy | {error, macula_peer_wire:encode_error() | macula_peer_error:native()}.
encode(_Content) -> not_loaded().

-spec decode(binary()) -> decoded() | heavy.
decode(_Frame) -> not_loaded().

-spec decode_dirty(binary()) -> decoded().
decode_dirty(_Frame) -> not_loaded().

%% Wider than the value, so that dialyzer does not take the result of the stubs for that of the NIFs.
-spec not_loaded() -> term().
not_loaded() ->
    persistent_term:get(?LOAD_ERROR, {error, {nif_not_loaded, <<"the native library was not loaded">>}}).
