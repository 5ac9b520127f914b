%% Messages of every size up to the limit arrive as they were sent; beyond the limits they are refused.
-module(size_SUITE).

-compile([export_all, nowarn_export_all]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-import(macula_peer_connector, [send_message/4, send_message_and_wait/4]).
-import(macula_peer_test, [endpoint/1, in_parallel/2, until/1, until/2, rpc/2]).

-define(MAX_FRAME, 16777216).
%% Frames from this size on are a sequence of their own.
-define(LIGHT, 65536).
-define(SIZES, [20, 1024, 4096, 4097, ?LIGHT - 1, ?LIGHT, ?LIGHT + 1, ?LIGHT + 5000, 262144, 1048576, ?MAX_FRAME]).

suite() -> [{timetrap, {seconds, 90}}].

all() ->
    [the_smallest_frame_arrives, messages_of_every_size_arrive_intact, requests_of_every_size_are_answered,
     answers_of_every_size_come_back, one_byte_too_many_is_refused, the_largest_frames_arrive_concurrently,
     too_many_of_the_largest_are_refused_and_not_lost, sixty_four_levels_arrive_and_one_more_is_refused].

init_per_suite(Config) ->
    {Node, Port} = macula_peer_test:start_listener(),
    [{node, Node}, {endpoint, endpoint(Port)} | Config].

end_per_suite(Config) ->
    macula_peer_test:stop_node(?config(node, Config)),
    macula_peer_node:stop().

init_per_testcase(_Case, Config) ->
    macula_peer_test:engine([]),
    Config.

the_smallest_frame_arrives(Config) ->
    {ok, <<1, 16#20, 0, 0, 1:32, 16#80>>} = macula_peer_wire:encode(call, #{}),
    ok = send_message(?config(endpoint, Config), call, #{}, 5000),
    until(fun() -> [] =/= [found || #{type := call, message := M} <- received(Config), M =:= #{}] end).

messages_of_every_size_arrive_intact(Config) ->
    [begin
         Message = message(Size),
         ok = send_message(?config(endpoint, Config), store, Message, 30000),
         arrives(Config, Message)
     end || Size <- ?SIZES].

requests_of_every_size_are_answered(Config) ->
    [?assertMatch({Size, {ok, {pong, _}}},
                  {Size, send_message_and_wait(?config(endpoint, Config), ping,
                                               #{timestamp => 1, pad => binary:copy(<<"p">>, Size)}, 30000)})
     || Size <- [0, ?LIGHT - 100, ?LIGHT, 1048576, ?MAX_FRAME - 100]].

answers_of_every_size_come_back(Config) ->
    Around = 51,
    [begin
         {ok, {rpc_reply, #{<<"result">> := Result}}} =
             send_message_and_wait(?config(endpoint, Config), rpc_request, rpc(<<"bytes">>, Size), 30000),
         ?assert(Result =:= binary:copy(<<"b">>, Size), Size)
     end || Size <- [0, 1024, ?LIGHT - 100, ?LIGHT, 1048576, ?MAX_FRAME - Around]].

one_byte_too_many_is_refused(Config) ->
    {ok, Frame} = macula_peer_wire:encode(store, message(?MAX_FRAME)),
    ?assertEqual(?MAX_FRAME, byte_size(Frame)),
    TooLarge = {error, {invalid_message, {too_large, ?MAX_FRAME}}},
    Message = message(?MAX_FRAME + 1),
    ?assertEqual(TooLarge, macula_peer_wire:encode(store, Message)),
    ?assertEqual(TooLarge, send_message(?config(endpoint, Config), store, Message, 5000)),
    ?assertEqual(TooLarge, send_message_and_wait(?config(endpoint, Config), store, Message, 5000)).

the_largest_frames_arrive_concurrently(Config) ->
    Messages = in_parallel(4, fun(_) ->
        Message = message(?MAX_FRAME),
        ok = send_message(?config(endpoint, Config), store, Message, 60000),
        Message
    end),
    [arrives(Config, Message) || Message <- Messages].

%% What is held for one peer is bounded.
too_many_of_the_largest_are_refused_and_not_lost(Config) ->
    macula_peer_test:engine([{max_unacknowledged, 2 * ?MAX_FRAME}]),
    Sent = in_parallel(6, fun(_) ->
        Message = message(?MAX_FRAME),
        {send_message(?config(endpoint, Config), store, Message, 60000), Message}
    end),
    ?assertEqual([], lists:usort([Result || {Result, _} <- Sent]) -- [ok, {error, {send_failed, overloaded}}]),
    Accepted = [Message || {ok, Message} <- Sent],
    ?assert(length(Accepted) >= 2),
    [arrives(Config, Message) || Message <- Accepted].

sixty_four_levels_arrive_and_one_more_is_refused(Config) ->
    Endpoint = ?config(endpoint, Config),
    [begin
         ok = send_message(Endpoint, store, Nest(64), 5000),
         TooDeep = {error, {invalid_message, {too_deep, 64}}},
         ?assertEqual(TooDeep, send_message(Endpoint, store, Nest(65), 5000)),
         ?assertEqual(TooDeep, send_message_and_wait(Endpoint, store, Nest(65), 5000))
     end || Nest <- [fun maps_nested/1, fun lists_nested/1]],
    until(fun() -> lists:member(maps_nested(64), [Message || #{message := Message} <- received(Config)]) end),
    until(fun() -> lists:member(lists_nested(64), [Message || #{message := Message} <- received(Config)]) end).

%% This many containers inside one another; the innermost one is empty.
maps_nested(1) -> #{};
maps_nested(Depth) -> #{<<"m">> => maps_nested(Depth - 1)}.

lists_nested(Depth) -> #{<<"l">> => arrays(Depth - 1)}.

%% Not a list of code points, which would be a string.
arrays(1) -> [<<"bottom">>];
arrays(Depth) -> [arrays(Depth - 1)].

%% Random bytes in a frame of just this size: header, map of one field, key `v', length of the binary, binary.
message(FrameSize) ->
    Rest = FrameSize - 8 - 1 - 3,
    Length = if Rest - 2 < 256 -> 2; Rest - 3 < 65536 -> 3; true -> 5 end,
    #{<<"v">> => crypto:strong_rand_bytes(Rest - Length)}.

arrives(Config, #{<<"v">> := Value}) ->
    Hash = {sha256, crypto:hash(sha256, Value)},
    until(fun() -> lists:any(fun(#{message := #{<<"v">> := V}}) -> V =:= Value orelse V =:= Hash;
                                (_) -> false
                             end, received(Config)) end, 30000).

received(Config) ->
    macula_peer_test:received(?config(node, Config)).
