%% What the library logs can be filtered, and is seen without any configuration.
-module(log_SUITE).

-export([suite/0, all/0]).
-export([the_default_handler_shows_events/1, events_have_a_domain/1, the_macros_log_everything/1]).
%% A handler.
-export([log/2]).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-define(APP, macula_peer_connector).
-define(EVENT, "peers are verified by first_seen").

suite() -> [{timetrap, {seconds, 60}}].

all() -> [the_default_handler_shows_events, events_have_a_domain, the_macros_log_everything].

%% It drops events of domains that it does not know.
the_default_handler_shows_events(Config) ->
    File = filename:join(?config(priv_dir, Config), "log"),
    Handler = io_lib:format("[{handler, default, logger_std_h, #{config => #{file => ~p}}}]", [File]),
    Args = ["-kernel", "logger", lists:flatten(Handler), "-pa" | macula_peer_test:node_paths()],
    {ok, Node, _} = peer:start_link(#{connection => standard_io, args => Args}),
    ?assertMatch({ok, #{filter_default := stop}}, peer:call(Node, logger, get_handler_config, [default])),
    ok = peer:call(Node, macula_peer_node, start, []),
    ok = peer:call(Node, logger_std_h, filesync, [default]),
    {ok, Text} = file:read_file(File),
    ?assertMatch({match, _}, re:run(Text, ?EVENT)),
    peer:stop(Node).

events_have_a_domain(_Config) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => self()}),
    try
        ok = macula_peer_test:engine([]),
        receive {logged, #{msg := {Format, Args}, meta := #{domain := [macula, peer], mfa := {macula_peer_engine, _, _}}}} ->
            ?assertMatch({match, _}, re:run(io_lib:format(Format, Args), ?EVENT))
        end
    after
        logger:remove_handler(?MODULE),
        macula_peer_node:stop()
    end.

log(Event, #{config := Test}) ->
    Test ! {logged, Event}.

%% They add the place, and obey `logger:set_application_level/2'.
the_macros_log_everything(_Config) ->
    {ok, Modules} = application:get_key(?APP, modules),
    ?assert(length(Modules) > 20),
    ?assertEqual([], [{Module, Call} || Module <- Modules, Call <- imports(Module), is_other_log(Call)]).

imports(Module) ->
    {ok, {Module, [{imports, Imports}]}} = beam_lib:chunks(code:which(Module), [imports]),
    Imports.

is_other_log({error_logger, _, _}) -> true;
is_other_log({logger, Function, _}) -> not lists:member(Function, [allow, macro_log, add_handler_filter]);
is_other_log(_) -> false.
