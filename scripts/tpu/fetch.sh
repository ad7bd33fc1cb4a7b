#!/usr/bin/env bash
# Fetches a run's folder from a slice's first host; see create.sh.
source "$(dirname "$0")/common.sh"
folder="${1:?a folder is missing: runs/emotion, or one under /mnt/share}"
case "$folder" in /*) place="$folder" ;; *) place="bert_jax/$folder" ;; esac
[ -n "${DRY_RUN-}" ] || mkdir -p "$(dirname "./${folder#/}")"
gcloud compute tpus tpu-vm scp --recurse "$TPU:$place" "./${folder#/}" --zone "$ZONE" --worker=0
