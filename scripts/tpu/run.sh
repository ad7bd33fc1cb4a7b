#!/usr/bin/env bash
# Runs a command on all hosts of a slice at once; see create.sh. In training, the hosts are processes of one run. In
# prediction, they share the rows. To resume a stopped run, repeat the command.
source "$(dirname "$0")/common.sh"
command="$(printf '%q ' "$@")"
case "${1:?a command is missing: bert-jax finetune …} ${2-}" in
    "bert-jax finetune" | "bert-jax pretrain" | "bert-jax predict") command+="--processes auto" ;;
esac
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "cd bert_jax && PATH=~/.venv/bin:\$PATH $command"
