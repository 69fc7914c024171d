"""The loss of a pack: hidden states and loss rows give the weighted sums of all loss terms.

Only the rows with a loss are taken out of the hidden states, so the output layer costs nothing for the others. The
result is one tensor in the order of ``TERMS``, as megatron-core's schedules want it.

T tokens of a pack or of a context-parallel rank's share of it, H hidden, V padded vocabulary, tp tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    all_to_all,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from reflectron.engine.config import LossConfig
from reflectron.engine.data.microbatch import LossRows
from reflectron.engine.training.terms import LossTerms
from reflectron.kernels.distill_head import distillation_head
from reflectron.kernels.types import PairRows, Rows


class PackLoss:
    """Output processor of the last pipeline stage.

    Args:
        config: divergence and backend; the weights of the terms are inside the rows' weights.
        vocab_size: true vocabulary; the columns beyond it are padding.
        tensor_group: ranks that share the vocabulary.
        context_group: ranks that share the tokens and the loss rows of a pack.
        sequence_parallel: the hidden states are split over ``tensor_group`` along T.
    """

    def __init__(
        self,
        config: LossConfig,
        vocab_size: int,
        tensor_group: dist.ProcessGroup,
        context_group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.tensor_group, self.context_group = tensor_group, context_group
        self.sequence_parallel = sequence_parallel

    def __call__(self, hidden_states: torch.Tensor, weight: torch.Tensor, rows: LossRows) -> torch.Tensor:
        """Return the weighted sums over ``rows``, [terms] float32 in the order of ``TERMS``; the loss has a gradient.

        Args:
            hidden_states: [T, 1, H], or [T / tp, 1, H] with sequence parallelism.
            weight: [V / tp, H], this rank's rows of the output layer.
            rows: which rows have a loss; with context parallelism those whose loss this rank computes.
        """
        # Both regions sum the partial gradients that the head returns, over the ranks that share the vocabulary.
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tensor_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tensor_group)
        hidden = hidden.squeeze(1)
        if rows.exchange is not None:
            hidden = all_to_all(
                self.context_group,
                hidden[rows.exchange.send_index],
                list(rows.exchange.receive_counts),
                list(rows.exchange.send_counts),
            )
        result = distillation_head(
            weight,
            PairRows(
                hidden[rows.teacher_index],
                hidden[rows.student_index],
                rows.teacher_labels,
                rows.student_labels,
                rows.ce_teacher_weight if self.config.ce_teacher_weight else None,
                rows.ce_student_weight,
                rows.kl_weight,
            ),
            Rows(hidden[rows.index], rows.labels, rows.ce_weight),
            divergence=self.config.divergence,
            jsd_beta=self.config.jsd_beta,
            temperature=self.config.temperature,
            vocab_size=self.vocab_size,
            tp_group=self.tensor_group,
            backend=self.config.backend,
            # Under data parallelism gradients accumulate in float32 there; the weight's own would be rounded first.
            main_grad=getattr(weight, "main_grad", None),
        )
        ce_generation = result.rows_ce[: rows.generation_rows].sum()
        ce_teacher = result.ce_teacher + result.rows_ce[rows.generation_rows :].sum()
        terms: LossTerms[torch.Tensor, torch.Tensor] = LossTerms(
            loss=result.loss,
            ce_teacher=ce_teacher,
            ce_student=result.ce_student,
            ce_generation=ce_generation,
            kl=result.kl,
        )
        return torch.stack(terms.values())
