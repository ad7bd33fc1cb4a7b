#!/usr/bin/env bash
# Trains on spot slices: requests a slice, waits for it, installs this checkout on it, and runs a command. If Google Cloud
# reclaims the slice, requests a new slice and repeats the command, which resumes the run. At the end, deletes the slice.
#
#   export TPU=bert ZONE=us-west4-a NFS=10.0.0.2:/share
#   scripts/tpu/spot.sh v5litepod-8 bert-jax finetune configs/finetune/emotion.yaml output.folder=/mnt/share/emotion
#
# When a slice is deleted, its disks are deleted too, so output.folder must be on a network share (NFS, see install.sh).
# With DRY_RUN=1, the script only prints its commands. It has not been tested on a slice.
source "$(dirname "$0")/common.sh"
type="${1:?a type is missing: v5litepod-8, v5p-8, v6e-8, …}"
shift
version="$(version_of "$type")"
: "${1:?a command is missing: bert-jax finetune …}" "${NFS:?set it to a share, such as 10.0.0.2:/share}"
here="$(dirname "$0")"

# The state of the slice; empty if the state is not available.
state() { gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format 'value(state.state)' || true; }
delete() { gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" --force --quiet; }

# Whether the slice has been reclaimed. Its connections can fail a minute before its state changes.
taken_back() {
    for _ in 1 2 3 4; do
        case "$(state)" in ACTIVE | "") sleep "${POLL_SECONDS:-30}" ;; *) return 0 ;; esac
    done
    return 1
}

trap delete EXIT  # also after Ctrl-C, because a slice costs money as long as it exists
while :; do
    gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --zone "$ZONE" \
        --accelerator-type "$type" --runtime-version "$version" --spot
    while found="$(state)"; [ "$found" != ACTIVE ]; do
        if [ "$found" = FAILED ]; then echo "The request for a slice failed; its description says why." >&2; exit 1; fi
        if [ "$found" = SUSPENDED ]; then break; fi  # reclaimed before it was used
        sleep "${POLL_SECONDS:-60}"
    done
    status=0
    "$here/install.sh" && "$here/run.sh" "$@" || status=$?
    if [ "$status" = 0 ] || ! taken_back; then exit "$status"; fi
    delete
done
