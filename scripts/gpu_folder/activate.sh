# Source this on the GPU machine: it unpacks the wheels once and puts them and epbackend on PYTHONPATH.
#   PYTHON=python3 EPBACKEND_SITE=/tmp/site . gpu/activate.sh
_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
EPBACKEND_SITE=${EPBACKEND_SITE:-$_folder/site}
"${PYTHON:-python3}" "$_folder/unpack.py" "$EPBACKEND_SITE" &&
  export PYTHONPATH="$_folder/epbackend:$EPBACKEND_SITE${PYTHONPATH:+:$PYTHONPATH}"
unset _folder
