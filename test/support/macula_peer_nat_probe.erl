%% What a NAT does, found out from both sides of it with plain UDP sockets, and in the words of macula_peer_nat. An
%% observer is a public host with two addresses of the family of the host inside.
-module(macula_peer_nat_probe).

-export([profile/2, address_outside/2, after_early_packet/3]).
-export([reaches/2, hairpins/3]).

%% For what arrives, and for what does not. Packets take microseconds.
-define(PATIENCE, 5000).
-define(SILENCE, 200).
-define(SAMPLES, 8).

profile(Inside, Observer) ->
    Public = observers(Observer),
    Profile = #{mapping => mapping(socket(Inside), Public), filtering => filtering(socket(Inside), Public),
                allocation => allocation(Inside, Public)},
    close(Public),
    Profile.

%% Two ports of one address and one of another.
observers({Host, [Ip, OtherIp]}) ->
    [macula_peer_net:socket(Host, Address, 0) || Address <- [Ip, Ip, OtherIp]].

mapping(Socket, Public) ->
    [Seen, SeenByPort, SeenByHost] = [seen(Socket, Observer) || Observer <- Public],
    close([Socket]),
    case {SeenByPort =:= Seen, SeenByHost =:= Seen} of
        {true, true} -> ei;
        {true, false} -> hd;
        {false, _} -> pd
    end.

%% Which hosts may send to the address that the first one sees. What it sends itself comes last.
filtering(Socket, [Asked, OtherPort, OtherHost]) ->
    {Ip, Port} = seen(Socket, Asked),
    Senders = [{OtherHost, <<"other host">>}, {OtherPort, <<"other port">>}, {Asked, <<"control">>}],
    _ = [ok = gen_udp:send(From, Ip, Port, What) || {From, What} <- Senders],
    Arrived = arrived(Socket),
    close([Socket]),
    [] = Arrived -- [{address(From), What} || {From, What} <- Senders],
    case lists:sort([What || {_, What} <- Arrived]) of
        [<<"control">>, <<"other host">>, <<"other port">>] -> ei;
        [<<"control">>, <<"other port">>] -> hd;
        [<<"control">>] -> pd
    end.

%% The ports of new sockets, one after the other.
allocation(Inside, [Observer | _]) ->
    Sockets = [socket(Inside) || _ <- lists:seq(1, ?SAMPLES)],
    Own = [Port || {_, Port} <- lists:map(fun address/1, Sockets)],
    [First | _] = Mapped = [Port || {_, Port} <- [seen(Socket, Observer) || Socket <- Sockets]],
    close(Sockets),
    case {Mapped =:= Own, Mapped =:= lists:seq(First, First + ?SAMPLES - 1)} of
        {true, _} -> pp;
        {false, true} -> pc;
        {false, false} -> rd
    end.

%% Where the observer sees a host.
address_outside(Inside, Observer) ->
    [Public | _] = Sockets = observers(Observer),
    Socket = socket(Inside),
    {Ip, _} = seen(Socket, Public),
    close([Socket | Sockets]),
    Ip.

%% The port of a new socket, and the ports that the observers see, if the first of them had sent there before.
after_early_packet(Inside, Observer, Outside) ->
    [Early | _] = Public = observers(Observer),
    Socket = socket(Inside),
    {_, Port} = address(Socket),
    ok = gen_udp:send(Early, Outside, Port, <<"early">>),
    Arrived = arrived(Socket),
    Seen = [element(2, seen(Socket, From)) || From <- Public],
    close([Socket | Public]),
    {Port, Arrived, Seen}.

%% Whether a packet from one host arrives at the other, by the address that this one has itself.
reaches(From, To) ->
    [Source, Target] = [socket(Host) || Host <- [From, To]],
    ok = gen_udp:send(Source, address(Target), <<"packet">>),
    Arrived = arrived(Target),
    close([Source, Target]),
    Arrived =/= [].

%% Whether two hosts inside reach each other at the addresses that the observer sees them at, once both have tried; and
%% they see each other there.
hairpins(One, Other, Observer) ->
    [Public | _] = Observers = observers(Observer),
    Sockets = [socket(Host) || Host <- [One, Other]],
    Outside = [seen(Socket, Public) || Socket <- Sockets],
    Send = fun(Packet) ->
        [ok = gen_udp:send(Socket, To, Packet) || {Socket, To} <- lists:zip(Sockets, lists:reverse(Outside))]
    end,
    _ = Send(<<"first">>),
    _ = [arrived(Socket) || Socket <- Sockets],
    _ = Send(<<"second">>),
    Arrived = [arrived(Socket) || Socket <- Sockets],
    close(Sockets ++ Observers),
    case [[{From, <<"second">>}] || From <- lists:reverse(Outside)] of
        Arrived -> true;
        _ when Arrived =:= [[], []] -> false
    end.

%% ---- packets ----

socket(Host) ->
    macula_peer_net:socket(Host, 0).

close(Sockets) ->
    lists:foreach(fun gen_udp:close/1, Sockets).

%% What the observer sees a packet of the socket come from.
seen(Socket, Observer) ->
    Packet = crypto:strong_rand_bytes(8),
    ok = gen_udp:send(Socket, address(Observer), Packet),
    {ok, {Ip, Port, Packet}} = gen_udp:recv(Observer, 0, ?PATIENCE),
    {Ip, Port}.

%% Everything until nothing comes any more.
arrived(Socket) ->
    case gen_udp:recv(Socket, 0, ?SILENCE) of
        {ok, {Ip, Port, Packet}} -> [{{Ip, Port}, Packet} | arrived(Socket)];
        {error, timeout} -> []
    end.

address(Socket) ->
    {ok, Address} = inet:sockname(Socket),
    Address.
