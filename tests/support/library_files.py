"""The files that real libraries wrote, with what these libraries held in memory when they wrote them."""

import json
from pathlib import Path

from safetensors.torch import load_file

FILES = Path(__file__).parents[1] / "data" / "files"
CASES = sorted(folder.name for folder in FILES.iterdir() if (folder / "about.json").exists())


def case(name):
    about = json.loads((FILES / name / "about.json").read_text())
    expected = load_file(FILES / name / "expected.safetensors")
    averages, raw = {}, {}
    for key, tensor in expected.items():
        kind, _, rest = key.partition("/")
        if kind == "raw":
            raw[rest] = tensor
        else:
            average, _, tensor_name = rest.partition("/")
            averages.setdefault(average, {})[tensor_name] = tensor
    return about, averages, raw
