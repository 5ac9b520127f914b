%% @doc A behaviour for modules that know where nodes are. The setting `resolver' names the module; without it {@link
%% macula_peer_resolver_macula} asks macula's own servers, and with `none' there are no lookups.
%%
%% A node is looked up when a message for it finds no link to it, at most once a minute, whatever was found. All
%% callbacks that a module has are called at the same time, each in a process of its own, which is killed after 4.5 s.
%% They may wait, fail and call {@link macula_peer_connector}, even for the same node. A process that waits for the
%% answer must not be asked itself; the key `$callers' of the process dictionary has these processes, as in Elixir's
%% `Task'.
%%
%% The result of one callback is tried at once, beside everything else that is known; nothing waits for the others if
%% there is a candidate to try. Malformed answers are ignored. All callbacks are optional.
-module(macula_peer_resolver).

-export([is_one/1]).

-export_type([candidate/0, profile/0, strategy/0]).

-type candidate() :: macula_peer_connector:endpoint()
             | {Host :: inet:ip_address() | string() | binary(), inet:port_number()}
             | #{binary() | atom() => term()}.
%% A map has `host' and `port', and may have `fingerprint', which is then the only key that the node is known by: atoms or
%% binaries, as in macula's DHT.

-type profile() :: #{reflexive_address => {Host :: inet:ip_address() | string() | binary(), inet:port_number()},
                     can_receive_unsolicited => boolean(), requires_relay => boolean(),
                     mapping_policy => ei | hd | pd, filtering_policy => ei | hd | pd, atom() => term()}.

-type strategy() :: direct | hole_punch | relay.

-callback endpoints(NodeId :: binary()) -> [candidate()].
%% Where a node may be dialled: 16 at the most.

-callback nat_profile(NodeId :: binary()) -> profile() | undefined.
%% What is known of the NAT that a node is behind. The address that others see it at is dialled if it can receive what it
%% did not ask for: if the profile says so, or both policies are `ei', and it does not say that the node requires a relay.

-callback relays(NodeId :: binary()) -> [candidate()].
%% Relays where a node may be registered: 16 at the most.

-callback bootstrap_peers() -> [candidate()].
%% Relays of last resort, beside those in `MACULA_BOOTSTRAP_PEERS'.

-callback request_connection(LocalNodeId :: binary(), NodeId :: binary()) ->
    {ok, strategy(), SessionId :: term()} | {error, term()}.
%% A coordinator's advice. The engine tries all candidates whatever it says; the coordinator is told the outcome of this
%% session.

-callback report_result(SessionId :: term(), LocalNodeId :: binary(), success | failure) -> term().
%% `success' if the call that the node was looked up for was, within a minute; `failure' also if its caller died.

-optional_callbacks([endpoints/1, nat_profile/1, relays/1, bootstrap_peers/0, request_connection/2, report_result/3]).

%% @private
%% @doc Whether a module can be asked anything.
-spec is_one(module()) -> boolean().
is_one(Module) ->
    {module, Module} =:= code:ensure_loaded(Module)
        andalso lists:any(fun({Name, Arity}) -> erlang:function_exported(Module, Name, Arity) end,
                          ?MODULE:behaviour_info(callbacks)).
