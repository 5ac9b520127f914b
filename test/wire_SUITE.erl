%% The wire format is that of macula 0.14.3 for every term, and decoding is safe for every input.
-module(wire_SUITE).

-include_lib("stdlib/include/assert.hrl").

-export([all/0]).
-export([encodes_as_the_original/1, decodes_as_the_original/1]).
-export([any_term_comes_back_as_documented/1]).
-export([any_bytes_are_decoded_or_refused/1, mutated_frames_are_decoded_or_refused/1]).
-export([decoding_makes_no_atom/1]).
-export([nesting_is_limited/1, frame_size_is_limited/1]).
-export([a_missing_field_is_named/1, keys_are_atoms_or_binaries/1, other_types_need_no_field/1]).
-export([errors_name_the_term_that_cannot_be_encoded/1]).

-define(MAX_FRAME, (16 * 1024 * 1024)).
-define(MAX_DEPTH, 64).
-define(HEADER, 8).
-define(STORE_ID, 16#42).

all() ->
    [encodes_as_the_original, decodes_as_the_original, any_term_comes_back_as_documented,
     any_bytes_are_decoded_or_refused, mutated_frames_are_decoded_or_refused, decoding_makes_no_atom,
     nesting_is_limited, frame_size_is_limited, a_missing_field_is_named, keys_are_atoms_or_binaries,
     other_types_need_no_field, errors_name_the_term_that_cannot_be_encoded].

%% ---- vectors recorded from the original ----

encodes_as_the_original(_Config) ->
    ?assertEqual(179, checked("encode.tsv", fun encodes/2)).

encodes(Input, Result) ->
    {Type, Msg} = term(Input),
    Encoded = macula_peer_wire:encode(Type, Msg),
    case {Type, Result} of
        {dht_store, "EXC " ++ _} ->
            %% The type of the original's own example, which it raises for: here another name of store.
            ?assertEqual(macula_peer_wire:encode(store, Msg), Encoded);
        {_, "EXC " ++ _} ->
            {error, {Reason, _}} = Encoded,
            ?assert(lists:member(Reason, [invalid_message, invalid_message_type]));
        {_, Hex} ->
            same_frame(binary:decode_hex(list_to_binary(Hex)), Encoded, has_several_keys(Msg))
    end.

same_frame(Expected, Encoded, false) ->
    ?assertEqual({ok, Expected}, Encoded);
same_frame(Expected, {ok, Frame}, true) ->
    ?assertEqual(byte_size(Expected), byte_size(Frame)),
    ?assertEqual(macula_peer_wire:decode(Expected), macula_peer_wire:decode(Frame)).

has_several_keys(Map) when is_map(Map) ->
    map_size(Map) > 1 orelse lists:any(fun has_several_keys/1, maps:keys(Map) ++ maps:values(Map));
has_several_keys(List) when is_list(List) ->
    lists:any(fun has_several_keys/1, List);
has_several_keys(_) ->
    false.

decodes_as_the_original(_Config) ->
    ?assertEqual(252, checked("decode.tsv", fun decodes/2)).

decodes(Hex, Result) ->
    ?assertEqual(term(Result), macula_peer_wire:decode(binary:decode_hex(list_to_binary(Hex)))).

%% How many lines were checked.
checked(File, Check) ->
    {ok, Content} = file:read_file(filename:join([macula_peer_test:root(), "test", "vectors", File])),
    Lines = string:split(string:trim(unicode:characters_to_list(Content), trailing, "\n"), "\n", all),
    lists:foreach(fun(Line) -> check(Line, Check) end, Lines),
    length(Lines).

check(Line, Check) ->
    [Input, Result] = string:split(Line, "\t", all),
    try
        Check(Input, Result)
    catch
        Class:Reason:Stack ->
            ct:pal("line ~ts", [Line]),
            erlang:raise(Class, Reason, Stack)
    end.

%% A printed term; what cannot be read back is made afresh.
term(Text) ->
    Fresh = [{"#Fun<[^>]*>", "fun() -> ok end"}, {"#Ref<[^>]*>", "make_ref()"}, {"#Port<[^>]*>", "hd(erlang:ports())"},
             {"<[0-9]+\\.[0-9]+\\.[0-9]+>", "self()"}],
    Readable = lists:foldl(fun({Pattern, Expression}, T) ->
                                   re:replace(T, Pattern, Expression, [unicode, global, {return, list}])
                           end, Text, Fresh),
    {ok, Tokens, _} = erl_scan:string(Readable ++ "."),
    {ok, Expressions} = erl_parse:parse_exprs(Tokens),
    {value, Term, _} = erl_eval:exprs(Expressions, []),
    Term.

%% ---- properties ----

-define(TERMS, 5000).
-define(FRAMES, 20000).

any_term_comes_back_as_documented(_Config) ->
    seeded(?TERMS, fun comes_back/0).

comes_back() ->
    Msg = (random_map(4))#{large => rand:bytes(one_of([0, 0, 0, 65535, 65536, rand:uniform(200000)]))},
    {ok, Frame} = macula_peer_wire:encode(store, Msg),
    ?assertEqual({ok, {store, image(Msg)}}, macula_peer_wire:decode(Frame)).

%% What a term looks like to the receiver.
image(Atom) when Atom =:= true; Atom =:= false; Atom =:= null -> Atom;
image(Atom) when is_atom(Atom) -> atom_to_binary(Atom);
image(Map) when is_map(Map) -> maps:from_list([{image(Key), image(Value)} || {Key, Value} <- maps:to_list(Map)]);
image(List) when is_list(List) -> [image(Element) || Element <- List];
image(Other) -> Other.

any_bytes_are_decoded_or_refused(_Config) ->
    seeded(?FRAMES, fun() -> is_decoded_or_refused(random_bytes()) end).

random_bytes() ->
    Bytes = rand:bytes(rand:uniform(200) - 1),
    %% Half of them get past the header.
    case rand:uniform(2) of
        1 -> Bytes;
        2 -> frame(Bytes)
    end.

mutated_frames_are_decoded_or_refused(_Config) ->
    seeded(?FRAMES, fun() ->
        {ok, Frame} = macula_peer_wire:encode(store, random_map(2)),
        is_decoded_or_refused(lists:foldl(fun(_, F) -> mutated(F) end, Frame, lists:seq(1, rand:uniform(3))))
    end).

mutated(Frame) ->
    At = rand:uniform(byte_size(Frame) + 1) - 1,
    <<Before:At/binary, After/binary>> = Frame,
    case {rand:uniform(4), After} of
        {1, <<_, Rest/binary>>} -> <<Before/binary, (rand:uniform(256) - 1), Rest/binary>>;
        {2, <<_, Rest/binary>>} -> fitted(<<Before/binary, Rest/binary>>);
        {3, _} -> fitted(<<Before/binary, (rand:bytes(rand:uniform(9)))/binary, After/binary>>);
        _ -> Before
    end.

%% With the length that the header must tell for the payload to be looked at.
fitted(<<Head:4/binary, _:32, Payload/binary>>) -> <<Head/binary, (byte_size(Payload)):32, Payload/binary>>;
fitted(Short) -> Short.

is_decoded_or_refused(Frame) ->
    case macula_peer_wire:decode(Frame) of
        {ok, {Type, _}} when is_atom(Type) -> ok;
        {error, _} -> ok
    end.

%% Runs a check many times. The seed that is printed for a failure, put here, repeats it.
seeded(Times, Check) ->
    Seed = {erlang:phash2(node()), erlang:system_time(), erlang:unique_integer()},
    _ = rand:seed(exsss, Seed),
    try
        lists:foreach(fun(_) -> Check() end, lists:seq(1, Times))
    catch
        Class:Reason:Stack ->
            ct:pal("seed ~p", [Seed]),
            erlang:raise(Class, Reason, Stack)
    end.

random_term(0) ->
    random_scalar();
random_term(Depth) ->
    case rand:uniform(4) of
        1 -> random_map(Depth - 1);
        2 -> [random_term(Depth - 1) || _ <- lists:seq(1, rand:uniform(8) - 1)];
        _ -> random_scalar()
    end.

%% No two keys have one image: which of them would win depends on the order of the map.
random_map(Depth) ->
    Pairs = [{random_term(min(Depth, 1)), random_term(Depth)} || _ <- lists:seq(1, rand:uniform(8) - 1)],
    Unique = maps:from_list([{image(Key), {Key, Value}} || {Key, Value} <- Pairs]),
    maps:from_list(maps:values(Unique)).

random_scalar() ->
    case rand:uniform(8) of
        1 -> rand:uniform(512) - 256;
        2 -> border();
        3 -> random_float();
        4 -> one_of([true, false, null, undefined, nil, ok, '', 'with space', 'Ünïcödé', '日本語', long_atom()]);
        5 -> [random_code_point() || _ <- lists:seq(1, one_of([0, 1, 5, 31, 32, 255, 256]))];
        6 -> one_of([[rand:uniform(100), -1], [16#D800], [16#110000], [1.0, 2], [97 | [<<"b">>]], [[]]]);
        7 -> rand:bytes(rand:uniform(100));
        8 -> rand:bytes(one_of([0, 31, 32, 63, 64, 65, 255, 256, 1000]))
    end.

border() ->
    Number = one_of([1, -1]) * (1 bsl (rand:uniform(65) - 1)) + rand:uniform(3) - 2,
    max(-(1 bsl 63), min((1 bsl 64) - 1, Number)).

random_float() ->
    case rand:bytes(8) of
        <<Float/float>> -> Float;
        %% Infinities and what is no number: Erlang has none.
        _ -> 0.5
    end.

random_code_point() ->
    case rand:uniform(4) of
        1 -> rand:uniform(16#110000) - 1;
        2 -> one_of([0, 127, 128, 16#7FF, 16#800, 16#D7FF, 16#E000, 16#FFFE, 16#FFFF, 16#10000, 16#10FFFF]);
        _ -> rand:uniform(128) - 1
    end.

long_atom() ->
    list_to_atom(lists:duplicate(255, 16#20AC)).

one_of(List) ->
    lists:nth(rand:uniform(length(List)), List).

decoding_makes_no_atom(_Config) ->
    Frames = [random_keys(Bin) || _ <- lists:seq(1, 2500), Bin <- [true, false]],
    %% Code is loaded once.
    {ok, _} = macula_peer_wire:decode(hd(Frames)),
    Before = erlang:system_info(atom_count),
    lists:foreach(fun(Frame) -> {ok, {store, #{}}} = macula_peer_wire:decode(Frame) end, Frames),
    ?assertEqual(Before, erlang:system_info(atom_count)).

random_keys(Bin) ->
    Keys = [binary:encode_hex(rand:bytes(8)) || _ <- lists:seq(1, 5)],
    Key = fun(Text) when Bin -> Text; (Text) -> binary_to_list(Text) end,
    {ok, Frame} = macula_peer_wire:encode(store, maps:from_list([{Key(Text), Text} || Text <- Keys])),
    Frame.

%% ---- limits ----

nesting_is_limited(_Config) ->
    %% The message itself is the first level.
    Encode = fun(Levels) -> macula_peer_wire:encode(store, #{v => nested(Levels - 1)}) end,
    {ok, _} = Encode(?MAX_DEPTH),
    ?assertEqual({error, {invalid_message, {too_deep, ?MAX_DEPTH}}}, Encode(?MAX_DEPTH + 1)),
    ?assertEqual({error, {invalid_message, {too_deep, ?MAX_DEPTH}}}, Encode(100000)),
    %% One-element arrays around an empty one.
    Decode = fun(Levels) -> macula_peer_wire:decode(frame(<<(binary:copy(<<16#91>>, Levels - 1))/binary, 16#90>>)) end,
    {ok, {store, _}} = Decode(?MAX_DEPTH),
    ?assertEqual({error, {msgpack_decode_error, {too_deep, ?MAX_DEPTH}}}, Decode(?MAX_DEPTH + 1)),
    ?assertEqual({error, {msgpack_decode_error, {too_deep, ?MAX_DEPTH}}}, Decode(1000000)).

nested(0) -> a;
nested(Levels) -> [nested(Levels - 1)].

frame_size_is_limited(_Config) ->
    %% A map of one, "v" as bin 8, and the head of a bin 32.
    Around = ?HEADER + 1 + 3 + 5,
    Encode = fun(Size) -> macula_peer_wire:encode(store, #{v => binary:copy(<<7>>, Size - Around)}) end,
    {ok, Largest} = Encode(?MAX_FRAME),
    ?assertEqual(?MAX_FRAME, byte_size(Largest)),
    ?assertEqual({error, {invalid_message, {too_large, ?MAX_FRAME}}}, Encode(?MAX_FRAME + 1)),
    {ok, {store, #{<<"v">> := Value}}} = macula_peer_wire:decode(Largest),
    ?assertEqual(?MAX_FRAME - Around, byte_size(Value)),
    %% What the header announces is refused before it is there.
    TooLarge = <<1, ?STORE_ID, 0, 0, (?MAX_FRAME + 1 - ?HEADER):32>>,
    ?assertEqual({error, {frame_too_large, ?MAX_FRAME + 1, ?MAX_FRAME}}, macula_peer_wire:decode(TooLarge)).

frame(Payload) ->
    <<1, ?STORE_ID, 0, 0, (byte_size(Payload)):32, Payload/binary>>.

%% ---- what a message must have ----

%% Keys are atoms.
atom_keyed() ->
    [{connect, [version, node_id, realm_id, capabilities]},
     {disconnect, [reason, message]},
     {ping, [timestamp]},
     {pong, [timestamp, server_time]}].

%% Keys are atoms or binaries, as the first one is.
either_keyed() ->
    [{publish, [topic, payload, qos, retain, message_id]},
     {subscribe, [topics, qos]},
     {unsubscribe, [topics]},
     {pubsub_route, [destination_node_id, source_node_id, hop_count, max_hops, topic, payload]},
     {rpc_route, [destination_node_id, source_node_id, hop_count, max_hops, payload_type, payload]},
     {rpc_request, [request_id, procedure, args, from_node]},
     {rpc_reply, [request_id, from_node]},
     {nat_probe, [node_id, local_port]},
     {nat_probe_reply, [node_id, reflexive_ip, reflexive_port, server_time]},
     {punch_request, [session_id, requester_id, target_id]},
     {punch_coordinate, [session_id, peer_id, peer_host, peer_ports, punch_time, role]},
     {punch_result, [session_id, success]},
     {relay_request, [session_id, target_id]},
     {relay_data, [session_id, payload]}].

unrequiring() ->
    [call, reply, cast, swim_ping, swim_ack, swim_ping_req, find_node, find_node_reply, store, dht_store, find_value,
     find_value_reply, punch_execute, bridge_rpc, bridge_data].

a_missing_field_is_named(_Config) ->
    [names_missing(Type, Fields, fun(Field) -> Field end) || {Type, Fields} <- atom_keyed() ++ either_keyed()],
    [names_missing(Type, Fields, fun atom_to_binary/1) || {Type, Fields} <- either_keyed()].

names_missing(Type, Fields, Spell) ->
    accepts(Type, [Spell(Field) || Field <- Fields]),
    [?assertEqual({Type, missing(Field)}, {Type, encode(Type, [Spell(Other) || Other <- Fields, Other =/= Field])})
     || Field <- Fields].

keys_are_atoms_or_binaries(_Config) ->
    [?assertEqual({Type, missing(First)}, {Type, encode(Type, [atom_to_binary(Field) || Field <- Fields])})
     || {Type, [First | _] = Fields} <- atom_keyed()],
    [begin
         ?assertEqual({Type, missing(Second)}, {Type, encode(Type, [First | [atom_to_binary(Each) || Each <- Rest]])}),
         ?assertEqual({Type, missing(Second)}, {Type, encode(Type, [atom_to_binary(First) | Rest])}),
         %% Other fields are spelled as one likes.
         accepts(Type, [<<"one">>, two, First | Rest])
     end || {Type, [First | [Second | _] = Rest]} <- either_keyed()].

other_types_need_no_field(_Config) ->
    [{ok, _} = macula_peer_wire:encode(Type, #{}) || Type <- unrequiring()],
    ?assertEqual(32 + length([dht_store]), length(unrequiring() ++ atom_keyed() ++ either_keyed())),
    [?assertEqual({error, {invalid_message_type, Type}}, macula_peer_wire:encode(Type, #{}))
     || Type <- [no_such_type, <<"store">>, "store", 16#42, {store}]],
    [?assertEqual({error, {invalid_message, not_a_map}}, macula_peer_wire:encode(store, Msg))
     || Msg <- [[], [{a, 1}], <<"a">>, a, {a}]].

accepts(Type, Keys) ->
    {ok, Frame} = encode(Type, Keys),
    {ok, {Type, Msg}} = macula_peer_wire:decode(Frame),
    ?assertEqual(length(Keys), map_size(Msg)).

encode(Type, Keys) ->
    macula_peer_wire:encode(Type, maps:from_list([{Key, 1} || Key <- Keys])).

missing(Field) ->
    {error, {invalid_message, {missing_field, Field}}}.

errors_name_the_term_that_cannot_be_encoded(_Config) ->
    Values = [{tuple, {a, 1}}, {pid, self()}, {port, hd(erlang:ports())}, {reference, make_ref()},
              {function, fun erlang:abs/1}, {bitstring, <<1:3>>}, {improper_list, [a | b]},
              {improper_list, [1 | 2]}, {integer_out_of_range, 1 bsl 64}, {integer_out_of_range, -(1 bsl 63) - 1}],
    [?assertEqual({error, {invalid_message, {not_encodable, <<"bad">>, Kind}}},
                  macula_peer_wire:encode(store, #{a => 1, <<"bad">> => Placed, z => [1, -1]}))
     || {Kind, Value} <- Values, Placed <- [Value, [x, Value], #{deep => [#{Value => 1}]}, #{deep => #{k => Value}}]],
    [?assertEqual({error, {invalid_message, {not_encodable, Value, Kind}}},
                  macula_peer_wire:encode(store, #{Value => 1}))
     || {Kind, Value} <- Values].
