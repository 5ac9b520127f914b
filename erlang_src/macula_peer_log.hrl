%% Every log event has this domain.
-include_lib("kernel/include/logger.hrl").

-define(DOMAIN, #{domain => [macula, peer]}).
