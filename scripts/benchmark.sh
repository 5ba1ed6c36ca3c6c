#!/usr/bin/env bash
# Latency of the engines of a run at several batch sizes, measured alternately: INT8 against float, with differences.
#
# Usage: scripts/benchmark.sh RUN [--batch 1,4,8,12] [--runtime openvino|onnxruntime|tensorrt] [--time SECONDS]
#   RUN        run directory of train_qat.py
#   --batch    batch sizes, default 1,4,8,12
#   --runtime  default openvino
#   --time     seconds for each engine and batch, default 5
#
# PYTHON names the Python to use, default python3. Exit code 2: wrong arguments. 3: something is missing.
# The last line of stdout is the Markdown table's path.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
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
[[ -d "$run" ]] || fail 3 "No run directory at '$run'."

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || fail 3 "No Python at '$python'; set PYTHON."
run="$(realpath "$run")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "$runtime" in
    openvino) engines=("$run/float.onnx@openvino" "$run/float.onnx@openvino:bf16" "$run/model.onnx@openvino") ;;
    onnxruntime)
        int8="$run/model-onnxruntime.onnx"
        [[ -f "$int8" ]] || int8="$run/model.onnx"
        engines=("$run/float.onnx@onnxruntime" "$int8@onnxruntime") ;;
    tensorrt) engines=("$run/tensorrt/float.engine@tensorrt" "$run/tensorrt/int8.engine@tensorrt") ;;
    *) fail 2 "Unknown runtime '$runtime'; expected openvino, onnxruntime or tensorrt." ;;
esac
for engine in "${engines[@]}"; do
    [[ -f "${engine%@*}" ]] || fail 3 "No '${engine%@*}'; run the export stage (or scripts/val_trt.sh) first."
done
table="$run/latency-$runtime.md"
"$python" -m deploy.benchmark --compare "${engines[@]}" --runtime "$runtime" --batch "$batches" --time "$seconds" \
    --json "${table%.md}.json" --table "$table" >&2
cat "$table" >&2
echo "$table"
