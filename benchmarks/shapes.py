"""Qwen3 models of published sizes, for random weights."""

from typing import Any

# Width, MLP width, layers, heads, kv heads, head size, tied, vocabulary: of the published config.json files.
SHAPES = {
    "qwen3_0_6b": (1024, 3072, 28, 16, 8, 128, True, 151936),
    "qwen3_8b": (4096, 12288, 36, 32, 8, 128, False, 151936),
    "tiny": (64, 128, 2, 2, 1, 32, True, 512),  # to try the program itself
}


def config(name: str, **changes: Any) -> Any:
    """Return the `qwen3.Config` of a shape."""
    from wmss_jax.models import qwen3  # jax comes with it, and is not to make its threads before they are bound

    D, F, L, N, K, H, tied, V = SHAPES[name]
    settings = dict(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=H,
        rope_theta=1e6, norm_eps=1e-6, tied=tied, max_positions=40960,
    )  # fmt: skip
    return qwen3.Config(**settings | changes)
