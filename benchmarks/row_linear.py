"""Linear layers of one row on a GPU: our kernel by tiles, beside one call of `F.linear` a layer.

    python benchmarks/row_linear.py --out benchmarks/results/row_linear-h200.json

bf16, no bias; medians of CUDA graph replays, weights rotated so that none is found in the L2.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from _timing import graph_time
from torch import Tensor

from sm12x_compile.lowering.triton.row_linear import RowTiles, row_linear, row_linear_launch
from sm12x_compile.lowering.triton.row_linear_kernel import row_linear_kernel

SHAPES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (2880, (4096, 512, 512)), (4096, (2880,)), (2880, (32,)), (2880, (32000,)), (4096, (4096, 1024, 1024)),
    (4096, (14336, 14336)), (14336, (4096,)), (7168, (18432, 18432)), (16384, (7168,)), (2048, (12288, 64)),
    (4096, (2048,)),
)  # fmt: skip
TILES = tuple(
    RowTiles(*tiles)
    for tiles in (
        (1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (2, 2048, 8), (4, 2048, 8), (4, 512, 2), (8, 512, 2),
        (4, 512, 4), (2, 512, 2), (16, 512, 4),
    )
)  # fmt: skip
ROTATED_BYTES = 256e6


def launch(x: Tensor, weights: list[Tensor], outputs: list[Tensor], tiles: RowTiles) -> None:
    arguments, grid = row_linear_launch(x, weights, [], outputs, tiles, False)
    row_linear_kernel[grid](**arguments, num_warps=tiles.num_warps)


def measure(inner: int, outputs: tuple[int, ...]) -> dict[str, Any]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x = draw(1, inner)
    count = max(4, min(12, int(ROTATED_BYTES / (2 * inner * sum(outputs)))))
    sets = [[draw(n, inner) * inner**-0.5 for n in outputs] for _ in range(count)]
    made = [x.new_empty(1, n) for n in outputs]
    for got, w in zip(row_linear(x, sets[0], [], False), sets[0], strict=True):
        want = x.double() @ w.double().T
        assert (got.double() - want).norm() / want.norm() < 4e-3
    library = graph_time([lambda s=s: [F.linear(x, w) for w in s] for s in sets], replays=9)  # type: ignore[misc]
    times = {}
    for t in TILES:
        seconds = graph_time([lambda s=s, t=t: launch(x, s, made, t) for s in sets], replays=9)  # type: ignore[misc]
        times[f"{t.block_n}, {t.block_k}, {t.num_warps}"] = round(seconds * 1e6, 2)
    name = f"{inner} to {', '.join(map(str, outputs))}"
    return {"layers": name, "library_us": round(library * 1e6, 2), "us_by_block_n_block_k_warps": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="row_linear.json")
    given = parser.parse_args()
    rows = []
    for inner, outputs in SHAPES:
        rows.append(measure(inner, outputs))
        print(rows[-1], flush=True)
    found = {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}, "rows": rows}
    with open(given.out, "w") as file:
        json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
