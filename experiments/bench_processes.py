"""The part of bench.py that needs processes of its own: memory and time against size, and the main job by stage.

Not a script: bench.py runs it, into results/bench.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# The largest resident size so far, of this process alone (getrusage would count its parent's), from Linux.
PEAK_MIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"
PROBE = f"""
import sys, time, torch
from experiments.bench import pretraining_step
from model import GPT, GPTConfig
torch.set_num_threads(1)
n_layer, n_embd, vocab_size, B = map(int, sys.argv[1:])
model = GPT(GPTConfig(vocab_size, 16, n_layer=n_layer, n_embd=n_embd)).initialise(0)
step = pretraining_step(model, torch.randint(vocab_size, (B, 65)))
before = {PEAK_MIB}
times = []
for _ in range(5):
    began = time.perf_counter(); step(); times.append(time.perf_counter() - began)
print(sum(p.numel() for p in model.parameters()), min(times), {PEAK_MIB} - before)
"""


def growth() -> list[dict]:
    """(g) A pretraining step's time and the memory it adds, each size in a process of its own."""
    records = []
    base = {"n_layer": 2, "n_embd": 64, "vocab_size": 1381, "B": 64}
    changes = [{}, *({"n_embd": c} for c in (32, 128, 256)), {"n_layer": 4}, {"n_layer": 8}]
    changes += [*({"B": b} for b in (16, 256)), *({"vocab_size": v} for v in (2762, 5524))]
    for change in changes:
        size = base | change
        done = subprocess.run([sys.executable, "-c", PROBE, *map(str, size.values())], capture_output=True, text=True, check=True)
        n_params, s, mib = done.stdout.split()
        records.append({**size, "parameters": int(n_params), "step_ms": 1e3 * float(s), "added_mib": float(mib)})
        print(f"{size}: {1e3 * float(s):.0f} ms a step, {float(mib):.0f} MiB", flush=True)
    return records


def main_job(quick: bool) -> dict:
    """(f) The four scripts from an empty folder: seconds by stage with start-up, the largest process's memory."""
    stages, peaks = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for script in ("train_teacher", "generate", "train_student", "evaluate"):
            argv = ["--run", f"{folder}/run", *(["--quick"] if quick else [])]
            program = f"import {script}; {script}.main({argv}); print({PEAK_MIB})"
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            whole = time.perf_counter() - began
            peaks.append(float(done.stdout.split()[-1]))
            inside = json.loads(Path(f"{folder}/run/elapsed_s.json").read_text())[script]
            stages[script] = {"seconds": whole, "start_up_s": whole - inside}
            print(f"{script}: {whole:.0f} s", flush=True)
    return {"stages": stages, "seconds": sum(s["seconds"] for s in stages.values()), "peak_mib": max(peaks)}
