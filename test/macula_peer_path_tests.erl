%% The candidates of a node from a caller's options and the environment, without a network.
-module(macula_peer_path_tests).

-include_lib("eunit/include/eunit.hrl").

-define(NODE, <<"node">>).
-define(NO_RELAY(Reason), {error, {nat_connection_failed, {no_relay_available, Reason}}}).

%% The calls that are made, where there is no link.
calls(Opts, Result) ->
    Self = self(),
    Call = fun
        ({node, ?NODE, none}, _Timeout) -> Self ! {called, none}, unlinked;
        ({node, ?NODE, Candidates}, Timeout) -> Self ! {called, {Candidates, Timeout}}, Result
    end,
    Returned = macula_peer_path:call(?NODE, Opts, Call),
    {Returned, called()}.

called() ->
    receive {called, What} -> [What | called()] after 0 -> [] end.

a_live_link_needs_no_candidates_test() ->
    ?assertEqual(ok, macula_peer_path:call(?NODE, #{}, fun({node, ?NODE, none}, 10000) -> ok end)).

without_a_link_the_environment_is_asked_test() ->
    with_bootstrap_peers("https://b:1, c:2", fun() ->
        ?assertEqual({ok, [none, {#{last_resorts => ["https://b:1", "c:2"]}, 10000}]}, calls(#{}, ok))
    end).

the_options_come_first_test() ->
    without_bootstrap_peers(fun() ->
        Opts = #{endpoint => <<"a:1">>, relay_endpoint => <<"r:1">>, fingerprint => <<1:256>>, timeout => 7},
        Candidates = #{endpoints => [<<"a:1">>], relays => [<<"r:1">>], fingerprint => <<1:256>>, last_resorts => []},
        ?assertEqual({ok, [{Candidates, 7}]}, calls(Opts, ok))
    end).

spellings_of_a_relay_test() ->
    without_bootstrap_peers(fun() ->
        [?assertMatch({ok, [{#{relays := [<<"r:1">>]}, _}]}, calls(#{relay_endpoint => Relay}, ok))
         || Relay <- [<<"r:1">>, {<<"r">>, 1}, {"r", 1}, {ok, <<"r">>, 1}, {ok, "r", 1}]]
    end).

bootstrap_peers_test_() ->
    Cases = [{"", [], no_bootstrap_peers},
             {" b:1 ", ["b:1"], no_bootstrap_peers},
             {"b", [], invalid_bootstrap_format},
             {"b:x,c:1", ["c:1"], invalid_bootstrap_port},
             {"b:0", [], invalid_bootstrap_port}],
    [{Value, fun() -> with_bootstrap_peers(Value, fun() -> bootstrap(Peers, Reason) end) end}
     || {Value, Peers, Reason} <- Cases].

bootstrap(Peers, Reason) ->
    ?assertMatch({?NO_RELAY(Reason), [none, {#{last_resorts := Peers}, _}]}, calls(#{}, ?NO_RELAY(no_bootstrap_peers))).

without_bootstrap_peers(Fun) ->
    with_bootstrap_peers("", Fun).

with_bootstrap_peers(Value, Fun) ->
    Before = os:getenv("MACULA_BOOTSTRAP_PEERS", ""),
    true = os:putenv("MACULA_BOOTSTRAP_PEERS", Value),
    try Fun() after os:putenv("MACULA_BOOTSTRAP_PEERS", Before) end.
