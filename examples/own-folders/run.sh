#!/usr/bin/env bash
# From image folders to a comparison: two tasks, a reference set, fine-tuning and ZSCL.
set -euo pipefail
here=$(dirname "$0")
work=runs/examples/own-folders

python "$here/photos.py" "$work/photos"   # writes photos/<task>/<class>/*.jpg; replace it by your own

zscl data prepare folder "$work/photos/digits" --out "$work/tasks/digits" \
    --template "a handwritten {c}" --template "the number {c}"
zscl data prepare folder "$work/photos/scenes" --out "$work/tasks/scenes" --template "a photo of {c}"
zscl data check "$work/tasks/digits" --picture "$work/digits.png"

zscl run "$here/own.yaml" --out "$work/zscl" "$@"
zscl run "$here/own.yaml" --out "$work/finetune" --set method=finetune "$@"
zscl compare "$work/finetune" "$work/zscl" --out "$work/comparison"
