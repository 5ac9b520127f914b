%% @doc This node: listening, answering, registering, and what goes on in it.
%%
%% A handler gets the messages and events that arrive: a process, or a function that one process calls with each of them, in the
%% order of arrival. A message is `{macula_peer_message, Inbound}' ({@link inbound()}), an event `{macula_peer_event, Event}'. <a
%% href="../docs/events.md">docs/events.md</a> lists them all, with the reasons for each.
%%
%% Errors are listed in {@link macula_peer_error}, and explained in <a href="../docs/errors.md">docs/errors.md</a>.
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

-export_type([settings/0, listen_opts/0, relay_opts/0, verify/0, access/0, access_list/0, admission_question/0, handler/0,
              fingerprint/0, inbound/0, reply_token/0, relay_node/0, relay_nodes/0, stats/0, nat_profile/0, path/0]).

-type settings() :: #{ip => inet:ip_address(), port => inet:port_number(), handler => handler(), listen => listen_opts(),
                      gateway => auto | macula_peer_connector:endpoint() | none,
                      max_frame_size => pos_integer(), max_nesting => pos_integer(), max_terms => pos_integer(),
                      takeover => boolean(), takeover_pool => boolean(),
                      node_id => binary(), relays => [macula_peer_connector:endpoint()], hole_punching => on | plain | off,
                      resolver => module() | none, pool_size => pos_integer(), idle_timeout => pos_integer(),
                      keep_alive => pos_integer(), connect_timeout => pos_integer(),
                      delivery => at_least_once | at_most_once, max_unacknowledged => pos_integer(),
                      answer_timeout => pos_integer(), workers => pos_integer(), identity_file => file:filename(),
                      previous_identity_files => [file:filename()], known_keys_file => file:filename(),
                      verify => verify(), access => access(), realm_secret => binary(), max_accepted => pos_integer(),
                      max_streams => pos_integer(), max_known_sessions => pos_integer(),
                      max_known_requests => pos_integer(), frame_memory => pos_integer(), frame_timeout => pos_integer()}.
