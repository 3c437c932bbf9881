#!/usr/bin/env bash
# Installs k4p1 and runs its main job on embedded real images, on a cluster of processes on this machine: two tasks trained together
# on one MobileNetV2 by one parameter server and two workers, then evaluated, exported as SavedModels, and asked
# about four images of both tasks in one batch. A few minutes on two cores. A second call finds the finished run.
#
#   bash launch/quickstart.sh [FOLDER]      # default: runs/quickstart
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../runs/quickstart}")
source "$(dirname "$0")/environment.sh"
k4p1_install .

k4p1 train --gin_file quickstart --model_dir "$folder" --local_cluster ps:1,workers:2
k4p1 status "$folder"
k4p1 evaluate --model_dir "$folder"
k4p1 export --model_dir "$folder" --export_dir "$folder/export"
k4p1 export --model_dir "$folder" --export_dir "$folder/together" --together
python "$(dirname "$0")/../examples/mixed_batch.py" --saved_model "$folder/together"
echo "All is in $folder: result.json, tasks/<task>/patch.safetensors, export/<task>/1/, together/1/."
echo "Curves: tensorboard --logdir $folder"
