#!/usr/bin/env bash
# Creates a TPU slice; the other scripts here work on all of its hosts.
#
#   export TPU=bert ZONE=us-west4-a
#   scripts/tpu/create.sh v5litepod-8              # one host; v5litepod-16 has four
#   scripts/tpu/install.sh                         # this checkout; NFS=10.0.0.2:/share mounts that at /mnt/share
#   scripts/tpu/run.sh bert-jax finetune configs/finetune/emotion.yaml precision.compute_dtype=bfloat16
#   scripts/tpu/fetch.sh runs/emotion
#   gcloud compute tpus tpu-vm delete "$TPU" --zone "$ZONE"
#
# Runs on several hosts need an output.folder that all of them see, so an NFS share (Filestore has them). Not tried on a
# slice yet: what of this is ours, `bert-jax … --processes auto`, has run as several processes on one machine alone.
set -euo pipefail
type="${1:?a type is missing: v5litepod-8, v5p-8, v6e-8, …}"
case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) echo "create.sh: $type is no type that bert_jax is compiled for: v5litepod-N, v5p-N, v6e-N" >&2; exit 2 ;;
esac
gcloud compute tpus tpu-vm create "${TPU:?}" --zone "${ZONE:?}" --accelerator-type "$type" --version "$version"