%% The application environment of `macula_peer_connector'. <a href="../docs/settings.md">docs/settings.md</a> has a table of the
%% keys, their defaults and what they do.

-type handler() :: pid() | {module(), atom(), [term()]}.
%% The function gets the message as its first argument, before the listed ones.

-type listen_opts() :: #{port => inet:port_number(), ip => inet:ip_address(), certfile => file:filename(),
                         keyfile => file:filename(), verify => verify(), handler => handler(), relay => relay_opts(),
                         key_share => 1..100, address_share => 1..100, handshake_rate => pos_integer(),
                         admission => {module(), atom(), [term()]}, admission_timeout => pos_integer(),
                         admission_cache => non_neg_integer()}.
%% <dl>
%%   <dt>`port', `ip'</dt>
%%   <dd>Where to listen. By default at the addresses and the port of the node's one UDP socket. Another port, or another `ip',
%%       binds a new socket; live links move to it. Port 0: the present port, or any if `ip' changes.</dd>
%%   <dt>`certfile', `keyfile'</dt>
%%   <dd>PEM files of the certificate that the listener shows. By default it shows the node's own. Files that are replaced take
%%       effect within two seconds.</dd>
%%   <dt>`verify'</dt>
%%   <dd>Which certificates clients must show. By default the setting `verify' decides.</dd>
%%   <dt>`handler'</dt>
%%   <dd>As for {@link set_handler/1}. By default the handler stays as it is.</dd>
%%   <dt>`relay'</dt>
%%   <dd>Makes this node a relay. By default it is not one.</dd>
%%   <dt>`key_share' (10)</dt>
%%   <dd>The percentage of `max_accepted' connections that one key may have. A higher share suits a few busy clients; a lower one
%%       leaves more room to others when a client opens many connections.</dd>
%%   <dt>`address_share' (50)</dt>
%%   <dd>The same for one IPv4 address, or for 64 bits of an IPv6 address, and also its percentage of `handshake_rate'. A
%%       higher share suits many clients behind one NAT; a lower one leaves more room when one host attacks.</dd>
%%   <dt>`handshake_rate' (500)</dt>
%%   <dd>How many handshakes may begin in a second. A higher rate costs more CPU time under attack; with a lower one clients wait
%%       longer when many connect at once.</dd>
%%   <dt>`admission'</dt>
%%   <dd>`{Module, Function, Args}': a function that is called with an {@link admission_question()} and `Args' for each client
%%       that connects, before its messages are handled, and at a relay for each registration. It returns `allow', `deny' or
%%       `{deny, Reason}'. A client is refused if the function fails or does not answer in time. By default no function is
%%       called.</dd>
%%   <dt>`admission_timeout' (1000)</dt>
%%   <dd>How long `admission' may take, in milliseconds, at most 60,000. Clients wait that long when the function hangs.</dd>
%%   <dt>`admission_cache' (60000)</dt>
%%   <dd>For how many milliseconds an answer of `admission' holds for the same key, IP address, path and node id. 0: for one
%%       question. Higher values call the function less often, and let changes of its answers take effect later.</dd>
%% </dl>

-type relay_opts() :: #{max_registrations => pos_integer(), accept_rate => pos_integer(), grace => non_neg_integer(),
                        realm_secret => binary(), max_sessions => pos_integer(), max_sessions_per_node => pos_integer(),
                        key_share => 1..100, address_share => 1..100, idle_timeout => pos_integer(),
                        bandwidth => pos_integer(), packet_queue => pos_integer(), max_packet => pos_integer(),
                        probe_port => inet:port_number(), probe_ip => inet:ip_address()}.
%% The limits of a relay, and where it answers probes of NATs. <a href="../docs/relays.md#limits">docs/relays.md</a> has a table of
%% the keys, their defaults and what they do.

-type admission_question() :: #{kind := connection | registration, key := fingerprint() | undefined,
                                address := {inet:ip_address(), inet:port_number()}, path := direct | hole_punch | relay,
                                node_id => binary()}.
%% `key' is `undefined' for clients of 0.14.3, which have none. If the path is `relay', `address' is the relay's. Only a
%% registration has a `node_id'.

-type access_list() :: #{keys => [fingerprint() | HexDigits :: binary() | string()], node_ids => [binary()],
                         networks => [Prefix :: binary() | string() | inet:ip_address()]}.
%% <dl>
%%   <dt>`keys'</dt><dd>Keys of nodes.</dd>
%%   <dt>`node_ids'</dt><dd>Node ids that are registered at this relay.</dd>
%%   <dt>`networks'</dt><dd>Prefixes such as `"192.0.2.0/24"' and `"2001:db8::/32"', or single addresses.</dd>
%% </dl>

-type access() :: #{allow => access_list(), deny => access_list()}.
%% Which nodes may connect to this one. Entries of `deny' may not. For each kind of list that `allow' has, only its entries may. By
%% default there are no lists, and all nodes may.

-type relay_node() :: #{node_id := binary(), key := fingerprint(), address := {inet:ip_address(), inet:port_number()},
                        since := non_neg_integer(), circuits := non_neg_integer(), peers := [binary()],
                        sent := #{packets := non_neg_integer(), bytes := non_neg_integer()},
                        received := #{packets := non_neg_integer(), bytes := non_neg_integer()}}.
%% A node that is registered at this relay. `since' is in milliseconds of system time. `peers' are the node ids at the other ends of
%% its circuits, at most 32. `sent' and `received' count what the relay has forwarded for it since it registered.

-type relay_nodes() :: #{nodes := [relay_node()], next := non_neg_integer() | none}.

-type fingerprint() :: <<_:256>>.
%% Identifies a node: the SHA-256 of its public key's SubjectPublicKeyInfo in DER.

-type verify() :: first_seen | none | {pin, [fingerprint() | HexDigits :: binary() | string()]}
                | {cacertfile, file:filename()} | {cacertfile, file:filename(), any_name}.
%% Which certificates are accepted:
%% <dl>
%%   <dt>`first_seen' (the default)</dt>
%%   <dd>Any; but a node id belongs to the key that it was first seen with.</dd>
%%   <dt>`none'</dt>
%%   <dd>Any.</dd>
%%   <dt>`{pin, Fingerprints}'</dt>
%%   <dd>Those with one of these keys.</dd>
%%   <dt>`{cacertfile, File}'</dt>
%%   <dd>Those that an authority in this PEM file has signed. A peer that is dialled must have one for its host, unless `any_name' is
%%       added.</dd>
%% </dl>
%% With `pin' and `cacertfile' clients must show a certificate, which clients of 0.14.3 cannot.

-opaque reply_token() :: reference().

