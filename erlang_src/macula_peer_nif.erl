%% @private
%% @doc The native library. Thin by rule: what these functions mean is said where they are called.
-module(macula_peer_nif).

-export([check/2]).
-export([start/4]).
-export([stop/0]).
-export([retire/0]).
-export([send/5]).
-export([send_frame/4]).
-export([request/5]).
-export([request_frame/4]).
-export([encode_frame/2]).
-export([found/2]).
-export([resolved/2]).
-export([forget/1]).
-export([register/2]).
-export([unregister/0]).
-export([listen/1]).
-export([close/0]).
-export([local_address/0]).
-export([identity/0]).
-export([set_handler/1]).
-export([set_logger/1]).
-export([reply/3]).
-export([reply_frame/2]).
-export([new_finisher/0]).
-export([set_finisher/2]).
-export([handed_over/1]).
-export([invalidate/1]).
-export([set_access/1]).
-export([access/1]).
-export([kick/2]).
-export([relay_nodes/2]).
-export([admitted/2]).
-export([stats/1]).
-export([path/1]).
-export([nat_profile/1]).
-export([encode/2]).
-export([encode_dirty/2]).
-export([decode/1]).
-export([decode_dirty/1]).

-export_type([not_loaded/0, ip_port/0, handler/0, released/0, finisher/0, frame/0, unfinished/0, admission_token/0]).

-on_load(init/0).

-define(APP, macula_peer_connector).
-define(LOAD_ERROR, {?MODULE, load_error}).

