"""`Pairs`: which experts of a layer are chosen together, counted in a recorded run.

Counts of single experts balance ranks. Which ranks and nodes a token has to visit depends on the experts that it
chooses together, and pairs say that well: `visits` estimates from them how many a token visits, and `affinity` plans
for fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np

from epbackend.errors import ConfigError
from epbackend.placement.loads import MOST_TOKENS


@dataclass(frozen=True, eq=False)
class Pairs:
    """Recorded pairs of one model; read-only.

    Raises:
        ConfigError: a wrong shape, values that are no counts, or counts that differ from one side to the other.
    """

    tokens_YEE: np.ndarray
    """Tokens that chose both experts, float64 [layers, experts, experts], symmetric; on the diagonal, tokens that chose
    the expert. A dense layer is all zero."""
    name: str = "pairs"
    """Where they come from, for messages and provenance."""
    numbering: str | None = None
    """By whose numbers experts are counted, as in `Loads`."""

    def __post_init__(self) -> None:
        tokens_YEE = np.array(self.tokens_YEE, dtype=np.float64)
        if tokens_YEE.ndim != 3 or 0 in tokens_YEE.shape or tokens_YEE.shape[1] != tokens_YEE.shape[2]:
            raise ConfigError(
                f"pairs: must be [layers, experts, experts], but the shape is {tokens_YEE.shape}; record them again"
            )
        diagonal_YE = np.diagonal(tokens_YEE, axis1=1, axis2=2)
        for bad_YEE, what in (
            (~((tokens_YEE >= 0) & (tokens_YEE <= MOST_TOKENS)), f"is no count from 0 to {MOST_TOKENS}"),
            (
                tokens_YEE != tokens_YEE.transpose(0, 2, 1),
                "differs from that of the same two in the other order",
            ),
            (
                tokens_YEE > diagonal_YE[:, :, None],
                "is more than the tokens of the first one alone (the diagonal)",
            ),
        ):
            if bad_YEE.any():
                layer, expert, other = np.argwhere(bad_YEE)[0]
                raise ConfigError(
                    f"pairs: the count of experts {expert} and {other} in layer {layer} {what}; record them again "
                    "(epbackend record --pairs)"
                )
        tokens_YEE.flags.writeable = False
        object.__setattr__(self, "tokens_YEE", tokens_YEE)

    @classmethod
    def of_routes(cls, topk_ids: Sequence[np.ndarray], experts: int) -> Pairs:
        """From the chosen experts of each layer's tokens, [T, K] each."""
        return cls(np.stack([count_pairs(ids_TK, experts) for ids_TK in topk_ids]), "routes")

    @property
    def layers(self) -> int:
        """Y: layers of the model, dense ones too."""
        return self.tokens_YEE.shape[0]

    @property
    def experts(self) -> int:
        """E."""
        return self.tokens_YEE.shape[1]

    @cached_property
    def loads_YE(self) -> np.ndarray:
        """Choices of each expert among the counted tokens."""
        return np.diagonal(self.tokens_YEE, axis1=1, axis2=2)

    @cached_property
    def topk(self) -> int:
        """K, the experts of a token: each token counts K times on the diagonal, and K * K times in all."""
        return max(1, round(self.tokens_YEE.sum() / max(self.loads_YE.sum(), 1.0)))

    def beyond_noise(self, layer: int) -> np.ndarray:
        """The chance that a token chooses both experts, float64 [E, E]; on the diagonal, that it chooses the expert.

        Counts differ from those of independent choices by chance alone, too, and a search finds the largest such
        differences. So each is made smaller by the part that chance explains over all pairs (as James and Stein do).
        """
        tokens_E = self.loads_YE[layer]
        tokens = tokens_E.sum() / self.topk
        both_EE = self.tokens_YEE[layer] / max(tokens, 1e-300)
        chance_E = tokens_E / max(tokens, 1e-300)
        np.fill_diagonal(both_EE, 0.0)
        # Alone, each pair would have `scale` times the product of its chances. chi_squared is the sum of
        # (both - alone) ** 2 / alone over pairs of experts that are chosen at all.
        scale = both_EE.sum() / max(chance_E.sum() ** 2 - (chance_E**2).sum(), 1e-300)
        chosen = np.count_nonzero(chance_E)
        inverse_E = np.divide(1.0, chance_E, out=np.zeros_like(chance_E), where=chance_E > 0)
        squares = inverse_E @ (both_EE * both_EE) @ inverse_E / max(scale, 1e-300)
        chi_squared = tokens * (squares - both_EE.sum())
        real = max(0.0, 1 - chosen * (chosen - 1) / max(chi_squared, 1e-300))
        both_EE *= real
        both_EE += np.multiply.outer((1 - real) * scale * chance_E, chance_E)
        np.fill_diagonal(both_EE, chance_E)
        return both_EE

    @cached_property
    def digest(self) -> str:
        """The same for the same counts: by it a placement names them."""
        return sha256(self.tokens_YEE.tobytes()).hexdigest()[:12]


def count_pairs(topk_ids_TK: np.ndarray, experts: int) -> np.ndarray:
    """Tokens that chose both experts, int64 [E, E].

    >>> count_pairs(np.array([[0, 2], [2, 1]]), 3).tolist()
    [[1, 0, 1], [0, 1, 1], [1, 1, 2]]

    Raises:
        ConfigError: the ids are no [T, K] array of experts from 0 to `experts` - 1.
    """
    ids_TK = np.asarray(topk_ids_TK)
    if ids_TK.ndim != 2 or ids_TK.dtype.kind not in "iu":
        raise ConfigError(
            f"routes: must be whole numbers [tokens, K], not {ids_TK.dtype} of shape {ids_TK.shape}"
        )
    if ids_TK.size and not 0 <= ids_TK.min() <= ids_TK.max() < experts:
        raise ConfigError(
            f"routes: they name expert {ids_TK.max()}, but a layer has experts 0 to {experts - 1}"
        )
    ids_TK = ids_TK.astype(np.int64)
    both_S = (ids_TK[:, :, None] * experts + ids_TK[:, None, :]).reshape(-1)
    return np.bincount(both_S, minlength=experts * experts).reshape(experts, experts)


def check_pairs_of(pairs: Pairs, layers: int, experts: int, of: str, numbering: str | None) -> None:
    """Raises ConfigError where pairs and `of`, a placement or loads of so many layers and experts, do not match."""
    for name, has, wanted in (("layers", pairs.layers, layers), ("experts", pairs.experts, experts)):
        if has != wanted:
            raise ConfigError(
                f"pairs: {pairs.name} has {has} {name}, but the {of} {wanted}; use pairs recorded with the same model"
            )
    if pairs.numbering and numbering and pairs.numbering != numbering:
        raise ConfigError(
            f"pairs: {pairs.name} counts experts by the numbers of {pairs.numbering}, but the {of} by those of "
            f"{numbering}; use pairs recorded with the same checkpoint"
        )
