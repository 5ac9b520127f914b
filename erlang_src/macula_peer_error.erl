%% @doc The reasons in `{error, Reason}', as types. Each function's specification names its own; <a
%% href="../docs/errors.md">docs/errors.md</a> says when each reason is returned.
-module(macula_peer_error).

-export_type([native/0, engine/0, settings/0, start/0, start_failure/0, key_file/0, known_keys_file/0, cacertfile/0, system/0,
              endpoint/0, invalid_option/0, invalid_node_id/0, connect/0, connect_failure/0, send/0, request/0, rejection/0,
              path_to_node/0, refused_by_relay/0, send_to_node/0, request_to_node/0, listen/0, reply/0, takeover/0]).

-type native() :: {nif_not_loaded, Text :: binary()} | {internal, nif_panicked}.
%% The native library is missing or of another version; or has a defect.

-type engine() :: not_started | native().
%% Of functions that never start the engine: none runs.

-type invalid_option() :: {invalid_option, {Key :: term(), Value :: term()}}.

-type invalid_node_id() :: {invalid_node_id, term()}.

-type endpoint() :: {invalid_endpoint, invalid_format | invalid_port}.

-type system() :: inet:posix() | Text :: binary().
%% The name of an error of the operating system, or its text if it has no name.

-type settings() :: invalid_option()
                  | {unknown_option, Key :: atom()}
                  | {invalid_variable, {Name :: string(), Value :: string()}}
                  | {invalid_variable, {Name :: string(), Value :: string(), Hint :: binary()}}
                  | {tls_config_error, {cacertfile_not_found, file:filename()}}
                  | native().
%% What is wrong with the settings or the environment variables. The value of an unknown option is left out: its name may be that
%% of a secret, misspelled.

-type start() :: settings() | listen() | {start_failed, start_failure()}.
%% The engine does not start. Every function that starts it may return these.

-type start_failure() :: upgrading
                       | {gateway_port, inet:port_number()}
                       | {identity_file, key_file()}
                       | {previous_identity_files, {File :: binary(), key_file()}}
                       | {known_keys_file, known_keys_file()}
                       | {cacertfile, cacertfile()}
                       | system().

-type key_file() :: insecure_permissions | {foreign_owner, Uid :: non_neg_integer()} | not_a_key | encrypted_key
                  | unsupported_key | not_pkcs8 | {bad_certificate, Text :: binary()} | system().

-type known_keys_file() :: insecure_permissions | {foreign_owner, Uid :: non_neg_integer()} | in_use | not_known_keys
                         | {bad_line, pos_integer()} | system().

-type cacertfile() :: not_a_certificate | system().

-type listen() :: already_listening
                | {listen_failed, {gateway_port, inet:port_number()} | {cacertfile, cacertfile()} | system()}
                | {bad_certificate, Text :: binary()}
                | invalid_option().

-type connect() :: {connect_failed, connect_failure()}.

-type connect_failure() :: transport_down | address_family_not_supported | connection_refused | no_application_protocol
                         | untrusted_peer | rejected_by_peer | wrong_node | {handshake_failed, Text :: binary()}.

-type send() :: macula_peer_wire:encode_error()
              | endpoint()
              | {invalid_timeout, term()}
              | connect()
              | timeout
              | {send_failed, timeout | overloaded | connection_closed | connection_shutdown}
              | start().

-type request() :: send()
                 | connection_closed
                 | {rejected, rejection()}
                 | macula_peer_wire:decode_error().

-type rejection() :: too_large | too_deep | too_many_terms | malformed | too_slow | unread.
%% Why a peer does not take a message.

-type send_to_node() :: send() | invalid_node_id() | {nat_connection_failed, path_to_node()}.

-type request_to_node() :: request() | send_to_node().

-type path_to_node() :: {no_relay_available, no_bootstrap_peers | invalid_bootstrap_format | invalid_bootstrap_port}
                      | {relay_connect_failed, connect_failure() | endpoint()}
                      | {relay_setup_failed, refused_by_relay()}
                      | connect().
%% Why no path led to a node.

-type refused_by_relay() :: not_registered | sessions | sessions_per_node | sessions_per_key | sessions_per_address
                          | node_id_taken | taken_over | denied | undecided | kicked | realm
                          | registrations | registrations_per_key | registrations_per_address
                          | accept_rate | accept_rate_per_key | accept_rate_per_address
                          | not_ready | in_progress | address_family | request_rate | malformed | unknown.
%% What a relay gives as the reason for refusing a registration, a circuit or its help with a direct path.

-type reply() :: already_replied | gone | invalid_token | macula_peer_wire:encode_error() | native().

-type takeover() :: {takeover_failed, module(), old_code_in_use | {not_found, file:filename()} | term()}.
%% A setting asks for this library's module, and it cannot be loaded in the place of another.
