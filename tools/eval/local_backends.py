"""Backends that load a model here: ``transformers``, batched with left padding on GPU or CPU, and vLLM.

Greedy answers of ``transformers`` are those of ``model.generate``. A sampled answer depends on its prompt and its seed
only, not on the batch that it is in: noise of its own generator is added to each row's scores, and their maximum is a
sample (Gumbel's trick). vLLM batches by itself, and a sample depends on its own seed there, too.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from reflectron.tools.benchmarks.extraction import cut_at_first
from reflectron.tools.eval.backends import Decoding, GeneratedAnswer, Prompt, known_finish

# Tokens that are decoded to look for a stop string; each stands for a byte at least.
_STOP_WINDOW = 32


class TransformersBackend:
    """A model of a local folder or of the hub.

    Args:
        model: folder or name.
        dtype: ``auto`` is bfloat16 on CUDA and float32 on the CPU.
        bos: put BOS before every prompt that does not begin with it.

    Raises:
        ValueError: when ``bos`` is asked of a tokenizer without BOS.
    """

    def __init__(self, model: str, *, dtype: str = "auto", bos: bool = False) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
        self.model = loaded.to(self.device, getattr(torch, dtype)).eval()
        self.bos_id = bos_id(self.tokenizer) if bos else None
        self.eos_ids = self._eos_ids()

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[GeneratedAnswer]:
        """Return one answer a prompt, in their order; all are one batch."""
        ids = [encode(self.tokenizer, prompt.text, self.bos_id) for prompt in prompts]
        new = self.generate_ids(ids, decoding, [prompt.seed for prompt in prompts])
        return [self._answer(row, tokens, decoding) for row, tokens in zip(ids, new, strict=True)]

    @torch.inference_mode()
    def generate_ids(self, prompts: list[list[int]], decoding: Decoding, seeds: list[int]) -> list[list[int]]:
        """Return the new ids of each prompt, up to and with EOS where one was generated; at most ``max_new_tokens``."""
        width = max(map(len, prompts))
        # What stands in padding is never looked at.
        pad = self.eos_ids[0] if self.eos_ids else 0
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens, do_sample=False, eos_token_id=self.eos_ids or None, pad_token_id=pad
        )
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=_sampling(decoding, seeds),
            stopping_criteria=StoppingCriteriaList([_StopStrings(self.tokenizer, width, decoding.stop)]),
        )
        return [self._up_to_end(row[width:], decoding.stop) for row in output.tolist()]

    def _up_to_end(self, new: list[int], stop: tuple[str, ...]) -> list[int]:
        """Drop what follows the row's own end: others of the batch took longer."""
        for length, token in enumerate(new, 1):
            if token in self.eos_ids or ends_with_stop(self.tokenizer, new[:length], stop):
                return new[:length]
        return new

    def _answer(self, prompt: list[int], new: list[int], decoding: Decoding) -> GeneratedAnswer:
        kept = [token for token in new if token not in self.eos_ids]
        text = continuation(self.tokenizer, prompt, kept)
        cut = cut_at_first(text, decoding.stop)
        ended = len(kept) < len(new) or cut != text
        return GeneratedAnswer(cut, len(new), "stop" if ended else "length")

    def _eos_ids(self) -> list[int]:
        ids = self.model.generation_config.eos_token_id
        ids = [ids] if isinstance(ids, int) else list(ids or [])
        own = self.tokenizer.eos_token_id
        return ids if own in ids or own is None else [*ids, own]


def bos_id(tokenizer: Any) -> int:
    """Return the id of BOS.

    Raises:
        ValueError: when the tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("--bos is given, but the tokenizer has no BOS token")
    return int(tokenizer.bos_token_id)


def encode(tokenizer: Any, text: str, bos: int | None) -> list[int]:
    """Return the ids of a prompt; special tokens spelt out in it become their ids, and none is added but ``bos``."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of ids, special tokens included."""
    text: str = tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )
    return text


def continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Return the text of ``new`` as it follows ``prompt``: decoded alone, sentencepiece would drop a leading space."""
    return decode(tokenizer, [*prompt, *new])[len(decode(tokenizer, prompt)) :]


def ends_with_stop(tokenizer: Any, new: list[int], stop: tuple[str, ...]) -> bool:
    """Return whether the newest tokens hold a stop string."""
    text = decode(tokenizer, new[-_STOP_WINDOW:]) if stop else ""
    return any(string in text for string in stop)


def _sampling(decoding: Decoding, seeds: list[int]) -> LogitsProcessorList:
    if decoding.temperature == 0:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(decoding.temperature)]
    if decoding.top_p < 1:
        processors.append(TopPLogitsWarper(decoding.top_p))
    return LogitsProcessorList([*processors, _RowNoise(seeds)])


class _RowNoise(LogitsProcessor):
    """Adds Gumbel noise to scores [B, V], each row from its own generator."""

    def __init__(self, seeds: list[int]) -> None:
        # On the CPU, so that a seed means the same on every device.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        return scores.float() - torch.stack(rows).to(scores.device).log()


class _StopStrings(StoppingCriteria):
    """Ends each row of input ids [B, T] by itself; transformers' own criterion also finds strings in the prompt."""

    def __init__(self, tokenizer: Any, prompt_width: int, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.prompt_width, self.stop = tokenizer, prompt_width, stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_width :][:, -_STOP_WINDOW:].tolist()
        ended = [ends_with_stop(self.tokenizer, row, self.stop) for row in new]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class VllmBackend:
    """A model of a local folder or of the hub, in vLLM.

    Args:
        model: folder or name.
        dtype: as vLLM takes it.
        bos: put BOS before every prompt that does not begin with it.

    Raises:
        ValueError: when vLLM is not installed, or ``bos`` is asked of a tokenizer without BOS.
    """

    def __init__(self, model: str, *, dtype: str = "auto", bos: bool = False) -> None:
        try:
            import vllm
        except ImportError:
            raise ValueError("--backend vllm: the package vllm is not installed; take transformers") from None
        self.llm = vllm.LLM(model, dtype=dtype)
        self.tokenizer = self.llm.get_tokenizer()
        self.bos_id = bos_id(self.tokenizer) if bos else None
        self._parameters = vllm.SamplingParams

    def complete(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[GeneratedAnswer]:
        """Return one answer a prompt, in their order."""
        # As ids: vLLM would put BOS before a text.
        ids = [{"prompt_token_ids": encode(self.tokenizer, prompt.text, self.bos_id)} for prompt in prompts]
        parameters = [
            self._parameters(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=prompt.seed,
                max_tokens=decoding.max_new_tokens,
                stop=list(decoding.stop),
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
            )
            for prompt in prompts
        ]
        outputs = [output.outputs[0] for output in self.llm.generate(ids, parameters, use_tqdm=False)]
        return [
            GeneratedAnswer(output.text, len(output.token_ids), known_finish(output.finish_reason))
            for output in outputs
        ]
