"""Writes smoke_cpu.jsonl anew. Run it only when numerics change on purpose, and say why in the commit."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KEPT = ("step", "stage", "loss/train", "sparsity/global")

with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
        [sys.executable, "-m", "tritprune", "experiment=smoke", "tracker=none", "slimmer=none", "run_dir=run"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)},
        check=True,
    )
    records = [json.loads(line) for line in (Path(folder) / "run" / "curves.jsonl").read_text().splitlines()]
lines = [json.dumps({k: r[k] for k in KEPT if k in r}) for r in records if "loss/train" in r]
(HERE / "smoke_cpu.jsonl").write_text("\n".join(lines) + "\n")
print(f"{len(lines)} steps written to {HERE / 'smoke_cpu.jsonl'}")
