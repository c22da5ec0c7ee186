#!/bin/bash
# bash run.sh BASE_MODEL ADAPTER_CHECKPOINT INPUT.json OUTPUT.json
set -euo pipefail
if [ $# -ne 4 ]; then
    echo "usage: bash run.sh BASE_MODEL ADAPTER_CHECKPOINT INPUT.json OUTPUT.json" >&2
    exit 2
fi
exec python3 "$(dirname "$0")/predict.py" "$@"
