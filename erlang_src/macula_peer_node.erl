%% @doc This node: listening, answering, registering, and what goes on in it.
%%
%% == Messages to the handler ==
%% The handler is a process, or a function that is called with each message by one process of its own. It gets:
%% <dl>
%%   <dt>`{macula_peer_message, #{type, message, from, path, dialect, key, reply_to}}'</dt>
%%   <dd>A message arrived: see {@link inbound()}.</dd>
%%   <dt>`{macula_peer_event, #{event := undelivered, peer, count, reason}}'</dt>
%%   <dd>`count' messages to `peer', an endpoint, `{node, NodeId}' or `{gateway, Endpoint}' (what arrived for macula's gateway on
%%       this host), for which `ok' had been returned, did not arrive as
%%       far as can be known. `reason' is `expired' (the timeout passed), `connection_closed' (the link died and `delivery'
%%       is `at_most_once'), `session_lost' (the peer no longer knew the session when there was a link again, so whether they
%%       have arrived cannot be known), `{rejected, Why}' (the peer does not take it: `too_large',
%%       `too_deep', `too_many_terms', `malformed', `too_slow' or `unread'), `untrusted_peer' (the node that was reached has another
%%       key than the `fingerprint' in the call, or than the one that the node id is bound to: see {@link forget/1}) or
%%       `stopped' (this engine was stopped).</dd>
%%   <dt>`{macula_peer_event, #{event := registration, relay, state, reason}}'</dt>
%%   <dd>This node at a relay: `state' is `registered', `lost' (over; it is tried again while it is wanted) or `refused' (it
%%       is tried again after a longer time); then `reason' is the relay's, such as `node_id_taken', `realm', `registrations',
%%       `accept_rate' or `taken_over' (another node uses this node's key), otherwise `none'.</dd>
%%   <dt>`{macula_peer_event, #{event := path, peer, path, failed}}'</dt>
%%   <dd>Messages to a node, `peer', take another path than before, or a better one than theirs was looked for in vain: see {@link
%%       path()}.</dd>
%%   <dt>`{macula_peer_event, #{event := relay_limit, relay, limit}}'</dt>
%%   <dd>A relay dropped packets of a circuit of this node: of `bandwidth', `packet_queue' or `packet_size' there was too
%%       much. They are sent again, more slowly.</dd>
%%   <dt>`{macula_peer_event, #{event := nat_profile, mapping_policy, filtering_policy, allocation_policy,
%%       reflexive_address, local_addresses, detected_at}}'</dt>
%%   <dd>What is known of the NAT that this node is behind, or where others see it, has changed: see {@link
%%       nat_profile()}.</dd>
%%   <dt>`{macula_peer_event, #{event := session_restarted, from, key}}'</dt>
%%   <dd>The sender at `from' goes on with messages to a node that was here before: this one was restarted, and what that
%%       one got and did not acknowledge comes again.</dd>
%% </dl>
-module(macula_peer_node).

-export([listen/1]).
-export([close/0]).
-export([local_address/0]).
-export([identity/0]).
-export([register/2]).
-export([unregister/0]).
-export([forget/1]).
-export([request/4]).
-export([request/5]).
-export([set_handler/1]).
-export([reply/3]).
-export([set_access/1]).
-export([access/0]).
-export([kick/1]).
-export([relay_nodes/0]).
-export([relay_nodes/1]).
-export([stats/0]).
-export([path/1]).
-export([nat_profile/0]).
-export([which/0]).
-export([start/0]).
-export([stop/0]).

-export_type([access/0, access_list/0, admission_question/0, relay_node/0, listen_opts/0, relay_opts/0, handler/0, verify/0, fingerprint/0, inbound/0, reply_token/0, stats/0,
              nat_profile/0, path/0]).

-type handler() :: pid() | {module(), atom(), [term()]}.
%% The function gets the message as its first argument, before the listed ones.

-type listen_opts() :: #{port => inet:port_number(), ip => inet:ip_address(), certfile => file:filename(),
                         keyfile => file:filename(), verify => verify(), relay => relay_opts(),
                         key_share => 1..100, address_share => 1..100, handshake_rate => pos_integer(),
                         admission => {module(), atom(), [term()]}, admission_timeout => pos_integer(),
                         admission_cache => non_neg_integer(), handler => handler()}.
