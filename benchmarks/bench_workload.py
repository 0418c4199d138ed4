"""Workload of the paper's three models at 512x512, 21 classes, against the paper's figures.

python benchmarks/bench_workload.py [--json PATH]
"""

import argparse
import json
import math
from pathlib import Path

import torch

import messnet
from messnet.costs.workload import count_module
from messnet.network.zoo import MODELS

POSTERS = {"drn50_fcn": 138.63, "drn50_deeplabv3": 163.86, "mobilenetv2_fcn": 8.78}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    figures = []
    for name, goal in POSTERS.items():
        model = MODELS[name](21)
        whole = count_module(model, (1, 3, 512, 512))
        net = messnet.convert(model, torch.zeros(1, 3, 512, 512), num_exits=6)
        parts = messnet.profile(net, input_size=(512, 512)).total_macs("paper")
        value = math.floor(whole.macs_paper / 1e7) / 100  # the paper truncates
        ok = value == goal and parts == whole.macs_paper
        figures.append({"name": f"{name}_gmacs_paper", "value": value, "goal": goal, "ok": ok})
        print(f"{name}_gmacs_paper {value:.2f} GMACs {goal:.2f} {'ok' if ok else 'short'}")
        print(f"{name}_gmacs_conv {whole.macs / 1e9:.3f} GMACs - ok")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
