#!/usr/bin/env bash
# From folders of photos to a comparison: two tasks, a reference set, fine-tuning against ZSCL.
set -euo pipefail
here=$(dirname "$0")
work=runs/examples/own-folders

python "$here/photos.py" "$work/photos"   # yours are there already: photos/<task>/<class>/*.jpg

zscl data prepare folder "$work/photos/digits" --out "$work/tasks/digits" \
    --template "a handwritten {c}" --template "the number {c}"
zscl data prepare folder "$work/photos/scenes" --out "$work/tasks/scenes" --template "a photo of {c}"
zscl data check "$work/tasks/digits" --picture "$work/digits.png"

for method in finetune zscl; do
    zscl run "$here/own.yaml" --out "$work/$method" --set "method.preset=$method" "$@"
done
zscl compare "$work/finetune" "$work/zscl" --out "$work/comparison"