%% Without `port', or with 0, the port that the one socket has already, or any port where `ip' is another address than the
%% socket's. Without `ip' the addresses that the socket has. Live links move along. Without `certfile' and `keyfile' (PEM) the
%% engine's own certificate is shown. When the files are replaced, connections that begin two seconds later see the new
%% certificate. `verify' says who may connect; without it the application's setting does. With `relay' this node is a relay for
%% others.
%%
%% `key_share' (10) and `address_share' (50) are what one key, and one IPv4 address or 64 bits of an IPv6 address, may have of
%% `max_accepted' connections, in percent. An address may have as much of `handshake_rate' (500), the handshakes that may begin in
%% a second.
%%
%% `admission' is a function that is asked about everybody who connects, before anything of theirs is handled, and about every
%% registration, where this node is a relay. It is called with an {@link admission_question()} and `Args', and answers `allow',
%% `deny' or `{deny, Reason}', within `admission_timeout' milliseconds (1,000, at most 60,000). A node that is not allowed is refused; so is
%% everybody whom it does not answer about in time, or fails for. Its answers hold for `admission_cache' milliseconds (60,000; 0:
%% for one question) for the same key, IP address, path and node id.

-type relay_opts() :: #{max_registrations => pos_integer(), max_sessions => pos_integer(),
                        max_sessions_per_node => pos_integer(), key_share => 1..100, address_share => 1..100,
                        bandwidth => pos_integer(),
                        packet_queue => pos_integer(), max_packet => pos_integer(), accept_rate => pos_integer(),
                        idle_timeout => pos_integer(), grace => non_neg_integer(), realm_secret => binary(),
                        probe_port => inet:port_number(), probe_ip => inet:ip_address()}.
%% What a relay gives at most: nodes registered (10,000), circuits in all (100, as in the original), and of one node those that
%% it opens and those to it (20 of each); what one key (25) and one address (50) may have of these, in percent;
%% bytes a second of a circuit (1,000,000), bytes that wait to be sent to a node (64 KiB), bytes of a packet (1,500),
%% registrations a second (100), milliseconds without a packet before a circuit ends (30 minutes) and for which a node id is
%% kept for its key after its registration ended (5 minutes). With `realm_secret' only nodes that know it are registered.
%% `probe_port' (0: any) is the second UDP port, by which nodes find out what their NATs are like; `probe_ip' is
%% another address of the host, from which the relay also answers there: that tells them more.

-type admission_question() :: #{kind := connection | registration, key := fingerprint() | undefined,
                                address := {inet:ip_address(), inet:port_number()}, path := direct | hole_punch | relay,
                                node_id => binary()}.
%% `key' is `undefined' for clients of 0.14.3, which show none. With the path `relay' the `address' is the relay's. A
%% registration has a `node_id'.

-type access_list() :: #{keys => [fingerprint() | HexDigits :: binary() | string()], node_ids => [binary()],
                         networks => [Prefix :: binary() | string() | inet:ip_address()]}.
%% Keys of nodes, node ids of those that register here, and networks such as `"192.0.2.0/24"', `"2001:db8::/32"' or one address.

-type access() :: #{allow => access_list(), deny => access_list()}.
%% Which nodes may connect to this one. What is denied may not; where `allow' has a list of a kind, only its entries may.

-type relay_node() :: #{node_id := binary(), key := fingerprint(), address := {inet:ip_address(), inet:port_number()},
                        since := non_neg_integer(), circuits := non_neg_integer(), peers := [binary()],
                        sent := #{packets := non_neg_integer(), bytes := non_neg_integer()},
                        received := #{packets := non_neg_integer(), bytes := non_neg_integer()}}.
%% A node that is registered at this relay, since a time in milliseconds of system time. `peers' are the node ids at the other ends of its
%% circuits, at most 32 of them. What the relay has passed on for it, since it registered, it has `sent' or `received'.

-type fingerprint() :: <<_:256>>.
%% What a node is known by: the SHA-256 of its public key's SubjectPublicKeyInfo in DER.

-type verify() :: first_seen | none | {pin, [fingerprint() | HexDigits :: binary() | string()]}
                | {cacertfile, file:filename()} | {cacertfile, file:filename(), any_name}.
