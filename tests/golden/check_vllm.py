"""Does vLLM know the architecture of an export, and do its weights fill every parameter of vLLM's own model?

    python tests/golden/check_vllm.py EXPORTED_DIR ...        # in a scratch environment with vLLM (0.33); no GPU needed

Nothing is generated: that needs vLLM's kernels. Its model classes and weight loaders run on a CPU without them, and say
whether names, shapes and the fusing of matrices are what they expect. Exits 1 when a parameter is not filled.
"""

import os
import sys
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # a build for GPUs finds none, and refuses to go on

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator  # noqa: E402


def unfilled(config, directory: Path) -> tuple[str, list[str]]:
    """Return the class of vLLM that an export is for, and its parameters that are not wholly from there."""
    model = initialize_model(vllm_config=config)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    files = sorted(map(str, directory.glob("*.safetensors")))
    model.load_weights(safetensors_weights_iterator(files, False))
    found = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    return type(model).__name__, found


def main() -> int:
    """Returns the exit code: 0 when every parameter of every export is filled."""
    same, ready = True, False
    for directory in sys.argv[1:]:
        arguments = EngineArgs(model=directory, dtype="float32", enforce_eager=True, max_model_len=32)
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not ready:
                init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, "gloo")
                initialize_model_parallel(1, 1)
                torch.set_default_dtype(torch.float32)
                ready = True
            name, missing = unfilled(config, Path(directory))
        print(f"{directory}: {name}, {f'not filled: {missing}' if missing else 'ok'}", flush=True)
        same &= not missing
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
