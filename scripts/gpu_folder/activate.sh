# Source this on the GPU machine: it unpacks the wheels once and puts them on PYTHONPATH, behind a checkout of epbackend:
# the one in the current folder, or else the one that was gathered.
#   PYTHON=python3 EPBACKEND_SITE=/tmp/site . gpu/activate.sh
_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_checkout=$_folder/epbackend
if [ -d "$PWD/epbackend/engines" ]; then _checkout=$PWD; fi
EPBACKEND_SITE=${EPBACKEND_SITE:-$_folder/site}
"${PYTHON:-python3}" "$_folder/unpack.py" "$EPBACKEND_SITE" &&
  export PYTHONPATH="$_checkout:$EPBACKEND_SITE${PYTHONPATH:+:$PYTHONPATH}"
unset _folder _checkout
