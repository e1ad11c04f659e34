"""`wmss demo`: the whole method on two-digit additions, with its controls, in minutes on two cores.

A tiny Qwen3 is made here. Its base has seen the problems three times; it is fine-tuned until its training loss
saturates, and then trained on in four ways for the same number of steps. A model of this size shows that the machinery
works. It proves nothing about the paper.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from wmss_jax import config, pipeline, runs, selection

# With fewer problems M1 learns them by heart, with more it learns to add: in between there is something to compare.
TRAIN, TEST = 1700, 1000
ARMS = {
    "M0": "base (weak)",
    "M1": "after SFT (strong)",
    "sft_continued": "SFT continued",
    "temperature": "CE(λ·z), no weak model",
    "joint": "WMSS, weak frozen",
    "wmss_trained_weak": "WMSS, weak trained",
}


def main(work_dir: Path, say: Any = print) -> int:
    """Carry the demo out, print its table, and return the exit code: 1 if the set-up shows nothing."""
    recipe = make_recipe(work_dir)
    summary = pipeline.run(recipe, say=say)
    figures = _figures(recipe, summary)
    (work_dir / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    console = Console()
    console.print(_table(figures))
    console.print(f"Exported model (Hugging Face format): {summary['export']}", highlight=False, soft_wrap=True)
    console.print(
        "A model of this size proves the machinery, not the paper: one seed, one task. Compare WMSS with the row "
        "without a weak model, which is the same loss at another temperature, not with M1, which trained for less.",
        highlight=False,
    )
    problems = _saturation_problems(figures)
    for problem in problems:
        console.print(f"This run shows nothing: {problem}", style="red", highlight=False)
    return int(bool(problems))


def make_recipe(work_dir: Path) -> config.RunConfig:
    """Write the problems and the tiny architecture into `work_dir` and return the recipe over them."""
    data, model = work_dir / "data", work_dir / "tiny"
    for name, lines in make_problems().items():
        _write(data / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _write(model / "config.json", json.dumps(TINY, indent=2))
    task = lambda name, limit=None: {
        "source": {"path": f"{name}.jsonl"}, "grader": "exact", "max_new_tokens": 8, "limit": limit, "batch_size": 256,
    }  # fmt: skip
    settings = {
        "work_dir": str(work_dir),
        "data": str(data),
        "model": {
            "config": str(model / "config.json"), "tokenizer": {"vocab_size": 320},
            "compute_dtype": "float32", "remat": "none",
        },
        "dataset": {"train": "train.jsonl", "chat_template": False, "seq_len": 96, "batch_size": 10},
        "optimizer": {"peak_lr": 2e-3, "warmup_fraction": 0.05, "b2": 0.98, "weight_decay": 0.01},
        "train": {"checkpoint_every_steps": 200, "log_every_steps": 20},
        "pretrain": {"epochs": 3},
        "sft": {"epochs": 28},
        "joint": {"epochs": 12, "objective": {"name": "logit_mix", "lam": 0.5}},
        "controls": {
            "sft_continued": {"objective": {"name": "sft"}, "resample": False},
            "temperature": {"objective": {"name": "temperature", "lam": 0.5}},
            "wmss_trained_weak": {"weak": {"trainable": True}},
        },
        "eval": {"tasks": {"test": task("test"), "train": task("train", 500)}},
    }  # fmt: skip
    return config.RunConfig.model_validate_json(json.dumps(settings))


TINY = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 320, "hidden_size": 96,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
    "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "max_position_embeddings": 96, "hidden_act": "silu", "attention_bias": False, "initializer_range": 0.1,
}  # fmt: skip


def make_problems(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Return the problems of both splits; no sum is in both, in either order."""
    rng = random.Random(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < TRAIN + TEST:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if (b, a) not in pairs:
            pairs[a, b] = None
    problems = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    return {"train": problems[:TRAIN], "test": problems[TRAIN:]}


def _write(path: Path, text: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _figures(recipe: config.RunConfig, summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return accuracy on test and train, entropy and margin of every arm."""
    run = runs.prepare(recipe, say=lambda _: None)
    out = {}
    for name in ARMS:
        scores = selection.scores(run, run.ref(summary["models"][name]))
        test, train = (summary["eval"][name][task] for task in ("test", "train"))
        out[name] = {
            "test": test["accuracy"], "test_se": test["standard_error"], "train": train["accuracy"],
            "entropy": float(np.mean(scores.entropy)), "margin": float(np.mean(scores.margin)),
        }  # fmt: skip
    return out


def _table(figures: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=f"Two-digit addition: {TRAIN} training problems, {TEST} held out, equal steps after M1")
    for column in ("", "test accuracy, %", "train accuracy, %", "entropy, nats", "logit margin"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, row in figures.items():
        table.add_row(
            ARMS[name], f"{100 * row['test']:.1f} ± {100 * row['test_se']:.1f}", f"{100 * row['train']:.1f}",
            f"{row['entropy']:.4f}", f"{row['margin']:.2f}",
        )  # fmt: skip
    return table


def _saturation_problems(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return why the comparison means nothing: a base that can do it already, or an M1 that has not saturated."""
    m0, m1 = figures["M0"], figures["M1"]
    checks = {
        f"the base answers {m0['test']:.1%} of the test, above 10 %": m0["test"] > 0.1,
        f"M1 answers {m1['train']:.1%} of its training problems, below 95 %": m1["train"] < 0.95,
        f"M1 answers {m1['test']:.1%} of the test, outside 10 to 90 %": not 0.1 <= m1["test"] <= 0.9,
    }
    return [problem for problem, is_so in checks.items() if is_so]
