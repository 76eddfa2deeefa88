"""Write down which arguments the torch-npu operators that we call take, version by version.

    pip download --no-deps --dest wheels torch-npu==2.9.0     # and 2.10.0, 2.13.0, 2.14.0
    python scripts/ascend_schemas.py wheels/*.whl > tests/ascend/schemas.json

A wheel registers its operators by text, which is in its library as it stands: nothing is installed or imported.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

OPERATORS = (
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_grouped_matmul",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_gating_top_k",
    "npu_moe_init_routing_v2",
    "npu_moe_token_unpermute",
    "npu_swiglu",
)


def schemas(wheel: Path) -> dict[str, str]:
    """{operator: schema} of a wheel. Overloads, which have a dot in their names, are others' business."""
    library = zipfile.ZipFile(wheel).read("torch_npu/lib/libtorch_npu.so")
    found = {}
    for operator in OPERATORS:
        match = re.search(rb"\0(%s\(Tensor[^\0]*\) -> [^\0]*)\0" % operator.encode(), library)
        if match is None:
            raise SystemExit(f"{wheel.name} has no {operator}")
        found[operator] = match[1].decode()
    return found


def main(wheels: list[str]) -> None:
    by_version = {Path(wheel).name.split("-")[1]: schemas(Path(wheel)) for wheel in wheels}
    json.dump(by_version, sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
