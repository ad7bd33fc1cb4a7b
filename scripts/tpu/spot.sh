#!/usr/bin/env bash
# Trains on spot slices: requests a slice, waits for it, installs this checkout on it, and runs a command. If Google Cloud
# takes the slice back, requests another one and runs the command again, which resumes the run. At the end, deletes the
# slice.
#
#   export TPU=bert ZONE=us-west4-a NFS=10.0.0.2:/share
#   scripts/tpu/spot.sh v5litepod-8 bert-jax finetune configs/finetune/emotion.yaml output.folder=/mnt/share/emotion
#
# The disks of a slice are lost with it, so output.folder must be on a share (NFS, see install.sh). With DRY_RUN=1, the
# script only prints its commands. It has not been tried on a slice.
source "$(dirname "$0")/common.sh"
type="${1:?a type is missing: v5litepod-8, v5p-8, v6e-8, …}"
shift
version="$(version_of "$type")"
: "${1:?a command is missing: bert-jax finetune …}" "${NFS:?set it to a share, such as 10.0.0.2:/share}"
here="$(dirname "$0")"

state() { gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format 'value(state.state)'; }
delete() { gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" --force --quiet; }

while :; do
    gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --zone "$ZONE" \
        --accelerator-type "$type" --runtime-version "$version" --spot
    while found="$(state)" && [ "$found" != ACTIVE ]; do
        if [ "$found" = FAILED ]; then echo "The request for a slice failed; its description says why." >&2; exit 1; fi
        if [ "$found" = SUSPENDED ]; then break; fi  # taken back before it was used
        sleep "${POLL_SECONDS:-60}"
    done
    status=0
    "$here/install.sh" && "$here/run.sh" "$@" || status=$?
    if [ "$status" = 0 ] || [ "$(state)" = ACTIVE ]; then break; fi  # done, or it failed although the slice is there
    delete
done
delete
exit "$status"