-type inbound() :: #{type := macula_peer_wire:type(), message := term(), from := {inet:ip_address(), inet:port_number()},
                     path := direct | hole_punch | relay, dialect := macula | 'macula-peer/1',
                     key := fingerprint() | undefined,
                     reply_to := reply_token() | none}.
%% A message that arrived: <a href="../docs/events.md">docs/events.md</a> explains the keys.

-type stats() :: #{peers := [map()], accepted := [map()], pool := map(), verify_none_links := non_neg_integer(),
                   undelivered := non_neg_integer(), unhandled := non_neg_integer(), malformed := non_neg_integer(),
                   refused := #{atom() => non_neg_integer()}, sessions := non_neg_integer(),
                   admission := map(), registrations := [map()], relay => map(), gateway => map()}.
%% <dl>
%%   <dt>`peers'</dt>
%%   <dd>Of each peer `endpoint' or `node_id', `path' (`direct', `hole_punch', `relay' or `none'), `sent', `acknowledged',
%%       `received', `failed', `dials', `unacknowledged_bytes', and with a link `dialect', `address' and `round_trip_us'.</dd>
%%   <dt>`accepted'</dt>
%%   <dd>Of each accepted connection `dialect', `path', `address', `round_trip_us', `received'.</dd>
%%   <dt>`pool'</dt>
%%   <dd>The original's `hits', `misses', `evictions', `total', `hit_rate' and `pool_size'.</dd>
%%   <dt>`verify_none_links'</dt>
%%   <dd>How many dialled links of the dialect `macula' are not verified.</dd>
%%   <dt>`undelivered', `unhandled', `malformed'</dt>
%%   <dd>Messages that `ok' was returned for and that did not arrive; that arrived and had no receiver; that could not be read.</dd>
%%   <dt>`sessions'</dt>
%%   <dd>Sessions of senders that this node remembers.</dd>
%%   <dt>`refused'</dt>
%%   <dd>What a limit did not allow, by its name. Connections: `connections', `connections_per_key', `connections_per_address',
%%       `handshake_rate', `handshake_rate_per_address'. Sessions that were refused, or forgotten for others: `sessions'. Requests
%%       and kept answers that were forgotten for others: `requests', `kept_answers'. Frames that had to wait for memory:
%%       `frame_memory'.</dd>
%%   <dt>`admission'</dt>
%%   <dd>`asked' and `remembered': questions that the callback was asked, and that an earlier answer decided. `refused': clients
%%       and registrations that were refused or ended, by reason: `network', `key', `node_id' (see {@link set_access/1}), `kicked',
%%       `callback', `timeout', `crash' and `busy' (too many questions waited).</dd>
%%   <dt>`registrations'</dt>
%%   <dd>Of each registration of this node `relay', `state', `reason', `address' (where the relay sees this node) and
%%       `circuits'.</dd>
%%   <dt>`relay'</dt>
%%   <dd>If this node is a relay: `registrations', `circuits', `forwarded_packets', `forwarded_bytes', `refused' and `dropped' by
%%       limit, `stray' (packets that belong to no circuit of their sender), `unread' (nodes that did not read), `punches' and
%%       `punched' (direct paths that were tried, and found).</dd>
%%   <dt>`gateway'</dt>
%%   <dd>Unless the setting is `none': `endpoint', `handed_over', `answered' (answers sent on) and `fallen_back' (messages that
%%       macula_gateway or the handler got instead).</dd>
%% </dl>

-type path() :: #{path := direct | hole_punch | relay | none,
                  failed := #{direct => term(), hole_punch => term(), relay => term()},
                  dialect => macula | 'macula-peer/1', address => {inet:ip_address(), inet:port_number()},
                  round_trip_us => non_neg_integer()}.
%% <dl>
%%   <dt>`path'</dt>
%%   <dd>`direct': straight to the peer, over a connection that either node dialled. `hole_punch': straight, through NATs or
%%       firewalls that both sides have opened. `relay': through a relay, and `address' is the relay's. `none': there is no
%%       link.</dd>
%%   <dt>`failed'</dt>
%%   <dd>Why better paths failed since there was last a direct one, with the reasons of failed calls. For `hole_punch':
%%       `both_hard' (neither NAT gives predictable ports), `timeout' (no packet came through), `not_allowed' (the setting
%%       `hole_punching' of one side is `off', or `plain' where that is not enough), `hole_punch_skipped', `busy' (one side makes
%%       as many attempts as it may), `interrupted' (the socket of one side moved meanwhile), `{relay_setup_failed, Reason}' and
%%       `{relay_connect_failed, Reason}' (no relay helped), `{connect_failed, Reason}'.</dd>
%% </dl>

