%% @doc The wire format of macula 0.14.3: an 8-byte header and a MessagePack map.
%%
%% Encoding follows the original: binaries and atoms become `bin', `true' and `false' booleans, `null' nil, a list whose
%% elements are all Unicode code points `str', any other proper list an array, integers their shortest form, floats 64
%% bits. Decoding makes no atom but those three: `bin' comes back as a binary, `str' as a list of code points.
-module(macula_peer_wire).

-export([encode/2]).
-export([decode/1]).

-export_type([type/0, encode_error/0, decode_error/0]).

-type type() :: connect | disconnect | ping | pong | publish | subscribe | unsubscribe | pubsub_route | call | reply
              | cast | rpc_route | rpc_request | rpc_reply | swim_ping | swim_ack | swim_ping_req | find_node
              | find_node_reply | store | dht_store | find_value | find_value_reply | nat_probe | nat_probe_reply
              | punch_request | punch_coordinate | punch_execute | punch_result | relay_request | relay_data
              | bridge_rpc | bridge_data.
%% `dht_store' is an alias of `store'; a received message is never of that type.

-type encode_error() :: {invalid_message_type, term()}
                      | {invalid_message, not_a_map
                                        | {missing_field, atom()}
                                        | {not_encodable, Field :: term(), Kind :: atom()}
                                        | {too_large, MaxBytes :: pos_integer()}
                                        | {too_deep, MaxDepth :: pos_integer()}
                                        | {too_many_terms, MaxTerms :: pos_integer()}}.
%% `Kind' is what stands there: `tuple', `pid', `port', `reference', `function', `bitstring', `improper_list' or
%% `integer_out_of_range'.

-type decode_error() :: invalid_header
                      | {unsupported_version, byte()}
                      | {frame_too_large, Bytes :: pos_integer(), MaxBytes :: pos_integer()}
                      | incomplete_payload
                      | {unknown_type, byte()}
                      | {msgpack_decode_error, incomplete | not_just_binary | {invalid_string, binary()}
                                             | {badarg, term()} | {too_deep, MaxDepth :: pos_integer()}
                                             | {too_many_terms, MaxTerms :: pos_integer()}}.

%% @doc Encodes a message.
%%
%% Some types have required fields, spelled as atoms or, for some, all as binaries; the error names the first that is not
%% there. Fails where the original raised.
-spec encode(type(), map()) -> {ok, Frame :: binary()} | {error, encode_error() | macula_peer_error:native()}.
encode(Type, Msg) ->
    case macula_peer_nif:encode({Type, Msg}) of
        heavy ->
            case macula_peer_nif:encode_frame(Type, Msg) of
                {ok, Frame} -> macula_peer_nif:encode(Frame);
                {error, _} = Error -> Error
            end;
        Result ->
            Result
    end.

%% @doc Decodes the frame at the front of a binary; what follows it is ignored. The payload may be any MessagePack value,
%% as in the original.
-spec decode(binary()) -> {ok, {type(), Msg :: term()}} | {error, decode_error() | macula_peer_error:native()}.
decode(Frame) when is_binary(Frame) ->
    case macula_peer_nif:decode(Frame) of
        heavy -> finished(macula_peer_nif:decode_dirty(Frame));
        Result -> finished(Result)
    end;
decode(_NotABinary) ->
    {error, invalid_header}.

-spec finished({ok, {type(), term()}} | {unfinished, type(), macula_peer_nif:unfinished()} | {error, Reason}) ->
          {ok, {type(), term()}} | {error, Reason}.
finished({unfinished, Type, Msg}) -> {ok, {Type, macula_peer_finisher:finish(Msg)}};
finished(Result) -> Result.
