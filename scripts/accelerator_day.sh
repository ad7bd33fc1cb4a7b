#!/usr/bin/env bash
# Checks and measures a machine with an accelerator, in parts that take less than ten minutes each.
#
#   scripts/accelerator_day.sh wheels            # with internet: downloads 20 MB of packages for Python 3.12 to wheels/
#   scripts/accelerator_day.sh install           # without internet: creates a virtual environment from wheels/
#   OUT=results scripts/accelerator_day.sh check     # bert-jax check
#   OUT=results scripts/accelerator_day.sh base      # BERT-base and PyTorch transformers
#   OUT=results scripts/accelerator_day.sh large     # BERT-large and PyTorch transformers
#   scripts/accelerator_day.sh tiny                  # all parts in a minute with a tiny model, to test the script
#
# The machine must have Python 3.12 with jax, flax, optax, orbax, torch and transformers. The results are for
# docs/accelerators.md.
set -euo pipefail
cd "$(dirname "$0")/.."
part="${1:?a part is missing: wheels, install, check, base, large or tiny}"
out="${OUT:-accelerator_day}"
python="$([ -x .venv-day/bin/python ] && echo .venv-day/bin/python || echo python3)"

# Each side runs in a separate process, because each takes all of the device's memory.
compare() {
    local size="$1" tokens what side
    shift
    mkdir -p "$out"
    for tokens in "$@"; do
        for what in training inference; do
            for side in ours fused torch; do
                timeout 150 "$python" scripts/accelerator.py "$side" "$what" "$size" "$tokens" | tee -a "$out/$size.jsonl" ||
                    echo "{\"side\": \"$side\", \"what\": \"$what\", \"size\": \"$size\", \"tokens\": $tokens, \"failed\": true}" |
                    tee -a "$out/$size.jsonl"
            done
        done
    done
}

case "$part" in
    wheels)
        pip download -q --no-deps --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
            --platform any --only-binary :all: -d wheels pydantic pydantic-core annotated-types typing-inspection \
            typing-extensions grain array-record etils typer rich markdown-it-py mdurl pygments shellingham msgpack
        du -sh wheels
        ;;
    install)
        python3 -m venv --system-site-packages .venv-day
        .venv-day/bin/pip install -q --no-index --no-deps wheels/*.whl
        .venv-day/bin/pip install -q --no-index --no-deps --no-build-isolation -e .
        ;;
    check) "$python" -m bert_jax.cli check --output "$out/check" ;;
    base) compare base 128 512 ;;
    large) compare large 128 512 ;;
    tiny) compare tiny 16 ;;
    *)
        echo "the part is $part; expected wheels, install, check, base, large or tiny" >&2
        exit 2
        ;;
esac
