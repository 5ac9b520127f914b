%% Two interfaces of this BEAM's host as the ends of one long cable: what comes in at one leaves at the other, after a
%% delay and in order. Linux only.
-module(macula_peer_long_link).

-export([join/3]).

%% Of Linux's headers; the kernel's note before each frame says what a card was still to do with it: checksum, segments.
-define(AF_PACKET, 17).
-define(EVERY_PROTOCOL, 3).
-define(SOL_SOCKET, 1).
-define(SO_RCVBUFFORCE, 33).
-define(SOL_PACKET, 263).
-define(PACKET_VNET_HDR, 15).

-define(BUFFER, 16 bsl 20).
%% With the note.
-define(LARGEST_FRAME, 66000).

%% Lasts as long as the node.
join(Interface, Other, Ms) ->
    Asked = self(),
    {Owner, Failed} = spawn_monitor(fun() ->
        [One, Two] = [open(Name) || Name <- [Interface, Other]],
        _ = [carry(From, To, Ms * 1000) || {From, To} <- [{One, Two}, {Two, One}]],
        Asked ! {self(), joined},
        receive after infinity -> ok end
    end),
    receive
        {Owner, joined} -> true = demonitor(Failed, [flush]), ok;
        {'DOWN', Failed, process, Owner, Reason} -> {error, Reason}
    end.

carry(From, To, Delay) ->
    Line = spawn_link(fun() -> deliver(To) end),
    spawn_link(fun() -> take(From, Line, Delay) end).

%% Gets nothing before it is bound: no frames of other interfaces.
open(Interface) ->
    {ok, Index} = net:if_name2index(Interface),
    {ok, Socket} = socket:open(?AF_PACKET, raw, 0),
    ok = socket:setopt_native(Socket, {?SOL_PACKET, ?PACKET_VNET_HDR}, 1),
    ok = socket:setopt_native(Socket, {?SOL_SOCKET, ?SO_RCVBUFFORCE}, ?BUFFER),
    Address = <<?EVERY_PROTOCOL:16, Index:32/native, 0:16, 0, 0, 0:64>>,
    ok = socket:bind(Socket, #{family => ?AF_PACKET, addr => Address}),
    Socket.

take(Socket, Line, Delay) ->
    case socket:recvmsg(Socket, ?LARGEST_FRAME, 0, [], infinity) of
        %% What this host itself sends there.
        {ok, #{addr := #{pkttype := outgoing}}} -> ok;
        {ok, #{iov := [Frame]}} -> Line ! {erlang:monotonic_time(microsecond) + Delay, Frame}
    end,
    take(Socket, Line, Delay).

deliver(Socket) ->
    receive
        {Due, Frame} ->
            wait(Due - erlang:monotonic_time(microsecond)),
            %% What is refused is lost, as with any cable.
            _ = socket:send(Socket, Frame),
            deliver(Socket)
    end.

wait(Us) when Us > 0 -> receive after (Us + 999) div 1000 -> ok end;
wait(_Late) -> ok.
