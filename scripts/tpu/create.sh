#!/usr/bin/env bash
# Creates a TPU slice. The other scripts in this folder use all hosts of the slice.
#
#   export TPU=bert ZONE=us-west4-a
#   scripts/tpu/create.sh v5litepod-8              # one host; v5litepod-16 has four
#   scripts/tpu/install.sh                         # this checkout; NFS=10.0.0.2:/share mounts that share at /mnt/share
#   scripts/tpu/run.sh bert-jax finetune configs/finetune/emotion.yaml precision.compute_dtype=bfloat16
#   scripts/tpu/fetch.sh runs/emotion
#   gcloud compute tpus tpu-vm delete "$TPU" --zone "$ZONE"
#
# With DRY_RUN=1, each script only prints its commands. spot.sh runs all of these steps on cheaper slices that Google Cloud
# may reclaim at any time.
#
# Runs on several hosts need an output.folder that all hosts can access, such as a Filestore NFS share. These scripts have
# not been tested on a slice.
source "$(dirname "$0")/common.sh"
type="${1:?a type is missing: v5litepod-8, v5p-8, v6e-8, …}"
version="$(version_of "$type")"
gcloud compute tpus tpu-vm create "$TPU" --zone "$ZONE" --accelerator-type "$type" --version "$version"
