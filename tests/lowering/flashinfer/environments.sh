#!/bin/sh
# The contract tests against releases of FlashInfer, each in an environment of its own. No GPU is needed.
#
#   tests/lowering/flashinfer/environments.sh DIRECTORY [RELEASE ...]
#
# The environments see the torch and pytest of the Python that runs this, and no more of FlashInfer's dependencies than
# its import asks for. Each takes about 1 GB. With LIGHT=1 the CuTe DSL is left out, which is most of it; the tests that
# import such kernels then read signatures from the source, or are skipped.
set -eu
directory=$1
shift
[ $# -gt 0 ] || set -- 0.7.2.post1 0.6.18.post1
python=${PYTHON:-python3}
host=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
root=$(cd "$(dirname "$0")/../../.." && pwd)
needs="apache-tvm-ffi==0.1.15.post2 click einops ninja nvidia-ml-py packaging requests tabulate tqdm"
needs="$needs urllib3 idna certifi charset-normalizer"
if [ -z "${LIGHT:-}" ]; then
    for part in nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13; do
        needs="$needs $part==4.8.1"
    done
    needs="$needs cuda-bindings cuda-pathfinder protobuf"
fi
failed=0
for release in "$@"; do
    environment=$directory/$release
    if [ ! -x "$environment/bin/python" ]; then
        $python -m venv "$environment"
        echo "$host" >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth"
        # shellcheck disable=SC2086
        "$environment/bin/python" -m pip install -q --no-deps --no-compile "flashinfer-python==$release" $needs
    fi
    echo "flashinfer-python $release"
    PYTHONPATH=$root FLASHINFER_WORKSPACE_BASE=$environment FLASHINFER_CUDA_ARCH_LIST=12.0a \
        "$environment/bin/python" -m pytest -q -rs -p no:cacheprovider "$root/tests/lowering/flashinfer/test_contract.py" ||
        failed=1
done
exit $failed
