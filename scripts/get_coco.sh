#!/usr/bin/env bash
# Fetch COCO 2017 detection data into a folder that data.root can point to.
#
# Usage: scripts/get_coco.sh [FOLDER] [val|all]
#   FOLDER  where to put it; default: coco in the current folder
#   val     validation images and annotations only (1 GB), the default
#   all     training images too (19 GB)
#
# A stopped download is continued, and what is complete is not fetched again. The last line of stdout is the folder.
set -euo pipefail

folder="${1:-coco}"
part="${2:-val}"
base="http://images.cocodataset.org"

if [[ "$folder" == -* ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 0
fi
if [[ "$part" != val && "$part" != all ]]; then
    echo "Unknown part '$part': expected val or all." >&2
    exit 2
fi
for tool in curl md5sum unzip; do
    command -v "$tool" >/dev/null || { echo "$tool is needed: install it first." >&2; exit 2; }
done

# download ADDRESS FILE: continue FILE until it is complete; without a connection stop immediately.
download() {
    local attempt code
    for attempt in 1 2 3 4 5; do
        code=0
        curl --fail --location --connect-timeout 15 --continue-at - --output "$2" "$1" || code=$?
        case "$code" in
            0) return ;;
            18 | 35 | 52 | 55 | 56 | 92) sleep "$attempt" ;;  # the transfer was interrupted
            *) break ;;
        esac
    done
    echo "$1 cannot be fetched (curl ended with $code): check the network and its proxy (https_proxy, http_proxy)," \
        "then run this again. What has arrived is kept." >&2
    exit 1
}

# fetch ADDRESS MD5 DESTINATION MARKER: unpack an archive into DESTINATION unless MARKER says that it is there.
fetch() {
    local archive="$folder/${1##*/}"
    if [[ -e "$4" ]]; then
        return
    fi
    echo "Fetching $1" >&2
    download "$1" "$archive"
    if ! md5sum --check --status <<<"$2  $archive"; then
        rm -f "$archive"
        echo "$1 arrived damaged (its MD5 sum is not $2) and was removed: run this again." >&2
        exit 1
    fi
    unzip -q -o "$archive" -d "$3"
    touch "$4"
    rm -f "$archive"
}

mkdir -p "$folder/images"
fetch "$base/annotations/annotations_trainval2017.zip" f4bbac642086de4f52a3fdda2de5fa2c \
    "$folder" "$folder/.annotations-complete"
fetch "$base/zips/val2017.zip" 442b8da7639aecaf257c1dceb8ba8c80 "$folder/images" "$folder/.val2017-complete"
if [[ "$part" == all ]]; then
    fetch "$base/zips/train2017.zip" cced6f7f71b7629ddf16f17bbcfab6b2 "$folder/images" "$folder/.train2017-complete"
fi
echo "$folder"
