"""What the input embedding looks up, whole or sharded, against its own table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_softprompt.base.embedding import look_up, vocabulary_size
from tests import tiny


class Scaled(nn.Embedding):
    """Scales what it looks up, as Gemma's does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", world_size=1, rank=0)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_what_is_looked_up_is_what_the_embedding_puts_out() -> None:
    embedding, ids = Scaled(5, 4), torch.tensor([[3, 0, 3]])
    torch.testing.assert_close(look_up(embedding, ids)[0], torch.stack([embedding.weight[i] * 3 for i in (3, 0, 3)]))


def test_of_a_sharded_embedding_the_whole_is_looked_up(mesh) -> None:
    embedding, ids = Scaled(5, 4), torch.tensor([[3, 0, 3]])
    table = embedding.weight.detach().clone()
    embedding.weight = nn.Parameter(distribute_tensor(table, mesh, [Shard(0)]))
    found = look_up(embedding, ids)
    assert not isinstance(found, DTensor) and isinstance(embedding.weight, DTensor)
    torch.testing.assert_close(found[0], table[[3, 0, 3]] * 3)


def test_the_vocabulary_is_what_the_embedding_knows_or_else_what_the_configuration_says() -> None:
    model = tiny.tiny_model()
    model.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    model.config.vocab_size = 7
    assert vocabulary_size(model) == tiny.VOCABULARY + 3
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=7))
    assert vocabulary_size(SimpleNamespace(config=config, get_input_embeddings=nn.Identity)) == 7
