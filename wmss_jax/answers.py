"""`wmss generate`: a model's answers to texts, printed while they are made or written one a line."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from wmss_jax import encoding, examples, sharding, sources, tokenizer
from wmss_jax.endings import StopTexts, end_ids
from wmss_jax.generate import Completion, stream
from wmss_jax.models import CausalLM
from wmss_jax.sampling import GREEDY, Sampling
from wmss_jax.stages import ModelRef

_PIECE = 4  # tokens between two prints


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are made.

    Attributes:
        seed: added to each prompt's number, which gives the seed of its draws.
        stop: texts that end an answer.
        chat_template: put prompts into the tokenizer's chat template; None: if it has one.
    """

    sampling: Sampling = GREEDY
    max_new_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat_template: bool | None = None
    system_prompt: str | None = None
    batch_size: int = 64


class Answerer:
    """A model with its tokenizer, ready to answer.

    Raises:
        FileNotFoundError, ValueError: see `hf.load`; the tokenizer has tokens that the model does not know.
    """

    def __init__(self, model: str, settings: Settings):
        ref = ModelRef.named(model)
        self.settings = settings
        self.tokenizer = tokenizer.load(ref.assets)
        self._chat = settings.chat_template
        if self._chat is None:
            self._chat = self.tokenizer.chat_template is not None
        self._stop_ids = end_ids(self.tokenizer, ref.assets, chat_template=self._chat)
        self.ends = StopTexts(self.tokenizer, settings.stop)
        self._mesh = sharding.make_mesh() if jax.process_count() > 1 else None
        self._model, self._params = ref.load(self._mesh)
        _check_vocabulary(model, self._model, self.tokenizer)

    def stream(self, prompts: Sequence[str], every: int | None = None) -> Iterator[Completion]:
        """Yield the tokens that follow each prompt; see `generate.stream`."""
        s = self.settings
        around = {"chat_template": self._chat, "system_prompt": s.system_prompt}
        return stream(
            self._model, self._params,
            [encoding.prompt_tokens(prompt, self.tokenizer, **around).tolist() for prompt in prompts],
            max_new_tokens=s.max_new_tokens, stop_ids=self._stop_ids, sampling=s.sampling,
            seeds=[(s.seed + number) % 2**32 for number in range(len(prompts))],
            ends=self.ends if s.stop else None, every=every, mesh=self._mesh, batch_size=s.batch_size,
        )  # fmt: skip

    def text(self, completion: Completion) -> str:
        """Return the text of a completion, of an unfinished one what will stay of it."""
        text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return self.ends.sure(text) if completion.finish is None else self.ends.cut(text)


def print_while_made(answerer: Answerer, prompt: str, write: Callable[[str], object]) -> None:
    """Write the answers to one prompt: a single one piece by piece, several one after another."""
    if answerer.settings.sampling.samples > 1:
        for completion in answerer.stream([prompt]):
            write(f"{answerer.text(completion)}\n")
        return
    written = 0
    for completion in answerer.stream([prompt], every=_PIECE):
        text = answerer.text(completion)
        write(text[written:])
        written = max(written, len(text))
    write("\n")


def json_lines(answerer: Answerer, prompts: Iterable[str]) -> Iterator[str]:
    """Yield a line of JSON for every answer as it is finished: numbers of prompt and sample, text, tokens, finish."""
    for completion in answerer.stream(list(prompts)):
        record = {
            "prompt": completion.prompt,
            "sample": completion.sample,
            "text": answerer.text(completion),
            "tokens": len(completion.tokens),
            "finish": completion.finish,
        }
        yield json.dumps(record, ensure_ascii=False)


def read_prompts(file: Path, template: str) -> list[str]:
    """Return the prompt of every row of a JSONL file: the template over the row's columns.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or a row that is not JSON or lacks a column, told by line.
    """
    source = sources.SourceConfig(path=str(file.absolute()))
    prompts = [examples.fill(template, row) for row in examples.rows(source, file.parent)]
    if not prompts:
        raise ValueError(f"{file}: holds no prompts")
    return prompts


def _check_vocabulary(name: str, model: CausalLM, tokenizer: Any) -> None:
    if len(tokenizer) > (known := model.vocabulary[0]):
        raise ValueError(
            f"{name}: knows {known} tokens, its tokenizer has {len(tokenizer)}; they do not belong together"
        )
