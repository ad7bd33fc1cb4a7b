#!/usr/bin/env bash
# Installs this checkout, as committed, on all hosts of a slice; see create.sh.
source "$(dirname "$0")/common.sh"
folder="$(mktemp -d)"
trap 'rm -r "$folder"' EXIT
archive="$folder/bert_jax.tar.gz"
git -C "$(dirname "$0")/../.." archive --prefix=bert_jax/ -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone "$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "
    set -eu
    if [ -n '${NFS-}' ] && ! mountpoint -q /mnt/share; then
        sudo apt-get install -y -q nfs-common
        sudo mkdir -p /mnt/share
        sudo mount '${NFS-}' /mnt/share
    fi
    tar xzf bert_jax.tar.gz
    pip install -q --user uv  # the images' Python is too old
    .local/bin/uv venv -q --python 3.12 .venv
    .local/bin/uv pip install -q -p .venv -e 'bert_jax[tpu,train,data]'"