-type nat_profile() :: #{mapping_policy := ei | hd | pd | unknown, filtering_policy := ei | hd | pd | unknown,
                         allocation_policy := pp | pc | rd | unknown,
                         reflexive_address := {inet:ip_address(), inet:port_number()} | undefined,
                         local_addresses := [{inet:ip_address(), inet:port_number()}],
                         detected_at := non_neg_integer() | undefined}.
%% The NAT in front of this node, in the original's words (RFC 4787 has the terms). Without a NAT the policies are `ei', `ei' and
%% `pp'.
%% <dl>
%%   <dt>`mapping_policy'</dt>
%%   <dd>The external port of the socket is the same for all destinations (`ei'), for each host (`hd'), or for each port of a
%%       host (`pd').</dd>
%%   <dt>`filtering_policy'</dt>
%%   <dd>Packets may come in from everywhere (`ei'), from hosts (`hd') or from ports of hosts (`pd') that the socket has sent to.</dd>
%%   <dt>`allocation_policy'</dt>
%%   <dd>The external port is the socket's own (`pp'), the next one (`pc'), or any (`rd').</dd>
%%   <dt>`reflexive_address', `local_addresses'</dt>
%%   <dd>Where relays see the socket; the host's own addresses, without loopback and link-local ones.</dd>
%%   <dt>`detected_at'</dt>
%%   <dd>When this was found out, in milliseconds of system time.</dd>
%% </dl>

%% @doc Accepts connections. Returns the local address.
-spec listen(listen_opts()) -> {ok, {inet:ip_address(), inet:port_number()}} | {error, macula_peer_error:start()}.
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
-spec close() -> ok | {error, macula_peer_error:native()}.
close() ->
    case macula_peer_nif:close() of
        not_started -> ok;
        Result -> Result
    end.

%% @doc The address of the node's one socket, which listens, dials and is seen by others. Returns `{error, not_started}'
%% if no engine runs, as do the other functions that only read: {@link identity/0}, {@link stats/0}, {@link path/1} and
%% {@link nat_profile/0}.
-spec local_address() -> {ok, {inet:ip_address(), inet:port_number()}} | {error, gone | macula_peer_error:engine()}.
local_address() ->
    macula_peer_engine:figures(fun macula_peer_nif:local_address/0).

%% @doc This node's key, as others see it. The same at every start if `identity_file' is set.
-spec identity() -> #{fingerprint := fingerprint()} | {error, macula_peer_error:engine()}.
identity() ->
    macula_peer_engine:figures(fun macula_peer_nif:identity/0).

%% @doc Keeps this node registered under a node id at these relays, and at no others, so that others reach it through
%% them. Returns at once; an event tells the handler when it is registered, and {@link stats/0} says so too. A node id
%% belongs to the key that registers it; keep the key with the setting `identity_file'. Until {@link unregister/0} this
%% is the node's id, even with an empty list of relays: it refuses messages for any other id, including those that come
%% directly.
-spec register(binary(), [macula_peer_connector:endpoint()]) ->
          ok | {error, macula_peer_error:invalid_node_id() | macula_peer_error:start()}.
register(NodeId, Relays) ->
    macula_peer_engine:running(fun() -> macula_peer_nif:register(NodeId, Relays) end).

%% @doc Ends the registrations.
-spec unregister() -> ok | {error, macula_peer_error:start()}.
unregister() ->
    macula_peer_engine:running(fun macula_peer_nif:unregister/0).

%% @doc Forgets which key a node has. This node accepts for a node id only the key that it first saw with it. A node
%% that was restarted without its `identity_file' has a new key: it is refused with `untrusted_peer', and a warning in
%% the log names it. After this call another key is accepted, and remembered once it has proved to serve the id. A link
%% to the node is closed; messages in flight over it are sent again over the next one.
%%
%% With the setting `known_keys_file' the key is removed from the file too. A node that changes its key with
%% `previous_identity_files' need not be forgotten.
%%
%% Make sure that it is the right node: a refusal can also mean that another node has taken its address or its node id.
-spec forget(binary()) -> ok | {error, macula_peer_error:invalid_node_id() | macula_peer_error:start()}.
forget(NodeId) ->
    case macula_peer_nif:forget(NodeId) of
        not_started -> forget_kept(NodeId);
        Result -> Result
    end.

-spec forget_kept(binary()) -> ok | {error, macula_peer_error:invalid_node_id() | macula_peer_error:start()}.
forget_kept(NodeId) ->
    case application:get_env(macula_peer_connector, known_keys_file) of
        %% Without an engine nothing is remembered.
        undefined -> ok;
        {ok, _} -> macula_peer_engine:running(fun() -> macula_peer_nif:forget(NodeId) end)
    end.

%% @equiv request(NodeId, Type, Msg, Timeout, #{})
-spec request(binary(), macula_peer_wire:type(), map(), timeout()) ->
          {ok, {macula_peer_wire:type(), map()}} | {error, macula_peer_error:request_to_node()}.
request(NodeId, Type, Msg, Timeout) ->
    request(NodeId, Type, Msg, Timeout, #{}).

%% @doc Sends a message to a node, wherever it is, and waits for the answer:
%% {@link macula_peer_connector:send_message_and_wait/4} with the paths and options of
%% {@link macula_peer_connector:send_message_nat_aware/5}.
-spec request(binary(), macula_peer_wire:type(), map(), timeout(), macula_peer_connector:nat_opts()) ->
          {ok, {macula_peer_wire:type(), map()}} | {error, macula_peer_error:request_to_node()}.
request(NodeId, Type, Msg, Timeout, Opts) when is_map(Opts) ->
    macula_peer_path:call(NodeId, Opts#{timeout => Timeout},
                          fun(To, Left) -> macula_peer_call:request(To, Type, Msg, Left) end);
request(_NodeId, _Type, _Msg, _Timeout, Opts) ->
    {error, {invalid_option, {options, Opts}}}.

%% @doc Sets the receiver of incoming messages: messages to the listener, and answers to messages that were sent without
%% waiting. Without a handler that is macula's gateway on this host, as the setting `gateway' says.
-spec set_handler(handler() | undefined) -> ok | {error, macula_peer_error:start()}.
set_handler(undefined) ->
    replace_handler(undefined);
set_handler(Pid) when is_pid(Pid), node(Pid) =:= node() ->
    replace_handler(Pid);
set_handler({Module, Function, Args} = MFA) when is_atom(Module), is_atom(Function), is_list(Args) ->
    replace_handler(MFA);
set_handler(Other) ->
    {error, {invalid_option, {handler, Other}}}.

-spec replace_handler(handler() | undefined) -> ok | {error, macula_peer_error:start()}.
replace_handler(Handler) ->
    macula_peer_engine:to_the_end(fun() -> put_in_force(Handler) end).

-spec put_in_force(handler() | undefined) -> ok | {error, macula_peer_error:start()}.
put_in_force(Handler) ->
    New = macula_peer_handler:start(Handler),
    case macula_peer_engine:running(fun() -> macula_peer_nif:set_handler(New) end) of
        {released, Old, Supervisor} ->
            macula_peer_handler:stop(Old, Supervisor);
        {error, _} = Error ->
            ok = macula_peer_handler:abandon(New),
            Error
    end.

%% @doc Answers a message, once, on the stream that it came on. After `gone' the answer to a request of `macula-peer/1' is kept:
%% the requester may ask again over another connection. After an error of {@link macula_peer_wire:encode/2} the token is still
%% valid.
%%
%% An answer of more than 20,000 terms, or more than a megabyte of binaries, is encoded on a dirty scheduler. This function has no
%% timeout, so it waits until one is free.
-spec reply(reply_token() | none, macula_peer_wire:type(), map()) -> ok | {error, macula_peer_error:reply()}.
reply(Token, Type, Msg) ->
    case macula_peer_nif:reply(Token, {Type, Msg}) of
        heavy ->
            case macula_peer_nif:encode_frame(Type, Msg) of
                {ok, Frame} -> macula_peer_nif:reply(Token, Frame);
                {error, _} = Error -> Error
            end;
        Result ->
            Result
    end.

%% @doc How messages to a peer travel, an endpoint or a node id, and why not by better paths. With the path `none' there is no
%% link: nothing was sent to it, or not for some time.
-spec path(macula_peer_connector:endpoint() | binary() | {node, binary()}) -> {ok, path()} | {error, macula_peer_error:engine() | macula_peer_error:endpoint() | macula_peer_error:invalid_node_id()}.
path({node, NodeId}) ->
    macula_peer_engine:figures(fun() -> macula_peer_nif:path({node, NodeId, none}) end);
path(Peer) ->
    case path({node, Peer}) of
        {ok, #{path := Path}} = Found when Path =/= none -> Found;
        {error, not_started} = NotStarted -> NotStarted;
        NotANode -> path_to_endpoint(Peer, NotANode)
    end.

-spec path_to_endpoint(term(), Found) -> Found when Found :: {ok, path()} | {error, macula_peer_error:engine() | macula_peer_error:endpoint() | macula_peer_error:invalid_node_id()}.
path_to_endpoint(Endpoint, NotANode) ->
    case {macula_peer_engine:figures(fun() -> macula_peer_nif:path(Endpoint) end), NotANode} of
        {{error, {invalid_endpoint, _}}, {ok, _}} -> NotANode;
        {{ok, #{path := none}}, {ok, #{failed := Failed}}} when map_size(Failed) > 0 -> NotANode;
        {Found, _} -> Found
    end.

%% @doc Sets which nodes may connect to this node: the lists replace those before, and the setting `access'. They hold
%% until {@link stop/0}. When this returns, nodes that may no longer connect are gone: their connections are closed, and
%% nodes that are registered here are told that they are `denied'.
%%
%% Lists of keys and networks apply to all connections and to registrations; those of node ids to registrations alone. A
%% network applies to connections that come straight from it, not through a relay. A node that is refused for its
%% network gets `connection_refused', otherwise `rejected_by_peer'. This node may send to any node, but a denied node
%% sends nothing back on such a link, apart from answers.
-spec set_access(access()) -> ok | {error, macula_peer_error:start()}.
set_access(Access) when is_map(Access) ->
    macula_peer_engine:running(fun() -> macula_peer_nif:set_access(Access) end);
set_access(Access) ->
    {error, {invalid_option, {access, Access}}}.

%% @doc The lists in force. Networks come as text.
-spec access() -> access() | {error, macula_peer_error:engine()}.
access() ->
    macula_peer_engine:figures(fun macula_peer_call:access/0).

%% @doc Disconnects a node: ends its registrations at this relay, or the one under a node id, and its connections. The
%% node is told `kicked', and is not registered again for 30 seconds; it may connect again at once. Cached answers of
%% the callback are dropped. To keep a node away use {@link set_access/1}.
-spec kick({key, fingerprint()} | {node_id, binary()}) ->
          ok | {error, not_found | {invalid_kick, term()} | macula_peer_error:engine()}.
kick(Target) ->
    macula_peer_engine:figures(fun() -> macula_peer_call:kick(Target) end).

%% @equiv relay_nodes(0)
-spec relay_nodes() -> relay_nodes() | {error, not_a_relay | macula_peer_error:engine()}.
relay_nodes() ->
    relay_nodes(0).

%% @doc The nodes that are registered at this relay, in the order in which they registered, at most 1,000 at once. More come with
%% `relay_nodes(Next)', until `next' is `none'.
-spec relay_nodes(non_neg_integer()) -> relay_nodes() | {error, not_a_relay | macula_peer_error:engine()}.
relay_nodes(From) when is_integer(From), From >= 0, From < 1 bsl 64 ->
    macula_peer_engine:figures(fun() -> macula_peer_call:relay_nodes(From) end).

%% @doc What is counted, and the peers with their links.
-spec stats() -> stats() | {error, macula_peer_error:engine()}.
stats() ->
    macula_peer_engine:figures(fun macula_peer_call:stats/0).

%% @doc What is known of the NAT that this node is behind. It is found out with the help of the relays that the node is
%% registered at, within about a second, and again when it registers or is seen at another address; an event tells the
%% handler what has changed. Two relays at different hosts, or one with `probe_ip', tell everything; of one alone `unknown'
%% may remain.
-spec nat_profile() -> nat_profile() | {error, macula_peer_error:engine()}.
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
-spec start() -> ok | {error, macula_peer_error:start()}.
start() ->
    macula_peer_engine:ensure_started().

%% @doc Stops the engine: messages in flight have a second to arrive, and waiting calls get an error. The next call
%% starts it again.
-spec stop() -> ok.
stop() ->
    macula_peer_engine:stop().
