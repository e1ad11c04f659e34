"""In a scratch environment with torch==2.13.0 transformers==5.23.0:

    python tests/golden/make_qwen3.py

Writes tests/golden/qwen3/{tied,untied,bf16}: tiny random Qwen3 checkpoints, each with a golden.npz
of what transformers computes from the files on disk (float32, eager attention, CPU). transformers 4
writes older config keys, which published checkpoints still carry; run under it, the same command
writes only the configs of `untied` in those forms:

    transformers==4.57.1 writes untied_v4/config.json     (rope_theta, rope_scaling, dtype)
    transformers==4.51.3 writes untied_v4_51/config.json  (rope_theta, rope_scaling, torch_dtype)

torch is needed here only; the package and its tests read the committed files.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

OUT = Path(__file__).parent / "qwen3"
MAJOR = int(transformers.__version__.split(".")[0])
V4_FOLDERS = {"4.57.1": "untied_v4", "4.51.3": "untied_v4_51"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden directory: the sizes, how it is saved, and the seed of all its random numbers."""

    seed: int
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # must be read: only in bf16 is it hidden_size / num_attention_heads
    intermediate_size: int
    rope_theta: float
    tie_word_embeddings: bool
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "5GB"  # small values make several files and an index
    generate: bool = False  # add a greedy continuation to the golden file

    def config(self) -> Qwen3Config:
        """Returns the transformers config, rope given as the running major version wants it."""
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            tie_word_embeddings=self.tie_word_embeddings,
            max_position_embeddings=256,
            **({"rope_parameters": rope} if MAJOR >= 5 else {"rope_theta": self.rope_theta}),
        )


CASES = {
    "tied": Case(
        seed=1,
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        rope_theta=1e4,
        tie_word_embeddings=True,
    ),
    "untied": Case(
        seed=3,
        vocab_size=120,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=80,
        rope_theta=1e6,
        tie_word_embeddings=False,
        max_shard_size="120KB",
        generate=True,
    ),
    "bf16": Case(
        seed=2,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=48,
        rope_theta=1e4,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    ),
}


def randomise(model: Qwen3ForCausalLM, rng: np.random.Generator) -> None:
    """Draws every weight so that an error in any of them, or in rope, is visible in the logits.

    transformers' own init (norms 1, matrices 0.02) would leave attention uniform and the q and k
    norms interchangeable.
    """
    tied = model.config.tie_word_embeddings
    for name, param in model.named_parameters():
        noise = rng.standard_normal(param.shape)
        fan_in = param.shape[-1]
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif "lm_head" in name or ("embed_tokens" in name and tied):
            value = 2 * noise / fan_in**0.5  # logits of std 2: the final norm's output has rms 1
        elif "embed_tokens" in name:
            value = noise
        else:
            value = 1.5 * noise / fan_in**0.5
        param.data.copy_(torch.from_numpy(value))


def greedy(model: Qwen3ForCausalLM, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a prompt, its greedy continuation and each step's gap between the best two logits."""
    prompt = rng.integers(model.config.vocab_size, size=(1, 8))
    answer = model.generate(
        torch.from_numpy(prompt),
        attention_mask=torch.ones(1, 8, dtype=torch.long),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    generated = answer.sequences[0, 8:].numpy()
    best_two = torch.cat(answer.logits).topk(2).values
    gap = (best_two[:, 0] - best_two[:, 1]).numpy()
    # A smaller gap could be lost to rounding in another framework: choose another seed.
    assert generated.shape == (16,) and gap.min() > 1e-2, (generated, gap)
    return {
        "prompt": prompt.astype(np.int32),
        "generated": generated.astype(np.int32),
        "gap": gap,
    }


@torch.no_grad()
def write(name: str, case: Case) -> None:
    """Writes one checkpoint, then its golden numbers from the checkpoint as read back."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(case.seed)
    model = Qwen3ForCausalLM(case.config())
    randomise(model, rng)
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = rng.integers(case.vocab_size, size=(2, 24))
    logits = model(torch.from_numpy(tokens)).logits.numpy()
    golden = {"tokens": tokens.astype(np.int32), "logits": logits}
    if case.generate:
        golden |= greedy(model, rng)
    np.savez_compressed(folder / "golden.npz", **golden)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size} bytes, logits std {logits.std():.2f}", golden.get("gap", ""))


def write_v4_config() -> None:
    """Writes only the config of `untied`, as the running transformers 4 saves it with a model."""
    folder = OUT / V4_FOLDERS[transformers.__version__]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        Qwen3ForCausalLM(CASES["untied"].config()).save_pretrained(scratch)
        shutil.copy(Path(scratch) / "config.json", folder)
    print(f"{folder.name}/config.json by transformers {transformers.__version__}")


if __name__ == "__main__":
    if MAJOR >= 5:
        for name, case in CASES.items():
            write(name, case)
    else:
        write_v4_config()
