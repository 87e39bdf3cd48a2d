#!/bin/sh
# Encode pictures on all machines of a Ray cluster, which this makes, too.
#
#   launch/ray.sh
#   HOST=first-machine launch/ray.sh
#   HOST=first-machine launch/ray.sh nano my_images my_codes
#
# The first line on the first machine, the second on every other one (both stay until they are
# ended), then the third on any of them: it is ddt encode. Model, pictures, codes, and Ray's token
# (.ray/auth_token in the home folder), lie in folders that all share.
set -eu
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
port=${PORT:-6379}
if [ $# -gt 0 ]; then
    RAY_ADDRESS="${HOST:-localhost}:$port" exec ddt encode "$@" --engine ray
elif [ -n "${HOST:-}" ]; then
    exec ray start --block --address "$HOST:$port"
fi
ray get-auth-token --generate >/dev/null
exec ray start --block --head --port "$port" --include-dashboard=false
