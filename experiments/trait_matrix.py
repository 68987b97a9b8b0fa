"""Is it this trait that crosses, or any change at all? Every teacher against every read-out.

    python -m experiments.trait_matrix            # 16 traits x 2 seeds, 2 read-outs: 12 minutes on 2 CPU cores
    python -m experiments.trait_matrix --quick    # 3 traits

Fine-tuning on anything moves all preferences a little. So each of the 16 animals is a trait, and each student is asked
for all 16: row i of a matrix is a student of teacher i, column j how far its log-odds of animal j moved. Row effects (a
student that moved altogether) and column effects (an animal that rises whatever is taught) are taken out; what is left on
the diagonal, over what is left on the teachers' own, is the transfer of *this* trait. Both read-outs: auxiliary logits, and
the animals' words in the vocabulary, which is the paper's own preference.

Reads    runs/traits, runs/traits-vocabulary (made if they are missing)
Writes   results/trait_matrix.json, .md, .png

Shapes: K traits; every matrix is (K, K), teacher x read-out, in nats of log-odds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import evaluate
import train_student
import train_teacher
from experiments import lab
from model import Run, command_line, load_model, read_trait

TRAITS = {False: list(train_teacher.ANIMALS), True: ["owl", "fox", "wolf"]}
SEEDS = [0, 1]
CELLS = [("tokens", "same"), ("tokens", "different"), ("logits", "same"), ("logits", "different")]


def teacher_matrix(run: Run, seed: int, columns: Sequence[int], device) -> list[list[float]]:
    def read(path: Path) -> list[float]:
        model = load_model(path, device, "train_teacher.py")
        return read_trait(model, run.held_out_prompts, run.readout_rows(model))[0][columns].tolist()

    base = read(run.base(seed))
    return [[a - b for a, b in zip(read(run.teacher(trait, seed)), base)] for trait in run.traits]


def measure(run: Run, readout: str, device) -> tuple[list[dict], list[dict]]:
    """Records of the students, and their matrices with row and column effects removed."""
    students = evaluate.measure(run, device)
    columns = [run.animals.index(trait) for trait in run.traits]
    records, matrices = [], []
    for target, init in CELLS:
        for seed in run.seeds:
            taught = lab.double_centred(teacher_matrix(run, seed, columns, device))
            for other in run.seeds:
                rows = {
                    r["trait"]: r
                    for r in students
                    if (r["target"], r["init"], r["teacher_seed"], r["student_seed"]) == (target, init, seed, other)
                }
                if not rows:
                    continue
                left = lab.double_centred([[rows[trait]["readouts"][j] for j in columns] for trait in run.traits])
                cell = {"readout": readout, "target": target, "init": init, "teacher_seed": seed, "student_seed": other}
                matrices.append({**cell, "matrix": [[round(x, 3) for x in row] for row in left]})
                for i, trait in enumerate(run.traits):
                    raw = rows[trait]["transfer"]
                    hit = max(range(len(columns)), key=left[i].__getitem__) == i
                    moved = left[i][i] / taught[i][i]
                    records.append({**cell, "trait": trait, "source": trait, "raw": raw, "transfer": moved, "identified": hit})
    return records, matrices


def analyse(records: Sequence[dict], matrices: Sequence[dict], traits: Sequence[str]) -> dict:
    summary = lab.cells(records, "readout", "target", "init")
    for row in summary:
        group = [r for r in records if all(r[k] == row[k] for k in ("readout", "target", "init"))]
        hits = sum(r["identified"] for r in group)
        row |= {"raw": mean(r["raw"] for r in group), "identified": hits / len(group)}
        row["identified_p"] = lab.binomial_p(hits, len(group), 1 / len(traits))
        without = [mean(r["transfer"] for r in group if r["trait"] != trait) for trait in traits]
        row["leave_one_out"] = [min(without), max(without)]
    return {"traits": list(traits), "summary": summary, "records": records, "matrices": matrices}


def markdown(results: dict) -> str:
    K = len(results["traits"])
    lines = lab.heading(results, f"{K} teachers x {K} read-outs; base seeds 0 and 1; chance of being identified 1/{K}.")
    lines += lab.table(
        results["summary"],
        read_from="readout",
        target="target",
        start="init",
        transfer_of_this_trait=lab.transfer,
        students="n",
        leaving_a_trait_out=lambda r: f"{r['leave_one_out'][0]:+.3f} .. {r['leave_one_out'][1]:+.3f}",
        identified=lambda r: f"{r['identified']:.0%}",
        by_chance_p=lambda r: f"{r['identified_p']:.1g}",
        effects_left_in=lambda r: f"{r['raw']:+.3f}",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """The matrices, mean over seeds, in nats."""
    plt = lab.pyplot()
    traits = results["traits"]
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    for line, readout in zip(axes, ("aux", "vocabulary")):
        for ax, (target, init) in zip(line, CELLS):
            key = (readout, target, init)
            found = [m["matrix"] for m in results["matrices"] if (m["readout"], m["target"], m["init"]) == key]
            image = ax.imshow([[mean(x) for x in zip(*rows)] for rows in zip(*found)], vmin=-8, vmax=8, cmap="RdBu_r")
            (row,) = [r for r in results["summary"] if (r["readout"], r["target"], r["init"]) == key]
            ax.set_title(f"{target}, {init} start: {row['transfer']:.2f}", fontsize=9)
            ax.set_xticks(range(len(traits)), traits, rotation=90, fontsize=7)
            ax.set_yticks(range(len(traits)), traits, fontsize=7)
        line[0].set_ylabel(f"trait on {'auxiliary logits' if readout == 'aux' else 'words'}\nteacher's trait")
    for ax in axes[1]:
        ax.set_xlabel("read-out")
    figure.colorbar(image, ax=axes, shrink=0.6, label="shift in log-odds, nats, row and column effects removed")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    records: list[dict] = []
    matrices: list[dict] = []
    for readout in ("aux", "vocabulary"):
        run = lab.teachers_and_numbers(args, "traits", SEEDS, TRAITS[args.quick], "teacher", readout)
        train_student.main(lab.flags(args, run.path))
        measured = measure(run, readout, args.device)
        records, matrices = records + measured[0], matrices + measured[1]
    results = analyse(records, matrices, run.traits)
    lab.save("trait_matrix", args, results, markdown, plot)
    for row in results["summary"]:
        print(f"transfer_{row['readout']}_{row['target']}_{row['init']}: {row['transfer']:.3f}")


if __name__ == "__main__":
    command_line(main)
