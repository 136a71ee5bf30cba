"""Query heads that share keys and values: attention reads these where they are, also under a mask.

transformers (5.23) hands PyTorch grouped heads as they are only where there is no mask. Else it copies keys and values
for each query head, in every layer, and training holds the copies. Rows behind a prefix always have a mask. PyTorch's
fused attention on a CPU takes grouped heads and a mask together; on a GPU none of its kernels for training does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SHARES = "soft_prompt_heads_share_keys"
_NOT_PLAIN = ("position_bias", "cache", "softcap")


class GroupedAttention:
    """Mark the attention layers of a model whose query heads share keys and values.

    The layers are marked, and not the passes: whoever computes a layer again in the backward pass has to find it as it
    was in the forward pass. Other models in the process go on as before.

    Args:
        model: whose layers are marked.
    """

    def __init__(self, model: nn.Module) -> None:
        _stand_in()
        self._layers = [each for each in model.modules() if getattr(each, "num_key_value_groups", 1) > 1]
        for layer in self._layers:
            setattr(layer, _SHARES, getattr(layer, _SHARES, 0) + 1)  # several models may share them

    def remove(self) -> None:
        """Take the marks of this model away."""
        for layer in self._layers:
            setattr(layer, _SHARES, getattr(layer, _SHARES, 1) - 1)


@cache
def _stand_in() -> None:
    """Stand in for "sdpa", once in a process. A name of its own would turn off what models do for "sdpa" alone."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _around(ALL_ATTENTION_FUNCTIONS["sdpa"])


def _around(before: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            torch.compiler.is_compiling()
            or not getattr(module, _SHARES, 0)
            or attention_mask is None
            or query.shape[2] == 1  # transformers copies nothing for a single query
            or others.get("output_attentions")
            or any(others.get(name) is not None for name in _NOT_PLAIN)
            or not _takes_groups(query, key, value, attention_mask, dropout, scaling)
        ):
            given = {"dropout": dropout, "scaling": scaling, **others}
            found: tuple[Tensor, Tensor | None] = before(module, query, key, value, attention_mask, **given)
            return found
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    return attention


def _takes_groups(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> bool:
    """Whether PyTorch has a fused kernel for these. Without one it copies, too, and holds all scores besides."""
    chosen = torch._fused_sdp_choice(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=False, scale=scaling, enable_gqa=True
    )
    return chosen == SDPBackend.FLASH_ATTENTION.value