-type not_loaded() :: {error, {nif_not_loaded, unicode:chardata()}}.
%% The library is missing or does not fit; the text says what to do.
-type handler() :: pid() | {function, pid()} | undefined.
%% `function': the process that calls a function.
-type released() :: {released, pid() | none, Supervisor :: pid()}.
%% The process of the previous handler, if that was a function, and the supervisor of the engine's finisher.
-type ip_port() :: {inet:ip_address(), inet:port_number()}.

-opaque finisher() :: reference().
%% The place of the process that finishes messages.

-opaque frame() :: reference().
%% An encoded message.

-opaque admission_token() :: reference().
%% For the answer of a callback.

-type unfinished() :: term().
%% A term for macula_peer_finisher:finish/1.

%% A node whose library is missing keeps running, and every call says what is wrong. Only where the module runs already
%% with its library does loading fail: libraries are not replaced, and the running module stays.
-spec init() -> ok | {error, term()}.
init() ->
    Library = library(),
    case erlang:load_nif(Library, version()) of
        ok ->
            _ = persistent_term:erase(?LOAD_ERROR),
            ok;
        {error, {upgrade, _}} = Error ->
            Error;
        {error, {Reason, Text}} ->
            Message = io_lib:format("the native library ~ts.so was not loaded (~p: ~ts). ~ts",
                                    [Library, Reason, Text, advice(archive(Library))]),
            persistent_term:put(?LOAD_ERROR, {error, {nif_not_loaded, unicode:characters_to_binary(Message)}}),
            logger:error("~ts", [Message])
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

-spec check(settings | listen, map()) -> ok | {error, term()}.
check(_What, _Options) -> not_loaded().

-spec start(map(), {Supervisor :: pid(), finisher()}, handler(), map() | undefined) -> ok | {error, term()}.
start(_Options, _Finisher, _Handler, _Listen) -> not_loaded().

-spec stop() -> released() | not_started | not_loaded().
stop() -> not_loaded().

-spec retire() -> released() | not_started | not_loaded().
retire() -> not_loaded().

-spec send(reference(), term(), term(), term(), term()) -> ok | wait | resolve | unlinked | heavy | not_started | {error, term()}.
send(_Tag, _To, _Type, _Msg, _Timeout) -> not_loaded().

-spec send_frame(reference(), term(), frame(), term()) -> ok | wait | resolve | unlinked | not_started | {error, term()}.
send_frame(_Tag, _To, _Frame, _Timeout) -> not_loaded().

-spec request(reference(), term(), term(), term(), term()) -> wait | resolve | unlinked | heavy | not_started | {error, term()}.
request(_Tag, _To, _Type, _Msg, _Timeout) -> not_loaded().

-spec request_frame(reference(), term(), frame(), term()) -> wait | resolve | unlinked | not_started | {error, term()}.
request_frame(_Tag, _To, _Frame, _Timeout) -> not_loaded().

-spec encode_frame(term(), term()) -> {ok, frame()} | {error, term()}.
encode_frame(_Type, _Msg) -> not_loaded().

-spec found(term(), map()) -> ok | not_started | {error, term()}.
found(_NodeId, _Ways) -> not_loaded().

-spec resolved(term(), boolean()) -> ok | not_started | {error, term()}.
resolved(_NodeId, _Answered) -> not_loaded().

-spec forget(term()) -> ok | not_started | {error, term()}.
forget(_NodeId) -> not_loaded().

-spec register(term(), term()) -> ok | not_started | {error, term()}.
register(_NodeId, _Relays) -> not_loaded().

-spec unregister() -> ok | not_started | not_loaded().
unregister() -> not_loaded().

-spec listen(map()) -> {ok, ip_port()} | not_started | {error, term()}.
listen(_Options) -> not_loaded().

-spec close() -> ok | not_started | not_loaded().
close() -> not_loaded().

-spec local_address() -> {ok, ip_port()} | not_started | {error, term()}.
local_address() -> not_loaded().

-spec identity() -> #{fingerprint := <<_:256>>} | not_started | not_loaded().
identity() -> not_loaded().

-spec set_handler(handler()) -> released() | not_started | not_loaded().
set_handler(_Handler) -> not_loaded().

-spec set_logger(pid()) -> ok | not_loaded().
set_logger(_Logger) -> not_loaded().

-spec reply(term(), term(), term()) -> ok | heavy | {error, term()}.
reply(_Token, _Type, _Msg) -> not_loaded().

-spec reply_frame(term(), frame()) -> ok | {error, term()}.
reply_frame(_Token, _Frame) -> not_loaded().

-spec new_finisher() -> finisher() | not_loaded().
new_finisher() -> not_loaded().

-spec set_finisher(finisher(), pid()) -> ok | not_loaded().
set_finisher(_Finisher, _Pid) -> not_loaded().

-spec handed_over(reference()) -> ok | not_loaded().
handed_over(_Receipt) -> not_loaded().

-spec path(macula_peer_call:target()) -> {ok, map()} | {error, term()} | not_started | not_loaded().
path(_Peer) -> not_loaded().

-spec invalidate(term()) -> ok | not_started | {error, term()}.
invalidate(_Endpoint) -> not_loaded().

-spec set_access(term()) -> ok | not_started | {error, term()}.
set_access(_Access) -> not_loaded().

-spec access(reference()) -> wait | not_started | not_loaded().
access(_Tag) -> not_loaded().

-spec kick(reference(), term()) -> wait | not_started | {error, term()}.
kick(_Tag, _Whom) -> not_loaded().

-spec relay_nodes(reference(), non_neg_integer()) -> wait | not_started | not_loaded().
relay_nodes(_Tag, _From) -> not_loaded().

-spec admitted(admission_token(), allow | deny | timeout | crash) -> ok | not_loaded().
admitted(_Token, _Answer) -> not_loaded().

-spec stats(reference()) -> wait | not_started | not_loaded().
stats(_Tag) -> not_loaded().

-spec nat_profile(reference()) -> wait | not_started | not_loaded().
nat_profile(_Tag) -> not_loaded().

-spec encode(term(), term()) -> {ok, binary()} | heavy | {error, term()}.
encode(_Type, _Msg) -> not_loaded().

-spec encode_dirty(term(), term()) -> {ok, binary()} | {error, term()}.
encode_dirty(_Type, _Msg) -> not_loaded().

-spec decode(binary()) -> {ok, {macula_peer_wire:type(), term()}} | {unfinished, macula_peer_wire:type(), unfinished()}
                        | heavy | {error, term()}.
decode(_Frame) -> not_loaded().

-spec decode_dirty(binary()) -> {ok, {macula_peer_wire:type(), term()}}
                              | {unfinished, macula_peer_wire:type(), unfinished()} | {error, term()}.
decode_dirty(_Frame) -> not_loaded().

%% The type is wider than the value: what stands in for these functions says nothing about them.
-spec not_loaded() -> term().
not_loaded() ->
    persistent_term:get(?LOAD_ERROR, {error, {nif_not_loaded, <<"the native library was not loaded">>}}).
