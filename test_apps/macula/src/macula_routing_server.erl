%% A DHT node: keeps values, and asks and tells up to 20 others by the peer connector, as the original from inside its
%% callbacks.
-module(macula_routing_server).

-behaviour(gen_server).

-export([start_link/0]).
-export([find_value/3, store/3]).
-export([store_local/2, get_local/1, nodes/0, add_node/1]).
-export([peer_endpoint_key/1]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-define(NODES, 20).
%% Of a question to one node, in milliseconds.
-define(TIMEOUT, 5000).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% `{ok, Values}', or `{nodes, Nodes}' without any. The nodes asked know more than this one.
find_value(Server, Key, Count) ->
    gen_server:call(Server, {find_value, Key, Count}, infinity).

%% Here and at up to 20 other nodes; one that is known by its id alone is told wherever it is. What came of each send
%% is the answer.
store(Server, Key, Value) ->
    gen_server:call(Server, {store, Key, Value}, infinity).

store_local(Key, Value) ->
    gen_server:cast(?MODULE, {store_local, Key, Value}).

get_local(Key) ->
    gen_server:call(?MODULE, {get_local, Key}, infinity).

nodes() ->
    gen_server:call(?MODULE, nodes, infinity).

add_node(#{node_id := _} = Node) ->
    gen_server:call(?MODULE, {add_node, Node}, infinity).

%% Under which the endpoint of a node is.
peer_endpoint_key(NodeId) ->
    crypto:hash(sha256, <<"peer.endpoint.", NodeId/binary>>).

init([]) ->
    {ok, #{values => #{}, nodes => application:get_env(macula, nodes, [])}}.

handle_call({find_value, Key, Count}, _From, State) ->
    Answer = macula_variant:answer(?MODULE, fun() -> look_up(Key, Count, State) end, fun strange/0),
    {reply, Answer, State};
handle_call({store, Key, Value}, _From, #{nodes := Nodes} = State) ->
    Sent = [tell(Node, #{key => Key, value => Value}) || Node <- lists:sublist(Nodes, ?NODES)],
    {reply, Sent, keep(Key, Value, State)};
handle_call({get_local, Key}, _From, #{values := Values} = State) ->
    {reply, local(Key, Values), State};
handle_call(nodes, _From, #{nodes := Nodes} = State) ->
    {reply, lists:sublist(Nodes, ?NODES), State};
handle_call({add_node, Node}, _From, #{nodes := Nodes} = State) ->
    {reply, ok, State#{nodes := [Node | Nodes]}}.

handle_cast({store_local, Key, Value}, State) ->
    {noreply, keep(Key, Value, State)}.

%% No messages arrive: a call of the connector leaves nothing behind.
handle_info(Info, _State) ->
    exit({stray, Info}).

tell(#{endpoint := Endpoint}, Message) ->
    macula_peer_connector:send_message(Endpoint, store, Message);
tell(#{node_id := NodeId}, Message) ->
    macula_peer_connector:send_message_nat_aware(macula_node:id(), NodeId, store, Message).

keep(Key, Value, #{values := Values} = State) ->
    Others = [Other || Other <- maps:get(Key, Values, []), Other =/= Value],
    State#{values := Values#{Key => [Value | Others]}}.

local(Key, Values) ->
    case Values of
        #{Key := Found} -> {ok, Found};
        #{} -> not_found
    end.

%% What is here is not all there is.
look_up(Key, Count, #{values := Values, nodes := Nodes}) ->
    Asked = [ask(Endpoint, Key) || #{endpoint := Endpoint} <- lists:sublist(Nodes, Count)],
    case lists:usort(lists:append([maps:get(Key, Values, []) | [Found || {ok, Found} <- Asked]])) of
        [] -> {nodes, Nodes};
        Found -> {ok, Found}
    end.

ask(Endpoint, Key) ->
    case macula_peer_connector:send_message_and_wait(Endpoint, find_value, #{<<"key">> => Key}, ?TIMEOUT) of
        {ok, {find_value_reply, #{<<"value">> := Found}}} when is_list(Found) -> {ok, Found};
        {ok, {find_value_reply, #{<<"value">> := Found}}} -> {ok, [Found]};
        {ok, {find_value_reply, _}} -> not_found;
        {error, _} = Error -> Error
    end.

strange() ->
    [{ok, banana}, {ok, []}, {ok, [banana | apple]}, {ok, #{<<"host">> => 12, <<"port">> => <<"no">>}},
     {ok, [#{<<"host">> => <<"127.0.0.1">>, <<"port">> => -1}]}, {ok, [#{<<"host">> => [1 | 2], <<"port">> => 80}]},
     {nodes, banana}, banana, {ok, [#{<<"host">> => binary:copy(<<"a">>, 1000), <<"port">> => 80}]}, make_ref()].
