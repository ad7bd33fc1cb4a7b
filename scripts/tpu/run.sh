#!/usr/bin/env bash
# Runs one command on all hosts of a slice at once, training as the processes of one run; see create.sh. The same
# command resumes after a stop.
set -euo pipefail
command="$(printf '%q ' "$@")"
case "${1:?a command is missing: bert-jax finetune …} ${2-}" in
    "bert-jax finetune" | "bert-jax pretrain") command+="--processes auto" ;;
esac
gcloud compute tpus tpu-vm ssh "${TPU:?}" --zone "${ZONE:?}" --worker=all \
    --command "cd bert_jax && PATH=~/.venv/bin:\$PATH $command"