%% Which certificates are accepted: any, one with one of these keys, or one that leads to an authority in this PEM file and, when
%% a peer is dialled, is for its host, unless it may be for `any_name'. With `pin' and `cacertfile' peers that connect must show
%% one, which 0.14.3 clients cannot. With `first_seen', the default, any will do, and a node id belongs to the key that it was
%% first seen with.

-opaque reply_token() :: reference().

-type inbound() :: #{type := macula_peer_wire:type(), message := term(), from := {inet:ip_address(), inet:port_number()},
                     path := direct | hole_punch | relay, dialect := macula | 'macula-peer/1',
                     key := fingerprint() | undefined,
                     reply_to := reply_token() | none}.
%% `from' is the address that the packets came from: with the path `relay' the relay's. `key' is the sender's, which nobody
%% else has; in the dialect `macula' there is none. `reply_to' is `none' when the sender reads no answer.

-type stats() :: #{peers := [map()], accepted := [map()], pool := map(), verify_none_links := non_neg_integer(),
                   undelivered := non_neg_integer(), unhandled := non_neg_integer(), malformed := non_neg_integer(),
                   refused := #{atom() => non_neg_integer()}, sessions := non_neg_integer(),
                   admission := map(), registrations := [map()], relay => map(), gateway => map()}.
%% `peers': `endpoint' or `node_id', `path' (`direct', `hole_punch', `relay' or `none'), `sent', `acknowledged', `received', `failed', `dials',
%% `unacknowledged_bytes', and while there is a link `dialect', `address' and `round_trip_us'. `accepted': `dialect',
%% `path', `address', `round_trip_us', `received'. `sessions': those of senders that are
%% known here. `refused': what a limit did not allow, by its name: connections that were not let in, `connections', `connections_per_key',
%% `connections_per_address', `handshake_rate' and `handshake_rate_per_address'; sessions that were not let in or were forgotten for others,
%% `sessions'; requests, and answers kept for them, that were forgotten for others, `requests' and `kept_answers'; and frames that
%% had to wait for memory, `frame_memory'. `registrations': `relay', `state', `reason', `address' (what the relay
%% sees this node at), `circuits'. `relay', of a relay: `registrations', `circuits', `forwarded_packets',
%% `forwarded_bytes', `refused' and `dropped' by limit, `stray' (packets of no circuit of the sender), `unread' (nodes that
%% did not read), `punches' and `punched' (direct paths looked for, and found). `gateway', unless the setting is `none':
%% `endpoint', `handed_over', `answered' (answers sent on) and `fallen_back' (messages that macula_gateway or the handler got
%% instead). `admission': `asked' and `remembered', questions that the callback was asked and that it had answered before, and
%% `refused', how many were not let in or had to leave, by reason: `network', `key', `node_id' (see {@link set_access/1}), `kicked',
%% `callback', `timeout', `crash' and `busy' (too many questions waited). `pool': the original's `hits', `misses', `evictions', `total', `hit_rate' and
%% `pool_size'.

-type path() :: #{path := direct | hole_punch | relay | none,
                  failed := #{direct => term(), hole_punch => term(), relay => term()},
                  dialect => macula | 'macula-peer/1', address => {inet:ip_address(), inet:port_number()},
                  round_trip_us => non_neg_integer()}.
%% `direct': straight to the peer, which this node dialled or which dialled this node. `hole_punch': straight, through NATs or
%% firewalls that both sides have opened. `relay': through a relay, whose address `address' is then.
%% `failed': why paths could not be had since there was last a direct one, with the reasons of failed calls. For `hole_punch':
%% `both_hard' (neither NAT gives ports that the other side could know), `timeout' (nothing came through), `not_allowed' (the
%% setting `hole_punching' of one side is `off', or `plain' where that is not enough), `hole_punch_skipped', `busy' (one side makes as
%% many attempts as it may), `interrupted' (the socket of one side moved meanwhile), `{relay_setup_failed, Reason}' and
%% `{relay_connect_failed, Reason}' (no relay helped), `{connect_failed, Reason}'.

-type nat_profile() :: #{mapping_policy := ei | hd | pd | unknown, filtering_policy := ei | hd | pd | unknown,
                         allocation_policy := pp | pc | rd | unknown,
                         reflexive_address := {inet:ip_address(), inet:port_number()} | undefined,
                         local_addresses := [{inet:ip_address(), inet:port_number()}],
                         detected_at := non_neg_integer() | undefined}.
