"""`prompt_concat`: lay out soft prompts of different tasks and lengths in front of the rows of one batch."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter, functional

from softprompt_kernels.arguments import check_arguments, check_ids, check_tasks
from softprompt_kernels.reference import PromptConcat, prompt_concat_reference

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def prompt_concat(
    embeddings: Tensor,
    input_ids: Tensor | None,
    prompts: Tensor,
    offsets: Tensor,
    task_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    padding_side: str,
    max_prompt_length: int,
    mask_form: str = "padding",
    backend: str = "auto",
) -> PromptConcat:
    """Lay out every row of a batch as `pads | prompt | text` ("left") or `prompt | text | pads` ("right").

    On both sides the pads are outermost: leading pads of the text move in front of the prompt, so that no pad stands
    between a prompt and the first token of its text. Let `first` be the first column of a row whose mask is set, `P`
    the length of its prompt, and `start` the column where the prompt begins (`max_prompt_length + first - P` on the
    left, 0 on the right). Column `c` then holds prompt row `c - start` if that is in `[0, P)`, the text column
    `first + c - start - P` from `start + P` on, as long as there is one, and a pad elsewhere. The width
    `max_prompt_length + length` is known without reading values from the device.

    On a GPU this is one kernel, and each element is read once and written once. Let there be `n = batch * length`
    tokens of text, `m = batch * width` columns, `A` prompt rows of the batch's tasks, `N` prompt rows summed over the
    batch's rows, `s` bytes in an element of the embeddings and `p` in one of the prompts. The forward pass reads
    `n * hidden * s + A * hidden * p + 24 * n` bytes and writes `m * hidden * s + 24 * m` bytes, and `m * width`
    elements of an expanded mask. The backward pass reads `N * hidden * s` bytes and writes 4 bytes for each element of
    `prompts`, which may hold only the batch's tasks. Gradients flow to `prompts` and to `embeddings`. Those of
    `prompts` are summed in float32, in an order that depends only on the shapes, so that two runs are equal to the bit.

    Args:
        embeddings: `[vocab, hidden]`, a contiguous table that is read at `input_ids`; or `[batch, length, hidden]`,
            with `input_ids=None`. Any floating dtype; float32, bfloat16 or float16 on the Triton backend.
        input_ids: int64 `[batch, length]`, or None.
        prompts: `[sum of lengths, hidden]`, contiguous: the prompts of all tasks one after another. They are cast to
            the dtype of `embeddings` (round to nearest even).
        offsets: int64 `[tasks + 1]`: the prompt of task `t` is `prompts[offsets[t]:offsets[t + 1]]`.
        task_ids: int64 `[batch]`; -1 means a row without a prompt.
        attention_mask: `[batch, length]`, bool, uint8 or a signed integer; columns that are not 0 are text. None means
            that all are text. Masked columns between text columns stay where they are.
        labels: int64 `[batch, length]`, or None.
        padding_side: "left" or "right".
        max_prompt_length: at least the length of the longest prompt of the batch's tasks.
        mask_form: "padding" for a mask `[batch, width]`; "boolean" or "additive" for a causal mask
            `[batch, 1, width, width]` as attention layers take it, which the same kernel writes.
        backend: "triton", "reference" (plain torch), or "auto", which takes Triton for tensors on a GPU if it is
            installed and supports the dtypes. With `TRITON_INTERPRET=1` in the environment, "triton" runs on CPU
            tensors.

    Returns:
        A `PromptConcat`. A label is kept if its column is unmasked text and another token predicts it. The last row of
        a prompt predicts the first token of the text; the first token of a row without a prompt gets -100.

    Raises:
        TypeError: an argument of a wrong type or dtype; the message names it.
        ValueError: any other wrong argument; the message names it. Values (tasks, and ids that are read) are always
            checked on the CPU. On a GPU this would wait for the device, so they are checked only with
            `SOFTPROMPT_KERNELS_DEBUG=1` in the environment, and under `torch.compile` never. Values that are not
            checked are clamped: an unknown task means no prompt, and nothing is read or written outside a tensor.

    Example:
        >>> import torch
        >>> out = prompt_concat(
        ...     torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0, 1], [2, 2]]),
        ...     torch.tensor([[7.0], [8.0]]), torch.tensor([0, 2]), torch.tensor([0, -1]),
        ...     padding_side="left", max_prompt_length=2)
        >>> out.inputs_embeds[:, :, 0].tolist()
        [[7.0, 8.0, 1.0, 2.0], [0.0, 0.0, 3.0, 3.0]]
        >>> out.attention_mask.tolist()
        [[1, 1, 1, 1], [0, 0, 1, 1]]
    """
    check_arguments(
        embeddings, input_ids, prompts, offsets, task_ids, attention_mask, labels,
        padding_side, max_prompt_length, mask_form, backend,
    )  # fmt: skip
    checks_values = _checks_values(embeddings)
    if checks_values:
        check_tasks(prompts, offsets, task_ids, max_prompt_length)
    if not _uses_triton(backend, embeddings, prompts):
        try:
            return prompt_concat_reference(
                embeddings, input_ids, prompts, offsets, task_ids, attention_mask, labels,
                padding_side=padding_side, max_prompt_length=max_prompt_length, mask_form=mask_form,
            )  # fmt: skip
        except IndexError:
            # The look-up checks the ids at no cost, but its error does not name the argument.
            check_ids(embeddings, input_ids)
            raise
    if checks_values:
        check_ids(embeddings, input_ids)
    if input_ids is not None and embeddings.requires_grad and torch.is_grad_enabled():
        # torch's own look-up computes the gradient of a table that trains; the kernel has none for a table.
        embeddings, input_ids = functional.embedding(input_ids.clamp(0, embeddings.shape[0] - 1), embeddings), None
    concat = _concat if _is_traced(embeddings) else _Concat.apply
    inputs_embeds, mask, position_ids, laid_out_labels, _ = concat(
        embeddings, input_ids, prompts, offsets, task_ids, attention_mask, labels,
        padding_side == "left", max_prompt_length, mask_form,
    )  # fmt: skip
    return PromptConcat(inputs_embeds, mask, position_ids, None if labels is None else laid_out_labels)


def _checks_values(embeddings: Tensor) -> bool:
    if torch.compiler.is_compiling() or isinstance(embeddings, FakeTensor):
        return False
    return embeddings.device.type == "cpu" or os.environ.get("SOFTPROMPT_KERNELS_DEBUG", "0") == "1"


def _uses_triton(backend: str, embeddings: Tensor, prompts: Tensor) -> bool:
    if backend == "reference":
        return False
    has_dtypes = embeddings.dtype in _TRITON_DTYPES and prompts.dtype in _TRITON_DTYPES
    if backend == "auto":
        return _HAS_TRITON and embeddings.is_cuda and has_dtypes
    if not _HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed; use 'auto' or 'reference'")
    for name, tensor in (("embeddings", embeddings), ("prompts", prompts)):
        if tensor.dtype not in _TRITON_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16 with backend 'triton', got {tensor.dtype}")
    return True


def _is_traced(tensor: Tensor) -> bool:
    """Whether a call may be recorded in place of being run: under `torch.compile`, and by tensors of other types."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


