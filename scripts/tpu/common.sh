# Code that the scripts in this folder share. With DRY_RUN=1, Google Cloud commands are printed instead of run.
set -euo pipefail
: "${TPU:?set it to a name for the slice}" "${ZONE:?set it to a zone, such as us-west4-a}"

if [ -n "${DRY_RUN-}" ]; then
    gcloud() {
        printf '%q ' gcloud "$@" >&2
        echo >&2
        if [[ "$*" == *" describe "* ]]; then echo ACTIVE; fi
    }
fi

# The software version of a slice, by slice type.
version_of() {
    case "$1" in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *) echo "$0: the type is $1; expected v5litepod-N, v5p-N or v6e-N, for which bert_jax is compiled" >&2; exit 2 ;;
    esac
}