%% The NAT that this node is behind, in the original's words. Whether it gives the one socket the same port for everybody
%% (`ei'), one for each host (`hd') or one for each port of a host (`pd'); whether it lets in everybody, the hosts that the
%% socket has sent to, or their ports alone; whether it keeps the port of a socket (`pp'), gives one port after the other
%% (`pc') or any (`rd'). Without a NAT that is `ei', `ei' and `pp'. `reflexive_address' is where relays see the socket,
%% `local_addresses' are the host's own, without loopback and link-local ones, and `detected_at' is when it was found out,
%% in milliseconds of system time.

%% @doc Accepts connections. Returns the local address.
%%
%% Errors: `already_listening', `{listen_failed, inet:posix()}', `{listen_failed, {gateway_port, Port}}', `{bad_certificate, Text}', `{listen_failed,
%% {cacertfile, Reason}}', `{invalid_option, {Key, Value}}'.
-spec listen(listen_opts()) -> {ok, {inet:ip_address(), inet:port_number()}} | {error, term()}.
listen(Opts) when is_map(Opts) ->
    Listen = fun() ->
        ok = macula_peer_admission:prepare(Opts),
        macula_peer_nif:listen(maps:remove(handler, Opts))
    end,
    case maps:find(handler, Opts) of
        {ok, Handler} ->
            case set_handler(Handler) of
                ok -> macula_peer_engine:running(Listen);
                {error, _} = Error -> Error
            end;
        error ->
            macula_peer_engine:running(Listen)
    end;
listen(Opts) ->
    {error, {invalid_option, {options, Opts}}}.

%% @doc Stops accepting and ends the accepted connections. The socket and its port stay.
-spec close() -> ok | {error, term()}.
close() ->
    case macula_peer_nif:close() of
        not_started -> ok;
        Result -> Result
    end.

%% @doc The address of the one socket, which listens, dials and is seen by others. Returns `{error, not_started}' where no engine
%% runs, as do the other functions that only look: {@link identity/0}, {@link stats/0}, {@link path/1} and {@link nat_profile/0}.
-spec local_address() -> {ok, {inet:ip_address(), inet:port_number()}} | {error, term()}.
local_address() ->
    macula_peer_engine:figures(fun macula_peer_nif:local_address/0).

%% @doc Who this node is to others. The same at every start where `identity_file' is set.
-spec identity() -> #{fingerprint := fingerprint()} | {error, term()}.
identity() ->
    macula_peer_engine:figures(fun macula_peer_nif:identity/0).

%% @doc Keeps this node registered under a node id at these relays, and at no others, so that others reach it through
%% them. Returns at once; an event tells the handler when it is registered, and {@link stats/0} says so too. A node id
%% belongs to the key that registers it; keep the key with the setting `identity_file'. From now on, and until {@link
%% unregister/0}, this is the node's id: it refuses messages for any other, also those that come directly, and also where the list
%% of relays is empty.
-spec register(binary(), [macula_peer_connector:endpoint()]) -> ok | {error, term()}.
register(NodeId, Relays) ->
    macula_peer_engine:running(fun() -> macula_peer_nif:register(NodeId, Relays) end).

%% @doc Ends the registrations.
-spec unregister() -> ok | {error, term()}.
unregister() ->
    macula_peer_engine:running(fun macula_peer_nif:unregister/0).

%% @doc Forgets which key a node has. This node accepts for a node id only the key that it first saw with it. A node that was
%% restarted without its `identity_file' has a new key: it is refused with `untrusted_peer', and a warning in the log names it.
%% After this call another key is accepted, and remembered once it has proved to serve the id. A link to the node is closed; what
%% is on its way over it is sent again over the next one.
%%
%% With the setting `known_keys_file' the key is removed from the file too. A node that changes its key with
%% `previous_identity_files' need not be forgotten.
%%
%% Make sure that it is the right node: a refusal can also mean that somebody else has taken its address or its node id.
%%
%% Errors: `{invalid_node_id, Term}'.
-spec forget(binary()) -> ok | {error, term()}.
forget(NodeId) ->
    case macula_peer_nif:forget(NodeId) of
        not_started -> forget_kept(NodeId);
        Result -> Result
    end.

-spec forget_kept(binary()) -> ok | {error, term()}.
forget_kept(NodeId) ->
    case application:get_env(macula_peer_connector, known_keys_file) of
        %% Without an engine nothing is remembered.
        undefined -> ok;
        {ok, _} -> macula_peer_engine:running(fun() -> macula_peer_nif:forget(NodeId) end)
    end.

%% @equiv request(NodeId, Type, Msg, Timeout, #{})
-spec request(binary(), macula_peer_wire:type(), map(), timeout()) ->
          {ok, {macula_peer_wire:type(), map()}} | {error, term()}.
request(NodeId, Type, Msg, Timeout) ->
    request(NodeId, Type, Msg, Timeout, #{}).

%% @doc Sends a message to a node, wherever it is, and waits for the answer:
%% {@link macula_peer_connector:send_message_and_wait/4} with the paths and options of
%% {@link macula_peer_connector:send_message_nat_aware/5}.
-spec request(binary(), macula_peer_wire:type(), map(), timeout(), macula_peer_connector:nat_opts()) ->
          {ok, {macula_peer_wire:type(), map()}} | {error, term()}.
request(NodeId, Type, Msg, Timeout, Opts) when is_map(Opts) ->
    macula_peer_path:call(NodeId, Opts#{timeout => Timeout},
                          fun(To, Left) -> macula_peer_call:request(To, Type, Msg, Left) end);
request(_NodeId, _Type, _Msg, _Timeout, Opts) ->
    {error, {invalid_option, {options, Opts}}}.

%% @doc Sets who gets what arrives: messages to the listener, and answers to messages that were sent without waiting.
%% Without a handler that is macula's gateway on this host, as the setting `gateway' says.
-spec set_handler(handler() | undefined) -> ok | {error, term()}.
set_handler(undefined) ->
    replace_handler(undefined);
