%% The gateway's QUIC listener. Where macula has quicer there is a program here, named by the environment's `listener'
%% or the variable MACULA_LISTENER; without one nothing listens. Each receive chunk is taken for one frame.
-module(macula_gateway_listener).

-behaviour(gen_server).

-export([start_link/0]).
-export([send/3]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-define(LONGEST_LINE, 65536).

start_link() ->
    case program() of
        false -> ignore;
        Program -> gen_server:start_link({local, ?MODULE}, ?MODULE, Program, [])
    end.

program() ->
    case application:get_env(macula, listener) of
        {ok, Program} -> Program;
        undefined -> os:getenv("MACULA_LISTENER")
    end.

%% Answers on a stream. What is no stream of this listener cannot be written to, as with quicer.
send({?MODULE, Stream}, Type, Message) ->
    {ok, Frame} = macula_peer_wire:encode(Type, Message),
    gen_server:call(?MODULE, {send, Stream, Frame});
send(_NotAStream, _Type, _Message) ->
    {error, badarg}.

init(Program) ->
    Bind = "0.0.0.0:" ++ integer_to_list(macula_node:port()),
    Port = open_port({spawn_executable, Program},
                     [{args, ["--bind", Bind, "--mode", "listener"]}, {line, ?LONGEST_LINE}, exit_status]),
    receive
        {Port, {data, {eol, "ready " ++ _}}} -> {ok, #{port => Port, part => [], waiting => queue:new()}};
        {Port, {exit_status, Status}} -> {stop, {listener, Status}}
    end.

handle_call({send, Stream, Frame}, From, #{port := Port, waiting := Waiting} = State) ->
    true = port_command(Port, ["send ", integer_to_list(Stream), $\s, binary:encode_hex(Frame), $\n]),
    {noreply, State#{waiting := queue:in(From, Waiting)}}.

handle_cast(_Request, State) ->
    {noreply, State}.

handle_info({Port, {data, {noeol, Part}}}, #{port := Port, part := Parts} = State) ->
    {noreply, State#{part := [Parts, Part]}};
handle_info({Port, {data, {eol, Part}}}, #{port := Port, part := Parts} = State) ->
    {noreply, line(lists:flatten([Parts, Part]), State#{part := []})};
handle_info({Port, {exit_status, Status}}, #{port := Port} = State) ->
    {stop, {listener, Status}, State};
handle_info(_Info, State) ->
    {noreply, State}.

line("received " ++ Received, State) ->
    [Stream, Peer, Hex] = string:lexemes(Received, " "),
    %% What follows the frame is dropped, and so is what is no frame.
    case macula_peer_wire:decode(binary:decode_hex(list_to_binary(Hex))) of
        {ok, {Type, Message}} ->
            Handle = {?MODULE, list_to_integer(Stream)},
            gen_server:cast(macula_gateway, {route_message, Type, Message, Handle, {ok, address(Peer)}});
        {error, _} ->
            dropped
    end,
    State;
line(Answer, #{waiting := Waiting} = State) ->
    {{value, From}, Left} = queue:out(Waiting),
    gen_server:reply(From, case Answer of "ok." -> ok; _ -> {error, closed} end),
    State#{waiting := Left}.

address(Peer) ->
    [Host, Port] = string:split(Peer, ":", trailing),
    {ok, Ip} = inet:parse_address(string:trim(Host, both, "[]")),
    {Ip, list_to_integer(Port)}.
