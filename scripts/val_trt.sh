#!/usr/bin/env bash
# Export, build, evaluate and time TensorRT engines of a quantized model, INT8 or FP8 against FP16.
#
# Usage: scripts/val_trt.sh RUN|CHECKPOINT DATA IMGSZ [--runtime NAME] [--batch 1,4,8,12] [--graph|--generate-graph]
#   RUN         run directory of train_qat.py (its best quantized model and its float model are taken), or
#   CHECKPOINT  weights of a float detector: it is quantized by calibration first
#   DATA        data set folder (data.yaml tree or COCO JSON)
#   IMGSZ       image size in pixels, a multiple of 32: 640 for a square, 384x640 for height and width
#   --runtime   tensorrt (default) or tensorrt_rtx: TensorRT for RTX, which without a GPU builds and inspects only
#   --batch     batch sizes to time, default 1,4,8,12
#   --graph     draw the engine's layers and write their times (--generate-graph is the same)
#
# Runs inside NVIDIA's container (see Dockerfile). PYTHON names the Python to use, default .venv/bin/python of the
# repository, else python3. The version of TensorRT is found, and decides between target trt10 (8.6 to 10) and trt11.
# Exit code 2: wrong arguments. 3: something is missing.
# The last line of stdout is the folder with engines and report.md; where they ran, accuracy.json and latency.json, too.
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; }
fail() { echo "$2" >&2; exit "$1"; }

batches="1,4,8,12"
runtime=tensorrt
draw=false
positional=()
while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --batch) (($# > 1)) || fail 2 "--batch needs a list such as 1,4,8,12."; batches="$2"; shift 2 ;;
        --runtime) (($# > 1)) || fail 2 "--runtime needs tensorrt or tensorrt_rtx."; runtime="$2"; shift 2 ;;
        --graph | --generate-graph) draw=true; shift ;;
        -*) fail 2 "Unknown option '$1'; see scripts/val_trt.sh --help." ;;
        *) positional+=("$1"); shift ;;
    esac
