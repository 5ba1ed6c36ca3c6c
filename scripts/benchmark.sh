#!/usr/bin/env bash
# Latency of the engines of a run at several batch sizes, measured alternately: INT8 against float, with differences.
#
# Usage: scripts/benchmark.sh RUN [--batch 1,4,8,12] [--runtime NAME] [--time SECONDS]
#   RUN        run directory of train_qat.py
#   --batch    batch sizes, default 1,4,8,12
#   --runtime  openvino (default), onnxruntime, tensorrt
#   --time     seconds for each engine and batch, default 5
#
# PYTHON names the Python to use, default .venv/bin/python of the repository, else python3. Which files are timed the run
# itself tells (python -m pipeline.run.files). Exit code 2: wrong arguments. 3: something is missing.
# The last line of stdout is the Markdown table's path.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0"; }
fail() { echo "$2" >&2; exit "$1"; }

batches="1,4,8,12" runtime=openvino seconds=5 run=""
while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --batch | --runtime | --time)
            (($# > 1)) || fail 2 "$1 needs a value; see scripts/benchmark.sh --help."
            case "$1" in --batch) batches="$2" ;; --runtime) runtime="$2" ;; --time) seconds="$2" ;; esac
            shift 2 ;;
        -*) fail 2 "Unknown option '$1'; see scripts/benchmark.sh --help." ;;
        *) [[ -z "$run" ]] || { usage >&2; exit 2; }; run="$1"; shift ;;
    esac
done
[[ -n "$run" ]] || { usage >&2; exit 2; }
# without symbolic links `latest` is a text file that names the newest run
[[ ! -f "$run" || "$(basename "$run")" != latest ]] || run="$(dirname "$run")/$(<"$run")"
[[ -d "$run" ]] || fail 3 "No run directory at '$run'."

run="$(realpath "$run")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
default=python3
[[ ! -x .venv/bin/python ]] || default=.venv/bin/python
python="${PYTHON:-$default}"
command -v "$python" >/dev/null || fail 3 "No Python at '$python'; set PYTHON."
models="$("$python" -m pipeline.run.files "$run" --runtime "$runtime")" || exit
mapfile -t engines <<<"$models"
printf 'timing %s\n' "${engines[@]}" >&2
table="$run/latency-$runtime.md"
"$python" -m deploy.benchmark --compare "${engines[@]}" --runtime "$runtime" --batch "$batches" --time "$seconds" \
    --json "${table%.md}.json" --table "$table" >&2
cat "$table" >&2
echo "$table"
