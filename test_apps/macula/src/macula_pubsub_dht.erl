%% Publishing to the subscribers that the DHT knows.
-module(macula_pubsub_dht).

-behaviour(gen_server).

-export([start_link/0]).
-export([subscribe/2, publish/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-define(SUBSCRIBERS, 20).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% The process gets `{macula_publish, Topic, Payload}', and the DHT to know of it. With `endpoint' in `how' publishers
%% send to the gateway there, with `node_id' to the node wherever it is.
subscribe(Topic, How) ->
    ok = macula_gateway:subscribe(Topic, self()),
    macula_routing_server:store(macula_routing_server, key(Topic), subscription(How)).

%% What came of the send to each subscriber that is not this node.
publish(Topic, Payload) ->
    gen_server:call(?MODULE, {publish, Topic, Payload}, infinity).

init([]) ->
    {ok, 0}.

handle_call({publish, Topic, Payload}, _From, Number) ->
    Me = macula_node:id(),
    Found = macula_routing_server:find_value(macula_routing_server, key(Topic), ?SUBSCRIBERS),
    Sent = [{Node, deliver(Me, Topic, Payload, Number, Subscriber)}
            || {ok, Subscribers} <- [Found], #{<<"node_id">> := Node} = Subscriber <- Subscribers, Node =/= Me],
    {reply, Sent, Number + 1}.

handle_cast(_Request, State) ->
    {noreply, State}.

%% No messages arrive: a call of the connector leaves nothing behind.
handle_info(Info, _State) ->
    exit({stray, Info}).

key(Topic) ->
    crypto:hash(sha256, Topic).

subscription(endpoint) -> #{<<"node_id">> => macula_node:id(), <<"endpoint">> => macula_node:endpoint()};
subscription(node_id) -> #{<<"node_id">> => macula_node:id()}.

deliver(Me, Topic, Payload, Number, #{<<"endpoint">> := Endpoint} = Subscriber) ->
    macula_peer_connector:send_message(Endpoint, pubsub_route, route(Me, Topic, Payload, Number, Subscriber));
deliver(Me, Topic, Payload, Number, #{<<"node_id">> := Node} = Subscriber) ->
    Route = route(Me, Topic, Payload, Number, Subscriber),
    macula_peer_connector:send_message_nat_aware(Me, Node, pubsub_route, Route).

route(Me, Topic, Payload, Number, #{<<"node_id">> := Node}) ->
    #{<<"destination_node_id">> => Node, <<"source_node_id">> => Me, <<"hop_count">> => 0, <<"max_hops">> => 10,
      <<"topic">> => Topic, <<"payload">> => Payload, <<"message_id">> => Number}.
