"""Does PEFT make of an exported adapter the model that this package exports merged?

In a scratch environment with torch, transformers and peft:

    python tests/golden/check_adapter.py ADAPTER_DIR MERGED_DIR

ADAPTER_DIR is what a run wrote with `export.format: adapter`, MERGED_DIR the same run's with `format: model`; the
adapter's base is found by its own config. Exits 1 when the logits differ by more than 1e-4, or when the adapter
changes nothing.
"""

import argparse
import sys
import warnings

import peft
import torch
import transformers

TOLERANCE = 1e-4


@torch.no_grad()
def main() -> int:
    """Returns the exit code: 0 when adapter on base and merged model have the same logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter_dir")
    parser.add_argument("merged_dir")
    args = parser.parse_args()

    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    base_name = peft.PeftConfig.from_pretrained(args.adapter_dir).base_model_name_or_path
    tokens = torch.arange(48).reshape(2, 24)
    before = load(base_name)(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and of left over adapter weights
        adapted = peft.PeftModel.from_pretrained(load(base_name), args.adapter_dir)
    logits, merged = adapted(tokens).logits, load(args.merged_dir)(tokens).logits
    error, change = (logits - merged).abs().max().item(), (logits - before).abs().max().item()
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"max error {error:.3g}, tolerance {TOLERANCE:g}; the adapter moves logits by up to {change:.3g}")
    same = error <= TOLERANCE < change
    print("ok" if same else "FAILED")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