done
((${#positional[@]} == 3)) || { usage >&2; exit 2; }
source="${positional[0]}" data="${positional[1]}" size="${positional[2]}"
[[ "$size" =~ ^([1-9][0-9]*)(x([1-9][0-9]*))?$ ]] ||
    fail 2 "IMGSZ '$size' is neither a positive multiple of 32 nor HEIGHTxWIDTH."
height="${BASH_REMATCH[1]}" width="${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}"
if ((height % 32 || width % 32)); then fail 2 "IMGSZ '$size' is not a multiple of 32 pixels."; fi
image_size="$size"
[[ "$size" != *x* ]] || image_size="[$height,$width]"
[[ "$batches" =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || fail 2 "--batch '$batches' is not a list such as 1,4,8,12."
[[ "$runtime" =~ ^tensorrt(_rtx)?$ ]] || fail 2 "--runtime '$runtime' is none of tensorrt, tensorrt_rtx."
# without symbolic links `latest` is a text file that names the newest run
[[ ! -f "$source" || "$(basename "$source")" != latest ]] || source="$(dirname "$source")/$(<"$source")"
[[ -e "$source" ]] || fail 3 "No run directory or checkpoint at '$source'."
[[ -e "$data" ]] || fail 3 "No data set at '$data'."

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
default=python3
[[ ! -x "$here/.venv/bin/python" ]] || default="$here/.venv/bin/python"
python="${PYTHON:-$default}"
command -v "$python" >/dev/null || fail 3 "No Python at '$python'; set PYTHON."
source="$(realpath "$source")" data="$(realpath "$data")"
cd "$here"

# 1. Which TensorRT is it?
if ! version="$("$python" -m deploy.engine version --runtime "$runtime")"; then
    [[ "$runtime" == tensorrt ]] || exit 3
    fail 3 "TensorRT is missing. Build the container and run this inside it:
  docker build -t octet .
  docker run --rm --gpus all -v \"\$PWD/runs:/work/runs\" -v \"$data:/data:ro\" octet scripts/val_trt.sh RUN /data $size
Without a GPU, --runtime tensorrt_rtx builds and inspects plans of TensorRT for RTX."
fi
title=TensorRT target=trt10 can_run=true
if ((${version%%.*} >= 11)); then target=trt11; fi
if [[ "$runtime" == tensorrt_rtx ]]; then
    title="TensorRT for RTX" target=tensorrt_rtx
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || can_run=false
fi
echo "$title $version: target $target" >&2

# 2. A run to export from, and its ONNX files.
if [[ -f "$source" ]]; then
    run="runs/val_trt/$(basename "${source%.*}")-$size"
    rm -rf "$run"
    "$python" train_qat.py +experiment=detector weights="$source" data.root="$data" data.image_size="$image_size" \
        run_dir="$run" "stages=[float,calibrate,export]" deploy="$target" >&2
else
    run="$source"
fi
out="$run/$runtime"
if ! { mkdir -p "$out" && [[ -w "$out" ]]; }; then
    fail 3 "$out cannot be written by user $(id -u). In a container run as the folder's owner: docker run --user \"\$(id -u)\"."
fi
"$python" export.py run="$run" target="$target" output="$out/model.onnx" >&2
"$python" -m deploy.check "$out/model.onnx" --json "$out/check.json" >&2
precision="$("$python" -m deploy.engine precision "$out/model.onnx")"  # int8, fp8 or int8-fp8
mv "$out/model.onnx" "$out/$precision.onnx"
float="$run/float.onnx"
[[ -f "$float" ]] || fail 3 "$run has no float.onnx; run its export stage first."

# 3. Engines, with one timing cache for both.
largest="$(tr ',' '\n' <<<"$batches" | sort -n | tail -1)"
build() { "$python" -m deploy.engine build "$1" "$out" --runtime "$runtime" --precision "$2" --max-batch "$largest" \
    --timing-cache "$out/timing.cache" | tail -1; }
quantized="$(build "$out/$precision.onnx" "$precision")"
fp16="$(build "$float" fp16)"

# 4. Accuracy, then latency, timed alternately; CUDA graphs with TensorRT only: TensorRT for RTX compiles kernels at run time.
if "$can_run"; then
    "$python" -m pipeline.evaluate "$quantized" --data "$data" --size "$size" --json "$out/accuracy.json" >&2
    "$python" -m pipeline.evaluate "$fp16" --data "$data" --size "$size" --json "$out/accuracy-fp16.json" >&2
    graphs=(--graph)
    [[ "$runtime" == tensorrt ]] || graphs=()
    "$python" -m deploy.benchmark --compare "$fp16@$runtime" "$quantized@$runtime" --runtime "$runtime" --batch "$batches" \
        "${graphs[@]}" --shapes "${height}x${width}" --json "$out/latency.json" --table "$out/latency.md" >&2
fi
if "$draw" && "$can_run"; then
    "$python" -m deploy.engine layers "$quantized" --json "$out/layers.json" --svg "$out/layers.svg" >&2
fi

# 5. Report.
{
    echo "# $title $version, $size pixels"
    echo
    if [[ "$runtime" == tensorrt_rtx ]]; then
        "$python" - "$quantized.json" <<'PYTHON'
import json, pathlib, sys
print("| built for | kernels | convolutions | MB moved | MB moved in FP16 |\n|---|---|---|---|---|")
for build in json.loads(pathlib.Path(sys.argv[1]).read_text())["compiled"]:
    engine = build["engine"]
    counts = ", ".join(f"{count} {name}" for name, count in engine["convolutions"].items())
    moved = [f"{side['moved_bytes'] / 1e6:.1f}" for side in (engine, build["fp16"])]
    print("|", " | ".join([build["capability"], str(engine["num_kernels"]), counts, *moved]), "|")
PYTHON
        echo
    fi
    "$can_run" || echo "Not run here: torch sees no GPU."
    if "$can_run"; then
        "$python" - "$out/accuracy-fp16.json" "$out/accuracy.json" <<'PYTHON'
import json, pathlib, sys
print("| engine | AP | AP50 |\n|---|---|---|")
for name in sys.argv[1:]:
    row = json.loads(pathlib.Path(name).read_text())
    print(f"| {pathlib.Path(row['model']).name} | {row['ap']:.4f} | {row['ap50']:.4f} |")
PYTHON
        echo
        cat "$out/latency.md"
    fi
} >"$out/report.md"
cat "$out/report.md" >&2
realpath "$out"
