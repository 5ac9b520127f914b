%% @doc Sends messages to peers. The functions, their results and their errors are those of the module of the same name
%% in macula 0.14.3.
%%
%% Every function keeps its timeout, which covers name lookup, dialling, handshake, sending and, where there is one, the
%% answer. `0' tries what can be done at once, `infinity' waits as long as it takes. Only a dial has its own limit, the
%% `connect_timeout' of the settings (5 s): a call to a silent peer fails then at the latest. The caller gets its result as
%% the return value and never a message.
%%
%% `ok' means accepted: the message arrives, or is counted in {@link macula_peer_node:stats/0} and reported to the
%% handler as undelivered.
%%
%% Errors are listed in {@link macula_peer_error}, and explained in <a href="../docs/errors.md">docs/errors.md</a>.
-module(macula_peer_connector).

%% Tells this module from macula's: macula_peer_takeover.
-application(macula_peer_connector).

-export([send_message/3]).
-export([send_message/4]).
-export([send_message_and_wait/4]).
-export([send_message_nat_aware/4]).
-export([send_message_nat_aware/5]).

-export_type([endpoint/0, nat_opts/0]).

-type endpoint() :: binary() | string().
%% `host:port', `https://host:port' or `http://host:port'; the host is a name, an IPv4 address or an IPv6 address, with or
%% without brackets.

-type nat_opts() :: #{endpoint => endpoint(),
                      relay_endpoint => endpoint() | {Host :: binary() | string(), inet:port_number()}
                                      | {ok, Host :: binary() | string(), inet:port_number()},
                      fingerprint => macula_peer_node:fingerprint() | HexDigits :: binary() | string(),
                      skip_hole_punch => boolean(),
                      timeout => timeout()}.
%% The value `undefined' counts as absent, but for `timeout'.
%% <dl>
%%   <dt>`endpoint'</dt>
%%   <dd>Where the node may be dialled. By default only what was looked up is dialled.</dd>
%%   <dt>`relay_endpoint'</dt>
%%   <dd>A relay that the node may be registered at. By default only the other known relays are tried.</dd>
%%   <dt>`fingerprint'</dt>
%%   <dd>Only the owner of this key gets the message. By default the node must have the key that it was first seen with.</dd>
%%   <dt>`skip_hole_punch' (`false')</dt>
%%   <dd>`true' does not try to get through NATs. Fewer packets are sent, and the messages stay on the relay.</dd>
%%   <dt>`timeout' (10000)</dt>
%%   <dd>Of the whole call, in milliseconds. A shorter one gives up before slow paths are found; a longer one lets the caller wait
%%       for a node that is away.</dd>
%% </dl>

%% The original's default, in milliseconds.
-define(SEND_TIMEOUT, 5000).

%% @equiv send_message(Endpoint, Type, Msg, 5000)
-spec send_message(endpoint(), macula_peer_wire:type(), map()) -> ok | {error, macula_peer_error:send()}.
send_message(Endpoint, Type, Msg) ->
    send_message(Endpoint, Type, Msg, ?SEND_TIMEOUT).

%% @doc Sends a message.
%%
%% ```
%% ok = macula_peer_connector:send_message(<<"node.example:9443">>, dht_store, #{key => Key, value => Value}).
%% '''
-spec send_message(endpoint(), macula_peer_wire:type(), map(), timeout()) -> ok | {error, macula_peer_error:send()}.
send_message(Endpoint, Type, Msg, Timeout) ->
    macula_peer_call:send(Endpoint, Type, Msg, Timeout).

%% @doc Sends a message and waits for the frame that the peer answers with.
-spec send_message_and_wait(endpoint(), macula_peer_wire:type(), map(), timeout()) ->
          {ok, {macula_peer_wire:type(), map()}} | {error, macula_peer_error:request()}.
send_message_and_wait(Endpoint, Type, Msg, Timeout) ->
    macula_peer_call:request(Endpoint, Type, Msg, Timeout).

%% @equiv send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg, #{})
-spec send_message_nat_aware(binary(), binary(), macula_peer_wire:type(), map()) ->
          ok | {error, macula_peer_error:send_to_node()}.
send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg) ->
    send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg, #{}).

%% @doc Sends a message to a node, by whichever path is up first: directly, at the endpoint that the options name or that
%% macula knows, or through a relay. A direct path takes over from a relayed one when there is one. Where there is no path
%% yet, the node is looked up meanwhile ({@link macula_peer_resolver}), for the node `LocalNodeId'.
%%
%% Relays are tried in this order: `relay_endpoint', those that this node is registered at, the setting `relays', and at
%% last all of `MACULA_BOOTSTRAP_PEERS'; relays from a lookup as soon as they are known. A relay that speaks only
%% `macula' gets the message itself, as in the original.
%%
%% A node with another node id than `TargetNodeId' gets nothing, and neither does this node itself: the error is then
%% `{nat_connection_failed, {connect_failed, wrong_node}}', unless another path leads to the node.
%%
%% With `fingerprint' only the owner of that key gets the message. Without it, and if `verify' is not set, a node must
%% have the key that it was first seen with; {@link macula_peer_node:forget/1} allows another one.
-spec send_message_nat_aware(binary(), binary(), macula_peer_wire:type(), map(), nat_opts()) ->
          ok | {error, macula_peer_error:send_to_node()}.
send_message_nat_aware(LocalNodeId, TargetNodeId, Type, Msg, Opts) ->
    Send = fun(To, Timeout) -> macula_peer_call:send(To, Type, Msg, Timeout, LocalNodeId) end,
    macula_peer_path:call(TargetNodeId, Opts, Send).