# The schemas are written out because the schema that torch infers from annotations differs between its versions.
@torch.library.custom_op(
    "softprompt_kernels::prompt_concat",
    mutates_args=(),
    schema="(Tensor embeddings, Tensor? input_ids, Tensor prompts, Tensor offsets, Tensor task_ids, "
    "Tensor? attention_mask, Tensor? labels, bool is_left, SymInt max_prompt_length, str mask_form)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _concat(*arguments: Any) -> tuple[Tensor, ...]:
    return _run(*arguments)


@_concat.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    from softprompt_kernels import triton_concat

    embeddings, input_ids, _, _, _, attention_mask, labels, _, max_prompt_length, mask_form = arguments
    return tuple(triton_concat.outputs(embeddings, input_ids, attention_mask, labels, max_prompt_length, mask_form))


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    from softprompt_kernels import triton_concat

    _check_triton_runs(arguments[0])
    return tuple(triton_concat.concat(*arguments))


@torch.library.custom_op(
    "softprompt_kernels::prompt_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor spans, Tensor offsets, Tensor task_ids, SymInt prompt_rows) -> Tensor",
)
def _prompt_gradient(gradient: Tensor, spans: Tensor, offsets: Tensor, task_ids: Tensor, prompt_rows: int) -> Tensor:
    from softprompt_kernels import triton_gradients

    return triton_gradients.prompt_gradient(gradient, spans, offsets, task_ids, prompt_rows)


@_prompt_gradient.register_fake
def _(gradient: Tensor, spans: Tensor, offsets: Tensor, task_ids: Tensor, prompt_rows: int) -> Tensor:
    return gradient.new_empty(prompt_rows, gradient.shape[2], dtype=torch.float32)


@torch.library.custom_op(
    "softprompt_kernels::text_gradient",
    mutates_args=(),
    schema="(Tensor gradient, Tensor spans, SymInt length) -> Tensor",
)
def _text_gradient(gradient: Tensor, spans: Tensor, length: int) -> Tensor:
    from softprompt_kernels import triton_gradients

    return triton_gradients.text_gradient(gradient, spans, length)


@_text_gradient.register_fake
def _(gradient: Tensor, spans: Tensor, length: int) -> Tensor:
    return gradient.new_empty(gradient.shape[0], length, gradient.shape[2])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, input_ids, prompts, offsets, task_ids, *_ = inputs
    _, mask, position_ids, labels, spans = output
    ctx.mark_non_differentiable(mask, position_ids, labels, spans)
    ctx.save_for_backward(spans, offsets, task_ids)
    ctx.prompt_rows, ctx.prompt_dtype = prompts.shape[0], prompts.dtype
    ctx.length = embeddings.shape[1] if input_ids is None else None


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    spans, offsets, task_ids = ctx.saved_tensors
    for_text = for_prompts = None
    if ctx.needs_input_grad[0]:
        if ctx.length is None:
            raise NotImplementedError("the operator has no gradient for a table; call softprompt_kernels.prompt_concat")
        for_text = _text_gradient(gradient, spans, ctx.length)
    if ctx.needs_input_grad[2]:
        for_prompts = _prompt_gradient(gradient, spans, offsets, task_ids, ctx.prompt_rows).to(ctx.prompt_dtype)
    return for_text, None, for_prompts, *(None,) * 7


_concat.register_autograd(_backward, setup_context=_save_for_backward)


class _Concat(torch.autograd.Function):
    """The operator, run without its registration, which costs the host more than all else but the launch."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = _run(*arguments)
        _save_for_backward(ctx, arguments, output)
        return output

    backward = staticmethod(_backward)


def _check_triton_runs(embeddings: Tensor) -> None:
    import triton

    from softprompt_kernels import triton_concat

    kernels = (triton_concat.concat_kernel, triton.language.min)
    if embeddings.device.type == "cpu" and any(isinstance(kernel, triton.runtime.JITFunction) for kernel in kernels):
        raise ValueError(
            "backend 'triton' needs tensors on a GPU, got embeddings on the CPU; move them, use 'auto', or set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
        )
