"""Rewards of what a completion keeps of a column of the data set.

Shape suffixes: B texts, T tokens, D embedding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from clp_engine.data.minilm import ensure_minilm
from clp_engine.extras import require
from clp_engine.rewards.text import completion_text, copied_share, read_column

_BATCH = 32
_MAX_TOKENS = 128
_CACHED_SOURCES = 4096


class SentenceEmbedder:
    """Unit-length sentence embeddings: mean over tokens of the last hidden state, on the CPU, float32 [B, D].

    Args:
        model: folder or hub id of an encoder; None takes the embedded all-MiniLM-L6-v2.
    """

    def __init__(self, model: str | Path | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        path = str(model if model is not None else ensure_minilm())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path).eval().float()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return the embeddings of B texts, float32 [B, D]; similar lengths share a batch."""
        import torch

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        embeddings_BD = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden_BTD = self.model(**batch).last_hidden_state
                mask_BT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_BTD.dtype)
                mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1.0)
                embeddings_BD[rows] = torch.nn.functional.normalize(mean_BD, dim=-1).numpy()
        return embeddings_BD


@functools.lru_cache(maxsize=2)
def _embedder(model: str | None) -> SentenceEmbedder:
    """Return the embedder of a path, loaded once in a process and never copied with a reward."""
    return SentenceEmbedder(model)


class Closeness:
    """The meaning of the source: `(min(cosine, cap) / cap)**4 * (1 - copy_penalty * copied)`, in [0, 1].

    The cosine is that of sentence embeddings of completion and source, 0 where negative; from `cap` on it gains
    nothing more; the fourth power tells near from nearer, sentences on one subject being all at .6 to 1. `copied` is
    the share of words within 4-grams of the source; `copy_penalty` asks for other words.

    Args:
        source_column: column with the text to be close to.
        cap: cosine that counts as 1.
        copy_penalty: what a completion copied as a whole loses.
        model: folder or hub id of the sentence encoder; None takes the embedded all-MiniLM-L6-v2.

    Raises:
        ValueError: `cap` or `copy_penalty` lies outside of (0, 1] or [0, 1].
    """

    def __init__(
        self,
        source_column: str = "source",
        cap: float = 1.0,
        copy_penalty: float = 0.25,
        model: str | Path | None = None,
    ) -> None:
        if not 0.0 < cap <= 1.0:
            raise ValueError(f"cap must lie in (0, 1], got {cap}")
        if not 0.0 <= copy_penalty <= 1.0:
            raise ValueError(f"copy_penalty must lie in [0, 1], got {copy_penalty}")
        self.__name__ = "closeness"
        self.source_column = source_column
        self.cap = cap
        self.copy_penalty = copy_penalty
        self.model = str(model) if model is not None else None
        self._sources: dict[str, np.ndarray] = {}

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Return one score for each completion (TRL's signature; `completions` and the source column are read)."""
        sources = read_column(columns, self.source_column, self.__name__)
        texts = [completion_text(completion) for completion in completions]
        cosines = self.cosine(texts, sources)
        return [self._score(*row) for row in zip(texts, sources, cosines, strict=True)]

    def cosine(self, texts: list[str], sources: list[str]) -> list[float]:
        """Return the cosine of each text's and its source's embedding; embeddings of sources are kept."""
        embedder = _embedder(self.model)
        new = list(dict.fromkeys(source for source in sources if source not in self._sources))
        if len(self._sources) + len(new) > _CACHED_SOURCES:
            self._sources.clear()
            new = list(dict.fromkeys(sources))
        if new:
            self._sources.update(zip(new, embedder.encode(new), strict=True))
        pairs = zip(embedder.encode(texts), sources, strict=True)
        return [float(embedding @ self._sources[source]) for embedding, source in pairs]

    def _score(self, text: str, source: str, cosine: float) -> float:
        """Return the score of one text whose cosine is known."""
        close = min(max(cosine, 0.0), self.cap) / self.cap
        return close**4 * (1.0 - self.copy_penalty * copied_share(text, source))


class RougeL:
    """F-measure of ROUGE-L (longest common subsequence of stemmed words) of completion and a column, in [0, 1].

    Equivalent: `RougeScorer(["rougeL"], use_stemmer=True).score(target, text)["rougeL"].fmeasure`.

    Args:
        target_column: column with the reference text, None in rows without one.

    Raises:
        ImportError: rouge_score is missing.
    """

    def __init__(self, target_column: str = "summary") -> None:
        self.__name__ = "rouge_l"
        self.target_column = target_column
        self._scorer = require("rouge_score.rouge_scorer", extra="eval").RougeScorer(["rougeL"], use_stemmer=True)

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Return one score for each completion, None where its row has no reference."""
        targets = read_column(columns, self.target_column, self.__name__)
        return [
            None
            if target is None
            else float(self._scorer.score(target, completion_text(completion))["rougeL"].fmeasure)
            for completion, target in zip(completions, targets, strict=True)
        ]
