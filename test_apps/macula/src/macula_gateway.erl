%% Answers what comes on the stream that it came on, and gives the rest to the servers that it is for.
-module(macula_gateway).

-behaviour(gen_server).

-export([start_link/0]).
-export([received/0, forget/0]).
-export([subscribe/2, deliver/2]).
-export([handle/2]).
-export([init/1, handle_call/3, handle_cast/2]).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% What came, in order: `{Type, Message, Peer, Answered}'; the last is what came of the answer on the stream, `later' or
%% `none'.
received() ->
    gen_server:call(?MODULE, received).

forget() ->
    gen_server:call(?MODULE, forget).

%% The process gets `{macula_publish, Topic, Payload}'.
subscribe(Topic, Pid) ->
    gen_server:call(?MODULE, {subscribe, Topic, Pid}).

%% To the subscribers here.
deliver(Topic, Payload) ->
    gen_server:cast(?MODULE, {deliver, Topic, Payload}).

%% Registers the function for a procedure. It gets the arguments of a request.
handle(Procedure, Fun) ->
    gen_server:call(?MODULE, {handle, Procedure, Fun}).

init([]) ->
    {ok, #{received => [], subscribers => #{}, procedures => #{}}}.

handle_call(received, _From, #{received := Received} = State) ->
    {reply, lists:reverse(Received), State};
handle_call(forget, _From, State) ->
    {reply, ok, State#{received := []}};
handle_call({subscribe, Topic, Pid}, _From, #{subscribers := Subscribers} = State) ->
    Others = maps:get(Topic, Subscribers, []),
    {reply, ok, State#{subscribers := Subscribers#{Topic => [Pid | Others]}}};
handle_call({handle, Procedure, Fun}, _From, #{procedures := Procedures} = State) ->
    {reply, ok, State#{procedures := Procedures#{Procedure => Fun}}}.

handle_cast({route_message, Type, Message, Stream, {ok, Peer}}, #{received := Received} = State) ->
    Route = fun() -> route(Type, Message, Stream, Peer, State) end,
    Routed = macula_variant:answer(?MODULE, Route, fun() -> [strange(Stream)] end),
    {noreply, State#{received := [{Type, Message, Peer, Routed} | Received]}};
handle_cast({deliver, Topic, Payload}, #{subscribers := Subscribers} = State) ->
    _ = [Pid ! {macula_publish, Topic, Payload} || Pid <- maps:get(Topic, Subscribers, [])],
    {noreply, State}.

route(ping, Message, Stream, _Peer, _State) ->
    answer(Stream, pong, #{timestamp => maps:get(<<"timestamp">>, Message, 0), server_time => now_ms()});
route(nat_probe, #{<<"node_id">> := NodeId}, Stream, {Ip, Port}, _State) ->
    Reflexive = list_to_binary(inet:ntoa(Ip)),
    answer(Stream, nat_probe_reply, #{node_id => NodeId, reflexive_ip => Reflexive, reflexive_port => Port,
                                      server_time => now_ms()});
route(store, #{<<"key">> := Key, <<"value">> := Value}, Stream, _Peer, _State) ->
    ok = macula_routing_server:store_local(Key, Value),
    answer(Stream, reply, #{stored => Key});
route(find_value, #{<<"key">> := Key}, Stream, _Peer, _State) ->
    %% Asked in a process of its own: the routing server may be waiting for this node's answer.
    answer_later(Stream, find_value_reply, fun() ->
        case macula_routing_server:get_local(Key) of
            {ok, Values} -> #{value => Values};
            not_found -> #{nodes => macula_routing_server:nodes()}
        end
    end);
route(find_node, _Message, Stream, _Peer, _State) ->
    answer_later(Stream, find_node_reply, fun() -> #{nodes => macula_routing_server:nodes()} end);
route(call, Message, Stream, _Peer, #{procedures := Procedures}) ->
    answer_later(Stream, reply, fun() ->
        #{call_id => maps:get(<<"call_id">>, Message, <<>>), result => run(Message, Procedures)}
    end);
route(rpc_request, #{<<"request_id">> := Id} = Message, Stream, _Peer, #{procedures := Procedures}) ->
    Reply = fun() -> #{request_id => Id, from_node => macula_node:id(), result => run(Message, Procedures)} end,
    case application:get_env(macula, rpc_reply, stream) of
        stream -> answer_later(Stream, rpc_reply, Reply);
        node -> reply_to_node(Message, Reply)
    end;
route(rpc_reply, Message, _Stream, _Peer, _State) ->
    macula_rpc_handler:replied(Message),
    none;
route(Publish, #{<<"topic">> := Topic, <<"payload">> := Payload}, _Stream, _Peer, _State)
  when Publish =:= publish; Publish =:= pubsub_route ->
    deliver(Topic, Payload),
    none;
route(_Type, _Message, _Stream, _Peer, _State) ->
    none.

run(#{<<"procedure">> := Procedure} = Message, Procedures) ->
    case Procedures of
        #{Procedure := Fun} -> Fun(maps:get(<<"args">>, Message, null));
        #{} -> <<"unknown procedure">>
    end;
run(_Message, _Procedures) ->
    <<"no procedure">>.

answer(Stream, Type, Message) ->
    macula_gateway_listener:send(Stream, Type, Message).

answer_later(Stream, Type, Message) ->
    _ = spawn(fun() -> answer(Stream, Type, Message()) end),
    later.

reply_to_node(#{<<"from_node">> := Node}, Reply) ->
    _ = spawn(fun() ->
        macula_peer_connector:send_message_nat_aware(macula_node:id(), Node, rpc_reply, Reply())
    end),
    later.

strange(Stream) ->
    answer(Stream, disconnect, #{reason => <<"strange">>, message => <<"answer">>}).

now_ms() ->
    os:system_time(millisecond).
