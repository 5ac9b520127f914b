%% Asks connected nodes at which address they see this one.
-module(macula_nat_detector).

-behaviour(gen_server).

-export([start_link/0]).
-export([detect/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

%% Of one probe, in milliseconds.
-define(TIMEOUT, 5000).

start_link() ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, [], []).

%% What each observer said: `{Endpoint, {Ip, Port}}' or `{Endpoint, {error, Reason}}'.
detect() ->
    gen_server:call(?MODULE, detect, infinity).

init([]) ->
    {ok, []}.

handle_call(detect, _From, State) ->
    Observers = macula_peer_connection_pool:get_connected_peers(),
    {reply, [{Observer, probe(Observer)} || Observer <- Observers], State}.

handle_cast(_Request, State) ->
    {noreply, State}.

%% No messages arrive: a call of the connector leaves nothing behind.
handle_info(Info, _State) ->
    exit({stray, Info}).

probe(Observer) ->
    Probe = #{node_id => macula_node:id(), local_port => macula_node:port(),
              request_id => crypto:strong_rand_bytes(16)},
    case macula_peer_connector:send_message_and_wait(Observer, nat_probe, Probe, ?TIMEOUT) of
        {ok, {nat_probe_reply, #{<<"reflexive_ip">> := Ip, <<"reflexive_port">> := Port}}} ->
            {ok, Address} = inet:parse_address(binary_to_list(Ip)),
            {Address, Port};
        {error, _} = Error ->
            Error
    end.
