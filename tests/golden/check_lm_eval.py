"""Does lm-eval say the same of an export, whether transformers runs it or this package does?

    python tests/golden/check_lm_eval.py run hf EXPORTED_DIR hf.json       # in a scratch environment: torch, lm-eval
    python tests/golden/check_lm_eval.py run wmss EXPORTED_DIR wmss.json   # in this package's, extra `eval`
    python tests/golden/check_lm_eval.py compare hf.json wmss.json

EXPORTED_DIR is a float32 export with a tokenizer. The tasks are made here, of sums: choices by their likelihood,
answers that are generated, and the perplexity of a text. Exits 1 when a log-likelihood differs by more than 1e-3, or a
choice or an answer at all.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

TOLERANCE = 1e-3


def tasks(directory: Path) -> list[dict]:
    rng = random.Random(0)
    pairs = [(rng.randint(1, 99), rng.randint(1, 999)) for _ in range(20)]
    rows = [{"q": f"{a}+{b}=", "options": [str(a + b + k) for k in (0, 1, 10, -3)], "gold": 0} for a, b in pairs]
    (directory / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(directory / "sums.jsonl")}},
        "test_split": "test", "doc_to_text": "{{q}}",
    }  # fmt: skip
    ending = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    return [
        {**common, "task": "choices", "output_type": "multiple_choice", "doc_to_choice": "options",
         "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {**common, "task": "answers", "output_type": "generate_until", "doc_to_target": "{{options[0]}}",
         "generation_kwargs": ending, "metric_list": [{"metric": "exact_match"}]},
        {**common, "task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{q}}{{options[0]}}", "metric_list": [{"metric": "bits_per_byte"}]},
    ]  # fmt: skip


def run(kind: str, export: str, out: str) -> int:
    """Write {task: {"figures", "said"}} of one way to run the model."""
    import lm_eval

    if kind == "wmss":
        import wmss_jax.evals.harness  # noqa: F401 -- registers the name
    settings = {"hf": {"pretrained": export, "dtype": "float32"}, "wmss": {"path": export}}[kind]
    with tempfile.TemporaryDirectory() as scratch:
        done = lm_eval.simple_evaluate(
            model=kind, model_args=settings, tasks=tasks(Path(scratch)), batch_size=4, bootstrap_iters=0,
            device="cpu" if kind == "hf" else None,
        )  # fmt: skip
    found = {
        name: {
            "figures": {key: value for key, value in figures.items() if isinstance(value, float)},
            "said": [row["filtered_resps"] for row in sorted(done["samples"][name], key=lambda row: row["doc_id"])],
        }
        for name, figures in done["results"].items()
    }
    Path(out).write_text(json.dumps(found, indent=1))
    return 0


def compare(a: str, b: str) -> int:
    """Returns the exit code: 0 when both say the same."""
    first, second = (json.loads(Path(file).read_text()) for file in (a, b))
    same = first.keys() == second.keys()
    for name, found in first.items():
        other = second[name]
        pairs = list(zip(_leaves(found["said"]), _leaves(other["said"]), strict=True))
        numbers = [abs(x - y) for x, y in pairs if isinstance(x, float)]
        texts = [x == y for x, y in pairs if not isinstance(x, float)]
        print(f"{name}: {found['figures']} and {other['figures']}; {len(numbers)} log-likelihoods, largest difference "
              f"{max(numbers, default=0):.2g}; {sum(texts)} of {len(texts)} other answers are the same")  # fmt: skip
        close = all(abs(found["figures"][key] - other["figures"][key]) <= TOLERANCE for key in found["figures"])
        same &= close and all(texts) and max(numbers, default=0) <= TOLERANCE
    print("ok" if same else "FAILED")
    return 0 if same else 1


def _leaves(tree: object) -> list:
    return [leaf for branch in tree for leaf in _leaves(branch)] if isinstance(tree, list | tuple) else [tree]


if __name__ == "__main__":
    sys.exit({"run": run, "compare": compare}[sys.argv[1]](*sys.argv[2:]))
