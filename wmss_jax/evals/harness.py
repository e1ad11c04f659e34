"""Our models in lm-eval (extra `eval`):

    from wmss_jax.evals.harness import WmssLM                          # registers the name
    lm_eval.simple_evaluate(model="wmss", model_args={"path": "runs/x/export"}, tasks=["arc_easy"])

Log-likelihoods are sums of natural logs over the continuation's tokens, each after all that stands before it.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from wmss_jax import hf, sharding, tokenizer
from wmss_jax.generate import generate
from wmss_jax.models import CausalLM

_SHORTEST = 32  # tokens; below it, padding costs less than another compilation


@register_model("wmss")
class WmssLM(TemplateLM):
    """A Hugging Face directory, or hub id, of a family that this library knows."""

    def __init__(
        self, path: str, batch_size: int = 16, max_length: int | None = None, max_gen_toks: int = 256, **unused: Any
    ):
        """Load the model.

        Args:
            max_length: tokens of the longest input; default: what config.json allows.
            max_gen_toks: tokens of an answer, where a task does not say.
            unused: what lm-eval gives every model, such as a device.
        """
        super().__init__()
        del unused
        mesh = sharding.make_mesh()
        self.mesh = mesh if mesh.size > 1 else None
        self.tokenizer: Any = tokenizer.load(path)
        self.model, self.params = hf.load(path, self.mesh)
        self.batch_size = int(batch_size)
        self.max_length = int(max_length or self.model.config.max_positions)
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text, and stands before one that has no context."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps requests under."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's token ids; special tokens that are written out in it count as such."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens), **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return of each (key, context, continuation) its log-likelihood, and whether greedy decoding gives it.

        Of what is longer than the model's context, the start is left out.
        """
        del kwargs
        scored = self._scores([(context, continuation) for _, context, continuation in requests])
        for (key, _, _), answer in zip(requests, scored, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return scored

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, cut where it is longer than the context."""
        del disable_tqdm
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = utils.get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1)
            pieces = [utils.make_disjoint_window(window) for window in cut]
            windows += pieces
            owners += [owner] * len(pieces)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scores(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a greedy answer to each context, up to the first of its stop texts.

        Raises:
            ValueError: a task asks for sampling.
        """
        del disable_tqdm
        answers = [""] * len(requests)
        budgets: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise ValueError("the wmss model of lm-eval decodes greedily; set do_sample to false in the task")
            budgets.setdefault(int(settings.get("max_gen_toks", self.max_gen_toks)), []).append(index)
        for tokens, indices in budgets.items():
            room = self.max_length - tokens
            if room < 1:
                raise ValueError(f"max_gen_toks {tokens} leaves no room for a context in {self.max_length} tokens")
            prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.eot_token_id] for i in indices]
            found = generate(
                self.model, self.params, prompts, max_new_tokens=tokens, stop_ids=[self.eot_token_id], mesh=self.mesh,
                batch_size=self.batch_size,
            )  # fmt: skip
            for index, answer in zip(indices, found, strict=True):
                answers[index] = _until(
                    self.tokenizer.decode(answer, skip_special_tokens=True), requests[index].args[1]
                )
                self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for indices, tokens_BT, scored_BT in self._batches(pairs):
            placed = (_placed(x, self.mesh) for x in (tokens_BT, scored_BT))
            sums_B, greedy_B = _score(self.params, *placed, model=self.model, mesh=self.mesh)
            for index, total, is_greedy in zip(indices, np.asarray(sums_B), np.asarray(greedy_B), strict=False):
                answers[index] = (float(total), bool(is_greedy))
        return answers

    def _batches(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Yield indices, tokens, and which tokens are scored; few shapes, longest first."""
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        rows = self.batch_size + -self.batch_size % sharding.batch_shards(self.mesh)
        for start in range(0, len(order), rows):
            indices = order[start : start + rows]
            texts = [(pairs[i][0] + pairs[i][1])[-self.max_length - 1 :] for i in indices]
            length = max(_SHORTEST, 1 << (max(map(len, texts)) - 1).bit_length())
            tokens_BT = np.zeros((rows, length), np.int32)
            scored_BT = np.zeros((rows, length), bool)
            for row, (index, text) in enumerate(zip(indices, texts, strict=True)):
                tokens_BT[row, : len(text)] = text
                scored_BT[row, max(1, len(text) - len(pairs[index][1])) : len(text)] = True
            yield indices, tokens_BT, scored_BT


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _score(
    params: PyTree[Array], tokens_BT: Int[Array, "B T"], scored_BT: Array, *, model: CausalLM, mesh: Any
) -> tuple[Float[Array, "B"], Array]:
    """Return Σ log p over the scored tokens of each row, and whether each of these is the most likely one."""
    with sharding.use(mesh):
        logits_BTV = model.logits(params, tokens_BT)[:, :-1]
    targets_BT, scored_BT = tokens_BT[:, 1:], scored_BT[:, 1:]
    log_probs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    greedy_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return jnp.sum(jnp.where(scored_BT, picked_BT, 0), axis=1), jnp.all(greedy_BT | ~scored_BT, axis=1)


def _placed(x: np.ndarray, mesh: Any) -> Any:
    if mesh is None:
        return x
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.BATCH_AXES)))


def _until(text: str, settings: dict[str, Any]) -> str:
    stops = settings.get("until") or []
    ends = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop and stop in text]
    return text[: min(ends, default=len(text))]
