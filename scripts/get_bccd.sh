#!/usr/bin/env bash
# Fetch the blood cell dataset BCCD (364 images, MIT) and convert it to a YOLO tree that data.root can point to.
#
# Usage: scripts/get_bccd.sh [FOLDER] [ADDRESS COMMIT]
#   FOLDER          where to put it; default: datasets/bccd
#   ADDRESS COMMIT  another git repository with the same layout, and its commit
#
# git fetches one commit by its hash and verifies every file against it, so no other checksum is needed.
# PYTHON selects the Python that converts; default: .venv/bin/python, or python3. The last line of stdout is the folder.
set -euo pipefail

folder="${1:-datasets/bccd}"
address="${2:-https://github.com/Shenggan/BCCD_Dataset}"
commit="${3:-862b232accac2e8d4ee2d95738d51195f0476395}"
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if [[ "$folder" == -* ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 0
fi
if [[ $# == 2 ]]; then
    echo "An ADDRESS needs a COMMIT: its 40 hexadecimal digits." >&2
    exit 2
fi
command -v git >/dev/null || { echo "git is needed: install it first." >&2; exit 2; }
python="${PYTHON:-$scripts/../.venv/bin/python}"
[[ -x "$(command -v "$python")" ]] || python=python3

if [[ -e "$folder/.complete" ]]; then
    echo "$folder"
    exit 0
fi
mkdir -p "$folder"
source="$folder/.source"
rm -rf "$source" "$folder/images" "$folder/labels"
git init --quiet "$source"
if ! git -C "$source" fetch --quiet --depth 1 "$address" "$commit"; then
    echo "$address (commit $commit) cannot be fetched: check the network and its proxy (https_proxy, http_proxy)," \
        "then run this again." >&2
    exit 1
fi
git -C "$source" checkout --quiet --detach FETCH_HEAD
if [[ "$(git -C "$source" rev-parse HEAD)" != "$commit" ]]; then
    echo "$address sent another commit than $commit." >&2
    exit 1
fi
"$python" "$scripts/voc_to_yolo.py" "$source/BCCD" "$folder" --classes RBC,WBC,Platelets
cp "$source/LICENSE" "$folder/LICENSE"
rm -rf "$source"
touch "$folder/.complete"
echo "$folder"