set_handler(Pid) when is_pid(Pid), node(Pid) =:= node() ->
    replace_handler(Pid);
set_handler({Module, Function, Args} = MFA) when is_atom(Module), is_atom(Function), is_list(Args) ->
    replace_handler(MFA);
set_handler(Other) ->
    {error, {invalid_option, {handler, Other}}}.

-spec replace_handler(handler() | undefined) -> ok | {error, term()}.
replace_handler(Handler) ->
    macula_peer_engine:to_the_end(fun() -> put_in_force(Handler) end).

-spec put_in_force(handler() | undefined) -> ok | {error, term()}.
put_in_force(Handler) ->
    New = macula_peer_handler:start(Handler),
    case macula_peer_engine:running(fun() -> macula_peer_nif:set_handler(New) end) of
        {released, Old, Supervisor} ->
            macula_peer_handler:stop(Old, Supervisor);
        {error, _} = Error ->
            ok = macula_peer_handler:abandon(New),
            Error
    end.

%% @doc Answers a message, once, on the stream that it came on.
%%
%% Errors: `already_replied', `gone' (the connection is gone; the answer to a request of `macula-peer/1' is kept all the same, for the
%% case that the asker asks again over another one), `invalid_token', and those of {@link macula_peer_wire:encode/2}, after which the
%% token is still good.
%%
%% An answer of more than 20,000 terms, or more than a megabyte of binaries, is encoded on a dirty scheduler. As this function has no
%% timeout, it waits there for one that is free.
-spec reply(reply_token() | none, macula_peer_wire:type(), map()) -> ok | {error, term()}.
reply(Token, Type, Msg) ->
    case macula_peer_nif:reply(Token, Type, Msg) of
        heavy ->
            case macula_peer_nif:encode_frame(Type, Msg) of
                {ok, Frame} -> macula_peer_nif:reply_frame(Token, Frame);
                {error, _} = Error -> Error
            end;
        Result ->
            Result
    end.

%% @doc How messages to a peer travel, an endpoint or a node id, and why not by better paths. With the path `none' there is no
%% link: nothing was sent to it, or not for some time.
-spec path(macula_peer_connector:endpoint() | binary() | {node, binary()}) -> {ok, path()} | {error, term()}.
path({node, NodeId}) ->
    macula_peer_engine:figures(fun() -> macula_peer_nif:path({node, NodeId, none}) end);
