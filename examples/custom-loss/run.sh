#!/usr/bin/env bash
# A custom loss in addition to the method's: relations.py, named in recipe.yaml.
set -euo pipefail
here=$(dirname "$0")
export PYTHONPATH="$here"   # on a cluster: install it on the nodes

zscl data prepare embedded --out runs/demo/data
zscl run "$here/recipe.yaml" --out runs/examples/custom-loss "$@"
head -n 3 runs/examples/custom-loss/stages/1-flags/losses.csv
