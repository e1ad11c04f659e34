"""Does transformers compute the golden logits from a directory that this package exported?

In a scratch environment with torch and transformers, 4.56 or later, 5 included:

    python tests/golden/check_export.py EXPORTED_DIR GOLDEN_NPZ

EXPORTED_DIR is what `wmss.save` wrote from one of the checkpoints in tests/golden, GOLDEN_NPZ
that checkpoint's golden.npz. Exits 1 when the logits differ by more than 1e-4 or when transformers
found a weight missing, of another shape, or left over.
"""

import argparse
import sys

import numpy as np
import torch
import transformers

TOLERANCE = 1e-4


@torch.no_grad()
def main() -> int:
    """Returns the exit code: 0 when the directory reproduces the golden logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported_dir")
    parser.add_argument("golden_npz")
    args = parser.parse_args()

    golden = np.load(args.golden_npz)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        args.exported_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    logits = model(torch.from_numpy(golden["tokens"]).long()).logits.numpy()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    if logits.shape != golden["logits"].shape:
        print(f"FAILED: logits {logits.shape}, golden {golden['logits'].shape}")
        return 1
    error = np.abs(logits - golden["logits"]).max()
    print(f"max error {error:.3g}, tolerance {TOLERANCE:g}")
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        print(f"loading: {wrong}")
    same = bool(error <= TOLERANCE) and not wrong  # NaN is not <= anything
    print("ok" if same else "FAILED")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