path(Peer) ->
    case path({node, Peer}) of
        {ok, #{path := Path}} = Found when Path =/= none -> Found;
        {error, not_started} = NotStarted -> NotStarted;
        NotANode -> path_to_endpoint(Peer, NotANode)
    end.

-spec path_to_endpoint(term(), {ok, path()} | {error, term()}) -> {ok, path()} | {error, term()}.
path_to_endpoint(Endpoint, NotANode) ->
    case {macula_peer_engine:figures(fun() -> macula_peer_nif:path(Endpoint) end), NotANode} of
        {{error, {invalid_endpoint, _}}, {ok, _}} -> NotANode;
        {{ok, #{path := none}}, {ok, #{failed := Failed}}} when map_size(Failed) > 0 -> NotANode;
        {Found, _} -> Found
    end.

%% @doc Says who may come to this node: the lists take the place of those before, and of the setting `access'. They hold until
%% {@link stop/0}. Those who are here and may not are gone when this returns: their connections are closed, and nodes that are
%% registered here are told that they are `denied'.
%%
%% Lists of keys and networks are about everybody who connects, and about registrations; those of node ids about registrations
%% alone. A network is about those who connect straight from it, not through a relay. A node that is refused for its network
%% gets `connection_refused', otherwise `rejected_by_peer'. Whom this node sends to is not limited: but who may not come sends
%% nothing back on such a link, apart from answers.
%%
%% Errors: `{invalid_option, {Key, Value}}'.
-spec set_access(access()) -> ok | {error, term()}.
set_access(Access) when is_map(Access) ->
    macula_peer_engine:running(fun() -> macula_peer_nif:set_access(Access) end);
set_access(Access) ->
    {error, {invalid_option, {access, Access}}}.

%% @doc The lists in force. Networks come as text.
-spec access() -> access() | {error, term()}.
access() ->
    macula_peer_engine:figures(fun macula_peer_call:access/0).

%% @doc Makes a node leave: ends its registrations at this relay, or the one under a node id, and its connections. The node is told
%% `kicked', and is not registered again for 30 seconds; it may connect again at once. The callback is asked about everybody
%% again. To keep a node away use {@link set_access/1}.
%%
%% Errors: `not_found', `not_started', `{invalid_kick, Term}'.
-spec kick({key, fingerprint()} | {node_id, binary()}) -> ok | {error, term()}.
kick(Whom) ->
    macula_peer_engine:figures(fun() -> macula_peer_call:kick(Whom) end).

%% @equiv relay_nodes(0)
-spec relay_nodes() -> #{nodes := [relay_node()], next := non_neg_integer() | none} | {error, term()}.
relay_nodes() ->
    relay_nodes(0).

%% @doc The nodes that are registered at this relay, in the order in which they registered, at most 1,000 at once. More come with
%% `relay_nodes(Next)', until `next' is `none'.
%%
%% Errors: `not_started', `not_a_relay'.
-spec relay_nodes(non_neg_integer()) -> #{nodes := [relay_node()], next := non_neg_integer() | none} | {error, term()}.
relay_nodes(From) when is_integer(From), From >= 0, From < 1 bsl 64 ->
    macula_peer_engine:figures(fun() -> macula_peer_call:relay_nodes(From) end).

%% @doc What is counted, and the peers with their links.
-spec stats() -> stats() | {error, term()}.
stats() ->
    macula_peer_engine:figures(fun macula_peer_call:stats/0).

%% @doc What is known of the NAT that this node is behind. It is found out with the help of the relays that the node is
%% registered at, within about a second, and again when it registers or is seen at another address; an event tells the
%% handler what has changed. Two relays at different hosts, or one with `probe_ip', tell everything; of one alone `unknown'
%% may remain.
-spec nat_profile() -> nat_profile() | {error, term()}.
nat_profile() ->
    macula_peer_engine:figures(fun macula_peer_call:nat_profile/0).

%% @doc Which modules are in force where macula has modules of the same names: `macula_peer_connector' and
%% `macula_peer_connection_pool': `ours', `other', a `mock' that was loaded from no file, or `none'. `loaded' is false for one
%% that has not been called yet: `module' is then what the code path has. `file' is where it came from, as far as is known. Works
%% whether or not anything is started.
-spec which() -> #{module() => macula_peer_takeover:found()}.
which() ->
    macula_peer_takeover:which().

%% @doc Starts the engine with the settings of the application environment, if it is not running. Functions that send, listen,
%% register or set a handler start it by themselves.
-spec start() -> ok | {error, term()}.
start() ->
    macula_peer_engine:ensure_started().

%% @doc Stops the engine: what is on its way has a second to arrive, calls that wait are answered with an error. The next
%% call starts it again.
-spec stop() -> ok.
stop() ->
    macula_peer_engine:stop().
